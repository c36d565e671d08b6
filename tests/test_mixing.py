"The causal convolution and the layer on it: a grid of shapes; what may not leak, may not go stale, must be refused"
import copy, io, itertools
import pytest, torch
from torch import nn
from okadfa.core import InputError, assert_rel
from okadfa.spectral.mixing import (FILTERS, GATINGS, FNetMixing, ModeFilter, SpectralMixing, SpectrumFilter, TapFilter,
    causal_conv_ref, causal_fft_conv, fast_length)
import okadfa.spectral.mixing as mixing

@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)

def f64(*size, grad=False): return torch.randn(*size, dtype=torch.float64, requires_grad=grad)

LAYERS = [*itertools.product(FILTERS, GATINGS)]

def leak(mix, x, t, size=1.):
    "RMS change of the outputs before t under an edit of all inputs from t on, relative to the RMS of the outputs"
    other = x.clone(); other[:, t:] = torch.randn_like(x[:, t:])*size
    y, z = mix(x), mix(other)
    assert not torch.equal(y[:, t:], z[:, t:])
    return ((y - z)[:, :t].square().mean()/torch.maximum(y.square().mean(), z.square().mean())).sqrt().item()

# ---- the convolution

@pytest.mark.parametrize("b", [1, 3])
@pytest.mark.parametrize("n", [1, 2, 3, 31, 64, 97, 1000])
@pytest.mark.parametrize("taps", ["one", "short", "odd", "all", "more"])
def test_values_and_gradients(b, n, taps):
    k = dict(one=1, short=max(1, n//3), odd=max(1, n - 1), all=n, more=2*n + 5)[taps]
    x, h = f64(b, n, 3, grad=True), f64(k, 3, grad=True)
    ref, got, go = causal_conv_ref(x, h), causal_fft_conv(x, h), f64(b, n, 3)
    assert_rel("values", ref, got, 1e-14)
    grads = (torch.autograd.grad(y, (x, h), go) for y in (ref, got))
    for a, c in zip(*grads): assert_rel("gradient", a, c, 1e-13)

@pytest.mark.parametrize("work", [1, 100, 1 << 30])
def test_rounds_of_rows_do_not_matter(monkeypatch, work):
    x, h, go = torch.randn(2, 40, 7, requires_grad=True), torch.randn(40, 7, requires_grad=True), torch.randn(2, 40, 7)
    def run(): y = causal_fft_conv(x, h); return y, *torch.autograd.grad(y, (x, h), go)
    a = run()
    monkeypatch.setattr(mixing, "WORK", work)
    for y, z in zip(a, run()): assert_rel("rounds", y, z, 1e-6)

@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("n", [2, 31, 64, 97, 300])
def test_the_convolution_does_not_hear_the_future(n, dtype, bound):
    x, h = torch.randn(2, n, 4, dtype=dtype), torch.randn(n, 4, dtype=dtype)
    for t in {1, n//2, n - 1}:
        for size in (1e-3, 1.): assert leak(lambda x: causal_fft_conv(x, h), x, t, size) <= bound
        # what is left is rounding, in units of the largest input: a later one 1,000 times larger leaves as much more
        z = torch.cat([x[:, :t], x[:, t:]*1e3], 1)
        moved = (causal_fft_conv(z, h) - causal_fft_conv(x, h))[:, :t].norm(dim=1)
        assert (moved <= bound*z.norm(dim=1)*h.norm(dim=0)).all()
    g = torch.autograd.grad(causal_fft_conv(x.requires_grad_(), h)[:, n//2].sum(), x)[0]   # and no gradient reaches it
    assert g[:, n//2+1:].norm() <= bound*g.norm()

def test_gradients_that_nobody_asked_for_are_none():
    x, h = torch.randn(1, 9, 2, requires_grad=True), torch.randn(9, 2)
    causal_fft_conv(x, h).sum().backward(); assert x.grad is not None
    x, h = x.detach(), h.requires_grad_()
    causal_fft_conv(x, h).sum().backward(); assert h.grad.shape == (9, 2)
    x, h = x.double(), h.detach().double()
    for need_x, need_h in ((True, False), (False, True)):
        pair = x.clone().requires_grad_(need_x), h.clone().requires_grad_(need_h)
        assert torch.autograd.gradgradcheck(causal_fft_conv, pair)

def test_gradients_that_are_differentiated_again_are_the_same_ones():
    x, h, go = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 9, 3), (5, 3), (2, 9, 3)))
    plain, again = (torch.autograd.grad(causal_fft_conv(x, h), (x, h), go, create_graph=c) for c in (False, True))
    for a, b in zip(plain, again): assert_rel("gradient", a, b, 1e-13); assert b.requires_grad and not a.requires_grad

def test_strides_of_input_and_gradient():
    x, h = torch.randn(2, 7, 30).mT.requires_grad_(), torch.randn(7, 30).mT.requires_grad_()
    go = torch.randn(30, 2, 7).transpose(0, 1)
    runs = [(y := f(x, h), *torch.autograd.grad(y, (x, h), go)) for f in (causal_conv_ref, causal_fft_conv)]
    for a, b in zip(*runs): assert_rel("strides", a, b, 1e-6)
    g = torch.autograd.grad(causal_fft_conv(x, h).sum(), x)[0]                         # a gradient with strides of zero
    assert_rel("expanded", torch.autograd.grad(causal_conv_ref(x, h).sum(), x)[0], g, 1e-6)

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_float32_inside(dtype):
    x, h = torch.randn(1, 3000, 2).to(dtype), torch.randn(3000, 2)
    y = causal_fft_conv(x, h)
    assert y.dtype == dtype
    assert_rel("half", causal_conv_ref(x.double(), h.double()), y.double(), torch.finfo(dtype).eps)
    with torch.autocast("cpu", torch.bfloat16): assert causal_fft_conv(x.float(), h).dtype == torch.float32

def test_nothing_in_nothing_out():
    for shape, k in (((2, 0, 3), 4), ((0, 5, 3), 4), ((2, 5, 3), 0)):
        y = causal_fft_conv(torch.ones(shape), torch.ones(k, 3)); assert y.shape == shape and y.eq(0).all()

@pytest.mark.parametrize("x,h", [((5, 3), (4, 3)), ((1, 5, 3), (4, 2)), ((1, 5, 3), (4,)), ((1, 5, 3), (1, 4, 3))])
def test_shapes_that_do_not_fit(x, h):
    x, h = torch.zeros(x), torch.zeros(h)
    with pytest.raises(InputError, match="need x .b n d. and taps .k d.") as e: causal_fft_conv(x, h)
    assert "\n" not in str(e.value)

def test_types_that_do_not_fit():
    x, h = torch.zeros(1, 4, 2), torch.zeros(4, 2)
    for bad in ((x.long(), h), (x, h.cfloat())):
        with pytest.raises(InputError, match="real floating point"): causal_fft_conv(*bad)

def test_lengths_are_even_large_enough_and_small():
    for n in (*range(1, 300), 4095, 4097, 10_007, 32_767, 131_071):
        m = fast_length(n)
        assert m >= n and m % 2 == 0 and m <= max(2, 1 << (n - 1).bit_length())
        for p in (2, 3, 5):
            while m % p == 0: m //= p
        assert m == 1

# ---- filters

@pytest.mark.parametrize("name", FILTERS)
def test_taps_depend_on_the_longest_text_by_truncation_only(name):
    long = FILTERS[name](6, 203, seed=3)
    for n in (1, 2, 50, 101, 202): assert_rel("truncated", long(203)[:n], long(n), 1e-6)
    for other in (17, 64, 101, 202, 1001):
        assert_rel("another max_len", long(203)[:other], FILTERS[name](6, other, seed=3)(other)[:203], 1e-6)
    assert not torch.allclose(long(50), FILTERS[name](6, 203, seed=4)(50))

@pytest.mark.parametrize("name", ["taps", "spectrum"])
def test_more_taps_than_there_are(name):
    with pytest.raises(InputError, match="has 20 taps, 21 are asked for"): FILTERS[name](4, 20)(21)
    with pytest.raises(InputError, match="20 taps, 21"): SpectralMixing(4, 20, name)(torch.zeros(1, 21, 4))

def test_modes_have_no_longest_text_and_never_grow():
    layer = SpectralMixing(4, 20)
    assert layer(torch.randn(1, 500, 4)).isfinite().all()
    with torch.no_grad():
        for p in layer.filter.parameters(): p.copy_(torch.randn_like(p)*5)
    h = layer.filter(3000)
    assert h.isfinite().all() and h[2000:].abs().max() <= layer.filter.coef.norm(dim=-1).sum(1).max()

def test_the_spectrum_is_complex_and_its_taps_are_its_inverse_transform():
    f = SpectrumFilter(3, 11)
    assert f.spectrum.shape == (3, 6, 2) and not f.spectrum.is_complex() and [*f.state_dict()] == ["spectrum"]
    assert_rel("taps", torch.fft.irfft(torch.view_as_complex(f.spectrum), 11).mT, f(11), 1e-6)
    assert isinstance(f, TapFilter) and not hasattr(f, "taps")

@pytest.mark.parametrize("bad", [dict(d=0), dict(modes=0), dict(horizon=0)])
def test_filters_that_cannot_be(bad):
    with pytest.raises(InputError, match=">= 1"): ModeFilter(**(dict(d=3) | bad))

# ---- the layer

def ref(layer, x):
    v, *gates = layer.into(x).chunk(GATINGS[layer.gating], -1)
    if layer.gating == "double": v = v*gates[1]
    y = causal_conv_ref(v, layer.filter(x.shape[1]))
    return layer.out(y*gates[0] if gates else y)

@pytest.mark.parametrize("filter,gating", LAYERS)
@pytest.mark.parametrize("b,n", [(1, 1), (1, 33), (2, 1), (3, 50)])
def test_layer(filter, gating, b, n):
    layer, x, go = SpectralMixing(6, 50, filter, gating), torch.randn(b, n, 6), torch.randn(b, n, 6)
    want = ref(layer, x)
    got = layer(x)
    assert_rel("training", want, got, 2e-6)
    grads = (torch.autograd.grad(y, [*layer.parameters()], go, allow_unused=True) for y in (want, got))
    for a, c in zip(*grads): assert_rel("gradient", a + 1, c + 1, 1e-5)                    # + 1: some are zero
    layer.eval()
    assert_rel("evaluation with gradients", want, layer(x), 2e-6)
    with torch.no_grad(): assert_rel("evaluation", want, layer(x), 2e-6)

@pytest.mark.parametrize("gating", GATINGS)
@pytest.mark.parametrize("n", [1, 1023, 1025, 2100])
@pytest.mark.parametrize("dtype,bound,most", [(torch.float32, 2e-6, 1e-6), (torch.float64, 1e-13, 1e-14),
                                              (torch.bfloat16, 2e-2, 2e-2)])
def test_inference_of_one_text_in_little_memory(gating, n, dtype, bound, most):
    layer, x = SpectralMixing(7, 2100, "modes", gating).to(dtype), torch.randn(1, n, 7).to(dtype)
    want, before = layer(x).detach(), x.clone()
    layer.eval()
    with torch.no_grad():
        got = layer(x); kept = got.clone()
        assert_rel("values", want, got, bound)
        layer(-x)
        assert torch.equal(x, before) and torch.equal(got, kept)      # it writes over memory of its own only
        if n > 1: assert leak(layer, x, n//2) <= most

@torch.no_grad()
def test_the_projection_out_is_a_module_like_any_other():
    layer, x = SpectralMixing(6, 50).eval(), torch.randn(1, 50, 6)
    want = 2*layer(x)
    layer.out = torch.nn.Sequential(layer.out)
    layer.out.register_forward_hook(lambda module, args, y: 2*y)
    assert_rel("one text", want, layer(x), 1e-6)
    assert_rel("two", want.repeat(2, 1, 1), layer(x.repeat(2, 1, 1)), 1e-6)

@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("filter,gating", LAYERS)
def test_the_layer_does_not_hear_the_future(filter, gating, dtype, bound):
    layer, x = SpectralMixing(6, 101, filter, gating).to(dtype), torch.randn(2, 101, 6, dtype=dtype)
    with torch.no_grad():
        for mode, t in itertools.product((True, False), (1, 50, 64, 100)):
            assert leak(layer.train(mode), x, t) <= bound and leak(layer, x[:1], t) <= bound

@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_a_stack_does_not_hear_the_future(dtype, bound):
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(SpectralMixing(8, 90, f, g, seed=i) for i, (f, g) in enumerate(LAYERS))
        def forward(self, x):
            for layer in self.layers: x = x + layer(nn.functional.layer_norm(x, (8,)))
            return x
    stack, x = Stack().to(dtype), torch.randn(2, 90, 8, dtype=dtype)
    with torch.no_grad():
        for t in (1, 45, 89): assert leak(stack, x, t) <= bound

@pytest.mark.parametrize("filter,gating", LAYERS)
@pytest.mark.parametrize("prompt", [0, 1, 20, 44])
def test_position_by_position(filter, gating, prompt):
    layer, x = SpectralMixing(6, 47, filter, gating).eval(), torch.randn(2, 47, 6)
    with torch.no_grad(): want = layer(x)
    state = layer.make_state()
    parts = [layer.extend(x[:, :prompt], state)]*(prompt > 0)
    parts += [layer.extend(x[:, t:t+1], state, t) for t in range(prompt, 44)]
    parts.append(layer.extend(x[:, 44:], state, 44))                   # several at once
    got = torch.cat(parts, 1)
    assert_rel("steps", want, got, 1e-5)
    assert not got.requires_grad
    assert_rel("one by one is the same", want[:, :1], layer.extend(x[:, :1], layer.make_state()), 1e-5)

def test_a_state_goes_no_further_than_the_taps():
    layer = SpectralMixing(4, 10, "taps")
    state = layer.make_state()
    layer.extend(torch.zeros(1, 10, 4), state)
    with pytest.raises(InputError, match="beyond max_len=10"): layer.extend(torch.zeros(1, 1, 4), state, 10)

def edits(layer):
    yield "in place", lambda: layer.filter.coef.mul_(1.5)
    yield "through .data", lambda: layer.filter.freq.data.add_(.1)
    yield "one number", lambda: layer.filter.log_rate[0, 0].add_(.3)
    yield "replaced", lambda: setattr(layer.filter, "coef", nn.Parameter(layer.filter.coef*2))
    yield "loaded", lambda: layer.load_state_dict(SpectralMixing(6, 50, seed=9).state_dict())
    yield "another filter", lambda: setattr(layer, "filter", TapFilter(6, 50, seed=2))
    yield "another precision", lambda: layer.double()

def test_kept_spectra_never_go_stale():
    layer, x = SpectralMixing(6, 50).eval(), torch.randn(1, 40, 6)
    with torch.no_grad():
        layer(x)
        for name, edit in edits(layer):
            before = layer(x); edit(); x = x.to(layer.out.weight.dtype)
            assert not torch.allclose(before.to(x.dtype), ref(layer, x), rtol=1e-5) or name == "another precision"
            assert_rel(name, ref(layer, x), layer(x), 2e-6)
        x = torch.randn(1, 50, 6); layer.float()
        for n in (40, 39, 50, 40): assert_rel(f"{n=}", ref(layer, x[:, :n]), layer(x[:, :n]), 2e-6)
        kept = layer._kept.spectra
        layer(x[:, :40]); assert layer._kept.spectra is kept
        layer.train(); assert layer._kept.spectra is None

def test_spectra_are_kept_in_inference_alone_until_they_are_dropped(monkeypatch):
    "What a benchmark leans on: after drop_cache a call does the whole work, and gives the same bits"
    asked, taps = [], ModeFilter.forward
    monkeypatch.setattr(ModeFilter, "forward", lambda self, n: asked.append(n) or taps(self, n))
    layer, x = SpectralMixing(6, 50).eval(), torch.randn(1, 40, 6)
    asked.clear()
    with torch.no_grad():
        first, again = layer(x), layer(x); assert asked == [40]
        layer.drop_cache(); cold = layer(x); assert asked == [40]*2
        assert torch.equal(first, again) and torch.equal(first, cold)
        layer.drop_cache(); layer.drop_cache(); assert layer._kept.spectra is None
    for mode in (False, True):
        asked.clear(); layer.train(mode)
        for _ in range(3): layer(x)                                    # with gradients: computed every time, kept never
        assert asked == [40]*3 and layer._kept.spectra is None
    layer.train()
    with torch.no_grad(): layer(x); assert layer._kept.spectra is None

def test_writers_are_what_the_stream_receives():
    for gating in GATINGS:
        layer = SpectralMixing(6, 50, gating=gating)
        assert layer.writers() == [layer.out] and layer.writers()[0].weight is layer.out.weight
    with torch.no_grad(): layer.out.weight.zero_()
    assert not layer(torch.randn(2, 9, 6)).any()                       # nothing reaches the stream but through them

def test_kept_spectra_are_neither_saved_nor_shared():
    layer, x = SpectralMixing(6, 50).eval(), torch.randn(1, 50, 6)
    with torch.no_grad():
        layer(x)
        assert not any("kept" in k for k in layer.state_dict())
        other = copy.deepcopy(layer); other.filter.coef.mul_(2)
        assert_rel("copy", ref(other, x), other(x), 2e-6); assert_rel("first", ref(layer, x), layer(x), 2e-6)
        f = io.BytesIO(); torch.save(layer, f); f.seek(0)
        assert_rel("pickled", layer(x), torch.load(f, weights_only=False)(x), 1e-7)

def test_autocast_and_half_precision():
    layer, x = SpectralMixing(16, 64), torch.randn(2, 64, 16)
    want = layer(x)
    for mode in (True, False):
        layer.train(mode)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x); assert y.dtype == torch.bfloat16
            assert_rel("autocast", want, y.float(), 3e-2)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            for one in (x, x[:1]):
                assert layer(one).dtype == torch.bfloat16
                assert_rel("autocast", want[:len(one)], layer(one).float(), 3e-2)
    y.float().square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in layer.parameters())
    half = copy.deepcopy(layer).bfloat16()
    with torch.no_grad(): assert_rel("bfloat16", want, half(x.bfloat16()).float(), 5e-2)

def test_seeds_and_names():
    a, b, c = SpectralMixing(6, 50), SpectralMixing(6, 50), SpectralMixing(6, 50, seed=1)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.out.weight, c.out.weight)
    assert not any(p.is_complex() for f in FILTERS for p in SpectralMixing(6, 50, f).parameters())
    assert SpectralMixing(6, 50, horizon=5, modes=3).filter.coef.shape == (6, 3, 2)

def test_it_learns_a_delay():
    "A filter finds how far back the answer lies, through projections, gate and FFT"
    layer = SpectralMixing(4, 64, "taps", "none", horizon=20)
    opt, losses = torch.optim.Adam(layer.parameters(), lr=3e-2), []
    for _ in range(300):
        x = torch.randn(8, 64, 4); y = nn.functional.pad(x, (0, 0, 5, -5))
        loss = (layer(x) - y).square().mean(); losses.append(loss.item())
        opt.zero_grad(); loss.backward(); opt.step()
    assert losses[-1] < .35 < .8 < losses[0]

def test_distilled():
    layer = SpectralMixing(3, 200, "taps", seed=1)
    decays = torch.exp(-torch.arange(200.)/torch.tensor([[5.], [30.], [80.]]))
    with torch.no_grad(): layer.filter.log_rate.fill_(-20); layer.filter.taps.copy_(decays)
    light, x = layer.distill(2), torch.randn(1, 200, 3)
    assert isinstance(light.filter, ModeFilter) and isinstance(layer.filter, TapFilter)
    assert_rel("distilled", layer(x), light(x), 1e-5)

@pytest.mark.parametrize("bad,says", [(dict(filter="mask"), "filter must be modes or taps or spectrum"),
                                      (dict(gating="x"), "gating must be"), (dict(max_len=0), "max_len >= 1")])
def test_layers_that_cannot_be(bad, says):
    with pytest.raises(InputError, match=says): SpectralMixing(**(dict(d_model=4, max_len=8) | bad))

def test_fnet_is_not_causal_and_says_so():
    x = torch.randn(2, 50, 8)
    assert leak(FNetMixing(), x, 30) > .3 and "NOT causal" in FNetMixing.__doc__ and FNetMixing.causal is False
    with pytest.raises(InputError, match="no causal form"): FNetMixing(causal=True)
    assert not any(True for _ in FNetMixing().parameters()) and FNetMixing()(x.bfloat16()).dtype == torch.bfloat16
