"""Exchanges in the background: nothing lost, nothing counted twice, whatever is done to the arrays meanwhile."""

import os
import signal
import threading
import time

import numpy as np
import pytest
from mailboxes import at_a_worker, same, state, wait_until
from ranks import on_ranks
from reference import FEW_RULES, ReferenceCenter, ReferenceClient, wide

from hvd_agn import Center, _core
from hvd_agn.errors import NonFiniteError, NonFiniteWarning, StallError, UsageError

SHAPES = [(7, 13), (1000,), (), (0,), (255,), (3, 3, 3), (300,)]
DTYPES = ["f4", "f8", "f2", "f4", "f8", "f2", "f4"]


def land(client):
    wait_until(lambda: client.ready, "the exchange in the background")


# ---- what start() and finish() do


@pytest.mark.parametrize("dtype", ["f4", "f8", "f2"])
def test_what_the_center_had_is_added_to_what_was_done_meanwhile(dtype, kernels):
    theta, other = np.zeros(700, dtype), np.zeros(700, dtype)
    center = Center([theta], overlap=True)
    client, rival = center.arrays_client, center.client([other])
    other += 10
    rival.exchange(1)
    theta += 6
    assert not client.started
    assert not client.ready
    client.start(2)
    assert client.started
    theta += 7
    land(client)
    np.testing.assert_array_equal(theta, 13)  # until finish(), the arrays are the worker's own
    np.testing.assert_array_equal(center.snapshot()["array 0"], 13)
    other += 20
    rival.exchange(1)  # comes after the answer
    assert client.finish()
    assert not client.started
    np.testing.assert_array_equal(theta, 13 + (13 - 6))
    anchor = np.zeros(700, dtype)
    client.read_anchor(0, anchor)
    np.testing.assert_array_equal(anchor, 13)
    client.exchange(1)  # of the 7
    np.testing.assert_array_equal(center.snapshot()["array 0"], 13 + 20 + 7)
    np.testing.assert_array_equal(theta, 40)
    assert client.stats()["exchanges"] == 2
    assert center.version == 4


class OverlapClient(ReferenceClient):
    """The reference, with an exchange of a snapshot."""

    def start(self, steps):
        kept = [a.copy() for a in self.arrays]
        self.exchange(steps)
        self.taken, self.arrays[:] = self.arrays[:], kept
        self.snapshot = [a.copy() for a in kept]

    def finish(self):
        for theta, c, s in zip(self.arrays, self.taken, self.snapshot, strict=True):
            theta[...] = (wide(theta) + (wide(c) - wide(s))).astype(theta.dtype)


def random_schedule(make, rule, dtypes, seed):
    """Steps, starts, finishes and exchanges in any order; each start lands before the next, so that all is known."""
    rng = np.random.default_rng(seed)
    initial = [rng.standard_normal(s).astype(t) for s, t in zip(SHAPES, dtypes, strict=True)]
    reference = ReferenceCenter(initial, rule)
    theirs = [OverlapClient(reference, [a.dtype for a in initial]) for _ in range(3)]
    ours = [[a.copy() for a in initial] for _ in range(3)]
    center = make(ours[0], rule, overlap=True)
    clients = [center.arrays_client] + [center.client(arrays) for arrays in ours[1:]]
    for _ in range(40):
        who, what, steps = int(rng.integers(3)), rng.random(), int(rng.integers(1, 9))
        mine, expected = clients[who], theirs[who]
        if what < 0.5:
            for array, same_array in zip(ours[who], expected.arrays, strict=True):
                update = rng.standard_normal(array.shape).astype(array.dtype)
                array += update
                same_array += update
        elif mine.started:
            assert mine.finish()
            expected.finish()
        elif what < 0.9:
            mine.start(steps)
            land(mine)
            expected.start(steps)
        else:
            assert mine.exchange(steps)
            expected.exchange(steps)
        same(ours[who], expected.arrays)
        same(center.snapshot().values(), reference.center)
    assert center.version == reference.pushes
    assert reference.pushes > 5


@pytest.mark.parametrize("rule", FEW_RULES, ids=repr)
@pytest.mark.parametrize("dtypes", [["f4"] * 7, ["f8"] * 7, ["f2"] * 7, DTYPES], ids="-".join)
def test_random_schedules_against_the_reference(rule, dtypes):
    for seed in range(3):
        random_schedule(Center, rule, dtypes, seed)


def random_schedules_by_mailbox(folder):
    def drive(host):
        for seed, rule in enumerate(FEW_RULES):
            # With gap_aware a host remembers a block as float32 if it is not all of one half type.
            for dtypes in (["f2"] * 7, ["f8"] * 7 if rule.gap_aware else DTYPES):
                random_schedule(host.center, rule, dtypes, seed)

    return at_a_worker(folder, drive)


def test_random_schedules_by_mailbox(tmp_path):
    on_ranks(2, random_schedules_by_mailbox, str(tmp_path))


def overlap_and_count(rounds, variants):
    """All ranks push integers with flights of any length; the center is their sum, and so is every worker in the end.

    Each variant: transport, hosts, wire, types.
    """
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    rng = np.random.default_rng(comm.rank)
    for transport, hosts, wire, dtypes in variants:
        arrays = [np.zeros(s, t) for s, t in zip(SHAPES, dtypes, strict=True)]
        center = Center(arrays, transport=transport, center_ranks=hosts, wire_dtype=wire, overlap=True)
        client, pushed = center.arrays_client, [np.zeros(s) for s in SHAPES]
        for _ in range(rounds):
            for _ in range(int(rng.integers(1, 4))):
                for array, total in zip(arrays, pushed, strict=True):
                    delta = rng.integers(-2, 3, array.shape)
                    array += delta.astype(array.dtype)
                    total += delta
                if rng.random() < 0.3:
                    time.sleep(rng.random() * 0.002)
            if client.started and (client.ready or rng.random() < 0.5):
                client.finish()
            if not client.started:
                client.start(1)
        if client.started:
            client.finish()
        client.exchange(1, exact=True)
        comm.Barrier()
        for value, total in zip(center.snapshot().values(), pushed, strict=True):
            np.testing.assert_allclose(value, comm.allreduce(total), rtol=0, atol=1e-6 if wire == "int8" else 0)
        center.pull()
        for array, value in zip(arrays, center.snapshot().values(), strict=True):
            np.testing.assert_array_equal(array, value.astype(array.dtype))
        comm.Barrier()
        center.close()


DOUBLES = ["f8"] * 7
ANY = [("direct", [0], None, DTYPES), ("mailbox", [0], None, DTYPES)]


@pytest.mark.parametrize(
    ("ranks", "rounds", "variants"),
    [
        (1, 60, ANY),
        (2, 40, [*ANY, ("mailbox", [1], "bf16", DOUBLES), ("mailbox", [0, 1], "int8", DOUBLES)]),
        (4, 20, [*ANY, ("mailbox", [0, 1, 2, 3], None, DTYPES), ("mailbox", [0, 3], "fp16", DOUBLES)]),
    ],
)
def test_nothing_is_lost_nothing_counted_twice(ranks, rounds, variants):
    on_ranks(ranks, overlap_and_count, rounds, variants)


# ---- refusals


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_refused_snapshot(poison):
    theta = np.zeros(600, np.float32)
    center = Center([theta], overlap=True)
    client = center.arrays_client
    theta += 1
    theta[7] = poison
    client.start(1)
    theta[7] = 0
    theta += 1
    with pytest.warns(NonFiniteWarning, match=r"the update of 'array 0' has a NaN or an Inf.*1 so far"):
        assert not client.finish()
    np.testing.assert_array_equal(theta, 0)  # what was done since is dropped too
    assert center.version == 0
    assert not client.started
    theta += 3
    client.start(1)
    assert client.finish()
    np.testing.assert_array_equal(center.snapshot()["array 0"], 3)


def test_a_refused_snapshot_raises_if_asked_to():
    theta = np.zeros(600, np.float32)
    center = Center([theta], overlap=True, on_nonfinite="raise")
    theta[7] = np.nan
    center.arrays_client.start(1)
    theta += 2
    with pytest.raises(NonFiniteError, match="left as they are"):
        center.arrays_client.finish()
    np.testing.assert_array_equal(np.delete(theta, 7), 2)
    center.pull()
    np.testing.assert_array_equal(theta, 0)


def test_what_is_poisoned_during_a_flight_is_refused_at_the_next():
    theta = np.zeros(600, np.float32)
    center = Center([theta], overlap=True)
    theta += 1
    center.arrays_client.start(1)
    theta[9] = np.nan
    assert center.arrays_client.finish()
    np.testing.assert_array_equal(center.snapshot()["array 0"], 1)
    with pytest.warns(NonFiniteWarning):
        assert not center.exchange(1)
    np.testing.assert_array_equal(theta, 1)


def test_what_is_not_allowed_during_a_flight():
    theta = np.zeros(600, np.float32)
    center = Center([theta], overlap=True)
    client = center.arrays_client
    theta += 1
    client.start(1)
    refused = {
        "exchange": lambda: client.exchange(1),
        "start": lambda: client.start(1),
        "pull": client.pull,
        "peek": client.peek,
        "forget": client.forget,
        "read_anchor": lambda: client.read_anchor(0, theta.copy()),
        "write_anchor": lambda: client.write_anchor(0, theta.copy()),
    }
    for name, call in refused.items():
        with pytest.raises(UsageError, match=rf"\[rank 0\] {name}\(\) while an exchange is under way.*call finish"):
            call()
    with pytest.raises(UsageError, match="under way"):
        center.exchange(1)
    assert client.finish()
    np.testing.assert_array_equal(center.snapshot()["array 0"], 1)


def test_a_center_is_not_loaded_during_a_flight(tmp_path):
    """Refused before anything has changed."""
    theta = np.zeros(600, np.float32)
    center = Center([theta], overlap=True)
    center.save(tmp_path / "c.safetensors")
    theta += 1
    center.arrays_client.start(1)
    land(center.arrays_client)
    with pytest.raises(UsageError, match=r"Center.load.* while an exchange is under way.*finish\(\)"):
        center.load(tmp_path / "c.safetensors")
    np.testing.assert_array_equal(center.snapshot()["array 0"], 1)
    center.arrays_client.finish()
    center.load(tmp_path / "c.safetensors")
    np.testing.assert_array_equal(theta, 0)


def test_misuse():
    center = Center([np.zeros(3, np.float32)])
    with pytest.raises(UsageError, match=r"start\(\) needs a client made with overlap=True"):
        center.arrays_client.start(1)
    with pytest.raises(UsageError, match=r"finish\(\) without start\(\)"):
        center.arrays_client.finish()
    overlapping = Center([np.zeros(3, np.float32)], overlap=True).arrays_client
    with pytest.raises(ValueError, match="exchange after 0 steps: give a positive number"):
        overlapping.start(0)
    assert not overlapping.started
    assert overlapping.extra_bytes > center.arrays_client.extra_bytes


def test_storage_may_move_during_a_flight():
    theta = np.zeros(600, np.float32)
    center = Center([theta], overlap=True)
    theta += 1
    center.arrays_client.start(1)
    moved = theta + np.float32(2)
    theta[:] = -1
    center.arrays_client.rebind(0, moved)
    center.arrays_client.finish()
    np.testing.assert_array_equal(moved, 3)
    np.testing.assert_array_equal(theta, -1)
    np.testing.assert_array_equal(center.snapshot()["array 0"], 1)


# ---- flights that are held up

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
