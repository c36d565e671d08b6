"Several processes: their mean, those that fail together, those that outlive nobody"
import os, signal, subprocess, sys, time
import pytest, torch
from okadfa.core import InputError
from okadfa.processes import mean_over_processes, run_processes

def test_a_mean_over_processes_and_over_none():
    x = torch.tensor([1., 5.])
    assert mean_over_processes(x) is x
    for got in run_processes(means, [(0,), (1,)], timeout=100):
        assert torch.equal(got[0], torch.tensor([1., 5.]) + .5) and got[1]

def means(rank):
    "The mean, and whether what it was taken of is still what it was"
    x = torch.tensor([1., 5.]) + rank
    got = mean_over_processes(x)
    return got, torch.equal(x, torch.tensor([1., 5.]) + rank)

def refuses(rank): raise InputError("one line")

def test_what_a_worker_refuses_is_refused():
    with pytest.raises(InputError, match="^one line$"): run_processes(refuses, [(0,)], timeout=100)

def one_fails(rank, how):
    if rank == 1:
        if how == "raise": raise KeyError("the second process")
        if how == "kill": os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)                                  # the other one would go on

@pytest.mark.parametrize("how,message", [("raise", "process 1 failed: KeyError: 'the second process'"),
                                         ("kill", "process 1 ended with code -9")])
def test_a_failure_ends_all_and_is_told(how, message):
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=message): run_processes(one_fails, [(0, how), (1, how)], timeout=100)
    assert time.monotonic() - start < 60

def test_time_limit(tmp_path):
    file = tmp_path/"pid"
    for limit in (12, 60):                                         # a busy machine may be slow to start a process
        with pytest.raises(TimeoutError): run_processes(leave_pid, [(str(file),)], timeout=limit)
        if file.exists() and file.read_text(): break
    with pytest.raises(ProcessLookupError): os.kill(int(file.read_text()), 0)        # it is gone

def test_a_killed_caller_leaves_nobody(tmp_path):
    code = ("import sys; from okadfa.processes import run_processes; from test_processes import leave_pid; "
            "run_processes(leave_pid, [(sys.argv[1],)])")
    env = os.environ | dict(PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
    caller = subprocess.Popen([sys.executable, "-c", code, str(tmp_path/"pid")], env=env)
    def wait_for(what, seconds=60):
        end = time.monotonic() + seconds
        while not what(): assert time.monotonic() < end; time.sleep(.1)
    try: wait_for(lambda: (tmp_path/"pid").exists() and (tmp_path/"pid").read_text())
    finally: caller.kill(); caller.wait()
    def gone():
        try: os.kill(int((tmp_path/"pid").read_text()), 0); return False
        except ProcessLookupError: return True
    wait_for(gone, 20)

def leave_pid(path):
    with open(path, "w") as f: f.write(str(os.getpid()))
    time.sleep(600)

def test_refused_workers():
    with pytest.raises(InputError, match="GPU"): run_processes(one_fails, [(0, "")]*99, device="cuda")
    local = lambda: None
    local.__module__ = "__main__"
    with pytest.raises(InputError, match="module"): run_processes(local, [()])
