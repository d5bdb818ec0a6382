"""Between hosts: what the tests of mailboxes and of overlap check on one machine, and jobs that use both paths."""

import os
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from exchanges import DTYPES, ONE_BLOCK, conserve, interleave_all, move_about, refuse
from mailbox_ends import FAILS_AT_ONCE, block_the_host
from mailboxes import limits, state, stderr_to, wait_until
from overlaps import DOUBLES, overlap_and_count
from ranks import on_ranks
from training_overlap import train_and_end
from wires import check_wires

from hvd_agn import Center, _core
from hvd_agn.errors import LaunchError, MPIError, StallError
from hvd_agn.tools import launch


@pytest.mark.parametrize(
    ("ranks", "exchanges", "variants"),
    [
        (2, 30, [([0], 8, None, False), ([1], 1, None, False), ([0, 1], 2, None, True)]),
        (4, 20, [([0], 8, None, False), ([0, 2], 2, None, False), ("nodes", 8, ONE_BLOCK, False)]),
        (4, 15, [([3, 0], 8, None, True)]),  # more pushes than that, and the center's sums are no float16
    ],
)
def test_nothing_is_lost(hosts, rma, ranks, exchanges, variants):
    """Four ranks: two share memory with a host, two do not."""
    on_ranks(ranks, conserve, exchanges, variants, "auto", hosts=hosts)


@pytest.mark.parametrize("block_bytes", ["", "300032"], ids=["default", "300032"])
def test_blocks_of_several_puts(hosts, rma, block_bytes):
    variants = [([1], 2, [[250_000], [90_001]], False), ([0, 1], 8, [[250_000], [90_001]], True)]
    on_ranks(2, conserve, 10, variants, "auto", hosts=hosts, env={"HVD_AGN_BLOCK_BYTES": block_bytes})


@pytest.mark.parametrize("how", ["asleep", "busy"])
def test_a_host_that_does_nothing_gives_what_the_reference_gives(hosts, rma, how, tmp_path):
    on_ranks(2, interleave_all, how, str(tmp_path), hosts=hosts, timeout=240)


@pytest.mark.parametrize("where", ["in MPI", "holding the GIL"])
def test_a_host_that_is_blocked_answers(hosts, rma, where, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert on_ranks(2, block_the_host, str(tmp_path), where, hosts=hosts) == [None, "exchanged"]


def test_wires(hosts, rma, tmp_path):
    checks = ["sums_are_exact", "small_deltas_arrive_later", "errors_stay_bounded", "another_anchor_or_center"]
    on_ranks(2, check_wires, str(tmp_path), checks, hosts=hosts)


def test_what_is_not_finite_is_refused(hosts, rma, tmp_path):
    on_ranks(2, refuse, str(tmp_path), hosts=hosts)


def test_a_saved_center_goes_on_elsewhere(hosts, rma, tmp_path):
    on_ranks(3, move_about, str(tmp_path), "auto", hosts=hosts)


def test_overlap(hosts, rma):
    variants = [
        ("auto", [0], None, DTYPES),
        ("auto", [0, 2], None, DTYPES),
        ("auto", [3], "int8", DOUBLES),
        ("auto", [0, 3], "bf16", DOUBLES),
    ]
    on_ranks(4, overlap_and_count, 20, variants, hosts=hosts)


@pytest.mark.parametrize("hosted_by", [(1, 0), (0,)], ids=["sharded", "one host"])
def test_torch_with_overlap_and_wires_loses_nothing(hosts, rma, hosted_by):
    on_ranks(2, train_and_end, "auto", hosted_by, hosts=hosts)


def test_a_host_that_fails_serves_the_others_to_the_end(hosts, rma):
    done = launch.run_ranks(3, [sys.executable, "-c", FAILS_AT_ONCE], timeout=60, hosts=hosts)
    assert done.stdout.count("all there: True") == 2, done.stdout + done.stderr
    assert "[rank 0] hvd_agn: this rank ends with ZeroDivisionError. What it pushed stays" in done.stderr


def hold_a_block(folder):
    """Rank 1, beside the host, stops with a block locked: the host serves rank 2 all others, and says who holds it."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    limits(2)
    arrays = [np.zeros(128, "f4") for _ in range(24)]  # two in a block
    center = Center(arrays)
    pids = comm.allgather(os.getpid())
    log = os.path.join(folder, "stderr")
    for array in arrays:
        array += 1
    if comm.rank == 1:
        _core.signal_at(_core.Stage.half_written, 1, signal.SIGSTOP)
        center.exchange(1)
    if comm.rank == 2:
        wait_until(lambda: state(pids[1]) == "T", "rank 1 to stop")
        with pytest.raises(StallError, match=r"\[rank 2\] hvd_agn: waits for rank 0 to answer block 1; .*given up"):
            center.exchange(1)
        os.kill(pids[1], signal.SIGCONT)
        center.exchange(1)
    if comm.rank == 0:
        with stderr_to(log):
            wait_until(lambda: center.version >= 2, "the other ranks")
        told = Path(log).read_text()
        assert "[rank 0] hvd_agn: cannot answer rank 2: block 1 is locked by rank 1, which is stopped" in told
    comm.Barrier()
    for value in center.snapshot().values():
        np.testing.assert_array_equal(value, 2)


def test_a_rank_beside_the_host_that_holds_a_block_is_named(hosts, rma, tmp_path):
    on_ranks(4, hold_a_block, str(tmp_path), hosts=hosts)


def stop_the_host():
    """The host is stopped: puts to it do not end. The worker is told where it waits, gives up, and loses nothing."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    limits(1)
    theta = np.zeros(100_000, np.float32)
    center = Center([theta])
    pids = comm.allgather(os.getpid())
    done = comm.rank == 0
    if comm.rank == 1:
        os.kill(pids[0], signal.SIGSTOP)
        wait_until(lambda: state(pids[0]) == "T", "rank 0 to stop")
        theta += 1
        with pytest.raises(
            StallError, match=r"\[rank 1\] hvd_agn: waits .* rank 0.*given up: HVD_AGN_STALL_ABORT"
        ) as caught:
            center.exchange(1)
        assert "block" in str(caught.value)
        os.kill(pids[0], signal.SIGCONT)
        deadline = time.monotonic() + 30
        while not done and time.monotonic() < deadline:  # it may need more than a second to come back
            try:
                center.exchange(1)
                done = True
            except StallError:
                pass
    comm.Barrier()
    assert done
    np.testing.assert_array_equal(center.snapshot()["array 0"], 1)


def test_a_stopped_host_is_named_and_given_up_on(hosts, rma):
    on_ranks(2, stop_the_host, hosts=hosts)


HOST_STAYS_STOPPED = """
import contextlib, os, signal, sys, time
import numpy
from mpi4py import MPI
os.environ["HVD_AGN_STALL_SECONDS"] = "0.5"
os.environ["HVD_AGN_STALL_ABORT_SECONDS"] = "1" if MPI.COMM_WORLD.rank == 1 else "0"
from hvd_agn import Center
from hvd_agn.errors import StallError
center = Center([numpy.zeros(1000000, numpy.float32)])
if center.rank == 0:
    open(sys.argv[1], "w").write(str(os.getpid()))
pids = MPI.COMM_WORLD.allgather(os.getpid())
if center.rank == 0:
    time.sleep(600)
os.kill(pids[0], signal.SIGSTOP)
if sys.argv[2] == "load":
    with contextlib.suppress(StallError):
        center.exchange(1)
    center.load("nowhere")
center.exchange(1)
"""
# Whoever ends first kills the stopped host, for which a launcher may wait.
THEN_KILL_THE_HOST = '"$@"; echo "rank $PMI_RANK$OMPI_COMM_WORLD_RANK: exit status $?"; kill -9 $(cat "$0")'


@pytest.mark.parametrize("call", ["exchange", "load"])
def test_a_worker_whose_host_stays_stopped_ends(hosts, rma, call, tmp_path):
    """With an error of its own, though MPI_Finalize and the windows would wait for the host without a limit."""
    pid = str(tmp_path / "pid")
    command = ["sh", "-c", THEN_KILL_THE_HOST, pid, sys.executable, "-c", HOST_STAYS_STOPPED, pid, call]
    done = launch.run_ranks(2, command, timeout=60, hosts=hosts)
    assert "rank 1: exit status 1" in done.stdout
    assert "StallError: [rank 1] hvd_agn: waits" in done.stderr
    assert "given up: HVD_AGN_STALL_ABORT_SECONDS=1" in done.stderr
    assert "[rank 1] hvd_agn: this rank ends with StallError" in done.stderr


ONE_DIES = """
import os, signal, time
import numpy
from mpi4py import MPI
from hvd_agn import Center
theta = numpy.zeros(1000, numpy.float32)
center = Center([theta])
MPI.COMM_WORLD.Barrier()
if center.rank == 3:
    os.kill(os.getpid(), signal.SIGKILL)
for _ in range(30):
    theta += 1
    center.exchange(1)
    time.sleep(0.02)
"""
# The launcher is to see no end before there are four.
WAIT_FOR_ALL = """
"$@"; echo "rank $PMI_RANK: exit status $?"
touch "$0.$PMI_RANK"; while [ $(ls "$0".* | wc -l) -lt 4 ]; do sleep 0.1; done
"""


def test_a_dead_rank_on_another_node_is_given_up_on_at_exit(hosts, tmp_path):
    """Three train on, and end by themselves: MPICH crashes in a send to the fourth."""
    if "MPICH" not in _core.mpi_library_version():
        pytest.skip("this MPI ends ranks that talk to a dead one, or cannot cross")
    command = ["sh", "-c", WAIT_FOR_ALL, str(tmp_path / "ended"), sys.executable, "-c", ONE_DIES]
    done = launch.run_ranks(4, command, timeout=60, hosts=hosts, env={"HVD_AGN_STALL_ABORT_SECONDS": "2"})
    for rank, status in enumerate((1, 1, 1, 137)):
        assert f"rank {rank}: exit status {status}\n" in done.stdout, done.stdout + done.stderr
    for rank in range(3):
        said = rf"\[rank {rank}\] hvd_agn: has ended and waits .*; this process ends without MPI_Finalize"
        assert re.search(said, done.stderr), done.stderr


def refuse_to_cross(transport, error):
    with pytest.raises({"MPIError": MPIError, "LaunchError": LaunchError}[error]) as caught:
        Center([np.zeros(10, np.float32)], transport=transport)
    return str(caught.value)


def test_an_mpi_that_cannot_cross_says_which_can(hosts):
    if "Open MPI v4" not in _core.mpi_library_version():
        pytest.skip("this MPI has one-sided communication between hosts")
    for text in on_ranks(2, refuse_to_cross, "auto", "MPIError", hosts=hosts):
        assert "Use Open MPI 5, MPICH 4 or newer, or an Open MPI with UCX" in text


def test_check_looks_between_nodes(hosts):
    done = launch.run_ranks(2, [sys.executable, "-m", "hvd_agn", "check"], timeout=60, hosts=hosts)
    if "Open MPI v4" in _core.mpi_library_version():
        assert re.search(r"PROBLEM +between nodes +\[rank 0\] .*Use Open MPI 5", done.stdout)
    else:
        assert re.search(r"OK +between nodes +one-sided puts work: 2 pushes from 2 nodes", done.stdout)
    assert re.search(r"OK +shared windows +a center of \d+ bytes works, ranks on this node: 1\n", done.stdout)


def test_direct_does_not_cross(hosts):
    for text in on_ranks(2, refuse_to_cross, "direct", "LaunchError", hosts=hosts):
        assert "rank 0, which hosts a part of the center, is on another node, and transport='direct'" in text
