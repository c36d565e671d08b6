"Feedback matrices: golden values, kinds, shapes, devices and refusals"
import copy, pickle
import pytest, torch
from torch import nn
from okadfa.core import InputError, assert_rel
from okadfa.dfa.feedback import (FEEDBACK_KINDS, FeedbackKind, FeedbackMatrices, fixed_kinds, inner_kind,
                                 layer_generator, orthogonal, register_feedback)

pytestmark = pytest.mark.usefixtures("seeded")

# what is added from outside has checks of its own
OURS = [name for name in FEEDBACK_KINDS if name in FEEDBACK_KINDS.own]

@pytest.mark.parametrize("kind, golden", [
    ("gaussian", {(0, 0, 0): -0.065179668, (0, 7, 15): -0.115564041, (1, 0, 0): 0.030980630, (1, 23, 3): -0.323211372}),
    ("orthogonal", {(0, 0, 0): -0.072036795, (0, 7, 15): -0.186631858,
                    (1, 0, 0): 0.024145445, (1, 23, 3): -0.279116839}),
])
def test_golden_values_at_seed_42(kind, golden):
    f = FeedbackMatrices([8, 24], 16, kind)
    for (l, i, j), want in golden.items(): assert abs(f.matrix(l)[i, j].item() - want) < 1e-6, (l, i, j)

def test_golden_values_of_a_matrix_below_the_vectorised_size():
    want = torch.tensor([[.319292665, .128823236], [.936163962, 1.203809142], [.240607306, .560673714]])
    assert (FeedbackMatrices([3], 2).matrix(0) - want).abs().max() < 1e-6

@pytest.mark.parametrize("kind", ["gaussian", "orthogonal"])
@pytest.mark.parametrize("d, d_final", [(1, 1), (5, 3), (3, 5), (16, 16), (33, 7), (7, 257)])
@pytest.mark.parametrize("lead", [(), (4,), (2, 0), (2, 3)])
def test_local_error_is_the_matrix_times_each_row(kind, d, d_final, lead):
    f = FeedbackMatrices([d + 1, d], d_final, kind)
    delta = torch.randn(*lead, d_final, dtype=torch.float64)
    got = f.local_error(1, delta)
    assert f.matrix(1).shape == (d, d_final) and got.shape == (*lead, d) and got.dtype == torch.float64
    want = torch.einsum("df,...f->...d", f.matrix(1).double(), delta)
    if delta.numel(): assert_rel("B delta", want, got, 1e-13)

@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_result_has_the_dtype_of_delta(kind, dtype, autocast):
    f, delta = FeedbackMatrices([32], 32, kind), torch.randn(6, 32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast): got = f.local_error(0, delta.to(dtype))
    assert_rel("local error", f.local_error(0, delta).to(dtype), got, 1e-2)

def test_a_layer_depends_on_seed_and_number_only():
    a, b = FeedbackMatrices([16, 16, 16], 16), FeedbackMatrices([4, 64, 16, 8], 16)
    assert torch.equal(a.matrix(2), b.matrix(2))
    seen = {FeedbackMatrices([16]*3, 16, seed=s).matrix(l)[0, 0].item() for s in range(4) for l in range(3)}
    assert len(seen) == 12

def test_the_global_generator_is_neither_read_nor_moved():
    before = torch.get_rng_state(); a = FeedbackMatrices([8], 8)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99); assert torch.equal(a.matrix(0), FeedbackMatrices([8], 8).matrix(0))

@pytest.mark.parametrize("kind", OURS)
def test_default_dtype_and_device_do_not_matter(kind):
    want = FeedbackMatrices([8], 8, kind).matrix(0)
    torch.set_default_dtype(torch.float64)
    try: assert torch.equal(want, FeedbackMatrices([8], 8, kind).matrix(0)) and want.dtype == torch.float32
    finally: torch.set_default_dtype(torch.float32)
    with torch.device("meta"): got = FeedbackMatrices([8], 8, kind).matrix(0)
    assert torch.equal(want, got.cpu())

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", OURS)
def test_the_same_on_a_gpu(kind):
    f = FeedbackMatrices([8], 8, kind); g = copy.deepcopy(f).cuda(); delta = torch.randn(3, 8)
    assert g.matrix(0).is_cuda and torch.equal(f.matrix(0), g.matrix(0).cpu())
    for m in (f, g):                                              # the result is where delta is
        assert m.local_error(0, delta.cuda()).is_cuda and not m.local_error(0, delta).is_cuda
    assert_rel("B delta", f.local_error(0, delta), g.local_error(0, delta.cuda()).cpu(), 1e-3)

@pytest.mark.parametrize("kind", OURS)
def test_never_parameters_and_in_a_checkpoint_only_what_was_learnt(kind):
    model = nn.Module(); model.fb = FeedbackMatrices([8, 8], 8, kind)
    assert not list(model.parameters()) and bool(model.state_dict()) == bool(model.fb.learns)
    model.requires_grad_(True)
    assert not any(b.requires_grad for b in model.buffers())
    assert len(model.fb) == 2

@pytest.mark.parametrize("d, d_final", [(24, 24), (40, 9), (9, 40)])
def test_orthogonal(d, d_final):
    b = FeedbackMatrices([d], d_final, "orthogonal").matrix(0).double()
    gram = b.T@b if d >= d_final else b@b.T
    assert (gram - torch.eye(min(d, d_final), dtype=b.dtype)).abs().max() < 1e-6
    delta = torch.randn(50, d_final)
    kept = FeedbackMatrices([d], d_final, "orthogonal").local_error(0, delta).norm(dim=-1)
    if d >= d_final: assert_rel("norm", delta.norm(dim=-1), kept, 1e-5)
    else: assert (kept < delta.norm(dim=-1)).all()

def test_orthogonal_is_haar():
    m = torch.stack([FeedbackMatrices([3], 3, "orthogonal", seed=s).matrix(0) for s in range(600)])
    assert m.mean(0).abs().max() < .1                             # each entry has std 0.58/sqrt(600) = 0.024
    assert (m.square().mean(0) - 1/3).abs().max() < .06

@pytest.mark.parametrize("d, d_final", [(16, 64), (64, 64), (128, 32)])
def test_gaussian_keeps_the_variance_in_expectation(d, d_final):
    delta = torch.randn(d_final); delta = delta/delta.norm()      # one error, many matrices
    errors = [FeedbackMatrices([d], d_final, seed=s).local_error(0, delta) for s in range(400)]
    gain = torch.stack(errors).square().sum(-1)
    want = d/d_final
    assert abs(gain.mean().item()/want - 1) < 5*(2/d/400)**.5     # chi-squared with d degrees, five standard errors

def test_identity_stores_and_computes_nothing():
    f, delta = FeedbackMatrices([12]*5, 12, "identity"), torch.randn(2, 12)
    assert f.nbytes == 0 and f.local_error(4, delta) is delta
    assert torch.equal(f.matrix(0), torch.eye(12)) and f.double().matrix(0).dtype == torch.float64

def test_shared_takes_its_rows_from_one_matrix():
    f = FeedbackMatrices([12, 5, 12], 7, "shared")
    assert torch.equal(f.matrix(0), f.matrix(2)) and torch.equal(f.matrix(0)[:5], f.matrix(1)) and f.nbytes == 4*12*7

def test_uniform_is_bounded():
    b = FeedbackMatrices([200], 50, "uniform").matrix(0)
    assert b.abs().max() <= (3/50)**.5 and b.abs().max() > .95*(3/50)**.5 and abs(b.mean()) < .01

def test_calibrated_between_unequal_widths_and_through_a_checkpoint():
    a = FeedbackMatrices([6, 10], 8, "calibrated", refresh=1)
    true, delta = [torch.randn(6, 8), torch.randn(10, 8)], torch.randn(3, 100, 8)
    for _ in range(3): a.begin(); a.observe(delta, [delta@t.T for t in true])
    b = FeedbackMatrices([6, 10], 8, "calibrated", refresh=1); b.load_state_dict(a.state_dict())
    for f in (a, b): f.begin(); f.observe(-delta, [delta@t.T for t in true])
    for l in (0, 1):
        assert torch.equal(a.matrix(l), b.matrix(l))
        assert torch.cosine_similarity(true[l].flatten(), a.matrix(l).flatten(), 0) > .5
    assert a.passes == b.passes == 4

@pytest.mark.parametrize("decay", [.9, .2])
def test_calibration_keeps_as_much_of_the_past_in_both_moments(decay):
    "C and A_l after three samples, and the map that they give, by hand"
    f, ridge = FeedbackMatrices([5, 8], 8, "calibrated", decay=decay, ridge=.1).double(), .1
    c, a = torch.zeros(8, 8).double(), [torch.zeros(5, 8).double(), torch.zeros(8, 8).double()]
    for _ in range(3):
        delta = torch.randn(40, 8).double()
        errors = [torch.randn(40, 5).double(), torch.randn(40, 8).double()]      # nothing that one map could explain
        f.observe(delta, errors)
        power = delta.square().mean()
        c = decay*c + (1 - decay)*delta.T@delta/power/40
        a = [decay*m + (1 - decay)*e.T@delta/power/40 for m, e in zip(a, errors)]
    assert_rel("C", c, f.c, 1e-9)
    for l, prior in enumerate((orthogonal(5, 8, 42, 0), torch.eye(8).double())):
        assert_rel(f"A {l}", a[l], getattr(f, f"a{l}"), 1e-9)
        inverse = torch.linalg.inv(c + ridge*c.diagonal().mean()*torch.eye(8).double())
        assert_rel(f"B {l}", prior + (a[l] - prior@c)@inverse, f.matrix(l), 1e-7)

def test_what_a_kind_says_of_itself():
    assert [k for k in fixed_kinds() if k in OURS] == ["gaussian", "uniform", "orthogonal", "shared"]
    assert [k for k in FEEDBACK_KINDS if not FEEDBACK_KINDS[k].stores] == ["identity"]
    for name, kind in FEEDBACK_KINDS.items():
        wide = kind.make(6, 4, 0, 0) if kind.any_widths else None
        assert kind.title and (wide is None or wide.shape == (6, 4))
        assert (kind.make(4, 4, 0, 0) is not None) == kind.stores
        assert inner_kind(name) == (name if name in fixed_kinds() else "orthogonal")
        if not kind.any_widths:
            with pytest.raises(InputError): kind.make(6, 4, 0, 0)

def ones(d, d_final, seed, l): return torch.ones(d, d_final, dtype=torch.float64)

def test_a_kind_from_outside():
    register_feedback("ones", FeedbackKind(ones, title="ones"))
    try:
        f = FeedbackMatrices([2, 3], 4, "ones")
        assert torch.equal(f.local_error(1, torch.ones(4)), torch.full((3,), 4.)) and not f.state_dict()
        assert "ones" in fixed_kinds() and inner_kind("ones") == "ones" and f.statistics()[0]["expected_std"] != 0
        register_feedback("ones", FeedbackKind(ones, learns="activity"))          # a later one replaces it
        assert FeedbackMatrices([2], 4, "ones").state_dict() and "ones" not in fixed_kinds()
        register_feedback("ones", FeedbackKind(lambda d, f, seed, l: torch.ones(f, d)))
        with pytest.raises(InputError, match=r"made \(4, 2\) for layer 0"): FeedbackMatrices([2], 4, "ones")
    finally: FEEDBACK_KINDS.pop("ones", None)

@pytest.mark.parametrize("name, kind, word", [
    ("gaussian", FeedbackKind(ones), "own"), ("x", FeedbackKind(ones, learns="somehow"), "learns must be"),
    ("x", FeedbackKind(ones, learns="errors", stores=False), "stores nothing")])
def test_kinds_from_outside_that_are_refused(name, kind, word):
    with pytest.raises(InputError, match=word): register_feedback(name, kind)
    assert "x" not in FEEDBACK_KINDS

def test_a_copy_elsewhere_need_not_know_the_kind():
    "What another process unpickles was registered in this one"
    FEEDBACK_KINDS["ones"] = FeedbackKind(ones, shared=True)
    try: data = pickle.dumps(FeedbackMatrices([2, 3], 4, "ones"))
    finally: del FEEDBACK_KINDS["ones"]
    f = pickle.loads(data)
    assert torch.equal(f.local_error(1, torch.ones(4)), torch.full((3,), 4.))

def test_bytes():
    f = FeedbackMatrices([10, 20], 7)
    assert f.nbytes == 4*7*30 and f.half().nbytes == 2*7*30

@pytest.mark.parametrize("kind", [k for k in OURS if not FEEDBACK_KINDS[k].learns])
@pytest.mark.parametrize("dims, d_final", [([64, 64], 64), ([128, 32], 64)])
def test_statistics(kind, dims, d_final):
    if kind == "identity" and dims != [64, 64]: pytest.skip("identity needs equal widths")
    rows = FeedbackMatrices(dims, d_final, kind).statistics()
    assert [r["layer"] for r in rows] == [0, 1] and [r["shape"] for r in rows] == [(d, d_final) for d in dims]
    for d, r in zip(dims, rows):
        assert abs(r["std"]/r["expected_std"] - 1) < .06 and abs(r["mean"]) < .02
        b = FeedbackMatrices(dims, d_final, kind).matrix(r["layer"]).double()
        assert abs(r["spectral_norm"] - torch.linalg.matrix_norm(b, 2).item()) < 1e-6
        if kind in ("gaussian", "uniform", "shared"):
            assert abs(r["spectral_norm"]/(1 + (d/d_final)**.5) - 1) < .15 and r["gram_error"] > .1
        else: assert r["gram_error"] < 1e-6

def test_a_new_kind_is_one_entry_of_the_table(monkeypatch):
    def constant(d, d_final, seed, l): return torch.full((d, d_final), float(l), dtype=torch.float64)
    kind = FEEDBACK_KINDS["gaussian"]._replace(make=constant)
    monkeypatch.setitem(FEEDBACK_KINDS, "constant", kind)
    assert torch.equal(FeedbackMatrices([2, 2], 3, "constant").local_error(1, torch.ones(3)), torch.full((2,), 3.))

def test_layer_generator_uses_all_of_seed_and_layer():
    first = {torch.randint(2**31, (1,), generator=layer_generator(s, l)).item()
             for s in (-1, 0, 1, 2**32, 2**32 + 1) for l in (0, 1, 10, 11)}
    assert len(first) == 20

@pytest.mark.parametrize("make, word", [
    (lambda: FeedbackMatrices([8], 8, "nope"), "gaussian, uniform, orthogonal, shared, identity"),
    (lambda: FeedbackMatrices([], 8), "empty"),
    (lambda: FeedbackMatrices([8, 0], 8), "1 or more"), (lambda: FeedbackMatrices([8], 0), "1 or more"),
    (lambda: FeedbackMatrices([8, 4], 8, "identity"), "layer 1 has 4"),
    (lambda: FeedbackMatrices([8], 8, "calibrated", refresh=0), "refresh"),
    (lambda: FeedbackMatrices([8], 8, ridge=0.), "ridge"),
    (lambda: FeedbackMatrices([8], 8).matrix(1), "counted from 0"),
    (lambda: FeedbackMatrices([8], 8).matrix(-1), "counted from 0"),
    (lambda: FeedbackMatrices([8], 8).local_error(2, torch.randn(8)), "counted from 0"),
    (lambda: FeedbackMatrices([8], 8).local_error(0, torch.randn(2, 7)), "delta must be"),
    (lambda: FeedbackMatrices([8], 8, "identity").local_error(0, torch.randn(7)), "delta must be"),
    (lambda: FeedbackMatrices([8], 8).local_error(0, torch.tensor(1.)), "delta must be"),
])
def test_refusals_are_one_line(make, word):
    with pytest.raises(InputError, match=word) as e: make()
    assert "\n" not in str(e.value)
