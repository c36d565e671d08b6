"The head's loss over a grid: types, lengths, chunks, ignored tokens, needed gradients, direct feedback, memory"
import itertools
import pytest, torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from okadfa.core import InputError, assert_rel
from okadfa.models.head import linear_cross_entropy, linear_cross_entropy_ref

@pytest.fixture(autouse=True)
def one_thread():
    "Tiny tensors: a pool of threads would only wait for itself"
    threads = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

def problem(n, d=6, v=13, dtype=torch.float64, ignore=(), seed=0):
    g = torch.Generator().manual_seed(seed)
    h, w = (torch.randn(rows, d, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for rows in (n, v))
    t = torch.randint(v, (n,), generator=g); t[list(ignore)] = -100
    return h, w, t

TOL = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}

@pytest.mark.parametrize("dtype", TOL)
@pytest.mark.parametrize("n,chunk", [(1, 1), (1, 5), (7, 3), (8, 4), (33, 32), (33, 34), (33, 10**6)])
def test_grid(dtype, n, chunk):
    for ignore, reduction in itertools.product(((), (0,), (n - 1,), range(n//2)), ("mean", "sum")):
        h, w, t = problem(n, dtype=dtype, ignore=ignore)
        if (t == -100).all(): continue
        ref = linear_cross_entropy_ref(h.double(), w.double(), t, reduction=reduction)
        got = linear_cross_entropy(h, w, t, chunk, reduction=reduction)
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_rel("loss", ref, got.double(), TOL[dtype])
        for x, a, b in zip((h, w), torch.autograd.grad(2.5*ref, (h, w)), torch.autograd.grad(2.5*got, (h, w))):
            assert b.dtype == x.dtype
            assert_rel("gradient", a.to(x.dtype), b, TOL[dtype])

def test_rows_beyond_the_scratch():
    "A vocabulary so large that a chunk's softmax takes several blocks of rows"
    h, w, t = problem(23, d=3, v=2**18 + 1, ignore=(5,))
    ref = torch.autograd.grad(linear_cross_entropy_ref(h, w, t), (h, w))
    got = torch.autograd.grad(linear_cross_entropy(h, w, t, chunk=10), (h, w))
    for a, b in zip(ref, got): assert_rel("gradient", a, b, 1e-13)

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    h, w, t = problem(100, d=32, v=300, dtype=torch.float32, ignore=(4, 50))
    truth = torch.autograd.grad(linear_cross_entropy_ref(h.double(), w.double(), t), (h, w))
    with torch.autocast("cpu", dtype): loss = linear_cross_entropy(h, w, t, chunk=16)
    assert loss.dtype == torch.float32
    for a, b in zip(truth, torch.autograd.grad(loss, (h, w))): assert_rel("gradient", a, b, 2e-2)
    with torch.autocast("cpu", dtype):
        loss = linear_cross_entropy(h.to(dtype), w, t, chunk=16)   # a half-precision trunk
    for a, b in zip(truth, torch.autograd.grad(loss, (h, w))): assert_rel("gradient", a, b, 2e-2)

def test_weight_gradient_is_summed_in_float32():
    "4,096 equal tokens one a chunk: a sum kept in bfloat16 would stop growing at 256 terms"
    h, w = torch.ones(4096, 1).requires_grad_(), torch.zeros(2, 1, requires_grad=True)
    t = torch.zeros(4096, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16): loss = linear_cross_entropy(h, w, t, chunk=1, reduction="sum")
    assert_rel("sum", torch.tensor([[-2048.], [2048.]]), torch.autograd.grad(loss, w)[0], 1e-6)

def test_extreme_logits():
    "A target of probability 0 in float32 (loss 2,000), and one of probability 1"
    w = torch.eye(3); t = torch.tensor([0, 0])
    h = torch.tensor([[0., 2000., 0.], [80., 0., 0.]], requires_grad=True)
    loss = linear_cross_entropy(h, w, t, reduction="sum")
    assert loss.item() == 2000
    g, = torch.autograd.grad(loss, h)
    assert_rel("error", torch.tensor([[-1., 1., 0.], [0., 0., 0.]]), g, 1e-6)

def test_half_precision_error_near_one():
    "p = 0.995 rounded to bfloat16 is 0.9961: subtracting one afterwards would be 20% off"
    h, w, t = torch.tensor([[6., 0., 0.]], requires_grad=True), torch.eye(3), torch.tensor([0])
    with torch.autocast("cpu", torch.bfloat16): loss = linear_cross_entropy(h, w, t)
    (ref,), (got,) = (torch.autograd.grad(x, h) for x in (linear_cross_entropy_ref(h, w, t), loss))
    assert_rel("near one", ref, got, 5e-3)

@pytest.mark.parametrize("need_h,need_w,need_o", [x for x in itertools.product((True, False), repeat=3) if any(x)])
def test_only_needed_gradients(need_h, need_w, need_o):
    h, w, t = problem(11, ignore=(3,))
    x, B = torch.randn(11, 4, dtype=torch.float64), torch.randn(4, 13, dtype=torch.float64)
    ref_h, ref_w = torch.autograd.grad(linear_cross_entropy_ref(h, w, t), (h, w))
    z = (h @ w.T).detach().requires_grad_(); ref_x = torch.autograd.grad(F.cross_entropy(z, t), z)[0] @ B.T
    h, w = h.detach().requires_grad_(need_h), w.detach().requires_grad_(need_w); x.requires_grad_(need_o)
    counts = Counter()
    with counts: linear_cross_entropy(h, w, t, chunk=4, feedback=B, outputs=x).backward()
    assert counts.products == 3*(1 + need_h + need_w + need_o)   # three chunks, and no product that nobody needs
    for need, leaf, ref in ((need_h, h, ref_h), (need_w, w, ref_w), (need_o, x, ref_x)):
        if need: assert_rel("gradient", ref, leaf.grad, 1e-12)
        else: assert leaf.grad is None

class Counter(TorchDispatchMode):
    "Counts matrix products and remembers the largest tensor made"
    def __init__(self): super().__init__(); self.products = self.largest = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket._qualified_op_name in ("aten::mm", "aten::addmm", "aten::addmm_")
        self.largest = max(self.largest, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)), 0)
        return out

@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_all_logits_never_exist(device, autocast):
    n, d, v, e, chunk = 96, 4, 500, 8, 10
    h, w, x = (torch.zeros(s, device=device, requires_grad=True) for s in ((n, d), (v, d), (n, e)))
    t, B = torch.zeros(n, dtype=torch.long, device=device), torch.zeros(e, v, device=device)
    with Counter() as c, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        linear_cross_entropy(h, w, t, chunk, feedback=B, outputs=x).backward()
    assert c.largest == chunk*v and c.products == 40
    with Counter() as c, torch.no_grad(): linear_cross_entropy(h, w, t, chunk)
    assert c.largest == chunk*v and c.products == 10   # evaluation: the logits and nothing else
    with Counter() as c: linear_cross_entropy_ref(h, w, t).backward()
    assert c.largest == n*v                            # the counter does see the definition's

def test_accumulation_and_second_backward():
    h, w, t = problem(20)
    linear_cross_entropy_ref(h, w, t).backward(); ref_h, ref_w = h.grad, w.grad; h.grad = w.grad = None
    loss = linear_cross_entropy(h, w, t, chunk=6)
    loss.backward(retain_graph=True); loss.backward(retain_graph=True); (3*loss).backward()
    assert_rel("h", 5*ref_h, h.grad, 1e-13); assert_rel("w", 5*ref_w, w.grad, 1e-13)
    w.grad = None
    for part in (slice(0, 9), slice(9, 20)):
        linear_cross_entropy(h[part], w, t[part], chunk=6, reduction="sum").backward()
    assert_rel("two batches", 20*ref_w, w.grad, 1e-13)

def test_shapes_and_reductions():
    h, w, t = problem(24, ignore=(1, 7)); h3, t3 = h.view(2, 3, 4, 6), t.view(2, 3, 4)
    x, B = torch.zeros(2, 3, 4, 5, dtype=torch.float64, requires_grad=True), torch.randn(5, 13, dtype=torch.float64)
    linear_cross_entropy(h3, w, t3, chunk=5, feedback=B, outputs=x).backward()
    assert x.grad.shape == x.shape and x.grad.view(24, 5)[[1, 7]].count_nonzero() == 0
    with torch.no_grad(): each = linear_cross_entropy(h3, w, t3, chunk=5, reduction="none")
    assert_rel("each", linear_cross_entropy_ref(h3, w, t3, reduction="none"), each, 1e-13)
    assert each.view(-1)[[1, 7]].count_nonzero() == 0 and not each.requires_grad
    assert_rel("ignore_index inside the vocabulary", linear_cross_entropy_ref(h, w, t.clamp_min(0), ignore_index=0),
               linear_cross_entropy(h, w, t.clamp_min(0), ignore_index=0, chunk=7), 1e-13)
    assert_rel("int32 targets", linear_cross_entropy(h, w, t), linear_cross_entropy(h, w, t.int()), 0)

def test_nothing_counts_and_nan_padding():
    h, w, t = problem(9)
    for reduction in ("mean", "sum"):
        loss = linear_cross_entropy(h, w, torch.full_like(t, -100), chunk=4, reduction=reduction)
        assert loss.item() == 0 and all(g.count_nonzero() == 0 for g in torch.autograd.grad(loss, (h, w)))
    empty = linear_cross_entropy(h[:0], w, t[:0]); assert empty.item() == 0
    t[[2, 8]] = -100; ref = torch.autograd.grad(linear_cross_entropy_ref(h, w, t), (h, w))
    with torch.no_grad(): h[[2, 8]] = torch.nan
    got = torch.autograd.grad(linear_cross_entropy(h, w, t, chunk=4), (h, w))
    for a, b in zip(ref, got): assert_rel("NaN in padding", a, b, 1e-13)

def test_refusals():
    h, w, t = problem(8); x, B = torch.zeros(8, 4, dtype=torch.float64), torch.zeros(4, 13, dtype=torch.float64)
    for match, args, kw in (
        ("chunk", (h, w, t), dict(chunk=0)),
        ("reduction", (h, w, t), dict(reduction="max")),
        ("h \\[... d\\]", (h, w.T, t), {}),
        ("one target", (h, w, t[:-1]), {}),
        ("integers", (h, w, t.float()), {}),
        ("vocabulary", (h, w, t + 12), {}),
        ("vocabulary", (h, w, t - 20), {}),
        ("under torch.autocast", (h, w.float(), t), {}),
        ("no gradient", (h, w, t), dict(reduction="none")),
        ("both or neither", (h, w, t), dict(feedback=B)),
        ("both or neither", (h, w, t), dict(outputs=x)),
        ("need feedback", (h, w, t), dict(feedback=B.T, outputs=x)),
        ("need outputs", (h, w, t), dict(feedback=B, outputs=x[:-1]))):
        with pytest.raises(InputError, match=match) as e: linear_cross_entropy(*args, **kw)
        assert "\n" not in str(e.value)
    with pytest.raises(InputError, match="second derivative"):
        torch.autograd.grad(linear_cross_entropy(h, w, t), h, create_graph=True)
