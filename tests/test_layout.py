"Every line of code has its room: import direction, light imports, numbering, names, documented names"
import ast, configparser, re, subprocess, sys
from pathlib import Path
import pytest
from conftest import NBS, ROOT, clean_env, load, notebooks, source

LIB = ROOT/"okadfa"
BELOW = dict(core=(), processes=("core",), options=("core",), kernels=("core",), attention=("core", "kernels"),
             spectral=("core", "kernels"), dfa=("core", "processes"))
BELOW["models"] = tuple(BELOW)
BELOW["extend"] = tuple(BELOW)       # what stands for code that is not ours
BELOW["bench"] = tuple(r for r in BELOW if r != "extend")
BELOW["probe"] = tuple(r for r in BELOW if r != "extend")
BELOW["run"] = tuple(BELOW)
HEAVY = "transformers datasets matplotlib triton accelerate tensorboard".split()
NOT_NEEDED = "nbdev fastcore IPython".split()   # they build the package, they are no part of it

def modules(lib:Path=LIB) -> list[Path]: return sorted(p for p in lib.rglob("*.py") if "__pycache__" not in p.parts)

def dotted(path:Path, lib:Path=LIB) -> str:
    parts = (lib.name, *path.relative_to(lib).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

# ---- import direction

def called(n:ast.Call) -> str:
    "The name of what is called, or the last part of it"
    return getattr(n.func, "attr", getattr(n.func, "id", ""))

def imported(path:Path, lib:Path=LIB) -> list[tuple[int, str]]:
    "(line, dotted name) of everything of the package that a module imports, at its top or inside functions"
    here, out = dotted(path, lib).split("."), []
    package = here if path.name == "__init__.py" else here[:-1]
    for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(n, ast.Import): names = [a.name for a in n.names]
        elif isinstance(n, ast.ImportFrom):
            base = ".".join(package[:len(package) - n.level + 1] * bool(n.level) + [n.module] * bool(n.module))
            names = [f"{base}.{a.name}" for a in n.names]
        elif isinstance(n, ast.Call) and called(n) in ("import_module", "__import__") \
            and n.args and isinstance(n.args[0], ast.Constant): names = [str(n.args[0].value)]
        else: continue
        out += [(n.lineno, x) for x in names if x.split(".")[0] == lib.name]
    return out

def wrong_imports(lib:Path=LIB) -> list[str]:
    bad, folders = [], {p.name for p in lib.iterdir() if p.is_dir()} | {p.stem for p in lib.glob("*.py")}
    for path in modules(lib):
        room = dotted(path, lib).split(".")[1:2]
        if not room or room[0].startswith("_"): allowed = ()   # __init__, _modidx: nothing of the package
        elif room[0] not in BELOW: bad.append(f"{path.relative_to(lib)}: no rule for {room[0]!r}"); continue
        else: allowed = (room[0], *BELOW[room[0]])
        for line, name in imported(path, lib):
            target = name.split(".")[1:2]
            # `from okadfa import __version__` names no room
            if target and target[0] in folders and target[0] not in allowed:
                bad.append(f"{path.relative_to(lib)}:{line} imports {name}; here only {list(allowed)} may be imported")
    return bad

def test_imports_point_one_way(): assert wrong_imports() == []

@pytest.mark.parametrize("where, code, wrong", [
    ("attention/a.py", "from okadfa.spectral.b import x", True),
    ("attention/a.py", "from ..dfa import hook", True),
    ("dfa/a.py", "def f():\n    from ..attention.favor import g", True),
    ("core.py", "from .kernels import favor", True),
    ("core.py", "import okadfa.run.cli", True),
    ("dfa/a.py", "import okadfa.kernels.favor", True),
    ("dfa/a.py", "from .. import spectral", True),
    ("models/a.py", "from ..run.data import d", True),
    ("models/a.py", "import importlib\nimportlib.import_module('okadfa.run.data')", True),
    ("__init__.py", "from .core import seed_everything", True),
    ("loose.py", "import torch", True),
    ("run/a.py", "from ..models.lm import x\nfrom .data import y\nfrom okadfa import __version__", False),
    ("attention/a.py", "from ..kernels.favor import x\nfrom okadfa.core import y\nimport torch, attention", False)])
def test_wrong_imports_are_found(tmp_path, where, code, wrong):
    lib = tmp_path/"okadfa"
    for room in (*BELOW, "run"): (lib/room).mkdir(parents=True, exist_ok=True)
    (lib/where).write_text(code)
    assert bool(wrong_imports(lib)) == wrong

# ---- what an import loads

LOADS = """
import sys, importlib
for name in sys.argv[2:]:
    before = set(sys.modules)
    importlib.import_module(name)
    for heavy in sys.argv[1].split(','):
        if heavy in sys.modules and heavy not in before: print(name, 'loads', heavy)
"""

def loads(names:list[str], root:Path=ROOT) -> list[str]:
    "Which of the modules, imported in this order in a fresh process, is the first to load each heavy package"
    command = [sys.executable, "-c", LOADS, ",".join(HEAVY + NOT_NEEDED), *names]
    r = subprocess.run(command, cwd=root, env=clean_env(root), capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-2000:]
    return r.stdout.splitlines()

# Modules for those who have transformers loaded: their classes derive from its classes, or register with it
THEIRS = "okadfa.models.export", "okadfa.models.hub", "okadfa.models.linearize"

def test_imports_are_light():
    # without _modidx, and _site for the pages
    names = [n for n in map(dotted, modules()) if not n.split(".")[-1].startswith("_")]
    rooms = ["", *BELOW]   # what is imported by others comes first, so that the module to blame is the one named
    names = [n for n in names if n not in THEIRS]
    names.sort(key=lambda n: (rooms.index((n.split(".")[1:2] or [""])[0]), n == "okadfa.run.cli", n))
    assert loads(names) == []

def test_heavy_import_is_found(tmp_path):
    (tmp_path/"light.py").write_text("import json")
    (tmp_path/"heavy.py").write_text("import matplotlib")
    assert loads(["light", "heavy"], tmp_path) == ["heavy loads matplotlib"]

# ---- notebooks and modules

def in_figures(nb:Path) -> bool:
    "Pages that export nothing"
    return nb.parts[0] in ("figures", "use", "learn") or nb.stem in ("glossary", "references")

def directive_lines(nb:Path, words:str) -> list[list[str]]:
    "Words of every directive line that begins with one of `words`"
    code = (source(c) for c in load(nb)["cells"] if c["cell_type"] == "code")
    return [m.split() for s in code for m in re.findall(rf"^\s*#\s*\|\s*((?:{words})\b.*)$", s, flags=re.M)]

def test_numbers_are_unique():
    numbers = [nb.name.split("_")[0] for nb in notebooks() if nb.stem != "index" and not in_figures(nb)]
    assert all(re.fullmatch(r"\d\d", n) for n in numbers), "a notebook's name is two digits, `_` and its module's name"
    twice = sorted({n for n in numbers if numbers.count(n) > 1})
    assert sorted(set(numbers)) == sorted(numbers), f"used twice: {twice}"

def test_folders_have_the_same_names():
    rooms = {nb.parts[0] for nb in notebooks() if len(nb.parts) > 1 and not in_figures(nb)}
    assert rooms == {p.parent.name for p in modules() if p.parent != LIB}

@pytest.mark.parametrize("nb", [nb for nb in notebooks() if nb.stem != "index" and not in_figures(nb)], ids=str)
def test_notebook_exports_to_the_module_of_its_name(nb):
    module = ".".join((*nb.parts[:-1], nb.stem.split("_", 1)[1]))
    assert directive_lines(nb, "default_exp") == [["default_exp", module]]
    assert (LIB/module.replace(".", "/")).with_suffix(".py").exists()
    elsewhere = [d for d in directive_lines(nb, "export|exports|exporti") if len(d) > 1]
    assert not elsewhere, f"exports to another module: {elsewhere}"

def test_figure_notebooks_export_nothing():
    found = {str(nb): directive_lines(nb, "default_exp|export|exports|exporti") for nb in notebooks() if in_figures(nb)}
    assert {nb: d for nb, d in found.items() if d} == {}

def test_settings():
    ini = configparser.ConfigParser()
    ini.read(ROOT/"settings.ini", encoding="utf-8")
    cfg = ini["DEFAULT"]
    assert set(cfg["tst_flags"].split()) == {"notest", "slow", "cuda"}
    assert cfg["nbs_path"] == "nbs" and cfg["lib_path"] == "okadfa"
    # nbdev_docs overwrites README.md from this notebook when it is the newer file; ours is written by hand.
    assert not (NBS/cfg["readme_nb"]).exists()

def test_site_file_is_a_link():
    link = NBS/"_quarto.yml"
    assert link.is_symlink() and str(link.readlink()) == "../_quarto.yml"

# ---- documented names

def undocumented(path:Path) -> list[str]:
    """Public names without a docstring, and parameters that, in a signature of several lines, have neither a comment
    nor a word in the docstring. A signature on one line may speak for itself; a constant has no docstring."""
    text = path.read_text(encoding="utf-8")
    lines, tree, bad = text.splitlines(), ast.parse(text), []
    defs = {n.name: n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))}
    assigned = {getattr(n.targets[0], "id", ""): n.value for n in tree.body if isinstance(n, ast.Assign)}
    names = ast.literal_eval(assigned["__all__"]) if "__all__" in assigned else []
    for name in names:
        n = defs.get(name)
        if n is None: continue
        if not ast.get_docstring(n): bad.append(f"{name}: no docstring")
        f = n
        if isinstance(n, ast.ClassDef): f = next((m for m in n.body if getattr(m, "name", "") == "__init__"), None)
        if f is None: continue
        a = f.args
        args = *a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg
        args = [x for x in args if x and x.arg not in ("self", "cls")]
        if not args or args[-1].lineno == f.lineno: continue
        said = f"{ast.get_docstring(n) or ''} {ast.get_docstring(f) or ''}"
        bad += [f"{name}: no comment on {x.arg}" for x in args
                if "#" not in lines[x.lineno - 1] and not re.search(rf"\b{x.arg}\b", said)]
    return bad

@pytest.mark.parametrize("path", [p for p in modules() if p.stem != "_modidx"], ids=lambda p: str(p.relative_to(LIB)))
def test_public_names_are_documented(path): assert undocumented(path) == []

def test_undocumented_names_are_found(tmp_path):
    path = tmp_path/"m.py"
    path.write_text("__all__ = ['f', 'g', 'C', 'X']\nX = 3\ndef f(a): return a\n"
                    "def g(\n    a:int,   # how many\n    b=2,\n):\n    'Do'\n"
                    "class C:\n    'Thing'\n    def __init__(self, a): pass\ndef _hidden(): pass\n")
    assert undocumented(path) == ["f: no docstring", "g: no comment on b"]

# ---- packaging

def test_setup_gives_all_that_pyproject_leaves_to_it(repo_copy):
    "pyproject.toml, written by nbdev, names dynamic fields; setuptools refuses to install when setup.py forgets one"
    r = subprocess.run([sys.executable, "setup.py", "--version"], cwd=repo_copy, env=clean_env(repo_copy),
                       capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-600:]
    assert r.stdout.split()[-1] == re.search(r'__version__ = "(.*)"', (LIB/"__init__.py").read_text()).group(1)
