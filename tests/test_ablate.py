"The ablation runner: killed, shared, resumed, refused; and the arithmetic of its table"
import contextlib, dataclasses, io, signal, time
import pytest, torch
import forked
from okadfa.core import append_row
from okadfa.models.lm import LanguageModel
from okadfa.run.ablate import execute, finished, plan_sweeps, rows_by_key, run_plan
from okadfa.run.cli import main
from okadfa.run.summary import gap_closed, read_runs, summarise, worst_block
from okadfa.run.sweeps import ARMS, DEFAULTS, QUICK, SWEEPS, make_run, rules_of, run_key

TINY = dict(d_model=16, n_layers=3, n_heads=2, max_len=32, steps=6, batch_size=2, warmup=1, diag_every=2,
            precision="fp32", lr=1e-2)
def flags(**kw):
    name = lambda k: "--seq-len" if k == "max_len" else "--" + k.replace("_", "-")
    return [a for k, v in (TINY | kw).items() for a in (name(k), str(v))]

@pytest.fixture(scope="module")
def text(tmp_path_factory):
    torch.set_num_threads(1)
    d = tmp_path_factory.mktemp("text")
    line = b"Look before you leap. He who hesitates is lost.\n"
    for s in ("train", "valid", "test"): (d/f"{s}.txt").write_bytes(line*60)
    return d

def command(text, where, *args):
    places = ["--data", str(text), "--results", str(where/"results"), "--runs", str(where/"runs")]
    return forked.command(["ablate", *args, *places], dict(XDG_CACHE_HOME=str(where/"cache"), COLUMNS="200"))

def keys(where): return [r["key"] for r in read_runs(where/"results")]

def test_a_killed_sweep_continues_and_two_processes_share_one(text, tmp_path):
    args = "rules", "--only", "bp", "--only", "identity+1", "--seeds", "0,1", *flags(steps=60, diag_every=10)
    victim = command(text, tmp_path, *args)
    def checkpoint(): return list((tmp_path/"runs").glob("*/checkpoint")) if (tmp_path/"runs").is_dir() else []
    deadline = time.time() + 60
    while not checkpoint() and time.time() < deadline and victim.poll() is None: time.sleep(.02)
    victim.send_signal(signal.SIGKILL); victim.communicate()
    done = len(keys(tmp_path)) if (tmp_path/"results").is_dir() else 0
    assert done < 4 and checkpoint()                                     # it died in the middle of a run
    both = [command(text, tmp_path, *args) for _ in range(2)]
    said = [p.communicate(timeout=120) for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    assert len(keys(tmp_path)) == len(set(keys(tmp_path))) == 4 and not list((tmp_path/"runs").iterdir())
    for r in read_runs(tmp_path/"results"):               # whole curves, also where a run was taken up again
        assert r["steps"] == 60 and r["loss"][-1][0] == 60
        assert [t for t, _ in r["alignment"]["block0"]] == list(range(0, 61, 10))
    again = command(text, tmp_path, *args)
    assert again.wait() == 0 and len(keys(tmp_path)) == 4 and "identity, 1 round" in again.communicate()[0]

def test_judged_on_the_test_split(text, tmp_path):
    "Another key, another number, and nothing chosen by it"
    other = tmp_path/"text"; other.mkdir()
    for s in ("train", "valid"): (other/f"{s}.txt").write_bytes((text/f"{s}.txt").read_bytes())
    (other/"test.txt").write_bytes(bytes(range(256))*8)                   # nothing that training text helps with
    def plan(split): return plan_sweeps(["rules"], ["bp"], (0,), size=TINY | dict(steps=20), data=other, split=split)
    plans = {split: plan(split) for split in ("valid", "test")}
    assert plans["valid"][0].todo({})[0].key != plans["test"][0].todo({})[0].key
    for p, corpus in plans.values(): run_plan(p, corpus, tmp_path/"results", tmp_path/"runs", say=lambda line: None)
    rows = {r["split"]: r for r in read_runs(tmp_path/"results")}
    assert [r["key"] for r in rows.values()] == [plans[s][0].todo({})[0].key for s in rows]
    assert rows["test"]["bits_per_byte"] > rows["valid"]["bits_per_byte"] + .5
    assert rows["test"]["loss"] == rows["valid"]["loss"]
    found = finished(plans["test"][0], "rules", rows_by_key(tmp_path/"results"))
    assert summarise(found)["bp"]["bits_per_byte"][0] == rows["test"]["bits_per_byte"]
    tuned, _ = plan_sweeps(["rules"], ["bp"], (0,), (1e-3, 1e-2), 4, TINY, other, split="test")
    trials = tuned.trials("rules", "bp")
    assert {r.split for r in trials} == {"valid"}
    assert {r.split for r in tuned.finals("rules", "bp", {t.key: dict(nats=1.) for t in trials})} == {"test"}
    (other/"test.txt").unlink()
    code, said = in_process(other, tmp_path/"refused", ["--split", "test"])
    assert code == 2 and "no test split" in said

def test_a_run_without_a_checkpoint_starts_afresh(text, tmp_path):
    plan, corpus = plan_sweeps(["rules"], ["bp"], (0,), size=TINY, data=text)
    run = plan.todo({})[0]
    folder = tmp_path/"runs"/run.key
    folder.mkdir(parents=True); (folder/"run.json").write_text("{ cut off")
    run_plan(plan, corpus, tmp_path/"results", tmp_path/"runs", say=lambda line: None)
    assert keys(tmp_path) == [run.key]

def test_a_resumed_run_is_the_unbroken_one(text, tmp_path, monkeypatch):
    plan, corpus = plan_sweeps(["feedback"], ["calibrated"], (0,), size=TINY | dict(refresh=2), data=text)
    def go(name, dies_at=None):
        "Rows, and how many training passes it took"
        forward, seen = LanguageModel.forward, []
        def counted(self, *a, **k):
            seen.extend([1]*self.training)
            if len(seen) == dies_at: raise MemoryError("the machine went away")
            return forward(self, *a, **k)
        with monkeypatch.context() as m:
            m.setattr(LanguageModel, "forward", counted)
            rows = run_plan(plan, corpus, tmp_path/name, tmp_path/f"runs-{name}", say=lambda line: None)
            return list(rows.values()), len(seen)
    rows, passes = go("a")
    with pytest.raises(MemoryError): go("b", dies_at=5)
    again, passes_again = go("b")
    assert passes_again <= passes - 4                                    # it went on after step 4
    # What the feedback had learnt came back too
    assert rows[0]["nats"] == again[0]["nats"] and rows[0]["alignment"] == again[0]["alignment"]

def test_a_run_that_another_process_has_just_finished_is_left_alone(text, tmp_path):
    plan, corpus = plan_sweeps(["rules"], ["frozen"], (0,), size=TINY, data=text)
    run = plan.todo({})[0]                                # planned before the row was there, executed after
    assert execute(run, corpus, tmp_path/"results", tmp_path/"runs")["key"] == run.key
    assert execute(run, corpus, tmp_path/"results", tmp_path/"runs") is None and keys(tmp_path) == [run.key]

def test_learning_rates_are_tuned_alike_and_once(text, tmp_path):
    plan, corpus = plan_sweeps(["rules"], ["bp", "identity"], (0, 1), (1e-3, 3e-2), 4, TINY, text)
    lines = []
    run_plan(plan, corpus, tmp_path/"results", tmp_path/"runs", say=lines.append)
    rows = read_runs(tmp_path/"results")
    assert len(lines) == 8 and sum(r["tune"] for r in rows) == 4
    for rule in ("bp", "identity"):
        tried = {r["train"]["lr"]: r["nats"] for r in rows if r["tune"] and r["rule"] == rule}
        assert {r["train"]["lr"] for r in rows if not r["tune"] and r["rule"] == rule} == {min(tried, key=tried.get)}

def in_process(text, where, args):
    err = io.StringIO()
    data = [] if "--quick" in args else ["--data", str(text)]
    with contextlib.redirect_stderr(err), pytest.raises(SystemExit) as e:
        main(["ablate", *args, *data, "--results", str(where/"results"), "--runs", str(where/"runs")])
    return e.value.code, err.getvalue()

@pytest.mark.parametrize("args, word", [
    (["armz"], "unknown sweep"), (["rules", "--only", "nobody"], "no rule"), (["--seeds", "a"], "seeds"),
    (["--seeds", ""], "seeds"), (["--lrs", "1e-3"], "two rates"), (["--lrs", "1e-3,x"], "lrs"),
    (["--quick", "--steps", "5"], "--quick"), (["rules", "--quick"], "--quick"), (["--steps", "0"], "steps"),
    (["--max-runs", "0"], "max-runs"), (["--preset", "huge"], "unknown preset"), (["--n-heads", "5"], "divisible"),
    (["--split", "train"], "split"), (["--gating", "triple"], "gating"), (["--stpes", "5"], "No such option"),
    (["--seeds", "-1"], "seeds")])
def test_refusals_write_nothing(text, tmp_path, args, word):
    code, said = in_process(text, tmp_path, args)
    assert code == 2 and word in said and said.count("\n") == 1, said
    assert not (tmp_path/"results").exists() and not (tmp_path/"runs").exists()

def test_list_writes_nothing(text, tmp_path):
    got = command(text, tmp_path, "arms", "--list", *flags())
    assert got.wait() == 0 and got.communicate()[0].count("to do") == 18
    assert not (tmp_path/"results").exists() and not (tmp_path/"runs").exists()

# ---- arithmetic

def test_every_rule_of_every_sweep_is_a_config():
    for sweep in SWEEPS:
        for rule in rules_of(sweep):
            for size in (DEFAULTS, QUICK): make_run(sweep, rule, size | dict(vocab_size=257), {}, seed=0)
    assert list(ARMS) == ["A0", "A1", "A2", "A3", "A4", "A5"]
    assert {"bp", "frozen", "random", "identity", "identity+1", "identity+2"} < set(rules_of("rules"))

def test_keys_tell_runs_apart_and_old_rows_stay_valid(tmp_path):
    run = make_run("rules", "identity", TINY | dict(vocab_size=257), dict(text="a"), seed=0)
    model, training = dataclasses.asdict(run.model), dataclasses.asdict(run.train)
    assert run.key == run_key(model, training, dict(text="a")) != run_key(model, training, dict(text="b"))
    for field, x in (("rounds", 1), ("seed", 1), ("half_round", True), ("embed_std", .1)):
        assert run_key(model | {field: x}, training, dict(text="a")) != run.key
    del model["half_round"], training["beta2"]                           # a row from before these fields were there
    append_row(tmp_path/"ablate.jsonl", dict(model=model, train=training, data_id=dict(text="a")))
    assert [r["key"] for r in read_runs(tmp_path)] == [run.key]

def test_vanished_gradients_are_excluded_not_aligned():
    seen = {"block0": [[5, None], [9, .8]], "block1": [[5, .9], [9, .7]], "block2": [[5, -1.], [9, -1.]]}
    assert worst_block(seen, after=5) == .7
    assert worst_block({"block0": [[5, None]], "block1": [[5, 1.]]}, after=5) is None

def test_gap():
    assert gap_closed(1.5, 2., 1.) == .5 and gap_closed(1., 2., 1.) == 1 and gap_closed(3., 2., 1.) == -1
    assert gap_closed(1., 1., 1.) is None
