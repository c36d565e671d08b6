"Whole models: budgets, adapters in ten families, `okadfa linearize`, and what interrupts it"
import copy, json
import pytest, torch
from test_cli import PROSE, call, refused

pytest.importorskip("transformers")
from okadfa.models import adapt as training
from okadfa.models.adapt import Adaptation, Adapted, adapt, adapted_layers
from okadfa.models.budget import mean_nats, replaced, stand_ins
from okadfa.models.linearize import linearize, load_linearized
from test_hub import FULL, REPLACED, linear, text
from test_adopted import make, transformers

transformers.utils.logging.disable_progress_bar()
needs_peft = pytest.mark.skipif(not training.importlib.util.find_spec("peft"), reason="adapters need peft")

@pytest.fixture(autouse=True)
def one_thread(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path/"cache"))
    monkeypatch.setenv("COLUMNS", "200")
    torch.set_num_threads(1)

@pytest.mark.parametrize("kind", REPLACED)
def test_with_no_layer_it_is_the_softmax_model(kind):
    model, ids = linear(kind), text()
    with torch.no_grad():
        whole, soft = model(ids).logits, make(kind, **FULL.get(kind, {}))(ids).logits
        with replaced(model, ()): off = model(ids).logits
        assert torch.allclose(off, soft, atol=1e-12) and not torch.allclose(whole, soft, atol=1e-3)
        assert torch.equal(model(ids).logits, whole)

@needs_peft
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "opt", "mixtral"])
def test_adapters_find_their_layers_and_bring_the_model_nearer(kind):
    model = linear(kind, None)
    names = adapted_layers(model)
    per_layer = 2 if kind in ("gpt2", "gpt_neox") else 4
    assert len(names) == per_layer*len(stand_ins(model)) and not any("okadfa" in name for name in names)
    ids, before = text(4, seed=3), copy.deepcopy(model.state_dict())
    at = torch.arange(39)
    def distance():
        adapted = Adapted(copy.deepcopy(model), Adaptation(lora=1))
        with torch.no_grad(): return training.step_loss(adapted, ids, at, "kl").item()
    start = distance_to(kind, model, ids)
    assert abs(start - distance()) < 1e-9                                   # the teacher is the model that it was
    adapt(model, list(ids.split(1)), Adaptation(lora=4, steps=6, lr=1e-2, positions=1.), progress=False)
    assert distance_to(kind, model, ids) < start
    changed = {k.rpartition(".")[0] for k, x in model.state_dict().items() if not torch.equal(x, before[k])}
    assert changed <= set(names) and model.state_dict().keys() == before.keys()

def distance_to(kind, model, ids):
    with torch.no_grad():
        truth, mine = (m(ids).logits[:, :-1].log_softmax(-1) for m in (make(kind, **FULL.get(kind, {})), model))
    return (truth.exp()*(truth - mine)).sum(-1).mean().item()

@needs_peft
def test_a_loss_that_is_no_number_changes_nothing(monkeypatch):
    model = linear("llama")
    before = copy.deepcopy(model.state_dict())
    def bad(adapted, ids, at, loss): return sum(p.sum() for p in adapted.tensors().values())*float("nan")
    monkeypatch.setattr(training, "step_loss", bad)
    with pytest.raises(training.NonFiniteError, match="step 1"):
        adapt(model, list(text(4).split(1)), Adaptation(lora=2, steps=3), progress=False)
    assert all(torch.equal(x, before[k]) for k, x in model.state_dict().items())

@needs_peft
def test_only_adapters_and_maps_get_gradients():
    model = linear("llama", "hedgehog", steps=2)
    adapted = Adapted(model, Adaptation(lora=2))
    training.step_loss(adapted, text(1), torch.arange(20), "kl").backward()
    got = {id(p) for p in model.parameters() if p.grad is not None}
    assert got == {id(p) for p in adapted.tensors().values()} and adapted.maps and adapted.lora
    adapted.end(keep=False)

@pytest.fixture
def model(tmp_path):
    "A folder with a tiny Llama and its tokenizer"
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast
    tok = ByteLevelBPETokenizer()
    tok.train_from_iterator([PROSE.decode()], vocab_size=300, show_progress=False)
    folder = tmp_path/"model"
    PreTrainedTokenizerFast(tokenizer_object=tok._tokenizer).save_pretrained(folder)
    make("llama", vocab_size=300).float().save_pretrained(folder)
    (tmp_path/"text.txt").write_bytes(PROSE*20)
    return folder

SMALL = "--length 32 --window 5 --sinks 1 --m 8 --fit-tokens 128 --judged 128 --steps 6 --fit-steps 3 --lora 2".split()

def command(model, out, *more): return "linearize", model, out, "--text", model.parent/"text.txt", *SMALL, *more

@pytest.mark.parametrize("flags,says", [
    ("--estimator derp", "estimator must be"),
    ("--budget -1", "budget"),
    ("--m 0", "m must be"),
    ("--length 1", "length"),
    ("--keep 0,x", "keep must be numbers"),
    ("--keep 9", "layer 9"),
    ("--minutes 5", "not both"),
    ("--lora -1", "lora"),
    ("--loss both", "loss must be"),
    ("--text nowhere.txt", "nowhere.txt"),
    ("--valid nowhere.txt", "nowhere.txt"),
    ("--length 100000", "less than one window"),
    ("--lora 0", "--steps has no effect"),
    ("--resume", "nothing to resume")])
def test_bad_flags(capsys, tmp_path, model, flags, says):
    refused(capsys, tmp_path, *command(model, tmp_path/"out"), *flags.split(), says=says)

def test_bad_folders(capsys, tmp_path, model):
    refused(capsys, tmp_path, *command(model, model), says="exists")
    refused(capsys, tmp_path, *command(tmp_path/"none", tmp_path/"out")[:3], says="no model")

@needs_peft
def test_the_command(capsys, tmp_path, model):
    out, results = tmp_path/"out", tmp_path/"results"
    code, said, err = call(capsys, *command(model, out, "--keep", "1", "--budget", "9", "--results", results))
    assert code == 0 and "3 layers replaced" in said, err
    row, stored = json.loads((results/"linearize.jsonl").read_text()), json.loads((out/"linearize.json").read_text())
    assert row["layers"] == [0, 2, 3] and row["trained_steps"] == 6 and stored["perplexity"] == row["perplexity"]
    assert not (out/"unfinished").exists() and (out/"tokenizer.json").is_file() and stored["provenance"]["torch"]
    got = load_linearized(out)
    assert [*stand_ins(got)] == [0, 2, 3] and torch.isfinite(torch.tensor(mean_nats(got, [text(2, 32)])))
    refused(capsys, tmp_path, *command(model, out), says="exists")

@needs_peft
@pytest.mark.parametrize("where", ["fit", "train"])
def test_an_interruption_loses_nothing(capsys, tmp_path, model, monkeypatch, where):
    more = "--estimator", "hedgehog", "--budget", "9"
    assert call(capsys, *command(model, tmp_path/"whole", *more))[0] == 0
    calls, out = [], tmp_path/"out"
    module, name = dict(fit=(linearize.__globals__, "fit_heads"), train=(adapt.__globals__, "train_step"))[where]
    real = module[name]
    def interrupted(*args, **kw):
        calls.append(1)
        if len(calls) == 3: raise KeyboardInterrupt
        return real(*args, **kw)
    monkeypatch.setitem(module, name, interrupted)
    code, _, err = call(capsys, *command(model, out, *more))
    assert code == 130 and "--resume" in err, err
    refused(capsys, tmp_path, *command(model, out, *more), says="--resume")
    refused(capsys, tmp_path, *command(model, out, *more), "--resume", "--fit-steps", 4, says="steps")
    code, _, err = call(capsys, *command(model, out, *more), "--resume")
    assert code == 0, err
    assert len(calls) == dict(fit=5, train=9)[where]                    # those that were finished are not made again
    a, b = (load_linearized(tmp_path/x).state_dict() for x in ("whole", "out"))
    assert a.keys() == b.keys() and all(torch.equal(x, b[k]) for k, x in a.items())
