"""The emulated hosts themselves: MPI sees several nodes, links are as slow as asked, and nothing outlives them."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from ranks import on_ranks

from hvd_agn import _core, errors
from hvd_agn.tools import launch
from hvd_agn.tools.hosts import EmulatedHosts


def where():
    """Host name, and the host names of this node's ranks as a window in shared memory has them."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    window = MPI.Win.Allocate_shared(8, 8, comm=node)
    memory = [np.frombuffer(window.Shared_query(rank)[0], np.int64) for rank in range(node.size)]
    memory[node.rank][0] = world.rank
    window.Fence()
    world.Barrier()
    window.Fence()
    ranks = [int(values[0]) for values in memory]
    window.Free()
    return socket.gethostname(), ranks


@pytest.mark.parametrize(("ranks", "blocks"), [(4, [[0, 1], [2, 3]]), (3, [[0, 1], [2]])])
def test_each_host_is_a_node_with_shared_memory(hosts, ranks, blocks):
    found = on_ranks(ranks, where, hosts=hosts)
    assert found == [[hosts.names[i], block] for i, block in enumerate(blocks) for _ in block]


def put_while_others_wait(rounds):
    """Every rank puts into its neighbour's window, while another of its threads waits for non-blocking barriers."""
    from mpi4py import MPI

    world, other = MPI.COMM_WORLD, MPI.COMM_WORLD.Dup()
    assert MPI.Query_thread() == MPI.THREAD_MULTIPLE

    def barriers():
        for _ in range(rounds):
            request = other.Ibarrier()
            while not request.Test():
                time.sleep(0.0001)

    window = MPI.Win.Allocate(2**18 * 4, 4, comm=world)
    memory = np.frombuffer(window, np.float32)
    window.Lock_all()
    thread = threading.Thread(target=barriers)
    thread.start()
    target = (world.rank + 1) % world.size
    for i in range(rounds):
        block = np.full(2**18, i + world.rank, np.float32)  # must live until the flush
        window.Put(block, target)
        window.Flush(target)
    thread.join()
    world.Barrier()
    window.Sync()
    assert (memory == rounds - 1 + (world.rank - 1) % world.size).all()
    window.Unlock_all()
    window.Free()


@pytest.mark.parametrize("ranks", [2, 4])
def test_puts_cross_hosts_while_another_thread_is_in_mpi(hosts, rma, ranks):
    on_ranks(ranks, put_while_others_wait, 50, hosts=hosts)


def make_a_window():
    from mpi4py import MPI

    try:
        MPI.Win.Allocate(1024, 1, comm=MPI.COMM_WORLD)
    except MPI.Exception as error:
        return error.Get_error_string()
    return "made"


@pytest.mark.skipif("Open MPI v4" not in _core.mpi_library_version(), reason="other MPIs make windows across hosts")
def test_open_mpi_4_refuses_a_window_across_hosts(hosts):
    assert on_ranks(2, make_a_window, hosts=hosts) == ["MPI_ERR_WIN: invalid window"] * 2


def talk(names, nbytes, pings):
    """Over a plain socket: seconds in which both hosts send each other so much; and seconds for a round trip."""
    from mpi4py import MPI

    rank = MPI.COMM_WORLD.rank
    if rank == 0:
        server = socket.create_server((names[0], 0))
    port = MPI.COMM_WORLD.bcast(server.getsockname()[1] if rank == 0 else None)
    link = server.accept()[0] if rank == 0 else socket.create_connection((names[0], port))
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def receive(count):
        while count:
            count -= len(link.recv(min(count, 2**20)))

    round_trip = []
    for _ in range(pings):
        start = time.monotonic()
        if rank == 0:
            link.sendall(b"x")
        receive(1)
        if rank == 1:
            link.sendall(b"x")
        round_trip.append(time.monotonic() - start)
    start = time.monotonic()
    sender = threading.Thread(target=link.sendall, args=(bytes(nbytes),))
    sender.start()
    receive(nbytes)
    both = time.monotonic() - start
    sender.join()
    return both, min(round_trip)


@pytest.mark.parametrize("slow_hosts", [{"rate": "1gbit"}], indirect=True)
def test_a_link_has_its_rate_in_each_direction(slow_hosts):
    both, _ = on_ranks(2, talk, slow_hosts.names, 100_000_000, 10, hosts=slow_hosts)[0]
    assert 0.78 < both < 1.4  # 100 MB at 1 Gbit/s take 0.8 s; twice that, if both directions shared a link
    assert slow_hosts.dropped() == 0


@pytest.mark.parametrize("slow_hosts", [{"rate": "1gbit", "delay": "2ms"}], indirect=True)
def test_a_link_has_its_delay(slow_hosts):
    both, round_trip = on_ranks(2, talk, slow_hosts.names, 100_000_000, 10, hosts=slow_hosts)[0]
    assert 0.78 < both < 1.4
    assert 0.008 <= round_trip < 0.02  # two links there, two back
    assert slow_hosts.dropped() == 0


def hang(folder):
    """Rank 3 never comes, and every rank leaves a daemon behind."""
    from mpi4py import MPI

    rank = MPI.COMM_WORLD.rank
    daemon = subprocess.Popen(["sleep", "600"], start_new_session=True)
    Path(folder, str(rank)).write_text(f"{os.getpid()} {daemon.pid}")
    if rank == 3:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    MPI.COMM_WORLD.Barrier()


def test_a_hang_is_killed_on_all_hosts_with_every_ranks_stack(hosts, tmp_path):
    with pytest.raises(pytest.fail.Exception) as failure:
        on_ranks(4, hang, str(tmp_path), timeout=8, hosts=hosts)
    assert all(f"stack of rank {rank}" in str(failure.value) for rank in range(4))
    assert "Barrier" in str(failure.value) or "in hang" in str(failure.value)
    assert hosts.pids() == []
    pids = [pid for path in tmp_path.iterdir() for pid in path.read_text().split()]
    assert len(pids) == 8
    for pid in pids:
        assert not Path("/proc", pid).exists() or Path("/proc", pid, "stat").read_text().split(")")[1].split()[0] == "Z"


def test_a_job_leaves_nothing_on_the_hosts(hosts):
    on_ranks(4, where, hosts=hosts)
    deadline = time.monotonic() + 5
    while hosts.pids() and time.monotonic() < deadline:  # daemons end after mpirun
        time.sleep(0.05)
    assert hosts.pids() == []


def namespaces():
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.split()


def test_the_hosts_are_removed_after_an_exception_with_what_runs_there(hosts):
    with pytest.raises(ZeroDivisionError), EmulatedHosts(2) as mine:  # noqa: PT012
        assert set(mine.names) <= set(namespaces())
        process = subprocess.Popen(mine.command(1, ["sleep", "600"]))
        while not mine.pids():
            time.sleep(0.01)
        raise ZeroDivisionError
    assert process.wait(10) == -signal.SIGKILL
    assert not set(mine.names) & set(namespaces())
    assert not Path(mine.agent).parent.exists()
    mine.close()
    assert set(hosts.names) <= set(namespaces())


def test_hosts_of_a_killed_harness_are_removed_by_the_next(hosts):
    code = """
import os, signal, subprocess
from hvd_agn.tools.hosts import EmulatedHosts
with EmulatedHosts(1) as hosts:
    print(hosts.names[0], flush=True)
    subprocess.Popen(hosts.command(0, ["sleep", "600"]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    left = killed.stdout.strip()
    assert left in namespaces(), killed.stderr
    with EmulatedHosts(1):
        assert left not in namespaces()


def test_without_root_the_reason_is_given(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(errors.LaunchError, match="need root"), EmulatedHosts(1):
        pass


def test_without_its_tools_the_reason_names_them(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(errors.LaunchError, match="need ip, tc, "), EmulatedHosts(1):
        pass


def test_the_exit_status_of_a_job_on_hosts_is_that_of_its_ranks(hosts):
    done = launch.run_ranks(2, [sys.executable, "-c", "raise SystemExit(3)"], timeout=60, hosts=hosts)
    assert done.returncode == 3
