"Complex weights: both forms against each other on a grid of shapes and types, derivatives at and near zero, refusals"
import math, warnings
import pytest, torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from okadfa.core import InputError, assert_rel
from okadfa.spectral.wirtinger import (ComplexLinear, ComplexParameter, ModReLU, as_complex, as_parts, complex_gelu,
                                       complex_linear, complex_mul, magnitude, modrelu, phase, phase_difference,
                                       wirtinger_ref)

def draw(*size, seed=0, dtype=torch.complex128):
    return torch.randn(*size, dtype=torch.complex128, generator=torch.Generator().manual_seed(seed)).to(dtype)

def parts(z): return as_parts(z).detach().clone().requires_grad_()

OPS = dict(magnitude=magnitude, phase=phase,
           modrelu=lambda z: modrelu(z, torch.tensor(-.1)), modrelu_pos=lambda z: modrelu(z, torch.tensor(.3)),
           gelu=complex_gelu, square=lambda z: complex_mul(z, z), turn=lambda z: phase_difference(z, z.flip(0)))

# ---- the gradient

@pytest.mark.parametrize("name", OPS)
def test_gradient_is_twice_the_derivative_by_the_conjugate(name):
    "A real function of every operation: autograd against finite differences along the two axes"
    real = lambda z: (OPS[name](z)*(.3 - .8j)).real.sum() if OPS[name](z).is_complex() else OPS[name](z).square().sum()
    w = draw(4, seed=3)
    got, = torch.autograd.grad(real(w.requires_grad_()), w)
    w = w.detach()
    def alone(i): return lambda z: real(torch.cat([w[:i], z, w[i+1:]]))
    want = torch.stack([2*wirtinger_ref(alone(i), w[i:i+1])[1].reshape(()) for i in range(4)])
    assert_rel(name, want, got, 1e-7)

@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("form", ["complex", "parts"])
def test_first_and_second_derivatives(name, form):
    z = draw(7, seed=5)
    z = z.requires_grad_() if form == "complex" else parts(z)
    assert gradcheck(OPS[name], z) and gradgradcheck(OPS[name], z)

@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("shape", [(3,), (1,), (2, 5), (4, 1, 3), (2, 0)])
def test_both_forms_agree(name, shape):
    z = draw(*shape, seed=1)
    a, b = OPS[name](z), OPS[name](as_parts(z))
    a = as_parts(a) if a.is_complex() else a
    assert_rel(name, 1 + a, 1 + b, 1e-14)                     # + 1: a difference of zero has no relative error

# ---- zero

NEAR = [0., -0., 1e-45, 1e-38j, 1e-30 - 1e-30j, 1e-20, 1e-12j, 2e-10 + 2e-10j, 3e-10j, 3.4e-10, -1e-9j, -1e-6, 1e-3j,
        1e9 - 1e9j, -1e15j]

@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("name", [n for n in OPS if n != "square"])     # the square of 1e30 overflows, as it must
def test_no_nan_at_or_near_zero(name, dtype):
    for value in NEAR:
        z = torch.tensor([value, 1 + 0j], dtype=dtype, requires_grad=True)
        y = OPS[name](z)
        g, = torch.autograd.grad((as_parts(y) if y.is_complex() else y).sum(), z, create_graph=True)
        h = torch.zeros(1)
        if g.requires_grad: h, = torch.autograd.grad(torch.view_as_real(g).sum(), z, allow_unused=True)
        assert all(x is None or x.isfinite().all() for x in (y, g, h)), (value, y, g, h)

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_zero_is_zero_with_all_derivatives(dtype):
    for f in (magnitude, phase, lambda p: modrelu(p, torch.tensor([-.5, 0., .5]))):
        p = torch.zeros(3, 2, dtype=dtype, requires_grad=True)
        y = f(p)
        g, = torch.autograd.grad(y.sum(), p, create_graph=True)
        h, = torch.autograd.grad(g.sum(), p)
        assert all(torch.equal(x, torch.zeros_like(x)) for x in (y, g, h))

def test_the_floor_is_below_anything_that_matters():
    "1e-9 of float32 still has magnitude, phase and gradient; 1e-60 of float64 too"
    for size, dtype in ((1e-9, torch.complex64), (1e-60, torch.complex128)):
        z = torch.tensor([size*(.6 - .8j)], dtype=dtype, requires_grad=True)
        assert abs(magnitude(z).item()/size - 1) < 1e-6 and abs(phase(z).item() - math.atan2(-.8, .6)) < 1e-6
        g, = torch.autograd.grad(magnitude(z).sum(), z)
        assert abs(g.item() - (.6 - .8j)) < 1e-6

@pytest.mark.parametrize("bias, jumps", [(-.3, False), (0., False), (.3, True)])
def test_modrelu_through_zero(bias, jumps):
    "Continuous for bias <= 0; a jump of twice the bias otherwise"
    z = torch.complex(torch.linspace(-1, 1, 2000, dtype=torch.float64), torch.zeros(2000, dtype=torch.float64))
    step = modrelu(z, torch.tensor(bias)).diff().abs().max().item()
    assert (step > .59) if jumps else step < 2e-3

# ---- the wrap

def test_everything_is_continuous_where_the_phase_wraps():
    angle = torch.linspace(math.pi - .01, math.pi + .01, 101, dtype=torch.float64)
    w = torch.polar(torch.full_like(angle, .7), angle)
    assert phase(w).diff().abs().max() > 6
    layer = ComplexLinear(1, 3, seed=1).double()
    away = phase_difference(w, (-.9 + .1j)*torch.ones_like(w))
    for y in (magnitude(w), modrelu(w, torch.tensor(-.2)), complex_gelu(w), complex_mul(w, w), away,
              layer(w[:, None]), (layer(w[:, None]) + 1).abs().square().sum(-1)):
        assert y.diff(dim=0).abs().max() < 2e-3
    w = w.requires_grad_()
    g, = torch.autograd.grad((complex_gelu(layer(w[:, None])) - 1j).abs().square().sum(), w)
    assert g.diff().abs().max() < 2e-3

@pytest.mark.parametrize("a", [0., 1., -1., 3., -3.])
@pytest.mark.parametrize("d", [0., .5, -.5, 3., -3.])
def test_phase_difference_is_the_short_way(a, d):
    def number(size, angle): return torch.polar(*torch.tensor([size, angle], dtype=torch.float64))
    for size in (2, 1e-40):
        z, w = number(size, a + d), number(.1*size, a)
        assert abs(phase_difference(z, w).item() - d) < 1e-12
        assert abs(phase_difference(as_parts(z), as_parts(w)).item() - d) < 1e-12

@pytest.mark.parametrize("size", [1e-8, 1., 1e15])
def test_the_gradient_of_a_phase_difference_at_any_size(size):
    z, w = (draw(9, seed=s, dtype=torch.complex64)*size for s in (0, 1))
    got, = torch.autograd.grad(phase_difference(z.requires_grad_(), w).sum(), z)
    assert_rel("gradient", 1j*z.detach()/z.detach().abs()/z.detach().abs()*size, got*size, 1e-5)

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_parts(dtype):
    p = as_parts(draw(50, dtype=torch.complex64)).to(dtype)
    for f in (magnitude, phase): assert f(p).dtype == torch.float32 and torch.equal(f(p), f(p.float()))
    for size in (.01, 1e-4, 3e-5, 1e-7):                                    # float16 has nothing below 6e-8
        q = torch.tensor([[size, -size]], dtype=dtype, requires_grad=True)
        assert magnitude(q) > 0 or size < 6.1e-5
        g, = torch.autograd.grad(phase(q).sum(), q)
        assert g.isfinite().all()

# ---- the parameter

def test_parameter_starts():
    w = draw(2, 3, dtype=torch.complex64)
    p = ComplexParameter(w)
    assert torch.equal(p.value, w) and torch.equal(p(), w) and p.parts.data_ptr() != w.data_ptr()
    w.zero_(); assert p.value.abs().min() > 0
    assert torch.equal(ComplexParameter(draw(4).conj()).value, draw(4).conj().resolve_conj())        # a lazy conjugate
    for shape in ((2, 3), ((2, 3),), ([2, 3],), (torch.Size([2, 3]),)):
        assert ComplexParameter(*shape).value.shape == (2, 3)
    assert ComplexParameter(()).value.shape == () and ComplexParameter(0, 3).value.shape == (0, 3)
    assert ComplexParameter(3, std=0.).value.eq(0).all()
    assert ComplexParameter(3, dtype=torch.float64).value.dtype == torch.complex128
    a, b, c = ComplexParameter(5), ComplexParameter(5, seed=1), ComplexParameter(5, name="other")
    assert not torch.equal(a.parts, b.parts) and not torch.equal(a.parts, c.parts)

def test_parameter_moves_with_its_module_and_is_saved(tmp_path):
    p = ComplexParameter(3, 4, seed=2)
    want = p.value.detach()
    assert p.double().value.dtype == torch.complex128 and p.bfloat16().value.dtype == torch.complex64
    p = ComplexParameter(3, 4, seed=2)
    torch.save(p.state_dict(), tmp_path/"w.pt")
    q = ComplexParameter(3, 4); q.load_state_dict(torch.load(tmp_path/"w.pt"))
    assert torch.equal(q.value, want)

def test_views_pass_gradients_to_the_parts():
    p = ComplexParameter(5, dtype=torch.float64)
    views = ((lambda: p.magnitude, p.value/p.value.abs()), (lambda: p.phase, 1j*p.value/p.value.abs()**2),
             (lambda: p.value.real, torch.ones(5)))
    for view, at in views:
        p.zero_grad(); view().sum().backward()
        assert_rel("gradient", as_parts(at.detach().to(torch.complex128)), p.parts.grad, 1e-14)

def test_every_optimizer_takes_it():
    for make in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop):
        p = ComplexParameter(4, seed=3)
        before, opt = p.value.detach().clone(), make(p.parameters(), lr=1e-2)
        (p.value - 1j).abs().square().sum().backward(); opt.step()
        assert ((p.value - 1j).abs() < (before - 1j).abs()).float().mean() >= .75

@pytest.mark.parametrize("weight_decay", [0., .1])
def test_adam_treats_a_complex_tensor_as_its_parts(weight_decay):
    def train(w):
        w = w.clone().requires_grad_(); opt = torch.optim.AdamW([w], lr=.02, weight_decay=weight_decay)
        for _ in range(10): opt.zero_grad(); (as_complex(w)**2 - 1j).abs().square().sum().backward(); opt.step()
        return w.detach()
    assert torch.equal(as_parts(train(draw(6))), train(as_parts(draw(6))))

# ---- the layer

@pytest.mark.parametrize("d_in, d_out, lead",
                         [(1, 1, ()), (3, 5, (2,)), (8, 4, (2, 7)), (5, 1, (0,)), (1, 6, (3, 1, 2))])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_in_both_forms(d_in, d_out, lead, bias):
    layer, x, go = ComplexLinear(d_in, d_out, bias, seed=1).double(), draw(*lead, d_in), draw(*lead, d_out, seed=2)
    if bias: layer.bias.parts.data = torch.randn(d_out, 2, dtype=torch.float64)
    x = x.requires_grad_(); p = parts(x)
    w, b = layer.weight.value, layer.bias.value if bias else 0
    assert_rel("by definition", (x[..., None, :]*w).sum(-1) + b, layer(x), 1e-13)
    assert_rel("forms", as_parts(layer(x)), layer(p), 1e-13)
    own = list(layer.parameters())
    a, r = torch.autograd.grad(layer(x), [x, *own], go), torch.autograd.grad(layer(p), [p, *own], as_parts(go))
    for y, z in zip((as_parts(a[0]), *a[1:]), r): assert_rel("gradient", y, z, 1e-13)

def test_layer_keeps_the_variance():
    for d_in, d_out in ((200, 200), (300, 100), (100, 300)):
        x = draw(300, d_in, seed=d_in)
        ratio = (ComplexLinear(d_in, d_out, seed=4).double()(x).abs().square().mean()/x.abs().square().mean()).item()
        assert abs(ratio/(2*d_in/(d_in + d_out)) - 1) < .05
    assert torch.equal(ComplexLinear(3, 4).weight.parts, ComplexLinear(3, 4, seed=0).weight.parts)
    assert not torch.equal(ComplexLinear(3, 4).weight.parts, ComplexLinear(3, 4, seed=1).weight.parts)

def test_parts_run_in_half_precision_and_autocast():
    net = nn.Sequential(ComplexLinear(16, 32, seed=1), ModReLU(32), ComplexLinear(32, 8, seed=2))
    x = as_parts(draw(9, 16, dtype=torch.complex64))
    want = net(x)
    with torch.autocast("cpu", torch.bfloat16): got = net(x); got.float().square().sum().backward()
    assert got.dtype == torch.bfloat16
    assert_rel("autocast", want.detach(), got.float(), 2e-2)
    assert_rel("bfloat16", want.detach(), net.bfloat16()(x.bfloat16()).float(), 2e-2)

def test_the_real_form_compiles_whole_and_holds_no_complex_number():
    "Inductor itself takes half a minute; what it is given is looked at instead"
    net, seen = nn.Sequential(ComplexLinear(6, 8, seed=1), ModReLU(8), ComplexLinear(8, 3, seed=2)), []
    def backend(module, example):
        seen.extend(n.meta["example_value"] for n in module.graph.nodes if torch.is_tensor(n.meta.get("example_value")))
        return module.forward
    x = as_parts(draw(5, 6, dtype=torch.complex64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                       # PyTorch's own, about torch.jit
        got = torch.compile(net, fullgraph=True, backend=backend)(x)
    assert len(seen) > 10 and not any(v.is_complex() for v in seen)
    assert_rel("compiled", net(x), got, 1e-6)

# ---- what is refused

@pytest.mark.parametrize("call, says", [
    (lambda: as_parts(torch.zeros(3)), "need a complex tensor or real parts"),
    (lambda: as_parts(torch.zeros(())), "need a complex tensor or real parts"),
    (lambda: magnitude(torch.zeros(2, 2, dtype=torch.int32)), "need a complex tensor or real parts"),
    (lambda: complex_mul(draw(3), torch.zeros(3, 2)), "both complex or both parts"),
    (lambda: complex_linear(draw(3), torch.zeros(1, 3, 2)), "both complex or both"),
    (lambda: ComplexParameter(torch.zeros(3)), "start from a complex tensor"),
    (lambda: ComplexParameter(3, -1), "need sizes"),
    (lambda: ComplexParameter(2.5, 3), "need sizes"),
    (lambda: ComplexParameter(3, std=-1.), "need sizes"),
    (lambda: ComplexLinear(0, 3), "d_in >= 1"),
    (lambda: ComplexLinear(3, 0), "d_in >= 1"),
    (lambda: ComplexLinear(3, 4)(draw(2, 5, dtype=torch.complex64)), "made for 3 channels"),
    (lambda: ComplexLinear(3, 4)(torch.zeros(2, 4, 2)), "made for 3 channels"),
    (lambda: ComplexLinear(3, 4)(torch.zeros(2, 3)), "real parts"),
    (lambda: ComplexLinear(3, 4)(torch.tensor(1j)), "made for 3 channels")])
def test_what_does_not_fit_is_refused(call, says):
    with pytest.raises(InputError, match=says) as e: call()
    assert "\n" not in str(e.value)
