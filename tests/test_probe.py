"The probe: three questions to small models, resumed runs, refusals, and numbers that are known without it"
import json
import pytest, torch
from okadfa.core import assert_rel, read_rows
from okadfa.dfa.diagnostics import compare_gradients
from okadfa.models.checkpoint import save_model
from okadfa.models.lm import LMConfig, LanguageModel
from okadfa.probe.arms import CONTROL, STAND_INS, KeyCache, Size, StandIn, cached, control_of, equal_positions, stand_in
from okadfa.probe.attention import AttentionQuestion, head_errors, measure_arm, measure_layers
from okadfa.probe.credit import CreditQuestion, shortcuts
from okadfa.probe.probe import ProbeSettings, probe
from okadfa.probe.tables import attention_sheet, key_of, sheets
from okadfa.probe.weights import WeightsQuestion
from okadfa.run.cli import main

transformers = pytest.importorskip("transformers")
transformers.utils.logging.set_verbosity_error()
WORDS = 300
PROSE = "The quick brown fox jumps over the lazy dog, and then it sleeps. Nobody knows why %d foxes do.\n"
SIZE = dict(vocab_size=WORDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
            bos_token_id=0, eos_token_id=0, pad_token_id=0)
KINDS = dict(llama=dict(intermediate_size=160, num_key_value_heads=2, initializer_range=.2), bloom={},
             gpt2=dict(initializer_range=.2), bert=dict(intermediate_size=48))

@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1"); monkeypatch.setenv("COLUMNS", "200")
    torch.set_num_threads(1)

def make(kind, **more):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **(SIZE | KINDS[kind] | more))
    return transformers.AutoModelForCausalLM.from_config(config).eval()

@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with small models and a text"
    from tokenizers import ByteLevelBPETokenizer
    d = tmp_path_factory.mktemp("probe")
    text = "".join(PROSE % i for i in range(120))
    tok = ByteLevelBPETokenizer()
    tok.train_from_iterator([text], vocab_size=WORDS, special_tokens=["<|endoftext|>"], show_progress=False)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tok._tokenizer, eos_token="<|endoftext|>")
    for kind in KINDS:
        make(kind).save_pretrained(d/kind); fast.save_pretrained(d/kind)
    save_model(LanguageModel(LMConfig(vocab_size=257, d_model=64, n_layers=2, n_heads=2, max_len=64)), d/"ours")
    (d/"text.txt").write_text(text); (d/"short.txt").write_text("Too short.")
    (d/"bytes.txt").write_bytes(b"ab\xff\xfe"*500)
    return d

def settings(place, model, results, **more):
    small = dict(text=str(place/"text.txt"), context=(32, 48), tokens=96, fit_tokens=64, layer_tokens=32,
                 credit_tokens=24, m=8, window=6, sinks=2, steps=2)
    return ProbeSettings(str(place/model), **(small | dict(results=str(results)) | more))

# ---- all three questions

@pytest.fixture(scope="module")
def answers(place):
    said = {}
    for kind in ("llama", "gpt2"):
        said[kind] = probe(settings(place, kind, place/f"{kind}.jsonl"), progress=False)
    return said

@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_every_question_is_answered(answers, kind):
    rows = answers[kind]
    d, d_v = 8, 8
    controls = {control_of(name, Size(8, 6, 2), d, d_v, 32) for name in STAND_INS} - {None}
    for n in (32, 48):
        arms = {r["arm"]: r for r in rows if r["question"] == "attention" and r["context"] == n}
        assert arms.keys() == {*STAND_INS, *controls}
        for name in STAND_INS:
            if STAND_INS[name].controlled: assert f"{CONTROL}{arms[name]['positions']}" in arms
        assert arms["softmax"]["positions"] == n and all(r["token_ms"] > 0 for r in arms.values())
    assert {r["rule"] for r in rows if r["question"] == "credit"} == {*shortcuts(2)}
    methods = [(r["method"], r["bits"]) for r in rows if r["question"] == "weights"]
    assert len(set(methods)) == len(methods) == 21
    assert {r["of"] for r in rows if r["question"] == "layers"} == {"best features", "control"}
    assert len({key_of(r) for r in rows}) == len(rows)
    assert [s.title.split(":")[0] for s in sheets(rows)][0] == "attention" and len(sheets(rows)) == 4

def test_rows_say_what_they_are(answers):
    common = {"model", "text", "text_sha", "seed", "question", "seconds", "provenance"}
    keys = dict(attention={"arm", "context", "perplexity", "positions", "numbers", "m", "window", "sinks", "fit"},
                layers={"of", "arm", "alone", "within", "points", "softmax_nats", "layer_tokens"},
                credit={"rule", "steps", "error_cosine", "error_error", "gradient_cosine", "gradient_error", "all"},
                weights={"method", "bits", "bits_per_weight", "bytes", "perplexity"})
    for r in answers["llama"]:
        assert r.keys() >= common | keys[r["question"]] and r["model"] == "llama" and r["text"].endswith("/text.txt")
        if r["question"] == "attention" and r["context"] == 32:
            assert [len(x) for x in r["errors"]] == [len(x) for x in r["cosines"]] == [4, 4]
        if r["question"] == "credit": assert len(r["error_cosine"]) == len(r["gradient_error"]) == 2

@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_softmax_is_without_error(answers, kind):
    of = {(r["arm"], r["context"]): r for r in answers[kind] if r["question"] == "attention"}
    soft = of["softmax", 32]
    assert max(map(max, soft["errors"])) == 0 and min(map(min, soft["cosines"])) > 1 - 1e-6
    assert max(map(max, of["window", 32]["errors"])) > .01
    layers = next(r for r in answers[kind] if r["question"] == "layers")
    assert len(layers["alone"]) == 2 and layers["points"][0] == [0, layers["softmax_nats"]]
    budget = layers["within"]["0.05"]
    assert budget["nats"] <= layers["softmax_nats"] + .0488

def test_perplexity_is_that_of_the_model(place, answers):
    from okadfa.bench.weights import load_any
    model, encode = load_any(str(place/"llama"))
    ids = encode((place/"text.txt").read_bytes())[64:160].view(3, 32)           # what comes behind the part for fitting
    with torch.no_grad(): loss = model(ids, labels=ids).loss.item()
    assert {r["start"] for r in answers["llama"]} == {64}
    row = next(r for r in answers["llama"] if r.get("arm") == "softmax" and r["context"] == 32)
    assert abs(row["nats"] - loss) < 1e-5*loss
    reference = next(r for r in answers["llama"] if r.get("method") == "reference")
    assert abs(reference["nats"] - loss) < 1e-5*loss and reference["dithered"] == 0

def test_a_resumed_run_measures_nothing_twice(place, answers, tmp_path, monkeypatch):
    rows = read_rows(place/"llama.jsonl")
    assert rows == json.loads(json.dumps(answers["llama"]))
    def never(*args, **kw): raise AssertionError("measured again")
    for name in ("measure_arm", "measure_layers"): monkeypatch.setattr(f"okadfa.probe.probe.{name}", never)
    monkeypatch.setattr(CreditQuestion, "measure", never); monkeypatch.setattr(WeightsQuestion, "measure", never)
    assert probe(settings(place, "llama", place/"llama.jsonl"), progress=False) == rows
    (tmp_path/"cut.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows if r.get("rule") != "identity"))
    with pytest.raises(AssertionError): probe(settings(place, "llama", tmp_path/"cut.jsonl"), progress=False)
    monkeypatch.undo()
    again = probe(settings(place, "llama", tmp_path/"cut.jsonl"), progress=False)
    assert len(again) == len(rows) and again[-1]["rule"] == "identity"
    (tmp_path/"two.jsonl").write_text("")
    def meanwhile(self, job):                                      # another process writes all other rows
        lines = [r for r in rows if r["question"] == "credit" and r["rule"] != job["rule"]]
        (tmp_path/"two.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
        return dict(steps=1)
    monkeypatch.setattr(CreditQuestion, "measure", meanwhile)
    both = probe(settings(place, "llama", tmp_path/"two.jsonl", questions=("credit",)), progress=False)
    assert len(both) == len(shortcuts(2)) and both[-1]["rule"] == "random matrices"
    monkeypatch.undo()
    other = settings(place, "llama", place/"llama.jsonl", seed=1, questions=("credit",))
    assert len(probe(other, progress=False)) == len(shortcuts(2))
    assert len(read_rows(place/"llama.jsonl")) == len(rows) + len(shortcuts(2))

def test_the_same_file_is_not_fitted_on_and_judged(place, tmp_path):
    same = dict(fit=str(place/"text.txt"), arms=("softmax",), questions=("attention",))
    s = settings(place, "llama", tmp_path/"rows.jsonl", **same)
    assert {r["start"] for r in probe(s, progress=False)} == {64}

def test_without_a_text_it_reads_the_manual(place, tmp_path):
    text = (place/"text.txt").read_bytes()
    corpus = lambda: dict(train=text[:3000], valid=text[3000:])
    s = settings(place, "llama", tmp_path/"rows.jsonl", text="", arms=("softmax",), questions=("attention",))
    rows = probe(s, corpus, progress=False)
    assert [r["context"] for r in rows] == [32, 48]
    assert {(r["text"], r["fit"]) for r in rows} == {("manual/valid", "manual/train")}

def test_weights_are_put_back(place):
    model = make("llama")
    before, ids = [p.clone() for p in model.parameters()], torch.randint(WORDS, (2, 32))
    row = WeightsQuestion(model, ids).measure(dict(method="rtn2", bits=2.5))
    assert all(torch.equal(p, x) for p, x in zip(model.parameters(), before))
    assert row["matrices"] == 6 and row["bytes"] == row["weights"]*2.5/8 and row["error"] > .1

# ---- what is known without it

def test_equal_state_by_hand():
    size = Size(m=256, window=64, sinks=4)
    # SmolLM2: 256 features times 65 numbers are 16,640, and a cached position is 128 numbers
    assert equal_positions(256*65, 64, 64) == 130 and equal_positions(256*65 + 1, 64, 64) == 131
    assert control_of("closed form & sinks & window", size, 64, 64, 512) == f"{CONTROL}198"
    assert control_of("favor+ & chunks", size, 64, 64, 512) == f"{CONTROL}194"
    assert control_of("learnt", size, 64, 64, 2048) == f"{CONTROL}130"
    assert control_of("sinks & chunks", size, 64, 64, 512) is None
    assert stand_in(f"{CONTROL}198").numbers(size, 64, 64, 512) == 198*128
    q = torch.zeros(1, 2, 3, 8)
    assert (lambda m: (m.window, m.sinks))(stand_in(f"{CONTROL}198").make(q, q, q, None, size)) == (194, 4)

@pytest.mark.parametrize("arm", ["window", "sinks & window", "chunks", "sinks & chunks"])
def test_a_window_as_long_as_the_text_is_softmax(arm):
    model, ids = make("llama"), torch.randint(WORDS, (2, 40), generator=torch.Generator().manual_seed(0))
    question = AttentionQuestion(model, {40: ids}, ids, Size(m=8, window=40, sinks=3), (arm, "softmax"))
    got, soft = (measure_arm(question, dict(arm=a, context=40)) for a in (arm, "softmax"))
    assert abs(got["nats"] - soft["nats"]) < 1e-5
    assert max(map(max, got["errors"])) < 1e-5 and min(map(min, got["cosines"])) > 1 - 1e-5

@pytest.mark.parametrize("kind", ["llama", "gpt2", "ours"])
def test_as_many_rounds_as_blocks_are_exact(kind):
    blocks, ids = 4, torch.randint(3, 250, (1, 24), generator=torch.Generator().manual_seed(0))
    config = LMConfig(vocab_size=257, d_model=32, n_layers=blocks, n_heads=2, max_len=64)
    model = LanguageModel(config) if kind == "ours" else make(kind, num_hidden_layers=blocks)
    question = CreditQuestion(model.double().eval(), ids)
    question.rules = shortcuts(blocks, rounds=(1, blocks - 1), stages=(2,))
    one, exact, stages = (question.measure(dict(rule=r)) for r in ("1 round", "3 rounds", "stages of 2"))
    assert max(exact["error_error"]) < 1e-12 and max(exact["gradient_error"]) < 1e-12 < one["error_error"][0]
    assert max(stages["error_error"][2:]) < 1e-12 < stages["error_error"][1]
    assert (exact["steps"], stages["steps"], exact["blocks"]) == (4, 2, 4)
    assert all(p.grad is None for p in model.parameters())

def test_gradients_are_those_of_the_diagnostics():
    model, ids = make("gpt2"), torch.randint(3, WORDS, (1, 24), generator=torch.Generator().manual_seed(0))
    row = CreditQuestion(model, ids).measure(dict(rule="identity"))
    ref = compare_gradients(model, dict(input_ids=ids, labels=ids))
    assert abs(ref["block0"]["cosine"] - row["gradient_cosine"][0]) < 1e-4
    assert abs(ref["all"]["cosine"] - row["all"]["cosine"]) < 1e-4

def test_a_stand_in_is_one_line():
    class Zero(torch.nn.Module):
        def forward(self, q, k, v, seen=None, scale=None): return q.new_zeros(*q.shape[:3], v.shape[3])
    STAND_INS.register("zero", StandIn(lambda q, k, v, scale, size: Zero(), "nothing", cached(5)))
    try:
        model, ids = make("llama"), torch.randint(WORDS, (2, 32), generator=torch.Generator().manual_seed(0))
        question = AttentionQuestion(model, {32: ids}, ids, Size(m=8, window=4, sinks=1), ("softmax", "zero"))
        rows = []
        for job in question.jobs():
            rows.append(job | (measure_arm(question, job) if "arm" in job else measure_layers(question, job, rows)))
        zero = next(r for r in rows if r["arm"] == "zero")
        assert zero["errors"] == [[1.]*4]*2 and zero["token_ms"] is None and zero["positions"] == 5
        assert [r["arm"] for r in rows] == ["softmax", f"{CONTROL}5", "zero", "zero", f"{CONTROL}5"]
        assert not any("okadfa" in m._modules for m in model.modules())
        assert attention_sheet(rows).lines[1][2] == f"{rows[1]['perplexity']:,.2f}"
    finally: del STAND_INS["zero"]

def test_a_ring_forgets_what_a_window_does():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 30, 8, generator=g) for h in (4, 2, 2))
    heads = stand_in(f"{CONTROL}7").make(q, k, v, None, Size(sinks=2))
    cache, ref = KeyCache(window=5, sinks=2), heads(q, k, v)
    cache.prefill(*(x[:, :, :10] for x in (q, k, v)))
    for i in range(10, 30): assert_rel("step", ref[:, :, i], cache.step(q[:, :, i], k[:, :, i], v[:, :, i]), 1e-5)
    assert cache.k.shape[2] == 7
    error, _ = head_errors(heads, q, k, v, None)
    assert min(error) > .01

# ---- refusals

def command(place, model, tmp_path, **flags):
    "Its exit code"
    small = dict(text=place/"text.txt", context="32", tokens=64, fit_tokens=64, credit_tokens=24)
    flags = small | dict(results=tmp_path/"rows.jsonl") | flags
    args = [x for k, v in flags.items() for x in ("--" + k.replace("_", "-"), str(v))]
    with pytest.raises(SystemExit) as e: main(["probe", str(place/model), *args])
    return e.value.code

def refused(capsys, tmp_path, place, model="llama", says="", **flags):
    code = command(place, model, tmp_path, **flags)
    err = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and err[-1].startswith("okadfa: ") and says in err[-1], err
    assert not any(tmp_path.iterdir())

@pytest.mark.parametrize("flags,says", [
    (dict(text="nowhere.txt"), "--text must be a text file"), (dict(fit="nowhere.txt"), "--fit must be a text file"),
    (dict(context="65"), "64 tokens"), (dict(tokens=9000, context="8000"), "8000 must see"),
    (dict(context="128", tokens=256, fit_tokens=128), "64 positions"), (dict(context="1"), "at least 2"),
    (dict(questions="colour"), "colour"), (dict(arms="landmark"), "landmark"),
    (dict(m=0), "m must be"), (dict(sinks=-1), "must not be negative")])
def test_bad_flags(capsys, tmp_path, place, flags, says): refused(capsys, tmp_path, place, says=says, **flags)

@pytest.mark.parametrize("name,says", [("short.txt", "give a longer --text"), ("bytes.txt", "not utf-8")])
def test_bad_text(capsys, tmp_path, place, name, says): refused(capsys, tmp_path, place, text=place/name, says=says)

def test_an_encoder_is_refused(capsys, tmp_path, place): refused(capsys, tmp_path, place, "bert", "looks ahead")

def test_no_model(capsys, tmp_path, place): refused(capsys, tmp_path, place, "short.txt", "no folder")

def test_attention_alone_is_refused_where_it_cannot_be_replaced(capsys, tmp_path, place):
    refused(capsys, tmp_path, place, "bloom", "bloom computes attention by itself", questions="attention")

@pytest.mark.parametrize("model,says", [("bloom", "computes attention by itself"), ("ours", "a run of okadfa")])
def test_the_other_questions_go_on(place, tmp_path, model, says):
    lines = []
    rows = probe(settings(place, model, tmp_path/"rows.jsonl"), say=lines.append, progress=False)
    assert len(lines) == 1 and lines[0].startswith("attention: ") and says in lines[0]
    assert {r["question"] for r in rows} == {"credit", "weights"}

def test_the_command(capsys, tmp_path, place):
    code = command(place, "llama", tmp_path, arms="softmax,sinks & window", questions="attention,credit")
    out = capsys.readouterr().out
    assert code == 0 and "sequential" in out and "sinks & window" in out and "half a round" in out
    assert len(read_rows(tmp_path/"rows.jsonl")) == 2 + len(shortcuts(2))
    assert (tmp_path/"rows.png").stat().st_size > 1000
