"Shared by all test files: where the repository is, its notebooks, and a throw-away copy of it"
import json, os, re, shutil, subprocess
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT/"nbs"
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "runs", "_docs", "_proc", "__pycache__", "*.egg-info",
                                  ".ipynb_checkpoints", ".pytest_cache", "build", "dist", ".cache")

def notebooks() -> list[Path]:
    "Every notebook, relative to nbs/, by the rule nbdev follows: names that start with `.` or `_` do not count"
    found = (p.relative_to(NBS) for p in NBS.rglob("*.ipynb"))
    return sorted(p for p in found if not any(part[0] in "._" for part in p.parts))

def load(nb:Path) -> dict: return json.loads((NBS/nb).read_text(encoding="utf-8"))

def source(cell:dict) -> str: return "".join(cell["source"])

def copy_repo(dst:Path) -> Path:
    "Copy what git would keep (tracked, or untracked and not ignored), as on disk; without git, all but built folders"
    try:
        listing = ["git", "-C", str(ROOT), "ls-files", "-coz", "--exclude-standard"]
        r = subprocess.run(listing, capture_output=True, text=True)
        # A folder that merely lies inside someone else's repository has none of its files listed.
        names = r.stdout.split("\0")[:-1] if r.returncode == 0 else []
    except FileNotFoundError: names = []
    if not names: return Path(shutil.copytree(ROOT, dst, symlinks=True, ignore=LEFT_OUT))
    for name in names:
        src, to = ROOT/name, dst/name
        if not os.path.lexists(src): continue   # deleted in the working tree, still in the index
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(src, to, follow_symlinks=False)
    return dst

def clean_env(root:Path) -> dict:
    "Environment of a subprocess that must import the okadfa of `root`; nbdev does nothing while IN_TEST is set"
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    return env | dict(PYTHONPATH=str(root), PYTHONDONTWRITEBYTECODE="1")

def byte_pairs(folder:Path, texts:list[str], size:int) -> Path:
    "A new folder with a small vocabulary in GPT-2's two files"
    from tokenizers import ByteLevelBPETokenizer
    tok = ByteLevelBPETokenizer()
    tok.train_from_iterator(texts, vocab_size=size, special_tokens=["<|endoftext|>"], show_progress=False)
    folder.mkdir(); tok.save_model(str(folder))
    return folder

@pytest.fixture
def repo_copy(tmp_path): return copy_repo(tmp_path/"repo")

@pytest.fixture
def seeded():
    "Seed, and one thread: tiny products are slower on several"
    import torch
    torch.manual_seed(0); threads = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

@pytest.fixture(autouse=True)
def quick_pictures(request, monkeypatch):
    "Pictures are composed, not drawn: drawing is half the time of a tiny run. Tests marked `pictures` draw them"
    if request.node.get_closest_marker("pictures") or not WITH_PICTURES.search(request.node.nodeid): return
    from matplotlib.figure import Figure
    monkeypatch.setattr(Figure, "savefig", lambda self, fname, **kw: Path(fname).write_bytes(b"a picture"))

WITH_PICTURES = re.compile(r"test_(train|ablate|cli|plugin)\.py")      # the files of tests that train

def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a CUDA device; `make gpu` runs these")
    config.addinivalue_line("markers", "pictures: draws its pictures, which other tests only compose")
