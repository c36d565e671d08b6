"Direct feedback on other people's models: twelve families, each gradient against one made by hand"
import pytest, torch
from torch import nn
from okadfa.core import InputError, assert_rel
from okadfa.dfa.adopted import FEEDBACK_FILE, feedback_callback
from okadfa.dfa.blocks import attention_in, find_stack
from okadfa.dfa.diagnostics import compare_gradients, plot_alignment
from okadfa.dfa.feedback import FeedbackMatrices
from okadfa.dfa.hook import DFAHook

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")       # later versions rename checkpointing
transformers.utils.logging.set_verbosity_error()
WORDS, WIDTH = 61, 32
SIZE = dict(vocab_size=WORDS, hidden_size=WIDTH, num_hidden_layers=4, num_attention_heads=4,
            max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=2)
WIDE = SIZE | dict(intermediate_size=48)
GROUPED = WIDE | dict(num_key_value_heads=2)
FAMILIES = dict(                                           # kind of config -> where its blocks are, and its config
    llama=("model.layers", GROUPED | dict(attention_dropout=.1)),
    gpt2=("transformer.h", SIZE),
    qwen3=("model.layers", GROUPED | dict(head_dim=8)),
    gemma3_text=("model.layers", GROUPED | dict(head_dim=8, sliding_window=6)),
    mistral=("model.layers", GROUPED | dict(sliding_window=6)),
    mixtral=("model.layers", GROUPED | dict(num_local_experts=8, num_experts_per_tok=2,
                                   experts_implementation="eager")),
    gpt_neox=("gpt_neox.layers", WIDE | dict(hidden_dropout=.1)),
    opt=("model.decoder.layers", SIZE | dict(ffn_dim=48, word_embed_proj_dim=16, dropout=.1)),
    phi=("model.layers", WIDE | dict(resid_pdrop=.1)),
    falcon=("transformer.h", SIZE | dict(hidden_dropout=.1)),
    bloom=("transformer.h", SIZE | dict(hidden_dropout=.1)),
    t5=("decoder.block", dict(vocab_size=WORDS, d_model=WIDTH, d_kv=8, d_ff=48, num_layers=5, num_decoder_layers=4,
                              num_heads=4, decoder_start_token_id=0, pad_token_id=2, dropout_rate=.1,
                              feed_forward_proj="gated-gelu")))
FAMILY = pytest.mark.parametrize("kind", FAMILIES)

def make(kind, **more):
    "A small model with weights large enough for blocks to differ from the identity"
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **(FAMILIES[kind][1] | more))
    auto = transformers.AutoModelForSeq2SeqLM if kind == "t5" else transformers.AutoModelForCausalLM
    model = auto.from_config(config).double().eval()
    with torch.no_grad():
        for b in find_stack(model).blocks:
            for p in b.parameters(): p.mul_(4 if p.ndim > 1 and kind != "t5" else 1)
    return model

def batch(kind="", b=3, n=11, pad=True):
    "Text with padding on the left, which counts neither for attention nor for the loss"
    ids = torch.randint(3, WORDS, (b, n), generator=torch.Generator().manual_seed(1))
    mask, labels = torch.ones_like(ids), ids.clone()
    hidden = slice(7, None) if kind == "bloom" else slice(0, 4)           # on the left BLOOM itself gives NaN
    if pad: mask[1, hidden], labels[1, hidden] = 0, -100
    return dict(input_ids=ids, attention_mask=mask, labels=labels)

def grads(m): return {n: p.grad.clone() for n, p in m.named_parameters() if p.grad is not None}

def backward(model, inputs, seed=3, **kw):
    model.zero_grad(set_to_none=True); torch.manual_seed(seed)
    model(**inputs, **kw).loss.backward()
    return grads(model)

def vjp(o, i, e): return torch.autograd.grad(o, i, e, retain_graph=True, allow_unused=True)[0]

def by_hand(model, name, inputs, errors=lambda delta, i, o: [delta]*len(o), seed=3, **kw):
    "The model's own forward pass with each block detached from the next; then block l's output gets errors(...)[l]"
    blocks, ins, outs = model.get_submodule(name), [], []
    def patched(l, forward):
        def run(x, *args, **kwargs):
            ins.append(x.detach().requires_grad_() if l else x)
            out = forward(ins[-1], *args, **kwargs)
            h = out[0] if isinstance(out, tuple) else out
            outs.append(h)
            below = h.detach().requires_grad_(l == len(blocks) - 1)
            if below.requires_grad: ins.append(below)
            return (below, *out[1:]) if isinstance(out, tuple) else below
        return run
    for l, b in enumerate(blocks): b.forward = patched(l, b.forward)
    try:
        model.zero_grad(set_to_none=True); torch.manual_seed(seed)
        model(**inputs, **kw).loss.backward()                            # what lies above the blocks
    finally:
        for b in blocks: del b.forward
    delta = ins.pop().grad
    torch.autograd.backward(outs, errors(delta, ins, outs))              # all at once: T5 shares its position bias
    return grads(model)

def assert_same(want, got, tol=1e-9):
    assert want.keys() == got.keys()
    for n, g in want.items():
        if not g.norm() < 1e-12: assert_rel(n, g, got[n], tol)            # a key's bias has no gradient but rounding

@FAMILY
def test_the_blocks_are_found(kind):
    model, (name, _) = make(kind), FAMILIES[kind]
    found = find_stack(model)
    assert found.name == name and found.blocks == list(model.get_submodule(name)) and found.width == WIDTH
    assert found.embed is model.get_input_embeddings() and found.head is model.get_output_embeddings()
    assert "norm" in type(found.norm).__name__.lower()
    top = {}
    found.norm.register_forward_pre_hook(lambda m, args: top.setdefault("norm", args[0]) is None or None)
    found.blocks[-1].register_forward_hook(lambda m, a, o: top.update(h=o[0] if isinstance(o, tuple) else o))
    model(**batch(kind))
    assert torch.equal(top["norm"], top["h"])                             # the final norm reads the last block

@FAMILY
def test_every_gradient_is_the_one_made_by_hand(kind):
    model, inputs = make(kind), batch(kind)
    bp, want = backward(model, inputs), by_hand(model, FAMILIES[kind][0], inputs)
    with DFAHook(model): got = backward(model, inputs)
    assert_same(want, got)
    name = FAMILIES[kind][0]
    below = [n for n in bp if n.startswith(f"{name}.0.") and bp[n].ndim > 1]
    assert max((bp[n] - got[n]).norm()/bp[n].norm() for n in below) > .05         # and it is not backpropagation's
    assert_same(bp, backward(model, inputs), 1e-12)                               # nothing is left behind

@FAMILY
def test_in_training_with_and_without_a_cache(kind):
    model, inputs = make(kind).train(), batch(kind)
    for cache in (False, True):
        want = by_hand(model, FAMILIES[kind][0], inputs, use_cache=cache)
        with DFAHook(model): got = backward(model, inputs, use_cache=cache)
        assert_same(want, got)

@FAMILY
def test_a_matrix_for_each_block(kind):
    model, inputs = make(kind), batch(kind)
    B = FeedbackMatrices([WIDTH]*4, WIDTH, kind="gaussian").double()
    def errors(delta, i, o): return [B.local_error(l, delta) for l in range(4)]
    want = by_hand(model, FAMILIES[kind][0], inputs, errors)
    with DFAHook(model, B): assert_same(want, backward(model, inputs))
    with DFAHook(model, "gaussian"): assert_same(want, backward(model, inputs), 1e-6)

@FAMILY
def test_rounds(kind):
    model, inputs = make(kind), batch(kind)
    def errors(delta, i, o):
        return [delta + sum(vjp(o[j], i[j], delta) - delta for j in range(l+1, 4)) for l in range(4)]
    want = by_hand(model, FAMILIES[kind][0], inputs, errors)
    with DFAHook(model, rounds=1): assert_same(want, backward(model, inputs))
    bp = backward(model, inputs)
    with DFAHook(model, rounds=3): assert_same(bp, backward(model, inputs))

# --- half a round ---------------------------------------------------------------------------------------------------

def attention_held(kind, block):
    "Patch a block's attention so that what it adds to the stream is a constant"
    for a in attention_in(block):
        def held(*args, forward=a.forward, **kwargs):
            out, *rest = forward(*args, **kwargs)
            if kind != "bloom": return (out.detach(), *rest)
            residual = args[1]                                             # BLOOM's attention adds it itself
            return (residual + (out - residual).detach(), *rest)
        a.forward = held

def half_errors(model, kind, inputs):
    "By hand: delta + sum_{j>l} J_j^T delta, each J_j the Jacobian of a block whose attention's output is a constant"
    blocks = model.get_submodule(FAMILIES[kind][0])
    def errors(delta, i, o):
        terms, calls = [], []
        handles = [b.register_forward_pre_hook(lambda m, a, k: calls.append((a, k)), with_kwargs=True) for b in blocks]
        with torch.no_grad(): model(**inputs, use_cache=False)
        for h in handles: h.remove()
        for b, x, (a, k) in zip(blocks, i, calls):
            attention_held(kind, b)
            x = x.detach().requires_grad_()
            out = b(x, *a[1:], **k)
            terms.append(vjp(out[0] if isinstance(out, tuple) else out, x, delta) - delta)
            for m in attention_in(b): del m.forward
        return [delta + sum(terms[l+1:]) for l in range(4)]
    return errors

@FAMILY
def test_half_a_round_goes_through_everything_but_attention(kind):
    model, inputs = make(kind), batch(kind)
    want = by_hand(model, FAMILIES[kind][0], inputs, half_errors(model, kind, inputs), use_cache=False)
    with DFAHook(model, half_round=True): got = backward(model, inputs, use_cache=False)
    assert_same(want, got)

def test_half_a_round_of_our_blocks_by_either_way():
    "A residual branch given by hand, and attention found by its class, are one formula"
    from okadfa.models.lm import LMConfig, LanguageModel
    def ours(**kw): return LanguageModel(LMConfig(vocab_size=30, d_model=16, n_layers=4, n_heads=2, max_len=32, **kw))
    m, (ids, targets) = ours().double(), torch.randint(30, (2, 2, 9))
    B = FeedbackMatrices([16]*4, 16, kind="identity")
    with DFAHook(m.blocks, B, halves=[b.feed for b in m.blocks]): m.loss(ids, targets, credit="bp").backward()
    want = grads(m)
    m.zero_grad()
    with DFAHook(m, half_round=True): m.loss(ids, targets, credit="bp").backward()
    assert_same(want, grads(m), 1e-12)
    with pytest.raises(InputError, match="no attention found in Block"):
        DFAHook(ours(mixer="spectral"), half_round=True)

@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "mixtral", "gpt2", "bloom"])
def test_an_mlp_alone_is_refused_as_half_a_round(kind):
    "Neither x + f(x) nor with its norm: it used to be taken, and gave wrong errors in silence"
    model, inputs = make(kind), batch(kind)
    blocks = find_stack(model).blocks
    B = FeedbackMatrices([WIDTH]*4, WIDTH, kind="identity")
    with DFAHook(model, B, halves=[b.mlp for b in blocks]), pytest.raises(InputError, match="half_round=True"):
        model(**inputs)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

def test_post_norm_blocks_are_refused_as_half_a_round():
    model = make("opt", do_layer_norm_before=False)
    with DFAHook(model, half_round=True), pytest.raises(InputError, match="block 0 does not"): model(**batch())

def test_a_closed_gate_costs_no_attention():
    "That is the point of half a round: the attention's backward pass does not run in it"
    model, ran = make("llama"), []
    def spy(m, args, out): out.register_hook(lambda g: ran.append(g is not None))
    for b in find_stack(model).blocks: b.self_attn.q_proj.register_forward_hook(spy)
    with DFAHook(model, half_round=True): backward(model, batch())
    assert sum(ran) == 4                                                   # once a block, for its own weights
    ran.clear()
    with DFAHook(model, rounds=1): backward(model, batch())
    assert sum(ran) == 4 + 3

# --- what is done to models in training -----------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["llama", "gpt2", "falcon", "t5"])
@pytest.mark.parametrize("kw", [dict(), dict(rounds=1), dict(half_round=True)], ids=str)
def test_gradient_checkpointing_changes_nothing(kind, kw):
    model, inputs = make(kind).train(), batch(kind)
    with DFAHook(model, **kw): want = backward(model, inputs, use_cache=False)
    model.gradient_checkpointing_enable(dict(use_reentrant=False))
    again = []
    find_stack(model).blocks[0].register_forward_hook(lambda *a: again.append(1) and None)
    attention_in(find_stack(model).blocks[0])[0].register_forward_hook(lambda *a: again.append(2) and None)
    with DFAHook(model, **kw): inside = backward(model, inputs, use_cache=False)
    assert 2 in again[again.index(2) + 1:]                                 # it was computed again
    model.zero_grad(); torch.manual_seed(3)
    with DFAHook(model, **kw): loss = model(**inputs, use_cache=False).loss
    loss.backward()
    assert_same(want, inside, 1e-12); assert_same(want, grads(model), 1e-12)

def test_reentrant_checkpointing_too():
    model, inputs = make("llama").train(), batch()
    with DFAHook(model): want = backward(model, inputs, use_cache=False)
    model.gradient_checkpointing_enable(dict(use_reentrant=True))
    with DFAHook(model): assert_same(want, backward(model, inputs, use_cache=False), 1e-12)

def test_layers_whose_checkpointing_holds_the_hooks_too():
    "As in older versions of transformers: without a word the blocks would not be cut"
    class Old(nn.Linear):
        gradient_checkpointing = False
        def __call__(self, x):
            if not self.gradient_checkpointing: return super().__call__(x)
            return torch.utils.checkpoint.checkpoint(super().__call__, x, use_reentrant=True)
    blocks, B = nn.ModuleList(Old(3, 3) for _ in range(2)), FeedbackMatrices([3]*2, 3)
    with DFAHook(blocks, B): blocks[1](blocks[0](torch.ones(1, 3)))
    for b in blocks: b.gradient_checkpointing = True
    with pytest.raises(InputError, match="inside gradient checkpointing"): DFAHook(blocks, B).attach()

@FAMILY
def test_accumulation_is_the_sum(kind):
    model, inputs = make(kind), batch(b=4, pad=False)
    with DFAHook(model): want = backward(model, inputs)
    model.zero_grad(set_to_none=True)
    with DFAHook(model):
        for part in (slice(0, 2), slice(2, 4)): (model(**{k: v[part] for k, v in inputs.items()}).loss/2).backward()
    assert_same(want, grads(model), 1e-5)                                  # Gemma's norms are in float32

def test_attach_and_detach_without_a_with():
    model, inputs = make("gpt2"), batch()
    bp = backward(model, inputs)
    with DFAHook(model) as hook: want = backward(model, inputs)
    assert hook.attach() is hook
    assert_same(want, backward(model, inputs), 1e-12)
    with torch.no_grad(): model.generate(inputs["input_ids"][:1], max_new_tokens=3, do_sample=False)
    hook.detach()
    assert_same(bp, backward(model, inputs), 1e-12)

def test_embedding_credit():
    model, inputs = make("llama"), batch()
    seen, table = {}, model.get_input_embeddings()
    def spy(m, a, out): out.register_hook(lambda g: seen.update(embed=g)) if out.requires_grad else None
    table.register_forward_hook(spy)
    model.model.norm.register_forward_pre_hook(lambda m, a: a[0].register_hook(lambda g: seen.update(top=g)) and None)
    with DFAHook(model, embedding="direct"): backward(model, inputs)
    assert_rel("direct", seen["top"], seen["embed"], 1e-12)
    seen.clear()
    with DFAHook(model, embedding="none"): backward(model, inputs)
    assert "embed" not in seen

class ByName(nn.Module):
    "Calls its layers by keyword, the hidden state not even first"
    def __init__(self, layers):
        super().__init__()
        self.layers = layers
    def forward(self, x):
        for b in self.layers: x = b(scale=2., hidden=x)["hidden" if isinstance(b, Named) else 0]
        return x

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.map = nn.Linear(5, 5)
    def forward(self, hidden, scale=1.): return [hidden + scale*self.map(hidden).tanh(), "beside"]

class Named(Layer):
    def forward(self, hidden, scale=1.): return dict(hidden=super().forward(hidden, scale)[0])

def test_layers_called_by_keyword():
    torch.manual_seed(0)
    model, x = ByName(nn.ModuleList(Layer() for _ in range(3))).double(), torch.randn(2, 5).double()
    with pytest.raises(InputError, match="how wide"): DFAHook(model)
    B = FeedbackMatrices([5]*3, 5)
    with DFAHook(model, B): top = model(x)
    e = torch.randn(2, 5).double()
    top.backward(e)
    for l, b in enumerate(model.layers):
        ref = torch.autograd.grad(b(x, scale=2.)[0], list(b.parameters()), B.local_error(l, e))
        for p, g in zip(b.parameters(), ref): assert_rel(f"layer {l}", g, p.grad, 1e-12)
        x = b(x, scale=2.)[0].detach()

def test_what_cannot_be_hooked_is_said_in_one_line():
    x, B = torch.randn(2, 5), FeedbackMatrices([5]*3, 5)
    wrong = ByName(nn.ModuleList(Named() for _ in range(3)))
    with DFAHook(wrong, B), pytest.raises(InputError, match="Named returns a dict"): wrong(x)
    with pytest.raises(InputError, match="no list of blocks"): DFAHook(nn.Linear(2, 2))
    two = nn.ModuleDict(dict(a=wrong, b=ByName(nn.ModuleList(Layer() for _ in range(3)))))
    with pytest.raises(InputError, match="a.layers and b.layers of ModuleDict are equally long"): DFAHook(two)
    with pytest.raises(InputError, match="how wide"): DFAHook([Layer()])
    with pytest.raises(InputError, match="unknown feedback|feedback"): DFAHook(make("gpt2"), "nonsense")
    for thing in ("gpt2", None):
        with pytest.raises(InputError, match="takes a model"): DFAHook(thing)
    with pytest.raises(InputError, match="feedback must be"): DFAHook(make("gpt2"), None)
    with pytest.raises(InputError, match="whole rounds"): DFAHook(make("gpt2"), rounds=1.5)
    with pytest.raises(InputError, match="need a hook"): feedback_callback(make("gpt2"))

def test_one_hook_at_a_time():
    "Of two, only the one that was attached last would be heard"
    model = make("gpt2")
    with DFAHook(model, "gaussian"), pytest.raises(InputError, match="another DFAHook"), DFAHook(model): pass
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

@pytest.mark.parametrize("skipped", range(4))
def test_a_block_that_is_skipped_is_said_in_one_line(skipped):
    "What LayerDrop does. Without its last block a model used to train the others by nothing, in silence"
    model = make("opt").train()
    blocks, inputs = find_stack(model).blocks, batch()
    with pytest.raises(InputError, match="LayerDrop"), DFAHook(model):
        blocks[skipped].forward = None                                    # as if it was never called
        model.model.decoder.layers = nn.ModuleList(b for b in blocks if b.forward)
        model(**inputs)
    assert not any(m._forward_hooks or m._forward_pre_hooks for b in blocks for m in b.modules())

# --- how much of the gradient survives ------------------------------------------------------------------------------

def state_of(model):
    "All that a comparison must leave alone"
    return dict(modes=[m.training for m in model.modules()], flags=[p.requires_grad for p in model.parameters()],
                grads=[None if p.grad is None else p.grad.clone() for p in model.parameters()],
                weights=[x.clone() for x in model.state_dict().values()], rng=torch.get_rng_state(),
                hooks=[len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()])

def unchanged(a, b):
    for name, x in a.items():
        for y, z in zip(x, b[name], strict=True):
            assert torch.equal(y, z) if isinstance(y, torch.Tensor) else y == z, name

@FAMILY
def test_compare_gradients_says_what_two_backward_passes_say(kind):
    model, inputs = make(kind), batch(kind)
    name = FAMILIES[kind][0]
    bp, dfa = backward(model, inputs), by_hand(model, name, inputs)
    model.train()
    find_stack(model).blocks[1].eval()                                   # every module has its own mode
    find_stack(model).blocks[2].requires_grad_(False)
    before = state_of(model)
    found = compare_gradients(model, inputs)
    unchanged(before, state_of(model))
    assert {f"block{l}" for l in (0, 1, 3)} | {"embed", "head", "all"} <= set(found) and "block2" not in found
    for l in (0, 1, 3):
        names = [n for n, _ in model.get_submodule(f"{name}.{l}").named_parameters()]
        a, b = (torch.cat([g[f"{name}.{l}.{n}"].flatten() for n in names if f"{name}.{l}.{n}" in g]) for g in (bp, dfa))
        row = found[f"block{l}"]
        assert row["cosine"] == pytest.approx(torch.cosine_similarity(a, b, 0).item(), abs=1e-6)
        assert row["error"] == pytest.approx(((a - b).norm()/a.norm()).item()**2, rel=1e-5, abs=1e-10)
    both = [torch.cat([g[n].flatten() for n, p in model.named_parameters() if p.requires_grad and n in g])
            for g in (bp, dfa)]
    assert found["all"]["cosine"] == pytest.approx(torch.cosine_similarity(*both, 0).item(), abs=1e-6)
    assert found["all"]["norm"] == pytest.approx(both[1].norm().item(), rel=1e-6)
    assert found["block3"]["error"] < 1e-10 < found["block0"]["error"]

def test_rounds_bring_the_gradient_back():
    model, inputs = make("qwen3"), batch()
    found = {r: compare_gradients(model, inputs, rounds=r) for r in (0, 1, 3)}
    assert found[3]["all"]["error"] < 1e-12 < found[1]["all"]["error"]
    assert found[0]["block0"]["cosine"] != found[1]["block0"]["cosine"]
    assert compare_gradients(model, inputs, half_round=True)["block0"]["error"] > 1e-9
    fig = plot_alignment({f"{r} rounds": rows for r, rows in found.items()}, "Qwen3")
    assert all(x == int(x) for ax in fig.axes for x in ax.get_xticks())                     # blocks are counted
    lines = fig.axes[0].get_lines()
    assert list(lines[0].get_xdata()) == [1, 2, 3, 4]
    assert lines[0].get_ydata()[0] == found[0]["block0"]["cosine"]

def test_feedback_does_not_learn_from_being_compared():
    model, inputs = make("gpt2"), batch()
    hook = DFAHook(model, "calibrated")
    hook.feedback.double()
    compare_gradients(model, inputs, feedback=hook.feedback)
    assert hook.feedback.passes == 0 and hook.feedback.training
    assert torch.equal(hook.feedback.matrix(0), torch.eye(WIDTH).double())

def test_what_cannot_be_compared_is_said_in_one_line():
    model, inputs = make("gpt2"), batch()
    with pytest.raises(InputError, match="no labels"): compare_gradients(model, dict(input_ids=inputs["input_ids"]))
    with pytest.raises(InputError, match="no labels"): compare_gradients(model, inputs["input_ids"])
    with DFAHook(model), pytest.raises(InputError, match="detach"): compare_gradients(model, inputs)
    with torch.no_grad(): assert compare_gradients(model, inputs)["block3"]["cosine"] > .999
    def logits(model, inputs): return model(**inputs).logits
    with pytest.raises(InputError, match="one number"): compare_gradients(model, inputs, loss_of=logits)
    with pytest.raises(InputError, match="need a model"): compare_gradients("gpt2", inputs)
    with pytest.raises(InputError, match="have learnt nothing"): compare_gradients(model, inputs, feedback="calibrated")
    with pytest.raises(InputError, match="named curves"): plot_alignment(compare_gradients(model, inputs))
    with pytest.raises(InputError, match="no parameter"): compare_gradients(model.requires_grad_(False), inputs)

# --- Trainer, adapters ----------------------------------------------------------------------------------------------

def train(folder, kind="calibrated", steps=6, resume=None, dropout=.1, **options):
    "A model, its hook, and what a few steps of `Trainer` made of them"
    data = [dict(input_ids=row, labels=row) for row in batch(b=12, pad=False)["input_ids"]]
    model = make("llama", attention_dropout=dropout).float()
    hook = DFAHook(model, kind)
    hook.feedback.refresh = 2
    options = transformers.TrainingArguments(
        str(folder), max_steps=steps, save_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
        use_cpu=True, disable_tqdm=True, logging_strategy="no", lr_scheduler_type="constant", max_grad_norm=0.,
        **options)
    trainer = transformers.Trainer(model, options, train_dataset=data, callbacks=[feedback_callback(hook)])
    trainer.train(resume_from_checkpoint=resume)
    return model, hook

def test_a_resumed_run_is_the_run_that_did_not_stop(tmp_path):
    whole, hook = train(tmp_path/"a")
    train(tmp_path/"b", steps=3)
    assert (tmp_path/"b/checkpoint-3"/FEEDBACK_FILE).is_file() and not list(tmp_path.rglob("*.part"))
    resumed, again = train(tmp_path/"b", resume=str(tmp_path/"b/checkpoint-3"))
    for l in range(4): assert torch.equal(hook.feedback.matrix(l), again.feedback.matrix(l))
    for (n, p), q in zip(whole.named_parameters(), resumed.named_parameters()): assert torch.equal(p, q[1]), n
    from safetensors.torch import load_file
    early = load_file(tmp_path/"a/checkpoint-3"/FEEDBACK_FILE)
    assert (early["b0"] - hook.feedback.matrix(0)).norm() > 1e-3          # it went on learning: reading it matters
    (tmp_path/"b/checkpoint-3"/FEEDBACK_FILE).unlink()
    with pytest.raises(InputError, match="is missing"): train(tmp_path/"b", resume=str(tmp_path/"b/checkpoint-3"))

def test_trainer_steps_are_those_of_a_loop_by_hand(tmp_path):
    "With accumulation and recomputation: plain SGD, so that weights show gradients"
    model, hook = train(tmp_path, "identity", 2, dropout=0., optim="sgd", gradient_accumulation_steps=2,
                        gradient_checkpointing=True, gradient_checkpointing_kwargs=dict(use_reentrant=False),
                        train_sampling_strategy="sequential")
    assert not hook._handles and not list(tmp_path.rglob(FEEDBACK_FILE))
    want, data = make("llama", attention_dropout=0.).float().train(), batch(b=12, pad=False)
    for step in range(2):
        rows = slice(4*step, 4*step + 4)
        g = by_hand(want, "model.layers", {k: v[rows] for k, v in data.items()})
        with torch.no_grad():
            for n, p in want.named_parameters(): p.sub_(1e-2*g[n])
    for (n, p), q in zip(want.named_parameters(), model.parameters()): assert_rel(n, p, q, 1e-5)

def test_adapters():
    peft = pytest.importorskip("peft", reason="adapters need peft: pip install peft")
    inputs = batch()
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(make("llama"), config).double().eval()
    name = "base_model.model.model.layers"
    assert find_stack(model).name == name
    want = by_hand(model, name, inputs)
    with DFAHook(model): got = backward(model, inputs)
    assert len(got) == 4*3*2 and all("lora" in n for n in got)
    assert_same(want, got)
    bp = backward(model, inputs)
    with DFAHook(model, rounds=3): assert_same(bp, backward(model, inputs))
    found = compare_gradients(model, inputs, half_round=True)
    assert set(found) == {"block0", "block1", "block2", "block3", "all"} and found["block0"]["cosine"] < .999
    model.gradient_checkpointing_enable(dict(use_reentrant=False))
    model.train()
    with DFAHook(model): assert backward(model, inputs).keys() == want.keys()
