"Multiplication by packed polar weights against its definition: on a CUDA device where there is one, else interpreted"
import importlib.util
import pytest, torch
from kernel_setup import TRITON, compiled_for_h100, compiler_only, device, needs_cuda, only_where_late, run_alone
from okadfa.core import InputError, assert_rel
from okadfa.kernels import polar
from okadfa.kernels.polar import pack_codes, polar_matmul, polar_matmul_ref, polar_points, unpack_codes, why_not_triton

def problem(device, n=3, rows=5, cols=7, bits=8, group=4, phases=(32,)*8, dtype=torch.complex64):
    codes = torch.randint(sum(phases), (rows, cols))
    if dtype.is_complex: x = torch.randn(n, cols, dtype=dtype)
    else: x = torch.randn(n, 2*cols).to(dtype)
    arrays = x, pack_codes(codes, bits), torch.rand(rows, -(-cols//group)) + .5, torch.rand(len(phases)) + .1
    return [*(a.to(device) for a in arrays), phases], dict(bits=bits, group=group, cols=cols)

def wide(a):
    if not torch.is_tensor(a) or a.dtype == torch.int32: return a
    return a.to(torch.complex128 if a.is_complex() else torch.float64)

def check(args, how, tol=2e-6):
    ref, got = polar_matmul_ref(*map(wide, args), **how), polar_matmul(*args, **how, impl="triton")
    assert got.dtype == args[0].dtype and got.device == args[0].device
    assert_rel("product", ref, wide(got), tol)
    return got

@only_where_late
def test_in_a_process_of_its_own(): run_alone(__file__)

def test_packing():
    for bits in range(1, 17):
        for cols in (0, 1, 2, 31, 32, 65):
            codes = torch.randint(1 << bits, (4, cols)); codes[0], codes[1] = (1 << bits) - 1, 0
            words = pack_codes(codes, bits)
            assert words.dtype == torch.int32 and words.shape == (4, -(-cols*bits//32))
            assert torch.equal(unpack_codes(words, bits, cols), codes)
            alone = 0                                                 # one large number, cut into words
            for j, c in enumerate(codes[2].tolist()): alone |= c << j*bits
            want = [alone >> 32*i & 0xffffffff for i in range(words.shape[1])]
            assert [w & 0xffffffff for w in words[2].tolist()] == want
    for bad, bits in (([[4]], 2), ([[-1]], 2), ([1], 2), ([[1]], 17), ([[1]], 0)):
        with pytest.raises(InputError): pack_codes(torch.tensor(bad), bits)

def test_levels_whose_code_is_a_shift():
    "Only where every level has the same power of two of phases and every code is a point; and the tables say the same"
    for phases, bits, shift in (((32,)*8, 8, 5), ((1,)*4, 2, 0), ((4,), 2, 2), ((4, 4), 4, -1), ((5, 5, 5), 4, -1),
                                ((4, 2, 2), 3, -1)):
        count, first, levels, found = polar._tables(phases, bits, torch.device("cpu"))
        assert found == shift and count.tolist() == list(phases)
        assert first.tolist() == [sum(phases[:i]) for i in range(len(phases))]
        if shift < 0:
            want = [l for l, n in enumerate(phases) for _ in range(n)]
            assert levels.tolist() == want + [len(phases) - 1]*((1 << bits) - len(want))

def test_the_reference_by_hand():
    phases, radii = (1, 3, 4), torch.tensor([.1, 1., 2.])
    points = torch.cat([r*torch.exp(2j*torch.pi*torch.arange(n)/n) for r, n in zip(radii, phases)])
    codes, scales = torch.randint(8, (6, 11)), torch.rand(6, 3)
    want = points[codes]*scales.repeat_interleave(4, 1)[:, :11]
    packed, how = (pack_codes(codes, 3), scales, radii, phases), dict(bits=3, group=4, cols=11)
    assert_rel("points", want, polar_points(*packed, **how), 1e-6)
    x = torch.randn(2, 3, 11, dtype=torch.complex64)
    packed, how = (pack_codes(codes, 3), scales, radii, phases), dict(bits=3, group=4, cols=11)
    assert_rel("complex", torch.einsum("abj,ij->abi", x, want), polar_matmul(x, *packed, **how), 1e-6)
    xr = torch.randn(2, 22)
    real = (xr[:, None, 0::2]*want.real + xr[:, None, 1::2]*want.imag).sum(-1)
    assert_rel("pairs", real, polar_matmul(xr, *packed, **how, impl="ref"), 1e-6)

BOOKS = {"8": (8, (32,)*8), "12": (12, (128,)*32), "16": (16, (1024,)*64), "5": (5, (8,)*4),
         "8 unequal": (8, (1, 6, 12, 18, 25, 32, 40, 48, 60)), "12 unequal": (12, (13, 500, 1000, 2000)),
         "11 unused codes": (11, (3, 5)), "4 not a power of two": (4, (5, 5, 5)), "6 fewer levels": (6, (16,)*3),
         "3 unequal": (3, (2, 1, 3, 2))}
@pytest.mark.parametrize("book", BOOKS)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.float32])
def test_codebooks(device, book, dtype):
    bits, phases = BOOKS[book]
    check(*problem(device, 5, 33, 41, bits, 16, phases, dtype))

@pytest.mark.parametrize("n,rows,cols,group", [(1, 1, 1, 1), (1, 64, 32, 32), (17, 65, 33, 7), (33, 3, 100, 1000),
                                               (70, 130, 31, 1), (64, 64, 64, 64)])
def test_sizes(device, n, rows, cols, group):
    for dtype in (torch.complex64, torch.float32): check(*problem(device, n, rows, cols, 12, group, (128,)*32, dtype))

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(device, dtype):
    check(*problem(device, 9, 40, 70, 12, 32, (128,)*32, dtype), tol=torch.finfo(dtype).eps)

def test_tiles(device, monkeypatch):
    args, how = problem(device, 40, 70, 90)
    for o in (dict(BM=16, BN=16, BK=16), dict(BM=32, BN=64, BK=64), dict(P="tf32")):
        for k, v in o.items(): monkeypatch.setitem(polar.OVERRIDE, k, v)
        check(args, how, 2e-6 if device == "cpu" or "P" not in o else 2e-3)

def test_layouts(device):
    (x, *rest), how = problem(device, 6, 9, 20)
    y = check([x, *rest], how)
    for view in (x.T.contiguous().T, torch.stack([x, x], 1)[:, 0], x.conj().clone().conj()):
        assert torch.equal(polar_matmul(view, *rest, **how, impl="triton"), y)
    assert torch.equal(polar_matmul(x.view(2, 3, 20), *rest, **how, impl="triton"), y.view(2, 3, 9))
    assert torch.equal(polar_matmul(x[0], *rest, **how, impl="triton"), y[0]) or device == "cuda"
    assert polar_matmul(x[:0], *rest, **how, impl="triton").shape == (0, 9)
    x[1:] = torch.nan                                             # a row sees no other, whatever the tiles are
    assert torch.equal(polar_matmul(x, *rest, **how, impl="triton")[0], y[0])

def test_one_code_at_a_time(device):
    "Every code of 8 bits, alone in a row of zeros of x: its own place, shift and sign"
    phases = (1, 6, 12, 18, 25, 32, 40, 48, 60)
    codes = torch.arange(sum(phases)).repeat(2)[None, :480]
    args = [torch.eye(480, dtype=torch.complex64), pack_codes(codes, 8), torch.ones(1, 15), torch.rand(9) + .1, phases]
    check([a.to(device) if torch.is_tensor(a) else a for a in args], dict(bits=8, group=32, cols=480), 1e-6)

@pytest.mark.parametrize("method", ["unrestricted", "lloyd", "log"])
@pytest.mark.parametrize("pairs", [False, True])
def test_quantized_layers(device, method, pairs):
    from okadfa.spectral.container import PolarLinear
    from okadfa.spectral.polar import polar_quantize
    w = torch.randn(20, 150) if pairs else torch.randn(20, 75, dtype=torch.complex64)
    p = polar_quantize(w, 12, method=method, pairs=pairs, group=32)
    layer, x = PolarLinear(p).to(device), torch.randn(4, w.shape[1], dtype=w.dtype, device=device)
    assert_rel("layer", x @ p.dequantize(device).T, layer(x, impl="triton"), 1e-5)
    assert_rel("layer", layer(x, impl="ref"), layer(x), 1e-5)

@compiler_only
def test_it_compiles_for_a_gpu_that_is_not_here(tmp_path):
    "The kernel through Triton's compiler and ptxas for an H100, in its variants; shared memory must fit"
    seen = compiled_for_h100("""
from okadfa.kernels.polar import _launch, _jit, pack_codes
_jit.load()
for bits, phases, x in ((12, (13, 500, 1000, 2000), torch.zeros(70, 300, dtype=torch.complex64)),
                        (8, (32,)*8, torch.zeros(1, 600, dtype=torch.bfloat16))):
    words = pack_codes(torch.zeros(100, 300, dtype=torch.int64), bits)
    _launch(x, words, torch.ones(100, 3), torch.ones(len(phases)), phases, bits, 128, 300)""", tmp_path)
    assert seen == ["_polar_matmul"]*2

def test_a_forced_choice_that_cannot_run_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    (x, *rest), how = problem("cpu")
    def said(x):
        with pytest.raises(NotImplementedError, match="^polar_matmul: ") as e:
            polar_matmul(x, *rest, **how, impl="triton")
        assert "\n" not in str(e.value)
        return str(e.value)
    if TRITON: assert "x is on the cpu: move it to a CUDA device, or set TRITON_INTERPRET=1" in said(x)
    assert "complex128" in said(x.to(torch.complex128)) and "needs a gradient" in said(x.clone().requires_grad_())
    with torch.no_grad(): assert why_not_triton(x.clone().requires_grad_()) == why_not_triton(x)
    assert_rel("auto", polar_matmul_ref(x, *rest, **how), polar_matmul(x, *rest, **how), 0)     # auto on a CPU
    y = x.clone().requires_grad_()
    polar_matmul(y, *rest, **how).abs().sum().backward()
    assert y.grad.isfinite().all() and y.grad.ne(0).all()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "triton is not installed" in said(x)

@pytest.mark.parametrize("change,says", [
    (dict(cols=6), "with 6 columns"),
    (dict(x=torch.randn(3, 7)), "with 7 columns"),
    (dict(x=torch.ones(3, 14).int()), "complex or floating"),
    (dict(x=torch.tensor(1j)), "with 7 columns"),
    (dict(words=torch.zeros(5, 3, dtype=torch.int32)), "need words"),
    (dict(words=torch.zeros(5, 2)), "need words"),
    (dict(scales=torch.ones(5, 1)), "need words"),
    (dict(scales=torch.ones(4, 2)), "need words"),
    (dict(radii=torch.ones(7)), "one radius a level"),
    (dict(phases=(32,)*7 + (33,)), "256 phases at most"),
    (dict(phases=(0,)*8), "at least one phase"),
    (dict(phases=()), "one radius"),
    (dict(bits=0), "bits from 1 to 16"),
    (dict(bits=17), "bits from 1 to 16"),
    (dict(group=0), "group >= 1"),
    (dict(impl="fast"), "impl must be"),
    (dict(radii=torch.ones(8, device="meta")), "one device")])
def test_what_does_not_fit_is_refused(change, says):
    args, how = problem("cpu")
    named = dict(zip(("x", "words", "scales", "radii", "phases"), args))
    with pytest.raises(InputError, match=says) as e: polar_matmul(**(named | how | change))
    assert "\n" not in str(e.value)

@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("n,rows,cols", [(1, 4096, 4096), (64, 1000, 3001), (3000, 2048, 512)])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.float32, torch.bfloat16])
def test_large(n, rows, cols, dtype):
    torch.manual_seed(0); torch.set_float32_matmul_precision("highest")
    for bits, phases in ((12, (128,)*32), (12, (13, 500, 1000, 2000)), (16, (1024,)*64)):
        check(*problem("cuda", n, rows, cols, bits, 256, phases, dtype), tol=5e-6 if dtype != torch.bfloat16 else 5e-3)
