"""Mailboxes whose other end is stopped, idle, forked, or gone; on one machine."""

import gc
import os
import re
import resource
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from mailbox_ends import FAILS_AT_ONCE, block_the_host
from mailboxes import at_a_worker, limits, meet, same, state, stderr_to, wait_until
from ranks import on_ranks

from hvd_agn import Center, _core
from hvd_agn.errors import StallError, UsageError
from hvd_agn.tools import launch

# ---- deadlines

BLOCKS = 12
WARNING = (
    r"\[rank {}\] hvd_agn: waits for rank {} to answer block \d+; that rank is stopped or starved \(\d+ s so far\)"
)


def stop_the_host(folder, wire, where):
    """The host is stopped, between requests or with a block half written; the worker warns, gives up, and goes on."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    limits(1)
    dtype, size = ("f8", 64) if wire else ("f4", 128)  # two arrays in a block
    arrays = [np.zeros(size, dtype) for _ in range(2 * BLOCKS)]
    center = Center(arrays, transport="mailbox", wire_dtype=wire)
    pids = comm.allgather(os.getpid())
    if comm.rank == 0:
        if where == "in a block":
            _core.signal_at(_core.Stage.half_written, 3, signal.SIGSTOP)
        comm.Barrier()
        return None
    comm.Barrier()
    if where == "between requests":
        os.kill(pids[0], signal.SIGSTOP)
        wait_until(lambda: state(pids[0]) == "T", "rank 0 to stop")
    for array in arrays:
        array += np.linspace(1, 1000, array.size).round()
    log = os.path.join(folder, "stderr")
    with stderr_to(log), pytest.raises(StallError, match=WARNING.format(1, 0) + "; given up: HVD_AGN_STALL_ABORT_.*=1"):
        center.exchange(1)
    told = Path(log).read_text()
    warned = [line for line in told.splitlines() if "waits for rank 0 to answer block" in line]
    assert len(warned) in (1, 2, 3), told  # after 0.3, 0.6, 0.9 s, less those that a starved worker comes late for
    assert state(pids[0]) == "T"
    assert center.arrays_client.owes == bool(wire)
    for array in arrays:
        array += 2
    with pytest.raises(StallError):  # also when the ring is full of what was given up on
        center.exchange(1)
    os.kill(pids[0], signal.SIGCONT)
    for array in arrays:
        array += 4
    center.exchange(1)
    center.exchange(1, exact=True)
    expected = np.linspace(1, 1000, size).round() + 6
    for value in center.snapshot().values():
        np.testing.assert_array_equal(value, expected)
    for _ in range(8 if wire else 0):
        center.exchange(1)
    same(arrays, [expected] * len(arrays))
    return "nothing lost, nothing twice"


@pytest.mark.parametrize(
    ("wire", "where", "ring"),
    [
        (None, "in a block", 8),
        (None, "between requests", 2),
        ("int8", "in a block", 1),
        ("bf16", "between requests", 8),
    ],
)
def test_a_stopped_host_is_named_and_given_up_on(wire, where, ring, tmp_path):
    env = {"HVD_AGN_RING_BLOCKS": str(ring)}
    results = on_ranks(2, stop_the_host, str(tmp_path), wire, where, env=env)
    assert results == [None, "nothing lost, nothing twice"]


def stop_a_worker(folder, hosts):
    """Rank 2 is stopped in the middle of its exchanges. Ranks that need it name it; others do not notice."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    limits(1)
    arrays = [np.zeros(200, "f4") for _ in range(20)]
    center = Center(arrays, transport="mailbox", center_ranks=hosts)
    pids = comm.allgather(os.getpid())
    pushed = 0
    end, stopped = os.path.join(folder, "end"), os.path.join(folder, "stopped")

    def push():
        nonlocal pushed
        for array in arrays:
            array += 1
        pushed += 1
        return center.exchange(1)

    log = os.path.join(folder, f"stderr.{comm.rank}")
    with stderr_to(log):
        while comm.rank == 2 and not os.path.exists(end):
            push()
        if comm.rank == 0:
            wait_until(lambda: os.path.exists(stopped), "rank 2 to be stopped")
            for _ in range(20):
                push()  # with hosts=[0, 2] ends when rank 2 goes on
        if comm.rank == 1:
            for _ in range(20):
                push()
            os.kill(pids[2], signal.SIGSTOP)
            wait_until(lambda: state(pids[2]) == "T", "rank 2 to stop")
            open(stopped, "w").close()
            if 2 in hosts:
                with pytest.raises(StallError, match=WARNING.format(1, 2)):
                    push()
            else:
                for _ in range(20):
                    push()
            time.sleep(0.5)
            os.kill(pids[2], signal.SIGCONT)
            push()
            open(end, "w").close()
    comm.Barrier()
    for value in center.snapshot().values():
        np.testing.assert_array_equal(value, comm.allreduce(pushed))
    return Path(log).read_text()


@pytest.mark.parametrize("hosts", [[0], [0, 2]])
def test_a_stopped_worker_holds_up_those_that_need_it_and_no_others(hosts, tmp_path):
    rank0, rank1, _ = on_ranks(3, stop_a_worker, str(tmp_path), hosts)
    if hosts == [0]:
        assert "rank 2" not in rank0 + rank1
    else:
        assert "[rank 0] hvd_agn: waits for rank 2 to answer block" in rank0
        assert "[rank 1] hvd_agn: waits for rank 2 to answer block" in rank1


# ---- threads, and ends


def mailbox_threads():
    return [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")].count("hvd_agn mailbox")


def idle_and_end_early(folder, hosts):
    """Threads that there are; a core's share that an idle rank takes; hosts that close at once and serve on."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    counts = []
    for transport in ("auto", "direct"):
        with Center([np.zeros(9, "f4")], transport=transport):
            counts.append(mailbox_threads())
    alone = Center([np.zeros(9, "f4")], comm=MPI.COMM_SELF, transport="mailbox")
    counts.append(mailbox_threads())
    assert counts == [0, 0, 0]
    alone.close()

    theta = np.zeros(5000, "f4")
    center = Center([theta], transport="mailbox", center_ranks=hosts)
    assert mailbox_threads() == 1
    for _ in range(5):
        theta += 1
        center.exchange(1)
    flag = os.path.join(folder, "measured")
    if comm.rank == hosts[0]:
        usage, wall = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
        time.sleep(3)
        now, wall = resource.getrusage(resource.RUSAGE_SELF), time.monotonic() - wall
        open(flag, "w").close()
        idle = (now.ru_utime + now.ru_stime - usage.ru_utime - usage.ru_stime) / wall
    else:
        wait_until(lambda: os.path.exists(flag), "rank 0 to measure")
        idle = None
    if comm.rank in hosts:
        center.close()
        return idle
    for _ in range(50):
        theta += 1
        center.exchange(1)
        time.sleep(0.001)
    others = comm.size - len(hosts)
    expected = 5 * comm.size + 50 * others
    wait_until(lambda: center.version == expected, "the others")
    np.testing.assert_array_equal(center.snapshot()["array 0"], expected)
    return None


@pytest.mark.parametrize("hosts", [[0], [0, 1]])
def test_hosts_that_idle_or_end_early(hosts, tmp_path, record_property):
    """Those that idle take little; those that end early serve on, and end with the others, in good order."""
    idle = on_ranks(4, idle_and_end_early, str(tmp_path), hosts)[0]
    record_property("share of a core of an idle host", idle)
    print(f"an idle host takes {100 * idle:.2f} % of a core")
    assert idle < 0.1


@pytest.mark.parametrize("where", ["in MPI", "holding the GIL"])
def test_a_host_that_is_blocked_answers(where, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert on_ranks(2, block_the_host, str(tmp_path), where) == [None, "exchanged"]


def exchange_side_by_side(folder):
    """No worker stops until all have had their exchanges."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    center = Center([theta := np.zeros(5000, "f4")], transport="mailbox")
    meet(comm)
    exchanges = 0
    while comm.rank > 0 and len(list(Path(folder).iterdir())) < comm.size - 1:
        theta += 1
        center.exchange(1)
        exchanges += 1
        if exchanges == 100:
            Path(folder, str(comm.rank)).touch()
    meet(comm)
    assert center.version == comm.allreduce(exchanges)


def test_no_worker_starves(tmp_path):
    on_ranks(4, exchange_side_by_side, str(tmp_path))


def fork_a_child(host):
    """A child has neither its parent's thread nor its connections."""
    theta = np.zeros(9, "f4")
    center = host.center([theta])
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            center.exchange(1)
        except UsageError as error:
            code = 0 if "[rank 1] the center was created in another process" in str(error) else 2
            # What the interpreter does at its end: the core lets go of a thread that is not there.
            host.centers.clear()
            center.arrays_client._native = center._native = None
            gc.collect()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    theta += 1
    center.exchange(1)
    assert center.version == 1


def come_and_go(host):
    """A host remembers for a client with a wire what it has; no more of that than there are clients at once."""

    def memory():
        return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) << 10

    pid = int((host.folder / "pid").read_text())
    values = np.zeros(1 << 20, "f4")
    center = host.center([values.copy()], wire_dtype="int8")
    before = memory()
    for _ in range(10):
        theta = values.copy()
        client = center.client([theta])
        client.exchange(1)
        client.close()
        client.close()
        with pytest.raises(UsageError, match=r"used after close"):
            client.exchange(1)
    assert memory() - before < 3 * values.nbytes
    assert center.exchange(1)
    assert center.version == 11


def threads_and_clients(folder):
    from mpi4py import MPI

    if MPI.COMM_WORLD.rank == 0:
        (Path(folder) / "pid").write_text(str(os.getpid()))
    MPI.COMM_WORLD.Barrier()
    return at_a_worker(folder, lambda host: (fork_a_child(host), come_and_go(host)) and "done")


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_forked_children_and_clients_that_leave(tmp_path):
    assert on_ranks(2, threads_and_clients, str(tmp_path)) == [None, "done"]


def test_a_host_that_fails_serves_the_others_to_the_end():
    done = launch.run_ranks(3, [sys.executable, "-c", FAILS_AT_ONCE], timeout=60)
    assert done.stdout.count("all there: True") == 2, done.stdout + done.stderr
    assert "[rank 0] hvd_agn: this rank ends with ZeroDivisionError. What it pushed stays" in done.stderr
    assert done.returncode != 0
