"""Cells that can be read at a sitting, lines that fit, modules and rooms that stay small.

The numbers in LIMITS are a ratchet: they may be lowered, never raised. What does not fit is cut along its joints."""
import ast, re, statistics, subprocess, sys
from pathlib import Path
import pytest, yaml
from conftest import ROOT, load, notebooks, source

LIMITS = dict(
    cell=40,             # lines of an exported cell, directives not counted
    kernel_cell=60,      # the same in kernels/: a Triton kernel is one function
    median_cell=18,      # of all exported cells
    line=120,            # characters of a line of code, in notebooks and in tests
    shown=90,            # characters of a line that the site shows unfolded: wider than that it is wrapped
    module=400,          # lines of a module
    room=0.25)           # share of a room in all lines of the package

# Cells that the site leaves out, or folds (exports)
UNSEEN = re.compile(r"^\s*#\s*\|\s*(exports?i?|default_exp|hide|(echo|include):\s*false|code-fold:\s*true)\b", re.M)
EXPORT = re.compile(r"^\s*#\s*\|\s*exports?i?\b", re.M)
DIRECTIVE = re.compile(r"^\s*#\s*\|")

# ---- cells and lines of notebooks

def code_lines(cell:dict) -> list[str]:
    "Lines of a cell without directives and the empty lines at its ends"
    lines = [s for s in source(cell).splitlines() if not DIRECTIVE.match(s)]
    return "\n".join(lines).strip("\n").splitlines()

def exported(nb:dict) -> list[tuple[int, dict]]:
    "(place, cell) of every cell that goes into the package"
    return [(i, c) for i, c in enumerate(nb["cells"]) if c["cell_type"] == "code" and EXPORT.search(source(c))]

def cell_problems(nb:dict, limit:int, shown:int=LIMITS["shown"]) -> list[str]:
    "What of a notebook cannot be read at a sitting, or does not fit its line"
    bad = []
    for i, c in exported(nb):
        n = len(code_lines(c))
        if n <= limit: continue
        bad.append(f"cell {i} ({c.get('id')}): {n} exported lines, at most {limit}: {code_lines(c)[0][:60]}")
    for i, c in enumerate(nb["cells"]):
        if c["cell_type"] == "markdown" and len(source(c).strip()) == 1:
            bad.append(f"cell {i} ({c.get('id')}): a cell of one letter, {source(c).strip()!r}")
        if c["cell_type"] != "code": continue
        bad += [f"cell {i} ({c.get('id')}), {s}" for s in long_lines(source(c))]
        if UNSEEN.search(source(c)): continue
        text = "\n".join("" if DIRECTIVE.match(s) else s for s in source(c).splitlines())
        bad += [f"cell {i} ({c.get('id')}), shown: {s}" for s in long_lines(text, shown)
                if f"cell {i} ({c.get('id')}), {s}" not in bad]
    return bad

def long_lines(text:str, limit:int=LIMITS["line"]) -> list[str]:
    "Lines that are cut at the margin, one message each"
    found = [(i, s) for i, s in enumerate(text.splitlines(), 1) if len(s) > limit]
    return [f"line {i}: {len(s)} characters: {s.strip()[:60]}" for i, s in found]

@pytest.mark.parametrize("nb", notebooks(), ids=str)
def test_cells_and_lines_of_a_notebook(nb):
    limit = LIMITS["kernel_cell" if nb.parts[0] == "kernels" else "cell"]
    bad = cell_problems(load(nb), limit)
    assert not bad, f"nbs/{nb}\n" + "\n".join(bad)

def test_most_cells_are_short():
    lengths = [len(code_lines(c)) for nb in notebooks() for _, c in exported(load(nb))]
    median = statistics.median(lengths)
    assert median <= LIMITS["median_cell"], f"median of {len(lengths)} exported cells: {median} lines"

@pytest.mark.parametrize("path", sorted((ROOT/"tests").glob("*.py")), ids=lambda p: p.name)
def test_lines_of_tests(path):
    bad = long_lines(path.read_text(encoding="utf-8"))
    assert not bad, f"{path.name}\n" + "\n".join(bad)

# ---- modules and rooms

def module_lines(lib:Path) -> dict[str, int]:
    "Path within the package -> number of lines; nbdev's index is no code"
    files = (p for p in lib.rglob("*.py") if p.name != "_modidx.py" and "__pycache__" not in p.parts)
    return {str(p.relative_to(lib)): len(p.read_text(encoding="utf-8").splitlines()) for p in files}

def size_problems(modules:dict[str, int]) -> list[str]:
    "Modules that are too long, and rooms that hold too much of the package"
    bad = [f"{m}: {n} lines, at most {LIMITS['module']}" for m, n in modules.items() if n > LIMITS["module"]]
    rooms = {}
    for m, n in modules.items(): rooms[m.split("/")[0]] = rooms.get(m.split("/")[0], 0) + n
    shares = {room: n/sum(rooms.values()) for room, n in rooms.items()}
    return bad + [f"{room}: {x:.0%} of the package, at most {LIMITS['room']:.0%}"
                  for room, x in shares.items() if x > LIMITS["room"]]

def test_sizes(): assert size_problems(module_lines(ROOT/"okadfa")) == []

# ---- ruff, and the files that no Python program reads

def ruff(*paths, cwd=ROOT):
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", *paths]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)

def test_ruff_has_nothing_to_say():
    pytest.importorskip("ruff")
    r = ruff("tests", "okadfa", "nbs")
    assert r.returncode == 0, r.stdout[-4000:] + r.stderr[-1000:]

@pytest.mark.parametrize("code,rule", [
    ("import json", "F401"), ("def f():\n    x = 1", "F841"), ("def f(a=[]): return a", "B006"),
    ("print(undefined)", "F821"), ("try: pass\nexcept: pass", "E722"), ("x = 1 ", "W291"),
    ("import os, sys\nif os: f = lambda: sys; l = 2", None)])
def test_ruff_finds(tmp_path, code, rule):
    pytest.importorskip("ruff")
    (tmp_path/"pyproject.toml").write_text((ROOT/"pyproject.toml").read_text())
    (tmp_path/"m.py").write_text(code + "\n")
    r = ruff("m.py", cwd=tmp_path)
    assert (r.returncode == 0) if rule is None else rule in r.stdout, r.stdout + r.stderr

def workflow(name:str) -> tuple[dict, list[str]]:
    "A GitHub workflow, and the targets of `make` that it calls; they must be the Makefile's"
    flow = yaml.safe_load((ROOT/".github/workflows"/name).read_text(encoding="utf-8"))
    triggers = flow.get("on", flow.get(True))          # YAML 1.1 reads `on` as true
    assert {"push", "pull_request"} <= set(triggers)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT/"Makefile").read_text(encoding="utf-8"), flags=re.M))
    commands = [step.get("run", "") for job in flow["jobs"].values() for step in job["steps"]]
    called = re.findall(r"\bmake ([a-z-]+)", "\n".join(commands))
    assert set(called) <= targets
    return flow, called

def test_workflow_of_the_tests():
    "It says nothing that the Makefile and the settings do not know"
    flow, called = workflow("test.yml")
    assert "test" in called
    ini = (ROOT/"settings.ini").read_text(encoding="utf-8")
    oldest = re.search(r"min_python = (\S+)", ini)[1], re.search(r"torch>=(\S+)", ini)[1]
    newest = re.search(r"^torch==(\d+\.\d+)", (ROOT/"constraints.txt").read_text(encoding="utf-8"), flags=re.M)[1]
    matrix = flow["jobs"]["test"]["strategy"]["matrix"]["include"]
    assert oldest in {(m["python"], m["torch"]) for m in matrix} and newest in {m["torch"] for m in matrix}

def test_workflow_of_the_site():
    "The pages are built and looked at, with no way around it, before they are published, and only from the main branch"
    flow, called = workflow("site.yml")
    build, publish = flow["jobs"]["build"], flow["jobs"]["publish"]
    assert "docs" in called and any("--need" in step.get("run", "") for step in build["steps"])
    assert publish["needs"] == "build" and "refs/heads/main" in publish["if"]

def test_citation():
    cff = yaml.safe_load((ROOT/"CITATION.cff").read_text(encoding="utf-8"))
    ini = (ROOT/"settings.ini").read_text(encoding="utf-8")
    assert cff["version"] == re.search(r"^version = (\S+)", ini, flags=re.M)[1] and cff["title"] and cff["authors"]
    assert f"## {cff['version']}" in (ROOT/"CHANGELOG.md").read_text(encoding="utf-8").replace("[", "").replace("]", "")

def test_recipes_name_what_is_there():
    "Every path and every dotted name in CONTRIBUTING.md leads somewhere"
    text = (ROOT/"CONTRIBUTING.md").read_text(encoding="utf-8")
    for path in re.findall(r"`((?:nbs|tests|results)/[\w./-]+)`", text): assert (ROOT/path).exists(), path
    for module, name in re.findall(r"`(okadfa(?:\.\w+)+)`: `(\w+)", text):
        tree = ast.parse((ROOT/module.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8"))
        names = {n.name for n in tree.body if hasattr(n, "name")}
        names |= {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
        assert name in names, f"{module} has no {name}"

# ---- the checks themselves find what they are for

def cell(text, kind="code"): return dict(cell_type=kind, id="c1", source=text.splitlines(True))

def notebook(*cells): return dict(cells=list(cells))

@pytest.mark.parametrize("cells,said", [
    ([cell("#| export\n" + "x = 1\n"*41)], "41 exported lines"),
    ([cell("#| exporti\n" + "x = 1\n"*41)], "41 exported lines"),
    ([cell("#| hide\n#| exports\n" + "x = 1\n"*41)], "41 exported lines"), ([cell("s", "markdown")], "one letter"),
    ([cell("x = 1\ny = " + "1"*120)], "line 2: 124 characters"), ([cell('#| fig-cap: "' + "a"*120 + '"')], "line 1"),
    ([cell("#| export\n\n" + "x = 1\n"*40)], None), ([cell("x = 1\n"*90)], None), ([cell("a"*500, "markdown")], None),
    ([cell("x = 1\ny = " + "1"*90)], "shown: line 2: 94 characters"), ([cell("#| exports\ny = " + "1"*90)], None),
    ([cell("#| label: fig-x\n#| code-fold: true\ny = " + "1"*90)], None), ([cell("#| fig-alt: " + "a"*90)], None),
    ([cell("#| exporting = 1\n" + "x = 1\n"*41)], None), ([cell("y = " + "1"*86)], None)])
def test_long_cells_are_found(cells, said):
    bad = cell_problems(notebook(*cells), LIMITS["cell"])
    assert bad == [] if said is None else len(bad) == 1 and said in bad[0], bad

def test_large_modules_and_rooms_are_found():
    small = {f"{room}/a.py": 100 for room in "abcd"}
    assert size_problems(small) == []
    assert size_problems(small | {"a/b.py": 10}) == ["a: 27% of the package, at most 25%"]
    large = {f"{room}/a.py": 401 for room in "abcd"}
    assert size_problems(large) == [f"{name}: 401 lines, at most 400" for name in large]

def test_modules_are_counted(tmp_path):
    for name, n in {"a.py": 3, "room/b.py": 5, "_modidx.py": 900, "room/__pycache__/c.py": 7}.items():
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).write_text("x = 1\n"*n)
    assert module_lines(tmp_path) == {"a.py": 3, "room/b.py": 5}
