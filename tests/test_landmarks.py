"Landmarks: against the rule key by key, in every shape, in pieces, at every norm, and inside models of transformers"
import copy
from dataclasses import replace
import pytest, torch
import torch.nn.functional as F
from okadfa.attention.landmarks import (LandmarkConfig, Landmarks, LandmarkState, condense, landmark_attention,
                                        landmark_attention_ref, landmark_rows, who_joins)
from okadfa.core import InputError, assert_rel

SMALL = LandmarkConfig(landmarks=6, window=5, sinks=2, block=3, memory=20)
CONFIGS = [SMALL, LandmarkConfig(landmarks=1, window=1, sinks=0, block=1), LandmarkConfig(9, 4, 3, 7, 1e9, 2.),
           LandmarkConfig(6, 5, 2, 3, 20, merge=False)]

def qkv(n=50, b=2, h=4, h_k=2, d=5, d_v=3, std=1., seed=0):
    g = torch.Generator().manual_seed(seed)
    make = lambda heads, size: torch.randn(b, heads, n, size, generator=g, dtype=torch.float64)
    return make(h, d)*std, make(h_k, d)*std, make(h_k, d_v)

@pytest.mark.parametrize("c", CONFIGS)
@pytest.mark.parametrize("n", [1, 2, 10, 11, 34])
def test_it_is_the_rule(c, n):
    q, k, v = qkv(n, h=2, std=1.5)
    out = landmark_attention(q, k, v, c)
    for b, h in ((0, 0), (1, 1)):
        assert_rel(f"{b} {h}", landmark_attention_ref(q[b, h], k[b, h], v[b, h], c), out[b, h], 1e-9)

def test_a_group_of_heads_looks_together():
    q, k, v = qkv(60)
    same = q[:, :2].repeat_interleave(2, 1)
    assert_rel("equal queries", landmark_attention(q[:, :2], k, v, SMALL).repeat_interleave(2, 1),
               landmark_attention(same, k, v, SMALL), 1e-12)
    first = [landmark_attention(x, k, v, SMALL)[:, :1] for x in (q, q[:, ::2])]
    assert not torch.allclose(*first)

@pytest.mark.parametrize("c", CONFIGS)
def test_gradients(c):
    "With a floor that no attention outweighs means do not depend on it, and the gradient is that of the function"
    q, k, v = (x.requires_grad_() for x in qkv(26, b=1, h=2, h_k=1, d=3, d_v=2))
    flat = replace(c, floor=1e12)
    assert torch.autograd.gradcheck(lambda *x: landmark_attention(*x, flat), (q, k, v), fast_mode=True)
    ref = landmark_attention_ref(q[0, 0], k[0, 0], v[0, 0], c)
    go = torch.randn_like(ref)
    for a, b in zip(torch.autograd.grad(ref, (q, k, v), go), torch.autograd.grad(
            landmark_attention(q[:, :1], k, v, c)[0, 0], (q, k, v), go)): assert_rel("as the rule's", a, b, 1e-8)

@pytest.mark.parametrize("c", CONFIGS)
@pytest.mark.parametrize("cut", [1, 9, 10, 11, 23, 49])
def test_in_pieces(c, cut):
    q, k, v = qkv()
    state = LandmarkState(c)
    prompt, rest = ([x[:, :, at] for x in (q, k, v)] for at in (slice(cut), slice(cut, None)))
    out = torch.cat([state.prefill(*prompt), state.extend(*rest)], 2)
    assert_rel("pieces", landmark_attention(q, k, v, c), out, 1e-11)
    again, rows = LandmarkState(c), torch.tensor([1, 1, 0])
    again.prefill(*prompt); again.reorder(rows)
    assert_rel("rows taken", out[rows][:, :, cut:], again.extend(*(x[rows] for x in rest)), 1e-11)

@pytest.mark.parametrize("c", CONFIGS)
@pytest.mark.parametrize("cut", [8, 20, 44])
def test_rows_that_begin_later(c, cut):
    q, k, v = qkv(b=3)
    first, state = torch.tensor([0, 7, 5]), LandmarkState(c)
    prompt, rest = ([x[:, :, at] for x in (q, k, v)] for at in (slice(cut), slice(cut, None)))
    out = torch.cat([state.prefill(*prompt, first), state.extend(*rest)], 2)
    for r, f in enumerate(first):
        alone = landmark_attention(*(x[r:r + 1, :, f:] for x in (q, k, v)), c)
        assert_rel(f"row {r}", alone, out[r:r + 1, :, f:], 1e-11)
        assert not out[r, :, :f].any()

def test_padding_at_the_end():
    q, k, v = qkv(40)
    pad = torch.arange(40) >= torch.tensor([40, 23])[:, None]
    out = landmark_attention(q, k, v, SMALL, key_padding_mask=pad)
    assert_rel("whole", landmark_attention(q, k, v, SMALL)[0], out[0], 1e-12)
    assert_rel("alone", landmark_attention(*(x[1:, :, :23] for x in (q, k, v)), SMALL)[0], out[1, :, :23], 1e-11)
    with pytest.raises(InputError, match="end of a row"): landmark_attention(q, k, v, SMALL, key_padding_mask=~pad)

@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_past_does_not_change(dtype):
    q, k, v = (x.to(dtype) for x in qkv(90))
    for cut in (3, 10, 47, 88):
        later = [torch.cat([x[:, :, :cut], torch.randn_like(x[:, :, cut:])*9], 2) for x in (q, k, v)]
        a, b = (landmark_attention(*x, SMALL)[:, :, :cut] for x in ((q, k, v), later))
        assert torch.equal(a, b)

@pytest.mark.parametrize("norm", [1e-3, 30., 160., 1000.])
def test_every_norm(norm):
    q, k, v = qkv(80, d=16)
    q, k = (F.normalize(x, dim=-1)*norm for x in (q, k))
    out = landmark_attention(q.float(), k.float(), v.float(), SMALL)
    assert out.isfinite().all() and (out.abs() <= v.abs().max() + 1e-3).all()
    assert_rel("precision", landmark_attention(q, k, v, SMALL)[:, :, :30].float(), out[:, :, :30], 1e-3)
    exact = LandmarkConfig(landmarks=200, window=5, sinks=2, block=3)        # room for every key: nothing is merged
    soft = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert_rel("room for all", soft, landmark_attention(q, k, v, exact), 1e-9)

def test_nothing_is_lost():
    q, k, v = qkv(200)
    _, marks, mass = landmark_rows(q, k, v, SMALL)
    blocks = len(range(SMALL.first, 200, SMALL.block))
    assert (marks.count.sum(-1) == blocks*SMALL.block).all() and (mass >= 0).all() and (marks.spread >= 0).all()

def test_who_joins():
    "Looked at and alone stay; a free place is nobody's neighbour"
    at = torch.tensor([[0., 0.], [0.1, 0.], [9., 9.], [5., 0.], [0., 0.]])[None, None]
    counts = torch.tensor([[[1., 1., 1., 1., 0.]]])
    x = Landmarks(at, at, counts, torch.tensor([[[5., 1., 1., 3., 99.]]]), torch.zeros(1, 1, 5))
    stay, go, near = (y[0, 0].tolist() for y in who_joins(x, 3))
    assert set(stay) == {0, 2, 3} and set(go) == {1, 4} and stay[near[go.index(1)]] == 0
    found = condense(x, 3)
    assert found.count.sum() == 4 and sorted(found.count[0, 0].tolist()) == [1, 1, 2]

def test_heads_in_a_model():
    transformers = pytest.importorskip("transformers")
    from okadfa.models.hub import KernelCache, LandmarkHeads, heads_of
    from okadfa.models.linearize import ask_by_name
    torch.manual_seed(0)
    size = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=61, **size)).double().eval()
    ask_by_name(model)
    for layer in model.model.layers: layer.self_attn.okadfa = LandmarkHeads(SMALL)
    assert heads_of(model.model.layers[0].self_attn).config == SMALL
    ids = torch.randint(3, 61, (2, 33))
    mask = torch.ones_like(ids); mask[1, :6] = 0
    how = dict(do_sample=False, max_new_tokens=12, pad_token_id=0)
    with torch.no_grad():
        mine = model.generate(ids, attention_mask=mask, past_key_values=KernelCache(model), **how)
        slow = model.generate(ids, attention_mask=mask, use_cache=False, **how)
        alone = model.generate(ids[1:, 6:], past_key_values=KernelCache(model), **how)
        beams = model.generate(ids, attention_mask=mask, num_beams=3, past_key_values=KernelCache(model), **how)
    assert torch.equal(mine, slow) and torch.equal(alone[:, 27:], mine[1:, 33:])
    assert torch.equal(beams, model.generate(ids, attention_mask=mask, num_beams=3, use_cache=False, **how))
    cache = KernelCache(model)
    with torch.no_grad(): model(ids, past_key_values=cache)
    twin = copy.deepcopy(cache)
    with torch.no_grad(): a, b = (model(ids[:, :1], past_key_values=x).logits for x in (cache, twin))
    assert torch.equal(a, b)
    with pytest.raises(InputError, match="take tokens out"): cache.crop(-1)

def test_no_rows_and_autocast():
    q, k, v = qkv(0)
    assert landmark_attention(q, k, v, SMALL).shape == (2, 4, 0, 3)
    q, k, v = (x.float() for x in qkv(40))
    state = LandmarkState(SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        whole = landmark_attention(q, k, v, SMALL)
        pieces = [state.prefill(*(x[:, :, :20] for x in (q, k, v))), state.extend(*(x[:, :, 20:] for x in (q, k, v)))]
    assert_rel("whole", landmark_attention(q, k, v, SMALL), whole, 1e-6)
    assert_rel("pieces", whole, torch.cat(pieces, 2), 1e-4)

def test_bad_input():
    q, k, v = qkv(9)
    for wrong in (dict(landmarks=0), dict(window=0), dict(block=0), dict(sinks=-1), dict(memory=0.), dict(floor=0.)):
        with pytest.raises(InputError): LandmarkConfig(**wrong)
    for bad in ((q, k[:, :, 1:], v), (q[:, :3], k, v), (q, k, v[:1])):
        with pytest.raises(InputError): landmark_attention(*bad)
