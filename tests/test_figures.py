"What the front page and the figures show is what was measured"
import re
import pytest
from conftest import ROOT, load
from okadfa.core import read_rows
from okadfa.run import demo
from okadfa.run.summary import read_runs, select, summarise
from okadfa.run.tables import cells

def between(marker):
    text = (ROOT/"README.md").read_text(encoding="utf-8")
    return re.search(rf"<!-- {marker}:[^\n]*-->\n(.*?)<!-- /{marker} -->", text, re.S)[1].strip()

def printed(notebook):
    cells = load(ROOT/"nbs"/"figures"/notebook)["cells"]
    shown = (o.get("text") or o.get("data", {}).get("text/markdown", "") for c in cells for o in c.get("outputs", []))
    return "".join("".join(x) for x in shown)

def test_readme_shows_the_demo_rows():
    rows, shown = read_rows(ROOT/"results"/"demo.jsonl"), between("demo")
    runs, panel = demo.by_seed(rows), demo.panel_rows(rows)
    assert shown == demo.shown(rows).strip()
    for part in (demo.summary_table(runs, panel), demo.panel_table(panel), demo.verdict(runs, panel),
                 demo.selection(runs, panel)): assert part.strip() in shown
    assert all(len(x) >= 3 for x in runs.values())

def test_the_best_form_is_near_the_baseline_and_ahead_of_it_on_long_texts():
    rows = read_rows(ROOT/"results"/"demo.jsonl")
    runs, panel = demo.by_seed(rows), demo.panel_rows(rows)
    assert max(demo.costs(runs, "best")) < 0.05
    for what in ("step", "token"):
        found = demo.by_length(panel, what, "baseline")
        assert max(found) >= 4096 and demo.ahead_from(found, "best") is not None

def long_byte_runs():
    runs = [r for r in read_runs(ROOT/"results") if r["sweep"] == "rules" and r["tokenizer"] == "bytes"]
    return [r for r in runs if r["model"]["n_layers"] == 6]

# The large tables stand on their own pages; README holds the claims that follow from them.
def test_the_figure_shows_the_rows_of_the_rules():
    rows = [r for r in long_byte_runs() if r["steps"] == 2000]
    for name in {r["data"] for r in rows}:
        runs = select(rows, "rules", like=next(r for r in rows if r["data"] == name))
        assert len(runs) >= 8
        for numbers in summarise(runs).values():
            shown = cells(numbers)
            del shown["tokens_per_s"]                    # no comparison, because the runs shared a machine
            assert " | ".join(shown.values()) in printed("fig_rules.ipynb")
    assert "tokens/s |" not in printed("fig_rules.ipynb")

def test_the_figure_says_at_which_end_of_the_range_a_rate_was():
    said = {"embedded": "Of 8 rules 2 took the largest and 0", "wikitext-2": "Of 8 rules 7 took the largest and 1"}
    for data, says in said.items():
        found = [r for r in long_byte_runs() if r["data"] == data]
        rates = sorted({r["train"]["lr"] for r in found if r["tune"]})
        runs = select([r for r in found if r["steps"] == 2000], "rules")
        took = [next(iter(by_seed.values()))["train"]["lr"] for by_seed in runs.values()]
        counted = f"Of {len(took)} rules {took.count(rates[-1])} took the largest and {took.count(rates[0])}"
        assert counted == says and says in printed("fig_rules.ipynb")

@pytest.mark.parametrize("marker,notebook", [
    ("demo", "fig_demo.ipynb"), ("depth", "fig_depth.ipynb")])
def test_readme_shows_what_the_notebook_printed(marker, notebook):
    shown = between(marker)
    assert shown.count("|") > 20 and shown in printed(notebook)

def test_the_figure_shows_where_unlocking_pays(): assert "1.89x at most" in printed("fig_regions.ipynb")

def test_the_figure_shows_what_the_byte_model_reached():
    shown = printed("fig_bytes.ipynb")
    assert re.search(r": 1\.\d{3} bits per byte", shown)
    row, = read_rows(ROOT/"results"/"bytes.jsonl")
    separate = {r["bits_per_byte"] for r in read_rows(ROOT/"results"/"quantize.jsonl") if r["model"] == row["model"]}
    measured = [r["given_train"] for r in read_rows(ROOT/"results"/"compression.jsonl") if r["name"] == "model"]
    for x in (*separate, measured[-1]): assert f"{x:.3f}" in shown        # both readings, never the better one alone
    assert "one seed" in shown and "weights are not counted" in shown

def test_readme_trains_the_baseline_of_the_table():
    "The commands on the front page are those that `make wikitext` runs"
    readme, make = (ROOT/"README.md").read_text(encoding="utf-8"), (ROOT/"Makefile").read_text(encoding="utf-8")
    common = re.search(r"^WIKITEXT .*?(--preset .*?) --results", make, flags=re.M)[1]
    commands = re.findall(r"^okadfa train --data wikitext-2 --tokenizer gpt2.*$", readme, flags=re.M)
    assert len(commands) == 2 and all(common in line for line in commands)
    baseline = re.search(r"--out runs/wikitext/baseline\S* (.*?) \|\|", make)[1]
    assert commands[1].endswith(baseline)

@pytest.mark.parametrize("name", "demo wikitext head memory pipeline ablate estimators attention spectral compression "
                                 "bytes quantize weights".split())
def test_rows_say_where_they_come_from(name):
    rows = read_rows(ROOT/"results"/f"{name}.jsonl")
    assert rows
    for r in rows: assert r["provenance"]["commit"] and r["provenance"]["torch"] and r["provenance"]["device"]
    if name in ("demo", "wikitext"): assert len({r["model"]["seed"] for r in rows if "model" in r}) >= 3

def test_the_simulator_is_within_a_tenth_of_every_schedule_measured():
    newest = {(r["microbatches"], r["variant"]): r for r in read_rows(ROOT/"results"/"pipeline.jsonl") if r["ok"]}
    assert {name for _, name in newest} == {"bp", "torch GPipe", "torch 1F1B", "torch ZB looped", "torch ZB-V", "dfa"}
    assert len(newest) == 17 and all(abs(r["model_error"]) < 0.1 for r in newest.values())

def test_the_task_of_the_estimators_needs_distance():
    "Softmax with the whole page is ahead of every control without features, seed by seed"
    rows = read_runs(ROOT/"results")
    like = next(r for r in reversed(rows) if r["sweep"] == "estimators" and r["data"] == "recall")
    found = select(rows, "estimators", like=like)
    assert {"softmax", "chunks", "window", "window local", "favor+", "favor+ local", "landmarks"} <= found.keys()
    for name in ("chunks", "window", "window local"):
        assert len(found[name]) >= 3
        for seed, r in found[name].items(): assert r["bits_per_byte"] > found["softmax"][seed]["bits_per_byte"] + 1
