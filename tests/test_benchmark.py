"The runner, the meter, and what the benchmarks of head, memory, pipeline, spectral mixing and estimators write"
import os
from dataclasses import dataclass
import pytest, torch
from forked import forked_workers    # noqa: F401
from okadfa.bench import head, measure, memory, pipeline, spectral
from okadfa.bench.head import HeadSettings
from okadfa.bench.measure import (BENCHMARKS, Benchmark, check_not_empty, check_positive, cpu_threads, peak_growth,
    peak_memory, peak_memory_bytes, register_benchmark, reset_peak_memory, run_benchmark)
from okadfa.bench.memory import StepSettings
from okadfa.bench.pipeline import PipelineSettings
from okadfa.bench.spectral import SpectralSettings
from okadfa.core import InputError, option, read_rows
from okadfa.models.head import linear_cross_entropy
from okadfa.models.checkpoint import save_model
from okadfa.models.lm import LMConfig, LanguageModel
from okadfa.run import estimators
from okadfa.run.estimators import EstimatorSettings

@pytest.fixture(autouse=True)
def one_thread():
    "Tiny tensors: a pool of threads would only wait for itself"
    with cpu_threads(1): yield

# ---- the runner, with a benchmark that lives here

@dataclass(frozen=True)
class CountSettings:
    top:int = option(3, "how far to count", flag="--count-to")
    words:tuple[str,...]|None = option(None, "what to say", choices=("odd", "even"))
    def __post_init__(self): check_positive(self, "top"); check_not_empty(self, "words")

def count_rows(settings, say):
    for i in range(settings.top):
        if i == 2: say("two is left out"); continue
        if i == 4: raise RuntimeError("four is too much")
        yield dict(kind="count", i=i)

@pytest.fixture
def counting():
    shown = []
    register_benchmark("count", Benchmark(CountSettings, count_rows, shown.extend, "Count."))
    yield shown
    del BENCHMARKS["count"]

def test_a_benchmark_from_outside(tmp_path, counting):
    said = []
    rows = run_benchmark("count", CountSettings(), tmp_path/"new", said.append)
    assert [r["i"] for r in rows] == [0, 1] and said == ["two is left out"]
    assert read_rows(tmp_path/"new/count.jsonl") == rows and rows[0]["provenance"]["torch"] == torch.__version__
    BENCHMARKS.find("count").show(rows); assert counting == rows
    plain = run_benchmark("count", CountSettings(), say=said.append)
    assert plain == [dict(kind="count", i=i) for i in (0, 1)]
    run_benchmark("count", CountSettings(top=1), tmp_path/"new", said.append)
    assert len(read_rows(tmp_path/"new/count.jsonl")) == 3                     # appended
    register_benchmark("count", BENCHMARKS["count"]._replace(file="numbers.jsonl"))
    run_benchmark("count", CountSettings(top=1), tmp_path/"other")
    assert [p.name for p in (tmp_path/"other").iterdir()] == ["numbers.jsonl"]

def test_an_interruption_keeps_what_was_measured(tmp_path, counting):
    with pytest.raises(RuntimeError, match="four"):
        run_benchmark("count", CountSettings(top=9), tmp_path, lambda line: None)
    assert [r["i"] for r in read_rows(tmp_path/"count.jsonl")] == [0, 1, 3]

def test_out_must_be_a_folder(tmp_path, counting):
    (tmp_path/"file").write_text("keep")
    with pytest.raises(InputError, match="not a folder"): run_benchmark("count", CountSettings(), tmp_path/"file")
    assert (tmp_path/"file").read_text() == "keep"
    with pytest.raises(InputError, match="unknown benchmark 'sum'"): run_benchmark("sum", CountSettings())

def test_settings_refuse():
    with pytest.raises(InputError, match="count-to must be at least 1, got 0"): CountSettings(top=0)
    with pytest.raises(InputError, match="words must be some of odd, even, got none"): CountSettings(words=())

@pytest.mark.parametrize("make, bad", [
    (HeadSettings, [dict(dtype="int8"), dict(chunks=()), dict(n=0), dict(repeats=0)]),
    (StepSettings, [dict(repeats=0), dict(n_layers=0), dict(mixer="none"), dict(feedback="none")]),
    (PipelineSettings, [dict(microbatches=(3,)), dict(microbatches=(8,)), dict(microbatches=()), dict(sizes=(1, 1, 1)),
                        dict(sizes=(2, 2)), dict(stages=4), dict(repeats=0), dict(device="tpu")]),
    (SpectralSettings, [dict(what=("layers",)), dict(what=()), dict(n=(0,)), dict(n=()), dict(variants=("flash",)),
                        dict(d=30, heads=4), dict(repeats=0), dict(device="tpu")])])
def test_every_benchmark_refuses_before_it_measures(make, bad):
    sizes = dict(n_layers=3, b=4) if make is PipelineSettings else {}
    make(**sizes | (dict(microbatches=(2,)) if sizes else {}))
    for wrong in bad:
        with pytest.raises(InputError) as e: make(**sizes | wrong)
        assert "\n" not in str(e.value)

# ---- the meter

def test_peak_memory_of_a_child():
    held = torch.ones(2**26)   # 256 MB resident in the parent
    del held
    assert abs(peak_memory(lambda: torch.ones(2**24), "cpu") - 2**26) < 2**23
    # 8 MB blocks that the parent freed but still owns would be filled again by the child and counted as nothing
    held = torch.ones(7*2**20); del held; held = [torch.ones(2**21) for _ in range(6)]; del held
    assert abs(peak_memory(lambda: [torch.ones(2**21) for _ in range(4)], "cpu") - 2**25) < 2**23
    with pytest.raises(RuntimeError, match="IndexError"): peak_memory(lambda: [][0], "cpu")
    with pytest.raises(RuntimeError, match="without a result"): peak_memory(lambda: os._exit(1), "cpu")

def test_one_mark_for_every_meter(monkeypatch):
    held = torch.ones(2**26); del held             # a peak that must be forgotten
    assert peak_memory_bytes("cpu") > 2**28
    if reset_peak_memory("cpu"):
        before = peak_memory_bytes("cpu")
        held = torch.ones(2**25); del held
        assert abs(peak_memory_bytes("cpu") - before - 2**27) < 2**23
        assert abs(peak_growth(lambda: torch.ones(2**24), "cpu") - 2**26) < 2**23
    monkeypatch.setattr(measure, "reset_peak_memory", lambda device=None: False)
    assert peak_growth(lambda: torch.ones(2**24), "cpu") is None

# ---- rows

def test_head(tmp_path, monkeypatch):
    small = dict(n=40, d=4, vocab=50)
    rows = run_benchmark("head", HeadSettings(**small, chunks=(8, 16), dtype="bfloat16", repeats=2), tmp_path)
    assert [r["chunk"] for r in rows] == [None, 16, 8, 16] and all(r["ok"] for r in rows)
    assert rows[0]["ratio"] == dict(median=1, q1=1, q3=1) and read_rows(tmp_path/"head.jsonl") == rows
    head.show_head(rows)
    # a wrong gradient with the right loss: no time, no memory
    def wrong(h, w, t, chunk): return linear_cross_entropy(h, w, t, chunk) + 0.01*(w.sum() - w.detach().sum())
    monkeypatch.setattr(head, "linear_cross_entropy", wrong)
    rows = run_benchmark("head", HeadSettings(**small, chunks=(8,), repeats=1))
    assert [r["ok"] for r in rows] == [True, True, False] and "gradient of weight" in rows[-1]["failure"]
    assert not {"seconds", "ratio", "peak_bytes"} & rows[-1].keys()
    head.show_head(rows)

def test_memory(tmp_path, capsys, forked_workers):
    small = StepSettings(n_layers=2, d=64, n=128, b=8, vocab=20, repeats=1, timeout=200)
    rows = run_benchmark("memory", small, tmp_path)
    assert [r["rule"] for r in rows] == ["bp", "bp", "dfa", "dfa", "dfa", "dfa"] and all(r["ok"] for r in rows)
    assert rows[0]["ratio"] == rows[1]["ratio_checkpointed"] == 1 and len(read_rows(tmp_path/"memory.jsonl")) == 6
    memory.show_memory(rows); assert "DFA unlocked, recomputed" in capsys.readouterr().out

def test_a_peak_too_small_to_be_seen_has_no_ratio():
    peaks = {"BP": 0., "BP, checkpointed": 4., "DFA hook": 8.}
    rows = {name: dict(ok=True, peak_bytes=dict(median=x)) for name, x in peaks.items()}
    rows["wrong"] = dict(ok=False)
    memory._add_ratios(rows)
    assert not any("ratio" in row for row in rows.values())
    assert rows["DFA hook"]["ratio_checkpointed"] == 2 and rows["wrong"] == dict(ok=False)

def test_pipeline(tmp_path, capsys, forked_workers):
    small = PipelineSettings(microbatches=(2,), n_layers=3, d=16, n=9, b=4, vocab=20, repeats=2, timeout=200)
    rows = run_benchmark("pipeline", small, tmp_path)
    assert [r["variant"] for r in rows] == ["bp", "torch GPipe", "torch 1F1B", "dfa"]    # too few blocks for pieces
    assert all(r["ok"] and r["sizes"] == [2, 1] and r["pieces"] == [] for r in rows)
    assert (tmp_path/"pipeline.jsonl").read_text().count("\n") == 4
    bp, *rivals, dfa = rows
    faster = min((bp, *rivals), key=lambda r: r["seconds"]["median"])
    assert dfa["baseline"] == faster["variant"] and dfa["predicted"] < bp["predicted"]
    pipeline.show_pipeline(rows); assert "torch GPipe" in capsys.readouterr().out

def test_pipeline_with_split_backward_passes(forked_workers):
    "PyTorch's zero-bubble schedules give the whole model's gradients, and are predicted piece by piece"
    small = PipelineSettings(microbatches=(1, 3), n_layers=5, d=16, n=9, b=3, vocab=20, repeats=1, timeout=200)
    rows = run_benchmark("pipeline", small)
    names = "bp", "torch GPipe", "torch 1F1B", "torch ZB looped", "torch ZB-V", "dfa"
    few = [n for n in names if n != "torch 1F1B"]                # it wants as many microbatches as processes
    assert [(r["microbatches"], r["variant"]) for r in rows] == [(1, n) for n in few] + [(3, n) for n in names]
    assert all(r["ok"] and r["error"] < 1e-4 and r["pieces"] == [2, 1, 1, 1] for r in rows)
    for r in rows:
        split = r["variant"].startswith("torch ZB")
        assert ("weight" in r["units"]) == split and len(r["units"]["forward"]) == 2 + 2*split
        assert r["model_error"] == r["predicted"]/r["seconds"]["median"] - 1
        work = [x for k in ("forward", "head", "backward", "input", "weight") for x in r["units"].get(k, [])]
        assert r["predicted"] >= r["microbatches"]*sum(work)/2*(1 - 1e-9)      # two processes at most share it

SPECTRAL = dict(d=32, heads=2, repeats=2, threads=1, device="cpu", variants=("sdpa", "spectral"))

def test_spectral_forward_says_whether_spectra_were_kept(monkeypatch, capsys):
    whats = "layer forward", "layer forward cold", "layer training", "model forward", "model training"
    rows = run_benchmark("spectral", SpectralSettings(n=(40,), what=whats, **SPECTRAL))
    found = {r["what"]: r["spectra"] for r in rows if r["variant"] == "spectral"}
    assert found == {"layer forward": "kept", "layer forward cold": "computed", "layer training": "computed",
                     "model forward": "kept", "model training": "computed"}
    assert all("spectra" not in r and r["speedup"]["median"] == 1 for r in rows if r["variant"] == "sdpa")
    spectral.show_spectral(rows); out = capsys.readouterr().out
    assert "layer forward cold" in out and "kept" in out
    # a cold time that is none is told by its row
    monkeypatch.setattr(spectral.SpectralMixing, "train", torch.nn.Module.train)
    row = run_benchmark("spectral", SpectralSettings(n=(40,), what=("layer forward cold",), **SPECTRAL))[-1]
    assert row["spectra"] == "kept"

def test_a_spectral_layer_that_leaks_has_no_time(monkeypatch):
    right = spectral.SpectralMixing.forward
    monkeypatch.setattr(spectral.SpectralMixing, "forward", lambda self, x: right(self, x) + 1e-3*x.flip(1))
    sdpa, wrong = run_benchmark("spectral", SpectralSettings(n=(40,), what=("layer forward",), **SPECTRAL))
    assert sdpa["check"] == "ok" and "editing the future" in wrong["check"] and "seconds" not in wrong

def test_naive_attention_is_left_out_in_one_line(monkeypatch):
    monkeypatch.setattr(spectral, "LARGEST_MATRIX", 2*40*40*4)
    said, sizes = [], SPECTRAL | dict(variants=("sdpa", "naive"))
    settings = SpectralSettings(n=(40, 41), what=("layer forward", "layer training"), **sizes)
    rows = run_benchmark("spectral", settings, say=said.append)
    assert [(r["what"], r["n"]) for r in rows if r["variant"] == "naive"] == [("layer forward", 40)]
    assert len(said) == 3 and said[0].startswith("naive attention is left out of layer forward at n = 41")

# ---- estimators on a model

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    sizes = dict(d_model=32, n_layers=2, n_heads=2, max_len=32)
    save_model(LanguageModel(LMConfig(**sizes, mixer="softmax", credit="bp")), folder)
    return folder

def test_estimators(tmp_path, checkpoint):
    said, names = [], ("favor+", "trig", "derf", "hedgehog")
    settings = EstimatorSettings(checkpoint, names=names, m=32, steps=3, texts=8)
    rows = run_benchmark("estimators", settings, tmp_path, said.append)
    assert [r["name"] for r in rows] == list(names) and len(said) == 4
    assert read_rows(tmp_path/"estimators.jsonl") == rows
    assert [r["steps"] for r in rows] == [None, None, None, 3]
    every = {"causal", "local", "many"}
    assert [set(r["readings"]) for r in rows] == [every, every - {"local"}, every, every]
    for bad in (dict(names=("linear",)), dict(names=()), dict(texts=3), dict(steps=-1), dict(m=0)):
        with pytest.raises(InputError): EstimatorSettings(checkpoint, **bad)

def test_estimators_fit_on_train_and_are_judged_on_valid(monkeypatch, tmp_path, checkpoint):
    for split, byte in dict(train=b"a", valid=b"b", test=b"c").items(): (tmp_path/f"{split}.txt").write_bytes(byte*200)
    asked, fitted, judged = [], [], []
    look, cosine = estimators.queries_and_keys, estimators.row_cosine
    def spied_look(model, ids): asked.append((set(ids.flatten().tolist()), len(ids))); return look(model, ids)
    def spied_fit(name, f, q, k, steps, **how): fitted.append(len(q))
    def spied_cosine(q, k, f, **how): judged.append(len(q)); return cosine(q, k, f, **how)
    for name, f in dict(queries_and_keys=spied_look, fit_features=spied_fit, row_cosine=spied_cosine).items():
        monkeypatch.setattr(estimators, name, f)
    settings = EstimatorSettings(checkpoint, data=str(tmp_path), names=("favor+",), m=8, texts=16)
    run_benchmark("estimators", settings, say=lambda line: None)
    assert asked == [({ord("a")}, 16), ({ord("b")}, 8)]
    assert fitted == [16, 16, 16, 16, 4, 4] and judged == [8, 8, 8, 8, 2, 2]       # many keys: four texts side by side
