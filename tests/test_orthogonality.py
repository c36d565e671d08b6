"The orthogonality penalty: shapes, precision, naming and refusals"
import pytest, torch
from torch import nn
from okadfa.attention.orthogonality import (OrthogonalityLoss, orthogonality_penalty, orthogonality_penalty_ref,
                                            violations)
from okadfa.core import InputError, assert_rel

class Fused(nn.Module):
    "One fused weight; counts how often it is asked"
    def __init__(self, d=24, h=3, dtype=torch.float32):
        super().__init__()
        self.h, self.qkv = h, nn.Linear(d, 3*d, bias=False, dtype=dtype)
    def projection_matrices(self, include_v=False):
        return self.qkv.weight.unflatten(0, (3, self.h, -1)).mT.unbind(0)[:3 if include_v else 2]

class Fixed:
    "Any tuple of matrices"
    def __init__(self, *ws): self.ws = ws
    def projection_matrices(self, include_v=False): return self.ws

pytestmark = pytest.mark.usefixtures("seeded")

SHAPES = [(1, 1), (7, 7), (9, 4), (1, 5, 1), (3, 17, 5), (2, 3, 8, 8), (2, 1, 3, 13, 6), (0, 8, 4)]

@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_penalty_is_the_definition(shape, reduction):
    w = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    got = orthogonality_penalty(w, reduction)
    if w.numel() == 0: assert got.sum() == 0 and got.shape == (shape[:-2] if reduction == "none" else ()); return
    ref = orthogonality_penalty_ref(w, reduction)
    assert_rel("value", ref, got, 1e-13)
    assert_rel("gradient", *(torch.autograd.grad(y.sum(), w)[0] for y in (ref, got)), 1e-13)
    assert_rel("violation", ref.detach().sum().sqrt(), violations(w).norm(), 1e-13)

def test_mean_divides_by_the_number_of_matrices():
    w = torch.randn(2, 5, 8, 4)
    assert_rel("mean", orthogonality_penalty(w)/10, orthogonality_penalty(w, "mean"), 1e-6)
    layers = [Fixed(w[0], w[1])]
    total, mean = (OrthogonalityLoss(1., 0, reduction=r)(layers, 0)[0] for r in ("sum", "mean"))
    assert_rel("loss", total/10, mean, 1e-6)

def test_hand_derived_gradient():
    w = torch.randn(4, 11, 6, dtype=torch.float64, requires_grad=True)
    orthogonality_penalty(w).backward()
    w_, eye = w.detach(), torch.eye(6, dtype=torch.float64)
    assert_rel("4 W (W'W - I)", 4*w_@(w_.mT@w_ - eye), w.grad, 1e-13)

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_are_compared_in_float32(dtype):
    w = torch.randn(3, 40, 8).div(40**.5).to(dtype)
    assert_rel("half", orthogonality_penalty(w.float(), "none"), orthogonality_penalty(w, "none"), 1e-6)
    loss, report = OrthogonalityLoss(1., 0)([Fixed(w, w)], 0)
    assert loss.dtype == torch.float32 and len(report) == 6

def test_autocast_changes_nothing():
    layer = Fused(); ortho = OrthogonalityLoss(.5, 0)
    plain, _ = ortho([layer], 0); plain.backward()
    g, layer.qkv.weight.grad = layer.qkv.weight.grad, None
    with torch.autocast("cpu", torch.bfloat16): loss, _ = ortho([layer], 0)
    loss.backward()
    assert torch.equal(plain, loss) and torch.equal(g, layer.qkv.weight.grad)

def test_violations_hold_no_graph():
    assert not violations(torch.randn(2, 8, 4, requires_grad=True)).requires_grad

@pytest.mark.parametrize("include_v", [False, True])
def test_names_and_values_of_the_report(include_v):
    layers = [Fused(), Fused()]
    loss, report = OrthogonalityLoss(2., 0, include_v=include_v)(layers, 0)
    letters = "qkv" if include_v else "qk"
    assert set(report) == {f"layer{l}.head{h}.{p}" for l in range(2) for h in range(3) for p in letters}
    for l, layer in enumerate(layers):
        for p, w in zip("qkv", layer.projection_matrices(include_v)):
            for h in range(3):
                got = report[f"layer{l}.head{h}.{p}"]
                assert isinstance(got, float) and abs(got - violations(w[h]).item()) < 1e-5
    assert_rel("loss", torch.tensor(2*sum(v*v for v in report.values())), loss, 1e-5)
    loss.backward()
    g = layers[1].qkv.weight.grad.unflatten(0, (3, 24)).abs().amax((1, 2))
    assert g[0] > 0 and g[1] > 0 and (g[2] > 0) == include_v

def test_shapes_may_differ_between_layers():
    a, b, c = torch.randn(3, 12, 4), torch.randn(1, 12, 6), torch.randn(2, 12, 4, dtype=torch.float64)
    loss, report = OrthogonalityLoss(1., 0)([Fixed(a, b), Fixed(c, a)], 0)    # grouped-query heads, mixed precision
    want = {f"layer{l}.head{i}.{p}": violations(w)[i].item()
            for l, ws in enumerate([(a, b), (c, a)]) for p, w in zip("qk", ws) for i in range(len(w))}
    assert set(report) == set(want) and all(abs(report[k] - want[k]) < 1e-4*want[k] for k in want)
    assert_rel("loss", torch.tensor(sum(v*v for v in want.values())), loss, 1e-5)

def test_one_product_whatever_the_number_of_layers(monkeypatch):
    import okadfa.attention.orthogonality as m
    calls, real = [], m.orthogonality_penalty
    monkeypatch.setattr(m, "orthogonality_penalty", lambda w, r="sum": calls.append(w.shape) or real(w, r))
    OrthogonalityLoss()([Fused() for _ in range(4)], 10)
    assert calls == [(4*3*2, 24, 8)]

def test_warm_up():
    o = OrthogonalityLoss(1e-2, 10)
    assert [o.coefficient(t) for t in (0, 5, 10, 11, 10**6)] == [0., .5e-2, 1e-2, 1e-2, 1e-2]
    assert OrthogonalityLoss(1e-2, 0).coefficient(0) == 1e-2
    layer = Fused()
    full, half, none = (o([layer], t)[0] for t in (10, 5, 0))
    assert_rel("half way", full/2, half, 1e-6)
    assert none == 0
    none.backward()                                               # step 0 still has a graph: its gradient is zero
    assert layer.qkv.weight.grad.abs().max() == 0

def test_weight_zero_reports_without_a_graph():
    layer = Fused()
    loss, report = OrthogonalityLoss(0.)([layer], 5000)
    assert loss == 0 and not loss.requires_grad and report == OrthogonalityLoss(1.)([layer], 5000)[1]
    (layer.qkv.weight.sum() + loss).backward()                    # can be added to any loss

def test_a_generator_of_layers_will_do():
    layers = [Fused(), Fused()]
    assert OrthogonalityLoss()((l for l in layers), 1)[1] == OrthogonalityLoss()(layers, 1)[1]

@pytest.mark.parametrize("make, word", [
    (lambda: orthogonality_penalty(torch.randn(4, 8)), "transpose"),
    (lambda: orthogonality_penalty(torch.randn(8)), "d_model d_head"),
    (lambda: orthogonality_penalty(torch.randn(8, 4), "max"), "none, mean or sum"),
    (lambda: OrthogonalityLoss(-1e-4), "weight"), (lambda: OrthogonalityLoss(float("nan")), "weight"),
    (lambda: OrthogonalityLoss(float("inf")), "weight"), (lambda: OrthogonalityLoss(warmup_steps=-1), "warmup_steps"),
    (lambda: OrthogonalityLoss(reduction="none"), "mean or sum"), (lambda: OrthogonalityLoss().coefficient(-1), "step"),
    (lambda: OrthogonalityLoss()([], 0), "no attention layer"),
    (lambda: OrthogonalityLoss()([Fixed(torch.randn(8, 4), torch.randn(8, 4))], 0), "layer 0: W_Q"),
    (lambda: OrthogonalityLoss()([Fixed(torch.randn(2, 4, 8), torch.randn(2, 4, 8))], 0), "transpose"),
])
def test_refusals_are_one_line(make, word):
    with pytest.raises(InputError, match=word) as e: make()
    assert "\n" not in str(e.value)

@pytest.mark.parametrize("opt, weight, lr", [(torch.optim.SGD, 1., .05), (torch.optim.Adam, 1e-4, .003)])
def test_the_penalty_alone_brings_every_head_below_a_tenth(opt, weight, lr):
    layers = nn.ModuleList([Fused(48, 4), Fused(48, 4)])
    ortho, opt = OrthogonalityLoss(weight, 0), opt(layers.parameters(), lr=lr)
    assert min(ortho(layers, 0)[1].values()) > 1
    for t in range(150):
        opt.zero_grad(); ortho(layers, t)[0].backward(); opt.step()
    assert max(ortho(layers, 150)[1].values()) < .1
