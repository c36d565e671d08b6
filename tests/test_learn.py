"The four pages for a student: one model in all of them, run, quick, with answers"
import ast, re
import pytest
from conftest import load, notebooks, source

PAGES = [nb for nb in notebooks() if nb.parts[0] == "learn"]
SECONDS = 300                # of one core, for all four

def code_of(nb) -> list[str]: return [source(c) for c in load(nb)["cells"] if c["cell_type"] == "code"]

def prose_of(nb) -> str: return "\n\n".join(source(c) for c in load(nb)["cells"] if c["cell_type"] == "markdown")

def definitions(code:str) -> dict:
    "Functions, classes and constants of a cell, without comments and layout"
    tree = ast.parse("\n".join(s for s in code.splitlines() if not s.startswith("#|")))
    named = {n.name: ast.unparse(n) for n in tree.body if hasattr(n, "name")}
    return named | {n.targets[0].id: ast.unparse(n) for n in tree.body
                    if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)}

def model_cell(nb) -> str:
    "The folded cell that later pages begin with"
    cell, = [s for s in code_of(nb) if '#| code-summary: "The model of page 1' in s]
    return cell

# ---- the four pages

def test_there_are_four_in_order():
    assert [nb.stem.split("_")[:2] for nb in PAGES] == [["learn", str(i)] for i in (1, 2, 3, 4)]
    for nb, after in zip(PAGES, PAGES[1:]): assert f"Next: [Learn {after.stem[6]}" in prose_of(nb)

@pytest.mark.parametrize("nb", PAGES[1:], ids=str)
def test_every_page_has_the_model_of_the_first(nb):
    first = {}
    for s in code_of(PAGES[0]): first = definitions(s) | first          # exercises come later and do not count
    same = definitions(model_cell(nb))
    assert {"TEXT", "batch", "Attention", "shift", "Block", "ByteLM", "loss_of", "train"} <= set(same)
    assert same == {name: first[name] for name in same}

def test_it_is_fifty_lines():
    lines = [s for s in model_cell(PAGES[1]).splitlines() if s.strip() and not s.strip().startswith(("#", '"'))]
    training = next(i for i, s in enumerate(lines) if s.startswith("def backprop"))
    assert training <= 50 and len(lines) - training <= 20

def seconds(nb) -> float:
    "What the page printed at its end: processor time of its kernel"
    said = [o["text"] for c in load(nb)["cells"] for o in c.get("outputs", []) if "seconds of one core" in
            "".join(o.get("text", ""))]
    assert len(said) == 1, f"{nb} does not say once how long it took"
    return float("".join(said[0]).split()[0])

def test_they_run_in_five_minutes():
    took = {nb.stem: seconds(nb) for nb in PAGES}
    assert sum(took.values()) < SECONDS, took

@pytest.mark.parametrize("nb", PAGES, ids=str)
def test_exercises_have_answers_that_ran(nb):
    cells = load(nb)["cells"]
    asked = len(re.findall(r"^\*\*\d\. ", prose_of(nb), flags=re.M))
    folded = [c for c in cells if c["cell_type"] == "code" and '#| code-summary: "Answer"' in source(c)]
    told = prose_of(nb).count("<details><summary>Answer</summary>")
    assert asked in (2, 3) and len(folded) + told == asked
    assert all(c["outputs"] for c in folded) and len(folded) >= 2

@pytest.mark.parametrize("nb", PAGES, ids=str)
def test_pages_are_made_for_a_small_screen(nb):
    cells = [c for c in load(nb)["cells"] if c["cell_type"] == "code"]
    wide = [s for c in cells for s in source(c).splitlines() if len(s) > 90 and not s.startswith("#|")]
    assert not wide, wide
    drawn = [source(c) for c in cells if any("image/png" in o.get("data", {}) for o in c["outputs"])]
    assert 1 <= len(drawn) <= 2
    for s in drawn:
        assert all(f"#| {key}:" in s for key in ("label", "fig-cap", "fig-alt")), s[:80]
        assert float(re.search(r"figsize=\((\d+(?:\.\d+)?)", s)[1]) <= 6.5
