"Estimators: unbiased, seeded, saved with what they have learnt, equal on every path, better where they should be"
import pytest, torch
from okadfa.attention.distill import LearnedFeatures, distill
from okadfa.attention.estimators import (ESTIMATORS, MODEL_FEATURES, Estimator, HyperbolicFeatures, make_features,
                                         model_features, register_estimator, row_cosine)
from okadfa.attention.fitted import FittedFeatures, balance_covariances, width
from okadfa.attention.favor import FavorFeatures, FavorState, favor_attention
from okadfa.core import InputError, assert_rel

def qkv(b=2, h=3, n=50, d=8, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(2, h, d, d, generator=torch.Generator().manual_seed(1))/d**0.5
    q, k, v = torch.randn(3, b, h, n, d, generator=g)
    return (q @ mix[0] + 0.5).to(dtype), (k @ mix[1] - 0.3).to(dtype), v.to(dtype)

OURS = [name for name in ESTIMATORS if name in ESTIMATORS.own]     # what is added from outside has checks of its own

def fitted(name, d=8, m=24, seed=0):
    f = make_features(name, d, m, seed=seed)
    q, k, _ = qkv(d=d, seed=7)
    entry = ESTIMATORS[name]
    return f.fit(q, k, **(dict(steps=5) if entry.learns else {})) if entry.fits else f

@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("causal", [True, False])
def test_every_path_equals_the_definition(name, causal):
    f = fitted(name)
    q, k, v = (x.requires_grad_() for x in qkv(dtype=torch.float64))
    outs = [favor_attention(q, k, v, f, causal=causal, impl=impl, chunk=16) for impl in ("ref", "chunk")]
    assert_rel("values", *outs, 1e-9)
    go = torch.randn_like(outs[0])
    for name, a, b in zip("qkv", *(torch.autograd.grad(o, (q, k, v), go) for o in outs)): assert_rel(name, a, b, 1e-8)

@pytest.mark.parametrize("name", OURS)
def test_the_past_is_bit_identical_and_steps_agree(name):
    f, (q, k, v) = fitted(name), qkv(n=70)
    if name == "trig": q, k = q*0.3, k*0.3                       # signed weights may sum to nothing
    out, k2, v2 = favor_attention(q, k, v, f), k.clone(), v.clone()
    k2[:, :, 41:], v2[:, :, 41:] = 30., -5.
    assert torch.equal(out[:, :, :41], favor_attention(q, k2, v2, f)[:, :, :41])
    state = FavorState(f)
    first = state.prefill(q[:, :, :33], k[:, :, :33], v[:, :, :33])
    rest = [state.step(q[:, :, t], k[:, :, t], v[:, :, t]) for t in range(33, 70)]
    assert_rel("steps", out, torch.cat([first, torch.stack(rest, 2)], 2), 2e-4 if name == "trig" else 1e-5)

@pytest.mark.parametrize("name", ["favor++", "derf-full"])
def test_fitting_does_not_change_what_is_estimated(name):
    "Averaged over draws, all coordinates kept: the kernel itself, in its own scale"
    q, k, _ = (x[:, :, :12]*0.7 for x in qkv(dtype=torch.float64))
    f = [make_features(name, 8, 64, seed=s).fit(q, k) for s in range(150)]
    est = torch.stack([x(q) @ x(k, False).mT for x in f])
    z = (est.mean(0) - (q @ k.mT/8**0.5).exp())/(est.std(0)/150**0.5)
    assert z.abs().max() < 6 and z.square().mean() < 2.5

@pytest.mark.parametrize("name", OURS)
def test_seeded_saved_and_loaded(name):
    a, b, c = fitted(name), fitted(name), fitted(name, seed=1)
    q, k, _ = qkv()
    phi = a.scaled(q)[0]
    assert torch.equal(phi, b.scaled(q)[0]) and not torch.equal(phi, c.scaled(q)[0])
    new = make_features(name, 8, 24, seed=5); new.load_state_dict(a.state_dict())
    for is_query in (True, False):
        for x, y in zip(a.scaled(q, is_query), new.scaled(q, is_query)): assert torch.equal(x, y)

def test_balancing_survives_missing_directions():
    q, k, _ = qkv(dtype=torch.float64)
    q[..., 3:] = 0                                               # queries in three dimensions only
    f = FittedFeatures(8, 64).fit(q.float(), k.float())
    assert favor_attention(q.float(), k.float(), k.float(), f).isfinite().all()
    C = torch.diag(torch.tensor([4., 1., 0.25], dtype=torch.float64))[None]
    M_q, M_k, lam = balance_covariances(C, C.flip(-1, -2))
    assert_rel("x.y", torch.eye(3).double()[None]/3**0.5, M_q.mT @ M_k, 1e-9)
    assert (lam[:, :-1] >= lam[:, 1:]).all()

def test_heads_have_their_own_statistics():
    q, k, v = qkv()
    f = make_features("derf", 8, 32).fit(q, k)
    alone = make_features("derf", 8, 32).fit(q[:, 1:2], k[:, 1:2])
    got = favor_attention(q, k, v, f)[:, 1:2]
    assert_rel("head 1", favor_attention(q[:, 1:2], k[:, 1:2], v[:, 1:2], alone), got, 1e-5)
    with pytest.raises(InputError, match="3 heads"): favor_attention(q[:, :2], k[:, :2], v[:, :2], f)

def test_better_where_they_should_be():
    (q, k, _), (q2, k2, _) = qkv(b=12, d=16, n=128), qkv(d=16, n=128, seed=3)
    score = {}
    for n in ("favor+", "derf-full", "derf", "hedgehog"):
        f = make_features(n, 16, 32)
        score[n] = row_cosine(q2*1.5, k2*1.5, f.fit(q*1.5, k*1.5) if ESTIMATORS[n].fits else f).mean()
    assert score["favor+"] + 0.1 < score["derf-full"] <= score["derf"] + 0.005 and score["derf"] < score["hedgehog"]

def test_distillation_moves_only_downhill_and_trains_in_a_model():
    q, k, v = qkv(d=16, n=64)
    f = LearnedFeatures(16, 32).fit(q, k, steps=0)
    losses = distill(f, q, k, steps=60)
    assert losses[-1] < 0.7*losses[0] and min(losses) > -1e-5     # a divergence is never negative
    favor_attention(q, k, v, f).square().sum().backward()
    for n, p in f.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), n
        assert p.grad.abs().max() > 0 or n in ("cq", "Mq"), n                # what depends on the query alone cancels

def test_widths_grow_with_the_data():
    rho = torch.tensor([0., 0.1, 1., 10.])
    assert width(rho)[0] == 1 and (width(rho).diff() > 0).all()

@pytest.mark.parametrize("size", [0.2, 0.5])
def test_hyperbolic_features_are_pairs_of_opposites(size):
    "Unbiased whatever the second half is; the odd half of the noise is gone only if it is the first half's opposite"
    pairs, d = 20_000, 8
    f = HyperbolicFeatures(d, 2*pairs, seed=1)
    assert torch.equal(f.projection[:pairs], -f.projection[pairs:])
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, d, generator=g, dtype=torch.float64)
    x, y = (v*(size*d**0.5)**0.5/(x + y).norm() for v in (x, y))             # |x + y|^2/sqrt(d) = size
    z = pairs*(f(x)*f(y, False)).view(2, pairs).sum(0)/(x @ y/d**0.5).exp()
    u = torch.tensor(size, dtype=torch.float64)
    assert abs(z.mean() - 1) < 5*z.std()/pairs**0.5
    assert abs(z.var()/((u.exp() + (-u).exp())/2 - 1) - 1) < 0.15            # two draws of their own: (e^u - 1)/2
    f.redraw()
    assert torch.equal(f.projection[:pairs], -f.projection[pairs:])

@pytest.mark.parametrize("name", OURS)
def test_what_an_entry_says_is_true(name):
    entry, f = ESTIMATORS[name], fitted(name)
    q, k, v = qkv()
    assert entry.title and entry.reference
    assert entry.fits == hasattr(f, "fit") and entry.redraws == hasattr(f, "redraw")
    assert entry.learns == any(p.requires_grad for p in f.parameters())
    if entry.fits:
        with pytest.raises(InputError, match="call fit"): make_features(name, 8, 24)(q)
    if entry.redraws:
        before = f.scaled(q)[0]
        f.redraw(); assert not torch.equal(before, f.scaled(q)[0])
    if entry.local: assert favor_attention(q, k, v, f, local=True).isfinite().all()
    else:
        with pytest.raises(InputError, match="local=True needs"): favor_attention(q, k, v, f, local=True)

@pytest.mark.parametrize("local", [False, True])
def test_a_model_starts_with_features_that_need_no_data(local):
    q, k, v = qkv(dtype=torch.float64)
    ours = [name for name in MODEL_FEATURES if name in OURS]
    assert ours == ["favor+", "hyperbolic", "simplex", "sobol", "hedgehog"]
    for name in ours:
        f = model_features(name, 8, 24, seed=3, heads=3, local=local)
        assert favor_attention(q, k, v, f, local=local).isfinite().all()
        if not ESTIMATORS[name].learns: assert torch.equal(f.projection, make_features(name, 8, 24, seed=3).projection)
    for name in ("derf", "trig", "nothing"):
        says = f"features must be favor\\+ or .* in a model, got '{name}'"
        with pytest.raises(InputError, match=says): model_features(name, 8)

def test_an_estimator_from_outside_is_a_choice():
    def make(d, m, seed): return FavorFeatures(d, m, orthogonal=False, seed=seed)
    register_estimator("mine", Estimator(make, "independent draws", local=False))
    try:
        assert not make_features("mine", 8).orthogonal and "mine" not in MODEL_FEATURES
        register_estimator("mine", Estimator(make, "independent draws", local=False, in_model=True))
        assert "mine" in MODEL_FEATURES and str(MODEL_FEATURES).endswith("| mine") and model_features("mine", 8).m == 32
        with pytest.raises(InputError, match="softmax's own scale"): model_features("mine", 8, local=True)
    finally: del ESTIMATORS["mine"]
    with pytest.raises(InputError, match="unknown estimator 'mine', choose from favor"): make_features("mine", 8)
    with pytest.raises(InputError, match="library's own"): register_estimator("derf", ESTIMATORS["sobol"])
