"FAVOR+: shapes and types on a grid, causality to the bit, padding, decoding, the promised cosine"
import pytest, torch
import torch.nn.functional as F
from okadfa.attention.favor import FavorFeatures, FavorState, favor_attention, favor_attention_ref, gaussian_directions
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
    assert torch.autograd.gradcheck(lambda *x: favor_attention(*x, f, causal=causal, key_padding_mask=mask, chunk=3), (q, k, v))

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("n,t", [(50, 1), (50, 49), (129, 64), (64, 31)])
def test_the_past_is_bit_identical(dtype, n, t):
    q, k, v = qkv(n=n, dtype=dtype)
    f = FavorFeatures(8)
    out = favor_attention(q, k, v, f, chunk=32)
    for size in (0., 1e-2, 30.):
        q2, k2, v2 = (x.clone() for x in (q, k, v))
        for i, x in enumerate((q2, k2, v2)): x[:, :, t:] = torch.randn(x[:, :, t:].shape, generator=torch.Generator().manual_seed(i)).to(dtype)*size
        assert torch.equal(out[:, :, :t], favor_attention(q2, k2, v2, f, chunk=32)[:, :, :t])

def test_gradients_do_not_come_from_the_future():
    q, k, v = (x.requires_grad_() for x in qkv(n=40))
    favor_attention(q, k, v, FavorFeatures(8), chunk=16)[:, :, :13].sum().backward()
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
def test_rows_without_a_key_are_zero(causal, impl):
    q, k, v = qkv(n=6)
    pad = torch.tensor([[True]*6, [True, True, False, False, False, False]])
    out = favor_attention(q, k, v, FavorFeatures(8), causal=causal, key_padding_mask=pad, impl=impl)
    assert out[0].abs().max() == 0 and out.isfinite().all()
    assert (out[1, :, :2].abs().max() == 0) == causal

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_finite_and_is_no_average(dtype):
    q, k, v = qkv(b=1, n=1500, d=64, dtype=dtype, std=8.)
    out = favor_attention(q, k, v, FavorFeatures(64))
    assert out.dtype == dtype and out.isfinite().all()
    uniform = v.float().cumsum(2)/torch.arange(1, 1501)[:, None]
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
    for block in F.normalize(w).split(d): assert_rel("orthogonal", torch.eye(len(block)).double(), block @ block.T, 1e-5)

def test_features_are_seeded_saved_and_redrawn():
    a, b = FavorFeatures(8, seed=3), FavorFeatures(8, seed=3)
    assert torch.equal(a.projection, b.projection) and not torch.equal(a.projection, FavorFeatures(8, seed=4).projection)
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

@pytest.mark.parametrize("dtype,tol", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_steps_equal_the_parallel_form(dtype, tol):
    q, k, v = qkv(n=40, d_v=5, dtype=dtype, std=2.)
    f, out = FavorFeatures(8), []
    state = FavorState(f)
    for t in range(40): out.append(state.step(q[:, :, t], k[:, :, t], v[:, :, t]))
    assert_rel("steps", favor_attention(q, k, v, f), torch.stack(out, 2), tol)

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

def test_wrong_width_is_one_line():
    q, k, v = qkv()
    with pytest.raises(InputError, match="made for d=16"): favor_attention(q, k, v, FavorFeatures(16))
    for d, m in ((0, 4), (4, 0)):
        with pytest.raises(InputError): FavorFeatures(d, m)
