"Enhancements of spectral mixing: causality alone and composed, continuation, gradients, extremes, precision, refusals"
import copy, itertools, pytest, torch
from torch import nn
from torch.autograd import gradcheck
from okadfa.core import InputError, assert_rel
from okadfa.models.block import Block
from okadfa.spectral.enhancements import (ENHANCEMENTS, DampedFilter, EnhancedMixing, Enhancement, FrequencyRoPE,
    MultiScaleSpectral, PhaseAwareMixing, SpectralGLU, damped_taps, multiply_pairs, register_enhancement, rotate)

NAMES = list(ENHANCEMENTS)
SETS = [names for k in range(5) for names in itertools.combinations(NAMES, k)]
BOUND = {torch.float32: 1e-6, torch.float64: 1e-14}
LENGTHS = 1, 2, 7, 33, 64, 100

pytestmark = pytest.mark.usefixtures("seeded")

@torch.no_grad()
def leak(f, n, d, dtype):
    "Largest change of outputs before a position when all inputs from there on change, relative to the outputs' RMS"
    x, worst = torch.randn(8, n, d, dtype=dtype), 0.
    y = f(x)
    for keep in {n//2, n - 1} - {0}:
        other = x.clone(); other[:, keep:] = torch.randn_like(other[:, keep:])
        assert n == 1 or not torch.equal(f(other), y)                       # the edit is heard at all
        worst = max(worst, ((f(other) - y)[:, :keep].square().mean().sqrt()/y.square().mean().sqrt()).item())
    return worst

def make(name, d, max_len, seed=0):
    return EnhancedMixing(d, max_len, seed=seed) if name == "plain" else ENHANCEMENTS[name](d, max_len, seed=seed)

@torch.no_grad()
def stir(layer):
    """Move all projections: as they start some hide what lies before them (equal ones add all bands up to the input,
    gains of 0 hear nothing)"""
    for k, p in layer.named_parameters():
        if k.endswith("weight"): p.add_(torch.randn_like(p)*.3)
    return layer

# ---- causality

@pytest.mark.parametrize("dtype", list(BOUND))
@pytest.mark.parametrize("d", [1, 5, 16])
@pytest.mark.parametrize("name", NAMES)
def test_each_is_causal(name, d, dtype):
    layer = stir(make(name, d, 100)).to(dtype)
    for n in LENGTHS: assert leak(layer, n, d, dtype) < BOUND[dtype], n

@pytest.mark.parametrize("dtype", list(BOUND))
@pytest.mark.parametrize("names", SETS, ids="+".join)
def test_all_sums_and_chains_are_causal(names, dtype):
    total = stir(EnhancedMixing(6, 100, names)).to(dtype)
    chain = stir(nn.Sequential(*[ENHANCEMENTS[k](6, 100, seed=3) for k in names])).to(dtype)
    for n in LENGTHS:
        assert leak(total, n, 6, dtype) < BOUND[dtype], n
        # rounding passes through each link
        if names: assert leak(chain, n, 6, dtype) < BOUND[dtype]*max(1, len(names) - 1), n

def test_a_leak_would_be_found():
    "The same measure on what is not causal: a mask over frequencies, and a layer normalised over time"
    def masked(x):
        n = x.shape[1]
        return torch.fft.irfft(torch.fft.rfft(x, 2*n, dim=1)*torch.linspace(1, 0, n + 1)[:, None], dim=1)[:, :n]
    glu = SpectralGLU(6, 100)
    assert leak(masked, 33, 6, torch.float32) > 1e-2
    assert leak(lambda x: glu(x/x.norm(dim=1, keepdim=True)), 33, 6, torch.float32) > 1e-2

@pytest.mark.parametrize("name", NAMES)
def test_max_len_only_cuts_the_text(name):
    short, long = stir(make(name, 4, 16)).double(), make(name, 4, 100).double()
    long.load_state_dict(short.state_dict())
    x = torch.randn(2, 100, 4, dtype=torch.float64)
    assert_rel("the beginning of a longer text", short(x[:, :16]), long(x)[:, :16], 1e-13)

# ---- continuation

@pytest.mark.parametrize("names", [("plain",), *[(k,) for k in NAMES], NAMES], ids="+".join)
@pytest.mark.parametrize("sizes", [[1]*12, [12], [5, 1, 6], [11, 1]], ids=str)
def test_in_pieces(names, sizes):
    layer = stir(EnhancedMixing(5, 12, NAMES) if len(names) > 1 else make(names[0], 5, 12)).double()
    x, state, start, got = torch.randn(3, 12, 5, dtype=torch.float64), layer.make_state(), 0, []
    for piece in x.split(sizes, 1):
        got.append(layer.extend(piece, state, start)); start += piece.shape[1]
        state = copy.deepcopy(state)                                        # a state can be copied, for a beam
    assert_rel("in pieces", layer(x), torch.cat(got, 1), 1e-11)
    with pytest.raises(InputError, match="max_len=12"): layer.extend(x[:, :1], state, start)

def test_a_block_generates_with_it():
    block, x = Block(stir(EnhancedMixing(8, 20, "rope+glu+phase+scales")), 8).eval(), torch.randn(2, 20, 8)
    state = {}, {}
    steps = [block.extend(x[:, :7], state)] + [block.extend(x[:, t:t + 1], state, t) for t in range(7, 20)]
    assert_rel("position by position", block(x).detach(), torch.cat(steps, 1).detach(), 1e-5)

# ---- gradients

@pytest.mark.parametrize("n", [1, 2, 6])
@pytest.mark.parametrize("name", NAMES)
def test_gradients(name, n):
    layer = stir(make(name, 3, 9, seed=2)).double()
    params = dict(layer.named_parameters())
    call = lambda x, *values: torch.func.functional_call(layer, dict(zip(params, values)), x)
    assert gradcheck(call, (torch.randn(2, n, 3, dtype=torch.float64, requires_grad=True), *params.values()))

@pytest.mark.parametrize("name", [*NAMES, "plain"])
@pytest.mark.parametrize("dtype", list(BOUND))
@pytest.mark.parametrize("size", [0., 1e-30, 1e-20, 1e-8, 1e8])
def test_outputs_and_gradients_are_finite_at_any_size(name, dtype, size):
    layer = stir(make(name, 6, 40)).to(dtype)
    for x in (torch.full((2, 40, 6), size, dtype=dtype), torch.randn(2, 40, 6, dtype=dtype)*size):
        y = layer(x.requires_grad_())
        grads = torch.autograd.grad(y.sum(), (x, *layer.parameters()))
        assert y.isfinite().all() and all(g.isfinite().all() for g in grads)
    if not size: assert not y.any()

@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [-1e4, -30., 5., 1e4])
def test_no_rate_or_frequency_breaks_a_filter(name, value):
    layer = stir(make(name, 4, 50))
    with torch.no_grad():
        for k, p in layer.named_parameters():
            if k.endswith(("log_rate", "frequency")): p.fill_(value)
    y = layer(torch.randn(2, 50, 4))
    grads = torch.autograd.grad(y.sum(), list(layer.parameters()))
    assert y.isfinite().all() and all(g.isfinite().all() for g in grads)

@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_trained(name):
    layer = stir(make(name, 6, 20))
    loss = (layer(torch.randn(4, 20, 6)) - torch.randn(4, 20, 6)).square().sum(); loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())

# ---- what each one promises

def test_taps_are_powers_of_one_number():
    f = DampedFilter("f", torch.tensor([-1., -3.]).double(), torch.tensor([.4, 2.]).double(), group=2, parts=True)
    x = torch.randn(1, 30, 4, dtype=torch.float64)
    pole = (-f.log_rate.exp() + 1j*f.frequency).exp().repeat_interleave(2)
    want, y = [], torch.zeros(4, dtype=torch.complex128)
    for t in range(30): y = pole*y + (1 - pole.abs()**2).sqrt()*x[0, t]; want.append(y)
    want = torch.stack(want)[None].detach()
    for part, got in zip((want.real, want.imag), f(x)): assert_rel("recurrence", part, got.detach(), 1e-13)

def test_rotation_keeps_size_and_undoes_itself():
    x, angle = torch.randn(2, 9, 6, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64)
    assert_rel("size", x.norm(), rotate(x, angle).norm(), 1e-14)
    assert_rel("back", x, rotate(rotate(x, angle), -angle), 1e-14)
    z = lambda x: torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    y = torch.randn_like(x)
    assert_rel("product", z(x)*z(y).conj(), z(multiply_pairs(x, y, conj=True)), 1e-14)

def pooled(layer, order, at, n=60):
    x = torch.zeros(1, n, 8, dtype=torch.float64)
    x[0, at:at + 3] = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))[list(order)]
    return layer(x).sum(1)

def test_rope_sees_order_and_not_place():
    layer = FrequencyRoPE(8, 60, seed=1).double()
    with torch.no_grad(): layer.envelope.log_rate.zero_()
    here = pooled(layer, (0, 1, 2), 5)
    assert_rel("moved", here, pooled(layer, (0, 1, 2), 30), 1e-12)
    assert (pooled(layer, (2, 1, 0), 5) - here).norm() > .05*here.norm()

def test_rope_is_the_sum_over_pairs_of_positions():
    layer = FrequencyRoPE(4, 12, base=50., seed=1).double()
    x = torch.randn(1, 12, 4, dtype=torch.float64)
    z = torch.view_as_complex(layer.read(x)[0].unflatten(-1, (-1, 2)).contiguous())
    theta, rate = 50.**(-torch.arange(2).double()/2), layer.envelope.log_rate.exp()
    rows = []
    for t in range(12):
        past = sum((1 - torch.exp(-2*rate)).sqrt()*torch.exp(-(rate + 1j*theta)*(t - s))*z[s] for s in range(t + 1))
        rows.append(past*z[t].conj()/(1 + z[t].abs()**2).sqrt())
    want = layer.out(torch.view_as_real(torch.stack(rows)).flatten(-2))[None]
    assert_rel("definition", want.detach(), layer(x).detach(), 1e-13)

def test_rope_angles_do_not_lose_precision_with_position():
    angles = FrequencyRoPE(64, 200_000).half().angles(1, 199_999, torch.device("cpu"))
    assert abs(angles[0, 1].item() - 199_999*10_000**(-1/32)) < 1e-6

def test_phase_does_not_depend_on_the_phase_of_the_input():
    "Two tones turned together, by any angle: after the start the layer's output is the same"
    layer, t = PhaseAwareMixing(4, 1200, floor=1e-3).double(), torch.arange(1200)
    with torch.no_grad(): layer.bands.log_rate.fill_(-5.); layer.bands.frequency.fill_(.7)
    def out(turn):
        x = torch.zeros(1, 1200, 4, dtype=torch.float64)
        x[..., 0], x[..., 1] = torch.sin(.7*t + turn), torch.sin(.7*t + 1 + turn)
        return layer(x)[:, -1].detach()
    for turn in (.5, 2., 3.1415, 3.1416, 6.): assert_rel("turned", out(0.), out(turn), .05)

def test_phase_is_smooth_through_zero():
    layer, x = PhaseAwareMixing(4, 3, seed=2).double(), torch.randn(4, dtype=torch.float64)
    walk = torch.linspace(-.05, .05, 1001, dtype=torch.float64)[:, None]*x
    with torch.no_grad(): layer.gain.bias.fill_(.5); y = layer(walk[:, None])[:, 0]
    assert y.diff(dim=0).norm(dim=1).max() < 50*(walk[1] - walk[0]).norm()
    assert y[500].abs().max() < 1e-30

def test_bands_add_up():
    layer, x = MultiScaleSpectral(3, 80, scales=(2, 9, 30)).double(), torch.randn(2, 80, 3, dtype=torch.float64)
    assert_rel("identity", x, layer(x).detach(), 1e-14)
    assert layer.bands(x).shape == (2, 80, 4, 3)
    with torch.no_grad(): layer.averages.log_rate.normal_()
    assert_rel("any scales", x, layer.bands(x).sum(2).detach(), 1e-14)
    constant = layer.bands(torch.ones(1, 80, 3, dtype=torch.float64))[0, -1]
    assert_rel("a constant is slow", torch.ones(3, dtype=torch.float64), constant[-1].detach(), 1e-2)

def test_the_gate_remembers():
    "An early marker changes what is let through later on, by more than its own fading trace"
    layer = SpectralGLU(2, 40).double()
    with torch.no_grad():
        layer.memory.log_rate.fill_(-6.)
        layer.gate.weight.zero_(); layer.gate.weight[:, 3] = 1e3; layer.gate.bias.fill_(-10.)
        layer.read.weight.copy_(torch.tensor([[1., 0], [1, 0]])); layer.out.weight.copy_(torch.eye(2))
        x = torch.randn(1, 40, 2, dtype=torch.float64); x[..., 1] = 0
        off = layer(x); x[0, 0, 1] = 1; on = layer(x)
    assert off[:, 1:].norm() < 1e-3*on[:, 1:].norm()

# ---- precision, names, seeds, refusals

@pytest.mark.parametrize("name", [*NAMES, "all"])
def test_half_precision(name):
    layer = stir(EnhancedMixing(16, 32, NAMES) if name == "all" else make(name, 16, 32))
    x = torch.randn(2, 32, 16)
    want = layer(x).detach()
    with torch.autocast("cpu", torch.bfloat16): got = layer(x)
    assert got.dtype == torch.bfloat16 or name == "all"
    assert_rel("autocast", want, got.float(), .05)
    if name == "all": return
    half = copy.deepcopy(layer).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert_rel("bfloat16", want, half.float(), .1)

@pytest.mark.parametrize("name", NAMES)
def test_weights_depend_on_the_seed_alone(name):
    a, b, c = make(name, 6, 20), make(name, 6, 20), make(name, 6, 20, seed=1)
    # what starts at 0, and bands, are not drawn
    drawn = [k for k, p in a.named_parameters() if p.any() and name != "scales"]
    for k, p in a.state_dict().items():
        assert torch.equal(p, b.state_dict()[k]) and (k not in drawn or not torch.equal(p, c.state_dict()[k])), k
    c.load_state_dict(a.state_dict())
    x = torch.randn(1, 20, 6)
    assert torch.equal(a(x), c(x))

@pytest.mark.parametrize("text, names", [("", ()), ("rope", ("rope",)), ("scales+rope", ("rope", "scales")),
                                         (["glu", "phase"], ("glu", "phase")), (NAMES, NAMES)])
def test_names(text, names): assert list(EnhancedMixing(4, 8, text).added) == list(names)

def test_order_of_names_does_not_matter():
    a, b, x = EnhancedMixing(4, 8, "glu+rope"), EnhancedMixing(4, 8, ("rope", "glu")), torch.randn(1, 8, 4)
    assert torch.equal(a(x), b(x))

def test_options_reach_the_plain_mixer():
    layer = EnhancedMixing(4, 8, gating="none", filter="taps")
    x, y = torch.randn(2, 1, 8, 4)
    assert_rel("linear", layer(x).detach() + layer(y).detach(), layer(x + y).detach(), 1e-5)

@pytest.mark.parametrize("name", [*NAMES, "plain"])
def test_refusals(name):
    layer = make(name, 4, 8)
    for shape in ((1, 9, 4), (1, 8, 5), (8, 4), (1, 1, 8, 4)):
        with pytest.raises(InputError, match=r"\[b n 4\].*max_len=8") as e: layer(torch.zeros(shape))
        assert "\n" not in str(e.value)
    for d, n in ((0, 8), (4, 0)):
        with pytest.raises(InputError, match="d_model >= 1 and max_len >= 1"): make(name, d, n)

@pytest.mark.parametrize("name", NAMES)
def test_nothing_in_nothing_out(name):
    for shape in ((2, 0, 4), (0, 3, 4)): assert make(name, 4, 8)(torch.zeros(shape)).shape == shape

@pytest.mark.parametrize("call, word", [
    (lambda: EnhancedMixing(4, 8, "rope+gru"), "^unknown enhancement 'gru', choose from rope, glu, phase, scales$"),
    (lambda: ENHANCEMENTS.find("gru"), "^unknown enhancement 'gru', choose from rope, glu, phase, scales$"),
    (lambda: EnhancedMixing(4, 8, ["glu", "glu"]), "once"),
    (lambda: MultiScaleSpectral(4, 8, scales=(5, 2)), "rising"),
    (lambda: MultiScaleSpectral(4, 8, scales=()), "rising"),
    (lambda: MultiScaleSpectral(4, 8, scales=(-1, 2)), "positive"),
    (lambda: PhaseAwareMixing(4, 8, floor=0), "floor > 0")])
def test_constructor_refusals(call, word):
    with pytest.raises(InputError, match=word): call()

# ---- what the model asks of a mixer

def called_out(mixer):
    "What a model recognises in one of its blocks by the name, in the order of modules"
    return [m for name, m in Block(mixer, 8).named_modules() if ".body." in f".{name}" and name.endswith(".out")]

@pytest.mark.parametrize("names", SETS, ids="+".join)
def test_writers_of_a_sum_are_all_that_are_called_out(names):
    mixer = EnhancedMixing(8, 12, names)
    assert mixer.writers() == called_out(mixer) and len(mixer.writers()) == 1 + len(names)
    assert mixer.writers() == [mixer.plain.out, *(layer.out for layer in mixer.added.values())]

@pytest.mark.parametrize("name", [*NAMES, "plain"])
def test_nothing_reaches_the_stream_but_through_writers(name):
    layer = stir(make(name, 8, 12))
    with torch.no_grad():
        assert layer(torch.randn(2, 12, 8)).any() and layer.writers() == called_out(layer)
        for out in layer.writers(): out.weight.zero_()
        assert not layer(torch.randn(2, 12, 8)).any()

def test_kept_spectra_of_a_sum_are_dropped_with_it():
    mixer = EnhancedMixing(8, 12, NAMES).eval()
    with torch.no_grad(): mixer(torch.randn(1, 12, 8))
    assert mixer.plain._kept.spectra is not None
    mixer.drop_cache()
    assert mixer.plain._kept.spectra is None

# ---- one that is not ours

class Before(Enhancement):
    "The position before, through a projection"
    def __init__(self, d_model, max_len, *, seed=0):
        super().__init__(d_model, max_len)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def run(self, x, state, start):
        state = {} if state is None else state
        first, state["last"] = state.get("last", torch.zeros_like(x[:, :1])), x[:, -1:]
        return self.out(torch.cat([first, x[:, :-1]], 1))

def test_an_enhancement_from_outside(monkeypatch):
    for k in NAMES:
        with pytest.raises(InputError, match=f"enhancement '{k}' is the library's own"): register_enhancement(k, Before)
    monkeypatch.setitem(ENHANCEMENTS, "before", None)                     # taken out again after the test
    register_enhancement("before", Before)
    mixer, x = EnhancedMixing(6, 20, "before+rope").double(), torch.randn(2, 20, 6, dtype=torch.float64)
    assert list(mixer.added) == ["rope", "before"] and mixer.writers()[-1] is mixer.added["before"].out
    assert leak(mixer, 20, 6, torch.float64) < 1e-14
    parts = EnhancedMixing(6, 20, "rope").double()(x) + mixer.added["before"](x)
    assert_rel("a sum like any other", parts.detach(), mixer(x).detach(), 1e-14)
    state = mixer.make_state()
    got = torch.cat([mixer.extend(x[:, :13], state), *(mixer.extend(x[:, t:t+1], state, t) for t in range(13, 20))], 1)
    assert_rel("in pieces", mixer(x).detach(), got, 1e-12)

@pytest.mark.parametrize("unit", ["energy", "sum"])
def test_damped_taps(unit):
    log_rate = torch.tensor([-3., -1.], dtype=torch.float64)
    re, im = damped_taps(log_rate, None, 400, unit, group=3)
    assert im is None and re.shape == (400, 6)
    assert torch.equal(re[:, 0], re[:, 2]) and not torch.equal(re[:, 2], re[:, 3])
    total = re.square() if unit == "energy" else re
    assert_rel(unit, torch.ones(6, dtype=torch.float64), total.sum(0), 1e-7)
    turned = torch.complex(*damped_taps(log_rate, torch.tensor([.5, 2.], dtype=torch.float64), 400, unit, group=3))
    assert_rel("turning keeps the size", re, turned.abs(), 1e-14)
