"The DFA hook in real use: accumulation, autocast, recomputation, frozen blocks, crashes, a thousand steps"
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

def spy_on_output(module, key, seen):
    "Leave the gradient that arrives at a module's output in seen[key]"
    def hook(mod, args, out): out.register_hook(lambda g: seen.__setitem__(key, g))
    return module.register_forward_hook(hook)

def spy_on_input(module, key, seen):
    "Leave the gradient that arrives at a module's input in seen[key]"
    def hook(mod, args): args[0].register_hook(lambda g: seen.__setitem__(key, g))
    return module.register_forward_pre_hook(hook)

def arrivals(m, loss):
    "The gradient that arrives at each block's output, and at the top"
    seen = {}
    handles = [spy_on_output(b, l, seen) for l, b in enumerate(m.blocks)] + [spy_on_input(m.norm, "top", seen)]
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
    def fire(mod, gi, go): return tuple(g*1e6 for g in gi)
    handles = [b.register_full_backward_hook(fire) for l, b in enumerate(m.blocks) if l != cut]
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
    groups = {"blocks": list(m.blocks.parameters()), "embed": list(m.embed.parameters())}
    r = compare_gradients(m.loss(ids, targets), m.loss(ids, targets, credit="bp"), groups)
    assert (r["blocks"]["error"] < 1e-16) == same and (r["embed"]["error"] < 1e-16) == same

@pytest.mark.parametrize("embedding", ["block", "direct", "none"])
def test_embedding_credit(embedding):
    m, (ids, targets) = model(embedding_credit=embedding, feedback="identity"), text()
    seen = {}
    spy_on_output(m.embed, "embed", seen)
    seen |= arrivals(m, lambda: m.loss(ids, targets))
    if embedding == "none": assert "embed" not in seen
    if embedding == "direct":                                       # the stem multiplies by sqrt(d_model)
        assert_rel("direct", seen["top"]*16**0.5, seen["embed"], 1e-12)
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
        with pytest.raises(InputError, match="out of order"): blocks[0](x), blocks[0](x), blocks[1](x), blocks[1](x)
        with pytest.raises(RuntimeError, match="already active"): hook.__enter__()
    assert_rel("block 0", torch.ones(3)*2, blocks[0].bias.grad, 1e-6)

def test_evaluation_is_untouched():
    m, (ids, _) = model(), text()
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
            assert len(gc.get_objects()) - objects < 100       # without the collector's help: no cycles either
    finally: gc.enable()

def test_refusals():
    with pytest.raises(InputError, match="at least one"): DFAHook([], FeedbackMatrices([3], 3))
    m = LanguageModel(LMConfig(**SIZE, credit="bp"))
    with pytest.raises(InputError, match="no feedback"): m.loss(*text(), credit="dfa")

# --- what a plain reference says: the stack by hand, one detached block at a time -----------------------------------

def by_hand(m, ids, targets, errors):
    "Gradients of the blocks when block l's output gets errors(delta, inputs, outputs)[l]"
    x, inputs, outputs = m.embed(ids)*m.config.d_model**0.5, [], []
    for b in m.blocks:
        inputs.append(x.detach().requires_grad_()); outputs.append(b(inputs[-1])); x = outputs[-1]
    top = x.detach().requires_grad_()
    loss = nn.functional.cross_entropy((m.norm(top) @ m.embed.weight.T).flatten(0, 1), targets.flatten())
    delta, = torch.autograd.grad(loss, top)
    es, out = errors(delta, inputs, outputs), {}
    for l, b in enumerate(m.blocks):
        gs = torch.autograd.grad(outputs[l], list(b.parameters()), es[l], retain_graph=True)
        out |= {f"blocks.{l}.{n}": g for (n, _), g in zip(b.named_parameters(), gs)}
    return out

def check_blocks(m, ids, targets, errors, tol=1e-9):
    m.zero_grad(); m.loss(ids, targets).backward()
    got = grads(m)
    for n, g in by_hand(m, ids, targets, errors).items(): assert_rel(n, g, got[n], tol)

def vjp(o, i, e): return torch.autograd.grad(o, i, e, retain_graph=True)[0]

@pytest.mark.parametrize("kind", ["uniform", "shared", "gaussian"])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_one_round_is_its_formula(kind, checkpoint):
    m = model(feedback=kind, rounds=1, checkpoint=checkpoint)
    def errors(delta, i, o):
        guess = [delta @ m.feedback.matrix(l).double().T for l in range(3)] + [delta]
        return [delta + sum(vjp(o[j], i[j], guess[j]) - guess[j] for j in range(l + 1, 4)) for l in range(4)]
    check_blocks(m, *text(b=3, n=13), errors, 1e-6)

def test_half_a_round_is_its_formula():
    m = model(feedback="identity", half_round=True)
    def errors(delta, i, o):
        terms = []
        for x, b in zip(i, m.blocks):
            mid = b.attend(x).detach().requires_grad_()
            terms.append(vjp(b.feed(mid), mid, delta) - delta)
        return [delta + sum(terms[l+1:]) for l in range(4)]
    check_blocks(m, *text(b=3, n=13), errors)

@pytest.mark.parametrize("stages", [1, 2, 3])
def test_stages_backpropagate_inside(stages):
    m, groups = model(feedback="identity", stages=stages), torch.arange(4).tensor_split(stages)
    def errors(delta, i, o):
        es = [delta]*4
        for g in groups:
            for l in reversed(g[:-1].tolist()): es[l] = vjp(o[l+1], i[l+1], es[l+1])
        return es
    check_blocks(m, *text(), errors)

def rms(x): return x.square().mean().sqrt()

@pytest.mark.parametrize("norm", ["batch", "token"])
def test_normalised_errors(norm):
    m, (ids, targets) = model(error_norm=norm), text()
    targets[0, :3] = -100
    seen = arrivals(m, lambda: m.loss(ids, targets))
    for l in range(4):
        e = seen["top"] @ m.feedback.matrix(l).double().T
        if norm == "token": e = e/e.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        assert_rel(f"block {l}", e/rms(e)*rms(seen["top"]), seen[l], 1e-6)
        assert (seen[l][0, :3] == 0).all()                  # a token that does not count has no error, at any scale

NORMED = [dict(), dict(rounds=1), dict(granularity="full"), dict(error_site="logits"), dict(embedding_credit="direct"),
          dict(feedback="identity", half_round=True)]

@pytest.mark.parametrize("norm", ["none", "batch", "token"])
@pytest.mark.parametrize("kw", NORMED, ids=lambda kw: " ".join(map(str, kw.values())) or "plain")
def test_errors_follow_the_size_of_the_loss(norm, kw):
    "Twice the loss is twice the gradient, half the loss twice is the loss: accumulation and loss scaling rely on it"
    m, (ids, targets) = model(error_norm=norm, **kw), text()
    targets[0, :3] = -100
    m.loss(ids, targets).backward()
    once = grads(m)
    m.zero_grad()
    (2*m.loss(ids, targets)).backward()
    for n, g in grads(m).items(): assert_rel(f"twice {n}", 2*once[n], g, 1e-9)
    m.zero_grad()
    for _ in range(2): (m.loss(ids, targets)/2).backward()
    for n, g in grads(m).items(): assert_rel(f"halves {n}", once[n], g, 1e-9)

@pytest.mark.parametrize("norm", ["batch", "token"])
def test_accumulation_over_parts_has_the_size_of_the_whole(norm):
    "Each part has its own statistics, so not to the bit; a size that ignores the loss would be twice as large"
    m, (ids, targets) = model(error_norm=norm), text(b=16)
    m.loss(ids, targets).backward()
    whole = torch.cat([p.grad.flatten() for p in m.blocks.parameters()])
    m.zero_grad()
    for part in (slice(0, 8), slice(8, 16)): (m.loss(ids[part], targets[part])/2).backward()
    parts = torch.cat([p.grad.flatten() for p in m.blocks.parameters()])
    assert (parts - whole).norm() < .1*whole.norm()

@pytest.mark.parametrize("norm", ["batch", "token"])
def test_errors_from_the_logits_get_the_size_at_the_top_of_the_stream(norm):
    m, (ids, targets) = model(error_site="logits", error_norm=norm), text()
    logits = m(ids)
    logits.retain_grad()
    seen = arrivals(m, lambda: nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    one_by_one = grads(m)
    m.zero_grad()
    seen = arrivals(m, lambda: m.loss(ids, targets, chunk=7))
    for l in range(4):
        e = logits.grad @ m.feedback.matrix(l).double().T
        if norm == "token": e = e/e.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        assert_rel(f"block {l}", e/rms(e)*rms(seen["top"]), seen[l], 1e-6)
    for n, g in grads(m).items(): assert_rel(n, one_by_one[n], g, 1e-6)

@pytest.mark.parametrize("kw", [dict(), dict(rounds=1), dict(embedding="none"), dict(site="caller"),
                                dict(site="caller", error_norm="batch")], ids=str)
def test_the_gradient_at_a_cut_is_not_kept(kw):
    "Nobody reads it, and it would be one more tensor [b n d] a block"
    blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))
    cuts, arrived = [], set()
    def look(mod, args):
        if not args[0].is_leaf or args[0] is x: return
        cuts.append(args[0])
        i = len(cuts)
        args[0].register_hook(lambda g: arrived.add(i) and None)
    x = torch.randn(2, 3)
    with DFAHook(blocks, FeedbackMatrices([3]*4, 3), **kw) as hook:
        handles = [b.register_forward_pre_hook(look) for b in blocks]      # later than the hook's own: they see the cut
        h = x
        for b in blocks: h = b(h)
        for handle in handles: handle.remove()
        if "site" in kw:
            look(None, (h,))
            h = hook.broadcast(2*h)
    h.square().sum().backward()
    below, top = kw.get("embedding") == "none", kw == dict(site="caller")     # with a norm the top is no leaf
    assert len(cuts) == 3 + below + top and len(arrived) == len(cuts)         # gradients did arrive
    assert all(cut.grad is None for cut in cuts)

def test_direct_feedback_inside_the_mlp_is_its_formula():
    "Third level: delta_1 = (B delta) * phi'(z), grad W_1 = delta_1^T h_0; W_2, the branch's end, gets the error itself"
    m, (ids, targets) = model(granularity="full", feedback="gaussian"), text()
    reads = {}
    for l, b in enumerate(m.blocks):
        b.mlp[0].register_forward_pre_hook(lambda mod, args, l=l: reads.__setitem__(l, args[0].detach()))
    seen = {}
    spy_on_input(m.norm, "top", seen)
    m.loss(ids, targets).backward()
    got, delta = grads(m), seen["top"].flatten(0, 1)
    for l, b in enumerate(m.blocks):
        h0 = reads[l].flatten(0, 1)
        z = b.mlp[0](h0).detach().requires_grad_()
        h1 = b.mlp[1](z)
        slope, = torch.autograd.grad(h1.sum(), z)
        d1 = (delta @ m.inner_feedback.matrix(l).double().T)*slope
        e = delta @ m.feedback.matrix(2*l + 1).double().T
        refs = {"0.weight": d1.T @ h0, "0.bias": d1.sum(0), "2.weight": e.T @ h1.detach(), "2.bias": e.sum(0)}
        for name, ref in refs.items():
            assert_rel(f"block {l} {name}", ref, got[f"blocks.{l}.feed.body.{name}"], 1e-6)

def test_micro_cuts_between_the_branches():
    m, (ids, targets) = model(granularity="micro", feedback="orthogonal"), text()
    at_branch = {}
    for l, b in enumerate(m.blocks):
        for i, branch in enumerate((b.attend, b.feed)): spy_on_output(branch, 2*l + i, at_branch)
    seen = arrivals(m, lambda: m.loss(ids, targets))
    for k, e in at_branch.items(): assert_rel(f"branch {k}", seen["top"] @ m.feedback.matrix(k).double().T, e, 1e-6)
    assert len(at_branch) == 8
    delta, got = seen["top"], grads(m)
    x = m.embed(ids)*4.
    for l, b in enumerate(m.blocks):
        for i, branch in enumerate((b.attend, b.feed)):
            e, name = delta @ m.feedback.matrix(2*l + i).double().T, f"blocks.{l}.{('attend', 'feed')[i]}"
            ref = torch.autograd.grad(branch(x.detach()), list(branch.parameters()), e)
            for (n, _), r in zip(branch.named_parameters(), ref): assert_rel(n, r, got[f"{name}.{n}"], 1e-6)
            x = branch(x)

@pytest.mark.parametrize("how", ["wrapped", "in place"])
@pytest.mark.parametrize("rounds", [0, 1])
def test_compiled_blocks(how, rounds):
    m, (ids, targets) = model(feedback="orthogonal", rounds=rounds), text()
    m.loss(ids, targets).backward(); want = grads(m); m.zero_grad()
    torch._dynamo.reset()
    with torch._functorch.config.patch(donated_buffer=False):      # a round runs backward through a graph that is kept
        for l in range(4):
            if how == "wrapped": m.blocks[l] = torch.compile(m.blocks[l], backend="aot_eager")
            else: m.blocks[l].compile(backend="aot_eager")
        m.loss(ids, targets).backward()
    got = {n.replace("_orig_mod.", ""): g for n, g in grads(m).items()}
    for n, g in want.items(): assert_rel(n, g, got[n], 1e-8)

# --- feedback that learns ---------------------------------------------------------------------------------------------

def test_calibration_sees_the_true_errors_and_only_when_due():
    m, (ids, targets) = model(feedback="calibrated", refresh=3), text()
    asked, observe = [], m.feedback.observe
    m.feedback.observe = lambda delta, errors: (asked.append((delta, errors)), observe(delta, errors))
    for _ in range(7): m.loss(ids, targets).backward()
    assert len(asked) == 3
    true = arrivals(m, lambda: m.loss(ids, targets, credit="bp"))
    for l, e in enumerate(asked[0][1]): assert_rel(f"block {l}", true[l], e, 1e-9)
    before = m.feedback.matrix(0).clone()
    m.eval(); [m.loss(ids, targets).backward() for _ in range(4)]
    assert len(asked) == 3 and torch.equal(before, m.feedback.matrix(0)) and m.feedback.passes == 7

def test_calibration_does_not_touch_the_gradients_of_its_own_probe():
    m, (ids, targets) = model(feedback="calibrated", refresh=1), text()
    m.loss(ids, targets).backward(); m.zero_grad()
    m.loss(ids, targets).backward(); got = grads(m)
    def errors(d, i, o): return [d @ m.feedback.matrix(l).double().T for l in range(4)]
    for n, g in by_hand(m, ids, targets, errors).items(): assert_rel(n, g, got[n], 1e-5)

def test_calibrated_errors_are_closer_on_text_never_seen():
    m = model(feedback="calibrated", refresh=1, n_layers=4).float()
    with torch.no_grad():                                          # branches of a trained model's size
        for p in m.blocks.parameters(): p.mul_(4 if p.ndim > 1 else 1)
    for seed in range(20): m.loss(*text(b=16, seed=seed)).backward()
    ids, targets = text(b=16, seed=99)
    true = arrivals(m, lambda: m.loss(ids, targets, credit="bp"))
    for l in range(3):
        miss = lambda e: (e - true[l]).norm().item()
        assert miss(m.feedback.local_error(l, true["top"])) < 0.98*miss(true["top"]), l

def test_kolen_pollack_moves_along_activity_and_error():
    m, (ids, targets) = model(feedback="kolen-pollack"), text()
    before = m.feedback.matrix(1).clone()
    outs = {}
    m.blocks[1].register_forward_hook(lambda mod, args, out: outs.__setitem__("h", out.detach()) and None)
    top = arrivals(m, lambda: m.loss(ids, targets))["top"].flatten(0, 1)
    h = outs["h"].flatten(0, 1)
    unit = lambda x: x/x.square().mean().sqrt()
    assert_rel("update", before*(1 - .001) - .01*unit(h).T @ unit(top)/len(h), m.feedback.matrix(1).double(), 1e-4)

# --- two processes ----------------------------------------------------------------------------------------------------

def _replica(rank, port, kind, folder):
    import os
    from torch.nn.parallel import DistributedDataParallel
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    m, (ids, targets) = model(feedback=kind, refresh=2, rounds=1 if kind == "identity" else 0), text(b=6)
    ddp = DistributedDataParallel(m)
    for _ in range(3):                                             # of equal weight: targets are all counted
        m.zero_grad(); ddp(ids[rank::2], targets=targets[rank::2]).backward()
    torch.save((grads(m), [m.feedback.matrix(l) for l in range(4)]), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()

@pytest.mark.parametrize("kind", ["identity", "gaussian", "calibrated", "kolen-pollack"])
def test_two_replicas_equal_one_process_on_the_whole_batch(kind, tmp_path):
    import socket, torch.multiprocessing as mp
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    mp.spawn(_replica, (port, kind, str(tmp_path)), nprocs=2)
    m, (ids, targets) = model(feedback=kind, refresh=2, rounds=1 if kind == "identity" else 0), text(b=6)
    for _ in range(3): m.zero_grad(); m.loss(ids, targets).backward()
    for rank in (0, 1):
        got, matrices = torch.load(tmp_path/f"{rank}.pt")
        for l in range(4): assert_rel(f"matrix {l}", m.feedback.matrix(l), matrices[l], 1e-5)
        for n, g in grads(m).items(): assert_rel(n, g, got[n], 1e-5)
