"What the CPU cannot show: the same numbers on a CUDA device, half precision there, memory given back"
import pytest, torch
from okadfa.attention.favor import FavorFeatures, FavorState, favor_attention, favor_attention_ref
from okadfa.core import assert_rel, gpu_context
from okadfa.dfa.feedback import FeedbackMatrices
from okadfa.models.head import linear_cross_entropy, linear_cross_entropy_ref
from okadfa.models.lm import LMConfig, LanguageModel

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

@pytest.fixture(autouse=True)
def full_float32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest"); yield; torch.set_float32_matmul_precision(before)

@pytest.mark.parametrize("n", [1, 127, 128, 1000])
@pytest.mark.parametrize("dtype,tol", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 5e-3)])
def test_attention(n, dtype, tol):
    q, k, v = (torch.randn(3, 2, 4, n, 64)*0.7).to(dtype)
    f = FavorFeatures(64)
    ref = favor_attention_ref(q.double(), k.double(), v.double(), f)
    got = favor_attention(q.cuda(), k.cuda(), v.cuda(), f.cuda())
    assert_rel("cuda", ref, got.double().cpu(), tol)
    if n > 1:
        k2 = k.clone(); k2[:, :, n//2:] = 3
        assert torch.equal(got[:, :, :n//2], favor_attention(q.cuda(), k2.cuda(), v.cuda(), f)[:, :, :n//2])

def test_decoding():
    q, k, v = torch.randn(3, 1, 2, 50, 32, device="cuda")
    f = FavorFeatures(32).cuda()
    state = FavorState(f)
    steps = torch.stack([state.step(q[:, :, t], k[:, :, t], v[:, :, t]) for t in range(50)], 2)
    assert_rel("steps", favor_attention(q, k, v, f), steps, 1e-4)

@pytest.mark.parametrize("kind", ["gaussian", "orthogonal"])
def test_fixed_matrices_are_the_same_everywhere(kind):
    a, b = FeedbackMatrices([16]*3, 16, kind=kind), FeedbackMatrices([16]*3, 16, kind=kind).cuda()
    for l in range(3): assert torch.equal(a.matrix(l), b.matrix(l).cpu())
    assert torch.equal(FavorFeatures(16).projection, FavorFeatures(16).cuda().projection.cpu())

@pytest.mark.parametrize("half", [False, True])
def test_head_loss(half):
    h, w = torch.randn(300, 64, device="cuda"), torch.randn(5000, 64, device="cuda")*0.1
    t = torch.randint(5000, (300,), device="cuda")
    h.requires_grad_(); w.requires_grad_()
    def run(f, **kw):
        with torch.autocast("cuda", torch.bfloat16, enabled=half): loss = f(h, w, t, **kw)
        return (loss.detach().float(), *torch.autograd.grad(loss, (h, w)))
    ref, got = run(linear_cross_entropy_ref), run(linear_cross_entropy, chunk=128)
    for a, b in zip(ref, got): assert_rel("loss", a, b, 2e-2 if half else 1e-4)

@pytest.mark.parametrize("mixer,rounds", [("favor", 0), ("favor", 1), ("softmax", 0)])
def test_model_gradients_equal_those_of_the_cpu(mixer, rounds):
    size = dict(vocab_size=99, d_model=64, n_layers=3, n_heads=2, max_len=80)
    config = LMConfig(**size, mixer=mixer, rounds=rounds, feedback="gaussian")
    a, b, (x, y) = LanguageModel(config), LanguageModel(config).cuda(), torch.randint(99, (2, 2, 77))
    a.loss(x, y).backward(); b.loss(x.cuda(), y.cuda()).backward()
    for (n, p), q in zip(a.named_parameters(), b.parameters()): assert_rel(n, p.grad, q.grad.cpu(), 1e-3)

def test_memory_is_given_back():
    torch.cuda.empty_cache(); before = torch.cuda.memory_reserved()
    with pytest.raises(KeyError), gpu_context() as device:
        x = torch.empty(2**28, device=device); del x
        raise KeyError
    assert torch.cuda.memory_reserved() <= before
