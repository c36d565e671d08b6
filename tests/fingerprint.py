"""Losses and gradients of every mixer under every credit rule, to the bit, and the keys by which finished rows are
recognised.

`python tests/fingerprint.py` compares with fingerprint.json and prints what differs; `--record` writes it anew. Record
only when a change is meant to change numbers, and say in LOG.md which and why. tests/test_fingerprint.py runs the
comparison."""
import hashlib, json, sys, tempfile
from pathlib import Path
import torch
from okadfa.models.lm import LanguageModel, LMConfig

STORED = Path(__file__).with_name("fingerprint.json")
SIZE = dict(vocab_size=29, d_model=32, n_layers=3, n_heads=2, max_len=24)
MIXERS = {"softmax": dict(mixer="softmax"),
          "favor": dict(mixer="favor"),
          "favor local": dict(mixer="favor", local=True),
          "hedgehog": dict(mixer="favor", features="hedgehog"),
          "sobol": dict(mixer="favor", features="sobol", m=24),
          "window": dict(mixer="window", window=7, sinks=2),
          "landmarks": dict(mixer="landmarks", m=3, window=2, sinks=1),
          "spectral": dict(mixer="spectral"),
          "one gate": dict(mixer="spectral", gating="single"),
          "enhanced": dict(mixer="spectral", enhancements="rope+glu+phase+scales"),
          "in turn": dict(mixer="spectral+softmax")}
FEEDBACK = "gaussian", "uniform", "orthogonal", "shared", "identity", "kolen-pollack", "calibrated"
RULES = {"bp": dict(credit="bp"),
         "frozen": dict(credit="frozen"),
         "checkpoint": dict(credit="bp", checkpoint=True),
         **{kind: dict(credit="dfa", feedback=kind, refresh=2) for kind in FEEDBACK},
         "half round": dict(credit="dfa", half_round=True),
         "1 round": dict(credit="dfa", rounds=1),
         "2 rounds": dict(credit="dfa", rounds=2, feedback="gaussian"),
         "half and 1": dict(credit="dfa", half_round=True, rounds=1),
         "stages": dict(credit="dfa", stages=2),
         "micro": dict(credit="dfa", granularity="micro"),
         "full": dict(credit="dfa", granularity="full"),
         "full shared": dict(credit="dfa", granularity="full", feedback="shared"),
         "logits": dict(credit="dfa", feedback="orthogonal", error_site="logits"),
         "logits micro": dict(credit="dfa", feedback="uniform", error_site="logits", granularity="micro"),
         "direct": dict(credit="dfa", feedback="gaussian", embedding_credit="direct"),
         "no embedding": dict(credit="dfa", embedding_credit="none", token_shift=False, embed_std=0.1, expand=2)}

def sha(*tensors) -> str:
    "16 digits of the hash of some tensors' bits"
    h = hashlib.sha256()
    for t in tensors:
        if t.numel(): h.update(t.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()[:16]

def sha_text(text:str) -> str: return hashlib.sha256(text.encode()).hexdigest()[:16]

def canary() -> str:
    "Bits that depend on this machine's arithmetic and on torch alone: where they differ, so may all others"
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(48, 96, generator=g), torch.randn(96, 80, generator=g)
    y = torch.nn.functional.scaled_dot_product_attention(*(torch.randn(3, 1, 2, 24, 16, generator=g)), is_causal=True)
    return sha((x @ w).softmax(-1), (x @ w).exp().sum(0), torch.fft.rfft(x).abs(), torch.nn.functional.gelu(x @ w), y)

def three_steps(**fields) -> dict:
    "Loss of three steps of AdamW, the gradients of a fourth, and what the state dict then holds"
    torch.manual_seed(0)
    model = LanguageModel(LMConfig(**SIZE, **fields))
    start = sha(*model.state_dict().values())
    opt, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), []
    g = torch.Generator().manual_seed(1)
    for _ in range(4):
        ids = torch.randint(SIZE["vocab_size"], (2, SIZE["max_len"] + 1), generator=g)
        if _: opt.step()
        opt.zero_grad()
        loss = model.loss(ids[:, :-1], ids[:, 1:], chunk=20)
        loss.backward()
        losses.append(loss.item())
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    size = torch.cat([x.double().flatten() for x in grads.values()]).norm().item()
    return dict(losses=losses, start=start, names=sha_text("\n".join(model.state_dict())), grads=sha(*grads.values()),
                size=size, weights=sha(*model.state_dict().values()))

def trained() -> dict:
    "Three steps by `train`, with accumulation, penalty, clipping and a look at every step"
    from okadfa.run.data import load_corpus
    from okadfa.run.train import TrainConfig, train
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        text = "".join(chr(97 + (i*i + i//7) % 23) if i % 5 else " " for i in range(6000))
        for split, part in (("train", text[:5000]), ("valid", text[5000:])): (tmp/f"{split}.txt").write_text(part)
        corpus = load_corpus(tmp, "bytes", tmp/"cache")
        model = LMConfig(**SIZE | dict(vocab_size=corpus.tokenizer.vocab_size), m=16)
        config = TrainConfig(steps=3, batch_size=2, grad_accum=2, diag_every=1, warmup=2, redraw_every=2,
                             precision="fp32", ortho=0.1, ortho_warmup=2, clip=0.5)
        train(model, config, corpus, tmp/"run", progress=False)
        lines = [json.loads(s) for s in (tmp/"run"/"metrics.jsonl").read_text().splitlines()]
        from safetensors.torch import load_file
        weights = load_file(tmp/"run"/"checkpoint"/"model.safetensors")
        skipped = "step", "tokens_per_s", "_timestamp"
        numbers = {f"{r['step']} {k}": v for r in lines for k, v in sorted(r.items()) if k not in skipped}
    return dict(losses=[v for k, v in numbers.items() if k.endswith(" loss")],
                weights=sha(*(weights[k] for k in sorted(weights))),
                metrics=sha_text(json.dumps(numbers, sort_keys=True)),
                size=sum(v for k, v in numbers.items() if k.endswith("grad_norm")))

def keys() -> dict:
    "The key of every rule of every sweep at the default size, and those of all finished rows"
    from okadfa.run.summary import read_runs
    from okadfa.run.sweeps import DEFAULTS, SWEEPS, make_run, rules_of
    data, size = dict(train_sha256="a", valid_sha256="b", tokenizer="bytes"), DEFAULTS | dict(vocab_size=257)
    out = {f"{s}/{r}": make_run(s, r, size, data, seed=1).key for s in SWEEPS for r in rules_of(s)}
    rows = read_runs(Path(__file__).parents[1]/"results")
    return dict(sorted(out.items())), sha_text("".join(r["key"] for r in rows[:FINISHED]))

FINISHED = 211     # rows of results/ablate.jsonl when this was recorded; later rows come behind them

CASES = {f"{m}, {r}": MIXERS[m] | RULES[r] for m in MIXERS for r in RULES}

def measure(name:str) -> dict:
    "One case, with one thread, which alone gives equal bits"
    threads = torch.get_num_threads(); torch.set_num_threads(1)
    try: return trained() if name == "train" else three_steps(**CASES[name])
    finally: torch.set_num_threads(threads)

def differences(stored:dict, got:dict, bits:bool) -> list[str]:
    "What does not agree: to the bit, or on another machine's arithmetic to a part in a thousand"
    if bits: return [k for k in stored if stored[k] != got[k]]
    want, have = ((*x["losses"], x["size"]) for x in (stored, got))
    close = [abs(a - b) <= 1e-3*abs(a) for a, b in zip(want, have)]
    return [] if all(close) and stored.get("names") == got.get("names") else ["losses", "size"]

def main() -> int:
    found = {name: measure(name) for name in ("train", *CASES)}
    if "--record" in sys.argv:
        sweeps, rows = keys()
        lines = [f'"{k}": {json.dumps(v)}' for k, v in dict(canary=canary(), rows=rows, sweeps=sweeps).items()]
        cases = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in found.items())
        lines.append('"cases": {\n' + cases + "\n}")
        STORED.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        return 0
    stored = json.loads(STORED.read_text())
    bits, bad = stored["canary"] == canary(), 0
    for name, got in found.items():
        if wrong := differences(stored["cases"][name], got, bits): bad += 1; print(f"{name}: {', '.join(wrong)}")
    how = "" if bits else " (another machine's arithmetic: to a part in a thousand)"
    print(f"{len(found) - bad} of {len(found)} agree{how}")
    return int(bad > 0)

if __name__ == "__main__": sys.exit(main())
