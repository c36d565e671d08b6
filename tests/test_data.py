"""Text, tokens and windows: grids of sizes, damaged and missing input, the hub without a network, the real files where
they are"""
import json, math, os, re, subprocess, sys
from pathlib import Path
import numpy as np
import pyarrow
import pytest
import torch
from conftest import byte_pairs
from okadfa.core import InputError
from okadfa.run import data as D
from okadfa.run.data import Split, TrainWindows, count_words, eval_batches, load_corpus, load_tokenizer, perplexities
from okadfa.spectral.bytes import ByteEncoder
from pyarrow import parquet

DATA = Path(os.environ.get("OKADFA_DATA") or Path(__file__).resolve().parents[2]/"shared"/"data")
BOS = 60_000

def ramp(n): return Split(np.arange(n, dtype=np.uint16), n, max(n, 1), "")

def one_line(err): assert "\n" not in str(err.value) and len(str(err.value)) < 400; return str(err.value)

@pytest.fixture
def folder(tmp_path):
    d = tmp_path/"text"; d.mkdir()
    (d/"train.txt").write_text("one two\nthree é 語\n"*20); (d/"valid.txt").write_text("four five\n"*5)
    return d

@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    "Folders of two small vocabularies in GPT-2's two files"
    texts = ["one two three four\n \n five one two\n"*20, "the cat \n\n\n sat on the mat\n\n"*9]
    return [byte_pairs(tmp_path_factory.mktemp(f"bpe{size}")/"gpt2", texts, size) for size in (265, 275)]

# ---- windows

@pytest.mark.parametrize("seq_len", [1, 2, 5, 16])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_eval_counts_every_token_once(seq_len, batch_size):
    for n in sorted({1, max(1, seq_len - 1), seq_len, seq_len + 1, 2*seq_len, 3*seq_len + 2, 50}):
        want = torch.cat([torch.tensor([BOS]), torch.arange(n - 1)])
        for stride in [None, *range(1, seq_len + 1)]:
            step, seen, rows = stride or seq_len, np.zeros(n, int), 0
            for ids, targets in eval_batches(ramp(n), seq_len, BOS, batch_size, stride):
                assert ids.dtype == targets.dtype == torch.int64 and ids.shape == targets.shape
                assert 1 <= len(ids) <= batch_size and ids.shape[1] == seq_len
                for x, t in zip(ids, targets):
                    s = rows*step; real = min(seq_len, n - s); rows += 1
                    assert torch.equal(x[:real], want[s:s + real])         # inputs: the text moved on by one, from bos
                    assert (x[real:] == BOS).all() and (t[real:] == -100).all()
                    j = (t != -100).nonzero().ravel()
                    assert torch.equal(t[j], s + j) and len(j)
                    if rows > 1: assert j.min() >= seq_len - step          # only the newest of a later window
                    seen[t[j].numpy()] += 1
            assert (seen == 1).all(), (n, seq_len, stride)
            assert rows == 1 + max(0, math.ceil((n - seq_len)/step))

@pytest.mark.parametrize("kw", [dict(seq_len=0), dict(seq_len=-2), dict(seq_len=2.5), dict(batch_size=0),
                                dict(stride=0), dict(stride=-1), dict(stride=9), dict(bos_id=-1), dict(seq_len=True)])
def test_eval_refuses_sizes_before_the_first_batch(kw):
    with pytest.raises(InputError) as e: eval_batches(ramp(20), **(dict(seq_len=8, bos_id=0, batch_size=2) | kw))
    assert next(iter(kw)) in one_line(e)

@pytest.mark.parametrize("n,seq_len", [(2, 1), (9, 8), (100, 7)])
def test_train_windows_reach_both_ends(n, seq_len):
    ds = TrainWindows(ramp(n), seq_len, 4000, seed=1)
    starts = {ds.start(i) for i in range(4000)}
    assert starts == set(range(n - seq_len))
    ids, targets = ds[5]
    assert torch.equal(ids, ds.start(5) + torch.arange(seq_len)) and torch.equal(targets, ids + 1)
    assert ids.dtype == torch.int64

def test_train_windows_are_a_function_of_seed_and_index():
    ds = TrainWindows(ramp(50_000), 8, 32, seed=7)
    # Written down once: a resumed run, under any later version, must see these.
    assert [ds.start(i) for i in (0, 1, 31)] == [45855, 17982, 22555]
    want = torch.stack([ds[i][0] for i in range(32)])
    for workers in (0, 2):
        got = torch.cat([x for x, _ in torch.utils.data.DataLoader(ds, batch_size=5, num_workers=workers)])
        assert torch.equal(got, want)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0)).tolist()
    torch.manual_seed(99); np.random.seed(99)
    assert all(torch.equal(ds[i][0], want[i]) for i in order)
    assert [TrainWindows(ramp(50_000), 8, 32, seed=8).start(i) for i in range(4)] != [ds.start(i) for i in range(4)]
    for i in (32, -1):
        with pytest.raises(IndexError): ds[i]

@pytest.mark.parametrize("n,kw,word", [(8, {}, "9"), (1, {}, "8"), (50, dict(seq_len=0), "seq_len"),
                                       (50, dict(n_samples=-3), "n_samples"), (50, dict(seed=-1), "seed")])
def test_train_windows_refuse(n, kw, word):
    with pytest.raises(InputError) as e: TrainWindows(ramp(n), **(dict(seq_len=8, n_samples=4, seed=0) | kw))
    assert word in one_line(e)
    TrainWindows(ramp(9), 8, 1)      # the shortest text that will do

# ---- folders, cache, errors

@pytest.mark.parametrize("names", [("train.txt", "valid.txt", "test.txt"), ("train.txt", "validation.txt", None),
                                   ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens")])
def test_folder_file_names(tmp_path, names):
    # Carriage returns and bad UTF-8 are kept
    texts = dict(train=b"a b\r\nc", valid=b"\xff\xfe any bytes\n", test=b" \n")
    (d := tmp_path/"t").mkdir()
    for b, f in zip(texts.values(), names):
        if f: (d/f).write_bytes(b)
    c = load_corpus(d, cache=tmp_path/"c")
    assert c.name == "t" and list(c.splits) == [k for k, f in zip(texts, names) if f]
    for k, s in c.splits.items():
        assert c.tokenizer.decode_bytes(s.tokens) == texts[k] and s.n_bytes == len(texts[k]) == len(s.tokens)
        assert isinstance(s.tokens, np.memmap) and s.tokens.dtype == np.uint16
        with pytest.raises(ValueError): s.tokens[0] = 1

def test_default_cache_and_home(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path/"xdg")); load_corpus(folder)
    assert len(list((tmp_path/"xdg"/"okadfa"/"tokens").iterdir())) == 4
    monkeypatch.setenv("XDG_CACHE_HOME", ""); monkeypatch.setenv("HOME", str(tmp_path/"home")); load_corpus(folder)
    assert len(list((tmp_path/"home"/".cache"/"okadfa"/"tokens").iterdir())) == 4

def test_wide_vocabularies_take_four_bytes(folder, tmp_path):
    class Wide(ByteEncoder):
        vocab_size, fingerprint = 65_537, "wide"
        def encode(self, b): return np.frombuffer(b, np.uint8).astype(np.uint32) + 65_000
    s = load_corpus(folder, Wide(), tmp_path/"c").splits["valid"]
    assert s.tokens.dtype == np.uint32 and s.tokens[0] == 65_000 + ord("f")
    assert D.token_dtype(65_536) == np.uint16 and D.token_dtype(65_537) == np.uint32

def test_cache_follows_text_and_vocabulary(folder, tmp_path, bpe):
    files = lambda: {p: p.stat().st_mtime_ns for p in (tmp_path/"c").iterdir()}
    load_corpus(folder, bpe[0], tmp_path/"c"); a = files()
    load_corpus(folder, bpe[0], tmp_path/"c"); assert files() == a                  # read
    load_corpus(folder, bpe[1], tmp_path/"c"); b = files(); assert len(b) == 8      # another vocabulary
    (folder/"valid.txt").write_text("four six\n")
    c = load_corpus(folder, bpe[1], tmp_path/"c"); assert len(files()) == 10        # another text
    assert c.tokenizer.decode(c.splits["valid"].tokens) == "four six\n"

@pytest.mark.parametrize("damage", ["flip", "cut", "grow", "empty", "gone", "seal cut", "seal list", "seal gone"])
def test_damaged_cache_is_made_again(folder, tmp_path, damage):
    want = np.array(load_corpus(folder, cache=tmp_path).splits["valid"].tokens)
    f = next(p for p in tmp_path.glob("*.bin") if p.read_bytes() == want.tobytes())
    b, seal = f.read_bytes(), f.with_suffix(".json")
    if damage == "gone": f.unlink()
    elif damage == "seal gone": seal.unlink()
    elif damage == "seal cut": seal.write_text(seal.read_text()[:-4])
    elif damage == "seal list": seal.write_text("[]")
    else:
        bad = dict(flip=b[:9] + bytes([b[9] ^ 4]) + b[10:], cut=b[:-2], grow=b + b"\0\0", empty=b"")[damage]
        f.unlink(); f.write_bytes(bad)      # a new file: the old one is still mapped
    assert np.array_equal(load_corpus(folder, cache=tmp_path).splits["valid"].tokens, want)
    assert f.read_bytes() == b and json.loads(seal.read_text())["n"] == len(want)

def test_write_that_fails_leaves_nothing(folder, tmp_path, monkeypatch):
    def full(*_): raise OSError(28, "No space left on device")
    with monkeypatch.context() as m:
        m.setattr(D.os, "replace", full)
        with pytest.raises(InputError) as e: load_corpus(folder, cache=tmp_path/"c")
    assert "No space left" in one_line(e) and not list((tmp_path/"c").iterdir())
    (tmp_path/"file").write_text("")
    with pytest.raises(InputError) as e: load_corpus(folder, cache=tmp_path/"file")
    assert "cache" in one_line(e)
    assert load_corpus(folder, cache=tmp_path/"c").splits["valid"].n_words == 15

def break_text(folder, bpe, how):
    "Break one thing; return load_corpus's arguments and words its message must hold"
    if how == "no folder": return (folder/"gone", "bytes"), ["gone", "train.txt"]
    if how == "unknown name": return ("wikitext-7", "bytes"), ["wikitext-7", "wikitext-2"]
    if how == "a file": return (folder/"train.txt", "bytes"), ["train.txt"]
    if how == "no train": (folder/"train.txt").unlink(); return (folder, "bytes"), ["train", "wiki.train.tokens"]
    if how == "no valid": (folder/"valid.txt").unlink(); return (folder, "bytes"), ["valid.txt", "validation.txt"]
    if how == "empty": (folder/"test.txt").write_bytes(b""); return (folder, "bytes"), ["test.txt", "empty"]
    if how == "not UTF-8":
        (folder/"valid.txt").write_bytes(b"good \xc3\xa9 bad \xc3(")
        return (folder, bpe[0]), ["valid.txt", "offset 12", "0xc3"]
    if how == "no tokenizer folder": return (folder, "./none/at/all"), ["./none/at/all"]
    if how == "no tokenizer files": return (folder, folder), ["tokenizer.json"]
    (folder/"tokenizer.json").write_text("{"); return (folder, folder), ["cannot read a tokenizer"]

@pytest.mark.parametrize("how", ["no folder", "unknown name", "a file", "no train", "no valid", "empty", "not UTF-8",
                                 "no tokenizer folder", "no tokenizer files", "broken tokenizer"])
def test_refused_with_nothing_written(folder, tmp_path, bpe, how):
    args, words = break_text(folder, bpe, how)
    with pytest.raises(InputError) as e: load_corpus(*args, cache=tmp_path/"c")
    msg = one_line(e)
    assert all(w in msg for w in words), msg
    assert not (tmp_path/"c").exists()

@pytest.mark.parametrize("kw", [dict(data=""), dict(tokenizer=""), dict(cache=""), dict(data="  ")])
def test_an_empty_name_is_not_the_default(tmp_path, monkeypatch, folder, kw):
    monkeypatch.chdir(tmp_path)      # an empty cache folder would be this one
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError) as e: load_corpus(**dict(data=folder, tokenizer="bytes", cache=tmp_path/"c") | kw)
    assert f"{next(iter(kw))} is empty" in one_line(e) and sorted(tmp_path.rglob("*")) == before

def test_an_empty_tokenizer_is_none():
    with pytest.raises(InputError) as e: load_tokenizer("")
    assert "tokenizer is empty" in one_line(e)

# ---- tokenizers

def test_bytes_tokenizer_is_one_of_them():
    t = load_tokenizer()
    assert (t.name, t.vocab_size, t.bos_id) == ("bytes", 257, 256) and t.fingerprint == ByteEncoder().fingerprint
    assert load_tokenizer(t) is t

def test_subwords(bpe):
    a, b = map(load_tokenizer, bpe)
    assert a.fingerprint != b.fingerprint and a.fingerprint == load_tokenizer(bpe[0]).fingerprint
    assert (a.vocab_size, b.vocab_size) == (265, 275)
    assert a.decode([a.bos_id]) == "<|endoftext|>" and a.cuttable
    for s in ("", "one two\n \n é 語 \t\n\n\n", " "*50, "x<|endoftext|> y"):
        ids = a.encode(s.encode())
        assert ids.dtype == np.uint16 and a.decode(ids) == a.decode(torch.tensor(ids.astype(np.int64))) == s
    with pytest.raises(InputError): a.decode([265])

def test_pieces_give_the_tokens_of_the_whole(bpe):
    tok, rng = load_tokenizer(bpe[1]), np.random.default_rng(0)
    alphabet = ["a", "one", " ", "\n", "\t", "\r\n", "'s", "é", "語", "\u00a0", "\u3000", ".", "12", "<|endoftext|>"]
    cuts = 0
    for _ in range(60):
        s = "".join(rng.choice(alphabet, 300))
        parts = list(D.pieces(s, 5)); cuts += len(parts) - 1
        assert "".join(parts) == s
        whole = tok.fast.encode(s, add_special_tokens=False).ids
        assert [i for p in parts for i in tok.fast.encode(p, add_special_tokens=False).ids] == whole
    assert cuts > 300

def test_other_rules_are_encoded_in_one_go(bpe, tmp_path, monkeypatch):
    j = json.loads(load_tokenizer(bpe[0]).fast.to_str())
    j["pre_tokenizer"] = dict(type="ByteLevel", add_prefix_space=True, trim_offsets=True, use_regex=True)
    (tmp_path/"tokenizer.json").write_text(json.dumps(j))
    config = dict(tokenizer_class="PreTrainedTokenizerFast", eos_token="<|endoftext|>")
    (tmp_path/"tokenizer_config.json").write_text(json.dumps(config))
    tok = load_tokenizer(tmp_path)
    def no(*_): raise AssertionError("cut")
    monkeypatch.setattr(D, "pieces", no)
    assert not tok.cuttable and tok.bos_id == 0 and len(tok.encode("one two")) == len(tok.encode(" one two"))

# ---- the hub

def test_hub_rows_become_the_original_bytes(tmp_path, monkeypatch):
    original = {k: f" \n = {k} = \n \n Some <unk> text @-@ é . \n \n \n".encode()
                for k in ("train", "validation", "test")}
    asked = []
    def snapshot_download(repo, *, allow_patterns, **kw):
        asked.append((repo, allow_patterns, kw))
        folder = tmp_path/"hub"/allow_patterns.split("/")[0]
        folder.mkdir(parents=True)
        for k, b in original.items():
            rows = [r if r.strip() else "" for r in b.decode().splitlines(keepends=True)]
            for i, part in enumerate((rows[:2], rows[2:])):                 # a large split is several files
                parquet.write_table(pyarrow.table(dict(text=part)), folder/f"{k}-{i:05}-of-00002.parquet")
        return str(tmp_path/"hub")
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    online = []
    monkeypatch.setattr(D, "hub_reachable", lambda: online.append(1) or len(online) < 2)
    monkeypatch.chdir(tmp_path)
    for name in ("wikitext-2", "wikitext-103"):
        c = load_corpus(name, cache=tmp_path/"c")
        assert c.name == name and list(c.splits) == ["train", "valid", "test"]
        for k, s in c.splits.items():
            assert c.tokenizer.decode_bytes(s.tokens) == original[dict(valid="validation").get(k, k)]
    for (repo, files, kw), name, local in zip(asked, ("wikitext-2-v1", "wikitext-103-v1"), (False, True)):
        assert (repo, files) == ("Salesforce/wikitext", f"{name}/*")
        assert kw == dict(repo_type="dataset", local_files_only=local)

OFFLINE = """
import sys, time
from okadfa.core import InputError
from okadfa.run.data import load_corpus, load_tokenizer
assert not {"datasets", "transformers", "matplotlib"} & set(sys.modules), "heavy imports"
import huggingface_hub, transformers
for f, a in ((load_corpus, "wikitext-2"), (load_tokenizer, "gpt2"), (load_tokenizer, "some/name")):
    t = time.time()
    try: f(a)
    except InputError as e: print(f"{time.time() - t:.1f}|{e}")
assert not huggingface_hub.constants.HF_HUB_OFFLINE, "left offline"
"""

def test_no_network_is_one_quick_line(tmp_path):
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    env |= dict(HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path/"hf"), XDG_CACHE_HOME=str(tmp_path/"x"),
                PYTHONPATH=str(Path(D.__file__).parents[2]))
    r = subprocess.run([sys.executable, "-c", OFFLINE], env=env, cwd=tmp_path, capture_output=True, text=True,
                       timeout=120)
    assert r.returncode == 0, r.stderr
    took, msgs = zip(*(line.split("|", 1) for line in r.stdout.splitlines()))
    assert len(msgs) == 3 and "--data DIR" in msgs[0] and "train.txt, valid.txt, test.txt" in msgs[0]
    assert all("folder" in m for m in msgs[1:])
    assert max(map(float, took)) < 5, r.stdout
    assert "etry" not in r.stderr and not (tmp_path/"x").exists()

# ---- recall

def test_recall_counts_answers_only(tmp_path):
    c = load_corpus("recall", cache=tmp_path)
    for s in c.splits.values():
        page, ask = np.array(s.tokens).reshape(-1, s.page), s.asked.reshape(-1, s.page)
        assert s.n_targets == s.n_bytes == ask.sum() and s.asked.shape == s.tokens.shape
        for row, mask in list(zip(page.tolist(), ask.tolist()))[:50]:
            for i, known in enumerate(mask):
                if known: assert row[i - 1] in b"abcd" and bytes(row[i - 1:i + 1]) in bytes(row[:i - 1])
    valid = c.splits["valid"]
    counted = sum((t != -100).sum().item() for _, t in eval_batches(valid, 256, BOS, 7))
    assert counted == valid.n_targets == 4*len(valid.tokens)//256
    assert perplexities(math.log(16)*counted, valid)["bits_per_byte"] == pytest.approx(4)

def test_windows_of_recall_begin_with_a_page(tmp_path):
    s = load_corpus("recall", cache=tmp_path).splits["train"]
    windows = TrainWindows(s, 256, 100, 5)
    starts = [windows.start(i) for i in range(100)]
    assert all(x % 256 == 0 for x in starts) and len(set(starts)) > 90
    for i in range(100):
        ids, targets = windows[i]
        want = np.where(s.asked, s.tokens.astype(np.int64), -100)[starts[i] + 1:starts[i] + 257]
        assert np.array_equal(ids, s.tokens[starts[i]:starts[i] + 256]) and np.array_equal(targets, want)
        assert (targets != -100).any()

def test_recall_is_bytes(bpe, tmp_path):
    with pytest.raises(InputError, match="leave the tokenizer") as e: load_corpus("recall", bpe[0], tmp_path/"none")
    one_line(e); assert not (tmp_path/"none").exists()

# ---- counts and units

@pytest.mark.parametrize("text,n", [(b"", 0), (b"a", 2), (b"a\n", 2), (b"\n\n", 2), (b" a  b\t\nc d\n", 6),
                                    (b"\xff\xfe \xc2\xa0\n", 3)])
def test_count_words(text, n): assert count_words(text) == n

def test_perplexities():
    s = Split(np.zeros(100, np.uint16), n_bytes=400, n_words=80, sha256="")
    p = perplexities(100*math.log(16), s)
    assert (p["token_ppl"], p["word_ppl"], p["bits_per_byte"]) == pytest.approx((16, 32, 1))
    assert (p["n_tokens"], p["n_words"], p["n_bytes"]) == (100, 80, 400)
    assert p["nats_per_token"] == pytest.approx(math.log(16))
    assert perplexities(1e9, s)["word_ppl"] == math.inf and math.isnan(perplexities(math.nan, s)["token_ppl"])
    with pytest.raises(InputError): perplexities(-1., s)

# ---- the real files, where there are any

real = pytest.mark.skipif(not (DATA/"wikitext-2"/"valid.txt").is_file(),
                          reason="no WikiText-2 files; OKADFA_DATA names their folder")

@real
def test_wikitext2_counts(tmp_path):
    c = load_corpus(DATA/"wikitext-2", cache=tmp_path)
    assert {k: (s.n_words, s.n_bytes) for k, s in c.splits.items()} == dict(
        train=(2_088_628, 10_797_148), valid=(217_646, 1_121_681), test=(245_569, 1_256_449))
    for k in c.splits:      # the rule for the hub's rows holds on the real files
        text = (DATA/"wikitext-2"/f"{k}.txt").read_bytes()
        assert D.join_rows(r if r.strip() else "" for r in re.findall(r".*\n", text.decode())) == text

@real
@pytest.mark.skipif(not (DATA/"gpt2-bpe"/"vocab.json").is_file(),
                    reason="no GPT-2 vocabulary; OKADFA_DATA names its folder")
def test_gpt2_on_wikitext2():
    tok = load_tokenizer(DATA/"gpt2-bpe")
    assert (tok.vocab_size, tok.bos_id, tok.cuttable) == (50_257, 50_256, True)
    assert tok.decode([50_256]) == "<|endoftext|>"
    text = (DATA/"wikitext-2"/"valid.txt").read_bytes()
    ids = tok.encode(text)
    assert len(ids) == 258_659 and ids.dtype == np.uint16 and tok.decode(ids).encode() == text
