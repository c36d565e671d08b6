"Evaluation against one pass a token: what each window may read, at every stride"
import math
import numpy as np
import pytest, torch
import torch.nn.functional as F
from okadfa.core import InputError
from okadfa.models.lm import LMConfig, LanguageModel
from okadfa.run.data import Split
from okadfa.run.evaluate import evaluate

BOS, N = 28, 61

@pytest.fixture(scope="module")
def model():
    "One that looks at its context: an untrained model hardly does"
    torch.manual_seed(0)
    size = dict(vocab_size=29, d_model=16, n_layers=2, n_heads=2, max_len=16)
    m = LanguageModel(LMConfig(**size, mixer="softmax", credit="bp"))
    with torch.no_grad():
        for p in m.blocks.parameters(): p.mul_(3)
    return m.eval()

@pytest.fixture(scope="module")
def split(): return Split(np.random.default_rng(0).integers(0, 28, N).astype(np.uint16), N, N, "")

@torch.no_grad()
def by_hand(model, split, seq_len, stride):
    "-ln p of every token by a pass of its own, and how many inputs it was predicted from"
    inputs = [BOS, *split.tokens.tolist()]
    nats, read = [], []
    for t, token in enumerate(split.tokens.tolist()):
        start = next(w for w in range(0, N, stride) if t < w + seq_len)      # the first window that has this token
        logits = model(torch.tensor([inputs[start:t + 1]]))[0, -1].double()
        nats.append(F.cross_entropy(logits, torch.tensor(token)).item()); read.append(t + 1 - start)
    return nats, read

@pytest.mark.parametrize("seq_len", [16, 10])
@pytest.mark.parametrize("stride", [None, 10, 7, 3, 1])
def test_every_token_is_read_with_the_context_of_its_window(model, split, seq_len, stride):
    nats, read = by_hand(model, split, seq_len, stride or seq_len)
    got = evaluate(model, split, BOS, seq_len, 3, stride)
    assert abs(got["nats"] - sum(nats)) < 1e-5*sum(nats) and got["n_tokens"] == N
    assert got["bits_per_byte"] == pytest.approx(got["nats"]/N/math.log(2))
    assert min(read[seq_len:]) == seq_len - (stride or seq_len) + 1

def test_a_smaller_stride_gives_every_token_more_context(model, split):
    strides = 16, 8, 4, 1
    read = [np.array(by_hand(model, split, 16, s)[1]) for s in strides]
    for less, more in zip(read, read[1:]): assert (more >= less).all() and more.sum() > less.sum()
    nats = [evaluate(model, split, BOS, 16, 4, s)["nats"] for s in strides]
    assert min(abs(a - b) for i, a in enumerate(nats) for b in nats[:i]) > 0.01      # each stride asks another question

@pytest.mark.parametrize("kw,says", [
    (dict(seq_len=0), "seq_len"), (dict(seq_len=17), "max_len 16"), (dict(stride=17), "stride"),
    (dict(stride=0), "stride"), (dict(batch_size=0), "batch_size"), (dict(precision="fp8"), "fp8")])
def test_evaluate_refuses(model, split, kw, says):
    with pytest.raises(InputError, match=says): evaluate(model, split, BOS, **kw)
