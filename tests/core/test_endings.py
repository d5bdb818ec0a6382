"""How a process may end, and what becomes of what it has not pushed."""

import sys
from pathlib import Path

from hvd_agn.tools import launch

# A worker on one array. Rank r adds 10^r to it, so that the center's digits say who has pushed.
WORKER = """
import atexit, os, signal, sys, threading, time
import numpy as np
from mpi4py import MPI
from hvd_agn.alike import Facts
from hvd_agn.worker import Settings, Worker

class Arrays:
    group_of, groups = [0], 1
    def __init__(self):
        self.values = np.zeros(4)
    def ids(self):
        return {id(self.values)}
    def facts(self, optimizer):
        return Facts()
    def tensors(self):
        return {"p": self.values}
    def read(self, client):
        pass
    def write_back(self):
        pass

class Tested(Worker):
    def flush(self):
        before_flush()
        super().flush()

def before_flush():
    pass

comm = MPI.COMM_WORLD

def make(**options):
    worker = Tested(Settings(communication_period=100, **options), None, Arrays, lambda: [])
    worker.begin_step()
    worker.arrays.values += 10.0**comm.rank
    worker.count()
    comm.Barrier()
    return worker

def digits(worker, expected):
    deadline = time.monotonic() + 30
    while (found := worker.center.snapshot()["p"][0]) != expected and time.monotonic() < deadline:
        time.sleep(0.05)
    return int(found)
"""


def run(ranks, script, tmp_path, **options):
    path = Path(tmp_path) / "script.py"
    path.write_text(WORKER + script)
    return launch.run_ranks(ranks, [sys.executable, str(path)], timeout=90, **options)


ENDS = """
push = {"push_on_error": True} if comm.rank in (8, 9) else {}
worker = make(**push)
if comm.rank == 0:
    print("pushed:", digits(worker, 1111100000), flush=True)
    worker.center.end(failed=True)
    sys.exit()
if comm.rank < 5:  # drop it
    if comm.rank == 1:
        raise RuntimeError("diverged")
    if comm.rank == 2:
        raise KeyboardInterrupt
    if comm.rank == 3:
        sys.exit(3)
    try:
        with worker.center:
            raise RuntimeError
    except RuntimeError:
        sys.exit()
time.sleep(1)  # so that the others would have pushed before
if comm.rank == 5:
    sys.exit(0)
if comm.rank == 6:
    try:
        raise RuntimeError
    except RuntimeError:
        pass
if comm.rank == 7:
    try:
        with worker.center:
            sys.exit()
    except SystemExit:
        pass
if comm.rank == 8:
    sys.exit("with push_on_error")
if comm.rank == 9:
    raise RuntimeError("with push_on_error")
"""


def test_a_rank_that_ends_with_an_error_does_not_push(tmp_path):
    done = run(10, ENDS, tmp_path)
    assert "pushed: 1111100000" in done.stdout, done.stdout + done.stderr
    for rank, what in {1: "RuntimeError", 2: "KeyboardInterrupt", 3: "status 3", 8: "status 'with push_on"}.items():
        assert f"[rank {rank}] hvd_agn: this rank ends with {what}" in done.stderr
    for rank in (0, 4, 5, 6, 7):
        assert f"[rank {rank}] hvd_agn: this rank ends with" not in done.stderr
    assert done.returncode != 0


SIGNALS = """
def terminate():
    os.kill(os.getpid(), signal.SIGTERM)

if comm.rank == 1:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    atexit.register(terminate)  # called last
worker = make()
if comm.rank == 1:
    before_flush = terminate
    threading.Timer(0.5, terminate).start()
    terminate()
    time.sleep(60)
print("pushed:", digits(worker, 10), flush=True)
time.sleep(1.5)
"""


WAITS = """
if comm.rank == 1:
    os.environ["HVD_AGN_STALL_ABORT_SECONDS"] = "1"
worker = make(transport="mailbox")
time.sleep(20 if comm.rank == 0 else 0)
"""


def test_a_rank_without_a_shard_gives_up_its_wait_at_exit(tmp_path):
    done = run(2, WAITS, tmp_path)
    said = "[rank 1] hvd_agn: has ended and waits for the other ranks to end (1 s so far); given up"
    assert said in done.stderr
    assert "this process ends without MPI_Finalize" in done.stderr
    assert done.returncode != 0


LAST_WORDS = """
def last_words(when):
    try:
        print(when, worker.center.snapshot()["p"][0], flush=True)
    except Exception as error:
        print(when, error, flush=True)

atexit.register(last_words, "before:")
worker = make()
atexit.register(last_words, "after:")
"""


def test_functions_called_at_exit_find_the_center_or_are_told_why_not(tmp_path):
    done = run(1, LAST_WORDS, tmp_path)
    lines = done.stdout.splitlines()
    assert lines[0] == "after: 0.0"
    assert lines[1].startswith("before: [rank 0] AGNOptimizer: used after close(). The end of the program, or MPI_Fin")
    assert "Register a function that uses one with atexit after that one was made" in lines[1]


def test_more_signals_do_not_cut_the_end_short(tmp_path):
    done = run(2, SIGNALS, tmp_path)
    assert "pushed: 10\n" in done.stdout, done.stdout + done.stderr
    assert "[rank 1] hvd_agn: SIGTERM: SystemExit, while this rank is ending already" in done.stderr
    assert done.returncode == 0, done.stderr
