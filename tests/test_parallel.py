"The unlocked backward pass: any order, equal to the hook and to one process; the cost model's facts; the pipeline"
import itertools, time
import pytest, torch
import torch.distributed as dist
from forked import forked_workers    # noqa: F401
from torch import nn
from okadfa.core import InputError, assert_rel
from okadfa.dfa.feedback import FeedbackMatrices
from okadfa.dfa.parallel import UnlockedStack
from okadfa.dfa.pipeline import Stage, pipeline_step, sum_tied
from okadfa.dfa.schedule import RULES, Task, blocks_per_stage, pipeline_tasks, simulate, step_time
from okadfa.models.lm import LMConfig, LanguageModel
from okadfa.processes import run_processes
from okadfa.models.stages import model_stages

def model(**kw):
    size = dict(vocab_size=30, d_model=16, n_layers=4, n_heads=2, max_len=32, credit="dfa", feedback="gaussian")
    return LanguageModel(LMConfig(**(size | kw))).double()
def text(b=5, n=17, seed=0): return torch.randint(30, (2, b, n), generator=torch.Generator().manual_seed(seed))
def grads(m): return {n: p.grad.clone() for n, p in m.named_parameters()}

def unlocked(m, ids, targets, order=None, recompute=True):
    "Gradients by an unlocked stack of all blocks, between the model's own stem and head"
    stage = model_stages(m, [len(m.pieces())], targets.numel(), recompute)[0]
    x = stage.stem(ids)
    top, tape = stage.stack(x)
    stage.head(top, targets).backward()
    x.backward(tape.backward(top.grad, order))
    return grads(m)

# ---- one process

@pytest.mark.parametrize("recompute", [True, False])
def test_order_does_not_matter(recompute):
    m, (ids, targets) = model(), text()
    ref = unlocked(m, ids, targets, recompute=recompute)
    for order in ([0, 1, 2, 3], [2, 0, 3, 1], [1, 3, 2, 0]):
        m.zero_grad(); ran = []
        handles = [next(b.parameters()).register_hook(lambda g, l=l: ran.append(l)) for l, b in enumerate(m.blocks)]
        got = unlocked(m, ids, targets, order, recompute)
        for h in handles: h.remove()
        assert ran == order                                  # the blocks really did run in that order
        assert all(torch.equal(ref[n], got[n]) for n in ref)

@pytest.mark.parametrize("b,n", [(1, 1), (3, 7), (2, 32)])
@pytest.mark.parametrize("mixer", ["favor", "softmax"])
@pytest.mark.parametrize("feedback", ["gaussian", "identity"])
def test_equals_the_hook(b, n, mixer, feedback):
    m, (ids, targets) = model(mixer=mixer, feedback=feedback), text(b, n)
    m.loss(ids, targets).backward(); ref = grads(m)
    for recompute in (True, False):
        m.zero_grad()
        for name, g in unlocked(m, ids, targets, recompute=recompute).items(): assert_rel(name, ref[name], g, 1e-10)

def test_groups_of_blocks_are_cut_as_one():
    m, (ids, targets) = model(stages=2), text()
    m.loss(ids, targets).backward(); ref = grads(m)
    m.zero_grad()
    for name, g in unlocked(m, ids, targets).items(): assert_rel(name, ref[name], g, 1e-10)

def test_frozen_blocks_and_accumulation():
    m, (ids, targets) = model(), text()
    m.blocks[0].requires_grad_(False); m.blocks[2].requires_grad_(False)
    m.loss(ids, targets).backward(); m.loss(ids, targets).backward()
    ref = {n: p.grad.clone() for n, p in m.named_parameters() if p.grad is not None}
    m.zero_grad(); stage = model_stages(m, [4], targets.numel(), True)[0]
    for _ in range(2):
        top, back = stage.run(ids, "dfa"); stage.head(top, targets).backward(); back(top.grad)
    got = {n: p.grad for n, p in m.named_parameters() if p.grad is not None}
    assert got.keys() == ref.keys()
    for name, g in got.items(): assert_rel(name, ref[name], g, 1e-10)

@pytest.mark.parametrize("recompute", [True, False])
def test_what_is_kept(recompute):
    "Recomputing runs every block twice and holds nothing of its inside in between"
    m, (ids, _) = model(), text()
    stack, calls, inside = UnlockedStack(m.blocks, m.feedback, recompute=recompute), [], []
    handles = [b.register_forward_pre_hook(lambda *a: calls.append(1)) for b in m.blocks]
    x = m.embed(ids).detach()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: inside.append(t.numel()) or t, lambda t: t):
        top, tape = stack(x)
    assert inside == [x.numel()]*4 if recompute else sum(inside) > 4*10*x.numel()
    tape.backward(torch.ones_like(top))
    assert len(calls) == 4*(1 + recompute)
    with torch.no_grad(): assert not stack(m.embed(ids))[0].requires_grad
    for h in handles: h.remove()

def test_dropout_is_the_same_when_recomputed():
    torch.manual_seed(0)
    blocks, x = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Dropout(.5)) for _ in range(3)]), torch.randn(4, 5, 8)
    got = []
    for recompute in (True, False):
        torch.manual_seed(1); blocks.zero_grad()
        top, tape = UnlockedStack(blocks, FeedbackMatrices([8]*3, 8), recompute=recompute)(x)
        torch.manual_seed(2)
        tape.backward(torch.ones_like(top), [1, 0, 2])
        got.append([p.grad for p in blocks.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*got))

def test_what_cannot_be():
    m, (ids, _) = model(), text()
    top, tape = UnlockedStack(m.blocks, m.feedback)(m.embed(ids))
    for order in ([0, 1, 2], [0, 1, 2, 2], [1, 2, 3, 4]):
        with pytest.raises(InputError, match="order"): tape.backward(torch.ones_like(top), order)
    tape.backward(torch.ones_like(top))
    with pytest.raises(RuntimeError, match="used"): tape.backward(torch.ones_like(top))
    for kw in (dict(first=1), dict(first=-1)):
        with pytest.raises(InputError): UnlockedStack(m.blocks, m.feedback, **kw)
    with pytest.raises(InputError): UnlockedStack([], m.feedback)
    for sizes in ([2, 1], [4, 0], [5]):
        with pytest.raises(InputError): model_stages(m, sizes, 1)

# ---- the cost model

def test_by_hand():
    assert [step_time(2, 1, r) for r in ("bp", "zb", "dfa")] == [6, 5, 4]
    assert [step_time(2, 2, r) for r in ("bp", "dfa")] == [9, 7]
    assert [step_time(2, 1, r, recompute=True) for r in ("bp", "dfa")] == [8, 5]
    assert step_time(2, 1, "bp", link=.5) == 7 and step_time(2, 1, "dfa", link=.5) == 5     # up, and the error down
    assert step_time(2, 1, "bp", head=1) == 7 and step_time(2, 1, "dfa", head=1) == 5
    uneven = dict(forward=[1, 2], backward=[3, 4])
    assert step_time(2, 1, "bp", **uneven) == 10 and step_time(2, 1, "dfa", **uneven) == 7
    for r in range(4): assert step_time(3, 1, "dfa", rounds=r) == 5 + r         # a round is an input gradient, 1

@pytest.mark.parametrize("M", [1, 2, 5])
def test_facts(M):
    ratio = [step_time(S, M, "dfa")/step_time(S, M, "bp") for S in range(1, 9)]
    assert ratio[0] == 1 and all(a > b for a, b in zip(ratio, ratio[1:])), "more stages, more to gain"
    for S in (1, 2, 4, 7):
        times = [step_time(S, M, r, head=.3, link=.1) for r in ("dfa", "zb", "bp")]
        assert times == sorted(times)
        for rule in RULES:
            tasks = pipeline_tasks(S, M, rule, head=.3)
            spans = simulate(tasks, .1)
            busiest = max(sum(t.time for t in tasks if t.stage == s) for s in range(S))
            assert len(spans) == len(tasks) and max(s.end for s in spans) >= busiest - 1e-9
            for s in range(S):                                    # a stage does one thing at a time
                mine = [x for x in spans if x.stage == s]
                assert all(a.end <= b.start + 1e-9 for a, b in zip(mine, mine[1:]))
            work = lambda kinds: sum(t.time for t in tasks if t.kind in kinds)
            assert abs(work(("backward", "input", "weight")) - 2*S*M) < 1e-9 and work(("forward",)) == S*M

@pytest.mark.parametrize("S,M,rounds", [(1, 1, 1), (3, 2, 0), (3, 2, 1), (4, 1, 2)])
def test_recomputation_is_one_forward_pass_more(S, M, rounds):
    for rule in RULES:
        if rounds and rule != "dfa": continue
        plain, again = (pipeline_tasks(S, M, rule, rounds=rounds, recompute=r, forward=.7) for r in (False, True))
        for s in range(S):
            work = [sum(t.time for t in tasks if t.stage == s) for tasks in (plain, again)]
            assert abs(work[1] - work[0] - .7*M) < 1e-9

def test_cost_model_refuses():
    for bad in (dict(rule="gpipe"), dict(stages=0), dict(microbatches=0), dict(rule="bp", rounds=1),
                dict(forward=[1, 1, 1]), dict(rounds=-1)):
        with pytest.raises(InputError): step_time(**(dict(stages=2) | bad))
    with pytest.raises(InputError, match="wait for one another"):
        simulate([Task("a", 0, 0, 1, [("b", 0, 0)]), Task("b", 0, 0, 1)])

def test_blocks_per_stage():
    for n, S, head in itertools.product((1, 5, 12, 13), (1, 2, 5), (0, .5, 3)):
        if S > n: continue
        sizes = blocks_per_stage(n, S, head)
        def busiest(sizes): return max(s + head*(i == S - 1) for i, s in enumerate(sizes))
        assert sum(sizes) == n and min(sizes) >= 1
        if n >= 9: continue                                       # too many ways to cut
        cuts = (c for c in itertools.product(range(1, n + 1), repeat=S) if sum(c) == n)
        assert busiest(sizes) == min(map(busiest, cuts))
    with pytest.raises(InputError): blocks_per_stage(2, 3)

# ---- processes

TIED = ("stem.embed.weight", "head.weight")

def both_rules(stage, ids, targets, microbatches):
    "Loss, gradients (tied parts added) and timeline of each rule"
    got = {}
    for rule in ("bp", "dfa"):
        stage.zero_grad(); spans = []
        loss = pipeline_step(stage, ids, targets, microbatches, rule, spans)
        for n, p in stage.named_parameters():
            if n in TIED: sum_tied(p.grad)
        got[rule] = loss, {n: p.grad.clone() for n, p in stage.named_parameters()}, spans
    for bad in (dict(rule="zb"), dict(microbatches=len(ids) + 1), dict(microbatches=0)):
        with pytest.raises(InputError): pipeline_step(stage, ids, targets, **bad)
    return got

@pytest.mark.parametrize("sizes,microbatches,recompute", [([3, 1], 2, False), ([1, 2, 1], 3, True)])
def test_processes_give_the_gradients_of_one(forked_workers, sizes, microbatches, recompute):
    m, (ids, targets) = model(), text(b=5)           # five sequences in two or three microbatches: unequal ones
    parts = model_stages(m, sizes, targets.numel(), recompute)
    results = run_processes(both_rules, [(part, ids, targets, microbatches) for part in parts], timeout=100)
    for rule in ("bp", "dfa"):
        m.zero_grad(); ref = m.loss(ids, targets, credit=rule); ref.backward()
        assert_rel("loss", ref.detach(), torch.tensor(results[-1][rule][0], dtype=torch.float64), 1e-12)
        for part, result in zip(parts, results):
            got, want = result[rule][1], {n: p.grad for n, p in part.named_parameters()}
            assert want.keys() == got.keys()
            for n in got: assert_rel(f"{rule} {n}", want[n], got[n], 1e-10)
        assert torch.equal(results[0][rule][1][TIED[0]], results[-1][rule][1][TIED[1]])     # equal to the bit
        ran = {(s.kind, s.stage, s.microbatch) for r in results for s in r[rule][2]}
        assert ran == {(t.kind, t.stage, t.microbatch) for t in pipeline_tasks(len(sizes), microbatches, rule)}

class Nap(nn.Module):
    "A block whose forward pass takes .1 s and its backward pass .2 s of nobody's processor"
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))
    def forward(self, x): return _Sleep.apply(x*self.w)

class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): time.sleep(.1); return x.clone()
    @staticmethod
    def backward(ctx, g): time.sleep(.2); return g

class Lift(nn.Module):
    def forward(self, ids): return ids[..., None].float()
class Gap(nn.Module):
    def forward(self, h, targets): return (h[..., 0] - targets).square().sum()

def naps(stage, ids, targets):
    "Seconds of a step by rule and microbatches"
    got = {}
    for rule, m in itertools.product(("bp", "dfa"), (1, 1, 2)):      # the first one warms up
        dist.barrier(); start = time.monotonic()
        pipeline_step(stage, ids, targets, m, rule)
        dist.barrier(); got[rule, m] = time.monotonic() - start
    return got

def test_stages_overlap_as_the_model_says(forked_workers):
    B, (ids, targets) = FeedbackMatrices([1, 1], 1, kind="identity"), text(b=4)
    stages = [Stage([Nap()], B, stem=Lift()), Stage([Nap()], B, first=1, head=Gap())]
    for (rule, m), seconds in run_processes(naps, [(s, ids, targets) for s in stages], timeout=100)[0].items():
        assert abs(seconds/step_time(2, m, rule, forward=.1, backward=.2) - 1) < .15, (rule, m, seconds)
