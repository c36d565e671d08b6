"The model's seams: mixers, credit rules, initial weights, configs that cannot be, diagnostics"
import dataclasses, math
import pytest, torch
from torch import nn
from okadfa.core import InputError, assert_rel
from okadfa.models.block import MIXERS, Mixer, register_mixer
from okadfa.models.credit import CREDITS, CreditRule, register_credit
from okadfa.models.diagnose import diagnose
from okadfa.models.checkpoint import load_model, save_model
from okadfa.models.lm import LanguageModel, LMConfig, readers, stored_config

SIZE = dict(vocab_size=31, d_model=32, n_layers=4, n_heads=2, max_len=20)
pytestmark = pytest.mark.usefixtures("seeded")

def batch(n=20): return torch.randint(31, (2, 3, n), generator=torch.Generator().manual_seed(1))

def gradients(model, **kw):
    ids, targets = batch()
    model.zero_grad(); model.loss(ids, targets, **kw).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

# ---- mixers

def test_a_hybrid_takes_turns():
    kinds = [type(b.mixer).__name__ for b in LanguageModel(LMConfig(**SIZE, mixer="spectral+softmax")).blocks]
    assert kinds == ["SpectralMixing", "MultiHeadAttention"]*2
    kinds = [type(b.mixer).__name__ for b in LanguageModel(LMConfig(**SIZE, mixer="softmax+favor+spectral")).blocks]
    assert kinds == ["MultiHeadAttention", "KernelAttention", "SpectralMixing", "MultiHeadAttention"]

def test_every_block_draws_random_features_of_its_own():
    for features in ("favor+", "hyperbolic", "simplex", "sobol"):
        drawn = [b.mixer.features.projection for b in LanguageModel(LMConfig(**SIZE, features=features)).blocks]
        assert not any(torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i]), features
    other = LanguageModel(LMConfig(**SIZE, seed=1)).blocks[0].mixer.features.projection
    assert not torch.equal(drawn[0], other)

@pytest.mark.parametrize("fields", [
    dict(mixer="softmax"),
    dict(mixer="favor"),
    dict(mixer="spectral"),
    dict(mixer="spectral", enhancements="rope+glu+phase+scales"),
    dict(mixer="spectral+softmax")])
def test_what_writes_into_the_stream_starts_small(fields):
    model = LanguageModel(LMConfig(**SIZE | dict(d_model=64), **fields))
    small, writers = 0.02/math.sqrt(2*4), {id(w) for b in model.blocks for w in b.writers()}
    # by their names, which is how nobody else recognises them
    writes = lambda name: name.endswith("feed.body.2") or ".attend.body" in name and name.endswith(".out")
    named = {id(m) for n, m in model.named_modules() if writes(n)}
    assert writers == named and len(writers) >= 8
    for name, m in model.named_modules():
        if not isinstance(m, nn.Linear): continue
        want = small if id(m) in writers else 0.02
        assert abs(m.weight.std().item()/want - 1) < 0.1, name

class Average(nn.Module):
    "The mean of all positions so far, through a layer that writes into the stream"
    def __init__(self, d): super().__init__(); self.into, self.write = nn.Linear(d, d), nn.Linear(d, d)
    def writers(self): return [self.write]
    def forward(self, x): return self.write(self.into(x).cumsum(1)/torch.arange(1, x.shape[1] + 1)[:, None])

@pytest.fixture
def average():
    register_mixer("average", Mixer(lambda config, layer: Average(config.d_model), "running mean", reads=("m",)))
    yield "average"
    del MIXERS["average"]

def test_a_mixer_from_outside(average):
    model = LanguageModel(LMConfig(**SIZE, mixer="average+softmax", m=7))           # m means something to it
    assert isinstance(model.blocks[2].mixer, Average) and isinstance(model.blocks[3].mixer, nn.Module)
    assert abs(model.blocks[0].mixer.write.weight.std().item()/(0.02/math.sqrt(8)) - 1) < 0.1
    ids, _ = batch()
    edited = ids.clone(); edited[:, 12:] = (edited[:, 12:] + 1) % 31
    assert_rel("causal", model(ids)[:, :12], model(edited)[:, :12], 1e-6)
    assert all(g.isfinite().all() for g in gradients(model).values())

@pytest.mark.parametrize("name", ["softmax", "a+b", ""])
def test_names_that_a_mixer_cannot_have(name):
    with pytest.raises(InputError): register_mixer(name, Mixer(lambda c, l: None, "nothing"))
    ours = ["softmax", "favor", "window", "landmarks", "spectral"]
    assert list(MIXERS) == ours or name not in MIXERS or name == "softmax"

NEAR = [dict(mixer="window", window=5, sinks=2), dict(mixer="window", local=True),
        dict(mixer="landmarks", m=3, window=2)]

@pytest.mark.parametrize("fields", NEAR, ids=str)
def test_windows_and_landmarks_in_a_model(tmp_path, fields):
    model = LanguageModel(LMConfig(**SIZE | dict(max_len=90), credit="bp", **fields)).eval()
    with torch.no_grad():
        for p in model.parameters(): p.mul_(3)                      # an untrained model hardly looks at its context
    ids = torch.randint(31, (2, 90), generator=torch.Generator().manual_seed(1))
    whole, edited = model(ids), ids.clone()
    edited[:, 60:] = (edited[:, 60:] + 1) % 31
    assert torch.equal(whole[:, :60], model(edited)[:, :60]) and not torch.equal(whole[:, 60:], model(edited)[:, 60:])
    _, state = model.extend(ids[:, :40])
    for t in range(40, 90): logits, state = model.extend(ids[:, t:t + 1], state)
    assert_rel("generation", whole[:, -1], logits, 1e-4)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)[0].eval()
    assert loaded.config == model.config and torch.equal(loaded(ids), whole)

def test_only_what_the_window_says_is_seen():
    "One block without token shift: an edit reaches just the rows whose window or sinks hold it"
    near = dict(mixer="window", window=5, sinks=2, token_shift=False)
    model = LanguageModel(LMConfig(**SIZE | dict(n_layers=1), credit="bp", **near))
    ids, _ = batch()
    for at, reaches in ((1, range(1, 20)), (7, range(7, 12))):
        edited = ids.clone(); edited[:, at] = (edited[:, at] + 1) % 31
        moved = (model(ids) != model(edited)).any(-1).any(0).nonzero()[:, 0].tolist()
        assert moved == list(reaches)

@pytest.mark.parametrize("mixer", ["window", "landmarks"])
def test_a_window_as_long_as_the_text_is_softmax(mixer):
    ids, targets = batch()
    soft = LanguageModel(LMConfig(**SIZE, credit="bp", mixer="softmax"))
    near = LanguageModel(LMConfig(**SIZE, credit="bp", mixer=mixer, window=20))
    for model in (soft, near): model.loss(ids, targets).backward()
    assert_rel("logits", soft(ids), near(ids), 1e-5)
    for (name, p), q in zip(soft.named_parameters(), near.parameters()): assert_rel(name, p.grad, q.grad, 1e-4)

def test_a_window_that_is_not_given_is_64_keys():
    made = [LanguageModel(LMConfig(**SIZE, mixer=m)).blocks[0].mixer for m in ("window", "landmarks")]
    assert made[0].exact == dict(local=False, window=64, sinks=0) and made[1].config.window == 64

# ---- credit rules

@pytest.mark.parametrize("wrong", ["DFA", "dfa ", "BP", "backprop", ""])
def test_a_misspelled_rule_is_refused(wrong):
    model = LanguageModel(LMConfig(**SIZE))
    ids, targets = batch()
    for call in (
        lambda: model.loss(ids, targets, credit=wrong),
        lambda: model(ids, credit=wrong),
        lambda: LMConfig(**SIZE, credit=wrong)):
        with pytest.raises(InputError, match="bp"): call()

class TopHalf(CreditRule):
    "Backpropagation down to the middle"
    title, reads = "top half", ("stages",)
    def check(self, config):
        if config.n_layers % 2: raise InputError("top half needs an even number of blocks")
    def prepare(self, model): model.register_buffer("calls", torch.zeros(()))
    def learns(self, model): return list(model.blocks)[len(model.blocks)//2:]
    def loss(self, model, ids, targets, **kw):
        model.calls += 1
        middle = len(model.blocks)//2
        h = model.norm(model.stream(ids, below=lambda l, x: x.detach() if l == middle else x))
        return nn.functional.cross_entropy((h @ model.embed.weight.T).flatten(0, 1), targets.flatten())

@pytest.fixture
def top_half():
    register_credit("top-half", TopHalf())
    yield "top-half"
    del CREDITS["top-half"]

def test_a_rule_from_outside(top_half):
    model = LanguageModel(LMConfig(**SIZE, credit=top_half, stages=3))
    bp, got = gradients(model, credit="bp"), gradients(model)
    assert model.calls == 1 and "calls" in model.state_dict()
    for n, g in bp.items():
        if n.startswith(("blocks.2", "blocks.3")): assert_rel(n, g, got[n], 1e-5)
        elif n.startswith("blocks"): assert n not in got
    with pytest.raises(InputError, match="even"): LMConfig(**SIZE | dict(n_layers=3), credit=top_half)

def test_direct_feedback_needs_a_model_that_was_made_for_it():
    model, (ids, targets) = LanguageModel(LMConfig(**SIZE, credit="bp")), batch()
    with pytest.raises(InputError, match="no feedback matrices"): model.loss(ids, targets, credit="dfa")

@pytest.mark.parametrize("credit", ["bp", "dfa", "frozen"])
def test_learns_says_which_blocks_get_a_gradient(credit):
    model = LanguageModel(LMConfig(**SIZE, credit=credit))
    got = gradients(model)
    trained = [b for l, b in enumerate(model.blocks) if any(n.startswith(f"blocks.{l}.") for n in got)]
    assert trained == CREDITS[credit].learns(model)

# ---- configs

@pytest.mark.parametrize("fields, said", [
    (dict(credit="bp", rounds=2), "rounds=2 needs credit='dfa'"),
    (dict(credit="frozen", feedback="gaussian"), "feedback='gaussian' needs"),
    (dict(credit="bp", half_round=True), "half_round=True needs"),
    (dict(mixer="softmax", m=8), "m=8 needs mixer='favor'"),
    (dict(mixer="spectral", local=True), "local=True needs mixer='favor'"),
    (dict(mixer="window", m=8), "m=8 needs mixer='favor' or mixer='landmarks'"),
    (dict(mixer="landmarks", local=True), "local=True needs mixer='favor' or mixer='window'"),
    (dict(mixer="window", local=True, window=3), "not both"),
    (dict(mixer="window", window=-1), "numbers of keys"),
    (dict(mixer="softmax", gating="single"), "gating='single' needs mixer='spectral'"),
    (dict(enhancements="rope"), "enhancements='rope' needs mixer='spectral'"),
    (dict(mixer="spectral", enhancements="rope+roop"), "enhancements must be rope or"),
    (dict(features="derf"), "features must be"),
    (dict(error_norm="tokens"), "error_norm must be none or batch or token"),
    (dict(mixer="favor+"), "mixer must be"),
    (dict(refresh=0), "refresh must be at least 1"),
    (dict(embed_std=0.), "embed_std must be above 0")])
def test_configs_that_cannot_be(fields, said):
    with pytest.raises(InputError) as e: LMConfig(**SIZE, **fields)
    assert said in str(e.value) and "\n" not in str(e.value)

def test_every_field_that_is_read_exists():
    assert set(readers()) <= {f.name for f in dataclasses.fields(LMConfig)}

def test_every_field_has_help_and_a_group():
    for f in dataclasses.fields(LMConfig): assert f.metadata["help"] and f.metadata["group"], f.name

def test_an_old_checkpoint_with_a_field_that_nobody_reads_still_loads(tmp_path):
    model = LanguageModel(LMConfig(**SIZE, mixer="softmax", credit="bp"))
    save_model(model, tmp_path)
    text = (tmp_path/"config.json").read_text()
    assert '"rounds": 0' in text and '"m": null' in text
    (tmp_path/"config.json").write_text(text.replace('"rounds": 0', '"rounds": 2').replace('"m": null', '"m": 8'))
    stored = dataclasses.asdict(model.config) | dict(rounds=2, m=8)
    assert load_model(tmp_path)[0].config == model.config == stored_config(stored)

# ---- diagnostics

def test_diagnose_reports_the_rules_own_errors():
    "Against a backward pass by hand: identity feedback sends delta to every block, a random matrix B delta"
    ids, targets = batch()
    for feedback in ("identity", "gaussian"):
        model = LanguageModel(LMConfig(**SIZE, feedback=feedback))
        h, outs = model.enter(ids), []
        for block in model.blocks: h = block(h); h.retain_grad(); outs.append(h)
        loss = nn.functional.cross_entropy((model.norm(h) @ model.embed.weight.T).flatten(0, 1), targets.flatten())
        loss.backward()
        found = diagnose(model, ids, targets)["error"]
        for l, out in enumerate(outs):
            e = model.feedback.local_error(l, outs[-1].grad) if l < 3 or feedback == "gaussian" else outs[-1].grad
            row = found[f"block{l}"]
            assert_rel("norm", e.norm(), torch.tensor(row["norm"]), 1e-4)
            assert_rel("norm_ref", out.grad.norm(), torch.tensor(row["norm_ref"]), 1e-4)
            cosine = nn.functional.cosine_similarity(e.flatten(), out.grad.flatten(), 0)
            assert abs(cosine.item() - row["cosine"]) < 1e-4
        assert any(abs(r["norm"]/r["norm_ref"] - 1) > 1e-3 for r in found.values()), "the two cannot be told apart here"

def test_diagnose_leaves_the_model_as_it_was():
    model = LanguageModel(LMConfig(**SIZE)).train()
    diagnose(model, *batch())
    assert model.training and not any(b._forward_hooks for b in model.blocks)
    assert all(p.grad is None for p in model.parameters())
