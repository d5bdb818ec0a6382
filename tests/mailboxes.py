"""For tests of the mailbox on one machine: a worker that drives centers whose host does nothing but be there."""

import contextlib
import os
import pickle
import time
from pathlib import Path

import numpy as np

from hvd_agn import Center


def wait_until(condition, what):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, f"waited 30 s for {what}"
        time.sleep(0.005)


def state(pid):
    """Of a process: R, S, T, Z ..., or X if there is none."""
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


@contextlib.contextmanager
def stderr_to(path):
    """Also what the native core writes."""
    with open(path, "w") as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def limits(rank):
    """Only this rank gives up; the others may wait for it however long it takes."""
    from mpi4py import MPI

    os.environ["HVD_AGN_STALL_SECONDS"] = "0.3"
    os.environ["HVD_AGN_STALL_ABORT_SECONDS"] = "1" if MPI.COMM_WORLD.rank == rank else "0"


class Host:
    """Rank 1's hold on rank 0, through files: rank 0's main thread is not in MPI while it has nothing to do."""

    def __init__(self, folder, **defaults):
        self.folder, self.calls, self.centers = Path(folder), 0, []
        self.defaults = {"transport": "mailbox", **defaults}

    def _post(self, *call):
        path = self.folder / f"call.{self.calls}"
        path.with_suffix(".new").write_bytes(pickle.dumps(call))
        path.with_suffix(".new").rename(path)
        self.calls += 1

    def center(self, arrays, rule=None, **options):
        """Made by both ranks, of copies of these arrays at rank 0."""
        options = {**self.defaults, **options}
        self._post("center", arrays, rule, options)
        self.centers.append(Center(arrays, rule, **options))
        return self.centers[-1]

    def load(self, center, path):
        self._post("load", self.centers.index(center), path)
        center.load(path)

    def save(self, center, path):
        self._post("save", self.centers.index(center), path)
        done = self.folder / f"done.{self.calls - 1}"
        wait_until(done.exists, "rank 0 to save")

    def stop(self):
        self._post("stop")

    def serve(self, how):
        """Rank 0, until rank 1 has done its work: asleep, or busy in Python all the time."""
        while True:
            path = self.folder / f"call.{self.calls}"
            while not path.exists():
                if how == "asleep":
                    time.sleep(0.02)
                    continue
                # No call here may let go of the GIL: a thread that waits for it asks for it only after 5 ms without
                # that, and one that lets go for moments, again and again, keeps it for ever.
                end = time.monotonic() + 0.02
                while time.monotonic() < end:
                    pass
            what, *rest = pickle.loads(path.read_bytes())
            if what == "stop":
                return
            if what == "center":
                arrays, rule, options = rest
                self.centers.append(Center(arrays, rule, **options))
            else:
                getattr(self.centers[rest[0]], what)(rest[1])
            (self.folder / f"done.{self.calls}").touch()
            self.calls += 1


def at_a_worker(folder, drive, *args, how="asleep", **defaults):
    """On two ranks: rank 1 calls ``drive(host, *args)``, rank 0 hosts."""
    from mpi4py import MPI

    host = Host(folder, **defaults)
    if MPI.COMM_WORLD.rank == 0:
        return host.serve(how)
    result = drive(host, *args)
    host.stop()
    return result


def same(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, e)


def meet(comm):
    """A barrier that leaves the cores to those who host."""
    arrived = comm.Ibarrier()
    while not arrived.Test():
        time.sleep(0.0002)


def add_integers(center, arrays, exchanges, rng):
    """Every rank pushes random integers at random times, and pulls now and then; the center is their sum, exactly."""
    comm = center._mpi_comm
    pushed = [np.zeros(a.shape) for a in arrays]
    for _ in range(exchanges):
        k = int(rng.integers(1, 8))
        for array, total in zip(arrays, pushed, strict=True):
            delta = rng.integers(-1, 2, array.shape)
            array += (k * delta).astype(array.dtype)
            total += delta
        if rng.random() < 0.2:
            time.sleep(rng.random() * 0.002)
        center.exchange(k)
        if rng.random() < 0.1:
            center.pull()
    meet(comm)
    everyones = [comm.allreduce(total) for total in pushed]
    same(center.snapshot().values(), everyones)
    center.pull()
    same(arrays, everyones)
