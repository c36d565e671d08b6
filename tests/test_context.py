"The device context under signals: a process that is told to stop leaves nothing running"
import os, signal, subprocess, sys, time
import pytest
from okadfa.core import gpu_context

SCRIPT = """
import multiprocessing as mp, os, signal, sys, time
from okadfa.core import gpu_context
# as in a terminal: what a shell starts in the background may have been told to ignore both
signal.signal(signal.SIGINT, signal.default_int_handler); signal.signal(signal.SIGTERM, signal.SIG_DFL)
def stubborn():
    signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.signal(signal.SIGINT, signal.SIG_IGN)
    time.sleep(600)
def worker(): time.sleep(600)
start = mp.get_context("fork").Process
with gpu_context("cpu"):
    ps = [start(target=f) for f in (worker, worker)] + [start(target=stubborn)]*("stubborn" in sys.argv)
    for p in ps: p.start()
    time.sleep(.5)
    print(*[p.pid for p in ps], flush=True)
    if "error" in sys.argv: raise KeyError("in the middle")
    if "end" not in sys.argv: time.sleep(600)
print("after", flush=True)
"""

def alive(pid):
    try: return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError: return False

@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads /proc")
@pytest.mark.parametrize("how,code", [
    ("end", 0),
    ("error", 1),
    (signal.SIGINT, -signal.SIGINT),
    (signal.SIGTERM, 128 + signal.SIGTERM),
    ("stubborn", 128 + signal.SIGTERM)])
def test_no_worker_is_left(how, code):
    p = subprocess.Popen([sys.executable, "-c", SCRIPT, str(how)], text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        pids = [int(x) for x in p.stdout.readline().split()]
        assert len(pids) == 2 + (how == "stubborn")
        if how not in ("end", "error"): p.send_signal(signal.SIGTERM if how == "stubborn" else how)
        out, err = p.communicate(timeout=60)
        assert p.returncode == code, err
        assert not any(map(alive, pids))
        assert ("after" in out) == (how == "end") and ("KeyError" in err) == (how == "error")
    finally:
        if p.poll() is None: p.kill()

def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with gpu_context("cpu"), gpu_context("cpu"): pass
    with pytest.raises(KeyError), gpu_context("cpu"): raise KeyError
    assert signal.getsignal(signal.SIGTERM) == before

def test_a_handler_of_the_user_is_kept():
    before, heard = signal.getsignal(signal.SIGTERM), []
    signal.signal(signal.SIGTERM, lambda *a: heard.append(1))
    try:
        with gpu_context("cpu"): os.kill(os.getpid(), signal.SIGTERM); time.sleep(.05)
        assert heard == [1]
    finally: signal.signal(signal.SIGTERM, before)

def test_processes_from_before_go_on():
    import multiprocessing as mp
    p = mp.get_context("fork").Process(target=time.sleep, args=(60,)); p.start()
    try:
        with gpu_context("cpu"): pass
        assert p.is_alive()
    finally: p.kill(); p.join()
