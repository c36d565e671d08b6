"The DFA hook where it is used for real: accumulation, autocast, recomputation, frozen blocks, crashes, a thousand steps"
import gc
import pytest, torch
from torch import nn
from okadfa.core import InputError, assert_rel
from okadfa.dfa.diagnostics import compare_gradients
from okadfa.dfa.feedback import FeedbackMatrices
from okadfa.dfa.hook import DFAHook
from okadfa.models.lm import LMConfig, LanguageModel

SIZE = dict(vocab_size=30, d_model=16, n_layers=4, n_heads=2, max_len=32)

def model(**kw): return LanguageModel(LMConfig(**(SIZE | dict(feedback="gaussian") | kw))).double()
def text(b=4, n=17, seed=0): return torch.randint(30, (2, b, n), generator=torch.Generator().manual_seed(seed))
def grads(m): return {n: p.grad.clone() for n, p in m.named_parameters() if p.grad is not None}

def arrivals(m, loss):
    "The gradient that arrives at each block's output, and at the top"
    seen, handles = {}, []
    def spy(l):
        def hook(mod, args, out): out.register_hook(lambda g: seen.__setitem__(l, g))
        return hook
    for l, b in enumerate(m.blocks): handles.append(b.register_forward_hook(spy(l)))
    handles.append(m.norm.register_forward_pre_hook(lambda mod, args: args[0].register_hook(lambda g: seen.__setitem__("top", g)) and None))
    loss().backward()
    for h in handles: h.remove()
    return seen

@pytest.mark.parametrize("mixer", ["favor", "softmax"])
@pytest.mark.parametrize("kind", ["gaussian", "orthogonal", "identity"])
def test_each_block_receives_exactly_its_error(mixer, kind):
    m, (ids, targets) = model(mixer=mixer, feedback=kind), text()
    seen = arrivals(m, lambda: m.loss(ids, targets))
    for l in range(4): assert_rel(f"block {l}", seen["top"] @ m.feedback.matrix(l).double().T, seen[l], 1e-6)

def test_bp_does_not(): # the check above can fail: under backpropagation something else arrives
    m, (ids, targets) = model(feedback="identity"), text()
    seen = arrivals(m, lambda: m.loss(ids, targets, credit="bp"))
    with pytest.raises(AssertionError): assert_rel("block 0", seen["top"], seen[0], 1e-6)

@pytest.mark.parametrize("cut", [0, 1, 2, 3])
def test_nothing_crosses_a_boundary(cut):
    "The gradient of block `cut` is unchanged by what other blocks do to gradients that pass through them"
    m, (ids, targets) = model(), text()
    m.loss(ids, targets).backward(); before = grads(m)
    m.zero_grad()
    handles = [b.register_full_backward_hook(lambda mod, gi, go: tuple(g*1e6 for g in gi)) for l, b in enumerate(m.blocks) if l != cut]
    m.loss(ids, targets).backward()
    for n, g in grads(m).items():
        if n.startswith(f"blocks.{cut}."): assert torch.equal(g, before[n]), n
    for h in handles: h.remove()

def test_accumulation_is_the_sum():
    m, (ids, targets) = model(), text(b=6)
    m.loss(ids, targets, reduction="sum").backward(); whole = grads(m)
    m.zero_grad()
    for part in ([0, 1], [2, 3, 4], [5]): m.loss(ids[part], targets[part], reduction="sum").backward()
    for n, g in grads(m).items(): assert_rel(n, whole[n], g, 1e-10)

def test_two_passes_before_one_backward():
    m, (ids, targets) = model(), text(b=6)
    m.loss(ids, targets, reduction="sum").backward(); whole = grads(m)
    m.zero_grad()
    a, b = m.loss(ids[:2], targets[:2], reduction="sum"), m.loss(ids[2:], targets[2:], reduction="sum")
    (a + b).backward()
    for n, g in grads(m).items(): assert_rel(n, whole[n], g, 1e-10)

@pytest.mark.parametrize("rounds", [0, 2])
def test_recomputation_changes_nothing(rounds):
    a, b, (ids, targets) = model(rounds=rounds), model(rounds=rounds, checkpoint=True), text()
    a.loss(ids, targets).backward(); b.loss(ids, targets).backward()
    for n, g in grads(a).items(): assert_rel(n, g, grads(b)[n], 1e-10)

def test_bf16_autocast_is_the_same_rule():
    m, (ids, targets) = model().float(), text()
    def run():
        with torch.autocast("cpu", torch.bfloat16): return m.loss(ids, targets)
    seen = arrivals(m, run)
    for l in range(4): assert_rel(f"block {l}", m.feedback.local_error(l, seen["top"]), seen[l], 1e-6)
    half = grads(m); m.zero_grad(); m.loss(ids, targets).backward()
    for n, g in grads(m).items(): assert torch.cosine_similarity(g.flatten(), half[n].flatten(), 0) > 0.98, n

@pytest.mark.parametrize("rounds", [0, 1])
def test_frozen_blocks_stay_frozen(rounds):
    m, (ids, targets) = model(rounds=rounds), text()
    m.loss(ids, targets).backward(); before = grads(m); m.zero_grad(set_to_none=True)
    m.blocks[1].requires_grad_(False)
    m.loss(ids, targets).backward()
    got = grads(m)
    assert not any(n.startswith("blocks.1.") for n in got)
    for n, g in got.items(): assert_rel(n, before[n], g, 1e-10)

def test_all_frozen_but_the_head():
    m, (ids, targets) = model(), text()
    m.blocks.requires_grad_(False); m.embed.requires_grad_(False)
    m.loss(ids, targets).backward()
    assert set(grads(m)) == {"norm.weight", "norm.bias"}

@pytest.mark.parametrize("rounds,same", [(0, False), (1, False), (3, True), (7, True)])
def test_rounds_end_at_backpropagation(rounds, same):
    m, (ids, targets) = model(rounds=rounds), text()
    r = compare_gradients(m.loss(ids, targets), m.loss(ids, targets, credit="bp"), {"blocks": list(m.blocks.parameters()), "embed": list(m.embed.parameters())})
    assert (r["blocks"]["error"] < 1e-16) == same and (r["embed"]["error"] < 1e-16) == same

@pytest.mark.parametrize("embedding", ["block", "direct", "none"])
def test_embedding_credit(embedding):
    m, (ids, targets) = model(embedding_credit=embedding, feedback="identity"), text()
    seen = {}
    m.embed.register_forward_hook(lambda mod, args, out: out.register_hook(lambda g: seen.__setitem__("embed", g)) and None)
    seen |= arrivals(m, lambda: m.loss(ids, targets))
    if embedding == "none": assert "embed" not in seen
    if embedding == "direct": assert_rel("direct", seen["top"]*16**0.5, seen["embed"], 1e-12)     # the stem multiplies by sqrt(d_model)
    if embedding == "block": assert torch.cosine_similarity(seen["embed"].flatten(), seen["top"].flatten(), 0) < 0.9999

def test_error_at_the_logits():
    m, (ids, targets) = model(error_site="logits"), text()
    logits = m(ids); logits.retain_grad()
    seen = arrivals(m, lambda: nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())) or {}
    via_logits = grads(m); m.zero_grad()
    seen = arrivals(m, lambda: m.loss(ids, targets, chunk=7))
    for l in range(4): assert_rel(f"block {l}", logits.grad @ m.feedback.matrix(l).double().T, seen[l], 1e-6)
    for n, g in grads(m).items(): assert_rel(n, via_logits[n], g, 1e-6)

def hooks(m): return sum(len(b._forward_hooks) + len(b._forward_pre_hooks) for b in m.blocks)

def test_an_exception_in_the_middle_of_forward_or_backward_leaves_nothing():
    m, (ids, targets) = model(), text()
    m.loss(ids, targets).backward(); before = grads(m); m.zero_grad()
    def boom(*a): raise KeyError("boom")
    h = m.blocks[2].mlp.register_forward_hook(boom)
    with pytest.raises(KeyError): m.loss(ids, targets)
    h.remove(); assert hooks(m) == 0
    loss = m.loss(ids, targets)
    h = m.blocks[1].mlp[0].weight.register_hook(boom)
    with pytest.raises(KeyError): loss.backward()
    h.remove(); assert hooks(m) == 0
    m.zero_grad(); m.loss(ids, targets).backward()
    for n, g in grads(m).items(): assert torch.equal(g, before[n])

def test_one_hook_survives_a_pass_that_died():
    blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
    x = torch.randn(2, 3)
    with DFAHook(blocks, FeedbackMatrices([3]*2, 3, kind="identity")) as hook:
        blocks[0](x)                                      # a pass that goes no further
        blocks[1](blocks[0](x)).sum().backward()
        with pytest.raises(RuntimeError, match="out of order"): blocks[0](x), blocks[0](x), blocks[1](x), blocks[1](x)
        with pytest.raises(RuntimeError, match="already active"): hook.__enter__()
    assert_rel("block 0", torch.ones(3)*2, blocks[0].bias.grad, 1e-6)

def test_evaluation_is_untouched():
    m, (ids, targets) = model(), text()
    with torch.no_grad(): a = m(ids)
    assert hooks(m) == 0 and not a.requires_grad and torch.equal(a, m(ids).detach())

def test_a_thousand_steps_do_not_grow():
    blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    opt, x, B = torch.optim.SGD(blocks.parameters(), 1e-3), torch.randn(5, 4), FeedbackMatrices([4]*3, 4)
    def tensors(): gc.collect(); return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
    def step():
        h = x
        for b in blocks: h = b(h)
        opt.zero_grad(); h.square().mean().backward(); opt.step()
    gc.disable()
    try:
        with DFAHook(blocks, B):
            for _ in range(10): step()
            start = tensors()
            for _ in range(1000): step()
            assert tensors() <= start
            objects = len(gc.get_objects())
            for _ in range(200): step()
            assert len(gc.get_objects()) - objects < 100       # without the collector's help: no reference cycles either
    finally: gc.enable()

def test_refusals():
    with pytest.raises(InputError, match="at least one"): DFAHook([], FeedbackMatrices([3], 3))
    m = LanguageModel(LMConfig(**SIZE, credit="bp"))
    with pytest.raises(InputError, match="no feedback"): m.loss(*text(), credit="dfa")
