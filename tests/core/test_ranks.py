"""Invariants on many ranks: conservation, no torn block, nothing lost at the end, nobody held up."""

import os
import re
import resource
import time
from pathlib import Path

import numpy as np
import pytest
from ranks import on_ranks

from hvd_agn import Center, rules

SHAPES = [(7, 13), (1000,), (), (255,), (3, 3, 3)]


def hammer(dtype, exchanges, comm=None):
    """Exchanges of random integers at random times; every delta is counted. Returns what the center has gained."""
    from mpi4py import MPI

    comm = comm or MPI.COMM_WORLD
    rng = np.random.default_rng(comm.rank)
    arrays = [np.full(shape, comm.rank, dtype) for shape in SHAPES]  # the start is rank 0's
    center = Center(arrays, comm=comm)
    pushed = [np.zeros(shape) for shape in SHAPES]
    for _ in range(exchanges):
        k = int(rng.integers(1, 8))
        for array, total in zip(arrays, pushed, strict=True):
            delta = rng.integers(-1, 2, array.shape)
            array += (k * delta).astype(dtype)
            total += delta
        if rng.random() < 0.2:
            time.sleep(rng.random() * 0.005)
        center.exchange(k)
    comm.Barrier()
    final = center.snapshot().values()
    for total, values in zip(pushed, final, strict=True):
        everyones = comm.allreduce(total)
        np.testing.assert_array_equal(values, everyones)
    assert center.version == comm.size * exchanges
    center.pull()
    for array, values in zip(arrays, final, strict=True):
        np.testing.assert_array_equal(array, values)
    center.close()


@pytest.mark.parametrize(("ranks", "exchanges"), [(1, 200), (2, 500), (4, 300), (16, 60)])
@pytest.mark.parametrize("dtype", ["f4", "f8", "f2"])
def test_conservation(ranks, exchanges, dtype):
    on_ranks(ranks, hammer, dtype, exchanges)


def split_and_hammer():
    """Two halves of the world, each with a center of its own."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    half = world.Split(world.rank % 2)
    hammer("f4", 50, half)
    return half.rank


def test_a_communicator_that_is_not_the_world():
    assert sorted(on_ranks(4, split_and_hammer)) == [0, 0, 1, 1]


def look_for_torn_blocks(exchanges):
    """All elements move alike: a block that is not uniform was read or written in parts."""
    theta = np.zeros(64 * 1024, np.float32)
    center = Center([theta], rules.SGD(lr=1.0, momentum=0.5))
    for i in range(exchanges):
        theta += 2
        center.exchange(2)
        blocks = theta.reshape(-1, 256)
        assert (blocks == blocks[:, :1]).all()
        if i % 5 == 0:
            values, slots, _ = center._read()
            for array in (values["array 0"], slots["momentum"]["array 0"]):
                blocks = array.reshape(-1, 256)
                assert (blocks == blocks[:, :1]).all()
    assert len(np.unique(theta)) >= 1


@pytest.mark.parametrize("ranks", [2, 4])
def test_no_block_is_torn(ranks):
    on_ranks(ranks, look_for_torn_blocks, 100)


def one_leaves_early():
    """Rank 1 pushes once and leaves; the others exchange on and see its push."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    theta = np.zeros(300, np.float32)
    center = Center([theta])
    if comm.rank == 1:
        theta += 1000
        center.exchange(1)
        center.close()
        center.close()
        return comm.rank
    for _ in range(50):
        theta += 1
        center.exchange(1)
        time.sleep(0.001)
    deadline = time.monotonic() + 30
    while center.version < 1 + 50 * (comm.size - 1):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    np.testing.assert_array_equal(center.snapshot()["array 0"], 1000 + 50 * (comm.size - 1))
    return comm.rank


def test_a_rank_that_finishes_early_holds_up_nobody():
    assert on_ranks(3, one_leaves_early) == [0, 1, 2]


def wait_at_exit():
    """Share of a core that rank 1 takes while it waits at exit for rank 0, asleep for 3 s."""
    from mpi4py import MPI

    from hvd_agn import shutdown

    Center([np.zeros(4, np.float32)])
    if MPI.COMM_WORLD.rank == 0:
        time.sleep(3)
    cpu, wall = _cpu_seconds(), time.monotonic()
    shutdown.finish_at_exit()
    return (_cpu_seconds() - cpu) / (time.monotonic() - wall + 1)


def _cpu_seconds():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def test_a_rank_that_waits_at_exit_is_idle():
    assert on_ranks(2, wait_at_exit)[1] < 0.2


def close_and_measure(nbytes):
    """Bytes of shared memory in use by the system: with the center, and when both ranks have closed it."""
    from mpi4py import MPI

    def used():
        status = os.statvfs("/dev/shm")
        return (status.f_blocks - status.f_bfree) * status.f_frsize

    comm = MPI.COMM_WORLD
    comm.Barrier()
    before = used()
    center = Center([np.ones(nbytes // 4, np.float32)])
    comm.Barrier()
    during = used() - before
    comm.Barrier()
    center.close()
    comm.Barrier()
    return during, used() - before


def test_closing_gives_the_memory_back():
    nbytes = 64 * 2**20
    during, after = on_ranks(2, close_and_measure, nbytes, env={"HVD_AGN_BLOCK_BYTES": ""})[0]
    if during < nbytes:
        pytest.skip("this MPI keeps its shared windows elsewhere than in /dev/shm")
    assert after < nbytes / 10


def many_centers():
    """Centers made and closed one after another, then several open at once."""
    from mpi4py import MPI

    for i in range(20):
        with Center([np.zeros(10, np.float32)]) as center:
            center.exchange(i + 1)
    arrays = [np.zeros(10, np.float32) for _ in range(3)]
    for i, array in enumerate(arrays):
        center = Center([array], name=f"c{i}")
        array += 10**i
        center.exchange(1)
    MPI.COMM_WORLD.Barrier()
    from hvd_agn import shutdown

    for i, center in enumerate(shutdown.centers):
        np.testing.assert_array_equal(center.snapshot()["array 0"], 2 * 10**i)


def test_many_centers():
    on_ranks(2, many_centers)


def one_after_another(options):
    """Trials in one process: what each has taken goes back when the next begins, of this group's or of all ranks'."""
    from mpi4py import MPI

    from hvd_agn import shutdown

    def taken():
        windows = sum("shm" in line for line in Path("/proc/self/maps").read_text().splitlines())
        return windows, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    world = MPI.COMM_WORLD
    half = world.Split(world.rank % 2)
    counts = []
    for trial in range(15):
        theta = np.zeros(1000)
        with Center([theta], rules.Adam(), half if trial % 3 else world, **options) as center:
            theta += 1
            center.exchange(1)
            assert len(shutdown.finished) <= 1
        if trial in (5, 14):
            world.Barrier()
            counts.append(taken())
    assert all(late <= early + 2 for early, late in zip(*counts, strict=True)), counts


def closed_by_some():
    """A center that one rank still uses stays for all, however many others are made and freed."""
    from mpi4py import MPI

    from hvd_agn import shutdown

    world = MPI.COMM_WORLD
    late = Center([np.zeros(1000)], name="late")
    if world.rank != 1:
        late.close()
    for _ in range(3):
        theta = np.zeros(10)
        with Center([theta]):
            pass
    if world.rank == 1:
        late.arrays_client._arrays[0][:] = 5
        assert late.exchange(1)
        np.testing.assert_array_equal(late.snapshot()["array 0"], 5)
        late.close()
    assert len(shutdown.finished) == 2  # late, and the last of the others
    Center([np.zeros(10)])
    assert shutdown.finished == []


def pages_left():
    """KiB of memory that a center of one block and its spares takes, before and after all ranks have closed it."""
    from mpi4py import MPI

    def resident():
        mappings = re.split(r"\n(?=[0-9a-f]+-)", Path("/proc/self/smaps").read_text())
        return sum(int(re.search(r"Rss: +(\d+)", mapping)[1]) for mapping in mappings if "/dev/shm" in mapping)

    before = resident()
    center = Center([np.ones(50_000)], rules.Adam())
    MPI.COMM_WORLD.Barrier()
    during = resident() - before
    center.close()
    MPI.COMM_WORLD.Barrier()
    return during, resident() - before


def closing():
    one_after_another({})
    one_after_another({"transport": "mailbox"})
    closed_by_some()


def test_closed_centers_are_freed_when_their_ranks_meet_again():
    on_ranks(4, closing)


def test_the_last_to_close_gives_the_spares_back_too():
    during, after = on_ranks(2, pages_left, env={"HVD_AGN_BLOCK_BYTES": ""})[0]
    if during < 1000:
        pytest.skip("this MPI keeps its shared windows elsewhere than in /dev/shm")
    assert after < during / 5
