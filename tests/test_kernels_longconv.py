"The gated convolution's kernels against their definition: on a CUDA device, or in Triton's interpreter without one."
import importlib.util
import pytest, torch
from kernel_setup import TRITON, compiled_for_h100, compiler_only, device, needs_cuda, only_where_late, run_alone
from okadfa.core import InputError, assert_rel
from okadfa.kernels import longconv
from okadfa.kernels.longconv import gated_conv, gated_conv_ref, why_not_triton

NAMES = "y u taps gate".split()
SMALL = dict(C=16, J=16, BM=16)

@pytest.fixture
def small(monkeypatch):
    for name, value in SMALL.items(): monkeypatch.setitem(longconv.OVERRIDE, name, value)

def problem(device, b, n, d, k, gated=True, dtype=torch.float32):
    x = [torch.randn(b, n, d).to(dtype), torch.randn(k, d)/k**.5] + [torch.randn(b, n, d).to(dtype)]*gated
    return [y.to(device) for y in x]

def run(x, go, impl):
    x = [y.detach().clone(memory_format=torch.preserve_format).requires_grad_() for y in x]
    y = gated_conv(*x, impl=impl)
    return [y.detach(), *torch.autograd.grad(y, x, go.to(y.dtype))]

def check(x, tol):
    go = torch.randn_like(x[0])
    got = run(x, go, "triton")
    for name, a, b, y in zip(NAMES, run([y.double() for y in x], go, "ref"), got, (x[0], *x)):
        assert b.dtype == y.dtype and b.shape == y.shape
        assert_rel(name, a, b.double(), tol)
    return got

@only_where_late
def test_in_a_process_of_its_own(): run_alone(__file__)

def test_the_reference_is_the_sum():
    u, h, g = (x.double() for x in problem("cpu", 2, 9, 3, 4))
    want = torch.stack([g[:, t]*sum(h[s]*u[:, t - s] for s in range(4) if s <= t) for t in range(9)], 1)
    assert_rel("sum", want, gated_conv_ref(u, h, g), 1e-14)

@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("b,n,d,k", [(1, 1, 1, 1), (1, 2, 1, 9), (3, 15, 2, 3), (1, 16, 1, 16), (1, 17, 3, 17),
    (2, 33, 2, 31), (1, 255, 1, 20), (1, 257, 2, 15), (1, 300, 1, 257), (1, 270, 1, 400)])
def test_values_and_gradients(device, small, b, n, d, k, gated): check(problem(device, b, n, d, k, gated), 2e-6)

def test_the_tiles_as_they_are(device): check(problem(device, 1, 70, 2, 33), 2e-6)

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(device, small, dtype):
    """Within what rounding to the nearest number costs; cutting bits off costs twice that. The tensor cores round the
    factors to tf32, which has as many bits as float16: there an error of that size is added (.40 and .80 on an H200)"""
    share = .35 if device == "cpu" or dtype == torch.bfloat16 else .9
    check(problem(device, 2, 50, 2, 20, dtype=dtype), share*torch.finfo(dtype).eps)

def test_taps_in_half_precision(device, small):
    x = problem(device, 1, 40, 2, 20, dtype=torch.bfloat16)
    x[1] = x[1].bfloat16()
    check(x, torch.finfo(torch.bfloat16).eps)

def test_the_past_is_the_same_to_the_bit(device, small):
    u, h, g = problem(device, 1, 300, 1, 40)
    before = gated_conv(u, h, g, impl="triton")
    for t, size in ((1, 1e3), (15, 1.), (16, 1e3), (17, 1e-3), (255, 1.), (256, 1e3), (299, 1e3)):
        v = u.clone(); v[:, t:] = torch.randn_like(v[:, t:])*size
        after = gated_conv(v, h, g, impl="triton")
        assert torch.equal(before[:, :t], after[:, :t]) and not torch.equal(before[:, t:], after[:, t:])

def test_memory_that_was_never_written_does_not_show(device, small, monkeypatch):
    x = problem(device, 2, 41, 3, 23)
    go, empty, empty_like, poisoned = torch.randn_like(x[0]), torch.empty, torch.empty_like, []
    clean = run(x, go, "triton")
    def poison(y): poisoned.append(y.fill_(torch.nan)); return y
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    dirty = run(x, go, "triton")
    monkeypatch.undo()
    assert len(poisoned) >= 4
    for name, a, b in zip(NAMES, clean, dirty): assert torch.equal(a, b), name

def test_strides(device, small):
    x, go = problem(device, 2, 37, 4, 11), torch.randn(2, 37, 4, device=device)
    ref = run(x, go, "triton")
    rows = lambda z: z.mT.contiguous().mT
    y = [rows(x[0]), x[1].mT.contiguous().mT, torch.cat([x[2], x[2]], -1)[..., :4]]
    for name, a, b in zip(NAMES, ref, run(y, rows(go), "triton")): assert_rel(name, a, b, 1e-6)
    one = torch.ones(1, 1, 4, device=device).expand(2, 37, 4)                       # strides of zero, forward and back
    u = x[0].clone().requires_grad_()
    out = gated_conv(u, x[1], one, impl="triton")
    assert_rel("expanded", gated_conv(x[0], x[1], impl="triton"), out.detach(), 1e-6)
    out.sum().backward()
    assert_rel("gradient that is expanded", run(x[:2], torch.ones_like(go), "triton")[1], u.grad, 1e-6)

def test_only_the_inputs_are_kept_and_only_what_is_asked_for_is_computed(device, small, monkeypatch):
    u, h, g = problem(device, 1, 40, 2, 9)
    y = gated_conv(u.clone().requires_grad_(), h, g, impl="triton")
    assert y.grad_fn.saved_tensors[0].stride(1) == 1                                # positions side by side
    u, g = (x.mT.contiguous().mT for x in (u, g))
    y = gated_conv(u.requires_grad_(), h, g, impl="triton")
    assert {s.data_ptr() for s in y.grad_fn.saved_tensors} == {x.data_ptr() for x in (u, h, g)}
    launches = []
    conv = longconv._conv
    monkeypatch.setattr(longconv, "_conv", lambda *a, **k: launches.append(k) or conv(*a, **k))
    y.sum().backward()
    assert len(launches) == 1 and launches[0]["flip"] and g.grad is None and h.grad is None

def test_no_double_precision_anywhere(device):
    u, h = torch.zeros(1, 4, 2, device=device), torch.zeros(3, 2, device=device)
    for bad in ((u.double(), h), (u, h.double()), (u, h, u.double())):
        with pytest.raises(NotImplementedError, match="float64"): gated_conv(*bad, impl="triton")

def test_nothing_to_do(device):
    for b, n, k in ((0, 5, 3), (2, 0, 3), (1, 5, 0)):
        u, h, g = problem(device, b, n, 4, max(k, 1)); h = h[:k]
        assert gated_conv(u, h, g, impl="triton").shape == u.shape and gated_conv(u, h, g, impl="triton").eq(0).all()

@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("b,n,d,k,dtype,tol", [
    (2, 1000, 64, 1000, torch.float32, 5e-6), (1, 4099, 128, 257, torch.bfloat16, 4e-3),
    (3, 777, 33, 64, torch.float16, 1e-3)])
def test_large_shapes(b, n, d, k, dtype, tol):
    torch.manual_seed(0)
    check(problem("cuda", b, n, d, k, dtype=dtype), tol)

@compiler_only
def test_it_compiles_for_a_gpu_that_is_not_here(tmp_path):
    "Both kernels through Triton's compiler and ptxas for an H100, in two types; shared memory must fit"
    seen = compiled_for_h100("""
from okadfa.kernels.longconv import _GatedConv, _jit
_jit.load()
for dtype in (torch.float32, torch.bfloat16):
    u, g = (torch.zeros(2, 64, 300, dtype=dtype).mT.requires_grad_() for _ in range(2))
    h = torch.zeros(200, 64, requires_grad=True)
    _GatedConv.apply(u, h, g).sum().backward()""", tmp_path)
    assert seen == (["_convolution"]*3 + ["_tap_gradient"])*2

def test_a_forced_choice_that_cannot_run_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    u, h = torch.zeros(1, 4, 2), torch.zeros(3, 2)
    if TRITON:
        says = "^gated_conv: u is on the cpu: move it to a CUDA device, or set TRITON_INTERPRET=1"
        with pytest.raises(NotImplementedError, match=says): gated_conv(u, h, impl="triton")
    with pytest.raises(NotImplementedError, match="float64"): gated_conv(u.double(), h, impl="triton")
    assert gated_conv(u.double(), h).dtype == torch.float64                          # auto takes what can run
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert why_not_triton(u).startswith("triton is not installed")

@pytest.mark.parametrize("change,says", [
    (dict(taps=torch.zeros(3, 1)), "need u"), (dict(gate=torch.zeros(1, 7, 2)), "need u"),
    (dict(u=torch.zeros(8, 2)), "need u"), (dict(impl="fast"), "impl must be")])
def test_what_does_not_fit_is_refused(change, says):
    fits = dict(u=torch.zeros(1, 8, 2), taps=torch.zeros(3, 2))
    with pytest.raises(InputError, match=says) as e: gated_conv(**(fits | change))
    assert "\n" not in str(e.value)
