"Schedules: known closed forms, dependencies, memory, links; and the map of who is the fastest to a loss"
import itertools, math, time
import pytest
from okadfa.core import InputError
from okadfa.dfa.regions import (CONTENDERS, EXACT, UNLOCKED, contender_time, data_time, gain, ratio_over_seeds, reached,
    region_costs, steps_ratio, verdict, winner)
from okadfa.dfa.schedule import Task, simulate, step_time
from okadfa.dfa.schedules import (SCHEDULES, Link, Pipeline, direct_tasks, exact_tasks, greedy, hops, order_1f1b,
    order_zbh1, order_zbv, run, v_shape)

SIZES = list(itertools.product((1, 2, 3, 5, 8), (1, 2, 3, 8, 17)))
def near(a, b): return math.isclose(a, b, rel_tol=1e-9)
def every_run(p):
    "Every order of every schedule, not the fastest alone"
    return [(name, r) for name, s in SCHEDULES.items() for r in s.runs(p)]

# ---- closed forms

@pytest.mark.parametrize("F,B,W", [(1, 1, 1), (.7, 1.1, .4)])
def test_gpipe_and_1f1b(F, B, W):
    for S, M in SIZES:
        p = Pipeline(S, M, F, B, W)
        for name in ("gpipe", "1f1b"): assert near(run(p, name).time, (M + S - 1)*(F + B + W))
        assert near(run(p, "gpipe").time, step_time(S, M, "bp", forward=F, backward=B + W))
        assert near(max(run(p, "1f1b").idle), (S - 1)*(F + B + W))                 # of the first device

def test_zero_bubbles_of_the_papers():
    for S, M in SIZES:
        h1, v = run(Pipeline(S, M), "zb-h1"), run(Pipeline(S, M), "zb-v")
        if M >= S: assert near(h1.time, 3*M + (S - 1)) and near(max(h1.idle), S - 1)       # F + B - W = 1
        if M >= 2*S - 1: assert max(v.idle) == 0 and near(v.time, 3*M + (S - 1)/2)         # the first forward passes
        assert v.time <= h1.time <= run(Pipeline(S, M), "1f1b").time

def test_direct_feedback():
    for S, M in SIZES:
        p = Pipeline(S, M)
        plain = simulate(direct_tasks(p))
        assert near(max(s.end for s in plain), step_time(S, M, "dfa")) and run(p, "dfa").time <= step_time(S, M, "dfa")
        for r in (1, 2): assert near(run(p._replace(rounds=r), "dfa").time, step_time(S, M, "dfa", rounds=r))
        half = run(p._replace(rounds=.5), "dfa").time
        assert step_time(S, M, "dfa") < half < step_time(S, M, "dfa", rounds=1)
    assert near(run(Pipeline(4, 1, rounds=.5), "dfa").time, 4 + 2/3 + 2)
    last = [s.start for s in simulate(direct_tasks(Pipeline(5))) if s.kind == "backward"]
    assert last == [5.]*5                                                                  # all stages together

def test_ceilings_with_a_serial_forward_pass():
    for S in (2, 8, 64):
        t = {name: contender_time(Pipeline(S), name) for name in (*EXACT, "direct")}
        assert t["1f1b"]/t["direct"] == 3*S/(S + 2) < 3 and min(t[n] for n in EXACT)/t["direct"] < 2
    assert 3*64/66 > 2.9

def test_enough_microbatches_leave_nothing_to_gain():
    for S in (2, 4, 8): assert near(run(Pipeline(S, 2*S), "zb-m").time, run(Pipeline(S, 2*S), "dfa").time)

# ---- memory

def test_memory():
    for S, M in SIZES:
        p = Pipeline(S, M)
        assert run(p, "gpipe").peak == [M]*S and run(p, "1f1b").peak == [min(M, S - s) for s in range(S)]
        for name in ("zb-h1", "zb-v"): assert max(run(p, name).peak) <= min(S, M) and min(run(p, name).peak) > 0
        assert max(run(p, "zb-m").peak) <= M and max(run(p, "dfa").peak) <= M

def test_a_tight_memory_is_kept_to():
    for limit in (1, 2, 3):
        tasks = list(exact_tasks(Pipeline(4, 9)).values())
        spans = greedy(tasks, lambda task, held: held >= limit, lambda source, stage: .5, lambda s: s)
        for s in range(4):
            changes = sorted([(x.start, 1) for x in spans if (x.kind, x.stage) == ("forward", s)]
                             + [(x.end, -1) for x in spans if (x.kind, x.stage) == ("weight", s)])
            assert max(sum(c for _, c in changes[:i + 1]) for i in range(len(changes))) == limit
    with pytest.raises(InputError, match="memory"): greedy(tasks, lambda *a: True, lambda *a: 0., lambda s: s)

# ---- every task once, one at a time, after what it reads

def check(p, run_, tasks):
    at, place = {s[:3]: s for s in run_.spans}, run_.device or (lambda s: s)
    assert at.keys() == tasks.keys() and len(run_.spans) == len(tasks)
    for key, task in tasks.items():
        assert near(at[key].end - at[key].start, task.time) or task.time == 0
        for a in task.after:
            sent = p.message*hops(a, p.stages) if place(a[1]) != place(task.stage) else 0.
            assert at[key].start >= at[a].end + sent - 1e-9
        if task.kind != "forward": assert at[key].start >= at["forward", *key[1:]].end - 1e-9
    for d in {place(s.stage) for s in run_.spans}:
        mine = sorted((s.start, s.end) for s in run_.spans if place(s.stage) == d)
        assert all(a[1] <= b[0] + 1e-9 for a, b in zip(mine, mine[1:]))

@pytest.mark.parametrize("S,M", [(1, 1), (2, 3), (3, 2), (4, 9), (6, 4)])
def test_causality_and_work(S, M):
    p = Pipeline(S, M, .8, 1.2, .9, head=.3, link=Link(.2, 10.), size=5.)
    for name, r in every_run(p):
        chunks, whole = 1 if r.device is None else 2, any(s.kind == "backward" for s in r.spans)
        tasks = {t[:3]: t for t in direct_tasks(p, chunks)} if name == "dfa" else exact_tasks(p, chunks, not whole)
        check(p, r, tasks)
        assert near(sum(s.end - s.start for s in r.spans), p.work*S + .3*M)
    for rounds in (.5, 1, 2):
        q = p._replace(rounds=rounds)
        tasks = {t[:3]: t for t in direct_tasks(q)}
        check(q, run(q, "dfa"), tasks)
        extra = sum(t.time for t in tasks.values()) - p.work*S - .3*M
        assert near(extra, (2/3 if rounds == .5 else rounds)*1.2*S*M)

def with_heads(keys, last):
    return [k for key in keys for k in ([key, ("head", *key[1:])] if key[:2] == ("forward", last) else [key])]

@pytest.mark.parametrize("S", [2, 3, 7, 16, 33, 64])
def test_nothing_waits_in_a_circle(S):
    for M in (1, 2, 3, 8, 64) if S <= 16 else (1, 3, 8):
        p = Pipeline(S, M, link=Link(.3))
        for order, chunks, split in ((order_1f1b, 1, False), (order_zbh1, 1, True), (order_zbv, 2, True)):
            tasks = exact_tasks(p, chunks, split)
            keys = [key for s in range(S) for key in order(p, s)]
            assert len(keys) == len(set(keys)) and set(keys) == {k for k in tasks if k[0] != "head"}
            for s in range(S): assert all(v_shape(S)(k[1]) == s if chunks == 2 else k[1] == s for k in order(p, s))
            device = v_shape(S) if chunks == 2 else None
            assert simulate([tasks[key] for key in with_heads(keys, S*chunks - 1)], .3, device)

def test_large_ones_are_quick():
    start = time.process_time()
    for name in ("1f1b", "zb-h1"): run(Pipeline(64, 64, link=Link(1.)), name)
    run(Pipeline(64, 64, link=Link(1.), rounds=1), "dfa")
    assert time.process_time() - start < 10

# ---- links

def test_messages():
    p = Pipeline(4, 8, link=Link(.5, 100.), size=800.)
    assert p.message == .5 + 1. and p._replace(microbatches=2).message == .5 + 4. and Pipeline(4).message == 0
    assert [hops(("forward", 0, 0), S) for S in (2, 64)] == [1, 1]
    for kind in ("head", "round 1"): assert [hops((kind, 0, 0), S) for S in (1, 2, 3, 4, 5, 64)] == [0, 1, 2, 2, 3, 6]
    one = Pipeline(4, 1, link=Link(.25))
    assert run(one, "1f1b").time == 12 + 6*.25 and run(one, "zb-h1").time == 4 + 4 + 1 + 6*.25
    assert simulate_time(direct_tasks(one), one) == 4 + 3*.25 + 2*.25 + 2                  # up, a tree, back
    assert run(one._replace(rounds=1), "dfa").time == 4 + 3*.25 + 2*.25 + 1 + 2*.25 + 2    # and a scan

def simulate_time(tasks, p):
    return max(s.end for s in simulate(tasks, lambda source, stage: p.message*hops(source, p.stages)))

@pytest.mark.parametrize("name", SCHEDULES)
def test_longer_links_never_help(name):
    for S, M in ((2, 5), (4, 3), (4, 16), (8, 8)):
        times = [run(Pipeline(S, M, link=Link(L)), name).time for L in (0, .1, 1, 5)]
        assert all(a <= b + 1e-9 for a, b in zip(times, times[1:])) and times[0] < times[-1]
        narrow = run(Pipeline(S, M, link=Link(0., 1.), size=2.), name).time
        assert narrow > times[0]

def test_stages_on_one_device_need_no_link():
    two = [Task("forward", 0, 0, 1), Task("forward", 1, 0, 2, [("forward", 0, 0)])]
    assert simulate(two, 9., lambda s: 0)[-1].end == 3 and simulate(two, 9.)[-1].end == 12
    assert simulate(two, lambda source, stage: 4. if source[0] == "forward" else 0.)[-1].end == 7

def test_what_cannot_be_is_refused():
    for bad, name in ((Pipeline(0), "1f1b"), (Pipeline(2, 0), "1f1b"), (Pipeline(2), "zb-h9"),
                      (Pipeline(2, rounds=-1), "dfa"), (Pipeline(2, rounds=1), "zb-v"),
                      (Pipeline(2, rounds=1.5), "dfa"), (Pipeline(2, forward=[1.]), "1f1b")):
        with pytest.raises(InputError): run(bad, name)
    with pytest.raises(InputError): contender_time(Pipeline(2), "nobody")

# ---- to the same loss

def curve(rate, floor=0., steps=300): return [[t, max(floor, 3*math.exp(-rate*t))] for t in range(3, steps + 1, 3)]

def test_steps_to_a_loss():
    bp = curve(.01)
    assert steps_ratio(bp, bp, 150) == 1 and abs(steps_ratio(curve(.008), bp, 150) - 1.25) < .05
    assert steps_ratio(curve(.01, floor=1.), bp, 150) == math.inf and steps_ratio(curve(.02), bp, 150) < .6
    assert reached([[1, 5.], [2, 4.], [3, 3.]], 10.) == 1 and reached([[1, 5.]], 1.) == math.inf
    lucky = [list(x) for x in bp]; lucky[10][1] = 0.                           # one low point is no arrival
    assert steps_ratio(lucky, bp, 240) > .9
    assert ratio_over_seeds([.9, 1.0]) == (1., .9, 1.) and ratio_over_seeds([1.25, 1.5]) == (1.375, 1.25, 1.5)
    assert ratio_over_seeds([1., math.inf]).mean == math.inf

def test_data_parallelism():
    assert [data_time(Pipeline(4, M)) for M in (1, 4, 5, 8)] == [12, 12, 24, 24]
    assert data_time(Pipeline(4, 8, head=1.)) == 2*(4*3 + 1) and data_time(Pipeline(1, 3, link=Link(9.))) == 9
    assert near(data_time(Pipeline(4, 8, link=Link(.5, 10.)), 40.), 24 + 6*(.5 + 1.))

def test_the_map():
    few = dict(stages=(2, 8), microbatches=(1, 16), latencies=(0.,))
    costs = region_costs({"bp": 1., "identity": 1.5, "identity+1": math.inf}, **few)
    assert costs.keys() == {(0., S, M) for S in (2, 8) for M in (1, 16)}
    assert set(costs[0., 2, 1]) == {*EXACT, "data", "direct"}                # others have no ratio, or never get there
    assert costs[0., 8, 1]["direct"] == 1.5*10 and costs[0., 8, 1]["gpipe"] == 24
    assert winner(costs[0., 8, 16]) == "zb-v" and winner(costs[0., 8, 1]) == "direct" and gain(costs[0., 2, 1]) < 1
    assert gain(costs[0., 8, 1]) == 16.5/15 and winner(costs[0., 8, 16], ["data", "direct"]) == "data"
    assert gain({"gpipe": 1.}) is None and winner({"direct": 1., "1f1b": 1., "gpipe": 1.}) == "gpipe"
    line, = verdict(costs)
    assert "in 1 of 4 cells (S=8 M=1), by 1.10x" in line and set(UNLOCKED) < set(CONTENDERS)
    frozen = region_costs({"bp": 1., "frozen": 1.}, **few)[0., 8, 16]["frozen"]
    assert near(frozen, 7 + 16 + 16*2)                                         # only the last device goes back
