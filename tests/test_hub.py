"Kernel attention in other people's models: twelve families, masks, caches, saving"
import copy
import pytest, torch
import torch.nn.functional as F
from okadfa.core import InputError, assert_rel

pytest.importorskip("transformers")
from okadfa.models.hub import KernelCache, KernelHeads, NoFeatures, heads_of, recording
from okadfa.models.linearize import linearize, load_linearized
from test_adopted import FAMILIES, WORDS, make

REFUSED = "bloom", "t5", "falcon"          # they do not look attention up by name; two add biases to their logits
REPLACED = [kind for kind in FAMILIES if kind not in REFUSED]

def text(b=2, n=40, seed=0): return torch.randint(3, WORDS, (b, n), generator=torch.Generator().manual_seed(seed))

def extra(kind, ids): return dict(decoder_input_ids=ids) if kind == "t5" else {}

def logits(model, ids, kind="", **kw):
    with torch.no_grad(): return model(ids, use_cache=False, **extra(kind, ids), **kw).logits

FULL = dict(mistral=dict(sliding_window=None), gemma3_text=dict(layer_types=["sliding_attention", "full_attention"]*2))

def linear(kind, estimator="derf", **kw):
    how = dict(m=16, window=5, sinks=2, length=40, progress=False)
    return linearize(make(kind, **FULL.get(kind, {})), text(6, seed=1), estimator, **how | kw)

def attention_layers(model): return [m for m in model.modules() if heads_of(m) is not None]

@pytest.mark.parametrize("kind", FAMILIES)
def test_every_layer_kept_is_the_model(kind):
    ids = text()
    before = logits(make(kind, **FULL.get(kind, {})), ids, kind)
    assert torch.equal(before, logits(linear(kind, keep="all"), ids, kind))
    if kind in REFUSED: return
    model = linear(kind, keep=range(4))
    assert not attention_layers(model) and model.config._attn_implementation == "okadfa"
    assert_rel("kept one by one", before, logits(model, ids, kind), 1e-12)
    seen = torch.ones_like(ids); seen[1, :6] = 0
    want, got = (logits(m, ids, attention_mask=seen) for m in (make(kind, **FULL.get(kind, {})), model))
    assert_rel("padded", want[seen.bool()], got[seen.bool()], 1e-12)

@pytest.mark.parametrize("kind", REPLACED)
def test_the_past_does_not_move(kind):
    model, ids = linear(kind), text()
    assert len(attention_layers(model)) == (2 if kind == "gemma3_text" else 4)
    before = logits(model, ids)
    for t in (1, 20, 39):
        edited = ids.clone(); edited[:, t:] = (edited[:, t:] + 7) % WORDS
        after = logits(model, edited)
        assert torch.equal(before[:, :t], after[:, :t]) and not torch.equal(before[:, t:], after[:, t:])

@pytest.mark.parametrize("kind", REPLACED)
@pytest.mark.parametrize("left", [True, False])
def test_padding_is_as_if_alone(kind, left):
    model, ids, seen = linear(kind), text(), torch.ones(2, 40, dtype=torch.long)
    real = slice(9, None) if left else slice(0, 31)
    seen[1] = 0; seen[1, real] = 1
    position_ids = (seen.cumsum(1) - 1).clamp_min(0)
    named = {} if kind == "opt" else dict(position_ids=position_ids)       # which derives them from the mask
    both = logits(model, ids, attention_mask=seen, **named)
    assert_rel("alone", logits(model, ids[1:, real]), both[1:, real], 1e-9)
    assert_rel("the other row", logits(model, ids[:1]), both[:1], 1e-9)
    other = ids.clone(); other[1][seen[1] == 0] = 5
    assert torch.equal(both[1, real], logits(model, other, attention_mask=seen, **named)[1, real])

@pytest.mark.parametrize("kind", REPLACED)
def test_generation_with_states_is_generation_with_all_keys(kind):
    model = linear(kind)
    ids, seen = text(2, 20), torch.ones(2, 20, dtype=torch.long)
    seen[1, :7] = 0
    how = dict(attention_mask=seen, max_new_tokens=12, do_sample=False, pad_token_id=2, eos_token_id=None)
    for beams in (1, 2):
        with torch.no_grad():
            kept = model.generate(ids, num_beams=beams, **how)
            mine = model.generate(ids, num_beams=beams, past_key_values=KernelCache(model), **how)
        assert torch.equal(kept, mine)

@pytest.mark.parametrize("kind", ["mistral", "gemma3_text"])
def test_layers_with_a_window_of_their_own_are_left_alone(kind):
    model, ids = linearize(make(kind), text(6), progress=False), text()
    assert not attention_layers(model)
    assert_rel("as it was", logits(make(kind), ids), logits(model, ids), 1e-12)

@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_cannot_be_replaced_say_so(kind):
    model = make(kind)
    before = logits(model, text(), kind)
    with pytest.raises(InputError, match="by itself"): linearize(model, text(), progress=False)
    assert torch.equal(before, logits(model, text(), kind))

def llama(**kw): return linear("llama", **kw)

def test_the_attention_is_the_one_of_its_definition():
    "Every replaced layer, on what it is called with"
    from okadfa.attention.favor import favor_attention_ref
    model, outs = llama(), []
    hooks = [m.okadfa.register_forward_hook(lambda m, x, y: outs.append((m, x, y))) for m in attention_layers(model)]
    logits(model, text())
    for h in hooks: h.remove()
    assert len(outs) == 4
    for heads, (q, k, v, _, scale), out in outs:
        from okadfa.attention.favor import for_heads
        f = for_heads(heads.features, q.shape[1], k.shape[1])
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        ref = favor_attention_ref(q, k, v, f, window=5, sinks=2, scale=scale)
        assert_rel("layer", ref, out, 1e-9)

def test_gradients_reach_weights_and_learnt_features():
    model = llama(estimator="hedgehog", steps=3).train()
    ids = text()
    model(ids, labels=ids, use_cache=False).loss.backward()
    heads = attention_layers(model)[0].okadfa
    assert all(p.grad is not None and p.grad.isfinite().all() for p in heads.parameters() if p.requires_grad)
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0

def test_output_error_chooses_and_features_help():
    "The control beside: window and sinks alone, on text that was not fitted on"
    truth, ids = logits(make("llama"), text(4, seed=5)), text(4, seed=5)
    def error(name): return ((logits(llama(estimator=name), ids) - truth).norm()/truth.norm()).item()
    assert error("derf") < error(None)

def test_an_estimator_in_another_scale_is_refused():
    with pytest.raises(InputError, match="scale"): llama(estimator="trig")

@pytest.mark.parametrize("wrong", [dict(keep=[4]), dict(keep=[-5]), dict(estimator="nobody"), dict(keep=2),
    dict(keep="first"), dict(length=0), dict(tokens=0), dict(texts=None), dict(texts=[[1], [3]]), dict(texts="words")])
def test_what_does_not_fit_leaves_the_model_as_it_was(wrong):
    model, ids = make("llama"), text()
    before, name = logits(model, ids), model.config._attn_implementation
    with pytest.raises(InputError): linearize(model, **dict(texts=text(6), length=40, progress=False) | wrong)
    assert model.config._attn_implementation == name and torch.equal(before, logits(model, ids)) and not recording

def test_windows_that_a_model_cannot_take_are_refused():
    model = make("gpt2")
    with pytest.raises(InputError, match="positions"): linearize(model, torch.zeros(1, 5000).long(), length=5000)
    with pytest.raises(InputError, match="no model of transformers"): linearize("gpt2", text())

def test_no_features_is_sinks_and_window():
    q, k, v = (torch.randn(2, h, 30, 8, dtype=torch.float64) for h in (4, 2, 2))
    i, j = torch.arange(30)[:, None], torch.arange(30)
    mask = (j <= i) & ((j < 3) | (j > i - 6))
    near = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True, scale=0.3)
    assert_rel("control", near, KernelHeads(NoFeatures(8), window=6, sinks=3)(q, k, v, scale=0.3), 1e-12)

def test_keys_of_the_usual_cache_are_enough():
    "Last rows only, prompts in pieces"
    model, ids = llama(), text()
    whole, cache, parts = logits(model, ids), None, []
    for a, b in ((0, 13), (13, 14), (14, 30), (30, 40)):
        with torch.no_grad(): out = model(ids[:, a:b], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    assert_rel("in pieces", whole, torch.cat(parts, 1), 1e-9)

def pieces(model, ids, cache, cuts):
    with torch.no_grad():
        return torch.cat([model(ids[:, a:b], past_key_values=cache).logits for a, b in zip(cuts, cuts[1:])], 1)

def test_a_state_is_what_it_has_seen():
    "In pieces, copied, its rows taken and repeated, cropped while nothing has left the window"
    model, ids = llama(), text(3)
    whole, cache = logits(model, ids), KernelCache(model)
    assert_rel("in pieces", whole[:, :30], pieces(model, ids, cache, [0, 13, 14, 30]), 1e-9)
    copied = copy.deepcopy(cache)
    assert copied.layers[0].state.features is cache.layers[0].state.features
    cache.batch_select_indices(torch.tensor([2, 0]))
    assert_rel("rows", whole[[2, 0], 30:], pieces(model, ids[[2, 0]], cache, [30, 40]), 1e-9)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert_rel("the copy", whole[:, 30:], pieces(model, ids, copied, [30, 40]), 1e-9)
    again = KernelCache(model)
    pieces(model, ids[:1], again, [0, 20]); again.batch_repeat_interleave(3)
    assert again.layers[0].state.S.shape[0] == 3
    with pytest.raises(InputError, match="cannot be taken out"): again.crop(-1)
    short = KernelCache(model)
    pieces(model, ids, short, [0, 4]); short.crop(-2)
    assert_rel("cropped", whole[:, 2:], pieces(model, ids, short, [2, 40]), 1e-9)

def test_the_cache_does_not_grow():
    model, cache, sizes = llama(), None, []
    cache = KernelCache(model)
    for _ in range(3):
        pieces(model, text(1, 30), cache, [0, 30])
        sizes.append([getattr(layer.state, name).numel() for layer in cache.layers for name in layer.state.tensors()])
    assert sizes[0] == sizes[1] == sizes[2] and cache.get_seq_length() == 90

def test_prompts_padded_on_the_right_are_refused():
    model, seen = llama(), torch.ones(2, 10, dtype=torch.long)
    seen[1, 7:] = 0
    with pytest.raises(InputError, match="padding_side"), torch.no_grad():
        model(text(2, 10), attention_mask=seen, past_key_values=KernelCache(model))
    with pytest.raises(InputError, match="linearize"): KernelCache(make("llama"))

def test_packed_texts_are_refused():
    model, ids = llama(), text(1, 40)
    with pytest.raises(InputError, match="row of its own"):
        model(ids, position_ids=torch.arange(40)[None] % 20, use_cache=False)

@pytest.mark.parametrize("estimator", ["derf", "favor+", "hedgehog", None])
def test_saved_and_loaded(tmp_path, estimator):
    model, ids = llama(estimator=estimator, steps=2, keep=[1]).float(), text()
    model.save_pretrained(tmp_path/"mine")
    again = load_linearized(tmp_path/"mine")
    assert [heads_of(b.self_attn) is None for b in again.model.layers] == [False, True, False, False]
    assert torch.equal(logits(model, ids), logits(again, ids))
    make("llama").save_pretrained(tmp_path/"plain")
    with pytest.raises(InputError, match="not replaced"): load_linearized(tmp_path/"plain")
    with pytest.raises(InputError, match="no model"): load_linearized(tmp_path/"nothing")

def test_gradient_checkpointing_gives_the_same_gradients():
    def grads(checkpoint):
        model = llama().train()
        if checkpoint: model.gradient_checkpointing_enable()
        model.config.attention_dropout = 0.
        for m in model.modules():
            if hasattr(m, "attention_dropout"): m.attention_dropout = 0.
        model(text(), labels=text(), use_cache=False).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    plain, saved = grads(False), grads(True)
    for name in plain: assert_rel(name, plain[name], saved[name], 1e-12)

def test_half_precision():
    model = llama().to(torch.bfloat16)
    assert logits(model, text()).isfinite().all()
