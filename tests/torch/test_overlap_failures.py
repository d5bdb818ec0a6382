"""AGNOptimizer(overlap=True): what goes wrong in the background is told at the next step."""

import os
import signal
import time

import numpy as np
import pytest
import torch
from mailboxes import state, wait_until
from ranks import on_ranks
from torch import nn
from training_overlap import assert_all, center_of, count, settle, steps

from hvd_agn import _core
from hvd_agn.errors import NonFiniteError, NonFiniteWarning, StallError
from hvd_agn.torch import AGNOptimizer

# ---- updates that are refused


def poison(p, opt):
    """The snapshot of a flight has a NaN."""
    opt.step()
    with torch.no_grad():
        p[7] = float("nan")
    opt.step()
    settle(opt)
    assert opt._worker.client.started


def test_a_refused_flight_warns_at_the_next_step():
    p, opt = count(2)
    steps(opt, 2)
    poison(p, opt)
    with pytest.warns(NonFiniteWarning, match=r"\[rank 0\] AGNOptimizer: the update of 'p' has a NaN"):
        opt.step()
    assert_all(p, 1 + 1)  # the center, and this step
    assert_all(center_of(opt), 1)
    steps(opt, 1)
    opt.flush()
    assert_all(center_of(opt), 2)
    assert opt.stats()["pushes_refused"] == 1


def test_a_refused_flight_raises_at_the_next_step_if_asked_to():
    p, opt = count(2, on_nonfinite="raise")
    steps(opt, 2)
    poison(p, opt)
    with pytest.raises(NonFiniteError, match="left as they are"):
        opt.step()
    assert torch.isnan(p[7])
    opt.pull()
    assert_all(p, 1)
    steps(opt, 2)
    opt.flush()
    assert_all(center_of(opt), 2)


def test_a_warning_that_is_an_error_leaves_the_parameters_at_the_center():
    p, opt = count(2)
    poison(p, opt)
    with pytest.raises(NonFiniteWarning):  # pytest makes all warnings errors here
        opt.step()
    assert_all(p, 0)
    steps(opt, 1)
    opt.flush()
    assert_all(p, 1)
    assert_all(center_of(opt), 1)


# ---- a rank that holds a flight up


def hold_a_flight():
    """Rank 1 stops with a block half written: rank 0's flight cannot end, and its next boundary gives up."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    os.environ["HVD_AGN_STALL_SECONDS"] = "0"
    os.environ["HVD_AGN_STALL_ABORT_SECONDS"] = "1" if comm.rank == 0 else "0"
    parameters = [nn.Parameter(torch.zeros(128)) for _ in range(8)]  # two in a block
    opt = AGNOptimizer(torch.optim.SGD(parameters, lr=1.0), 2, overlap=True)
    pids = comm.allgather(os.getpid())
    for p in parameters:
        p.grad = torch.full_like(p, -1.0 if comm.rank == 0 else -8.0)
    if comm.rank == 1:
        _core.signal_at(_core.Stage.half_written, 1, signal.SIGSTOP)
        opt.step()
        opt.step()
        opt.flush()
    else:
        opt.step()
        wait_for_stop(opt, pids[1])
        for _ in range(2):
            opt.step()  # the first begins a flight, during which local steps go on
        assert not opt._worker.client.ready
        with pytest.raises(StallError, match=r"waits for block 1, locked by rank 1.*given up"):
            opt.step()
        os.kill(pids[1], signal.SIGCONT)
        opt.flush()
    comm.Barrier()
    # Of rank 0's four steps, two were pushed to all blocks but the one that was held up: 2 / 2, and then 2 / 4 where
    # those two had gone, 4 / 4 where they had not.
    for i, value in enumerate(opt.center.snapshot().values()):
        np.testing.assert_array_equal(value, 8 + (1 if i in (2, 3) else 1.5))


def wait_for_stop(opt, pid):
    wait_until(lambda: state(pid) == "T", "rank 1 to stop")
    time.sleep(0.05)


def test_a_flight_that_is_given_up_on():
    on_ranks(2, hold_a_flight)
