"What the front page and the figures show is what was measured"
import re
import pytest
from conftest import ROOT, load
from okadfa.core import read_rows
from okadfa.run.ablate import markdown, read_runs, select, summarise
from okadfa.run.demo import summary_table

def between(marker):
    return re.search(rf"<!-- {marker}:[^\n]*-->\n(.*?)<!-- /{marker} -->", (ROOT/"README.md").read_text(), re.S)[1].strip()

def printed(notebook):
    cells = load(ROOT/"nbs"/"figures"/notebook)["cells"]
    return "".join("".join(o.get("text", "")) for c in cells for o in c.get("outputs", []))

def test_readme_shows_the_demo_rows():
    assert between("demo") == summary_table(read_rows(ROOT/"results"/"demo.jsonl")).strip()

def test_readme_shows_the_rows_of_the_rules():
    rows = [r for r in read_runs(ROOT/"results") if r["tokenizer"] == "bytes" and r["steps"] == 2000 and r["model"]["n_layers"] == 6]
    for name in {r["data"] for r in rows}:
        assert markdown(summarise(select(rows, "rules", like=next(r for r in rows if r["data"] == name)))).strip() in between("rules")

@pytest.mark.parametrize("marker,notebook", [("demo", "fig_demo.ipynb"), ("wikitext", "fig_wikitext.ipynb"), ("rules", "fig_rules.ipynb"), ("mixers", "fig_spectral.ipynb")])
def test_readme_shows_what_the_notebook_printed(marker, notebook):
    shown = between(marker)
    assert shown.count("|") > 20 and shown in printed(notebook)

def test_readme_shows_what_the_byte_model_reached():
    shown = between("bytes")
    assert re.search(r": 1\.\d{3} bits per byte", shown) and shown in printed("fig_bytes.ipynb")

@pytest.mark.parametrize("name", ["demo", "wikitext", "head", "memory", "pipeline", "ablate", "estimators", "attention", "spectral", "compression", "bytes", "quantize"])
def test_rows_say_where_they_come_from(name):
    rows = read_rows(ROOT/"results"/f"{name}.jsonl")
    assert rows
    for r in rows: assert r["provenance"]["commit"] and r["provenance"]["torch"] and r["provenance"]["device"]
    if name in ("demo", "wikitext"): assert len({r["model"]["seed"] for r in rows}) >= 3
