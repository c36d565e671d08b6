"The byte embedding against its definition: on a CUDA device where there is one, else in Triton's interpreter."
import importlib.util
import numpy as np
import pytest, torch
from kernel_setup import TRITON, compiled_for_h100, compiler_only, device, needs_cuda, only_where_late, run_alone
from okadfa.core import InputError, assert_rel
from okadfa.kernels import bytes as kernels
from okadfa.kernels.bytes import byte_embed, byte_embed_ref, why_not_byte_embed

def problem(device, b, n, d, dtype=torch.float32, ids=torch.int64, v=257):
    g = torch.Generator().manual_seed(n + d)
    drawn = torch.randint(min(v, 256), (b, n), generator=g).to(device, ids)
    return drawn, *(torch.randn(*size, generator=g).to(device, dtype) for size in ((v, d), (b, n, d)))

def grad(f, ids, table, go, *args, **options):
    table = table.detach().requires_grad_()
    return torch.autograd.grad(f(ids, table, *args, **options), table, go.to(table.dtype))[0]

def shifted(ids, table): return byte_embed(ids, table, shift=True, impl="triton")

def check(x, tol, scale=None, shift=False):
    "Values to the last bit, the gradient against float64"
    ids, table, go = x
    out = byte_embed(ids, table, scale, shift, impl="triton")
    want = byte_embed_ref(ids, table, scale, shift)
    assert out.dtype == table.dtype and torch.equal(out, want)
    got = grad(byte_embed, *x, scale, shift, impl="triton")
    assert got.dtype == table.dtype
    assert_rel("gradient", grad(byte_embed_ref, ids, table.double(), go, scale, shift), got.double(), tol)
    return got

@only_where_late
def test_in_a_process_of_its_own(): run_alone(__file__)

def test_the_definition_is_the_chain_of_the_model():
    "Embedding, times sqrt(d), then the blocks' own token shift; also for odd widths and one position"
    from okadfa.models.block import token_shift
    for b, n, d in ((2, 9, 6), (1, 1, 5), (3, 4, 1)):
        ids, table, go = problem("cpu", b, n, d, torch.float64)
        plain = torch.nn.functional.embedding(ids, table)*d**.5
        assert torch.equal(byte_embed_ref(ids, table), plain)
        assert torch.equal(byte_embed_ref(ids, table, shift=True), token_shift(plain))
        assert torch.equal(byte_embed_ref(ids, table, 3.), torch.nn.functional.embedding(ids, table)*3)
    ids, table, _ = problem("cpu", 2, 5, 3, torch.float64, v=7)
    assert torch.autograd.gradcheck(lambda t: byte_embed_ref(ids, t, shift=True), table.requires_grad_())

@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("b, n, d", [(1, 1, 1), (1, 1, 8), (4, 1, 5), (1, 2, 2), (2, 31, 16), (2, 32, 17), (1, 33, 3),
                                     (3, 63, 9), (1, 64, 20), (2, 65, 130), (5, 7, 64)])
def test_values_and_gradients(device, b, n, d, shift): check(problem(device, b, n, d), 3e-7, None, shift)

@pytest.mark.parametrize("dtype, tol", [(torch.float32, 3e-7), (torch.bfloat16, 2.5e-3), (torch.float16, 3e-4)])
@pytest.mark.parametrize("ids", [torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint16])
def test_types(device, dtype, tol, ids): check(problem(device, 2, 37, 10, dtype, ids), tol, shift=True)

@pytest.mark.parametrize("v", [1, 16, 63, 64, 65, 257])
def test_sizes_of_the_vocabulary(device, v):
    x = problem(device, 2, 40, 6, v=v)
    x[0][0, 0] = v - 1                                                          # the last row is used
    check(x, 3e-7, shift=True)

@pytest.mark.parametrize("scale", [1., -2.5, 0., 1e-3, 7])
def test_scale(device, scale): check(problem(device, 1, 20, 4), 3e-7, scale, True)

@pytest.mark.parametrize("shift", [False, True])
def test_no_position_at_all(device, shift):
    for shape, dtype, width in (((2, 0), torch.int64, 6), ((0, 5), torch.uint8, 6), ((2, 3), torch.uint8, 0)):
        ids = torch.zeros(shape, dtype=dtype)
        table = torch.randn(257, width, device=device).requires_grad_()
        out = byte_embed(ids.to(device), table, shift=shift, impl="triton")
        assert out.shape == (*ids.shape, width)
        out.sum().backward()
        assert table.grad.eq(0).all()

def test_sequences_do_not_mix(device):
    "The shift stops at the first position of every sequence, in both directions"
    ids, table, go = problem(device, 3, 33, 8)
    how = dict(shift=True, impl="triton")
    whole, dwhole = byte_embed(ids, table, **how), grad(byte_embed, ids, table, go, **how)
    each = [byte_embed(i[None], table, **how) for i in ids]
    assert torch.equal(whole, torch.cat(each)) and whole[:, 0, 4:].eq(0).all()
    deach = [grad(byte_embed, i[None], table, g[None], **how) for i, g in zip(ids, go)]
    assert_rel("gradient", dwhole, sum(deach), 3e-7)

def test_causal(device):
    ids, table, _ = problem(device, 1, 70, 8)
    before, edited = shifted(ids, table), ids.clone()
    edited[:, 41:] = (edited[:, 41:] + 1) % 257
    after = shifted(edited, table)
    assert torch.equal(before[:, :41], after[:, :41]) and not torch.equal(before[:, 41], after[:, 41])

@pytest.mark.parametrize("n", [1023, 1024, 1025, 2049])
def test_several_stretches(device, n): check(problem(device, 1, n, 4, v=60), 1e-6, shift=True)

def test_many_stretches_are_cut_in_whole_blocks(device, monkeypatch):
    monkeypatch.setattr(kernels, "STRETCH", 50); monkeypatch.setattr(kernels, "STRETCHES", 3)
    for n in (49, 64, 65, 129, 400): check(problem(device, 1, n, 4, v=60), 5e-7, shift=True)

def test_one_row_gets_everything(device):
    "Sums of thousands in half precision: float32 inside, rounded once"
    for dtype, tol in ((torch.bfloat16, 4e-3), (torch.float16, 5e-4)):
        ids, table, _ = problem(device, 1, 3000, 2, dtype, v=60)
        got = grad(byte_embed, ids*0 + 7, table, torch.ones(1, 3000, 2, device=device), 1., impl="triton")
        assert_rel("row 7", torch.full((2,), 3000., dtype=torch.float64, device=device), got[7].double(), tol)
        assert got.count_nonzero() == 2

def test_rows_that_nobody_reads_get_zero(device):
    ids, table, go = problem(device, 2, 30, 4)
    got = grad(byte_embed, ids % 5 + 250, table, go, impl="triton")
    assert got[:250].eq(0).all() and got[255:].eq(0).all() and (got[250:255] != 0).all()

def test_equal_bits_every_run(device):
    x = problem(device, 2, 1500, 8, v=60)
    a, b = (grad(shifted, *x) for _ in range(2))
    assert torch.equal(a, b)

def test_memory_that_was_never_written_does_not_show(device, monkeypatch):
    x = problem(device, 2, 41, 12)
    run = lambda: (shifted(*x[:2]), grad(shifted, *x))
    clean, empty, poisoned = run(), torch.empty, []
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poisoned.append(1) or empty(*a, **k).fill_(torch.nan))
    dirty = run()
    monkeypatch.undo()
    assert len(poisoned) == 3 and all(torch.equal(a, b) for a, b in zip(clean, dirty))

def test_nothing_is_read_outside(device):
    "Tensors inside larger ones full of NaN: neighbours never show"
    ids, table, go = problem(device, 2, 37, 6)
    def around(t):
        large = torch.cat([t.new_full((64,), torch.nan), t.flatten(), t.new_full((4096,), torch.nan)])
        return large[64:64 + t.numel()].view_as(t)
    how = dict(shift=True, impl="triton")
    assert torch.equal(byte_embed(ids, table, **how), byte_embed(ids, around(table), **how))
    alone, inside = grad(byte_embed, ids, table, go, **how), grad(byte_embed, ids, around(table), around(go), **how)
    assert torch.equal(alone, inside)

def test_strides(device):
    ids, table, go = problem(device, 4, 20, 6)
    how = dict(shift=True, impl="triton")
    want, dwant = byte_embed(ids, table, **how), grad(byte_embed, ids, table, go, **how)
    jagged = ids.T.contiguous().T, table.T.contiguous().T, go.mT.contiguous().mT
    assert not any(x.is_contiguous() for x in jagged)
    assert torch.equal(want, byte_embed(*jagged[:2], **how)) and torch.equal(dwant, grad(byte_embed, *jagged, **how))
    x = table.clone().requires_grad_()
    byte_embed(ids, x, impl="triton").sum().backward()                    # the gradient that arrives has stride 0
    assert_rel("counts", torch.bincount(ids.flatten(), minlength=257)[:, None].expand(-1, 6)*6**.5, x.grad, 1e-6)
    one, batch = byte_embed(ids[0], table, impl="triton"), byte_embed(ids[:1], table, impl="triton")
    assert torch.equal(one, batch[0])                                     # one sequence, no batch

def test_no_gradient_where_none_is_wanted(device):
    ids, table, _ = problem(device, 1, 5, 4)
    assert not byte_embed(ids, table, impl="triton").requires_grad
    with torch.no_grad(): assert not byte_embed(ids, table.requires_grad_(), impl="triton").requires_grad

# ---- ids without a row

@pytest.mark.parametrize("impl", ["ref", "triton"])
@pytest.mark.parametrize("ids, v", [([[0, 257]], 257), ([[-1, 3]], 257), ([[2**32]], 257), ([[-2**40, 0]], 257),
                                    ([[100, 101]], 101)])
def test_ids_outside_are_refused(device, impl, ids, v):
    with pytest.raises(InputError, match=rf"ids must be in \[0, {v}\)") as e:
        byte_embed(torch.tensor(ids, device=device), torch.zeros(v, 4, device=device), impl=impl)
    assert "\n" not in str(e.value)

def test_bytes_are_checked_only_where_they_can_be_outside(device, monkeypatch):
    "uint8 against 257 rows costs no look at the data, which on a GPU would wait"
    def never(*a): raise AssertionError("looked")
    ids, table = torch.full((1, 4), 255, dtype=torch.uint8, device=device), torch.zeros(257, 4, device=device)
    with monkeypatch.context() as p:
        p.setattr(torch.Tensor, "aminmax", never)
        byte_embed(ids, table, impl="triton"); byte_embed(ids.long(), table, impl="triton", check=False)
        with pytest.raises(AssertionError, match="looked"): byte_embed(ids.long(), table, impl="triton")
    with pytest.raises(InputError, match="got 255 to 255"): byte_embed(ids, table[:255], impl="triton")

@pytest.mark.parametrize("bad", [257, 10**6, 2**32 + 3, -1, -2**33])
@pytest.mark.parametrize("shift", [False, True])
def test_unchecked_ids_outside_give_nan_and_reach_no_row(device, bad, shift):
    ids, table, go = problem(device, 2, 9, 6)
    want, wrong = byte_embed_ref(ids, table, shift=shift), ids.clone()
    wrong[0, 4] = bad
    got = byte_embed(wrong, table, shift=shift, impl="triton", check=False)
    assert got[0, 4, :3].isnan().all() and got[0, 5 if shift else 4, 3:].isnan().all() and got.isnan().sum() == 6
    assert torch.equal(got[~got.isnan()], want[~got.isnan()])
    dropped = go.clone(); dropped[0, 4, :3] = 0; dropped[0, 5 if shift else 4, 3:] = 0
    assert_rel("gradient", grad(byte_embed, ids, table, dropped, None, shift, impl="triton"),
               grad(byte_embed, wrong, table, go, None, shift, impl="triton", check=False), 1e-6)

@pytest.mark.parametrize("change, says", [
    (dict(ids=torch.zeros(1, 3)), "whole numbers"),
    (dict(ids=torch.zeros(1, 3, dtype=torch.bool)), "whole numbers"),
    (dict(ids=torch.tensor(3)), "whole numbers"),
    (dict(table=torch.zeros(257)), "table must be"),
    (dict(table=torch.zeros(257, 4, dtype=torch.int64)), "table must be"),
    (dict(table=torch.zeros(257, 4, dtype=torch.complex64)), "table must be"),
    (dict(ids=torch.zeros(1, 3, dtype=torch.int64, device="meta")), "move one of them"),
    (dict(impl="fast"), "impl must be")])
def test_what_does_not_fit_is_refused(change, says):
    fits = dict(ids=torch.zeros(1, 3, dtype=torch.int64), table=torch.zeros(257, 4))
    with pytest.raises(InputError, match=says) as e: byte_embed(**(fits | change))
    assert "\n" not in str(e.value)

# ---- dispatch

def test_auto_on_a_cpu_is_the_definition(monkeypatch):
    "Even where the interpreter could run: it is for checks, not for speed"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(kernels, "_ByteEmbed", None)
    ids, table, _ = problem("cpu", 2, 5, 4)
    assert torch.equal(byte_embed(ids, table), byte_embed_ref(ids, table))
    assert byte_embed(ids, table.double()).dtype == torch.float64

@pytest.mark.cuda
@needs_cuda
def test_auto_on_a_gpu_takes_the_kernel(monkeypatch):
    ids, table, _ = problem("cuda", 2, 5, 4)
    assert torch.equal(byte_embed(ids, table.double()), byte_embed_ref(ids, table.double()))   # float64: the definition
    monkeypatch.setattr(kernels, "_ByteEmbed", None)
    with pytest.raises(AttributeError): byte_embed(ids, table)

@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("dtype, tol", [(torch.float32, 2e-6), (torch.bfloat16, 2.5e-3), (torch.float16, 3e-4)])
def test_large_shapes(dtype, tol):
    for b, n, d in ((8, 4096, 512), (3, 4097, 768), (1, 100_001, 96)):
        x = problem("cuda", b, n, d, dtype, torch.uint8)
        first = check(x, tol, shift=True)
        for _ in range(3): assert torch.equal(first, grad(shifted, *x))

def test_why_not(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    ids, table = torch.zeros(1, 2, dtype=torch.uint8), torch.zeros(257, 1000)
    said = "the table is on the cpu: move it to a CUDA device, or set TRITON_INTERPRET=1"
    if TRITON: assert why_not_byte_embed(table).startswith(said)
    assert why_not_byte_embed(table.double()).endswith("use byte_embed_ref")
    with pytest.raises(NotImplementedError, match="^impl='triton' cannot run: "): byte_embed(ids, table, impl="triton")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert why_not_byte_embed(table) == "triton is not installed: pip install triton, or use byte_embed_ref"

@compiler_only
def test_it_compiles_for_a_gpu_that_is_not_here(tmp_path):
    "Both kernels through Triton's compiler and ptxas for an H100, in every type, with and without shift"
    seen = compiled_for_h100("""
from okadfa.kernels.bytes import _ByteEmbed, _jit
_jit.load()
for dtype, ids, shift in ((torch.float32, torch.uint8, True), (torch.bfloat16, torch.int64, True),
                          (torch.float16, torch.int16, False)):
    table = torch.zeros(257, 384, dtype=dtype, requires_grad=True)
    _ByteEmbed.apply(torch.zeros(2, 100, dtype=ids), table, 2., shift).sum().backward()""", tmp_path)
    assert sorted(seen) == ["_accumulate"]*3 + ["_look_up"]*3

def test_the_encoders_ids_are_taken_as_they_are():
    "uint16 from `ByteEncoder.encode`, and the raw bytes"
    from okadfa.spectral.bytes import ByteEncoder
    table = torch.randn(257, 4)
    ids = ByteEncoder().encode("naïve")
    raw = torch.from_numpy(np.frombuffer("naïve".encode(), np.uint8).copy())
    assert torch.equal(byte_embed(torch.from_numpy(ids), table), byte_embed(raw, table))
