"""Exchanges in the background that a stopped rank holds up: finish() waits or gives up, and close() waits."""

import os
import signal
import threading
import time

import numpy as np
import pytest
from mailboxes import state, wait_until
from ranks import on_ranks

from hvd_agn import Center, _core
from hvd_agn.errors import StallError

BLOCKS = 5


def hold_a_flight(folder, how, what):
    """Rank 0's flight cannot end: a rank that it needs is stopped with a block half written. Then it goes on.

    ``how`` they are joined: rank 1 holds a block's lock ("direct"), or hosts the center ("mailbox").
    """
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    os.environ["HVD_AGN_STALL_SECONDS"] = "0"
    os.environ["HVD_AGN_STALL_ABORT_SECONDS"] = "1" if what == "give up" and comm.rank == 0 else "0"
    arrays = [np.zeros(128, np.float32) for _ in range(2 * BLOCKS)]
    center = Center(arrays, transport=how, center_ranks=[0 if how == "direct" else 1], overlap=True)
    client, pids = center.arrays_client, comm.allgather(os.getpid())
    if comm.rank == 1:
        _core.signal_at(_core.Stage.half_written, 3, signal.SIGSTOP)
        comm.Barrier()
        others = 0
        if how == "direct":
            for array in arrays:
                array += 10
            center.exchange(1)
            others = 10
        done = os.path.join(folder, "done")
        wait_until(lambda: os.path.exists(done), "rank 0 to be done")
        own = int(open(done).read())  # noqa: SIM115
        for value in center.snapshot().values():
            np.testing.assert_array_equal(value, own + others)
        return "checked"
    comm.Barrier()
    for array in arrays:
        array += 1
    if how == "direct":
        wait_until(lambda: state(pids[1]) == "T", "rank 1 to stop")
    client.start(1)
    wait_until(lambda: state(pids[1]) == "T", "rank 1 to stop")
    for array in arrays:
        array += 2
    time.sleep(0.1)
    assert client.started
    assert not client.ready
    if what == "close":
        timer = threading.Timer(0.5, os.kill, (pids[1], signal.SIGCONT))
        timer.start()
        center.close()  # waits for the flight
        timer.join()
        own = 1  # close() of a client pushes nothing new
        for array in arrays:
            np.testing.assert_array_equal(array, 3)
    else:
        if what == "give up":
            text = "waits for block 3, locked by rank 1" if how == "direct" else "waits for rank 1 to answer block"
            with pytest.raises(StallError, match=rf"\[rank 0\] hvd_agn: {text}.*given up"):
                client.finish()
            assert not client.started
            for array in arrays:
                array += 4
            assert state(pids[1]) == "T"
        os.kill(pids[1], signal.SIGCONT)
        if what == "wait":
            assert client.finish()
            for array in arrays:
                array += 4
        client.start(1)
        client.finish()
        own = 7
        if how == "mailbox":
            for array in arrays:
                np.testing.assert_array_equal(array, 7)
    with open(os.path.join(folder, "new"), "w") as file:
        file.write(str(own))
    os.rename(os.path.join(folder, "new"), os.path.join(folder, "done"))
    return "checked"


@pytest.mark.parametrize("what", ["wait", "give up", "close"])
@pytest.mark.parametrize("how", ["direct", "mailbox"])
def test_a_flight_that_is_held_up(how, what, tmp_path):
    env = {"HVD_AGN_RING_BLOCKS": "2"}  # fewer than blocks: some are not sent yet
    assert on_ranks(2, hold_a_flight, str(tmp_path), how, what, env=env) == ["checked"] * 2
