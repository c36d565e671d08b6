"`okadfa benchmark compression`: which text a compressor has read, in which order, and how a model's windows advance"
import numpy as np
import pytest, torch
from okadfa.bench.measure import run_benchmark
from okadfa.core import InputError, read_rows
from okadfa.models.checkpoint import load_model, save_model
from okadfa.models.lm import LMConfig, LanguageModel
from okadfa.run import compression
from okadfa.run.compression import CompressionSettings, bits_per_byte
from okadfa.run.data import load_corpus
from okadfa.run.evaluate import evaluate

QUIET = dict(say=lambda line: None)

@pytest.fixture
def texts(tmp_path):
    "Three texts with nothing in common but that train holds test, and valid does not"
    noise = {s: np.random.default_rng(i).bytes(6_000) for i, s in enumerate(("train", "valid", "test"))}
    printable = {s: bytes(32 + b % 90 for b in x) for s, x in noise.items()}
    printable["train"] += printable["test"]
    for split, text in printable.items(): (tmp_path/f"{split}.txt").write_bytes(text)
    return printable

def test_a_compressor_has_read_the_training_text(tmp_path, texts):
    def xz(split):
        rows = run_benchmark("compression", CompressionSettings(data=str(tmp_path), split=split), **QUIET)
        return next(r for r in rows if r["name"] == "xz")
    test, valid = xz("test"), xz("valid")
    assert test["alone"] > 6.4 and test["given_train"] < 0.5       # log2 of 90 letters; it has seen all of it
    assert test["bytes"] == 6_000 and test["train_bytes"] == 12_000
    assert valid["given_train"] > 6.4                              # and nothing of this

def test_what_is_read_and_in_which_order(tmp_path, texts, monkeypatch):
    given = []
    def scribe(data): given.append(data); return len(data)
    monkeypatch.setattr(compression, "COMPRESSORS", dict(scribe=scribe))
    row, = run_benchmark("compression", CompressionSettings(data=str(tmp_path)), **QUIET)
    assert sorted(given) == sorted([texts["test"], texts["train"], texts["train"] + texts["test"]])
    assert row["alone"] == row["given_train"] == 8

def test_the_order_changes_the_figure():
    def miser(data): return len(data.rsplit(b"\n", 1)[-1])                     # pays behind the last line break only
    assert bits_per_byte(miser, b"read\n", b"pay for this") == (8, 8)
    assert bits_per_byte(miser, b"pay for this", b"read\n").given_train == 8*(0 - 12)/5

@pytest.fixture
def checkpoint(tmp_path, texts):
    "A model that listens to its context: weights ten times as large as at the start"
    torch.manual_seed(0)
    model = LanguageModel(LMConfig(d_model=16, n_layers=1, n_heads=2, max_len=32, mixer="softmax", credit="bp"))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1: p.mul_(10)
    save_model(model, tmp_path/"model", tokenizer="bytes")
    return tmp_path/"model"

def test_stride_reaches_the_model(tmp_path, texts, checkpoint, monkeypatch):
    monkeypatch.setattr(compression, "COMPRESSORS", {})
    corpus, (model, _) = load_corpus(str(tmp_path), "bytes"), load_model(checkpoint)
    def measured(stride):
        settings = CompressionSettings(checkpoint, data=str(tmp_path), stride=stride)
        row, = run_benchmark("compression", settings, tmp_path/"rows", **QUIET)
        truth = evaluate(model, corpus.splits["test"], corpus.tokenizer.bos_id, stride=stride)["bits_per_byte"]
        assert abs(row["given_train"] - truth) < 1e-6 and row["stride"] == stride and row["alone"] is None
        return row["given_train"]
    assert abs(measured(None) - measured(8)) > 1e-4          # other contexts, other figures: a stride ignored shows
    assert [r["stride"] for r in read_rows(tmp_path/"rows/compression.jsonl")] == [None, 8]

def test_what_cannot_be_compared_is_refused_first(tmp_path, texts, checkpoint, monkeypatch):
    def work(data): raise AssertionError("a compressor was started")
    monkeypatch.setattr(compression, "COMPRESSORS", dict(work=work))
    for bad in (dict(split="train"), dict(split="dev"), dict(checkpoint=tmp_path/"none")):
        settings = CompressionSettings(**dict(data=str(tmp_path)) | bad)
        with pytest.raises(InputError): run_benchmark("compression", settings)
    with pytest.raises(InputError, match="stride"): CompressionSettings(stride=0)
