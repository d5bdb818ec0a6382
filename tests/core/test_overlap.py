"""Exchanges in the background: nothing lost, nothing counted twice, whatever is done to the arrays meanwhile."""

import numpy as np
import pytest
from exchanges import DTYPES, SHAPES
from mailboxes import at_a_worker, same
from overlaps import DOUBLES, land, overlap_and_count
from ranks import on_ranks
from reference import FEW_RULES, OverlapClient, ReferenceCenter

from hvd_agn import Center

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


# ---- against the reference


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


# ---- conservation

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
