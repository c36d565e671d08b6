"A run in the hands of `transformers`: the same tokens, the same gradients, its own tools, and nothing half written"
import importlib.util, json, subprocess, sys, time, types
from pathlib import Path
import pytest, torch
import torch.nn.functional as F
from conftest import ROOT, byte_pairs, clean_env
from okadfa.core import InputError, assert_rel
from okadfa.models.block import MIXERS
from okadfa.models.checkpoint import load_model
from okadfa.models.export import MODELING, OkadfaCache, OkadfaConfig, OkadfaForCausalLM
from okadfa.models.lm import LMConfig, LanguageModel
from okadfa.models.publish import hub_tokenizer, publish
from okadfa.run.cli import main
from okadfa.run.data import load_tokenizer
from okadfa.run.generate import generate
from okadfa.spectral.bytes import ByteEncoder
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

SIZE = dict(vocab_size=31, d_model=32, n_heads=2, n_layers=2, max_len=24, credit="bp", embed_std=0.1)
KINDS = [*(dict(mixer=m) for m in MIXERS), dict(mixer="favor", local=True), dict(mixer="favor", features="hedgehog"),
         dict(mixer="window", window=5, sinks=2), dict(mixer="window", local=True),
         dict(mixer="landmarks", m=3, window=2),
         dict(mixer="spectral+softmax", enhancements="rope+glu+phase+scales", gating="single")]
PROSE = b"The quick brown fox jumps over the lazy dog, and then it sleeps.\n"*40
TRAIN = "--d-model 32 --n-heads 2 --max-len 48 --batch-size 8 --warmup 1 --lr 1e-2 --precision fp32 --steps 30".split()
pytestmark = pytest.mark.usefixtures("seeded")

def small(**fields) -> OkadfaForCausalLM:
    "A model whose weights are not those that its seed gives, and so large that it does not repeat itself"
    model = OkadfaForCausalLM(OkadfaConfig(SIZE | fields)).eval()
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.lm.blocks.parameters():
            if p.ndim > 1: p.add_(torch.randn(p.shape, generator=g), alpha=0.6)
    return model

def tensors(model) -> dict: return {**dict(model.named_parameters()), **dict(model.named_buffers())}

def okadfa(*args):
    "A command that must succeed"
    with pytest.raises(SystemExit) as e: main([str(a) for a in args])
    assert not e.value.code, args

@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    "A trained run, on bytes"
    d = tmp_path_factory.mktemp("trained")
    (d/"text").mkdir()
    for s in ("train", "valid"): (d/"text"/f"{s}.txt").write_bytes(PROSE)
    okadfa("train", "--out", d/"run", "--data", d/"text", "--cache", d/"cache", *TRAIN, "--quiet")
    return d/"run"

@pytest.fixture(scope="module")
def folder(run) -> Path:
    "The same, exported"
    okadfa("export", run, run.parent/"exported", "--license", "mit")
    return run.parent/"exported"

@pytest.fixture(scope="module")
def pair(folder): return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

# ---- the model

@pytest.mark.parametrize("fields", [*KINDS, dict(credit="dfa", feedback="gaussian"), dict(credit="local"),
    dict(credit="dfa", feedback="orthogonal", granularity="full"), dict(credit="dfa", feedback="calibrated")], ids=str)
def test_every_tensor_is_read_as_it_was_written(tmp_path, fields):
    model = small(**fields)
    for k, b in model.named_buffers():
        if k.endswith("projection"): b.mul_(1.5)            # drawn otherwise than the seed says, as after a redraw
    model.save_pretrained(tmp_path)
    a, b = tensors(model), tensors(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert a.keys() == b.keys()
    for k in a: assert torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype, k

def test_what_a_file_does_not_hold_is_as_new(tmp_path):
    from safetensors.torch import load_file, save_file
    model = small(mixer="favor")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path/"model.safetensors")
    missing = [k for k in weights if "blocks.0.attend" in k]
    save_file({k: v for k, v in weights.items() if k not in missing}, tmp_path/"model.safetensors", dict(format="pt"))
    got, new = tensors(AutoModelForCausalLM.from_pretrained(tmp_path)), tensors(LanguageModel(model.config.lm_config))
    assert any("projection" in k for k in missing)
    for k in got: assert torch.equal(got[k], new[k.removeprefix("lm.")] if k in missing else weights[k]), k

def test_half_precision_keeps_the_directions(tmp_path):
    model = small(mixer="favor")
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.lm.embed.weight.dtype == torch.bfloat16
    assert torch.equal(half.lm.blocks[0].mixer.features.projection, model.lm.blocks[0].mixer.features.projection)
    ids = torch.randint(31, (1, 9))
    assert half.generate(ids, max_new_tokens=4).shape == (1, 13)

def test_the_meta_device():
    with torch.device("meta"): model = OkadfaForCausalLM(OkadfaConfig(SIZE | dict(mixer="favor")))
    for k, x in tensors(LanguageModel(model.config.lm_config)).items(): assert torch.equal(tensors(model.lm)[k], x), k

PROMPTS, BOS = ([3, 1, 4, 1, 5, 9, 2], [2, 7, 1], [8, 2, 8]), 30
def padded():
    n = 1 + max(map(len, PROMPTS))
    ids = torch.tensor([[0]*(n - 1 - len(p)) + [BOS, *p] for p in PROMPTS])
    return ids, torch.tensor([[0]*(n - 1 - len(p)) + [1]*(1 + len(p)) for p in PROMPTS])

@pytest.mark.parametrize("fields", KINDS, ids=str)
def test_generate_gives_our_tokens(fields):
    model, (ids, mask) = small(**fields), padded()
    theirs = model.generate(ids, attention_mask=mask, max_new_tokens=36, suppress_tokens=[BOS])[:, ids.shape[1]:]
    ours = [generate(model.lm, prompt, 36, BOS, temperature=0) for prompt in PROMPTS]      # beyond max_len=24, twice
    assert theirs.tolist() == ours and len({tuple(o) for o in ours}) == 3 and len(set(sum(ours, []))) > 4

def test_a_prompt_that_is_too_long():
    model, prompt = small(), torch.randint(30, (1, 40)).tolist()[0]
    theirs = model.generate(torch.tensor([[BOS, *prompt]]), max_new_tokens=20, suppress_tokens=[BOS])[0, 41:]
    assert theirs.tolist() == generate(model.lm, prompt, 20, BOS, temperature=0)
    with pytest.raises(InputError, match="longer than max_len"): model(torch.tensor([prompt]))
    with pytest.raises(InputError, match="last logits only"): model(torch.tensor([prompt]), use_cache=True)

@pytest.mark.parametrize("fields", KINDS, ids=str)
def test_beams_reorder_what_is_remembered(fields):
    model, (ids, mask) = small(**fields), padded()
    options = dict(attention_mask=mask, max_new_tokens=12, num_beams=3, num_return_sequences=2)
    cached, anew = (model.generate(ids, use_cache=on, **options) for on in (True, False))
    assert torch.equal(cached, anew) and len({tuple(r) for r in cached.tolist()}) > 3

def test_samples_come_from_the_seed():
    model, (ids, mask) = small(), padded()
    def sample(seed):
        torch.manual_seed(seed)
        return model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=True, top_k=0)
    assert torch.equal(sample(1), sample(1)) and not torch.equal(sample(1), sample(2))

@pytest.mark.parametrize("fields", KINDS, ids=str)
def test_padding_changes_nothing(fields):
    model, (ids, mask) = small(**fields), padded()
    with torch.no_grad():
        left = model(ids, mask).logits
        for i, p in enumerate(PROMPTS):
            alone = model(torch.tensor([[BOS, *p]])).logits[0]
            assert_rel("left", alone, left[i, -len(alone):], 1e-5)
            row = torch.tensor([[BOS, *p, 5, 5, 5]])
            on_the_right = torch.tensor([[1]*len(alone) + [0]*3])
            assert_rel("right", alone, model(row, on_the_right).logits[0, :len(alone)], 1e-5)
    assert not left[mask == 0].any()

def test_a_cache_goes_on_in_pieces():
    model, ids = small(mixer="favor+spectral"), torch.randint(31, (2, 20))
    with torch.no_grad():
        first = model(ids[:, :7], use_cache=True)
        rest = model(ids[:, 7:], cache=first.get("cache", first.get("past_key_values")))
        assert_rel("in pieces", model(ids).logits, torch.cat([first.logits, rest.logits], 1), 1e-4)

@pytest.mark.parametrize("given,says", [
    (dict(attention_mask=torch.tensor([[1, 0, 1, 1]])), "gap"),
    (dict(attention_mask=torch.ones(1, 3)), "attention_mask must be"),
    (dict(attention_mask=torch.tensor([[1, 1, 1, 0]]), use_cache=True), "pad on the left"),
    (dict(inputs_embeds=torch.zeros(1, 4, 32)), "not inputs_embeds"),
    (dict(output_hidden_states=True), "not output_hidden_states")])
def test_what_cannot_be_is_said(given, says):
    with pytest.raises(InputError, match=says): small()(torch.tensor([[1, 2, 3, 4]]), **given)

def test_the_vocabulary_is_fixed():
    model = small()
    assert model.resize_token_embeddings(31) is model.get_input_embeddings()
    with pytest.raises(InputError, match="31 entries"): model.resize_token_embeddings(32)
    with pytest.raises(InputError, match="another version"): OkadfaConfig(dict(no_such_field=1))

@pytest.mark.parametrize("credit", ["bp", "dfa"])
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_loss_and_gradient_are_ours(credit, side):
    model, lengths = small(credit=credit, feedback="gaussian" if credit == "dfa" else "identity").train(), (12, 7)
    if side == "none": lengths = (12, 12)
    texts = [torch.randint(30, (n,)) for n in lengths]
    def pad(x, fill): return F.pad(x, (12 - len(x), 0) if side == "left" else (0, 12 - len(x)), value=fill)
    ids, mask = torch.stack([pad(t, 0) for t in texts]), torch.stack([pad(torch.ones_like(t), 0) for t in texts])
    labels = torch.stack([pad(t, -100) for t in texts])
    got = model(ids, mask, labels=labels)
    got.loss.backward()
    grads = {k: p.grad.clone() for k, p in model.lm.named_parameters()}
    model.zero_grad()
    n = sum(lengths) - 2
    ref = sum(model.lm.loss(t[None, :-1], t[None, 1:], reduction="sum") for t in texts)/n
    ref.backward()
    assert got.logits is None
    assert_rel("loss", ref, got.loss, 1e-5)
    for k, p in model.lm.named_parameters(): assert_rel(k, p.grad, grads[k], 1e-3)
    assert_rel("count", ref*n/5, model(ids, mask, labels=labels, num_items_in_batch=5).loss, 1e-5)
    out = model.eval()(ids, mask, labels=labels)
    assert out.logits.shape == (2, 12, 31) and abs(out.loss.item()/ref.item() - 1) < 1e-5

def test_checkpointing_changes_no_gradient():
    model, ids = small().train(), torch.randint(30, (2, 12))
    def grad():
        model.zero_grad(); model(ids, labels=ids).loss.backward()
        return model.lm.embed.weight.grad.clone()
    before = grad()
    model.gradient_checkpointing_enable()
    assert all(b.checkpoint for b in model.lm.blocks) and torch.allclose(grad(), before, atol=1e-6)

def test_a_token_costs_the_same_after_a_long_text():
    model, took = small(mixer="favor", d_model=64, n_layers=1, max_len=4096), {}
    caches = {}
    for n in (16, 3000):
        caches[n] = cache = OkadfaCache(model.lm)
        cache.extend(torch.randint(31, (1, n)), None)
    one, best = torch.tensor([[3]]), dict.fromkeys(caches, 1e9)
    for _ in range(30):                                        # alternating, as other processes come and go
        for n, cache in caches.items():
            start = time.perf_counter(); cache.extend(one, None); took[n] = time.perf_counter() - start
            best[n] = min(best[n], took[n])
    assert best[3000] < 2*best[16], best

# ---- the folder

def test_the_folder(run, folder):
    names = "README.md config.json generation_config.json model.safetensors modeling_okadfa.py tokenizer.json"
    assert {p.name for p in folder.iterdir()} == {*names.split(), "tokenizer_config.json"}
    config, model = AutoConfig.from_pretrained(folder), load_model(run)[0]
    assert config.lm_config == model.config and config.model_type == "okadfa" and config.hidden_size == 32
    made = tensors(AutoModelForCausalLM.from_pretrained(folder).lm)
    for k, x in tensors(model).items(): assert torch.equal(x, made[k]), k
    card, summary = (folder/"README.md").read_text(), json.loads((run/"summary.json").read_text())
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\nlicense: mit\n")
    assert f"| validation bits per byte | {summary['valid']['bits_per_byte']:.4f} |" in card
    assert "FAVOR+" in card and "reads bytes" in card and str(run.parent) not in card

def test_no_figures_of_another_step(run, tmp_path):
    import shutil
    shutil.copytree(run, tmp_path/"run")
    config = tmp_path/"run"/"checkpoint"/"config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | dict(step=12)))
    okadfa("export", tmp_path/"run", tmp_path/"out")
    assert "Nothing: the run left no summary" in (tmp_path/"out"/"README.md").read_text()

FRESH = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tok = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tok("The quick", return_tensors="pt")
print(tok.decode(model.generate(**ids, max_new_tokens=80)[0], skip_special_tokens=True))
model.save_pretrained(sys.argv[1] + "-again")
again = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "-again", trust_remote_code=True)
assert type(again).__name__ == type(model).__name__ and again.config.lm_config == model.config.lm_config
"""

def test_a_fresh_process_says_what_okadfa_generate_says(capsys, tmp_path, run, folder):
    "By the folder's own file; the other tests load it after `import okadfa.models.export`"
    import shutil
    shutil.copytree(folder, tmp_path/"m")
    env = clean_env(ROOT) | dict(HF_HOME=str(tmp_path/"hf"), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    r = subprocess.run([sys.executable, "-c", FRESH, str(tmp_path/"m")], env=env, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-2000:]
    capsys.readouterr()
    okadfa("generate", run, "--prompt", "The quick", "--tokens", 80, "--temperature", 0)
    assert r.stdout == capsys.readouterr().out and len(r.stdout) > 80
    assert (tmp_path/"m-again"/"modeling_okadfa.py").read_text() == MODELING

def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "okadfa.models", None)
    with pytest.raises(ImportError, match="pip install okadfa"): exec(MODELING, {})

def test_refusals_leave_nothing(capsys, run, folder, tmp_path):
    (tmp_path/"full").mkdir(); (tmp_path/"full"/"notes.txt").write_text("keep"); (tmp_path/"file").write_text("x")
    (tmp_path/"run").mkdir(); (tmp_path/"run"/"run.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    for args, says in (((run, tmp_path/"full"), "not empty"), ((run, tmp_path/"file"), "not a folder"),
                       ((tmp_path/"run", tmp_path/"out"), "no checkpoint"),
                       ((run, tmp_path/"out", "--tokenizer", tmp_path/"nowhere"), "nowhere"),
                       ((run, tmp_path/"out", "--license", ""), "--license is empty")):
        with pytest.raises(SystemExit) as e: main(["export", *map(str, args)])
        err = capsys.readouterr().err
        assert e.value.code == 2 and err.count("\n") == 1 and says in err, err
    assert sorted(tmp_path.rglob("*")) == before

def test_a_crash_leaves_nothing(monkeypatch, tmp_path):
    import okadfa.models.publish as P
    def crash(*a): raise OSError("disk full")
    monkeypatch.setattr(P, "model_card", crash)
    (tmp_path/"out").mkdir()
    model = LanguageModel(LMConfig(d_model=32, n_heads=2))
    with pytest.raises(OSError): publish(model, ByteEncoder(), tmp_path/"out", {})
    assert [p.name for p in tmp_path.rglob("*")] == ["out"]

# ---- tokenizers

def test_bytes_there_and_back():
    tok, g = hub_tokenizer(ByteEncoder(), 64), torch.Generator().manual_seed(0)
    texts = ["", "<bos>", " a\r\n\tb \x00", "don't . , !", "\ufeff\u2028e\u0301🙂", "".join(map(chr, range(0x250)))]
    texts += ["".join(chr(c) for c in torch.randint(0x10ffff, (50,), generator=g).tolist() if not 0xd800 <= c < 0xe000)
              for _ in range(50)]
    for text in texts:
        ids = tok(text).input_ids
        assert ids == [256, *text.encode()] and tok.decode(ids, skip_special_tokens=True) == text
    assert len(tok) == 257 and tok.convert_ids_to_tokens(256) == tok.bos_token == "<bos>"
    every = list(range(256))
    assert tok.decode(every) == ByteEncoder().decode(every)        # what is no UTF-8 shows as U+FFFD in both
    both = tok(["ab", "abcd"], padding=True)
    assert both.input_ids == [[256, 256, 256, 97, 98], [256, 97, 98, 99, 100]]
    assert both.attention_mask == [[0, 0, 1, 1, 1], [1]*5]

@pytest.fixture
def bpe(tmp_path): return byte_pairs(tmp_path/"bpe", [PROSE.decode()], 290)

def test_subwords(tmp_path, bpe):
    tok = load_tokenizer(bpe)
    model = LanguageModel(LMConfig(vocab_size=tok.vocab_size, d_model=32, n_heads=2, max_len=32))
    publish(model, tok, tmp_path/"out", dict(tokenizer=str(bpe)))
    theirs, made = AutoTokenizer.from_pretrained(tmp_path/"out"), AutoModelForCausalLM.from_pretrained(tmp_path/"out")
    for text in ("The quick brown", " then it  sleeps.\n\n", "naïve 🙂", ""):
        ids = theirs(text).input_ids
        assert ids == [tok.bos_id, *tok.encode(text)] and theirs.decode(ids, skip_special_tokens=True) == text
    ids = theirs("The quick", return_tensors="pt")
    new = made.generate(**ids, max_new_tokens=40)[0, ids.input_ids.shape[1]:].tolist()
    assert new == generate(model, tok.encode("The quick").tolist(), 40, tok.bos_id, temperature=0)
    assert "subword" in (tmp_path/"out"/"README.md").read_text()
    slow = types.SimpleNamespace(name="slow", fast=None)
    with pytest.raises(InputError, match="no tokenizer.json"): publish(model, slow, tmp_path/"slow", {})
    assert not (tmp_path/"slow").exists()

# ---- their tools

def test_pipeline(run, folder, pair):
    from transformers import pipeline
    write = pipeline("text-generation", model=pair[0], tokenizer=pair[1])
    prompts = ["The quick", "and then it"]
    got = write(prompts, max_new_tokens=30, do_sample=False, batch_size=2)
    model, tok = load_model(run)[0], ByteEncoder()
    for prompt, [out] in zip(prompts, got):
        assert out["generated_text"] == prompt + tok.decode(generate(model, tok.encode(prompt), 30, 256, temperature=0))

@pytest.mark.parametrize("credit", ["bp", "dfa"])
def test_trainer(tmp_path, credit):
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments
    tok = hub_tokenizer(ByteEncoder(), 48)
    model = OkadfaForCausalLM(OkadfaConfig(dict(d_model=32, n_heads=2, max_len=48, credit=credit)))
    texts = [tok(PROSE.decode()[i:i + n]) for i, n in zip(range(0, 320, 5), [40, 30]*32)]
    options = dict(output_dir=str(tmp_path), max_steps=25, per_device_train_batch_size=8, gradient_accumulation_steps=2,
                   learning_rate=1e-2, use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=5, save_steps=25)
    collate = DataCollatorForLanguageModeling(tok, mlm=False)
    trainer = Trainer(model, TrainingArguments(**options), collate, texts, texts[:8])
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < 0.7*before, (before, after)
    again = AutoModelForCausalLM.from_pretrained(tmp_path/"checkpoint-25")
    for k, x in tensors(model).items(): assert torch.equal(x, tensors(again)[k]), k

def test_push_to_hub(monkeypatch, tmp_path, folder, pair):
    import transformers.utils.hub as hub
    from huggingface_hub import HfApi
    sent = {}
    def commit(self, repo_id, operations, **kw):
        sent.update({op.path_in_repo: Path(op.path_or_fileobj).read_bytes() for op in operations})
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **kw: types.SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "create_commit", commit)
    card = types.SimpleNamespace(save=lambda path: None)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *a, **kw: card)
    monkeypatch.chdir(tmp_path)
    pair[0].push_to_hub("me/m"); pair[1].push_to_hub("me/m")
    assert {"config.json", "model.safetensors", "modeling_okadfa.py", "tokenizer.json"} <= sent.keys()
    assert sent["model.safetensors"] == (folder/"model.safetensors").read_bytes()

TASK = """
task: fox
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {file}}}}}
validation_split: validation
test_split: validation
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}]
"""

def write_task(folder):
    rows = [dict(question="The quick brown", choices=["fox jumps", "zzq##wwv"], answer=0),
            dict(question="over the lazy", choices=["QQQQQQQ", "dog, and"], answer=1)]*3
    (folder/"fox.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder/"fox.yaml").write_text(TASK.format(file=folder/"fox.jsonl"))

def judged(pair, sample):
    "The log-probability of the first right answer: ours, and what lm-eval found"
    ids = torch.tensor([[256, *b"The quick brown fox jumps"]])
    with torch.no_grad(): log = pair[0](ids).logits.log_softmax(-1)
    return log[0, 15:-1].gather(1, ids[0, 16:, None]).sum().item(), float(sample["resps"][0][0][0])

LM_EVAL = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval: pip install lm-eval")

@LM_EVAL
def test_lm_eval(monkeypatch, tmp_path, pair):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path/"cache"))
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    write_task(tmp_path)
    model = HFLM(pretrained=pair[0], tokenizer=pair[1], add_bos_token=True, batch_size=2, device="cpu")
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    got = simple_evaluate(model, tasks=["fox"], task_manager=tasks, bootstrap_iters=0, log_samples=True)
    assert got["results"]["fox"]["acc,none"] == 1.0
    ours, theirs = judged(pair, got["samples"]["fox"][0])
    assert abs(theirs - ours) < 1e-3*abs(ours)

@LM_EVAL
def test_lm_eval_as_a_command(tmp_path, folder, pair):
    "The line of the page, in a process that knows the folder and nothing else, without a network"
    (tmp_path/"tasks").mkdir(); write_task(tmp_path/"tasks")
    env = clean_env(ROOT) | dict(HF_HOME=str(tmp_path/"hf"), HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    line = f"--model hf --model_args pretrained={folder},trust_remote_code=True,add_bos_token=True --tasks fox " \
           "--include_path tasks --device cpu --batch_size 2 --output_path out --log_samples"
    command = [sys.executable, "-m", "lm_eval", *line.split()]
    r = subprocess.run(command, env=env | dict(OMP_NUM_THREADS="1"), cwd=tmp_path, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-2000:]
    results, samples = ([*(tmp_path/"out").rglob(f"{name}_*")][0].read_text() for name in ("results", "samples_fox"))
    assert json.loads(results)["results"]["fox"]["acc,none"] == 1.0 and "|fox" in r.stdout
    ours, theirs = judged(pair, json.loads(samples.splitlines()[0]))
    assert abs(theirs - ours) < 1e-3*abs(ours)
