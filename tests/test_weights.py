"Weights in few bits: the stack of symbols, scalar codes, formats of others, folders of safetensors, the benchmark"
import dataclasses, json
import numpy as np, pytest, torch
from safetensors.torch import load_file, save_file
from okadfa.bench.measure import run_benchmark
from okadfa.bench.weights import WeightsSettings, dithered, grid_steps, model_matrices, quantize_all
from okadfa.core import InputError, read_rows
from okadfa.models.checkpoint import save_model
from okadfa.models.folder import INDEX, load_quantized, quantize_folder, unpack_folder
from okadfa.models.lm import LMConfig, LanguageModel
from okadfa.run.cli import main
from okadfa.run.commands import row_bits
from okadfa.spectral.ans import TOTAL, ans_coder
from okadfa.spectral.container import PolarWeights, ScaledPolar, quantize_model, quantize_weight
from okadfa.spectral.kquants import RIVALS
from okadfa.spectral.polar import PolarTensor, polar_quantize
from okadfa.spectral.scalar import ScalarTensor, frequencies, scalar_quantize, table_bytes

def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))
def rel(w, got):
    w, got = (x.to(torch.complex128) for x in (w, got))
    return ((got - w).norm()/w.norm()).item()

@pytest.fixture
def without_constriction(monkeypatch):
    from okadfa.spectral import ans
    monkeypatch.setattr(ans.importlib.util, "find_spec", lambda name: None)

# ---- the stack

def some_table(rng, n):
    share = rng.random(n)**4
    freq = 1 + np.floor(share/share.sum()*((1 << TOTAL) - n)).astype(np.int64)
    freq[rng.integers(n)] += (1 << TOTAL) - freq.sum()
    return freq

@pytest.mark.parametrize("seed", range(6))
def test_both_coders_write_the_same_words(seed):
    pytest.importorskip("constriction")
    rng = np.random.default_rng(seed)
    tables = [some_table(rng, n) for n in (1, 2, 7, 300)]
    said = [rng.integers(0, len(t), m) for t, m in zip(tables, (5, 0, 900, 400))]
    sizes = rng.integers(2, 5000, 300)
    value = (rng.random(300)*sizes).astype(int)
    words = {}
    for impl in ("ref", "constriction"):
        coder = ans_coder(impl=impl)
        coder.push_uniform(value, sizes)
        for s, t in zip(said, tables): coder.push(s, t)
        words[impl] = coder.words()
    assert words["ref"].dtype == words["constriction"].dtype == np.uint32
    assert (words["ref"] == words["constriction"]).all()
    for impl in words:
        coder = ans_coder(words["ref"], impl)
        for s, t in reversed(list(zip(said, tables))): assert (coder.pop(len(s), t) == s).all()
        assert not coder.is_empty() and (coder.pop_uniform(sizes) == value).all() and coder.is_empty()

def test_a_coder_says_what_it_lacks(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(InputError, match="pip install constriction"): ans_coder(impl="constriction")
    with pytest.raises(InputError, match="auto, constriction or ref"): ans_coder(impl="rans")
    with pytest.raises(InputError, match="ends in zero"): ans_coder(np.array([1, 0], np.uint32))

@pytest.mark.parametrize("code", ["polar", "scalar"])
def test_files_are_the_same_without_the_library(code, without_constriction, monkeypatch):
    w = randn(40, 64)
    p = quantize_weight(w, 4.5, code)
    got = p.dequantize()
    monkeypatch.undo()
    q = quantize_weight(w, 4.5, code)
    assert p.to_bytes() == q.to_bytes() and torch.equal(q.dequantize(), got)

@pytest.mark.parametrize("method", ["hexagons", "rings"])
def test_lanes_and_stack_say_the_same(method):
    w = randn(60, 256, dtype=torch.complex64)*torch.logspace(-2, 0, 60)[:, None]
    made = {c: polar_quantize(w, 10, method=method, coder=c) for c in ("lanes", "stack")}
    for p in made.values():
        again = PolarTensor.from_bytes(p.to_bytes())
        assert torch.equal(again.dequantize(), p.dequantize()) and rel(w[4:], p.dequantize()[4:]) < .2
        assert p.nbytes <= 10*w.numel()/8
    assert made["stack"].numbers["lanes"] == 0 < made["lanes"].numbers["lanes"]
    stack = made["stack"]
    for words in (stack.arrays["words"][:-1], np.r_[stack.arrays["words"], np.uint32(9)]):
        with pytest.raises(InputError, match="stream|damaged"):
            dataclasses.replace(stack, arrays=stack.arrays | dict(words=words)).dequantize()
    with pytest.raises(InputError, match="stack or lanes"): polar_quantize(w, coder="heap")

# ---- scalar codes

@pytest.mark.parametrize("shape", [(256, 300), (9000,), (3, 50, 41), (1, 4096), (4096, 1), (70000,)])
@pytest.mark.parametrize("bits", [1.5, 2.6, 4.5, 9])
def test_scalar_budget_and_error(shape, bits):
    w = randn(*shape)
    p = scalar_quantize(w, bits)
    assert 8*len(p.to_bytes())/w.numel() <= bits and p.nbytes == len(p.to_bytes())
    q = ScalarTensor.from_bytes(p.to_bytes())
    assert torch.equal(q.dequantize(), p.dequantize()) and q.dequantize().shape == w.shape
    if w.numel() > 50_000: assert 2**-bits < rel(w, p.dequantize()) < (1.23 if bits < 5 else 1.4)*2**-bits

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64])
def test_scalar_types(dtype):
    w = randn(64, 96).to(dtype) if not dtype.is_complex else randn(64, 48, dtype=dtype)
    got = ScalarTensor.from_bytes(scalar_quantize(w, 8).to_bytes()).dequantize()
    assert got.dtype == dtype and rel(w, got) < .01

@pytest.mark.parametrize("code", ["polar", "scalar"])
def test_quiet_weights_are_not_drowned(code):
    quiet = torch.arange(512) % 16 != 0
    w = randn(512, 512)*torch.where(quiet, 1., 16.)
    got = {scaled: quantize_weight(w, 4.5, code, scaled=scaled) for scaled in (True, False)}
    for p in got.values(): assert 8*len(p.to_bytes())/w.numel() <= 4.5
    assert type(got[True]) is (ScaledPolar if code == "polar" else ScalarTensor)
    again = type(got[True]).from_bytes(got[True].to_bytes()).dequantize()
    assert torch.equal(again, got[True].dequantize()) and again.dtype == w.dtype
    error = {s: [rel(w[:, part], p.dequantize()[:, part]) for part in (quiet, ~quiet)] for s, p in got.items()}
    assert abs(error[True][0]/error[True][1] - 1) < .1 and error[False][0] > 1.4*error[True][0]
    for bad in (got[True].to_bytes()[:-3], got[True].to_bytes()[:9], b""):
        with pytest.raises(InputError): type(got[True]).from_bytes(bad)

def test_scalar_extremes():
    for w in (torch.zeros(40, 50), torch.full((30, 40), 3.), randn(30, 40)*1e-20, randn(5), torch.tensor(2.)):
        got = ScalarTensor.from_bytes(scalar_quantize(w, 8).to_bytes()).dequantize()
        assert got.shape == w.shape and rel(w, got) < .03 if w.any() else not got.any()
    for w, says in ((torch.zeros(0), "empty"), (torch.tensor([1., float("nan")]), "NaN"),
                    (torch.arange(4), "not supported"), (randn(4).to("meta"), "meta"), ([1.], "tensor"),
                    (randn(4)*1e35, "rescale")):
        with pytest.raises(InputError, match=says): scalar_quantize(w)
    for bits in (0, 13, "4", True):
        with pytest.raises(InputError, match="bits must"): scalar_quantize(randn(4), bits)

def test_damaged_scalar_bytes_are_refused():
    data = scalar_quantize(randn(30, 40)).to_bytes()
    for bad in (data[:-1], data[:20], b"", data[:100] + bytes([data[100] ^ 1]) + data[101:], data + b"0"):
        with pytest.raises(InputError): ScalarTensor.from_bytes(bad)

def test_tables_are_the_same_everywhere():
    "These numbers are part of the format"
    below = table_bytes(np.array([1000, 1500, 700, 90, 3, 0, 1]))
    assert below.tolist() == [0, 3, 12, 36, 75, 255, 88]
    freq = frequencies(below)
    assert freq.sum() == 1 << TOTAL and freq[6] == freq.max() and (freq[:6] == freq[12:6:-1]).all() and freq[-1] == 1
    assert freq.tolist()[6:] == FREQUENCIES
FREQUENCIES = [5020573, 3871387, 1775039, 221880, 7562, 1, 2452, 1]

# ---- formats of others

@pytest.mark.parametrize("name", RIVALS)
def test_formats_of_others(name):
    r, w = RIVALS[name], randn(96, 512)
    got = r.quantize(w)
    best = 2**-r.bits
    assert got.shape == w.shape and best < rel(w, got) < 2.5*best
    for code in ("polar", "scalar"): assert rel(w, quantize_weight(w, r.bits, code).dequantize()) < .8*rel(w, got)
    assert r.quantize(randn(7, 5)).shape == (7, 5) and not r.quantize(torch.zeros(4, 64)).any()

def test_a_format_gives_back_what_it_gave():
    for name in ("rtn4", "nf4"):
        w = RIVALS[name].quantize(randn(32, 64))
        assert rel(w, RIVALS[name].quantize(w)) < 1e-3

# ---- models and folders

def test_a_model_in_either_code(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(63, 80), torch.nn.Linear(80, 64))
    for code in ("polar", "scalar"):
        copied, weights = quantize_model(net, 4.5, code=code)
        weights.save(tmp_path/code)
        again = PolarWeights.load(tmp_path/code)
        assert all(torch.equal(again.state_dict()[k], v) for k, v in copied.state_dict().items())
        assert 4 < again.bits_per_weight < 4.55
        kinds = {name: type(p) for name, p in again.tensors.items()}                        # 63 columns are no pairs
        if code == "polar": assert kinds == {"1.weight": PolarTensor} and "0.weight" in again.kept
        else: assert kinds == {"0.weight": ScalarTensor, "1.weight": ScalarTensor}

def a_llama(folder):
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar
    disable_progress_bar()
    torch.manual_seed(0)
    sizes = dict(vocab_size=300, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1, tie_word_embeddings=True)).eval()
    model.save_pretrained(folder, max_shard_size="150KB")
    (folder/"tokenizer.json").write_text("{}")
    return model

def test_a_folder_of_transformers_there_and_back(tmp_path, capsys):
    from transformers import AutoModelForCausalLM
    model = a_llama(tmp_path/"m")
    assert (tmp_path/"m"/INDEX).exists() and len(list((tmp_path/"m").glob("*.safetensors"))) > 1
    for code in ("polar", "scalar"):
        small, plain = str(tmp_path/code), str(tmp_path/f"{code}-plain")
        there = str(tmp_path/"m"), "--bits", "6", "--code", code, "--out", small
        for args in (there, (small, "--unpack", "--out", plain)):
            with pytest.raises(SystemExit) as e: main(["quantize", *args])
            assert not e.value.code
        assert "bits a weight" in capsys.readouterr().out
        names = {p.name for p in (tmp_path/"m").iterdir()}
        assert {p.name for p in (tmp_path/f"{code}-plain").iterdir()} == names
        again = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
        ids = torch.arange(40)[None]
        with torch.no_grad(): assert 1e-4 < rel(model(ids).logits, again(ids).logits) < .06
        state = load_quantized(small)
        assert all(torch.equal(v, again.state_dict()[k]) for k, v in state.items())

def test_what_a_folder_may_not_be(tmp_path, capsys):
    a_llama(tmp_path/"m"); (tmp_path/"empty").mkdir()
    quantize_folder(tmp_path/"m", tmp_path/"small")
    nan = {"w.weight": torch.full((64, 64), float("nan"))}
    (tmp_path/"nan").mkdir(); save_file(nan, tmp_path/"nan"/"model.safetensors")
    (tmp_path/"cut").mkdir(); (tmp_path/"cut"/"model.safetensors").write_bytes(b"123")
    before = sorted(tmp_path.rglob("*"))
    for args, says in ((["nowhere", "--out", "x"], "no folder"), (["empty", "--out", "x"], "no safetensors"),
                       (["m", "--out", "x", "--bits", "12"], "one real weight"), (["m", "--out", "small"], "exists"),
                       (["m", "--out", "x", "--bits", "4,5"], "one size"),
                       (["m", "--out", "x", "--code", "o"], "polar or"),
                       (["m", "--out", "x", "--embedding-bits", "40"], "bits must"),
                       (["nan", "--out", "x"], "w.weight: w holds NaN"),
                       (["cut", "--out", "x"], "damaged"), (["small", "--out", "x"], "quantized already"),
                       (["m", "--unpack", "--out", "x"], "no quantized weights"),
                       (["small", "--unpack", "--bits", "4", "--out", "x"], "--bits has no effect"),
                       (["nowhere", "--unpack", "--out", "x"], "no quantized weights")):
        args = [str(tmp_path/a) if a in ("nowhere", "empty", "m", "nan", "cut", "small", "x") else a for a in args]
        with pytest.raises(SystemExit) as e: main(["quantize", *args])
        err = capsys.readouterr().err
        assert e.value.code == 2 and says in err and err.count("\n") == 1, (args, err)
    assert sorted(tmp_path.rglob("*")) == before
    data = (tmp_path/"small"/"polar.safetensors").read_bytes()
    (tmp_path/"small"/"polar.safetensors").write_bytes(data[:-9] + bytes([data[-9] ^ 4]) + data[-8:])
    with pytest.raises(InputError, match="damaged"): unpack_folder(tmp_path/"small", tmp_path/"x")

def test_what_is_kept_and_what_is_not(tmp_path):
    (tmp_path/"m").mkdir()
    state = {"embed.weight": randn(100, 64), "up.weight": randn(64, 65), "norm.weight": randn(5000),
             "tiny.weight": randn(9, 9), "steps": torch.arange(9000).view(90, 100),
             "experts": randn(3, 40, 50), "router.weight": randn(80, 64)}
    save_file(state, tmp_path/"m"/"model.safetensors")
    r = quantize_folder(tmp_path/"m", tmp_path/"q", skip=("router",))
    got = load_quantized(tmp_path/"q")
    exact = {k for k, v in state.items() if torch.equal(got[k], v)}
    assert exact == {"norm.weight", "tiny.weight", "steps", "router.weight"}
    assert r["matrices"] == 2 and r["embeddings"] == 1
    assert rel(state["embed.weight"], got["embed.weight"]) < .01 < rel(state["experts"], got["experts"]) < .1
    assert r["bytes_quantized"] == (tmp_path/"q"/"polar.safetensors").stat().st_size
    unpack_folder(tmp_path/"q", tmp_path/"p")
    assert all(torch.equal(v, got[k]) for k, v in load_file(tmp_path/"p"/"model.safetensors").items())

def test_rows_of_before_are_read_as_what_they_were():
    assert row_bits(dict(bits=12.0)) == 6 and row_bits(dict(bits_per_weight=4.5)) == 4.5

# ---- the benchmark

def test_dither_leaves_no_grid():
    on_grid = RIVALS["rtn4"].quantize(randn(64, 96))
    steps, moved = grid_steps(on_grid), dithered(on_grid, "a", 0)
    assert grid_steps(randn(64, 96)) is None and grid_steps(moved) is None
    assert rel(on_grid, RIVALS["rtn4"].quantize(on_grid)) < 1e-3 < .05 < rel(moved, RIVALS["rtn4"].quantize(moved))
    noise = ((moved - on_grid).view(-1, 32)/steps).flatten()
    assert noise.abs().max() < .5001 and abs(noise.var().item() - 1/12) < .005
    assert torch.equal(dithered(on_grid, "a", 0), moved) and not torch.equal(dithered(on_grid, "a", 1), moved)
    assert not torch.equal(dithered(on_grid, "b", 0), moved)

def test_rows_are_resumed(tmp_path):
    torch.manual_seed(0)
    save_model(LanguageModel(LMConfig(d_model=64, n_layers=1, n_heads=2, max_len=32, mixer="spectral")), tmp_path/"m",
               tokenizer="bytes")
    (tmp_path/"t.txt").write_text("one two three "*200)
    how = dict(model=str(tmp_path/"m"), data=str(tmp_path/"t.txt"), tokens=512, window=32,
               rows=str(tmp_path/"weights.jsonl"))
    first = run_benchmark("weights", WeightsSettings(**how, bits=(4.5,), methods=("scalar",)), tmp_path, say=str)
    assert [r["method"] for r in first] == ["reference", "scalar"] and first[1]["bits_per_weight"] <= 4.51
    both = WeightsSettings(**how, bits=(4.5,), methods=("scalar", "q4_k"), seeds=(0, 1))
    second = run_benchmark("weights", both, tmp_path, say=str)
    assert [(r["seed"], r["method"]) for r in second] == [(0, "q4_k"), (1, "reference"), (1, "scalar"), (1, "q4_k")]
    assert len(read_rows(tmp_path/"weights.jsonl")) == 6
    assert all(json.dumps(r) for r in second) and second[1]["nats"] == first[0]["nats"]
    for bad, says in ((dict(data="nowhere"), "text file"), (dict(bits=()), "bits"), (dict(window=1000), "window"),
                      (dict(methods=("octal",)), "methods"), (dict(seeds=()), "seeds")):
        with pytest.raises(InputError, match=says): WeightsSettings(**how | bad)

def test_bits_are_those_of_the_records():
    base = dict(a=randn(64, 96), b=randn(96, 128))
    got, m = quantize_all(base, "scalar", 4.5)
    size = sum(len(scalar_quantize(w, 4.5).to_bytes()) for w in base.values())
    assert m["bits_per_weight"] == 8*size/(64*96 + 96*128) and m["decoded_per_s"] > 0
    assert all(torch.equal(got[k], scalar_quantize(w, 4.5).dequantize()) for k, w in base.items())
    assert quantize_all(base, "q3_k", 0)[1]["bits_per_weight"] == 3.4375

def test_embeddings_are_not_among_the_matrices():
    names = model_matrices(LanguageModel(LMConfig(d_model=64, n_layers=1, n_heads=2, max_len=32)))
    assert names and not any("embed" in n for n in names)
