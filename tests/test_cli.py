"The command line: every mistake is one line and exit code 2 with nothing written; runs survive what happens to runs"
import json, os, signal, subprocess, sys, time
import pytest, torch, yaml
import forked
from conftest import byte_pairs
from okadfa.models.checkpoint import load_model, save_config, save_model
from okadfa.models.lm import LMConfig, LanguageModel
from okadfa.run.cli import main

TINY = "--d-model 16 --n-layers 2 --n-heads 2 --max-len 32 --batch-size 2 --warmup 1 --lr 1e-2 --precision fp32".split()
PROSE = b"The quick brown fox jumps over the lazy dog, and then it sleeps.\n"*40

@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path/"cache"))
    monkeypatch.setenv("COLUMNS", "200")
    torch.set_num_threads(1)

@pytest.fixture
def text(tmp_path):
    d = tmp_path/"text"; d.mkdir()
    for s in ("train", "valid", "test"): (d/f"{s}.txt").write_bytes(PROSE)
    return d

@pytest.fixture
def bpe(tmp_path): return byte_pairs(tmp_path/"bpe", [PROSE.decode()], 300)

def call(capsys, *args):
    "Exit code, stdout, stderr"
    code = 0
    try: main([str(a) for a in args])
    except SystemExit as e: code = e.code or 0
    out = capsys.readouterr()
    return code, out.out, out.err

def files(folder):
    "All but what is kept between runs, and the bytecode that Python puts beside a plug-in"
    return sorted(p for p in folder.rglob("*") if not {"cache", "__pycache__"} & set(p.parts))

def refused(capsys, tmp_path, *args, says):
    before = files(tmp_path)
    code, out, err = call(capsys, *args)
    assert code == 2, (code, out, err)
    assert err.startswith("okadfa: ") and err.count("\n") == 1 and "Traceback" not in err, err
    assert says in err, err
    assert files(tmp_path) == before                                                    # nothing written, nothing lost
    return err

def bad_folder(kind, text):
    match kind:
        case "missing": return text/"nowhere"
        case "no valid": (text/"valid.txt").unlink()
        case "empty": (text/"train.txt").write_bytes(b"")
        case "short": (text/"train.txt").write_bytes(b"too short")
        case "not utf-8": (text/"train.txt").write_bytes(PROSE + b"\xff\xfe" + PROSE)
    return text

@pytest.mark.parametrize("kind,says", [
    ("missing", "nowhere"),
    ("no valid", "valid.txt"),
    ("empty", "empty"),
    ("short", "33")])
def test_bad_data(capsys, tmp_path, text, kind, says):
    refused(capsys, tmp_path, "train", "--out", tmp_path/"run", "--data", bad_folder(kind, text), *TINY, says=says)

def test_not_utf8_with_a_bpe_tokenizer(capsys, tmp_path, text, bpe):
    train = "train", "--out", tmp_path/"run", "--data", bad_folder("not utf-8", text), *TINY
    refused(capsys, tmp_path, *train, "--tokenizer", bpe, says="UTF-8")
    assert call(capsys, *train, "--steps", 1)[0] == 0        # bytes do not mind

@pytest.mark.parametrize("flags,says", [
    ("--d-model 100 --n-heads 3", "divisible"),
    ("--preset huge", "unknown preset"),
    ("--n-layers 0", "n_layers"),
    ("--d-model -8", "d_model"),
    ("--steps 0", "steps"),
    ("--steps -3", "steps"),
    ("--batch-size 0", "batch_size"),
    ("--lr 0", "lr"),
    ("--lr nan", "lr"),
    ("--m 0", "m must"),
    ("--max-len 0", "max_len"),
    ("--seq-len 64", "seq_len"),
    ("--credit bpp", "credit"),
    ("--mixer soft", "mixer"),
    ("--precision fp8", "precision"),
    ("--feedback rand", "feedback"),
    ("--rounds -1", "rounds"),
    ("--error-site logits", "error_site"),
    ("--steps ten", "steps"),
    ("--stpes 3", "No such option"),
    ("--tokenizer nowhere/tok", "nowhere"),
    ("--config nowhere.yaml", "nowhere.yaml"),
    ("--resume", "nothing to resume")])
def test_bad_flags(capsys, tmp_path, text, flags, says):
    refused(capsys, tmp_path, "train", "--out", tmp_path/"run", "--data", text, *TINY, *flags.split(), says=says)

@pytest.mark.parametrize("content,says", [
    ("stpes: 3", "stpes"),
    ("- 1\n- 2", "one flag each"),
    ("steps: [1", "not a YAML"),
    ("steps: many", "steps must be int"),
    ("lr: true", "lr")])
def test_bad_config_file(capsys, tmp_path, text, content, says):
    conf = tmp_path/"c.yaml"
    conf.write_text(content)
    refused(capsys, tmp_path, "train", "--out", tmp_path/"run", "--data", text, "--config", conf, says=says)

def test_no_network_by_name(tmp_path):
    run = tmp_path/"run"
    train = [sys.executable, "-m", "okadfa.run.cli", "train", "--out", str(run), "--data", "wikitext-2"]
    homes = dict(HF_HOME=str(tmp_path/"hf"), HF_HUB_OFFLINE="1", XDG_CACHE_HOME=str(tmp_path/"cache"))
    r = subprocess.run(train, capture_output=True, text=True, env=os.environ | homes, timeout=120)
    assert r.returncode == 2 and r.stderr.count("\n") == 1 and "--data DIR" in r.stderr, r.stderr
    assert not run.exists(), r.stderr

def test_output_folder_of_another_run(capsys, tmp_path, text):
    run = tmp_path/"run"
    train = "train", "--out", run, "--data", text, *TINY, "--steps"
    assert call(capsys, *train, 2)[0] == 0
    refused(capsys, tmp_path, *train, 2, says="another run")
    refused(capsys, tmp_path, *train, 3, "--resume", says="another config (steps)")
    (text/"train.txt").write_bytes(PROSE*2)
    refused(capsys, tmp_path, *train, 2, "--resume", says="train_sha256")
    (tmp_path/"mine").mkdir(); (tmp_path/"mine"/"notes.txt").write_text("keep")
    refused(capsys, tmp_path, "train", "--out", tmp_path/"mine", "--data", text, *TINY, says="not a run's folder")
    (tmp_path/"file").write_text("x")
    refused(capsys, tmp_path, "train", "--out", tmp_path/"file", "--data", text, *TINY, says="file")

def test_checkpoint_of_another_config(capsys, tmp_path, text, bpe):
    run = tmp_path/"run"
    assert call(capsys, "train", "--out", run, "--data", text, *TINY, "--steps", 1)[0] == 0
    refused(capsys, tmp_path, "evaluate", run, "--tokenizer", bpe, says="was trained with tokenizer bytes")
    other = LanguageModel(LMConfig(vocab_size=257, d_model=32, n_heads=2, max_len=32))
    save_config(other, run/"checkpoint", tokenizer="bytes")
    refused(capsys, tmp_path, "evaluate", run, says="of another config")
    refused(capsys, tmp_path, "generate", tmp_path/"nowhere", says="no checkpoint")
    (run/"checkpoint"/"config.json").write_text("{")
    refused(capsys, tmp_path, "generate", run, says="config.json")
    save_model(other, tmp_path/"m", tokenizer="bytes"); (tmp_path/"m"/"model.safetensors").write_bytes(b"abc")
    refused(capsys, tmp_path, "generate", tmp_path/"m", says="damaged")

@pytest.mark.parametrize("args,says", [
    (["--split", "tests"], "split"),
    (["--stride", "0"], "stride"),
    (["--batch-size", "0"], "batch_size"),
    (["--precision", "int8"], "precision")])
def test_bad_evaluation(capsys, tmp_path, text, args, says):
    model = LanguageModel(LMConfig(d_model=16, n_heads=2, max_len=32))
    save_model(model, tmp_path/"m", tokenizer="bytes", data=str(text))
    refused(capsys, tmp_path, "evaluate", tmp_path/"m", *args, says=says)

@pytest.mark.parametrize("args", [["--temperature", "-1"], ["--top-k", "0"], ["--tokens", "-1"]])
def test_bad_generation(capsys, tmp_path, args):
    save_model(LanguageModel(LMConfig(d_model=16, n_heads=2, max_len=32)), tmp_path/"m", tokenizer="bytes")
    refused(capsys, tmp_path, "generate", tmp_path/"m", *args, says="must be")

def test_quantize(capsys, tmp_path, text):
    run, small, several, results = (tmp_path/name for name in ("run", "small", "several", "results"))
    model = "--d-model", 32, "--mixer", "spectral+favor"
    assert call(capsys, "train", "--out", run, "--data", text, *TINY, *model, "--steps", 3)[0] == 0
    for args, says in (
        (["--out", run], "exists"),
        (["--out", small, "--bits", 40], "bits must be"),
        (["--out", small, "--bits", "6,40"], "bits must be"),
        (["--out", small, "--bits", 12], "one real weight"),
        (["--out", small, "--code", "octal"], "polar or scalar"),
        (["--out", small, "--bits", "few"], "bits must be"),
        (["--out", small, "--bits", ","], "bits must be"),
        (["--out", small, "--split", "tests"], "split"),
        (["--out", small, "--data", "nowhere"], "nowhere")):
        refused(capsys, tmp_path, "quantize", run, *args, says=says)
    code, out, err = call(capsys, "quantize", run, "--bits", 6, "--out", small, "--results", results)
    assert code == 0, err
    row, packed = json.loads((results/"quantize.jsonl").read_text()), small/"polar.safetensors"
    assert row["bytes_quantized"] == packed.stat().st_size < row["bytes"]/2
    assert max(row["errors"].values()) < 0.03
    got = json.loads(call(capsys, "evaluate", small, "--json")[1])["bits_per_byte"]
    assert abs(got - row["bits_per_byte_quantized"]) < 1e-6
    assert 0 < abs(got - row["bits_per_byte"]) < 0.05      # another model, and hardly worse
    assert call(capsys, "generate", small, "--prompt", "The ", "--tokens", 5)[0] == 0
    code, out, err = call(capsys, "quantize", run, "--bits", "3, 6", "--out", several, "--results", results)
    rows = [json.loads(line) for line in (results/"quantize.jsonl").read_text().splitlines()]
    assert code == 0 and [r["bits_per_weight"] for r in rows] == [6, 3, 6] and "3 bits" in out and "6 bits" in out
    assert rows[2]["bits_per_byte_quantized"] == row["bits_per_byte_quantized"]
    assert rows[1]["bits_per_byte"] == row["bits_per_byte"]
    for r in rows[1:]:
        assert r["bytes_quantized"] == (several/f"{r['bits_per_weight']:g}"/"polar.safetensors").stat().st_size
    scalar, plain = tmp_path/"scalar", tmp_path/"plain"
    assert call(capsys, "quantize", run, "--bits", 6, "--code", "scalar", "--out", scalar)[0] == 0
    assert (scalar/"scalar.safetensors").stat().st_size < row["bytes"]/2
    assert call(capsys, "quantize", small, "--unpack", "--out", plain)[0] == 0
    assert abs(json.loads(call(capsys, "evaluate", plain, "--json")[1])["bits_per_byte"] - got) < 1e-6
    packed.write_bytes(packed.read_bytes()[:-10])
    assert "polar.safetensors" in refused(capsys, tmp_path, "evaluate", small, says="okadfa: ")

def test_the_whole_way(capsys, tmp_path, text, bpe):
    "train from a YAML file with a BPE vocabulary, evaluate, generate"
    run, conf = tmp_path/"run", tmp_path/"c.yaml"
    fields = dict(data=str(text), tokenizer=str(bpe), steps=9, mixer="softmax", credit="bp", lr="1e-2")
    conf.write_text(yaml.safe_dump(fields))
    code, out, err = call(capsys, "train", "--out", run, "--config", conf, *TINY, "--steps", 4)
    assert code == 0 and "bits per byte" in out, err
    facts = json.loads((run/"run.json").read_text())["facts"]
    assert facts["train"]["steps"] == 4 and facts["model"]["mixer"] == "softmax"
    lines = [json.loads(s) for s in (run/"metrics.jsonl").read_text().splitlines()]
    assert {"loss", "grad_norm", "violation_max", "tokens_per_s"} <= set(lines[1])
    assert any("grad/block0/cosine" in r for r in lines)
    assert list(run.glob("**/events.out.tfevents*"))
    summary = json.loads((run/"summary.json").read_text())
    code, out, _ = call(capsys, "evaluate", run, "--json", "--split", "valid")
    assert code == 0 and abs(json.loads(out)["nats"] - summary["valid"]["nats"]) < 1e-2
    assert json.loads(out)["n_words"] == 40*14
    assert call(capsys, "evaluate", run, "--split", "test", "--stride", 8)[0] == 0
    a, b, c = (call(capsys, "generate", run, "--prompt", "The", "--tokens", 12, "--seed", s)[1] for s in (1, 1, 2))
    assert a == b != c and a.startswith("The")

def test_info_and_help(capsys):
    code, out, _ = call(capsys, "info")
    assert code == 0 and "self-check passed" in out and "torch" in out
    for args in (["--help"], ["train", "--help"], ["benchmark", "--help"], []):
        code, out, _ = call(capsys, *args); assert code == 0 and "Usage" in out
    assert "Examples" in call(capsys, "train", "--help")[1]

STEPS = 120

def start(run, text, *extra):
    args = ["train", "--out", str(run), "--data", str(text), *TINY, "--steps", str(STEPS), "--diag-every", "20", *extra]
    return forked.command(args, dict(XDG_CACHE_HOME=str(text/"cache")))

def wait_for_step(run, step, p, limit=90):
    end = time.time() + limit
    while time.time() < end and p.poll() is None:
        try:
            if json.loads((run/"checkpoint"/"config.json").read_text())["step"] >= step: return
        except (FileNotFoundError, json.JSONDecodeError): pass
        time.sleep(0.02)
    raise AssertionError(p.communicate()[1])

def loss_of(run): return json.loads((run/"summary.json").read_text())["valid"]["nats"]

@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    "The loss of the whole run that nobody stops"
    d = tmp_path_factory.mktemp("undisturbed")
    for s in ("train", "valid", "test"): (d/f"{s}.txt").write_bytes(PROSE)
    p = start(d/"run", d); _, err = p.communicate(timeout=240)
    assert p.returncode == 0, err
    return loss_of(d/"run")

@pytest.mark.parametrize("sig,code", [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_run_that_is_stopped_can_go_on(tmp_path, text, undisturbed, sig, code):
    "It goes on after its last checkpoint, and ends where the undisturbed run ends"
    run = tmp_path/"run"
    p = start(run, text); wait_for_step(run, 20, p); p.send_signal(sig)
    _, err = p.communicate(timeout=60)
    assert p.returncode == code and (sig == signal.SIGKILL or "--resume" in err.splitlines()[-1]), err
    load_model(run)
    p = start(run, text, "--resume"); _, err = p.communicate(timeout=240)
    assert p.returncode == 0, err
    steps = [r["step"] for r in map(json.loads, (run/"metrics.jsonl").read_text().splitlines()) if "loss" in r]
    assert set(steps) == set(range(1, STEPS + 1))
    assert abs(loss_of(run) - undisturbed) < 1e-6*undisturbed
