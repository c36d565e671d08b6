"Sinks and a sliding window beside features: against the quadratic definition, at every norm, in every shape"
import pytest, torch
import torch.nn.functional as F
from okadfa.attention.estimators import NoFeatures, make_features
from okadfa.attention.favor import FavorFeatures, FavorState, favor_attention, favor_attention_ref
from okadfa.attention.window import near_attention_ref
from okadfa.core import InputError, assert_rel
from test_favor import Learned, Opaque, qkv

EXACT = [dict(window=1), dict(window=7, sinks=4), dict(sinks=3), dict(window=16, sinks=1), dict(window=33, sinks=2),
         dict(window=200, sinks=4)]

def slow(q, k, v, f, window=0, sinks=0, pad=None, scale=None):
    "Written once more, with nothing of the library but the log features: loops over rows and keys"
    b, h, n, d = q.shape
    g = h//k.shape[1]
    scale = d**-0.5 if scale is None else scale
    lq, lk = f.log_features(q*(scale*d**.5)**.5), f.log_features(k.repeat_interleave(g, 1)*(scale*d**.5)**.5, False)
    rows = []
    for i in range(n):
        logs = []
        for j in range(i + 1):
            if j < sinks or j > i - window: w = (q[:, :, i]*k.repeat_interleave(g, 1)[:, :, j]).sum(-1)*scale
            else: w = (lq[:, :, i] + lk[:, :, j]).logsumexp(-1)
            logs.append(w if pad is None else w.masked_fill(pad[:, None, j], -torch.inf))
        P = torch.stack(logs, -1).softmax(-1).nan_to_num(0)
        rows.append((P[..., None]*v.repeat_interleave(g, 1)[:, :, :i + 1]).sum(-2))
    return torch.stack(rows, 2)

@pytest.mark.parametrize("exact", EXACT)
@pytest.mark.parametrize("n", [1, 17, 40])
def test_the_definition_is_the_definition(exact, n):
    q, k, v = qkv(n=n, d_v=3, h=4)
    pad = torch.stack([torch.arange(n) % 3 == 0, torch.arange(n) >= n - 2])
    f = FavorFeatures(8, m=20)
    for mask, scale in ((None, None), (pad, None), (None, 0.7)):
        ref = slow(q, k[:, :2], v[:, :2], f, pad=mask, scale=scale, **exact)
        for impl in ("ref", "chunk"):
            out = favor_attention(q, k[:, :2], v[:, :2], f, key_padding_mask=mask, scale=scale, impl=impl, **exact)
            if n > 1 or mask is None: assert_rel(impl, ref, out, 1e-11)

@pytest.mark.parametrize("n", [1, 15, 16, 50, 131])
@pytest.mark.parametrize("exact", EXACT)
@pytest.mark.parametrize("shared", [True, False])
def test_every_gradient(n, exact, shared):
    q, k, v = (x.requires_grad_() for x in qkv(n=n, d=6, d_v=3, std=2.))
    f = Learned(2, 6, 10, shared)
    mask = torch.stack([torch.arange(n) % 3 == 0, torch.arange(n) >= n - 2])
    wrt, go = (q, k, v, f.Wq, f.Wk, f.bq, f.bk, f.c), torch.randn(2, 2, n, 3, dtype=torch.float64)
    def run(impl):
        out = favor_attention(q, k, v, f, key_padding_mask=mask, impl=impl, chunk=16, **exact)
        return (out, *torch.autograd.grad(out, wrt, go, allow_unused=True, materialize_grads=True))
    for name, a, b in zip(("out", "q", "k", "v", "Wq", "Wk", "bq", "bk", "c"), run("ref"), run("chunk")):
        if a.abs().max() > 1e-12: assert_rel(name, a, b, 1e-10)
        else: assert b.abs().max() < 1e-12, name

def of_norm(x, norm): return F.normalize(x, dim=-1)*norm

@pytest.mark.parametrize("norm", [1., 30., 96., 160., 1000.])
@pytest.mark.parametrize("how", [dict(), dict(window=8, sinks=3), dict(local=True, chunk=16)])
def test_every_norm(norm, how):
    "The largest key wins. Gradients that vanish are compared with what they are made of"
    q, k, v = qkv(n=60, d=64)
    (q, k), f, go = (of_norm(x, norm).requires_grad_() for x in (q, k)), FavorFeatures(64), torch.randn_like(v)
    v.requires_grad_()
    def run(impl):
        out = favor_attention(q, k, v, f, impl=impl, **how)
        return out, *torch.autograd.grad(out, (q, k, v), go)
    floor = 1e-9*norm*go.norm()
    for name, a, b in zip(("out", *"qkv"), run("ref"), run("chunk")):
        assert (a - b).norm() <= 1e-9*a.norm() + (floor if name in "qk" else 0), name
    state = FavorState(f, **how)
    steps = torch.stack([state.step(q[:, :, t], k[:, :, t], v[:, :, t]) for t in range(60)], 2)
    assert_rel("steps", run("ref")[0], steps, 1e-9)
    assert steps.abs().amax(-1).min() > 0                                       # no row was lost

@pytest.mark.parametrize("norm,tol", [(96., 1e-4), (160., 2e-4), (1000., 2e-2)])
def test_large_norms_in_single_precision(norm, tol):
    "As right as logarithms of this size can be"
    q, k, v = qkv(n=60, d=64, dtype=torch.float32)
    q, k, f = of_norm(q, norm), of_norm(k, norm), FavorFeatures(64)
    ref = favor_attention_ref(q.double(), k.double(), v.double(), f)
    assert_rel("parallel", ref, favor_attention(q, k, v, f).double(), tol)
    state = FavorState(f)
    steps = [state.step(q[:, :, t], k[:, :, t], v[:, :, t]) for t in range(60)]
    assert_rel("steps", ref, torch.stack(steps, 2).double(), tol)

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("n,t", [(50, 1), (50, 49), (129, 64), (140, 97)])
@pytest.mark.parametrize("exact", [dict(window=8, sinks=2), dict(window=64, sinks=4), dict(sinks=3)])
def test_the_past_is_bit_identical(dtype, n, t, exact):
    q, k, v = qkv(n=n, dtype=dtype)
    f = FavorFeatures(8)
    out = favor_attention(q, k, v, f, chunk=32, **exact)
    for size in (0., 1e-2, 30., 3000.):
        q2, k2, v2 = (x.clone() for x in (q, k, v))
        for i, x in enumerate((q2, k2, v2)):
            x[:, :, t:] = torch.randn(x[:, :, t:].shape, generator=torch.Generator().manual_seed(i)).to(dtype)*size
        assert torch.equal(out[:, :, :t], favor_attention(q2, k2, v2, f, chunk=32, **exact)[:, :, :t])

def test_the_past_is_bit_identical_where_rows_are_mended():
    q, k, v = qkv(n=60, d=64, dtype=torch.float32)
    q, k, f = of_norm(q, 300), of_norm(k, 300), FavorFeatures(64)
    for how in (dict(), dict(window=8, sinks=2)):
        out = favor_attention(q, k, v, f, **how)
        for t in (1, 30, 59):
            q2, k2 = q.clone(), k.clone()
            q2[:, :, t:] *= 1e-3; k2[:, :, t:] *= 3
            assert torch.equal(out[:, :, :t], favor_attention(q2, k2, v, f, **how)[:, :, :t])

def test_gradients_do_not_come_from_the_future():
    q, k, v = (x.requires_grad_() for x in qkv(n=60))
    favor_attention(q, k, v, FavorFeatures(8), chunk=16, window=9, sinks=2)[:, :, :13].sum().backward()
    for x in (q, k, v): assert x.grad[:, :, 13:].abs().max() == 0

@pytest.mark.parametrize("exact", EXACT)
def test_packed_texts_have_sinks_of_their_own(exact):
    q, k, v = qkv(b=1, n=70)
    f, at = FavorFeatures(8), [0, 1, 18, 18, 70]
    pad = torch.zeros(1, 70, dtype=torch.bool); pad[0, 30:35] = True
    got = favor_attention(q, k, v, f, cu_seqlens=torch.tensor(at), key_padding_mask=pad, **exact)
    for a, b in zip(at, at[1:]):
        alone = favor_attention_ref(*(x[:, :, a:b] for x in (q, k, v)), f, key_padding_mask=pad[:, a:b], **exact)
        if b > a: assert_rel("alone", alone, got[:, :, a:b], 1e-11)

def test_everything_exact_is_softmax():
    q, k, v = qkv(n=40, std=3.)
    f, softmax = FavorFeatures(8), F.scaled_dot_product_attention(q, k, v, is_causal=True)
    for exact in (dict(window=40), dict(sinks=40), dict(window=20, sinks=20), dict(window=1000, sinks=1000)):
        assert_rel(str(exact), softmax, favor_attention(q, k, v, f, **exact), 1e-12)

@pytest.mark.parametrize("name", ["favor+", "derf"])
@pytest.mark.parametrize("exact", [dict(), dict(window=9, sinks=2)])
def test_maps_of_key_heads_serve_groups(name, exact):
    "Fitted on keys of two heads, for six query heads: as if each had its own copy"
    q, k, v = qkv(h=6, n=50); k, v = k[:, :2], v[:, :2]
    f = make_features(name, 8)
    if hasattr(f, "fit"): f.fit(q, k)
    ref = slow(q, k, v, for_six(f, q, k), **exact)
    assert_rel("parallel", ref, favor_attention(q, k, v, f, **exact), 1e-10)
    state = FavorState(f, **exact)
    out = [state.prefill(q[:, :, :20], k[:, :, :20], v[:, :, :20])]
    out += [state.step(q[:, :, t], k[:, :, t], v[:, :, t])[:, :, None] for t in range(20, 50)]
    assert_rel("decoding", ref, torch.cat(out, 2), 1e-9)
    assert state.S.shape[1] == 2

def for_six(f, q, k):
    from okadfa.attention.favor import for_heads
    return for_heads(f, q.shape[1], k.shape[1])

@pytest.mark.parametrize("dtype,tol", [(torch.float32, 1e-5), (torch.float64, 1e-11), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("exact", EXACT)
@pytest.mark.parametrize("pieces", [(0,), (1,), (5, 3), (20, 1, 4), (33,)])
def test_decoding_equals_the_parallel_form(dtype, tol, exact, pieces):
    q, k, v = qkv(h=4, n=40, d_v=5, dtype=dtype, std=2.); k, v = k[:, :2], v[:, :2]
    f, at, out = FavorFeatures(8), 0, []
    state = FavorState(f, scale=0.5, **exact)
    for piece in pieces:
        out.append(state.extend(*(x[:, :, at:at + piece] for x in (q, k, v)))); at += piece
    out += [state.step(q[:, :, t], k[:, :, t], v[:, :, t])[:, :, None] for t in range(at, 40)]
    assert_rel("decoding", favor_attention(q, k, v, f, scale=0.5, **exact), torch.cat(out, 2), tol)

@pytest.mark.parametrize("exact", [dict(window=7, sinks=3), dict(sinks=3), dict(window=5), dict()])
@pytest.mark.parametrize("prompt", [1, 6, 25])
def test_padding_on_the_left_is_as_if_alone(exact, prompt):
    q, k, v = qkv(b=3, h=4, n=40); k, v = k[:, :2], v[:, :2]
    f, first = FavorFeatures(8), torch.tensor([0, 4, 23])
    first = first.clamp_max(prompt - 1)
    state = FavorState(f, **exact)
    out = [state.prefill(*(x[:, :, :prompt] for x in (q, k, v)), first)]
    out += [state.step(q[:, :, t], k[:, :, t], v[:, :, t])[:, :, None] for t in range(prompt, 40)]
    out = torch.cat(out, 2)
    for b, a in enumerate(first.tolist()):
        alone = favor_attention(*(x[b:b + 1, :, a:] for x in (q, k, v)), f, **exact)
        assert_rel("alone", alone, out[b:b + 1, :, a:], 1e-10)
        assert not out[b, :, :a].any()

def test_rows_are_reordered():
    q, k, v = qkv(b=3, n=30)
    f, rows = FavorFeatures(8), torch.tensor([2, 2, 0])
    state = FavorState(f, window=5, sinks=2)
    state.prefill(*(x[:, :, :20] for x in (q, k, v)), torch.tensor([0, 3, 1]))
    state.reorder(rows)
    got = state.step(q[rows, :, 20], k[rows, :, 20], v[rows, :, 20])
    for b, row in enumerate(rows.tolist()):
        a = [0, 3, 1][row]
        alone = favor_attention(*(x[row:row + 1, :, a:21] for x in (q, k, v)), f, window=5, sinks=2)
        assert_rel("row", alone[:, :, -1], got[b:b + 1], 1e-10)

def test_what_does_not_fit_is_one_line():
    q, k, v = qkv()
    f = FavorFeatures(8)
    for bad, match in ((dict(window=-1), "numbers of keys"), (dict(window=3, local=True), "not both"),
                       (dict(sinks=3, causal=False), "causal=True"),
                       (dict(window=2, features=Opaque(f)), "logarithms")):
        with pytest.raises(InputError, match=match): favor_attention(**(dict(q=q, k=k, v=v, features=f) | bad))
    with pytest.raises(InputError, match="padding on the left"):
        FavorState(f, local=True).prefill(q, k, v, torch.tensor([0, 3]))

def test_a_model_with_window_and_sinks():
    from okadfa.models.lm import LMConfig, LanguageModel
    size = dict(vocab_size=50, d_model=16, n_layers=2, n_heads=2, max_len=64)
    model = LanguageModel(LMConfig(**size, window=5, sinks=2)).eval()
    ids = torch.randint(50, (2, 40))
    assert [b.mixer.exact for b in model.blocks] == [dict(local=False, window=5, sinks=2)]*2
    assert not torch.equal(model(ids), LanguageModel(LMConfig(**size)).eval()(ids))
    ids2 = ids.clone(); ids2[:, 20:] = 3
    assert torch.equal(model(ids)[:, :20], model(ids2)[:, :20])
    for bad in (dict(window=-1), dict(window=3, local=True), dict(sinks=2, mixer="softmax")):
        with pytest.raises(InputError): LMConfig(**size, **bad)

@pytest.mark.parametrize("log", [-1e6, None])
@pytest.mark.parametrize("exact", [dict(window=7, sinks=3), dict(sinks=3), dict(window=1)])
@pytest.mark.parametrize("prompt", [0, 1, 25])
def test_a_window_alone_is_decoded_without_a_state(log, exact, prompt, monkeypatch):
    "Nothing is absorbed, and rows that are padded on the left give what they give alone"
    from okadfa.attention import decode
    monkeypatch.setattr(decode, "absorb", lambda *a: pytest.fail("something was absorbed"))
    q, k, v = qkv(b=2, h=4, n=40, d_v=5); k, v = k[:, :2], v[:, :2]
    f = NoFeatures(8) if log is None else NoFeatures(8, log)
    ref, _ = near_attention_ref(q, *(x.repeat_interleave(2, 1) for x in (k, v)), **(dict(window=0) | exact))
    state = FavorState(f, **exact)
    out = [state.step(q[:, :, t], k[:, :, t], v[:, :, t])[:, :, None] for t in range(40)]
    assert_rel("decoding", ref, torch.cat(out, 2), 1e-10)
    if not prompt: return
    monkeypatch.undo()
    state, first = FavorState(f, **exact), torch.tensor([0, prompt - 1])
    out = [state.prefill(*(x[:, :, :prompt] for x in (q, k, v)), first)]
    out += [state.step(q[:, :, t], k[:, :, t], v[:, :, t])[:, :, None] for t in range(prompt, 40)]
    alone = favor_attention(*(x[1:, :, prompt - 1:] for x in (q, k, v)), f, **exact)
    assert_rel("padded", alone, torch.cat(out, 2)[1:, :, prompt - 1:], 1e-10)
