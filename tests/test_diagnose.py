"Diagnostics of a model against what is seen from outside: one backward pass a rule"
import pytest, torch
from okadfa.models.lm import LMConfig, LanguageModel
from okadfa.models.diagnose import diagnose

SIZE = dict(vocab_size=29, d_model=32, n_layers=3, n_heads=2, max_len=24)

def errors(model, ids, targets, **kw):
    "The last error to arrive at the output of every block, in one pass of its own"
    arrived, handles = {}, []
    for l, block in enumerate(model.blocks):
        def spy(module, args, out, l=l):
            if out.requires_grad: out.register_hook(lambda e: arrived.__setitem__(f"block{l}", e.float()))
        handles.append(block.register_forward_hook(spy))
    model.loss(ids, targets, **kw).backward()
    for h in handles: h.remove()
    model.zero_grad()
    return arrived

RULES = dict(feedback="gaussian"), dict(feedback="identity"), dict(feedback="uniform", rounds=1)

@pytest.mark.parametrize("kw", RULES)
def test_the_errors_are_those_of_the_rule_and_of_the_reference(kw):
    torch.manual_seed(0)
    model = LanguageModel(LMConfig(**SIZE, **kw))
    with torch.no_grad():
        for p in model.blocks.parameters(): p.mul_(2)              # far enough from the start for the two to differ
    ids = torch.randint(29, (2, 24))
    targets = ids.roll(-1, 1)
    found = diagnose(model, ids, targets)["error"]
    rule, reference = errors(model.eval(), ids, targets), errors(model.eval(), ids, targets, credit="bp")
    assert set(found) == set(rule) & set(reference) and len(found) >= 2
    for name, x in found.items():
        a, b = rule[name], reference[name]
        assert x["norm"] == pytest.approx(a.norm().item(), rel=1e-4)
        assert x["norm_ref"] == pytest.approx(b.norm().item(), rel=1e-4)
        assert x["cosine"] == pytest.approx(torch.cosine_similarity(a.flatten(), b.flatten(), 0).item(), abs=1e-4)
    assert max(abs(x["norm"]/x["norm_ref"] - 1) for x in found.values()) > 0.01     # else neither name would be tested
