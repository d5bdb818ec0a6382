"""accumulate="gradients": what is pushed is the mean of the gradients that there were."""

import os
import signal

import numpy as np
import pytest
from mailboxes import at_a_worker, same, state, wait_until
from ranks import on_ranks
from reference import RULES, GradientsClient, ReferenceBlocks

from hvd_agn import Center, _core, config, rules
from hvd_agn.errors import ConfigError, LayoutError, NonFiniteError, NonFiniteWarning, StallError, UsageError

GRADIENT_RULES = [rule for rule in RULES if not isinstance(rule, (rules.Add, rules.Elastic))]
SIZES = [600, 40, 1024, 7, 256]  # some blocks of 1024 bytes belong to one array, some to several


def random_schedule(make, rule, dtype, seed, overlap=False):
    """Three workers, gradients that are missing now and then, local steps; all equals the reference."""
    rng = np.random.default_rng(seed)
    initial = [rng.standard_normal(n // (2 if dtype == "f8" else 1)).astype(dtype) for n in SIZES]
    reference = ReferenceBlocks(initial, rule, config.BLOCK_BYTES.read())
    theirs = [GradientsClient(reference, [dtype] * len(SIZES)) for _ in range(3)]
    ours = [[a.copy() for a in initial] for _ in range(3)]
    center = make(ours[0], rule, accumulate="gradients", overlap=overlap)
    clients = [center.arrays_client] + [center.client(arrays) for arrays in ours[1:]]
    for _ in range(60):
        who, what, steps = int(rng.integers(3)), rng.random(), int(rng.integers(1, 9))
        mine, expected = clients[who], theirs[who]
        if what < 0.6:
            gradients = [rng.standard_normal(a.shape).astype(dtype) if rng.random() < 0.7 else None for a in initial]
            mine.accumulate(gradients)
            expected.accumulate(gradients)
            for array, other in zip(ours[who], expected.arrays, strict=True):
                update = rng.standard_normal(array.shape).astype(dtype)
                array += update
                other += update
        elif mine.started:
            assert mine.finish()
            expected.finish()
        elif overlap and what < 0.9:
            mine.start(steps)
            wait_until(lambda c=mine: c.ready, "the exchange in the background")
            expected.start(steps)
        else:
            assert mine.exchange(steps)
            expected.exchange(steps)
        same(ours[who], expected.arrays)
        same(mine.accumulators(), expected.sums)
        assert mine.touched == expected.touched
        values, slots, version = center._read()
        same(values.values(), reference.center)
        for name, arrays in slots.items():
            same(arrays.values(), reference.slots[name])
        assert version == max(reference.counts)
    assert version > 3


@pytest.mark.parametrize("rule", GRADIENT_RULES, ids=repr)
@pytest.mark.parametrize("dtype", ["f4", "f8", "f2"])
def test_random_schedules(rule, dtype, kernels):
    random_schedule(Center, rule, dtype, seed=1)


@pytest.mark.parametrize("dtype", ["f4", "f8", "f2"])
def test_random_schedules_with_overlap(dtype):
    for seed, rule in enumerate(GRADIENT_RULES):
        random_schedule(Center, rule, dtype, seed, overlap=True)


def missing_parts(make, wire=None):
    """Small arrays share blocks: those without a gradient stay as they are, at the worker and at the center."""
    arrays = [np.full(n, 10.0) for n in (3, 200, 50, 7, 0, 300)]
    center = make(arrays, rules.SGD(1.0, 0.5), accumulate="gradients", wire_dtype=wire)
    client = center.arrays_client
    pushes = np.zeros(len(arrays))
    for present in ([0, 2, 5], [1], [], [0, 1, 2, 3, 4, 5], [3]):
        for array in arrays:
            array += 100  # what the worker did on its own
        client.accumulate([np.full(a.shape, 2.0) if i in present else None for i, a in enumerate(arrays)])
        client.exchange(1)
        before = center.snapshot()
        for i, (array, value) in enumerate(zip(arrays, before.values(), strict=True)):
            if i in present:
                pushes[i] += 1
                np.testing.assert_allclose(array, value, rtol=1e-2)
                array[...] = value
            else:
                assert (array > 100).all() or array.size == 0
                array -= 100
            # velocities 2, 3, ... of a momentum of 0.5, only by this array's pushes
            expected = 10 - sum(2 * (2 - 0.5**n) for n in range(int(pushes[i])))
            np.testing.assert_allclose(value, expected, rtol=1e-2 if wire else 1e-12)
    client.exchange(1, exact=True)
    return "done"


def test_missing_parts():
    missing_parts(Center)


def by_mailbox(folder):
    def drive(host):
        for seed, rule in enumerate(GRADIENT_RULES):
            random_schedule(host.center, rule, ("f4", "f8", "f2")[seed % 3], seed, overlap=seed % 2 == 0)
        for wire in (None, "bf16", "fp16", "int8"):
            missing_parts(host.center, wire)
            many_parts(host.center, wire)
        sums_are_exact(host)
        return "done"

    return at_a_worker(folder, drive)


def sums_are_exact(host):
    """What wires round away is kept per array, also while an array has no gradient, and pushed in the end."""
    rng = np.random.default_rng(0)
    for wire in ("bf16", "fp16", "int8"):
        arrays = [np.zeros(n) for n in (3, 200, 50, 300)]
        center = host.center(arrays, rules.SGD(1.0), accumulate="gradients", wire_dtype=wire)
        total = [np.zeros(a.shape) for a in arrays]
        for _ in range(8):
            gradients = [rng.integers(-5000, 5001, a.shape).astype(float) for a in arrays]
            chosen = rng.random(len(arrays)) < 0.6
            center.arrays_client.accumulate([g if c else None for g, c in zip(gradients, chosen, strict=True)])
            center.exchange(1)
            for sum_, gradient, c in zip(total, gradients, chosen, strict=True):
                sum_ -= gradient * c
        center.exchange(1, exact=True)
        assert not center.arrays_client.owes
        for value, expected in zip(center.snapshot().values(), total, strict=True):
            np.testing.assert_allclose(value, expected, rtol=0, atol=1e-6)


def test_by_mailbox(tmp_path):
    assert on_ranks(2, by_mailbox, str(tmp_path)) == [None, "done"]


def many_parts(make, wire):
    """Twenty arrays in one block, gradients of some, velocities by hand."""
    rng = np.random.default_rng(3)
    arrays = [np.zeros(3) for _ in range(20)]
    center = make(arrays, rules.SGD(1.0, 0.5), accumulate="gradients", wire_dtype=wire)
    velocity, value = np.zeros((20, 3)), np.zeros((20, 3))
    first = True
    for _ in range(6):
        present = rng.random(20) < 0.5
        gradients = rng.integers(-3, 4, (20, 3)).astype(float)
        center.arrays_client.accumulate([g if p else None for g, p in zip(gradients, present, strict=True)])
        center.exchange(1)
        velocity[present] = (0 if first else 0.5) * velocity[present] + gradients[present]
        value[present] -= velocity[present]
        first = False
        if wire is None:
            np.testing.assert_array_equal(np.array(list(center.snapshot().values())), value)
            np.testing.assert_array_equal(np.array(arrays)[present], value[present])
    np.testing.assert_allclose(np.array(list(center.snapshot().values())), value, atol=0.2)


def test_many_parts_of_a_block():
    many_parts(Center, None)


def give_up_half_way(overlap):
    """Rank 1 stops with a block half written; what rank 0 could not push is accumulated on, and pushed later."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    os.environ["HVD_AGN_STALL_SECONDS"] = "0"
    os.environ["HVD_AGN_STALL_ABORT_SECONDS"] = "1" if comm.rank == 0 else "0"
    arrays = [np.zeros(128, "f4") for _ in range(8)]  # two in a block
    center = Center(arrays, rules.SGD(1.0), accumulate="gradients", overlap=overlap)
    client = center.arrays_client
    pids = comm.allgather(os.getpid())
    client.accumulate([np.full(128, 1.0 + comm.rank, "f4")] * 8)
    if comm.rank == 1:
        _core.signal_at(_core.Stage.half_written, 1, signal.SIGSTOP)
        client.exchange(1)
    else:
        wait_until(lambda: state(pids[1]) == "T", "rank 1 to stop")
        if overlap:
            client.start(1)
            client.accumulate([np.full(128, 8.0, "f4")] * 8)
        push = client.finish if overlap else client.exchange
        with pytest.raises(StallError, match=r"waits for block 1, locked by rank 1.*given up"):
            push()
        os.kill(pids[1], signal.SIGCONT)
        sums = [float(s[0]) for s in client.accumulators()]
        later = 8.0 if overlap else 0.0
        assert sums == [later, later, 1 + later, 1 + later] + [later] * 4
        client.exchange(1)
    comm.Barrier()
    for value in center.snapshot().values():
        np.testing.assert_array_equal(value, -3 - (8 if overlap else 0))
    assert center._read()[2] == (3 if overlap else 2)  # no block had a push without a gradient


@pytest.mark.parametrize("overlap", [False, True])
def test_an_exchange_that_is_given_up_on_loses_no_gradient(overlap):
    on_ranks(2, give_up_half_way, overlap)


# ---- refused


def test_a_gradient_with_nan_is_refused():
    theta = [np.zeros(600, "f4"), np.zeros(300, "f4")]
    center = Center(theta, rules.SGD(1.0), accumulate="gradients")
    client = center.arrays_client
    client.accumulate([np.ones(600, "f4"), np.full(300, np.nan, "f4")])
    with pytest.warns(NonFiniteWarning, match="the update of 'array 1' has a NaN"):
        assert not client.exchange(1)
    assert client.touched == [False, False]
    client.accumulate([np.ones(600, "f4"), None])
    assert client.exchange(1)
    np.testing.assert_array_equal(center.snapshot()["array 0"], -1)

    center = Center([np.zeros(3)], rules.SGD(1.0), accumulate="gradients", on_nonfinite="raise")
    center.arrays_client.accumulate([np.full(3, np.inf)])
    with pytest.raises(NonFiniteError):
        center.exchange(1)
    assert center.arrays_client.touched == [True]
    center.pull()
    assert center.arrays_client.touched == [False]


def test_a_refused_flight_keeps_its_gradients_if_asked_to_raise():
    center = Center([np.zeros(3)], rules.SGD(1.0), accumulate="gradients", overlap=True, on_nonfinite="raise")
    client = center.arrays_client
    client.accumulate([np.array([1.0, np.nan, 1.0])])
    client.start(1)
    client.accumulate([np.ones(3)])
    with pytest.raises(NonFiniteError):
        client.finish()
    np.testing.assert_array_equal(client.accumulators()[0], [2, np.nan, 2])
    client.pull()
    np.testing.assert_array_equal(client.accumulators()[0], 0)
    client.accumulate([np.ones(3)])
    assert client.exchange(1)
    np.testing.assert_array_equal(center.snapshot()["array 0"], -1)


@pytest.mark.parametrize("rule", [None, rules.Add(), rules.Elastic(0.5)])
def test_a_rule_that_takes_no_gradients(rule):
    with pytest.raises(ConfigError, match=r"accumulate='gradients' needs a rule that takes gradients, not"):
        Center([np.zeros(3)], rule, accumulate="gradients")


def test_bad_gradients():
    center = Center([np.zeros(3), np.zeros(4, "f4")], rules.SGD(1.0), accumulate="gradients")
    client = center.arrays_client
    for gradients, message in (
        ([np.zeros(3)], "1 gradients for 2 arrays"),
        ([np.zeros(3), np.zeros(3, "f4")], "gradient 1 does not match"),
        ([np.zeros(3), np.zeros(4)], "gradient 1 does not match"),
        ([np.zeros(6)[::2], None], "'the gradient of array 0'.*it is not contiguous"),
    ):
        with pytest.raises(LayoutError, match=message):
            client.accumulate(gradients)
    assert client.touched == [False, False]
    with pytest.raises(UsageError, match='needs a center made with accumulate="gradients"'):
        Center([np.zeros(3)]).arrays_client.accumulate([np.zeros(3)])
    with pytest.raises(ConfigError, match="accumulate='grads': give one of updates, gradients"):
        Center([np.zeros(3)], accumulate="grads")


def test_the_latest_version_counts_pushes_that_leave_blocks_alone():
    arrays, other = ([np.zeros(256, "f4"), np.zeros(256, "f4")] for _ in range(2))
    center = Center(arrays, rules.SGD(1.0), accumulate="gradients")
    rival = center.client(other)
    for client in rival, rival, center.arrays_client:
        client.accumulate([np.ones(256, "f4"), None])
        client.exchange(1)
    assert center.version == 0
    assert center.arrays_client.native.latest_version == 3
    assert rival.native.latest_version == 2
