"Code that is not ours: a mixer, a rule, a feedback kind, an estimator, a benchmark from one file, by the command line"
import json, subprocess, sys
import pytest
from conftest import ROOT, clean_env
from okadfa.attention.estimators import ESTIMATORS
from okadfa.bench.measure import BENCHMARKS
from okadfa.dfa.feedback import FEEDBACK_KINDS
from okadfa.models.block import MIXERS
from okadfa.models.credit import CREDITS
from okadfa.models.checkpoint import load_model
from test_cli import TINY, bpe, call, private_cache, refused, text    # noqa: F401

NAMES = "zz-average", "zz-top", "zz-hadamard", "zz-relu", "zz-sort"
PLUGIN = '''
from dataclasses import dataclass
import torch
from torch import nn
from okadfa.attention.estimators import Estimator, register_estimator
from okadfa.attention.favor import FeatureMap
from okadfa.bench.measure import Benchmark, paired_times, register_benchmark, spread
from okadfa.core import InputError, option
from okadfa.dfa.feedback import FeedbackKind, register_feedback
from okadfa.models.block import Mixer, register_mixer
from okadfa.models.credit import CreditRule, register_credit

class Average(nn.Module):
    "The mean of all positions so far"
    def __init__(self, d): super().__init__(); self.into, self.out = nn.Linear(d, d), nn.Linear(d, d)
    def writers(self): return [self.out]
    def forward(self, x): return self.out(self.into(x).cumsum(1)/torch.arange(1, x.shape[1] + 1)[:, None])

register_mixer("zz-average", Mixer(lambda config, layer: Average(config.d_model), "running mean"))

class Top(CreditRule):
    "Only the head and the final norm learn"
    title = "head only"
    def learns(self, model): return []
    def loss(self, model, ids, targets, **kw):
        logits = model.norm(model.stream(ids).detach()) @ model.embed.weight.T
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(),
                                           reduction=kw.get("reduction", "mean"))

register_credit("zz-top", Top())

def hadamard(d, d_final, seed, l):
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < max(d, d_final): h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h[:d, :d_final]/d_final**.5

register_feedback("zz-hadamard", FeedbackKind(hadamard, title="Hadamard"))

class Relu(FeatureMap):
    "relu + a little"
    def scaled(self, x, is_query=True): return self.wide(x).relu() + .01, self.wide(x).new_zeros(x.shape[:-1])

register_estimator("zz-relu", Estimator(lambda d, m, seed: Relu(d, d), "relu", local=False, in_model=True))

@dataclass(frozen=True)
class SortSettings:
    "Of the benchmark below"
    n: tuple[int, ...] = option((10, 100), "numbers to sort, a list")
    repeats: int = option(3, "rounds")
    def __post_init__(self):
        if self.repeats < 1: raise InputError(f"repeats must be at least 1, got {self.repeats}")

def sort_rows(settings, say):
    for n in settings.n:
        x = torch.randn(n)
        times = paired_times(dict(sort=lambda: x.sort(), argsort=lambda: x.argsort()), settings.repeats)
        say(f"{n} numbers")
        yield dict(kind="zz-sort", n=n, seconds=spread(times["sort"]), against=spread(times["argsort"]))

register_benchmark("zz-sort", Benchmark(SortSettings, sort_rows, help="Sort numbers, two ways."))
'''

@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    path = tmp_path_factory.mktemp("plug")/"zz_plugin.py"
    path.write_text(PLUGIN)
    yield path
    for table, name in zip((MIXERS, CREDITS, FEEDBACK_KINDS, ESTIMATORS, BENCHMARKS), NAMES): table.pop(name, None)
    sys.modules.pop("zz_plugin", None)

@pytest.mark.parametrize("flags, field, value", [
    ("--mixer zz-average --credit dfa", "mixer", "zz-average"),
    ("--mixer zz-average+softmax --credit zz-top", "credit", "zz-top"),
    ("--feedback zz-hadamard --mixer softmax", "feedback", "zz-hadamard"),
    ("--features zz-relu", "features", "zz-relu")])
def test_a_plugged_in_entry_trains_and_is_evaluated(capsys, tmp_path, text, plugin, flags, field, value):
    run, rows = tmp_path/"run", tmp_path/"rows.jsonl"
    code, out, err = call(capsys, "train", "--plugin", plugin, "--data", text, "--out", run, *TINY, "--steps", 2,
                          *flags.split(), "--results", rows)
    assert code == 0, err
    assert getattr(load_model(run)[0].config, field) == value == json.loads(rows.read_text())["model"][field]
    code, out, err = call(capsys, "evaluate", run, f"--plugin={plugin}", "--json")
    assert code == 0 and json.loads(out)["bits_per_byte"] > 0, err

def test_a_plugged_in_benchmark_measures(capsys, tmp_path, plugin):
    sort = "benchmark", "zz-sort", "--plugin", plugin
    code, out, err = call(capsys, *sort, "--n", "20,30", "--repeats", 2, "--out", tmp_path)
    assert code == 0 and "20 numbers" in out, err
    rows = [json.loads(line) for line in (tmp_path/"zz-sort.jsonl").read_text().splitlines()]
    assert [r["n"] for r in rows] == [20, 30]
    assert all(r["provenance"]["torch"] and r["seconds"]["median"] > 0 for r in rows)
    refused(capsys, tmp_path, *sort, "--repeats", 0, says="repeats must be at least 1")
    refused(capsys, tmp_path, *sort, "--n", "many", says="separated by commas")

def test_a_plugged_in_entry_is_in_help_and_sweeps(capsys, tmp_path, plugin):
    assert "zz-sort" in call(capsys, "benchmark", "--help", "--plugin", plugin)[1]
    # lines are broken at hyphens too
    shown = "".join(call(capsys, "train", "--plugin", plugin, "--help")[1].split())
    for name in ("zz-average", "zz-top", "zz-hadamard", "zz-relu"): assert name in shown, name
    sweeps = "".join(call(capsys, "ablate", "--plugin", plugin, "--help")[1].split())
    for name in ("zz-average", "zz-top", "zz-hadamard", "zz-relu"): assert name in sweeps, name
    assert "zz-relulocal" not in sweeps and "sobollocal" in sweeps

def test_sweeps_train_and_tabulate_it(capsys, tmp_path, text, plugin):
    size = "--n-layers 2 --d-model 16 --n-heads 2 --seq-len 32 --steps 2 --batch-size 2 --warmup 1 --seeds 0".split()
    only = [x for name in ("softmax", "zz-average") for x in ("--only", name)]
    code, out, err = call(capsys, "ablate", "mixers", "--plugin", plugin, *only, *size, "--data", text,
                          "--results", tmp_path/"results", "--runs", tmp_path/"runs")
    assert code == 0 and "running mean" in out, err
    rows = [json.loads(line) for line in (tmp_path/"results"/"ablate.jsonl").read_text().splitlines()]
    assert {r["rule"]: r["title"] for r in rows} == {"softmax": "softmax", "zz-average": "running mean"}

def test_nothing_in_the_package_names_them():
    for path in (ROOT/"okadfa").rglob("*.py"):
        code = path.read_text()
        assert not any(name in code for name in NAMES), path

def test_without_the_plugin_a_checkpoint_of_it_is_refused_in_a_line(capsys, tmp_path, text, plugin):
    env, run = clean_env(ROOT) | dict(XDG_CACHE_HOME=str(tmp_path/"cache")), tmp_path/"run"
    train = "train", "--plugin", plugin, "--data", text, "--out", run, *TINY, "--steps", "1", "--mixer", "zz-average"
    code, out, err = call(capsys, *train)
    assert code == 0, err
    evaluate = [sys.executable, "-m", "okadfa.run.cli", "evaluate", run]       # a process that knows no plug-in
    r = subprocess.run(evaluate, env=env, capture_output=True, text=True)
    assert r.returncode == 2 and r.stderr.count("\n") == 1 and "zz-average" in r.stderr, r.stderr

@pytest.mark.parametrize("name, code, says", [
    ("nowhere", None, "no plug-in"),
    ("zz_broken", "1/0", "ZeroDivisionError"),
    ("json", "x = 1", "name of another module"),
    ("zz_taken", "from okadfa.models.block import *\nregister_mixer('softmax', Mixer(None, 'mine'))", "library's own")])
def test_plugins_that_cannot_be(capsys, tmp_path, name, code, says):
    path = tmp_path/f"{name}.py"
    if code is not None: path.write_text(code)
    refused(capsys, tmp_path, "info", "--plugin", path, says=says)

# ---- empty values: `--data "$UNSET"`

@pytest.mark.parametrize("args", [
    ["train", "--out", "", *TINY],
    ["train", "--out", "run", "--data", ""],
    ["train", "--out", "run", "--data="],
    ["train", "--out", "run", "--tokenizer", ""],
    ["train", "--out", "run", "--preset", ""],
    ["train", "--out", "run", "--steps", ""],
    ["evaluate", ""],
    ["generate", "", "--prompt", "x"],
    ["quantize", "run", "--out", ""],
    ["demo", "--out", ""],
    ["ablate", "--data", ""],
    ["ablate", "--results", ""],
    ["benchmark", "head", "--out", ""],
    ["info", "--plugin", ""]])
def test_an_empty_value_is_refused(capsys, tmp_path, monkeypatch, args):
    monkeypatch.chdir(tmp_path)
    refused(capsys, tmp_path, *args, says="")
    assert not list(tmp_path.glob("*")) or [p.name for p in tmp_path.glob("*")] == ["cache"]

def test_an_empty_value_in_a_config_file_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"c.yaml").write_text('data: ""\n')
    refused(capsys, tmp_path, "train", "--out", "run", "--config", "c.yaml", says="data is empty")

def test_what_is_empty_by_default_may_be_empty(capsys, tmp_path, text):
    run = tmp_path/"run"
    train = "train", "--data", text, "--out", run, *TINY, "--steps", 1
    assert call(capsys, *train, "--mixer", "spectral", "--enhancements", "")[0] == 0
    assert call(capsys, "generate", run, "--prompt", "", "--tokens", 2)[0] == 0
