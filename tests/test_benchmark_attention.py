"`okadfa benchmark attention`: rows, checks that find what is wrong, packages that are missing or look ahead, refusals"
import math, sys, types
import pytest, torch
from okadfa.attention.favor import favor_attention
from okadfa.core import InputError, read_rows
from okadfa.run import benchmark
from okadfa.run.benchmark import attention_floor, attention_variants, benchmark_attention, check_attention, check_decode
from okadfa.run.cli import main

SMALL = dict(m=16, d=16, heads=2, repeats=2, threads=1)
FLAGS = "--m 16 --d 16 --heads 2 --repeats 2 --threads 1 --contexts 16,64".split()

@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads(); torch.set_num_threads(1); yield; torch.set_num_threads(before)

def call(capsys, *args):
    "Exit code, stdout, stderr"
    code = 0
    try: main(["benchmark", "attention", *map(str, args)])
    except SystemExit as e: code = e.code or 0
    out = capsys.readouterr()
    return code, out.out, out.err

def module(monkeypatch, name, **names):
    "A made-up module under a dotted name"
    for i in range(1, name.count(".") + 2): monkeypatch.setitem(sys.modules, ".".join(name.split(".")[:i]), types.ModuleType(name))
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
    code, out, err = call(capsys, *FLAGS, "--n", "48,80,48", "--variants", "sdpa,naive,favor", "--what", "forward,training,decode", "--out", tmp_path)
    assert code == 0, err
    rows = read_rows(tmp_path/"attention.jsonl")
    assert len(rows) == 2*2*3 + 2*2*2 + 2                              # forward, training; decode at batch 1 and 8; contexts
    for r in rows:
        assert r["kind"] == "attention" and r["check"] == "ok" and 0 < r["error"] < 1e-4 and r["threads"] == 1 and r["where"] == "cpu"
        assert r["provenance"]["torch"] == torch.__version__ and r["provenance"]["device"] and "commit" in r["provenance"]
        s = r["seconds"]; assert 0 < s["q1"] <= s["median"] <= s["q3"]
    for r in rows:
        if r["what"] == "flatness": assert r["first"] == 16 and r["n"] in (16, 64) and r["ratio_first"]["median"] > 0; continue
        assert r["ratio"]["median"] > 0 and (r["variant"] != "sdpa" or r["ratio"] == dict(median=1, q1=1, q3=1))
        assert r["ratio_ours"]["median"] > 0 and (r["variant"] != "favor" or r["ratio_ours"] == dict(median=1, q1=1, q3=1))
    assert {r["impl"] for r in rows if r["variant"] == "favor" and r["what"] in ("forward", "training")} == {"chunk"}
    assert {r["batch"] for r in rows if r["what"] == "decode"} == {1, 8}
    for word in ("naive softmax", "FAVOR+ (ours), chunk", "training", "a token", "threads: 1"): assert word in out
    assert "check failed" not in out and "floor" not in out

def test_rows_of_memory(capsys, tmp_path):
    code, out, err = call(capsys, *FLAGS, "--n", 512, "--heads", 4, "--variants", "sdpa,naive,favor", "--what", "memory", "--out", tmp_path)
    assert code == 0, err
    peak = {r["variant"]: r["peak_bytes"] for r in read_rows(tmp_path/"attention.jsonl")}
    assert set(peak) == {"sdpa", "naive", "favor"} and min(peak.values()) > 0
    assert peak["naive"] > 2*512*512*4*4 > max(peak["sdpa"], peak["favor"])        # weights and their gradient, or scores
    assert "peak (MiB)" in out and "time / SDPA" not in out
    for r in read_rows(tmp_path/"attention.jsonl"):
        assert r["inputs_bytes"] == 4*4*512*16*4 and r["threads"] == 1 and r["peak_ratio"] == r["peak_bytes"]/peak["sdpa"] and "seconds" not in r

def test_one_variant_alone(tmp_path):
    torch.set_num_threads(2)
    row, = benchmark_attention(n=(64,), what=("training",), variants=("favor",), out=tmp_path, **SMALL)
    assert row["check"] == "ok" and row["seconds"]["median"] > 0 and row["ratio"] is None and "floor" not in row
    assert torch.get_num_threads() == 2 and row["threads"] == 1

def test_what_is_timed_is_the_variant(monkeypatch):
    calls = []
    def seen(q, k, v, features, **kw):
        y = favor_attention(q, k, v, features, **kw)
        if q.shape[2] == 77 and not kw: calls.append("forward"); y.requires_grad and y.register_hook(lambda g: calls.append("backward"))
        return y
    monkeypatch.setattr(benchmark, "favor_attention", seen)
    for what, each in (("forward", ["forward"]), ("training", ["forward", "backward"])):
        calls.clear(); benchmark_attention(n=(77,), what=(what,), variants=("favor",), **SMALL)
        assert calls == each*3 + ["forward"]                          # a round before, two timed ones, and the question which path ran

def test_the_path_that_ran(monkeypatch):
    f = benchmark.FavorFeatures(16, 16); q, k, v = torch.randn(3, 1, 2, 40, 16)
    assert benchmark._which_impl("forward", q, k, v, f) == "chunk"
    def other(q, k, v, f, impl="auto"): return favor_attention(q, k, v, f, impl="chunk" if impl == "chunk" else "ref")
    monkeypatch.setattr(benchmark, "favor_attention", other)
    assert benchmark._which_impl("forward", q, k, v, f) == "triton"

# ---- a variant whose check fails

def ahead(q, k, v, features, **kw): return favor_attention(q, k, v + 1e-6*v.mean(2, keepdim=True), features, **kw)   # too little for a tolerance
def off(q, k, v, features, **kw): return 1.01*favor_attention(q, k, v, features, **kw)
def no_gradient(q, k, v, features, **kw): return favor_attention(q, k.detach(), v, features, **kw) + 0*k.sum()
def not_finite(q, k, v, features, **kw): return favor_attention(q, k, v, features, **kw)/0
def raises(q, k, v, features, **kw): raise RuntimeError("no kernel\nfor this")

@pytest.mark.parametrize("wrong,says", [(ahead, "editing the future moved earlier outputs"), (off, "values: relative error 1.00e-02"),
                                        (no_gradient, "gradient of k"), (not_finite, "NaN or Inf"), (raises, "cannot run: RuntimeError: no kernel for this")])
def test_a_wrong_attention_has_no_speed(monkeypatch, capsys, tmp_path, wrong, says):
    monkeypatch.setattr(benchmark, "favor_attention", wrong)
    code, out, err = call(capsys, *FLAGS, "--n", 48, "--variants", "sdpa,favor", "--what", "forward,memory" if wrong is off else "training", "--out", tmp_path)
    assert code == 0, err
    for r in read_rows(tmp_path/"attention.jsonl"):
        if r["variant"] == "sdpa": assert r["check"] == "ok" and {"seconds", "peak_bytes"} & r.keys(); continue
        assert r["error"] is None or wrong is ahead
        assert r["check"].startswith("failed: ") and says in r["check"] and not {"seconds", "ratio", "peak_bytes", "impl"} & r.keys()
    assert "check failed" in out and says in out and "a cost" not in out

@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_one_per_cent_is_found_in_every_type(dtype):
    right = attention_variants(["favor", "sdpa", "naive"], 64, 128)[0]
    for v in right.values():
        verdict, error = check_attention(v, 64, dtype)
        assert verdict == "ok" and error < 0.6*benchmark.ATTENTION_TOLERANCE[dtype]
    v = right["favor"]
    verdict, error = check_attention(benchmark.AttentionVariant(lambda *x: 1.01*v.run(*x), v.truth, exact=True), 64, dtype)
    assert "values" in verdict and error is None

def test_a_wrong_state_has_no_speed(monkeypatch):
    f = benchmark.FavorFeatures(16, 16)
    for name in ("favor", "sdpa"): assert check_decode(name, f, 16)[0] == "ok"
    class Forgets(benchmark.FavorState):
        def step(self, q, k, v): self.S *= .99; return super().step(q, k, v)
    monkeypatch.setattr(benchmark, "FavorState", Forgets)
    rows = benchmark_attention(n=(32,), what=("decode",), variants=("sdpa", "favor"), contexts=(8,), **SMALL)
    assert {r["variant"]: r["check"][:6] for r in rows} == dict(sdpa="ok", favor="failed") and not any(r["what"] == "flatness" for r in rows)
    assert all(("seconds" in r) == (r["variant"] == "sdpa") for r in rows)

# ---- other people's packages

def test_a_missing_package_is_one_line(monkeypatch, capsys, tmp_path):
    gone(monkeypatch, "performer_pytorch")
    code, out, err = call(capsys, *FLAGS, "--n", 32, "--variants", "performer", "--what", "forward,memory", "--out", tmp_path)
    assert code == 0 and out == "performer-pytorch is not installed: pip install 'okadfa[bench]'\nnothing was measured\n", (out, err)
    assert not list(tmp_path.iterdir())
    module(monkeypatch, "performer_pytorch.performer_pytorch")               # there, but not what it was
    assert "cannot be imported" in call(capsys, *FLAGS, "--n", 32, "--variants", "performer", "--what", "forward")[1]

def fake_performer(monkeypatch, leaks):
    "The interface of performer-pytorch around features whose stabiliser is a maximum over all keys, or over nothing"
    def softmax_kernel(x, *, projection_matrix, is_query):
        dash = x @ projection_matrix.to(x.dtype).T
        return (dash - (x*x).sum(-1, keepdim=True)/32 - (dash.amax((-1, -2), keepdim=True).detach() if leaks else 0)).exp() + 1e-4
    class FastAttention(torch.nn.Module):
        def __init__(self, dim_heads, nb_features, causal):
            super().__init__()
            print("a word at the start")
            self.register_buffer("projection_matrix", torch.randn(nb_features, dim_heads)/4)
        def forward(self, q, k, v):
            return benchmark._weighted(*(softmax_kernel(x, projection_matrix=self.projection_matrix, is_query=False) for x in (q, k)), v, eps=1e-6)
    module(monkeypatch, "performer_pytorch.performer_pytorch", FastAttention=FastAttention, softmax_kernel=softmax_kernel)

def test_a_package_that_looks_ahead_keeps_its_time_and_the_verdict(monkeypatch, capsys, tmp_path):
    fake_performer(monkeypatch, leaks=True)
    code, out, err = call(capsys, *FLAGS, "--n", 48, "--variants", "performer,sdpa,favor", "--what", "forward", "--out", tmp_path)
    assert code == 0, err
    row = {r["variant"]: r for r in read_rows(tmp_path/"attention.jsonl")}["performer"]
    assert row["check"].startswith("failed: editing the future") and row["error"] < 1e-4 and row["seconds"]["median"] > 0 and row["ratio_ours"]["median"] > 0
    lines = [s for s in out.splitlines() if "forward" in s and "│" in s]
    assert "fails its causality check" in lines[-1] and "performer" in lines[-1]      # below the competitors, though asked for first
    assert "not a competitor's" in out.splitlines()[-1] and "a word at the start" not in out
    fake_performer(monkeypatch, leaks=False)
    assert benchmark_attention(n=(48,), what=("forward",), variants=("performer",), **SMALL)[0]["check"] == "ok"

def test_performer_pytorch_itself():
    pytest.importorskip("einops"); pytest.importorskip("performer_pytorch", exc_type=ImportError)
    verdict, error = check_attention(attention_variants(["performer"], 64, 128)[0]["performer"], 64)
    assert verdict.startswith("failed: editing the future") and error < 1e-4           # it is what it says, but for its stabiliser
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
    module(monkeypatch, "fla.ops.linear_attn", chunk_linear_attn=lambda *a, **kw: chunk_linear_attn(*a, causal=False, **kw))
    for v in attention_variants(["fla"], 16, 32)[0].values():
        verdict, _ = check_attention(v, 16); assert "values" in verdict and "editing the future" in verdict
    gone(monkeypatch, "fla")
    assert attention_variants(["fla"], 16, 32) == ({}, ["flash-linear-attention is not installed: pip install fla-core"])

# ---- what needs a GPU, with the CPU in its place

def test_the_fastest_backend_is_the_baseline(monkeypatch, capsys):
    B = torch.nn.attention.SDPBackend
    monkeypatch.setattr(benchmark, "_backends", lambda device: dict(flash=B.FLASH_ATTENTION, cudnn=B.CUDNN_ATTENTION, math=B.MATH))
    rows = benchmark_attention(n=(512,), what=("forward",), variants=("favor", "sdpa"), rates=(1e10, 1e12), **SMALL)
    assert [r["variant"] for r in rows] == ["sdpa", "favor"]
    sdpa, favor = rows
    took, best = sdpa["backends"], sdpa["backend"]
    assert set(took) == {"flash", "cudnn", "math"} and took["cudnn"].startswith("failed: it cannot run") and took[best] == min(took["flash"], took["math"])
    assert sdpa["ratio"] == dict(median=1, q1=1, q3=1) and sdpa["seconds"]["median"] == took[best] and favor["ratio"]["median"] > 0
    assert favor["floor"] == attention_floor("forward", 512, 16, 16, 2, 1, 4, 1e10, 1e12) and "floor" not in sdpa
    benchmark.print_attention(rows); out = capsys.readouterr().out
    assert f"SDPA, {best}" in out and "/ floor" in out
    monkeypatch.setattr(benchmark, "_backends", lambda device: dict(cudnn=B.CUDNN_ATTENTION))       # none can run
    rows = benchmark_attention(n=(64,), what=("forward",), variants=("sdpa", "favor"), **SMALL)
    assert [r["variant"] for r in rows] == ["sdpa", "favor"] and "cannot run" in rows[0]["check"] and "seconds" not in rows[0] and rows[1]["ratio"] is None

def test_floor():
    sizes = dict(n=1000, m=128, d=64, heads=8, batch=2, itemsize=2)
    slow = attention_floor("training", **sizes, bandwidth=1e9, flops=1e15)
    assert slow["seconds"] == slow["memory_s"] == 8*1000*64*8*2*2/1e9            # q, k, v, do read; out, dq, dk, dv written
    busy = attention_floor("training", **sizes, bandwidth=1e15, flops=1e9)
    assert math.isclose(busy["seconds"], 10*2*1000*128*64*8*2/1e9) and busy["seconds"] == busy["matmul_s"]
    assert attention_floor("forward", **sizes, bandwidth=1e9, flops=1e15)["seconds"] == slow["seconds"]/2
    assert all(x > 0 for x in benchmark.measured_rates("float32", "cpu", copy_bytes=2**16, side=32))

# ---- what is left out, what is refused

def test_too_large_is_left_out_in_one_line(monkeypatch, capsys, tmp_path):
    fake_performer(monkeypatch, leaks=True)
    monkeypatch.setattr(benchmark, "NAIVE_LIMIT", 64*64*2*4); monkeypatch.setattr(benchmark, "_free", lambda device: 1000)
    code, out, err = call(capsys, *FLAGS, "--n", "64,65", "--variants", "sdpa,naive,performer", "--what", "training", "--out", tmp_path)
    assert code == 0, err
    assert sorted((r["variant"], r["n"]) for r in read_rows(tmp_path/"attention.jsonl")) == [("naive", 64), ("sdpa", 64), ("sdpa", 65)]
    said = [s for s in out.splitlines() if "left out" in s]
    assert len(said) == 3 and said[1].startswith("naive softmax left out of training at n = 65") and "performer-pytorch" in said[0]

@pytest.mark.parametrize("flags,says", [
    ("--n 0", "n must"), ("--n -5", "n must"), ("--n 64,x", "n must"), ("--n ,", "n must"), ("--m 0", "m must"), ("--d 0", "d must"), ("--heads 0", "heads"),
    ("--batch 0", "batch"), ("--repeats 0", "repeats"), ("--threads 0", "threads"), ("--contexts 0", "contexts"), ("--m many", "--m"),
    ("--dtype int8", "dtype"), ("--dtype float64", "dtype"), ("--device tpu", "device"), ("--variants flash", "variants"), ("--variants sdpa,flash", "flash"),
    ("--variants ,", "variants"), ("--what speed", "what"), ("--what ,", "what"), ("--variants fla", "CUDA"), ("--speed 3", "No such option")])
def test_bad_flags(capsys, tmp_path, flags, says):
    out = tmp_path/"out"
    code, stdout, err = call(capsys, *"--n 16 --m 8 --d 8 --heads 1 --repeats 1 --threads 1".split(), *flags.split(), "--out", out)
    assert code == 2 and err.startswith("okadfa: ") and err.count("\n") == 1 and says in err and "Traceback" not in err, (code, err)
    assert not stdout and not out.exists()

@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_no_cuda(capsys, tmp_path):
    code, _, err = call(capsys, "--device", "cuda", "--out", tmp_path/"out")
    assert code == 2 and "no CUDA device" in err and err.count("\n") == 1 and not (tmp_path/"out").exists()

def test_out_must_be_a_folder(capsys, tmp_path):
    (tmp_path/"file").write_text("keep")
    code, _, err = call(capsys, *FLAGS, "--n", 16, "--out", tmp_path/"file")
    assert code == 2 and "not a folder" in err and (tmp_path/"file").read_text() == "keep"
    with pytest.raises(InputError): benchmark_attention(n=())
