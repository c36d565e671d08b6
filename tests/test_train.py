"Training: accumulation, redrawing, the control, what a resumed run and a broken one leave behind"
import dataclasses, json
import pytest, torch
from okadfa.core import InputError, read_rows
from okadfa.dfa.diagnostics import NonFiniteError
from okadfa.models.hub import load_model
from okadfa.models.lm import LMConfig, LanguageModel
from okadfa.run.data import load_corpus
from okadfa.run.train import TrainConfig, train

MODEL = LMConfig(vocab_size=257, d_model=16, n_layers=2, n_heads=2, max_len=32)
RUN = TrainConfig(steps=6, batch_size=4, warmup=1, diag_every=3, lr=1e-2, precision="fp32", weight_decay=0.)

@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    torch.set_num_threads(1)
    d = tmp_path_factory.mktemp("text")
    for s in ("train", "valid"): (d/f"{s}.txt").write_bytes(b"A stitch in time saves nine. Haste makes waste.\n"*60)
    return load_corpus(d, "bytes", d/"cache")

def go(corpus, out, model=MODEL, resume=False, **kw): return train(model, dataclasses.replace(RUN, **kw), corpus, out, resume=resume, progress=False)
def losses(out): return [r["loss"] for r in read_rows(out/"metrics.jsonl") if "loss" in r]

def test_two_halves_make_a_whole_batch(corpus, tmp_path):
    go(corpus, tmp_path/"a", batch_size=4); go(corpus, tmp_path/"b", batch_size=2, grad_accum=2)
    assert torch.allclose(torch.tensor(losses(tmp_path/"a")), torch.tensor(losses(tmp_path/"b")), rtol=1e-4)

def test_seeds_matter_and_repeat(corpus, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)): go(corpus, tmp_path/name, seed=seed)
    assert losses(tmp_path/"a") == losses(tmp_path/"b") != losses(tmp_path/"c")

def test_features_are_redrawn_on_time(corpus, tmp_path):
    go(corpus, tmp_path/"a", redraw_every=2)
    model, _ = load_model(tmp_path/"a")
    assert [int(l.features.draws) for l in model.attention_layers()] == [2, 2]     # before steps 3 and 5

def test_a_learnt_feature_map_learns_and_resumes(corpus, tmp_path, monkeypatch):
    model = dataclasses.replace(MODEL, features="hedgehog", local=True, max_len=96)      # past the chunk that is exact
    go(corpus, tmp_path/"a", model, weight_decay=0.1)
    forward, seen = LanguageModel.forward, []
    def dies(self, *args, **kw):
        seen.extend([1]*self.training)
        if len(seen) == 5: raise MemoryError("the machine went away")
        return forward(self, *args, **kw)
    with monkeypatch.context() as m:
        m.setattr(LanguageModel, "forward", dies)
        with pytest.raises(MemoryError): go(corpus, tmp_path/"b", model, weight_decay=0.1)
    go(corpus, tmp_path/"b", model, weight_decay=0.1, resume=True)
    (a, _), (b, _), start = load_model(tmp_path/"a"), load_model(tmp_path/"b"), LanguageModel(model)
    for (name, p), q, r in zip(a.named_parameters(), b.parameters(), start.parameters()):
        assert torch.equal(p, q), name
        if ".features." in name: assert not torch.equal(p, r), name
    with pytest.raises(InputError, match="redraw_every"): go(corpus, tmp_path/"c", model, redraw_every=2)
    with pytest.raises(InputError, match="features must be"): dataclasses.replace(MODEL, features="derf")
    with pytest.raises(InputError, match="needs mixer='favor'"): dataclasses.replace(MODEL, features="hedgehog", mixer="softmax")

def test_the_control_keeps_lower_blocks(corpus, tmp_path):
    frozen = dataclasses.replace(MODEL, credit="frozen")
    go(corpus, tmp_path/"a", frozen)
    start, (end, _) = LanguageModel(frozen), load_model(tmp_path/"a")
    same = {n: torch.equal(p, q) for (n, p), q in zip(start.named_parameters(), end.parameters())}
    assert all(v for n, v in same.items() if n.startswith("blocks.0.")) and not any(v for n, v in same.items() if n.startswith("blocks.1.") and n.endswith("weight"))

@pytest.mark.parametrize("kw", [dict(feedback="gaussian"), dict(feedback="gaussian", error_site="logits"), dict(rounds=1), dict(checkpoint=True),
                                dict(embedding_credit="none"), dict(mixer="softmax"), dict(token_shift=False), dict(m=8),
                                dict(features="hedgehog"), dict(features="hedgehog", local=True, rounds=1), dict(features="sobol"),
                                dict(mixer="spectral"), dict(mixer="spectral", credit="bp"), dict(mixer="spectral+softmax", rounds=1), dict(mixer="favor+spectral", local=True, half_round=True)])
def test_every_choice_trains(corpus, tmp_path, kw):
    s = go(corpus, tmp_path/"a", dataclasses.replace(MODEL, **kw), steps=12)
    assert losses(tmp_path/"a")[-1] < losses(tmp_path/"a")[0] - 0.3 and 0 < s["grad_cosine"] < 1 + 1e-9

def test_a_hybrid_keeps_its_lower_blocks_frozen(corpus, tmp_path):
    frozen = dataclasses.replace(MODEL, mixer="softmax+spectral", credit="frozen")
    go(corpus, tmp_path/"a", frozen, ortho=1., ortho_warmup=0)                     # the only attention is in the block that must not learn
    for (name, p), q in zip(LanguageModel(frozen).named_parameters(), load_model(tmp_path/"a")[0].parameters()):
        if name.startswith("blocks.0."): assert torch.equal(p, q), name
    with pytest.raises(InputError, match="mixer must be"): dataclasses.replace(MODEL, mixer="spectral+conv")
    with pytest.raises(InputError, match="at least 3 blocks"): dataclasses.replace(MODEL, mixer="spectral+softmax+favor")

def test_bf16(corpus, tmp_path):
    go(corpus, tmp_path/"a", precision="bf16"); go(corpus, tmp_path/"b")
    a, b = losses(tmp_path/"a"), losses(tmp_path/"b")
    assert a != b and abs(a[-1] - b[-1]) < 0.1
    model, _ = load_model(tmp_path/"a"); assert all(p.dtype == torch.float32 for p in model.parameters())

def test_penalty_pulls_and_zero_only_measures(corpus, tmp_path):
    a, b = go(corpus, tmp_path/"a", ortho=1., ortho_warmup=0, steps=40), go(corpus, tmp_path/"b", ortho=0., steps=40)
    assert a["violation_mean"] < 0.5*b["violation_mean"]
    assert all(r["ortho_loss"] == 0 for r in read_rows(tmp_path/"b"/"metrics.jsonl") if "loss" in r)

@pytest.mark.parametrize("where", ["weights", "gradient", "diagnostics"])
def test_nan_stops_the_run_and_names_itself(corpus, tmp_path, monkeypatch, where):
    from okadfa.run import train as module
    if where == "weights": monkeypatch.setattr(LanguageModel, "forward", lambda self, *a, _f=LanguageModel.forward, **k: _f(self, *a, **k) + (float("inf") if self.training else 0))
    if where == "gradient":
        init = LanguageModel.__init__
        def poisoned(self, c): init(self, c); self.norm.weight.register_hook(lambda g: g*float("nan") if self.training else g)
        monkeypatch.setattr(LanguageModel, "__init__", poisoned)
    if where == "diagnostics":
        diagnose = module.diagnose
        monkeypatch.setattr(module, "diagnose", lambda *a, _n=[0]: (_n.__setitem__(0, _n[0] + 1), diagnose(*a) | (dict(attn_sim=dict(layer1=float("nan"))) if _n[0] > 1 else {}))[1])
    says = dict(weights="loss is inf at step 1", gradient="grad_norm is nan at step 1", diagnostics="attn_sim.layer1 is nan at step 3")[where]
    with pytest.raises(NonFiniteError, match=says): go(corpus, tmp_path/"a")
    monkeypatch.undo()
    model, info = load_model(tmp_path/"a")
    assert info["step"] == 0 and all(p.isfinite().all() for p in model.parameters()) and not (tmp_path/"a"/"summary.json").exists()

def test_evaluation_on_the_way(corpus, tmp_path):
    go(corpus, tmp_path/"a", eval_every=2)
    assert [r["step"] for r in read_rows(tmp_path/"a"/"metrics.jsonl") if "valid/bits_per_byte" in r] == [2, 4, 6]

def test_wandb_asked_for_but_not_there(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("okadfa.run.train.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install wandb"): train(MODEL, RUN, corpus, tmp_path/"a", wandb=True, progress=False)
    assert not (tmp_path/"a").exists()

def test_run_json_says_what_the_run_was(corpus, tmp_path):
    go(corpus, tmp_path/"a")
    run, config = (json.loads((tmp_path/"a"/f).read_text()) for f in ("run.json", "checkpoint/config.json"))
    assert run["facts"]["model"] == dataclasses.asdict(MODEL) == config["model"] and run["facts"]["train"]["lr"] == 1e-2
    assert run["provenance"]["torch"] and config["step"] == 6 and config["seq_len"] == 32
