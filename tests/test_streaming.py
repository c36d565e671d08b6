"Convolutions step by step: every split into prompt and steps, odd sizes, refusals, and filters turned into recurrences"
import pytest, torch
from okadfa.core import InputError, assert_rel
from okadfa.spectral.mixing import causal_conv_ref
from okadfa.spectral.streaming import (DirectConv, ModeState, StreamingConv, add_square, discounted_sum, fit_modes,
    hankel_vectors, mode_taps, prompt_outputs)

@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)

def steps(state, x, prompt):
    "A prompt at once, the rest one by one"
    first = [state.prefill(x[:, :prompt])] if prompt else []
    return torch.cat(first + [state.step(x[:, t])[:, None] for t in range(prompt, x.shape[1])], 1)

def modes(d=3, K=2, longest=50.):
    return -1/longest**torch.rand(d, K), torch.rand(d, K)*3, torch.randn(d, K, 2)

# ---- relaxed convolution

@pytest.mark.parametrize("b,n,block", [(1, 1, 1), (1, 70, 1), (2, 64, 4), (2, 65, 4), (1, 63, 8), (3, 130, 16),
                                       (1, 50, 64), (1, 200, 64)])
@pytest.mark.parametrize("prompt", [0, 1, 13, 64, 10_000])
def test_equals_the_parallel_form(b, n, block, prompt):
    x, h = torch.randn(b, n, 3, dtype=torch.float64), torch.randn(n, 3, dtype=torch.float64)
    assert_rel("steps", causal_conv_ref(x, h), steps(StreamingConv(h, block=block), x, min(prompt, n)), 1e-13)

@pytest.mark.parametrize("k,max_len", [(1, 40), (17, 40), (40, 40), (100, 40), (40, 1000)])
def test_taps_shorter_and_longer_than_the_text(k, max_len):
    x, h = torch.randn(2, 40, 3), torch.randn(k, 3)
    for prompt in (0, 7):
        got = steps(StreamingConv(h, max_len, block=4), x, prompt)
        assert_rel(f"{prompt=}", causal_conv_ref(x, h), got, 1e-6)

def test_every_step_uses_what_is_known_and_no_more():
    "Outputs are final when they are given: the same steps with other inputs afterwards gave the same ones"
    x, h = torch.randn(1, 90, 3), torch.randn(90, 3)
    y = x.clone(); y[:, 50:] = 1e3
    a, b = (steps(StreamingConv(h, block=8), z, 11) for z in (x, y))
    assert torch.equal(a[:, :50], b[:, :50])

def test_outputs_belong_to_the_caller():
    state, x, h = StreamingConv(torch.ones(40, 2), block=4), torch.ones(1, 40, 2), torch.ones(40, 2)
    state.prefill(x[:, :5]).zero_()                                 # what is done to an output must not reach the state
    kept = []
    for t in range(5, 40): y = state.step(x[:, t]); kept.append(y.clone()); y.zero_()
    assert_rel("sums", causal_conv_ref(x, h)[:, 5:], torch.stack(kept, 1), 1e-6)
    state = StreamingConv(torch.ones(40, 2), block=4)
    outs = [state.step(x[:, t]) for t in range(40)]                    # and later steps must not reach an output
    assert_rel("outputs that were kept", causal_conv_ref(x, h), torch.stack(outs, 1), 1e-6)

def test_work_is_of_the_order_it_should_be(monkeypatch):
    "Squares of side U come once in 2U steps, on average: n log n numbers through FFTs of one channel"
    sides, square = [], StreamingConv._square
    monkeypatch.setattr(StreamingConv, "_square", lambda self, U: sides.append(U) or square(self, U))
    steps(StreamingConv(torch.randn(1024, 1), block=8), torch.randn(1, 1024, 1), 0)
    assert {U: sides.count(U) for U in sorted(set(sides))} == {2**i: 1024//2**(i + 1) for i in range(3, 10)}

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [StreamingConv, lambda h: ModeState(*modes())])
def test_half_precision_inputs(make, dtype):
    x, state = torch.randn(2, 30, 3).to(dtype), make(torch.randn(30, 3)/5)
    h = state.h.mT if isinstance(state, StreamingConv) else mode_taps(*state.parts, 30)
    got = steps(state, x, 9)
    assert got.dtype == dtype
    assert_rel("half", causal_conv_ref(x.double(), h.double()), got.double(), torch.finfo(dtype).eps)

def test_no_gradients_are_kept():
    h, x = torch.randn(20, 3, requires_grad=True), torch.randn(1, 20, 3, requires_grad=True)
    for state in (StreamingConv(h, block=4), ModeState(*(p.requires_grad_() for p in modes())), DirectConv(h.detach())):
        if not isinstance(state, DirectConv): assert not state.prefill(x[:, :5]).requires_grad
        assert not state.step(x[:, 5]).requires_grad

def test_the_end_of_the_text():
    state = StreamingConv(torch.randn(10, 3), block=4)
    state.prefill(torch.randn(1, 9, 3)); state.step(torch.randn(1, 3))
    with pytest.raises(InputError, match="position 11 is beyond max_len=10") as e: state.step(torch.randn(1, 3))
    assert "\n" not in str(e.value)
    state = StreamingConv(torch.randn(10, 3))
    with pytest.raises(InputError, match="beyond max_len=10"): state.prefill(torch.randn(1, 11, 3))

@pytest.mark.parametrize("make", [lambda: StreamingConv(torch.randn(20, 3)), lambda: ModeState(*modes())])
def test_a_second_prompt(make):
    state = make(); state.step(torch.randn(1, 3))
    with pytest.raises(InputError, match="prefill starts a new sequence"): state.prefill(torch.randn(1, 4, 3))
    state = make(); assert state.prefill(torch.zeros(1, 0, 3)).shape == (1, 0, 3)
    state.step(torch.randn(1, 3))

@pytest.mark.parametrize("bad", [dict(taps=torch.zeros(5)), dict(taps=torch.zeros(5, 3, dtype=torch.cfloat)),
                                 dict(block=0), dict(block=12)])
def test_states_that_cannot_be(bad):
    with pytest.raises(InputError): StreamingConv(**(dict(taps=torch.zeros(5, 3)) | bad))

def test_shapes_that_do_not_fit():
    state = StreamingConv(torch.zeros(9, 3))
    for x in (torch.zeros(1, 4), torch.zeros(3), torch.zeros(1, 1, 3)):
        with pytest.raises(InputError, match="need bd with d=3"): state.step(x)
    state.step(torch.zeros(2, 3))
    with pytest.raises(InputError, match="b=2"): state.step(torch.zeros(1, 3))

def test_direct():
    x, h = torch.randn(2, 50, 40), torch.randn(50, 40)
    state = DirectConv(h)
    assert_rel("direct", causal_conv_ref(x, h), torch.stack([state.step(x[:, t]) for t in range(50)], 1), 1e-6)

# ---- the pieces they are made of

@pytest.mark.parametrize("at,side,max_len", [(1, 1, 9), (8, 8, 40), (16, 8, 40), (24, 8, 27), (32, 32, 33)])
def test_a_square_is_the_last_inputs_to_the_next_outputs(at, side, max_len):
    x, h = torch.randn(2, 3, max_len, dtype=torch.float64), torch.randn(3, max_len, dtype=torch.float64)
    both = x.clone()
    add_square(both, torch.fft.rfft(torch.nn.functional.pad(h, (0, 2*side))[:, 1:2*side], 2*side), at, side)
    want = x.clone()
    for t in range(at, min(at + side, max_len)):
        for s in range(at - side, at): want[..., t] += h[:, t - s]*x[..., s]
    assert torch.equal(both[..., :at], x[..., :at])
    assert_rel("square", want, both, 1e-13)

@pytest.mark.parametrize("n,k,max_len", [(1, 1, 1), (1, 9, 9), (7, 3, 20), (20, 20, 20)])
def test_a_prompt_gives_its_outputs_and_its_part_of_all_later_ones(n, k, max_len):
    x, h = torch.randn(2, n, 70, dtype=torch.float64), torch.randn(k, 70, dtype=torch.float64)
    padded = torch.nn.functional.pad(x, (0, 0, 0, max_len - n))
    assert_rel("prompt", causal_conv_ref(padded, h), prompt_outputs(x, h.mT, max_len).mT.contiguous(), 1e-13)

@pytest.mark.parametrize("n,chunk", [(1, 4), (4, 4), (5, 4), (40, 7), (40, 128)])
def test_a_discounted_sum_may_be_split_at_any_length(n, chunk):
    re, im, _ = modes()
    powers, x = torch.complex(re.double(), im.double()), torch.randn(2, 3, n, dtype=torch.float64)
    back = (powers[..., None]*torch.arange(n - 1, -1, -1)).exp()                          # [d modes n]
    assert_rel("sum", (back*x[:, :, None]).sum(-1), discounted_sum(x, powers, chunk), 1e-12)

# ---- sums of exponentials

@pytest.mark.parametrize("n", [1, 2, 3, 10, 99, 100, 101])
def test_mode_taps(n):
    re, im, coef = modes(4, 3)
    powers = (torch.complex(re.double(), im.double())*torch.arange(n)[:, None, None]).exp()
    want = (powers*torch.view_as_complex(coef.double())).sum(-1).real
    assert_rel("taps", want, mode_taps(re, im, coef, n).double(), 1e-6)

def test_gradients_of_mode_taps():
    args = [p.double().requires_grad_() for p in modes(2, 2)]
    assert torch.autograd.gradcheck(lambda *a: mode_taps(*a, 13), args)

def test_angles_keep_their_accuracy():
    "exp(i w t) at t = 60,000 with the frequency as float32 holds it"
    re, im, coef = torch.full((1, 1), -1e-6), torch.full((1, 1), 2.7), torch.tensor([[[1., 0.]]])
    t = torch.arange(59_000, 60_000)
    want = (re.double()[0]*t).exp()*(im.double()[0]*t).cos()
    assert_rel("late taps", want, mode_taps(re, im, coef, 60_000)[59_000:, 0].double(), 1e-6)

@pytest.mark.parametrize("b,n,prompt", [(1, 1, 0), (1, 1, 1), (2, 40, 0), (2, 300, 127), (1, 300, 128), (2, 300, 129),
                                        (1, 300, 300)])
def test_the_recurrence_equals_the_convolution(b, n, prompt):
    p, x = modes(), torch.randn(b, n, 3)
    assert_rel("steps", causal_conv_ref(x, mode_taps(*p, n)), steps(ModeState(*p), x, prompt), 2e-6)

def test_the_recurrence_does_not_drift():
    p, x, size = modes(longest=3000.), torch.randn(1, 6000, 3), 1 << 14
    H = torch.fft.rfft(mode_taps(*p, 6000).double(), size, 0)
    want = torch.fft.irfft(torch.fft.rfft(x.double(), size, 1)*H, size, 1)[:, :6000]
    assert_rel("late outputs", want[:, -500:], steps(ModeState(*p), x, 0)[:, -500:].double(), 1e-5)

# ---- filters turned into recurrences

@pytest.mark.parametrize("n", [20, 33, 64])
def test_hankel_singular_values(n):
    h = torch.randn(n, 2, dtype=torch.float64)*(-torch.arange(n)/5).exp()[:, None]
    exact = torch.stack([torch.linalg.svdvals(c.unfold(0, n//2, 1)) for c in h.mT])
    U, S = hankel_vectors(h, 4)
    assert_rel("values", exact[:, :4], S, 1e-3)
    assert_rel("vectors", torch.eye(4).double().expand(2, 4, 4), U.mT @ U, 1e-10)

def test_singular_values_of_noise():
    "Nearly equal ones: the subspace has to be iterated"
    h = torch.randn(400, 2, dtype=torch.float64)
    exact = torch.stack([torch.linalg.svdvals(c.unfold(0, 200, 1)) for c in h.mT])
    assert_rel("values", exact[:, :4], hankel_vectors(h, 4)[1], 4e-2)

@pytest.mark.parametrize("d,K", [(1, 1), (3, 2), (20, 3)])
def test_sums_of_exponentials_are_found_again(d, K):
    h = mode_taps(*(p.double() for p in modes(d, K)), 128)
    p = fit_modes(h, K)
    assert [q.shape for q in p] == [(d, K), (d, K), (d, K, 2)]
    assert_rel("found again", h, mode_taps(*p, 128), 1e-6)

def test_real_exponentials():
    t = torch.arange(200.).double()
    h = torch.stack([(-t/5).exp() + 2*(-t/40).exp(), (-t/9).exp()], 1)
    for K in (2, 3): assert_rel("real", h, mode_taps(*fit_modes(h, K), 200), 1e-7)

def test_more_modes_never_hurt_and_all_decay():
    t = torch.arange(256.)
    h = torch.stack([1/(1 + t), torch.randn(256)*(-t/20).exp(), torch.ones(256), t**2/256**2, (t == 0).float()], 1)
    before = None
    for K in (1, 2, 4, 8):
        re, im, coef = fit_modes(h, K)
        assert (re < 0).all() and mode_taps(re, im, coef, 256*20).isfinite().all()
        left = (mode_taps(re, im, coef, 256) - h).norm(dim=0)/h.norm(dim=0)
        assert before is None or (left <= before*1.05 + 1e-5).all()
        before = left
    assert left[0] < 1e-3 and left[2] < .1 and left[4] < 1e-3

def test_what_cannot_be_fitted():
    for taps, K in ((torch.zeros(15, 2), 4), (torch.zeros(15), 1), (torch.zeros(15, 2), 0)):
        with pytest.raises(InputError, match="n >= 4"): fit_modes(taps, K)
    re, im, coef = fit_modes(torch.zeros(16, 2), 2)
    assert mode_taps(re, im, coef, 16).abs().max() < 1e-6
