"Training: accumulation, redrawing, the control, what a resumed run and a broken one leave behind"
import dataclasses, json, pickle, shutil
from pathlib import Path
import pytest, torch
from okadfa.core import InputError, read_rows
from okadfa.dfa.diagnostics import NonFiniteError
from okadfa.models.checkpoint import load_model
from okadfa.models.lm import LMConfig, LanguageModel
from okadfa.run.data import load_corpus
from okadfa.run.train import TrainConfig, lr_factor, train

MODEL = LMConfig(vocab_size=257, d_model=16, n_layers=2, n_heads=2, max_len=32)
RUN = TrainConfig(steps=6, batch_size=4, warmup=1, diag_every=3, lr=1e-2, precision="fp32", weight_decay=0.)

@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    torch.set_num_threads(1)
    d = tmp_path_factory.mktemp("text")
    for s in ("train", "valid"): (d/f"{s}.txt").write_bytes(b"A stitch in time saves nine. Haste makes waste.\n"*60)
    return load_corpus(d, "bytes", d/"cache")

def go(corpus, out, model=MODEL, resume=False, **kw):
    return train(model, dataclasses.replace(RUN, **kw), corpus, out, resume=resume, progress=False)

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
    with pytest.raises(InputError, match="needs mixer='favor'"):
        dataclasses.replace(MODEL, features="hedgehog", mixer="softmax")

def test_the_control_keeps_lower_blocks(corpus, tmp_path):
    frozen = dataclasses.replace(MODEL, credit="frozen")
    go(corpus, tmp_path/"a", frozen)
    start, (end, _) = LanguageModel(frozen), load_model(tmp_path/"a")
    same = {n: torch.equal(p, q) for (n, p), q in zip(start.named_parameters(), end.parameters())}
    assert all(v for n, v in same.items() if n.startswith("blocks.0."))
    assert not any(v for n, v in same.items() if n.startswith("blocks.1.") and n.endswith("weight"))

@pytest.mark.parametrize("kw", [
    dict(feedback="gaussian"), dict(feedback="gaussian", error_site="logits"), dict(rounds=1), dict(checkpoint=True),
    dict(embedding_credit="none"), dict(mixer="softmax"), dict(token_shift=False), dict(m=8),
    dict(features="hedgehog"), dict(features="hedgehog", local=True, rounds=1), dict(features="sobol"),
    dict(mixer="spectral"), dict(mixer="spectral", credit="bp"), dict(mixer="spectral+softmax", rounds=1),
    dict(mixer="favor+spectral", local=True, half_round=True)])
def test_every_choice_trains(corpus, tmp_path, kw):
    s = go(corpus, tmp_path/"a", dataclasses.replace(MODEL, **kw), steps=12)
    assert losses(tmp_path/"a")[-1] < losses(tmp_path/"a")[0] - 0.3 and 0 < s["grad_cosine"] < 1 + 1e-9

def test_a_hybrid_keeps_its_lower_blocks_frozen(corpus, tmp_path):
    frozen = dataclasses.replace(MODEL, mixer="softmax+spectral", credit="frozen")
    # The only attention is in the block that must not learn
    go(corpus, tmp_path/"a", frozen, ortho=1., ortho_warmup=0)
    for (name, p), q in zip(LanguageModel(frozen).named_parameters(), load_model(tmp_path/"a")[0].parameters()):
        if name.startswith("blocks.0."): assert torch.equal(p, q), name
    with pytest.raises(InputError, match="mixer must be"): dataclasses.replace(MODEL, mixer="spectral+conv")
    with pytest.raises(InputError, match="at least 3 blocks"):
        dataclasses.replace(MODEL, mixer="spectral+softmax+favor")

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
    if where == "weights":
        forward = LanguageModel.forward
        def infinite(self, *a, **k): return forward(self, *a, **k) + (float("inf") if self.training else 0)
        monkeypatch.setattr(LanguageModel, "forward", infinite)
    if where == "gradient":
        init = LanguageModel.__init__
        def poisoned(self, c):
            init(self, c)
            self.norm.weight.register_hook(lambda g: g*float("nan") if self.training else g)
        monkeypatch.setattr(LanguageModel, "__init__", poisoned)
    if where == "diagnostics":
        diagnose, calls = module.diagnose, []
        def not_the_first(*a):
            calls.append(a)
            return diagnose(*a) | (dict(attn_sim=dict(layer1=float("nan"))) if len(calls) > 1 else {})
        monkeypatch.setattr(module, "diagnose", not_the_first)
    says = dict(weights="loss is inf at step 1", gradient="grad_norm is nan at step 1",
                diagnostics="attn_sim.layer1 is nan at step 3")[where]
    with pytest.raises(NonFiniteError, match=says): go(corpus, tmp_path/"a")
    monkeypatch.undo()
    model, info = load_model(tmp_path/"a")
    assert info["step"] == 0 and all(p.isfinite().all() for p in model.parameters())
    assert not (tmp_path/"a"/"summary.json").exists()

def test_evaluation_on_the_way(corpus, tmp_path):
    go(corpus, tmp_path/"a", eval_every=2)
    assert [r["step"] for r in read_rows(tmp_path/"a"/"metrics.jsonl") if "valid/bits_per_byte" in r] == [2, 4, 6]

def test_wandb_asked_for_but_not_there(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("okadfa.run.train.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install wandb"):
        train(MODEL, RUN, corpus, tmp_path/"a", wandb=True, progress=False)
    assert not (tmp_path/"a").exists()

def test_run_json_says_what_the_run_was(corpus, tmp_path):
    go(corpus, tmp_path/"a")
    run, config = (json.loads((tmp_path/"a"/f).read_text()) for f in ("run.json", "checkpoint/config.json"))
    assert run["facts"]["model"] == dataclasses.asdict(MODEL) == config["model"] and run["facts"]["train"]["lr"] == 1e-2
    assert run["provenance"]["torch"] and config["step"] == 6 and config["seq_len"] == 32

# ---- what reaches the optimiser

@pytest.fixture
def updates():
    "Gradient norm and learning rates of every update, as the optimiser gets them"
    from torch.optim.optimizer import register_optimizer_step_pre_hook
    seen = []
    def look(opt, *_):
        gradients = [p.grad.flatten() for g in opt.param_groups for p in g["params"] if p.grad is not None]
        if gradients: seen.append((torch.cat(gradients).norm().item(), {g["lr"] for g in opt.param_groups}))
    handle = register_optimizer_step_pre_hook(look)
    yield seen
    handle.remove()

@pytest.mark.parametrize("clip,accum", [(0.1, 1), (0.1, 2), (100., 1)])
def test_the_gradient_is_clipped_before_the_update(corpus, tmp_path, updates, clip, accum):
    go(corpus, tmp_path/"a", clip=clip, grad_accum=accum)
    arrived = [norm for norm, _ in updates]
    measured = [r["grad_norm"] for r in read_rows(tmp_path/"a"/"metrics.jsonl") if "grad_norm" in r]
    assert len(arrived) == 6 and min(measured) > 0.15                # the norm that is written down is the one before
    assert arrived == pytest.approx([min(clip, x) for x in measured], rel=1e-3)

def test_learning_rates_are_those_of_a_schedule(corpus, tmp_path, updates):
    go(corpus, tmp_path/"a", lr=3e-3, warmup=3)
    c = dataclasses.replace(RUN, lr=3e-3, warmup=3)
    opt = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=c.lr)
    schedule, want = torch.optim.lr_scheduler.LambdaLR(opt, lambda s: lr_factor(s, c)), []
    given = [lrs for _, lrs in updates]
    for _ in range(6): want.append(schedule.get_last_lr()[0]); opt.step(); schedule.step()
    assert given == [{lr} for lr in want]
    assert [r["lr"] for r in read_rows(tmp_path/"a"/"metrics.jsonl") if "lr" in r] == want

# ---- checkpoints of strangers

class Trap:
    "Writes a file when it is unpickled"
    def __init__(self, path): self.path = path
    def __reduce__(self): return Path.touch, (self.path,)

@pytest.fixture(scope="module")
def stopped(corpus, tmp_path_factory):
    "A run that was stopped after three of its six steps, and the weights of one that was not"
    out, forward, calls = tmp_path_factory.mktemp("stopped"), LanguageModel.forward, []
    go(corpus, out/"whole")
    def dies(self, *args, **kw):
        calls.extend([1]*self.training)
        if len(calls) == 5: raise MemoryError("the machine went away")
        return forward(self, *args, **kw)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(LanguageModel, "forward", dies)
        with pytest.raises(MemoryError): go(corpus, out/"run")
    return out

def same_weights(a, b):
    return all(torch.equal(p, q) for p, q in zip(load_model(a)[0].parameters(), load_model(b)[0].parameters()))

OPENED, IGNORED = ("optimizer.bin", "random_states_0.pkl"), ("custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl",
    "scheduler.bin", "sampler.bin", "dl_state_dict.bin", "scaler.pt", "pytorch_model.bin", "optimizer_1.bin")

@pytest.mark.parametrize("form", ["torch", "pickle"])
@pytest.mark.parametrize("name", [*OPENED, *IGNORED])
def test_resuming_runs_nothing_that_is_in_a_checkpoint(corpus, tmp_path, stopped, name, form):
    run = shutil.copytree(stopped/"run", tmp_path/"run")
    bad, sprung = run/"checkpoint"/name, tmp_path/"sprung"
    if form == "torch": torch.save(dict(step=Trap(sprung)), bad)
    else: bad.write_bytes(pickle.dumps(Trap(sprung), protocol=2))
    if name in OPENED:
        before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
        with pytest.raises(InputError, match=name) as e: go(corpus, run, resume=True)
        assert "\n" not in str(e.value) and {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    else:
        go(corpus, run, resume=True)
        assert same_weights(run, stopped/"whole")
    assert not sprung.exists()

def test_weights_are_read_from_safetensors_only(corpus, tmp_path, stopped):
    run = shutil.copytree(stopped/"run", tmp_path/"run")
    (run/"checkpoint"/"model.safetensors").unlink()
    torch.save(Trap(tmp_path/"sprung"), run/"checkpoint"/"pytorch_model.bin")
    with pytest.raises(InputError, match="model.safetensors"): go(corpus, run, resume=True)
    assert not (tmp_path/"sprung").exists()

def test_a_checkpoint_with_a_stored_schedule_is_resumed(corpus, tmp_path, stopped):
    "As they were written before: the schedule's state in a file of its own, and initial_lr in the optimiser's"
    run = shutil.copytree(stopped/"run", tmp_path/"run")
    folder = run/"checkpoint"
    state = torch.load(folder/"optimizer.bin", weights_only=True)
    for g in state["param_groups"]: g |= dict(initial_lr=RUN.lr, lr=RUN.lr*lr_factor(3, RUN))
    torch.save(state, folder/"optimizer.bin")
    schedule = dict(base_lrs=[RUN.lr]*2, last_epoch=3, _step_count=4, lr_lambdas=[None, None])
    torch.save(schedule, folder/"custom_checkpoint_0.pkl")
    go(corpus, run, resume=True)
    assert same_weights(run, stopped/"whole")
    names = ["config.json", "model.safetensors", "optimizer.bin", "random_states_0.pkl"]
    assert sorted(p.name for p in folder.iterdir()) == names            # the next checkpoint has no such file

@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"step": -1}', '{"step": 7}', '{"step": "3"}'])
def test_a_damaged_config_is_one_line(corpus, tmp_path, stopped, content):
    run = shutil.copytree(stopped/"run", tmp_path/"run")
    (run/"checkpoint"/"config.json").write_text(content)
    with pytest.raises(InputError, match="not a checkpoint of this run") as e: go(corpus, run, resume=True)
    assert "\n" not in str(e.value)

def test_weights_of_another_model_are_one_line(corpus, tmp_path, stopped):
    run = shutil.copytree(stopped/"run", tmp_path/"run")
    from okadfa.models.checkpoint import save_model
    save_model(LanguageModel(dataclasses.replace(MODEL, d_model=32)), run/"checkpoint", step=3)
    with pytest.raises(InputError, match="not a checkpoint of this run") as e: go(corpus, run, resume=True)
    assert "\n" not in str(e.value) and len(str(e.value)) < 400

def test_no_folder_is_not_the_default_folder(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for out in ("", " "):
        with pytest.raises(InputError, match="out is empty"): go(corpus, out)
    assert not list(tmp_path.iterdir())
