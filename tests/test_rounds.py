"What rounds carry: backpropagation in the end, diagonals that are autograd's, and what goes wrong said in a line"
import pathlib
import pytest, torch
from torch import nn
from okadfa.core import InputError, assert_rel
from okadfa.dfa.diagnostics import compare_gradients
from okadfa.dfa.feedback import FeedbackMatrices
from okadfa.dfa.hook import DFAHook
from okadfa.dfa.law import cut_apart, gains, measured_cosines, predicted_cosines, predicted_rounds, rounds_needed
from okadfa.dfa.blocks import find_stack, on_output
from okadfa.dfa.mlp import Carry, carry_units, mlp_diagonal, strongest_units, watch_mlp
from okadfa.dfa.rounds import FittedDiagonal, Secants, refine, sweep, true_errors
from okadfa.models.lm import LMConfig, LanguageModel

SIZE = dict(vocab_size=30, d_model=16, n_layers=4, n_heads=2, max_len=32)
CARRIED = [dict(diagonal="mlp"), dict(diagonal="fitted"), dict(secants=3), dict(units=5),
           dict(diagonal="fitted", units=5), dict(diagonal="mlp", units=5, secants=3)]

def model(**kw):
    torch.manual_seed(0)
    return LanguageModel(LMConfig(**(SIZE | dict(mixer="softmax") | kw))).double()

def text(b=4, n=17, seed=0): return torch.randint(30, (2, b, n), generator=torch.Generator().manual_seed(seed))

def gradients(m, steps=1, **kw):
    for i in range(steps):
        m.zero_grad()
        m.loss(*text(seed=i), **kw).backward()
    return torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None])

def louder(m):
    "Branches that change the error a lot"
    with torch.no_grad():
        for b in m.blocks:
            for w in b.writers(): w.weight.mul_(20)
    return m

@pytest.mark.parametrize("mixer, scale", [*((name, 1.) for name in ("softmax", "favor", "spectral", "window")),
                                          ("softmax", .5)])
@pytest.mark.parametrize("carried", CARRIED, ids=str)
def test_rounds_end_at_backpropagation(mixer, scale, carried):
    m = louder(model(mixer=mixer, branch_scale=scale, rounds=3, **carried))
    bp = gradients(m, steps=3, credit="bp")
    assert_rel("three rounds", bp, gradients(m, steps=3), 1e-9)        # at the third step a diagonal has learnt
    few = louder(model(mixer=mixer, branch_scale=scale, rounds=1, **carried))
    assert (gradients(few, steps=3) - bp).norm() > 1e-3*bp.norm()           # one round is not all of them

@pytest.mark.parametrize("carried", CARRIED, ids=str)
def test_what_is_carried_changes_what_one_round_finds(carried):
    plain, other = (gradients(louder(model(rounds=1, **kw)), steps=2) for kw in ({}, carried))
    assert (plain - other).norm() > 1e-6*plain.norm()

def test_the_sweep_is_a_sum_over_prefix_products():
    L, d = 5, 7
    D, R, delta = torch.rand(L, d).double(), torch.randn(L, d).double(), torch.randn(2, 3, d).double()
    swept = sweep(delta, L, lambda l, e: D[l]*e, lambda l, e: R[l])
    for l in range(L):
        want = D[l+1:].prod(0)*delta + sum(D[l+1:k].prod(0)*R[k] for k in range(l + 1, L))
        assert_rel(f"block {l}", want, swept[l], 1e-12)

def families():
    from transformers import (FalconConfig, FalconForCausalLM, GemmaConfig, GemmaForCausalLM, GPT2Config,
                              GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, Phi3Config,
                              Phi3ForCausalLM)
    size = dict(vocab_size=61, hidden_size=32, num_hidden_layers=3, num_attention_heads=4)
    quiet = dict(bos_token_id=0, eos_token_id=1)
    gated = dict(size, intermediate_size=48, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, **quiet)
    gpt2 = dict(vocab_size=61, n_embd=32, n_layer=3, n_head=4, n_positions=32, **quiet)
    opt = dict(size, ffn_dim=64, max_position_embeddings=64, word_embed_proj_dim=32, **quiet)
    return dict(llama=lambda: LlamaForCausalLM(LlamaConfig(**gated)), phi3=lambda: Phi3ForCausalLM(Phi3Config(**gated)),
        gemma=lambda: GemmaForCausalLM(GemmaConfig(**gated, head_dim=8)),
        gpt2=lambda: GPT2LMHeadModel(GPT2Config(**gpt2)),
        opt=lambda: OPTForCausalLM(OPTConfig(**opt)),
        falcon=lambda: FalconForCausalLM(FalconConfig(**size, **quiet)))

def seen_mlp(blocks, width, run):
    "What a forward pass leaves of the middle block's MLP, and that block's output"
    found, outs = [], []
    new, handles = watch_mlp(blocks[1], width, 1, lambda: found[0])
    found.append(new())
    handles.append(on_output(blocks[1], lambda x, out: outs.append(out)))
    run()
    for h in handles: h.remove()
    return found[0], outs[0]

def by_autograd(mlp, out, e):
    "Diagonal, and e through the MLP branch, of what lies between the stream and the block's output"
    x = next(x for _, x, normed in mlp.normed if normed.shape == mlp.read.shape and
             torch.equal(normed.flatten()[:4], mlp.read.flatten()[:4]))
    flat = out.shape[-1]
    written = mlp.down(mlp.hidden)                   # again: Falcon adds attention to the first one in place
    own = [torch.autograd.grad(written[..., i].sum(), x, retain_graph=True)[0][..., i] for i in range(flat)]
    whole = torch.autograd.grad(written, x, e.reshape(written.shape), retain_graph=True)[0]
    return torch.stack(own, -1).reshape(out.shape), whole.reshape(out.shape)

@pytest.mark.parametrize("family", ["llama", "phi3", "gemma", "gpt2", "opt", "falcon"])
def test_the_diagonal_is_autograds(family):
    torch.manual_seed(0)
    m = families()[family]().eval()
    for p in m.parameters():
        if p.ndim == 1: nn.init.uniform_(p, .5, 1.5)
    mlp, out = seen_mlp(find_stack(m).blocks, 32, lambda: m(torch.randint(61, (2, 7))))
    e = torch.randn_like(out)
    diagonal, whole = by_autograd(mlp, out, e)
    # of one token: autograd sums over positions, and no MLP here mixes them
    assert_rel("diagonal", diagonal, mlp_diagonal(mlp, out), 2e-5)
    everything = Carry(e, [out]*2, [mlp]*2, "none", 10**6)
    assert_rel("all units", e + whole, everything(1, e), 2e-5)
    some = Carry(e, [out]*2, [mlp]*2, "mlp", 4)
    chosen = strongest_units(mlp, out, e, 4)
    assert_rel("the diagonal without the units", 1 + mlp_diagonal(mlp, out, chosen), some.scales[1], 1e-6)
    assert_rel("both", e*some.scales[1] + carry_units(mlp, out, chosen)(e), some(1, e), 1e-6)
    fit = FittedDiagonal(2, 32, ridge=1e-9)
    learner, through = Carry(e, [out]*2, [mlp]*2, fit, 4), torch.randn_like(e)
    learner.learn(1, e, through)
    rest = through - carry_units(mlp, out, chosen)(e)
    assert_rel("fitted to what units leave over", (e*rest).sum((0, 1))/e.square().sum((0, 1)), fit.scale(1), 1e-4)

@pytest.mark.parametrize("scale", [1., .5])
def test_the_diagonal_of_our_own_blocks_leaves_out_what_is_read_one_position_back(scale):
    m = model(branch_scale=scale).float()
    with torch.no_grad(): m.blocks[1].feed.norm.weight.uniform_(.5, 1.5)
    ids = text()[0]
    mlp, out = seen_mlp(m.blocks, 16, lambda: m(ids))
    norm, x, _ = next(n for n in mlp.normed if n[0] is m.blocks[1].feed.norm)
    t = 5
    J = torch.stack([torch.autograd.grad(mlp.out[0, t, i], x, retain_graph=True)[0][0, t] for i in range(16)])
    assert_rel("own position", scale*J.diagonal(), mlp_diagonal(mlp, out)[0, t], 1e-4)

def test_dropout_is_part_of_the_branch():
    torch.manual_seed(0)
    m = families()["gpt2"]().train()
    ids = torch.randint(61, (2, 7))
    with DFAHook(m, rounds=2, diagonal="mlp", units=4): loss = m(ids, labels=ids).loss
    mlp, out = seen_mlp(m.transformer.h, 32, lambda: m(ids))
    kept = torch.autograd.grad(out, mlp.out, torch.ones_like(out), retain_graph=True)[0]
    diagonal = mlp_diagonal(mlp, out)
    assert (kept == 0).any() and (diagonal[kept == 0] == 0).all() and (diagonal[kept > 0] != 0).any()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in m.parameters())

def test_other_forms_are_refused_in_a_line():
    from transformers import Gemma2Config, Gemma2ForCausalLM
    m = Gemma2ForCausalLM(Gemma2Config(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8))
    ids = torch.randint(61, (2, 7))
    batch = dict(input_ids=ids, labels=ids)
    with pytest.raises(InputError, match="diagonal='fitted'"): compare_gradients(m, batch, rounds=1, diagonal="mlp")
    fit = FittedDiagonal(3, 32)
    assert compare_gradients(m, batch, rounds=2, diagonal=fit, secants=2)["all"]["error"] < 1e-8
    assert fit.training and not fit.square.any()                             # it did not learn from being looked at
    with pytest.raises(InputError, match="learnt nothing"): compare_gradients(m, batch, rounds=2, diagonal="fitted")

@pytest.mark.parametrize("bad, word", [
    (dict(rounds=1, diagonal="bp"), "diagonal must be"), (dict(rounds=1, units=-1), "units >= 0"),
    (dict(diagonal="fitted"), "rounds of 1 or more"), (dict(secants=2), "rounds of 1 or more"),
    (dict(rounds=1, units=2, damping=.5), "damping=0"), (dict(rounds=1, secants=2, site="caller"), "site='hidden'")])
def test_what_does_not_fit_is_refused(bad, word):
    m = model()
    same = FeedbackMatrices([16]*4, 16, kind="identity")
    with pytest.raises(InputError, match=word): DFAHook(list(m.blocks), same, **bad)

@pytest.mark.parametrize("bad", [
    dict(diagonal="mlp", stages=2, rounds=1), dict(units=2, granularity="micro", rounds=1),
    dict(diagonal="mlp", credit="bp"), dict(diagonal="fitted"), dict(secants=-1, rounds=1)])
def test_a_config_that_does_not_fit_is_refused(bad):
    with pytest.raises(InputError): model(**bad)

def test_a_fitted_diagonal_is_saved_with_the_model_and_stands_still_in_evaluation():
    m = model(rounds=1, diagonal="fitted")
    before = m.diagonal.scale(1).clone()
    gradients(m.eval())
    assert torch.equal(before, m.diagonal.scale(1))
    gradients(m.train())
    assert not torch.equal(before, m.diagonal.scale(1))
    again = model(rounds=1, diagonal="fitted")
    again.load_state_dict(m.state_dict())
    assert torch.equal(again.diagonal.scale(1), m.diagonal.scale(1))

def test_the_loss_scale_does_not_count():
    "Mixed precision multiplies the loss, and not always by the same: the diagonal must be the same"
    fits = []
    for scales in ((1., 1.), (2.**16, 1.), (1., 2.**16)):
        m = louder(model(rounds=2, diagonal="fitted", secants=2))
        for i, scale in enumerate(scales): (m.loss(*text(seed=i))*scale).backward()
        fits.append(m.diagonal.scale(1))
    assert_rel("first", fits[0], fits[1], 1e-6)
    assert_rel("second", fits[0], fits[2], 1e-6)

def test_two_graphs_at_once():
    "A second forward pass before the first one's backward: each has its own MLPs in mind"
    m, (a, b) = model(rounds=1, diagonal="mlp", units=3), (text(seed=1), text(seed=2))
    def one(t):
        m.zero_grad(); m.loss(*t).backward()
        return torch.cat([p.grad.flatten() for p in m.parameters()])
    want = one(a) + one(b)
    m.zero_grad()
    first, second = m.loss(*a), m.loss(*b)
    first.backward(); second.backward()
    assert_rel("both", want, torch.cat([p.grad.flatten() for p in m.parameters()]), 1e-12)

def test_secants_survive_zeros_and_copies():
    "Errors that are all alike, or all zero, make a singular system"
    known = Secants(4)
    for _ in range(4): known.add(torch.ones(1, 3, 5), torch.full((1, 3, 5), 2.))
    assert_rel("copies", torch.full((1, 3, 5), 4.), known.rest(torch.full((1, 3, 5), 2.)), 1e-4)
    zero = Secants(2)
    for _ in range(2): zero.add(torch.zeros(1, 3, 5), torch.zeros(1, 3, 5))
    assert torch.equal(zero.rest(torch.zeros(1, 3, 5)), torch.zeros(1, 3, 5))
    assert zero.rest(torch.ones(1, 3, 5)).isfinite().all()

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errors(dtype):
    "Autocast and models in half precision: finite, and near what float32 finds"
    torch.manual_seed(0)
    ref = families()["llama"]()
    half = families()["llama"]().to(dtype)
    half.load_state_dict(ref.state_dict())
    ids, found = torch.randint(61, (2, 9)), []
    for m in (ref, half):
        with DFAHook(m, rounds=1, diagonal="mlp", units=6, secants=2): loss = m(ids, labels=ids).loss
        loss.backward()
        found.append(torch.cat([p.grad.float().flatten() for p in m.parameters()]))
    assert found[1].isfinite().all() and torch.cosine_similarity(*found, dim=0) > .99

# the law

def test_true_errors_have_the_size_that_the_law_says():
    "By construction: gains and rests make every channel's size at every block"
    e = [torch.randn(2, 9, 6).double() for _ in range(4)]
    g, s2 = gains(e)
    for l in range(3):
        size = e[l+1].square().sum((0, 1))
        assert_rel(f"block {l}", e[l].square().sum((0, 1)), size*((1 + g[l])**2 + s2[l]), 1e-9)

@pytest.mark.parametrize("gain, spread", [(0., .5), (-.2, .3)])
def test_the_law_is_exact_where_channels_keep_apart(gain, spread):
    "Every channel multiplied by a gain and a random number of its own: rounds done by hand"
    L, rng = 8, torch.Generator().manual_seed(0)
    J = [gain + spread*torch.randn(20000, 3, generator=rng).double() for _ in range(L)]
    top = torch.randn(20000, 3, generator=rng).double()
    true, errors = [top], [top]*L
    for l in range(L - 1, 0, -1): true.insert(0, true[0] + J[l]*true[0])
    law = predicted_cosines([e[None] for e in true])
    for r in range(L):
        cos = [torch.cosine_similarity(a.flatten(), b.flatten(), 0).item() for a, b in zip(errors, true)]
        assert law[r].tolist() == pytest.approx(cos, abs=.03), r
        below = [top]
        for l in range(L - 1, 0, -1): below.insert(0, below[0] + J[l]*errors[l])
        errors = below
    assert law[0, 0] < .8

def test_the_law_ends_where_rounds_end():
    e = [torch.randn(2, 9, 6).double() for _ in range(5)]
    for diagonal in (False, True):
        p = predicted_cosines(e, diagonal=diagonal)
        assert p.shape == (5, 5) and (p <= 1 + 1e-9).all()
        for r in range(5): assert_rel("exact above", torch.ones(r + 1).double(), p[r, 4-r:], 1e-9)

def test_the_law_against_rounds_on_a_model():
    m = louder(model(n_layers=8))
    def loss_of(m, t): return m.loss(*t, credit="bp")
    before = [p.clone() for p in m.parameters()]
    measured = measured_cosines(m, text(), loss_of=loss_of)
    assert_rel("what the hook's rounds find", torch.ones(8).double(), measured[-1], 1e-9)
    needed = rounds_needed(m, text(), loss_of=loss_of)
    assert abs(needed - int((measured.mean(1) >= .95).nonzero()[0])) <= 1
    assert all(torch.equal(a, b) for a, b in zip(before, m.parameters()))
    assert m.training and not m.blocks[0]._forward_hooks

def test_measured_cosines_are_the_hooks():
    m = louder(model(n_layers=5, rounds=2))
    def loss_of(m, t): return m.loss(*t, credit="bp")
    delta, inputs, outputs = cut_apart(m, text(), loss_of)
    true = true_errors(delta, inputs, outputs)
    errors = refine(delta, [delta]*5, inputs, outputs, 2)
    want = [torch.cosine_similarity(a.flatten(), b.flatten(), 0).item() for a, b in zip(errors, true)]
    assert measured_cosines(m, text(), 2, loss_of=loss_of)[2].tolist() == pytest.approx(want, abs=1e-9)

@pytest.mark.parametrize("bad", [dict(cosine=0.), dict(cosine=1.5), dict(diagonal="mlp")])
def test_the_law_refuses(bad):
    with pytest.raises(InputError): rounds_needed(model(), text(), loss_of=lambda m, t: m.loss(*t, credit="bp"), **bad)

@pytest.mark.skipif(not (pathlib.Path.home()/".cache/okadfa/smollm2-135m/model.safetensors").is_file(),
                    reason="SmolLM2-135M is not in the cache: okadfa probe smollm2-135m puts it there")
def test_a_pretrained_model_of_thirty_blocks():
    "The law within one round; plain rounds hardly help, and what they carry does"
    from transformers import AutoTokenizer
    from okadfa.models.pretrained import load_pretrained
    from okadfa.probe.credit import CreditQuestion
    found = load_pretrained("smollm2-135m")
    m = found[0] if isinstance(found, tuple) else found
    tok = AutoTokenizer.from_pretrained(pathlib.Path.home()/".cache/okadfa/smollm2-135m")
    import pydoc_data.topics
    words = pydoc_data.topics.topics["assignment"] + pydoc_data.topics.topics["naming"]
    ids = tok(words, return_tensors="pt").input_ids[:, :128]
    batch = dict(input_ids=ids, labels=ids)
    measured = measured_cosines(m, batch, 24).mean(1)
    needed, did = rounds_needed(m, batch), int((measured >= .95).nonzero()[0])
    print(f"rounds for a cosine of 0.95: the law says {needed}, measured {did}")
    assert abs(needed - did) <= 1
    question = CreditQuestion(m, ids)
    def mean(rule): return sum(question.measure(dict(rule=rule))["error_cosine"])/30
    plain, secants, units = (mean(f"4 rounds{x}") for x in ("", ", secants", ", diagonal, units & secants"))
    print(f"mean cosine after four rounds: plain {plain:.2f}, secants {secants:.2f}, units too {units:.2f}")
    assert plain + .1 < secants < units

@pytest.mark.parametrize("value", [0., float("nan")])
def test_errors_that_say_nothing_need_all_rounds(value):
    "A run that breaks down must say so itself: what is predicted on the way may not fail first"
    assert predicted_rounds([torch.full((1, 3, 4), value)]*5) == 4
