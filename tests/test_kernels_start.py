"What a new process hears of Triton: no module of kernels imports it, and one that came too early is named"
import json
import pytest
from kernel_setup import compiler_only, fresh

@pytest.fixture(scope="module")
def said():
    """One process: which module of kernels imports Triton first, each forgotten before the next one; then what two of
    them say of a Triton that is a compiler already when it is asked to interpret"""
    return json.loads(fresh("""
import importlib, importlib.util, json, os, sys, torch
found = {}
for name in ("bytes", "exponential", "favor", "longconv", "polar"):
    before = "triton" in sys.modules
    importlib.import_module(f"okadfa.kernels.{name}")
    found[name] = "triton" in sys.modules and not before
    for x in [x for x in sys.modules if x.split(".")[0] == "okadfa"]: del sys.modules[x]
if importlib.util.find_spec("triton"):
    import triton
    os.environ["TRITON_INTERPRET"] = "1"
    from okadfa.kernels import favor, polar
    found["early"] = favor.why_not_triton(torch.zeros(1, 1, 1, 1)), polar.why_not_triton(torch.zeros(1, 1))
print(json.dumps(found))"""))

@pytest.mark.parametrize("name", ["bytes", "exponential", "favor", "longconv", "polar"])
def test_importing_the_module_does_not_import_triton(said, name): assert said[name] is False

@compiler_only
@pytest.mark.parametrize("i", [0, 1])
def test_triton_that_came_too_early_is_named(said, i):
    assert said["early"][i] == "triton was imported before TRITON_INTERPRET=1 was set: set it first"
