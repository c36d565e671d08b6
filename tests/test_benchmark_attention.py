"`okadfa benchmark attention`: rows, checks that find what is wrong, packages that are missing or look ahead, refusals"
import math, sys, types
import pytest, torch
from forked import forked_workers    # noqa: F401
from okadfa.attention.favor import FavorFeatures, FavorState, favor_attention
from okadfa.core import InputError, read_rows
from okadfa.bench import attention, rivals
from okadfa.bench.attention import AttentionSettings, attention_floor
from okadfa.bench.measure import measured_rates, run_benchmark
from okadfa.bench.rivals import AttentionVariant, attention_variants, check_attention, check_decode
from okadfa.run.cli import main

SMALL = dict(m=16, d=16, heads=2, repeats=2, threads=1)
FLAGS = "--m 16 --d 16 --heads 2 --repeats 2 --threads 1 --contexts 16,64".split()

@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads(); torch.set_num_threads(1); yield; torch.set_num_threads(before)

def rows_of(out=None, **settings): return run_benchmark("attention", AttentionSettings(**(SMALL | settings)), out)

def call(capsys, *args):
    "Exit code, stdout, stderr"
    code = 0
    try: main(["benchmark", "attention", *map(str, args)])
    except SystemExit as e: code = e.code or 0
    out = capsys.readouterr()
    return code, out.out, out.err

def measured(capsys, out, *args):
    "Rows that the command leaves in a folder, and what it prints"
    code, printed, err = call(capsys, *FLAGS, *args, "--out", out)
    assert code == 0, err
    return read_rows(out/"attention.jsonl"), printed

ONE = dict(median=1, q1=1, q3=1)      # a variant over itself

def module(monkeypatch, name, **names):
    "A made-up module under a dotted name"
    parts = name.split(".")
    for i in range(1, len(parts) + 1): monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(name))
    for k, v in names.items(): setattr(sys.modules[name], k, v)

def gone(monkeypatch, name):
    "A package that is not installed"
    class NotThere:
        def find_spec(self, found, *args):
            if found == name: raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    for x in [x for x in sys.modules if x == name or x.startswith(name + ".")]: monkeypatch.delitem(sys.modules, x)
    monkeypatch.setattr(sys, "meta_path", [NotThere(), *sys.meta_path])

# ---- rows

def test_rows_of_times(capsys, tmp_path):
    rows, out = measured(capsys, tmp_path, "--n", "48,80,48", "--variants", "sdpa,naive,favor",
                         "--what", "forward,training,decode")
    assert len(rows) == 2*2*3 + 2*2*2 + 2                # forward, training; decode at batch 1 and 8; contexts
    for r in rows:
        assert r["kind"] == "attention" and r["check"] == "ok" and 0 < r["error"] < 1e-4
        assert r["threads"] == 1 and r["where"] == "cpu"
        p = r["provenance"]; assert p["torch"] == torch.__version__ and p["device"] and "commit" in p
        s = r["seconds"]; assert 0 < s["q1"] <= s["median"] <= s["q3"]
    flat = [r for r in rows if r["what"] == "flatness"]
    assert [(r["n"], r["first"]) for r in flat] == [(16, 16), (64, 16)]
    assert all(r["ratio_first"]["median"] > 0 for r in flat)
    for r in rows:
        if r["what"] == "flatness": continue
        assert r["ratio"]["median"] > 0 and (r["variant"] != "sdpa" or r["ratio"] == ONE)
        assert r["ratio_ours"]["median"] > 0 and (r["variant"] != "favor" or r["ratio_ours"] == ONE)
    timed = [r for r in rows if r["variant"] == "favor" and r["what"] in ("forward", "training")]
    assert {r["impl"] for r in timed} == {"chunk"}
    assert {r["batch"] for r in rows if r["what"] == "decode"} == {1, 8}
    for word in ("naive softmax", "FAVOR+ (ours), chunk", "training", "a token", "threads: 1"): assert word in out
    assert "check failed" not in out and "floor" not in out

def test_rows_of_memory(capsys, tmp_path, forked_workers):
    rows, out = measured(capsys, tmp_path, "--n", 512, "--heads", 4, "--variants", "sdpa,naive,favor",
                         "--what", "memory")
    peak = {r["variant"]: r["peak_bytes"] for r in rows}
    assert set(peak) == {"sdpa", "naive", "favor"} and min(peak.values()) > 0
    weights = 512*512*4*4                              # twice: weights and their gradient, or scores
    assert peak["naive"] > 2*weights > max(peak["sdpa"], peak["favor"])
    assert "peak (MiB)" in out and "time / SDPA" not in out
    for r in rows:
        assert r["inputs_bytes"] == 4*4*512*16*4 and r["threads"] == 1 and "seconds" not in r
        assert r["peak_ratio"] == r["peak_bytes"]/peak["sdpa"]

def test_one_variant_alone(tmp_path):
    torch.set_num_threads(2)
    row, = rows_of(tmp_path, n=(64,), what=("training",), variants=("favor",))
    assert row["check"] == "ok" and row["seconds"]["median"] > 0 and row["ratio"] is None and "floor" not in row
    assert torch.get_num_threads() == 2 and row["threads"] == 1

def test_what_is_timed_is_the_variant(monkeypatch):
    calls = []
    def seen(q, k, v, features, **kw):
        y = favor_attention(q, k, v, features, **kw)
        if q.shape[2] != 77 or kw: return y
        calls.append("forward")
        if y.requires_grad: y.register_hook(lambda g: calls.append("backward"))
        return y
    for where in (rivals, attention): monkeypatch.setattr(where, "favor_attention", seen)
    for what, each in (("forward", ["forward"]), ("training", ["forward", "backward"])):
        calls.clear(); rows_of(n=(77,), what=(what,), variants=("favor",))
        assert calls == each*3 + ["forward"]      # a round before, two timed ones, and the question which path ran

def test_the_path_that_ran(monkeypatch):
    f = FavorFeatures(16, 16); q, k, v = torch.randn(3, 1, 2, 40, 16)
    assert attention._which_impl("forward", q, k, v, f) == "chunk"
    def other(q, k, v, f, impl="auto"): return favor_attention(q, k, v, f, impl="chunk" if impl == "chunk" else "ref")
    monkeypatch.setattr(attention, "favor_attention", other)
    assert attention._which_impl("forward", q, k, v, f) == "triton"

# ---- a variant whose check fails

def ahead(q, k, v, features, **kw):      # too little for a tolerance
    return favor_attention(q, k, v + 1e-6*v.mean(2, keepdim=True), features, **kw)
def off(q, k, v, features, **kw): return 1.01*favor_attention(q, k, v, features, **kw)
def no_gradient(q, k, v, features, **kw): return favor_attention(q, k.detach(), v, features, **kw) + 0*k.sum()
def not_finite(q, k, v, features, **kw): return favor_attention(q, k, v, features, **kw)/0
def raises(q, k, v, features, **kw): raise RuntimeError("no kernel\nfor this")

@pytest.mark.parametrize("wrong,says", [
    (ahead, "editing the future moved earlier outputs"), (off, "values: relative error 1.00e-02"),
    (no_gradient, "gradient of k"), (not_finite, "NaN or Inf"),
    (raises, "cannot run: RuntimeError: no kernel for this")])
def test_a_wrong_attention_has_no_speed(monkeypatch, capsys, tmp_path, wrong, says):
    monkeypatch.setattr(rivals, "favor_attention", wrong)
    what = "forward,memory" if wrong is off else "training"
    rows, out = measured(capsys, tmp_path, "--n", 48, "--variants", "sdpa,favor", "--what", what)
    assert {r["variant"] for r in rows} == {"sdpa", "favor"}
    for r in rows:
        if r["variant"] == "sdpa": assert r["check"] == "ok" and {"seconds", "peak_bytes"} & r.keys(); continue
        assert r["error"] is None or wrong is ahead
        assert r["check"].startswith("failed: ") and says in r["check"]
        assert not {"seconds", "ratio", "peak_bytes", "impl"} & r.keys()
    assert "check failed" in out and says in out and "a cost" not in out

@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_one_per_cent_is_found_in_every_type(dtype):
    right = attention_variants(["favor", "sdpa", "naive"], 64, 128)[0]
    for v in right.values():
        verdict, error = check_attention(v, 64, dtype)
        assert verdict == "ok" and error < 0.6*rivals.ATTENTION_TOLERANCE[dtype]
    v = right["favor"]
    wrong = AttentionVariant(lambda *x: 1.01*v.run(*x), v.truth, exact=True)
    verdict, error = check_attention(wrong, 64, dtype)
    assert "values" in verdict and error is None

def test_a_wrong_state_has_no_speed(monkeypatch):
    f = FavorFeatures(16, 16)
    for name in ("favor", "sdpa"): assert check_decode(name, f, 16)[0] == "ok"
    class Forgets(FavorState):
        def step(self, q, k, v): self.S *= .99; return super().step(q, k, v)
    monkeypatch.setattr(rivals, "FavorState", Forgets)
    rows = rows_of(n=(32,), what=("decode",), variants=("sdpa", "favor"), contexts=(8,))
    assert {r["variant"]: r["check"][:6] for r in rows} == dict(sdpa="ok", favor="failed")
    assert not any(r["what"] == "flatness" for r in rows)
    assert all(("seconds" in r) == (r["variant"] == "sdpa") for r in rows)

# ---- other people's packages

def test_a_missing_package_is_one_line(monkeypatch, capsys, tmp_path):
    gone(monkeypatch, "performer_pytorch")
    flags = [*FLAGS, "--n", 32, "--variants", "performer", "--what"]
    code, out, err = call(capsys, *flags, "forward,memory", "--out", tmp_path)
    missing = "performer-pytorch is not installed: pip install 'okadfa[bench]'\n"
    assert code == 0 and out == missing + "nothing was measured\n", (out, err)
    assert not list(tmp_path.iterdir())
    module(monkeypatch, "performer_pytorch.performer_pytorch")               # there, but not what it was
    assert "cannot be imported" in call(capsys, *flags, "forward")[1]

def fake_performer(monkeypatch, leaks):
    "The interface of performer-pytorch around features whose stabiliser is a maximum over all keys, or over nothing"
    def softmax_kernel(x, *, projection_matrix, is_query):
        dash = x @ projection_matrix.to(x.dtype).T
        stabiliser = dash.amax((-1, -2), keepdim=True).detach() if leaks else 0
        return (dash - (x*x).sum(-1, keepdim=True)/32 - stabiliser).exp() + 1e-4
    class FastAttention(torch.nn.Module):
        def __init__(self, dim_heads, nb_features, causal):
            super().__init__()
            print("a word at the start")
            self.register_buffer("projection_matrix", torch.randn(nb_features, dim_heads)/4)
        def forward(self, q, k, v):
            def phi(x): return softmax_kernel(x, projection_matrix=self.projection_matrix, is_query=False)
            return rivals.weighted_sum(phi(q), phi(k), v, eps=1e-6)
    names = dict(FastAttention=FastAttention, softmax_kernel=softmax_kernel)
    module(monkeypatch, "performer_pytorch.performer_pytorch", **names)

def test_a_package_that_looks_ahead_keeps_its_time_and_the_verdict(monkeypatch, capsys, tmp_path):
    fake_performer(monkeypatch, leaks=True)
    rows, out = measured(capsys, tmp_path, "--n", 48, "--variants", "performer,sdpa,favor", "--what", "forward")
    row = {r["variant"]: r for r in rows}["performer"]
    assert row["check"].startswith("failed: editing the future") and row["error"] < 1e-4
    assert row["seconds"]["median"] > 0 and row["ratio_ours"]["median"] > 0
    lines = [s for s in out.splitlines() if "forward" in s and "│" in s]
    # below the competitors, though asked for first
    assert "fails its causality check" in lines[-1] and "performer" in lines[-1]
    assert "not a competitor's" in out.splitlines()[-1] and "a word at the start" not in out
    fake_performer(monkeypatch, leaks=False)
    assert rows_of(n=(48,), what=("forward",), variants=("performer",))[0]["check"] == "ok"

def test_performer_pytorch_itself():
    pytest.importorskip("einops"); pytest.importorskip("performer_pytorch", exc_type=ImportError)
    verdict, error = check_attention(attention_variants(["performer"], 64, 128)[0]["performer"], 64)
    # it is what it says, but for its stabiliser
    assert verdict.startswith("failed: editing the future") and error < 1e-4
    assert int(verdict.split("by ")[1].rstrip("%")) >= 10

def test_flash_linear_attention_gets_its_layout(monkeypatch):
    "A stand-in with its interface: [b n h .], a pair returned"
    def chunk_linear_attn(q, k, v, scale=None, normalize=True, causal=True):
        assert q.shape[1] == 150 and q.is_contiguous() and scale == 1. and normalize
        A = torch.einsum("bnhm,bjhm->bhnj", q, k)
        if causal: A = A.tril()
        return torch.einsum("bhnj,bjhd->bnhd", A/A.sum(-1, keepdim=True), v), None
    module(monkeypatch, "fla.ops.linear_attn", chunk_linear_attn=chunk_linear_attn)
    found, notes = attention_variants(["fla"], 16, 32)
    assert list(found) == ["fla", "fla, features given"] and not notes
    for v in found.values(): assert check_attention(v, 16)[0] == "ok" and not v.ours
    def hears_all(*args, **kw): return chunk_linear_attn(*args, causal=False, **kw)
    module(monkeypatch, "fla.ops.linear_attn", chunk_linear_attn=hears_all)
    for v in attention_variants(["fla"], 16, 32)[0].values():
        verdict, _ = check_attention(v, 16); assert "values" in verdict and "editing the future" in verdict
    gone(monkeypatch, "fla")
    missing = "flash-linear-attention is not installed: pip install fla-core"
    assert attention_variants(["fla"], 16, 32) == ({}, [missing])

# ---- what needs a GPU, with the CPU in its place

def test_the_fastest_backend_is_the_baseline(monkeypatch, capsys):
    B = torch.nn.attention.SDPBackend
    backends = dict(flash=B.FLASH_ATTENTION, cudnn=B.CUDNN_ATTENTION, math=B.MATH)
    monkeypatch.setattr(rivals, "_backends", lambda device: backends)
    rows = rows_of(n=(512,), what=("forward",), variants=("favor", "sdpa"), rates=(1e10, 1e12))
    assert [r["variant"] for r in rows] == ["sdpa", "favor"]
    sdpa, favor = rows
    took, best = sdpa["backends"], sdpa["backend"]
    assert set(took) == set(backends) and took["cudnn"].startswith("failed: it cannot run")
    assert took[best] == min(took["flash"], took["math"])
    assert sdpa["ratio"] == ONE and sdpa["seconds"]["median"] == took[best] and favor["ratio"]["median"] > 0
    assert favor["floor"] == attention_floor("forward", 512, 16, 16, 2, 1, 4, 1e10, 1e12) and "floor" not in sdpa
    attention.show_attention(rows); out = capsys.readouterr().out
    assert f"SDPA, {best}" in out and "/ floor" in out
    monkeypatch.setattr(rivals, "_backends", lambda device: dict(cudnn=B.CUDNN_ATTENTION))       # none can run
    sdpa, favor = rows_of(n=(64,), what=("forward",), variants=("sdpa", "favor"))
    assert sdpa["variant"] == "sdpa" and "cannot run" in sdpa["check"] and "seconds" not in sdpa
    assert favor["variant"] == "favor" and favor["ratio"] is None

def test_floor():
    sizes = dict(n=1000, m=128, d=64, heads=8, batch=2, itemsize=2)
    slow = attention_floor("training", **sizes, bandwidth=1e9, flops=1e15)
    assert slow["seconds"] == slow["memory_s"] == 8*1000*64*8*2*2/1e9      # q, k, v, do read; out, dq, dk, dv written
    busy = attention_floor("training", **sizes, bandwidth=1e15, flops=1e9)
    assert math.isclose(busy["seconds"], 10*2*1000*128*64*8*2/1e9) and busy["seconds"] == busy["matmul_s"]
    assert attention_floor("forward", **sizes, bandwidth=1e9, flops=1e15)["seconds"] == slow["seconds"]/2
    assert all(x > 0 for x in measured_rates("float32", "cpu", copy_bytes=2**16, side=32))

# ---- what is left out, what is refused

def test_too_large_is_left_out_in_one_line(monkeypatch, capsys, tmp_path):
    fake_performer(monkeypatch, leaks=True)
    monkeypatch.setattr(attention, "NAIVE_LIMIT", 64*64*2*4)
    monkeypatch.setattr(attention, "_free_memory", lambda device: 1000)
    rows, out = measured(capsys, tmp_path, "--n", "64,65", "--variants", "sdpa,naive,performer", "--what", "training")
    assert sorted((r["variant"], r["n"]) for r in rows) == [("naive", 64), ("sdpa", 64), ("sdpa", 65)]
    said = [s for s in out.splitlines() if "left out" in s]
    assert len(said) == 3 and "performer-pytorch" in said[0]
    assert said[1].startswith("naive softmax left out of training at n = 65")

@pytest.mark.parametrize("flags,says", [
    ("--n 0", "n must"), ("--n -5", "n must"), ("--n 64,x", "n must"), ("--n ,", "n must"), ("--m 0", "m must"),
    ("--d 0", "d must"), ("--heads 0", "heads"), ("--batch 0", "batch"), ("--repeats 0", "repeats"),
    ("--threads 0", "threads"), ("--contexts 0", "contexts"), ("--m many", "--m"), ("--dtype int8", "dtype"),
    ("--dtype float64", "dtype"), ("--device tpu", "device"), ("--variants flash", "variants"),
    ("--variants sdpa,flash", "flash"), ("--variants ,", "variants"), ("--what speed", "what"), ("--what ,", "what"),
    ("--variants fla", "CUDA"), ("--speed 3", "No such option")])
def test_bad_flags(capsys, tmp_path, flags, says):
    out, small = tmp_path/"out", "--n 16 --m 8 --d 8 --heads 1 --repeats 1 --threads 1"
    code, stdout, err = call(capsys, *small.split(), *flags.split(), "--out", out)
    assert code == 2 and err.startswith("okadfa: ") and err.count("\n") == 1 and says in err, (code, err)
    assert "Traceback" not in err and not stdout and not out.exists()

@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_no_cuda(capsys, tmp_path):
    code, _, err = call(capsys, "--device", "cuda", "--out", tmp_path/"out")
    assert code == 2 and "no CUDA device" in err and err.count("\n") == 1 and not (tmp_path/"out").exists()

def test_out_must_be_a_folder(capsys, tmp_path):
    (tmp_path/"file").write_text("keep")
    code, _, err = call(capsys, *FLAGS, "--n", 16, "--out", tmp_path/"file")
    assert code == 2 and "not a folder" in err and (tmp_path/"file").read_text() == "keep"
    with pytest.raises(InputError): AttentionSettings(n=())
