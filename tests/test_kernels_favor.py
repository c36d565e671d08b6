"The attention kernels against their definition: on a CUDA device where there is one, else in Triton's interpreter."
import importlib.util
import pytest, torch
from kernel_setup import TRITON, compiled_for_h100, compiler_only, device, needs_cuda, only_where_late, run_alone
from okadfa.core import InputError, assert_rel
from okadfa.kernels import favor
from okadfa.kernels.favor import NEVER, exp_attention_ref, exp_attention_triton, why_not_triton

NAMES = "out q k v Wq Wk bias weight".split()

@pytest.fixture
def tune(monkeypatch):
    "Other launch options for one test"
    def set(forward=None, backward=None, **both):
        for key, o in (("forward", forward), ("backward", backward)):
            monkeypatch.setitem(favor.OVERRIDE, key, both | (o or {}))
    return set

def problem(device, n, d=16, d_v=16, m=32, b=1, h=2, shared=False, std=1., dtype=torch.float32):
    q, k, v = torch.randn(b, h, n, d)*std, torch.randn(b, h, n, d)*std, torch.randn(b, h, n, d_v)
    Wq, Wk = torch.randn(2, 1 if shared else h, m, d)/d**.25
    x = *(y.to(dtype) for y in (q, k, v)), Wq, Wk, torch.randn(1 if shared else h, m)*.3
    return [y.to(device) for y in (*x, -x[1].float().square().sum(-1)/(2*d**.5))]

def same(name, a, b, device):
    "Equal bits in the interpreter. A GPU has another kernel for other strides, which may add in another order"
    if device == "cpu": assert torch.equal(a, b), name
    else: assert_rel(name, a, b, 1e-5)

def run(f, x, go, *args):
    "Output and gradients of all inputs"
    x = [y.detach().requires_grad_() for y in x]
    out = f(*x, *args)
    return [out.detach(), *torch.autograd.grad(out, x, go.to(out.dtype))]

def wide(q, k, v, Wq, Wk, bias, weight, cu=None):
    "The definition again, without an array of n x n x m: for lengths at which that would not fit"
    lq, lk, n = q @ Wq.mT, k @ Wk.mT + bias[..., None, :], q.shape[2]
    a, at = lk.detach().amax(-1, keepdim=True), torch.arange(n, device=q.device)
    fq = (lq - lq.detach().amax(-1, keepdim=True)).exp()
    log = (fq @ (lk - a).exp().mT).log() + (a[..., 0] + weight)[..., None, :]
    sees = at[:, None] >= at
    if cu is not None: s = torch.bucketize(at, cu.to(at), right=True); sees = sees & (s[:, None] == s)
    return log.masked_fill(~sees, -torch.inf).softmax(-1) @ v

def check(x, tol, *args, ref=exp_attention_ref):
    go = torch.randn_like(x[2])
    got = run(exp_attention_triton, x, go, *args)
    for name, a, b, y in zip(NAMES, run(ref, [y.double() for y in x], go, *args), got, (x[2], *x)):
        assert b.dtype == y.dtype
        assert_rel(name, a, b.double(), tol)
    return got

@only_where_late
def test_in_a_process_of_its_own(): run_alone(__file__)

def test_the_two_references_agree():
    x = [y.double() for y in problem("cpu", 30, b=1)]
    cu, go = torch.tensor([0, 4, 30]), torch.randn_like(x[2])
    for args in ((), (cu,)):
        results = (run(f, x, go, *args) for f in (exp_attention_ref, wide))
        for name, a, b in zip(NAMES, *results): assert_rel(name, a, b, 1e-12)

@pytest.mark.parametrize("n,shape,options", [
    (63, dict(d=32, d_v=32, m=64, h=1), {}), (64, dict(d=32, d_v=32, m=64, shared=True), dict(BM=64)),
    (65, dict(d=32, d_v=64, m=96, h=1), {}), (130, dict(d=64, d_v=64, m=96, h=1), dict(BM=64)),
    (20, dict(d=64, d_v=32, m=256), dict(BM=64)), (3, dict(d=7, d_v=3, m=5), {}),
    (36, dict(d=17, d_v=5, m=40, b=2, h=1, shared=True), dict(C=16)),
    (40, {}, dict(forward=dict(C=16), backward=dict(C=32)))])
def test_values_and_gradients(device, tune, n, shape, options):
    tune(**options)
    check(problem(device, n, **shape), 1e-5)

def test_one_row_is_its_value(device):
    x = problem(device, 1)
    out, dq, dk, dv, *_ = run(exp_attention_triton, x, go := torch.randn_like(x[2]))
    assert_rel("out", x[2], out, 1e-6); assert_rel("gradient of v", go, dv, 1e-6)
    assert max(dq.abs().max(), dk.abs().max()) < 1e-5

@pytest.mark.parametrize("bounds", [(0, 50), (0, 1, 1, 17, 33, 60), (0, 0, 16, 16)])
def test_tables_cover_every_row_once(bounds):
    "A chunk that is too long would show on a GPU only: the interpreter writes its rows again"
    chunks, sequences = (t.tolist() for t in favor._tables(bounds, 16, torch.device("cpu")))
    assert sum(([*range(a, a + rows)] for a, rows, _ in chunks), []) == [*range(bounds[-1])]
    for a, rows, first in sequences:
        mine = [c for c in chunks if a <= c[0] < a + rows]
        assert mine[0] == chunks[first] and sum(c[1] for c in mine) == rows
        assert [c[2] for c in mine] == [1] + [0]*(len(mine) - 1)
        assert all(c[1] == 16 for c in mine[:-1])
    assert [s[:2] for s in sequences] == [[a, b - a] for a, b in zip(bounds, bounds[1:]) if b > a]

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n,shape", [(100, dict(d=32, d_v=32, m=64)), (65, dict(d=24, d_v=40, m=72, h=1))])
def test_half_precision(device, dtype, n, shape): check(problem(device, n, dtype=dtype, **shape), 5e-3)

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("std", [2., 6.])
def test_exponents_are_exact_in_half_precision(device, dtype, std):
    "At large norms a rounded W would show at once: exponents are in the tens"
    x = problem(device, 60, d=32, m=64, std=std, dtype=dtype)
    assert_rel("out", exp_attention_ref(*(y.double() for y in x)), exp_attention_triton(*x).double(), 5e-3)

def test_padding(device, tune):
    tune(C=16, BM=32)
    x = problem(device, 40, b=2, h=1)
    x[6][0, :, :20] = NEVER                                            # rows that see nothing, a chunk of nothing,
    x[6][1, :, 30:] = NEVER; x[6][1, 0, 3] = NEVER                     # and one key
    out, *grads = check(x, 1e-5)
    assert all(y[0, :, :20].eq(0).all() for y in (out, *grads[:3], grads[6]))
    assert all(g[1, :, 30:].eq(0).all() for g in grads[1:3])                    # keys that nobody sees
    everything = [y.clone() for y in x]; everything[6][:] = NEVER
    assert all(y.eq(0).all() for y in run(exp_attention_triton, everything, torch.ones_like(x[2])))

def test_packed_sequences_are_separate_calls(device, tune):
    tune(C=16, BM=32)
    bounds = [0, 1, 1, 17, 33, 53]                                # an empty one, one of a row, one of a whole chunk
    x, go = problem(device, 53, h=1), torch.randn(1, 1, 53, 16, device=device)
    x[6][..., :17] += 200                                         # what the first ones weigh must not matter to others
    check(x, 1e-5, torch.tensor(bounds, device=device))
    got = run(exp_attention_triton, x, go, torch.tensor(bounds, dtype=torch.int32, device=device))
    def alone(a, b):
        part = [*(y[:, :, a:b] for y in x[:3]), *x[3:6], x[6][..., a:b]]
        return run(exp_attention_triton, part, go[:, :, a:b])
    parts = [alone(a, b) for a, b in zip(bounds, bounds[1:]) if b > a]
    for i in (0, 1, 2, 3, 7): assert_rel(NAMES[i], torch.cat([p[i] for p in parts], 2), got[i], 1e-6)
    for i in (4, 5, 6): assert_rel(NAMES[i], sum(p[i] for p in parts), got[i], 1e-5)
    y = [z.clone() for z in x]
    for z in y[:3]: z[:, :, :17] = 7                                             # other sequences do not show at all
    assert torch.equal(exp_attention_triton(*y, torch.tensor(bounds))[:, :, 17:], got[0][:, :, 17:])

@pytest.mark.filterwarnings("ignore:.*(invalid value|All-NaN):RuntimeWarning")     # NumPy's, about the infinite key
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_past_is_the_same_to_the_bit(device, tune, dtype):
    tune(C=16, BM=32)
    x = problem(device, 40, h=1, dtype=dtype)
    before = exp_attention_triton(*x)
    for cut, size in ((1, 1e3), (15, 1.), (16, 1e3), (17, 1e-3), (31, 30.), (39, 1e3)):
        y = [z.clone() for z in x]
        for z in y[:3]: z[:, :, cut:] = torch.randn_like(z[:, :, cut:])*size
        y[6][..., cut:] = torch.randn_like(y[6][..., cut:])*size
        after = exp_attention_triton(*y)
        assert torch.equal(before[:, :, :cut], after[:, :, :cut])
        assert not torch.equal(before[:, :, cut:], after[:, :, cut:])
    y = [z.clone() for z in x]
    y[1][:, :, 36:] = y[6][..., 36:] = torch.inf                                 # not even an infinite key reaches back
    assert torch.equal(before[:, :, :36], exp_attention_triton(*y)[:, :, :36])

def test_a_heavy_key_long_ago(device, tune):
    "The running maximum is taken tile by tile, and outlasts a tile"
    tune(C=64, BM=16)
    x = problem(device, 1100, m=16, h=1)
    x[6][..., 5] += 200
    assert_rel("out", wide(*(y.double() for y in x)), exp_attention_triton(*x).double(), 1e-5)

@pytest.mark.parametrize("d", [16, 64])
def test_large_norms(device, tune, d):
    tune(C=16, BM=32)
    check(problem(device, 60, d=d, std=8.), 2e-4)

def test_one_feature_that_dwarfs_the_others(device, tune):
    "It lies in the first block of features, and the maximum over blocks must not forget it"
    tune(C=16, BM=16)
    x = problem(device, 30, m=64, h=1)
    x[0][..., 0] = 1.5; x[3][:, 0] = 0; x[3][:, 0, 0] = 80                       # 120 for every query,
    x[5][:, 0] += 150                                                            # and 150 for every key
    out, *grads = run(exp_attention_triton, x, torch.randn_like(x[2]))
    assert_rel("out", exp_attention_ref(*(y.double() for y in x)), out.double(), 1e-4)
    assert all(y.isfinite().all() for y in grads)

@pytest.mark.parametrize("size,vanishes", [(80., False), (110., True)])
def test_weights_at_the_edge_of_float32(device, tune, size, vanishes):
    "The strong feature of a query is the weak one of every key: all weights are exp(-size). Nothing becomes infinite"
    tune(C=16, BM=16)
    x = [y*0 for y in problem(device, 40, m=2, h=1)]
    x[0][..., 0] = x[1][..., 0] = 1
    x[3][..., 0, 0] = x[4][..., 1, 0] = size
    x[2] = torch.randn_like(x[2])
    out, *grads = run(exp_attention_triton, x, torch.full_like(x[2], 1e5))
    assert all(y.isfinite().all() for y in grads)
    if vanishes: assert all(y.eq(0).all() for y in (out, *grads))     # beyond float32: as if there were no key
    else: assert_rel("out", exp_attention_ref(*x), out, 1e-4)

@pytest.mark.parametrize("cu", [None, [0, 7, 37, 41]])
def test_memory_that_was_never_written_does_not_show(device, tune, monkeypatch, cu):
    tune(C=16, BM=16)
    x, go = problem(device, 41, d=12, d_v=20, m=24, h=1), torch.randn(1, 1, 41, 20, device=device)
    args = () if cu is None else (torch.tensor(cu),)
    clean = run(exp_attention_triton, x, go, *args)
    empty, empty_like = torch.empty, torch.empty_like
    poisoned = []
    def poison(y): poisoned.append(y.fill_(torch.nan)); return y
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    dirty = run(exp_attention_triton, x, go, *args)
    monkeypatch.undo()
    assert len(poisoned) >= 10
    for name, a, b in zip(NAMES, clean, dirty): assert torch.equal(a, b), name

def test_strides(device):
    x, go = problem(device, 20, b=2), torch.randn(2, 2, 20, 16, device=device)
    ref = run(exp_attention_triton, x, go)
    def turned(z): return z.transpose(1, 2).contiguous().transpose(1, 2)
    y = [*map(turned, x[:3]), *x[3:6], turned(x[6])]
    y[1] = torch.cat([y[1], y[1]], -1)[..., :16]                                 # a slice
    y[2] = y[2].mT.contiguous().mT                                               # channels not last in memory
    assert not any(z.is_contiguous() for z in (*y[:3], y[6]))
    for name, a, b in zip(NAMES, ref, run(exp_attention_triton, y, go.mT.contiguous().mT)): same(name, a, b, device)
    x[2] = x[2][:, :1].expand(-1, 2, -1, -1)                                     # one head of values for all
    assert_rel("expanded", exp_attention_ref(*x), exp_attention_triton(*x), 1e-5)
    x[2].requires_grad_(False)
    q = x[0].detach().requires_grad_()
    exp_attention_triton(q, *x[1:]).sum().backward()                  # the gradient that arrives has stride 0

def test_shorter_forms_and_mixed_types(device):
    x = problem(device, 20, shared=True)
    q, k, v, Wq, Wk, bias, weight = x
    for f in (exp_attention_ref, exp_attention_triton):
        same("no heads", f(q, k, v, Wq[0], Wk[0], bias[0], weight), f(*x), device)
        same("no bias", f(q, k, v, Wq, Wk, None, weight), f(q, k, v, Wq, Wk, bias*0, weight), device)
    half = exp_attention_triton(q, k.half(), v.bfloat16(), *x[3:])
    assert half.dtype == torch.bfloat16
    assert_rel("mixed", exp_attention_ref(q, k.half(), v.bfloat16(), *x[3:]), half, 1e-2)
    with torch.autocast(device, torch.bfloat16):
        assert_rel("autocast", exp_attention_ref(*x), exp_attention_triton(*x), 1e-5)
        auto = run(exp_attention_triton, x, torch.ones_like(v))
    for name, a, b in zip(NAMES, run(exp_attention_triton, x, torch.ones_like(v)), auto): assert torch.equal(a, b), name
    nothing = [y[:, :, :0] for y in (q, k, v)]
    assert exp_attention_triton(*nothing, Wq, Wk, bias, weight[..., :0]).shape == (1, 2, 0, 16)

def test_gradients_that_nobody_asked_for_are_not_computed(device, monkeypatch):
    x, go = problem(device, 40, m=64, h=1), torch.randn(1, 1, 40, 16, device=device)
    ref, sizes, empty = run(exp_attention_triton, x, go), [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: sizes.append(empty(*a, **k)) or sizes[-1])
    y = [z.detach().requires_grad_(i not in (3, 4, 5)) for i, z in enumerate(x)]
    out = exp_attention_triton(*y)
    saved = out.grad_fn.saved_tensors
    grads = torch.autograd.grad(out, [y[i] for i in (0, 1, 2, 6)], go)
    for name, a, b in zip("qkvw", [ref[i] for i in (1, 2, 3, 7)], grads): same(name, a, b, device)
    assert not any(s.shape == (1, 1, 40, 64) for s in sizes)                      # no array of n x m
    kept = [s for s in saved if not any(s.data_ptr() == z.data_ptr() for z in y)]
    assert sum(s.numel() for s in kept) == out.numel() + 2*40                    # the output and two numbers a row

@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("n,shape,dtype,tol", [
    (1000, dict(d=64, d_v=64, m=128, b=2), torch.float32, 2e-5),
    (4096, dict(d=64, d_v=64, m=128), torch.bfloat16, 5e-3),
    (4096, dict(d=64, d_v=64, m=256), torch.bfloat16, 5e-3), (2049, dict(d=128, d_v=128, m=512), torch.bfloat16, 5e-3),
    (2000, dict(d=128, d_v=128, m=512), torch.float16, 5e-3),
    (777, dict(d=80, d_v=48, m=200, b=2, shared=True), torch.bfloat16, 5e-3),
    (500, dict(d=128, d_v=128, m=512), torch.float32, 2e-5), (300, dict(d=256, d_v=256, m=256), torch.bfloat16, 5e-3)])
def test_large_shapes(n, shape, dtype, tol):
    torch.manual_seed(0)
    x = problem("cuda", n, dtype=dtype, std=.7, **shape)
    check(x, tol, ref=wide)
    if shape.get("b", 1) == 1: check(x, tol, torch.tensor([0, 100, 101, 300, n], device="cuda"), ref=wide)
    before = exp_attention_triton(*x)
    for cut in (1, n//3, n-1):
        y = [z.clone() for z in x]
        for z in y[:3]: z[:, :, cut:] = torch.randn_like(z[:, :, cut:])*30
        y[6][..., cut:] += 30
        assert torch.equal(before[:, :, :cut], exp_attention_triton(*y)[:, :, :cut])

@compiler_only
def test_it_compiles_for_a_gpu_that_is_not_here(tmp_path):
    "Every kernel through Triton's compiler and ptxas for an H100, with all stores; shared memory must fit"
    seen = compiled_for_h100("""
from okadfa.kernels.exponential import _jit
from okadfa.kernels.favor import _ExpAttention
_jit.load()
q, k, v = torch.zeros(3, 1, 100, 2, 64, dtype=torch.bfloat16).transpose(2, 3).requires_grad_()
W, bias = torch.zeros(2, 128, 64, requires_grad=True), torch.zeros(2, 128)
_ExpAttention.apply(q, k, v, W, W, bias, torch.zeros(1, 2, 100), None)[0].sum().backward()""", tmp_path)
    assert sorted(set(seen)) == ["_contributions", "_key_gradient", "_outputs", "_query_gradient", "_row_maxima",
                                 "_running_maximum", "_scan"]

def test_why_not(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q = torch.zeros(1, 1, 4, 8)
    where = "q is on the cpu: move it to a CUDA device, or set TRITON_INTERPRET=1"
    if TRITON: assert why_not_triton(q).startswith(where)
    assert "float64" in why_not_triton(q.double()) and "256 channels" in why_not_triton(q.new_zeros(1, 1, 1, 300))
    with pytest.raises(NotImplementedError, match="^exp_attention_triton: "):
        exp_attention_triton(q, q, q, q[0, :, :2], q[0, :, :2], None, q[..., 0])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert why_not_triton(q).startswith("triton is not installed")

@pytest.mark.parametrize("change,says", [
    (dict(k=torch.zeros(1, 2, 7, 16)), "need q, k"), (dict(v=torch.zeros(1, 1, 8, 16)), "need q, k"),
    (dict(Wk=torch.zeros(3, 32, 16)), "Wk must be"),
    (dict(bias=torch.zeros(2, 31)), "bias must be"), (dict(weight=torch.zeros(1, 2, 9)), "weight must be"),
    (dict(cu_seqlens=torch.tensor([0, 5, 4, 8])), "cu_seqlens must rise")])
def test_what_does_not_fit_is_refused(device, change, says):
    x = dict(zip("q k v Wq Wk bias weight".split(), problem(device, 8)))
    x |= {a: b.to(device) for a, b in change.items()}
    with pytest.raises(InputError, match=says) as e: exp_attention_triton(**x)
    assert "\n" not in str(e.value)

@pytest.mark.parametrize("case", ["plain", "padded", "grouped", "packed", "fitted"])
def test_favor_attention_takes_the_kernels(device, case):
    from okadfa.attention.estimators import make_features
    from okadfa.attention.favor import FavorFeatures, favor_attention
    h_k = 1 if case == "grouped" else 2
    q, k, v = torch.randn(1, 2, 70, 16), torch.randn(1, h_k, 70, 16), torch.randn(1, h_k, 70, 16)
    f = make_features("derf", 16, 32).fit(q, k) if case == "fitted" else FavorFeatures(16, 32)
    options = dict(padded=dict(key_padding_mask=torch.arange(70)[None] % 5 == 0),
                   packed=dict(cu_seqlens=torch.tensor([0, 1, 40, 70]))).get(case, {})
    move = lambda x: x.to(device) if torch.is_tensor(x) else x
    outs, go = [], torch.randn(1, 2, 70, 16)
    for impl, dtype in (("ref", torch.float64), ("triton", torch.float32)):
        x = [move(y).to(dtype).requires_grad_() for y in (q, k, v)]
        out = favor_attention(*x, f.to(device), impl=impl, **{n: move(o) for n, o in options.items()})
        outs.append([y.float() for y in (out, *torch.autograd.grad(out, x, move(go).to(dtype)))])
    for name, a, b in zip("out q k v".split(), *outs): assert_rel(name, a, b, 1e-4)

def test_what_the_kernels_cannot_do_is_said(device):
    from okadfa.attention.favor import FavorFeatures, favor_attention
    x = torch.randn(3, 1, 1, 8, 16, device=device)
    for bad in (dict(causal=False), dict(local=True)):
        with pytest.raises(NotImplementedError, match="causal=True, local=False"):
            favor_attention(*x, FavorFeatures(16).to(device), impl="triton", **bad)

@pytest.mark.parametrize("n,exact", [(40, dict(window=5, sinks=2)), (70, dict(window=33)), (20, dict(sinks=3))])
@pytest.mark.parametrize("dtype,tol", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_the_far_part_beside_sinks_and_a_window(device, tune, n, exact, dtype, tol):
    "The kernels' part of rows that other keys share in, and its way back"
    from okadfa.attention.favor import FavorFeatures, favor_attention
    tune(C=16, BM=32)
    f, pad = FavorFeatures(16, 32).to(device), torch.arange(n, device=device)[None] % 7 == 3
    x = [torch.randn(1, 2, n, 16, device=device).to(dtype).requires_grad_() for _ in range(3)]
    go = torch.randn(1, 2, n, 16, device=device)
    def run(impl, *x):
        out = favor_attention(*x, f, key_padding_mask=pad, impl=impl, **exact)
        return out, *torch.autograd.grad(out, x, go.to(out.dtype))
    ref = run("ref", *(y.detach().double().requires_grad_() for y in x))
    for name, a, b in zip(("out", *"qkv"), ref, run("triton", *x)): assert_rel(name, a, b.double(), tol)

def test_rows_that_the_kernels_lose_are_mended(device):
    from okadfa.attention.favor import FavorFeatures, favor_attention
    f = FavorFeatures(64).to(device)
    q, k = (torch.nn.functional.normalize(torch.randn(1, 1, 20, 64, device=device), dim=-1)*300 for _ in range(2))
    v, exact = torch.randn(1, 1, 20, 64, device=device), dict(window=3, sinks=1)
    for how in (dict(), exact):
        ref = favor_attention(q.double(), k.double(), v.double(), f, impl="ref", **how)
        assert_rel("mended", ref, favor_attention(q, k, v, f, impl="triton", **how).double(), 2e-3)

@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("d_v", [16, 32, 64, 128])
@pytest.mark.parametrize("d,m", [(16, 64), (32, 64), (64, 128), (128, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_width_of_tile(d, m, d_v, dtype):
    "Widths that fill their tiles are loaded otherwise than those that do not"
    torch.manual_seed(0)
    check(problem("cuda", 130, d=d, d_v=d_v, m=m, dtype=dtype), 1e-2)
