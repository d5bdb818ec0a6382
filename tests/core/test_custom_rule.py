"""rules.Custom: a Python function at the center. That it computes what it should is in the tests of all rules."""

import numpy as np
import pytest
from mailboxes import at_a_worker
from ranks import on_ranks
from reference import ReferenceCenter, ReferenceClient, heavy_ball

from hvd_agn import Center, rules
from hvd_agn.errors import ConfigError, LayoutError, NonFiniteWarning, RuleError

BLOCK = 256  # float32 values; conftest sets blocks of 1 KiB


def add(center, delta, slots, t):
    center += delta


def add_below_100(center, delta, slots, t):
    """Fails at the second of the three arrays, after it has changed both center and slot."""
    slots["seen"] += 1
    center += delta
    if delta.max() >= 100:
        delta[:] = 7
        raise ValueError(f"a delta of {delta.size} elements is too large")


def failing(make, gradients, overlap=False):
    """The error names all; the center's block stays, and what was to be pushed comes with the next exchange."""
    arrays = [np.zeros(n, "f4") for n in (BLOCK, 2 * BLOCK, BLOCK)]
    rule = rules.Custom(add_below_100, "seen")
    mode = "gradients" if gradients else "updates"
    center = make(arrays, rule, accumulate=mode, overlap=overlap)
    client = center.arrays_client

    def train(*sizes):
        if gradients:
            client.accumulate([np.full(a.shape, -size, "f4") for a, size in zip(arrays, sizes, strict=True)])
        else:
            for array, size in zip(arrays, sizes, strict=True):
                array += size

    def exchange(steps):
        if not overlap:
            return client.exchange(steps)
        client.start(steps)
        return client.finish()

    train(2, 200, 6)
    with pytest.raises(RuleError) as error:
        exchange(2)
    text = str(error.value)
    for part in (f"[rank {center.rank}]", "add_below_100", "ValueError: a delta of 256 elements is too large", "next"):
        assert part in text, text
    values, slots, _ = center._read()
    values = list(values.values())
    assert (values[1] == 0).all()
    assert all((slots["seen"]["array 1"] == 0).tolist())
    train(0, -150, 0)
    assert exchange(1)
    values, slots, _ = center._read()
    np.testing.assert_array_equal(values["array 1"], 50)
    np.testing.assert_array_equal(slots["seen"]["array 1"], 1)
    for name, size in (("array 0", 2), ("array 2", 6)):  # pushed by the first exchange, or by the second
        assert set(values[name]) <= {size / 2, size}, values[name]
    if not gradients:
        for array, value in zip(arrays, values.values(), strict=True):
            np.testing.assert_array_equal(array, value)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_function_that_fails_loses_nothing(gradients, overlap):
    failing(Center, gradients, overlap)


def raise_without_text(center, delta, slots, t):
    class MuteError(Exception):
        def __str__(self):
            raise KeyError

    raise MuteError if t == 1 else OSError("\udcff")


def interrupt_once(center, delta, slots, t):
    center += delta
    slots["calls"] += 1
    if delta.max() == 1:
        raise KeyboardInterrupt


def interrupted(make, error, message):
    """Ctrl-C in the function: the block stays, and what was to be pushed is pushed later."""
    theta = np.zeros(BLOCK, "f4")
    center = make([theta], rules.Custom(interrupt_once, "calls"))
    theta += 1
    with pytest.raises(error, match=message):
        center.exchange(1)
    assert not center.snapshot()["array 0"].any()
    theta += 1
    assert center.exchange(1)
    np.testing.assert_array_equal(center.snapshot()["array 0"], 2)
    np.testing.assert_array_equal(theta, 2)


def test_an_interrupt_stays_one():
    interrupted(Center, KeyboardInterrupt, None)


def fail_without_text(host):
    theta = np.zeros(5, "f4")
    center = host.center([theta], rules.Custom(raise_without_text))
    with pytest.raises(RuleError, match=r"raise_without_text.* raised .*MuteError"):
        center.exchange(1)


def fail_with_a_wire(host):
    """What had been rounded away before is pushed once, and so is what failed."""
    theta = np.zeros(BLOCK, "f4")
    center = host.center([theta], rules.Custom(add_below_100, "seen"), wire_dtype="int8")
    client = center.arrays_client
    theta += np.float32(0.3)
    theta[0] = 90
    client.exchange(1)  # 0.3 is less than half of 90 / 127
    for exact in (False, True):
        theta += np.float32(0.1)
        theta[0] += 20 if exact else 120
        with pytest.raises(RuleError, match="too large"):
            client.exchange(1, exact=exact)
        assert client.owes
    theta[0] -= 140
    client.exchange(1, exact=True)
    assert not client.owes
    value = center.snapshot()["array 0"]
    np.testing.assert_allclose(value[1:], 0.5, rtol=1e-5)
    np.testing.assert_allclose(value[0], 90.2, rtol=1e-5)


def fail_by_mailbox(folder):
    def drive(host):
        fail_with_a_wire(host)
        fail_without_text(host)
        interrupted(host.center, RuleError, r"(?s)at the host of block 0, .*KeyboardInterrupt")
        for gradients in (False, True):
            for overlap in (False, True):
                failing(host.center, gradients, overlap)

    return at_a_worker(folder, drive)


def test_a_function_that_fails_at_the_host_loses_nothing(tmp_path):
    on_ranks(2, fail_by_mailbox, str(tmp_path))


def hammer(transport):
    """Integers, whose sum is exact, while every rank computes in Python and holds the GIL."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    arrays = [np.zeros(n, "f4") for n in (3 * BLOCK, 5, 1000)]
    center = Center(arrays, rules.Custom(add), transport=transport)
    for _ in range(10):
        for array in arrays:
            array += 3 * (comm.rank + 1)
        center.exchange(3)
        sum(range(20000))
    comm.Barrier()
    for value in center.snapshot().values():
        assert (value == 10 * sum(rank + 1 for rank in range(comm.size))).all()
    center.close()


@pytest.mark.parametrize("transport", ["direct", "mailbox"])
def test_ranks_do_not_disturb_each_other(transport):
    on_ranks(4, hammer, transport)


def test_a_function_that_makes_a_nan_changes_nothing():
    def spoil(center, delta, slots, t):
        center[0] = np.nan

    theta = np.ones(3 * BLOCK, "f4")
    with Center([theta], rules.Custom(spoil)) as center:
        theta += 1
        with pytest.warns(NonFiniteWarning, match=r"spoil.* overflowed in 3 blocks"):
            center.exchange(1)
        np.testing.assert_array_equal(center.snapshot()["array 0"], 1)
        np.testing.assert_array_equal(theta, 1)


def test_several_clients_and_half_types():
    rule = rules.Custom(heavy_ball, ("velocity",))
    initial = [np.linspace(-1, 1, 900).astype("f2"), np.arange(5.0)]
    reference = ReferenceCenter(initial, rule)
    theirs = [ReferenceClient(reference, [a.dtype for a in initial]) for _ in range(2)]
    ours = [[a.copy() for a in initial] for _ in range(2)]
    center = Center(ours[0], rule)
    clients = [center.arrays_client, center.client(ours[1])]
    for i in range(6):
        for array, other in zip(ours[i % 2], theirs[i % 2].arrays, strict=True):
            array += array.dtype.type(i)
            other += other.dtype.type(i)
        clients[i % 2].exchange(2)
        theirs[i % 2].exchange(2)
    for mine, expected in zip(ours[1], theirs[1].arrays, strict=True):
        np.testing.assert_array_equal(mine, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("add",), "give a function of"),
        ((add, ("a", "a")), "different names"),
        ((add, ("a b",)), "different names"),
        ((add, ("moved_sq",)), "different names"),
        ((add, (3,)), "different names"),
        ((add, 3), "different names"),
    ],
)
def test_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        rules.Custom(*arguments)


def test_gap_aware_arguments():
    with pytest.raises(ConfigError, match=r"rules\.Add: gap_aware=3: give True or False"):
        rules.Add(gap_aware=3)
    with pytest.raises(ConfigError, match=r"rules\.Elastic: gap_aware"):
        rules.Elastic(0.5, gap_aware=True)
    assert rules.SGD(0.1, 0.9, gap_aware=True).active_slots() == ("momentum", "moved_sq")
    assert repr(rules.Custom(add, gap_aware=True)) == "Custom(fn=add, slots=(), gap_aware=True)"


def other_functions():
    from mpi4py import MPI

    rule = rules.Custom(add if MPI.COMM_WORLD.rank == 0 else heavy_ball)
    with pytest.raises(LayoutError, match=r"Custom\(fn="):
        Center([np.zeros(3)], rule)


def test_ranks_with_other_functions():
    on_ranks(2, other_functions)
