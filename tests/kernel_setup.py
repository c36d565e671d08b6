"""What the tests of all kernels share: a device (CUDA, else Triton's interpreter), processes of their own, and the
compiler without a GPU.

Triton decides when it is imported whether it interprets, so this file imports it with the variable set. If someone
imported it before, every file of tests runs in a process of its own (`run_alone`)."""
import importlib.util, subprocess, sys
import pytest, torch
from conftest import ROOT, clean_env
from okadfa.kernels.favor import why_not_triton

CUDA, TRITON = torch.cuda.is_available(), importlib.util.find_spec("triton") is not None

def _interpreted() -> bool:
    "Import Triton as an interpreter, and leave the environment as it was"
    with pytest.MonkeyPatch.context() as p:
        p.setenv("TRITON_INTERPRET", "1")
        return why_not_triton(torch.zeros(1, 1, 1, 1)) is None
LATE = TRITON and not CUDA and not _interpreted()

needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
only_where_late = pytest.mark.skipif(not LATE, reason="Triton interprets in this process, or a CUDA device is here")
compiler_only = pytest.mark.skipif(CUDA or not TRITON, reason="for Triton's compiler where there is no CUDA device")

@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request, monkeypatch):
    if request.param == "cuda":
        if not CUDA: pytest.skip("needs a CUDA device")
    elif CUDA or not TRITON or LATE:
        pytest.skip("a CUDA device is here, or Triton is not, or it was imported as a compiler")
    else: monkeypatch.setenv("TRITON_INTERPRET", "1")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest"); torch.manual_seed(0)
    yield "cpu" if request.param == "interpreter" else "cuda"
    torch.set_float32_matmul_precision(before)

def run_alone(file:str) -> None:
    "Run a file of tests in a new process that interprets"
    command, env = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file], clean_env(ROOT)
    r = subprocess.run(command, cwd=ROOT, env=env | dict(TRITON_INTERPRET="1"), capture_output=True, text=True)
    assert r.returncode == 0, r.stdout[-3000:]

def fresh(code:str, **env) -> str:
    "Run code in a new process that does not interpret; its output"
    base = {k: v for k, v in clean_env(ROOT).items() if k != "TRITON_INTERPRET"} | dict(OMP_NUM_THREADS="1")
    command = [sys.executable, "-W", "ignore", "-c", code]
    r = subprocess.run(command, cwd=ROOT, env=base | env, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-3000:]
    return r.stdout.strip()

def compiled_for_h100(code:str, cache) -> list[str]:
    "The kernels, in order, that `code` launches: each through Triton's compiler and ptxas for an H100; its memory fits"
    return fresh("""
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
class Absent:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device=None): return 0
driver.set_active(Absent())
compile, seen = JITFunction.run, []
def run(self, *args, grid, warmup, **options):
    kernel = compile(self, *args, grid=grid, warmup=True, **options)
    assert kernel.asm["cubin"] and kernel.metadata.shared <= 227*1024, (self.fn.__name__, kernel.metadata.shared)
    seen.append(self.fn.__name__)
JITFunction.run = run
""" + code + "\nprint(*seen)", TRITON_CACHE_DIR=str(cache)).split()
