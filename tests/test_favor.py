"FAVOR+: shapes and types on a grid, causality to the bit, padding, decoding, the promised cosine"
import pytest, torch
import torch.nn.functional as F
from okadfa.attention.favor import (ExponentialFeatures, FavorFeatures, FavorState, favor_attention,
                                    favor_attention_ref, gaussian_directions)
from okadfa.attention.koa import KernelAttention, MultiHeadAttention, rotary
from okadfa.core import InputError, assert_rel

def qkv(b=2, h=2, n=40, d=8, d_v=None, dtype=torch.float64, std=0.7, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda d: (torch.randn(b, h, n, d, generator=g, dtype=torch.float64)*std).to(dtype)
    return draw(d), draw(d), draw(d_v or d)

@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 33])
@pytest.mark.parametrize("chunk", [1, 8, 64])
@pytest.mark.parametrize("causal", [True, False])
def test_chunks_equal_the_definition(n, chunk, causal):
    q, k, v = qkv(n=n, d_v=3)
    f = FavorFeatures(8, m=20)
    ref = favor_attention_ref(q, k, v, f, causal=causal)
    assert_rel("values", ref, favor_attention(q, k, v, f, causal=causal, chunk=chunk), 1e-12)

class Learned(ExponentialFeatures):
    "Every part of an exponential feature map, each head's own, with gradients"
    def __init__(self, h, d, m, shared=False):
        super().__init__(d, m)
        g, heads = torch.Generator().manual_seed(5), () if shared else (h,)
        draw = lambda *s: torch.nn.Parameter(torch.randn(*s, generator=g, dtype=torch.float64)*0.5)
        self.Wq, self.Wk = draw(*heads, m, d), draw(*heads, m, d)
        self.bq, self.bk, self.c = draw(*heads, m), draw(*heads, m), draw(d)
    def affine(self, is_query): return (self.Wq, self.bq) if is_query else (self.Wk, self.bk)
    def log_weight(self, x, is_query):
        c = self.c.to(x.dtype)
        return x @ c if is_query else -x.square() @ c.square()

class Opaque(torch.nn.Module):
    "The same features, with nothing known about how they are made"
    def __init__(self, features): super().__init__(); self.features, self.m = features, features.m
    def forward(self, x, is_query=True): return self.features(x, is_query)
    def scaled(self, x, is_query=True): return self.features.scaled(x, is_query)

@pytest.mark.parametrize("n", [1, 15, 16, 50])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("pad", [True, False])
def test_every_gradient_of_every_path(n, shared, pad):
    q, k, v = (x.requires_grad_() for x in qkv(n=n, d=6, d_v=3, std=2.))
    f = Learned(2, 6, 10, shared)
    mask = torch.stack([torch.arange(n) % 3 == 0, torch.arange(n) >= n - 2]) if pad else None
    wrt, go = (q, k, v, f.Wq, f.Wk, f.bq, f.bk, f.c), torch.randn(2, 2, n, 3, dtype=torch.float64)
    def run(f, **kw):
        out = favor_attention(q, k, v, f, key_padding_mask=mask, **kw)
        return (out, *torch.autograd.grad(out, wrt, go))
    ref = run(f, impl="ref")
    local = run(f, impl="ref", local=True, chunk=8)
    plain = run(f, chunk=8), run(Opaque(f), chunk=8), run(f, chunk=64)
    for ref, got in (*((ref, x) for x in plain), (local, run(f, chunk=8, local=True))):
        for name, a, b in zip(("out", "q", "k", "v", "Wq", "Wk", "bq", "bk", "c"), ref, got):
            if a.abs().max() > 1e-12: assert_rel(name, a, b, 1e-10)
            else: assert b.abs().max() < 1e-12, name        # one key only: nothing to weigh

@pytest.mark.parametrize("size", [1, 3, 100])
def test_segments_do_not_show(size, monkeypatch):
    from okadfa.attention import chunks
    q, k, v = (x.requires_grad_() for x in qkv(n=70, std=3.))
    f, go = FavorFeatures(8), torch.randn(2, 2, 70, 8, dtype=torch.float64)
    def run():
        outs = [favor_attention(q, k, v, f, chunk=8, local=local) for local in (False, True)]
        return *outs, *(g for out in outs for g in torch.autograd.grad(out, (q, k, v), go))
    whole, cut = run(), chunks._segments
    monkeypatch.setattr(chunks, "_segments", lambda n, chunk, segment: cut(n, chunk, size*chunk))
    for a, b in zip(whole, run()): assert_rel("segments", a, b, 1e-12)

def test_memory_is_that_of_the_states():
    "What the backward pass keeps: the inputs, the output and a state a segment, not the features"
    kept = []
    q, k, v = (x.requires_grad_() for x in qkv(b=1, h=2, n=4096, d=32, dtype=torch.float32))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        favor_attention(q, k, v, FavorFeatures(32, 128))
    numbers = sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()//4 for x in kept}.values())
    assert numbers < 2*4096*(4*32 + 8) + 2*128*33*16, numbers       # the features alone would be 2*4096*256

@pytest.mark.parametrize("impl", ["ref", "chunk"])
@pytest.mark.parametrize("causal", [True, False])
def test_grouped_heads_share_keys_and_values(impl, causal):
    q, k, v = qkv(h=6, n=20); k, v = k[:, :2], v[:, :2]
    f = FavorFeatures(8)
    got = favor_attention(q, k, v, f, impl=impl, causal=causal)
    for h in range(6):
        one, shared = slice(h, h + 1), slice(h//3, h//3 + 1)
        ref = favor_attention_ref(q[:, one], k[:, shared], v[:, shared], f, causal=causal)
        assert_rel("head", ref, got[:, one], 1e-12)
    with pytest.raises(InputError, match="multiple"): favor_attention(q[:, :5], k, v, f)

@pytest.mark.parametrize("causal", [True, False])
def test_packed_sequences_are_as_if_alone(causal):
    q, k, v = qkv(b=1, n=50)
    f, at = FavorFeatures(8), [0, 1, 18, 18, 50]
    pad = torch.zeros(1, 50, dtype=torch.bool); pad[0, 30:35] = True
    options = dict(cu_seqlens=torch.tensor(at), causal=causal, key_padding_mask=pad, chunk=8, local=causal)
    got = favor_attention(q, k, v, f, **options)
    for a, b in zip(at, at[1:]):
        part = (x[:, :, a:b] for x in (q, k, v))
        alone = favor_attention_ref(*part, f, causal=causal, key_padding_mask=pad[:, a:b], local=8*causal)
        if b > a: assert_rel("alone", alone, got[:, :, a:b], 1e-12)
    for bad in ([0, 20], [1, 50], [0, 30, 20, 50], [50]):
        with pytest.raises(InputError, match="rise from 0"): favor_attention(q, k, v, f, cu_seqlens=torch.tensor(bad))
    with pytest.raises(InputError, match="b = 1"): favor_attention(*qkv(n=50), f, cu_seqlens=torch.tensor(at))

def test_cross_attention_takes_other_lengths():
    q, _, _ = qkv(n=5); _, k, v = qkv(n=11, seed=1)
    f = FavorFeatures(8)
    assert_rel("cross", favor_attention_ref(q, k, v, f, causal=False), favor_attention(q, k, v, f, causal=False), 1e-12)
    with pytest.raises(InputError, match="as many keys as queries"): favor_attention(q, k, v, f)

@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pad", [True, False])
def test_gradcheck(causal, pad):
    q, k, v = (x.requires_grad_() for x in qkv(b=1, h=1, n=7, d=4))
    mask = torch.tensor([[True, False, False, True, False, False, True]]) if pad else None
    f = FavorFeatures(4, m=6)
    attend = lambda *x: favor_attention(*x, f, causal=causal, key_padding_mask=mask, chunk=3)
    assert torch.autograd.gradcheck(attend, (q, k, v))

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("n,t", [(50, 1), (50, 49), (129, 64), (64, 31)])
@pytest.mark.parametrize("local", [False, True])
def test_the_past_is_bit_identical(dtype, n, t, local):
    q, k, v = qkv(n=n, dtype=dtype)
    f = FavorFeatures(8)
    out = favor_attention(q, k, v, f, chunk=32, local=local)
    for size in (0., 1e-2, 30.):
        q2, k2, v2 = (x.clone() for x in (q, k, v))
        for i, x in enumerate((q2, k2, v2)):
            x[:, :, t:] = torch.randn(x[:, :, t:].shape, generator=torch.Generator().manual_seed(i)).to(dtype)*size
        assert torch.equal(out[:, :, :t], favor_attention(q2, k2, v2, f, chunk=32, local=local)[:, :, :t])

def test_gradients_do_not_come_from_the_future():
    q, k, v = (x.requires_grad_() for x in qkv(n=40))
    for local in (False, True):
        favor_attention(q, k, v, FavorFeatures(8), chunk=16, local=local)[:, :, :13].sum().backward()
        for x in (q, k, v): assert x.grad[:, :, 13:].abs().max() == 0

def test_padding_is_as_if_the_keys_were_not_there():
    q, k, v = qkv(b=2, n=20)
    f, pad = FavorFeatures(8), torch.zeros(2, 20, dtype=torch.bool)
    pad[1, 12:] = True
    out = favor_attention(q, k, v, f, causal=False, key_padding_mask=pad)
    assert_rel("shorter", favor_attention(q[1:], k[1:, :, :12], v[1:, :, :12], f, causal=False), out[1:], 1e-12)
    k2, v2 = k.clone(), v.clone(); k2[1, :, 12:] = 100.; v2[1, :, 12:] = -100.
    assert torch.equal(out, favor_attention(q, k2, v2, f, causal=False, key_padding_mask=pad))

@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("impl", ["ref", "chunk"])
@pytest.mark.parametrize("local", [False, True])
def test_rows_without_a_key_are_zero(causal, impl, local):
    if local and not causal: return
    q, k, v = qkv(n=6)
    pad = torch.tensor([[True]*6, [True, True, False, False, False, False]])
    options = dict(causal=causal, key_padding_mask=pad, impl=impl, local=local, chunk=2)
    out = favor_attention(q, k, v, FavorFeatures(8), **options)
    assert out[0].abs().max() == 0 and out.isfinite().all()
    assert (out[1, :, :2].abs().max() == 0) == causal

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("local", [False, True])
def test_half_precision_stays_finite_and_is_no_average(dtype, local):
    q, k, v = (x.requires_grad_() for x in qkv(b=1, n=1500, d=64, dtype=dtype, std=8.))
    out = favor_attention(q, k, v, FavorFeatures(64), local=local)
    grads = torch.autograd.grad(out.float().square().mean(), (q, k, v), retain_graph=True)
    assert all(g.isfinite().all() for g in grads)
    assert out.dtype == dtype and out.isfinite().all()
    uniform = v.float().cumsum(2)/torch.arange(1, 1501)[:, None]
    assert F.cosine_similarity(out.float()[:, :, 100:], uniform[:, :, 100:], dim=-1).mean() < 0.5

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_after_65_536_positions(dtype):
    q, k, v = (x.requires_grad_() for x in qkv(b=1, h=1, n=65_536, d=32, dtype=dtype, std=8.))
    f = FavorFeatures(32)
    out = favor_attention(q, k, v, f)
    grads = torch.autograd.grad(out.float().square().mean(), (q, k, v), retain_graph=True)
    assert all(g.isfinite().all() for g in grads)
    with torch.no_grad():
        assert out.isfinite().all()
        for t in (0, 1, 1_000, 32_767, 65_535):          # the definition, one row at a time, in double precision
            seen = q[:, :, t:t+1], k[:, :, :t+1], v[:, :, :t+1]
            want = favor_attention_ref(*(x.double() for x in seen), f, causal=False)
            assert_rel(f"{t=}", want, out[:, :, t:t+1].double(), 5e-2)
        uniform = v.float().cumsum(2)/torch.arange(1, 65_537)[:, None]
        assert F.cosine_similarity(out.float()[:, :, 100:], uniform[:, :, 100:], dim=-1).mean() < 0.5

def test_autocast_does_not_reach_the_sums():
    q, k, v = qkv(n=300, d=16, dtype=torch.float32)
    f = FavorFeatures(16)
    with torch.autocast("cpu", torch.bfloat16): got = favor_attention(q, k, v, f)
    assert torch.equal(got, favor_attention(q, k, v, f))

@pytest.mark.parametrize("d,m", [(8, 1), (8, 8), (8, 13), (3, 50)])
def test_directions(d, m):
    w = gaussian_directions(m, d, generator=torch.Generator().manual_seed(0)).double()
    assert w.shape == (m, d)
    for block in F.normalize(w).split(d):
        assert_rel("orthogonal", torch.eye(len(block)).double(), block @ block.T, 1e-5)

def test_features_are_seeded_saved_and_redrawn():
    a, b = FavorFeatures(8, seed=3), FavorFeatures(8, seed=3)
    assert torch.equal(a.projection, b.projection)
    assert not torch.equal(a.projection, FavorFeatures(8, seed=4).projection)
    a.redraw(); assert not torch.equal(a.projection, b.projection)
    b.load_state_dict(a.state_dict()); assert torch.equal(a.projection, b.projection)
    a.redraw(); b.redraw(); assert torch.equal(a.projection, b.projection)     # the sequence goes on where it was
    assert a.m == 32 and not list(a.parameters())

@pytest.mark.parametrize("d", [32, 64])
def test_small_inputs_are_close_to_softmax(d):
    cos = []
    for seed in range(3):
        q, k, _ = qkv(b=1, h=1, n=256, d=d, std=0.5, dtype=torch.float32, seed=seed)
        eye = torch.eye(256)[None, None]
        soft = F.scaled_dot_product_attention(q, k, eye, is_causal=True)
        cos.append(F.cosine_similarity(soft, favor_attention(q, k, eye, FavorFeatures(d, seed=seed)), dim=-1).mean())
    assert sum(cos)/3 > 0.93

@pytest.mark.parametrize("dtype,tol", [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("kind", ["shared", "per head", "opaque"])
@pytest.mark.parametrize("prompt", [0, 1, 16, 30])
@pytest.mark.parametrize("local", [False, True])
def test_steps_equal_the_parallel_form(dtype, tol, kind, prompt, local):
    if local and kind == "opaque": return
    q, k, v = qkv(n=40, d_v=5, dtype=dtype, std=2.)
    f = Learned(2, 8, 20) if kind == "per head" else FavorFeatures(8)
    if kind == "opaque": f = Opaque(f)
    state = FavorState(f, local, chunk=8)
    out = [*state.prefill(*(x[:, :, :prompt] for x in (q, k, v))).unbind(2)]
    with torch.autocast("cpu", torch.bfloat16, enabled=prompt == 1):
        out += [state.step(q[:, :, t], k[:, :, t], v[:, :, t]) for t in range(prompt, 40)]
    assert_rel("steps", favor_attention(q, k, v, f, local=local, chunk=8), torch.stack(out, 2), tol)
    with pytest.raises(InputError, match="new FavorState"): state.prefill(q, k, v)

def test_a_step_changes_nothing_it_was_given():
    q, k, v = qkv(n=3, dtype=torch.float64)
    before, f = [x.clone() for x in (q, k, v)], FavorFeatures(8)
    state = FavorState(f); state.prefill(q, k, v)
    state.step(q[:, :, 0], k[:, :, 0], v[:, :, 0])
    for a, b in zip(before, (q, k, v)): assert torch.equal(a, b)

def test_one_chunk_of_exact_weights_is_softmax():
    q, k, v = qkv(n=40, std=3.)
    softmax, f = F.scaled_dot_product_attention(q, k, v, is_causal=True), FavorFeatures(8)
    assert_rel("softmax", softmax, favor_attention(q, k, v, f, local=True, chunk=40), 1e-12)
    for bad in (dict(causal=False), dict(features=Opaque(FavorFeatures(8)))):
        with pytest.raises(InputError, match="local=True needs"):
            favor_attention(**(dict(q=q, k=k, v=v, features=f, local=True) | bad))

def test_rotary_needs_pairs():
    with pytest.raises(InputError, match="even"): rotary(torch.randn(1, 1, 3, 5))

@pytest.mark.parametrize("layer", [MultiHeadAttention, KernelAttention])
@pytest.mark.parametrize("n", [1, 2, 31])
def test_layers_are_causal_and_take_any_length(layer, n):
    torch.manual_seed(0)
    attn, x = layer(16, 2), torch.randn(2, n, 16)
    y, x2 = attn(x), x.clone()
    x2[:, n//2:] += 5
    assert y.shape == x.shape and torch.equal(y[:, :n//2], attn(x2)[:, :n//2])

@pytest.mark.parametrize("layer", [MultiHeadAttention, KernelAttention])
def test_what_is_written_into_the_stream_is_that_of_the_writers(layer):
    "A model scales them at the start: half of their weights, half of the output"
    attn, x = layer(16, 2), torch.randn(2, 9, 16)
    assert attn.writers() == [attn.out] and attn(x).abs().max() > 0
    with torch.no_grad(): before, _ = attn(x), [w.weight.mul_(0.5) for w in attn.writers()]
    assert_rel("half of it", before/2, attn(x), 1e-6)

def test_wrong_width_is_one_line():
    q, k, v = qkv()
    with pytest.raises(InputError, match="made for d=16"): favor_attention(q, k, v, FavorFeatures(16))
    for d, m in ((0, 4), (4, 0)):
        with pytest.raises(InputError): FavorFeatures(d, m)

def test_gradients_are_finite_where_nearly_all_weights_underflow():
    f = FavorFeatures(16, 16)
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        q, k, v = ((torch.randn(1, 2, 70, 16, generator=g)*s).requires_grad_() for s in (24, 24, 1))
        favor_attention(q, k, v, f).sum().backward()
        for x in (q, k, v): assert x.grad.isfinite().all()
