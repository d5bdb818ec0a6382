"""Ranks that are killed or stopped in the middle of a pass: blocks stay whole, locks are taken over, waits end."""

import gc
import os
import signal
import time
import traceback

import numpy as np
import pytest
from mailboxes import meet, state, wait_until
from ranks import on_ranks

from hvd_agn import Center, _core, rules
from hvd_agn.errors import StallError, UsageError

BLOCK = 256  # float32 elements in a block of 1024 bytes
BLOCKS = 3
STAGES = ["half_written", "written", "committed"]


def half_the_momentum(center, delta, slots, t):
    """As SGD(lr=1, momentum=0.5)."""
    slots["momentum"] *= 0.5
    slots["momentum"] += delta
    center += slots["momentum"]


RULES = {
    "add": rules.Add(),
    "momentum": rules.SGD(lr=1.0, momentum=0.5),
    "function": rules.Custom(half_the_momentum, "momentum"),
}


def arrays_of(blocks):
    """Two in each block, so that a block can be half written."""
    return [np.zeros(BLOCK // 2, np.float32) for _ in range(2 * blocks)]


def add_one(arrays):
    for array in arrays:
        array += 1


def in_blocks(arrays):
    return np.concatenate([a.ravel() for a in arrays]).reshape(-1, BLOCK)


def die_in_the_pass(rule, stage, block):
    """Rank 1 adds 1 to all and is killed over a block; rank 0 looks, and exchanges over it."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    arrays = arrays_of(BLOCKS)
    center = Center(arrays, RULES[rule])
    pids = comm.allgather(os.getpid())
    add_one(arrays)
    first = BLOCKS // 2  # of rank 1 of 2
    if comm.rank == 1:
        _core.signal_at(getattr(_core.Stage, stage), (first + block) % BLOCKS, signal.SIGKILL)
        center.exchange(1)
        raise AssertionError("still alive")
    wait_until(lambda: state(pids[1]) in "XZ", "the end of rank 1")
    values = np.zeros((BLOCKS, BLOCK))
    for i in range(block + (stage == "committed")):  # the blocks that it had committed
        values[(first + i) % BLOCKS] = 1
    np.testing.assert_array_equal(in_blocks(center.snapshot().values()), values)
    assert center._native.recoveries == 1
    center.exchange(1)
    second = np.where(values == 1, 1.5, 1) if rule != "add" else 1  # the momentum of the dead lives on
    np.testing.assert_array_equal(in_blocks(arrays), values + second)
    np.testing.assert_array_equal(in_blocks(center.snapshot().values()), values + second)
    return "checked"


@pytest.mark.parametrize("block", [0, 1, BLOCKS - 1])
@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_rank_leaves_blocks_whole(stage, block):
    for rule in ("momentum", "function") if block == 1 else ("add",):
        assert on_ranks(2, die_in_the_pass, rule, stage, block, expect_death=True) == ["checked", None]


def die_at_any_moment(seed):
    """All push 1 for ever; rank 0 kills the last rank, whatever it is doing, and checks that every push counts 1."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    arrays = arrays_of(400)
    center = Center(arrays)
    pids = comm.allgather(os.getpid())
    own = 0
    last = comm.rank == comm.size - 1
    while last or own < 100:
        if comm.rank == 0 and own == 30:
            time.sleep(np.random.default_rng(seed).random() * 0.01)
            os.kill(pids[-1], signal.SIGKILL)
        add_one(arrays)
        center.exchange(1)
        own += 1
        blocks = in_blocks(arrays)
        assert (blocks == blocks[:, :1]).all()
    if comm.rank > 0:
        return None
    wait_until(lambda: state(pids[-1]) in "XZ", "the end of the last rank")
    wait_until(lambda: center.version >= 100 * (comm.size - 1), "the others")
    time.sleep(0.2)
    blocks = in_blocks(center.snapshot().values())
    assert (blocks == blocks[:, :1]).all()
    assert blocks.min() == center.version
    assert blocks.max() - blocks.min() <= 1  # the dead had one exchange unfinished
    return center._native.recoveries


def test_ranks_killed_at_any_moment():
    recovered = [on_ranks(3, die_at_any_moment, seed, expect_death=True)[0] for seed in range(5)]
    assert all(count in (0, 1) for count in recovered)


def stop_in_the_pass():
    """Rank 1 is stopped over block 1; rank 0 names it and gives up; rank 1 goes on; nothing is lost."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    arrays = arrays_of(BLOCKS)
    center = Center(arrays)
    pids = comm.allgather(os.getpid())
    add_one(arrays)
    if comm.rank == 1:
        _core.signal_at(_core.Stage.half_written, 2, signal.SIGSTOP)
        center.exchange(1)
    else:
        wait_until(lambda: state(pids[1]) == "T", "rank 1 to stop")
        with pytest.raises(
            StallError, match=r"\[rank 0\] hvd_agn: waits for block 2, locked by rank 1; .*given up: HVD"
        ):
            center.exchange(1)
        os.kill(pids[1], signal.SIGCONT)
        center.exchange(1)  # what was not pushed then is now
    comm.Barrier()
    for values in center.snapshot().values():
        np.testing.assert_array_equal(values, 2)


def test_a_stopped_rank_is_named_and_given_up_on():
    env = {"HVD_AGN_STALL_SECONDS": "0.5", "HVD_AGN_STALL_ABORT_SECONDS": "2.5"}
    on_ranks(2, stop_in_the_pass, env=env)


def come_late():
    """Rank 1 creates no center; rank 0 says so and gives up."""
    from mpi4py import MPI

    if MPI.COMM_WORLD.rank == 1:
        time.sleep(3)
        return None
    with pytest.raises(StallError, match=r"waits for every rank to create its center.*given up"):
        Center([np.zeros(3, np.float32)])
    return "gave up"


def test_a_rank_that_never_comes():
    env = {"HVD_AGN_STALL_SECONDS": "0.5", "HVD_AGN_STALL_ABORT_SECONDS": "1.5"}
    assert on_ranks(2, come_late, env=env, expect_death=True) == ["gave up", None]


def load_alone(path):
    """Rank 1 does not come to load; rank 0 gives up, is told at once the second time, and ends."""
    from mpi4py import MPI

    meet(MPI.COMM_WORLD)  # from here the limits run
    center = Center([np.zeros(3, np.float32)])
    if MPI.COMM_WORLD.rank == 1:
        wait_until(lambda: os.path.exists(path), "rank 0 to give up")
        return None
    with pytest.raises(StallError, match=r"waits for all ranks to call Center.load .*given up"):
        center.load("center.safetensors")
    with pytest.raises(StallError, match=r"\[rank 0\] hvd_agn: waits for all ranks to call .*gave up an earlier wait"):
        center.load("center.safetensors")
    theta = center.arrays_client._arrays[0]
    theta += 1
    assert center.exchange(1)  # which needs nobody
    open(path, "w").close()
    return float(theta[0])


def test_a_load_that_a_rank_does_not_join(tmp_path):
    env = {"HVD_AGN_STALL_SECONDS": "0.5", "HVD_AGN_STALL_ABORT_SECONDS": "4"}
    assert on_ranks(2, load_alone, str(tmp_path / "gave up"), env=env, expect_death=True) == [1.0, None]


def in_a_child(call):
    """Run ``call`` in a forked child; its exit status: 0 if nothing was raised."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)  # a child that hangs is killed
        code = 1
        try:
            call()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_forked_child_leaves_the_background_to_its_parent():
    """The child has no such thread: it must not wait for it, not even at its end."""
    center = Center(arrays := arrays_of(4000), overlap=True)
    client = center.arrays_client

    def finish_and_drop():
        with pytest.raises(UsageError, match="forked"):
            client.finish()
        client._native.close()
        client._native = None
        gc.collect()

    for _ in range(5):
        add_one(arrays)
        client.start(1)
        assert in_a_child(finish_and_drop) == 0
        assert client.finish()
    np.testing.assert_array_equal(in_blocks(center.snapshot().values()), 5)


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_forked_child_is_refused():
    """It would share its parent's spare block, and overwrite what the parent has committed."""
    center = Center(arrays := arrays_of(1))

    def use_the_center():
        add_one(arrays)
        calls = (
            lambda: center.exchange(1),
            lambda: center.client(arrays_of(1)),
            lambda: center.load("center.safetensors"),
            center.pull,
            center.snapshot,
            center.stats,
        )
        for call in calls:
            with pytest.raises(UsageError, match="forked"):
                call()

    assert in_a_child(use_the_center) == 0
    assert center.version == 0
