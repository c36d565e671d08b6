"""A process that is forked from this one: what takes a new one seconds, the imports, is there already.

For tests of what a command or a worker does, is killed in, or shares with another. That both can be started from
nothing is shown by tests that do start them: tests/test_processes.py, and those of the command line without network."""
import multiprocessing, os, sys, tempfile
import pytest, torch
from okadfa import processes
from okadfa.run.cli import main

class Forked(multiprocessing.get_context("fork").Process):
    "Calls a function; what it prints goes to files. Of `subprocess.Popen` it has what the tests use"
    def __init__(self, call, env=()):
        self.said, self.env = [tempfile.TemporaryFile("w+") for _ in range(2)], dict(env)
        super().__init__(target=call)
        self.start()

    def run(self):
        for fd, file in enumerate(self.said, 1): os.dup2(file.fileno(), fd)
        sys.stdout, sys.stderr = (open(fd, "w", closefd=False, buffering=1) for fd in (1, 2))
        os.environ.update(self.env)
        torch.set_num_threads(1)     # a pool of threads does not survive a fork
        super().run()

    def poll(self): return self.exitcode

    def wait(self, timeout=None):
        self.join(timeout)
        assert self.exitcode is not None, f"not done after {timeout} s"
        return self.exitcode

    returncode = property(lambda self: self.exitcode)

    def send_signal(self, sig): os.kill(self.pid, sig)

    def communicate(self, timeout=None):
        "What it wrote to stdout and stderr, when it has ended"
        self.wait(timeout)
        for file in self.said: file.seek(0)
        return [file.read() for file in self.said]

def command(args, env=()) -> Forked:
    "`okadfa` with these arguments"
    return Forked(lambda: main([str(a) for a in args]), env)

def _start(folder, n, device, timeout, threads, started):
    "As `processes._start`, by forks"
    for rank in range(n):
        words = [str(x) for x in (folder, rank, n, device, timeout, os.getpid())]
        started.append(Forked(lambda words=words: processes._process(*words), dict(GLOO_SOCKET_IFNAME="lo")))

@pytest.fixture
def forked_workers(monkeypatch):
    "`run_processes` forks its workers"
    monkeypatch.setattr(processes, "_start", _start)
