"Finished rows stay finished: keys are those that were recorded; and what is registered joins its sweep"
import json
import pytest
import fingerprint
from conftest import ROOT
from okadfa.attention.estimators import ESTIMATORS
from okadfa.core import read_rows
from okadfa.dfa.feedback import FEEDBACK_KINDS
from okadfa.models.block import MIXERS
from okadfa.models.credit import CREDITS
from okadfa.run import ablate
from okadfa.run.ablate import Plan, plan_sweeps, run_plan, status
from okadfa.run.summary import best_rate, read_runs, select
from okadfa.run.sweeps import ARMS, BP, IDENTITY, LATER, QUICK, SWEEPS, Sweep, make_run, rules_of, titles_of

STORED = json.loads(fingerprint.STORED.read_text())
SIZE = dict(vocab_size=257, d_model=16, n_layers=3, n_heads=2, max_len=32, steps=8, batch_size=2, warmup=2, lr=1e-2)

# ---- keys

def test_every_rule_keeps_its_key():
    keys, _ = fingerprint.keys()
    assert {name: keys.get(name) for name in STORED["sweeps"]} == STORED["sweeps"]

def test_finished_rows_keep_their_keys():
    assert fingerprint.keys()[1] == STORED["rows"]

def test_a_rule_that_changed_is_noticed(monkeypatch):
    changed = rules_of("rules") | {"identity": IDENTITY.but("identity feedback", ortho=1e-5)}
    monkeypatch.setitem(SWEEPS, "rules", Sweep("?", lambda: changed))
    keys, _ = fingerprint.keys()
    assert [name for name in STORED["sweeps"] if keys[name] != STORED["sweeps"][name]] == ["rules/identity"]

def test_rows_as_written_had_the_keys_that_they_have_now():
    "The key in the row itself, which nothing reads, is the one computed, if no config has gained a field since"
    written, read = read_rows(ROOT/"results"/"ablate.jsonl"), read_runs(ROOT/"results")
    def fields(row): return {*row["model"], *row["train"]} - {*LATER}
    whole = [(old, new) for old, new in zip(written, read, strict=True) if fields(old) == fields(new)]
    assert len(whole) > 20 and all(old["key"] == new["key"] for old, new in whole)

# ---- finished rows are not run again

def quick_plan():
    "What `okadfa ablate --quick` plans, on the text of the finished rows; the embedded one is that of this Python"
    row = next(r for r in read_runs(ROOT/"results") if r["sweep"] == "arms" and r["steps"] == QUICK["steps"])
    return Plan(tuple(("arms", name) for name in ARMS), QUICK | dict(vocab_size=257), row["data_id"], seeds=(0,))

class Trained(Exception): pass

@pytest.fixture
def no_training(monkeypatch):
    def train(model, *_, **__): raise Trained(model.mixer)
    monkeypatch.setattr(ablate, "train", train)

def test_quick_on_finished_rows_runs_nothing(tmp_path, no_training):
    before = (ROOT/"results"/"ablate.jsonl").read_bytes()
    (tmp_path/"results").mkdir(); (tmp_path/"results"/"ablate.jsonl").write_bytes(before)
    plan, said = quick_plan(), []
    rows = run_plan(plan, None, tmp_path/"results", tmp_path/"runs", say=said.append)
    assert {r.key for r in plan.finals("arms", "A5", rows)} <= rows.keys() and len(plan.finals("arms", "A5", rows)) == 1
    assert said == [] and not (tmp_path/"runs").exists()
    assert (tmp_path/"results"/"ablate.jsonl").read_bytes() == before
    assert [line.split()[0] for line in status(plan, tmp_path/"results", tmp_path/"runs")] == ["finished"]*6

def test_a_missing_row_is_run(tmp_path, no_training):
    "The test above can fail"
    gone = quick_plan().todo({})[1].key
    kept = [json.dumps(r) for r in read_runs(ROOT/"results") if r["key"] != gone]
    (tmp_path/"results").mkdir(); (tmp_path/"results"/"ablate.jsonl").write_text("\n".join(kept) + "\n")
    with pytest.raises(Trained, match="favor"): run_plan(quick_plan(), None, tmp_path/"results", tmp_path/"runs")

# ---- what is registered is compared

class Entry:
    "An entry of any table, in a title of its own"
    def __init__(self, like, title): self.like, self.title = like, title
    def __getattr__(self, name): return getattr(self.like, name)
    def __call__(self, *args): return self.like(*args)

def planned(sweep, only):
    plan, _ = plan_sweeps([sweep], [only], seeds=(0,), size=SIZE)
    return plan.todo({})

@pytest.mark.parametrize("sweep, table, like, rules", [
    ("rules", CREDITS, "bp", {"mine": "My own"}), ("feedback", FEEDBACK_KINDS, "orthogonal", {"mine": "My own"}),
    ("mixers", MIXERS, "softmax", {"mine": "My own"}),
    ("estimators", ESTIMATORS, "sobol", {"mine": "My own", "mine local": "My own, exact near by"})])
def test_a_registered_entry_is_listed_and_planned(monkeypatch, sweep, table, like, rules):
    before = rules_of(sweep)
    assert not rules.keys() & before.keys()
    entry = Entry(table[like], "My own")
    monkeypatch.setitem(table, "mine", entry)
    after = rules_of(sweep)
    assert {name: rule.title for name, rule in after.items() if name not in before} == rules
    assert {name: after[name] for name in before} == before
    for name, title in rules.items():
        run, = planned(sweep, name)
        assert run.title == title == titles_of(sweep)[name] and str(run).startswith(f"{title}, seed 0")
        assert "mine" in (run.model.credit, run.model.feedback, run.model.mixer, run.model.features)
    monkeypatch.undo()
    assert rules_of(sweep) == before

def test_an_estimator_without_softmax_scale_has_no_local_rule(monkeypatch):
    entry = Entry(ESTIMATORS["sobol"], "My own"); entry.local = False
    monkeypatch.setitem(ESTIMATORS, "sobol", entry)
    assert "sobol" in rules_of("estimators") and "sobol local" not in rules_of("estimators")

# ---- what a table shows

def test_bp_and_frozen_blocks_come_with_every_sweep():
    for sweep in SWEEPS:
        shown, own = titles_of(sweep), rules_of(sweep)
        if any(rule.fields["credit"] == "bp" for rule in own.values()): assert list(shown) == list(own)
        else: assert list(shown) == ["bp", "frozen", *own]

def test_titles_are_told_apart():
    for sweep in SWEEPS: assert len(set(titles_of(sweep).values())) == len(titles_of(sweep))

def test_selected_rows_follow_the_rules_that_they_are_shown_as():
    "Rows of a table have the key of the rule, at their own size"
    rows = [r for r in read_runs(ROOT/"results") if r["sweep"] == "rules" and not r["tune"]]
    runs = select(rows, "rules", like=rows[0])
    assert len(runs) > 5
    for rule, by_seed in runs.items():
        for seed, r in by_seed.items():
            size = r["train"] | r["model"]
            size = {k: v for k, v in size.items() if k not in {f for x in rules_of("rules").values() for f in x.fields}}
            assert make_run("rules", rule, size, r["data_id"], seed=seed).key == r["key"], rule

def test_the_best_rate_has_the_most_seeds_then_the_smallest_loss():
    def rows(lr, *losses): return [dict(train=dict(lr=lr), seed=s, nats=x) for s, x in enumerate(losses)]
    def rate(rows): return {r["train"]["lr"] for r in best_rate(rows).values()}
    assert rate(rows(.1, 2., 2., 2.) + rows(.2, 1., 1.)) == {.1}
    assert rate(rows(.1, 2., 2.) + rows(.2, 1., 2.5)) == {.2} and rate(rows(.1, 2., 2.) + rows(.2, 1., None)) == {.1}
    assert [r["nats"] for r in best_rate(rows(.1, 1., 2.) + rows(.1, 3.)).values()] == [3., 2.]

def test_a_rule_but_for_one_field_leaves_the_first_alone():
    assert BP.but("other", credit="dfa").fields == BP.fields | dict(credit="dfa") and BP.fields["credit"] == "bp"
