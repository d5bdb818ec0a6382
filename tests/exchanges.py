"""What ranks check of exchanges by mailbox, on one machine and between hosts: sums, the reference, refusals, files."""

import os

import numpy as np
import pytest
from mailboxes import add_integers, at_a_worker, same
from reference import FEW_RULES, RULES, ReferenceCenter, ReferenceClient

from hvd_agn import Center, rules
from hvd_agn.errors import NonFiniteError, NonFiniteWarning

# In blocks of 1024 bytes: several parts in one block, arrays over several blocks, a short last block, empty arrays.
SHAPES = [(7, 13), (1000,), (), (0,), (255,), (3, 3, 3), (300,)]
DTYPES = ["f4", "f8", "f2", "f4", "f8", "f2", "f4"]

# ---- conservation


def add_one_with_momentum(center, arrays, exchanges, rng):
    """A slot that is the sum of all pushes, and a center that is the sum of all slots, in whatever order they came."""
    comm = center._mpi_comm
    for _ in range(exchanges):
        k = int(rng.integers(1, 8))
        for array in arrays:
            array += array.dtype.type(k)
        center.exchange(k)
    comm.Barrier()
    n = comm.size * exchanges
    values, slots, version = center._read()
    assert version == n
    for value, slot in zip(values.values(), slots["momentum"].values(), strict=True):
        np.testing.assert_array_equal(slot, -n)
        np.testing.assert_array_equal(value, n * (n + 1) // 2)


def conserve(exchanges, variants, transport="mailbox"):
    """Each variant: ranks that host, blocks of a ring, sizes (None: SHAPES), whether with slots."""
    from mpi4py import MPI

    rng = np.random.default_rng(MPI.COMM_WORLD.rank)
    for hosts, ring, shapes, slots in variants:
        os.environ["HVD_AGN_RING_BLOCKS"] = str(ring)
        shapes = SHAPES if shapes is None else [tuple(s) for s in shapes]
        arrays = [np.zeros(s, t) for s, t in zip(shapes, DTYPES, strict=False)]
        rule = rules.SGD(lr=1.0, momentum=1.0) if slots else None
        with Center(arrays, rule, center_ranks=hosts, transport=transport) as center:
            (add_one_with_momentum if slots else add_integers)(center, arrays, exchanges, rng)
            assert center.version == MPI.COMM_WORLD.size * exchanges
            assert center.stats()["exchanges"] == exchanges


ONE_BLOCK = [[3], [2]]


# ---- one at a time, against the reference


def interleave(host, rule, dtypes):
    rng = np.random.default_rng(1)
    initial = [rng.standard_normal(s).astype(t) for s, t in zip(SHAPES, dtypes, strict=True)]
    reference = ReferenceCenter(initial, rule)
    theirs = [ReferenceClient(reference, [a.dtype for a in initial]) for _ in range(3)]
    ours = [[a.copy() for a in initial] for _ in range(3)]
    center = host.center(ours[0], rule)
    clients = [center.arrays_client] + [center.client(arrays) for arrays in ours[1:]]
    for i in range(8):
        who, steps = i * 7 % 3, 1 + i % 4
        for mine, expected in zip(ours[who], theirs[who].arrays, strict=True):
            update = rng.standard_normal(mine.shape).astype(mine.dtype)
            mine += update
            expected += update
        assert clients[who].exchange(steps)
        theirs[who].exchange(steps)
        same(ours[who], theirs[who].arrays)
        values, slots, version = center._read()
        same(values.values(), reference.center)
        assert version == center.version == i + 1
        for slot, arrays in slots.items():
            same(arrays.values(), reference.slots[slot])
    stats = [c.stats() for c in clients]
    assert [s["staleness_max"] for s in stats] == [2, 2, 2]
    assert all(s["wire_bytes"] > 0 for s in stats)


def interleave_all(how, folder):
    """Every rule, or a few where each answer takes long."""

    def drive(host):
        for rule in RULES if how == "asleep" else FEW_RULES:
            # With gap_aware a host remembers a block as float32 if it is not all of one half type.
            for dtypes in (["f4"] * 7, ["f8"] * 7, ["f2"] * 7, *([] if rule.gap_aware else [DTYPES])):
                interleave(host, rule, dtypes)

    return at_a_worker(folder, drive, how=how)


# ---- refused


def refusals(host):
    # The rule overflows at the host, on one block of two.
    for wire in (None, "bf16"):
        theta = np.ones(512, "f4")
        center = host.center([theta], rules.Add(scale=1e38), wire_dtype=wire)
        theta[0] += 100
        theta[300] += 2.0**-9
        assert center.exchange(1)
        values = center.snapshot()["array 0"]
        np.testing.assert_array_equal(values[:256], 1)
        assert values[300] > 1e34
        np.testing.assert_allclose(theta, values, rtol=2.0**-8 if wire else 0)
        assert center.stats()["blocks_refused"] == 1
        assert center.stats()["exchanges"] == 1
        assert center.version == 0
    # NaN at the worker: nothing is sent.
    for how, wire in (("skip", None), ("raise", None), ("skip", "int8"), ("raise", "fp16")):
        theta = [np.zeros(600, "f4"), np.zeros(300, "f4")]
        center = host.center(theta, on_nonfinite=how, wire_dtype=wire)
        theta[0] += 1
        theta[1][299] = np.nan
        sent = center.stats()["wire_bytes"]
        if how == "raise":
            with pytest.raises(NonFiniteError, match=r"\[rank 1\] Center: the update of 'array 1' has a NaN"):
                center.exchange(1)
            assert center.stats()["wire_bytes"] == sent
            np.testing.assert_array_equal(theta[0], 1)
            center.pull()
        else:
            with pytest.warns(
                NonFiniteWarning, match=r"\[rank 1\] Center: the update of 'array 1' has a NaN.*1 so far"
            ):
                assert not center.exchange(1)
        same(theta, [0, 0])
        same(center.snapshot().values(), [0, 0])
        assert center.version == 0
        assert center.stats()["pushes_refused"] == 1
        theta[0] += 1
        assert center.exchange(1)
        np.testing.assert_allclose(center.snapshot()["array 0"], 1, rtol=1e-6)
        assert center.version == 1


def refuse(folder):
    return at_a_worker(folder, lambda host: (refusals(host), bound(host.center), bound(rounded(host)))[1:])


def rounded(host):
    return lambda arrays, **options: host.center(arrays, wire_dtype="bf16", **options)


def bound(make):
    """The norm is that of the mean, over all arrays: 400 ones have 20."""
    theta = [np.zeros(300), np.zeros(100)]
    center = make(theta, max_norm=20.0)
    for array in theta:
        array += 3
    assert center.exchange(3)
    same(center.snapshot().values(), [1, 1])
    for array in theta:
        array += 3.03
    with pytest.warns(NonFiniteWarning, match=r"the update has a norm of 20\.2, above max_norm=20\.0; this exchange"):
        assert not center.exchange(3)
    same(theta, [1, 1])
    same(center.snapshot().values(), [1, 1])
    assert center.stats()["pushes_refused"] == 1
    center = make(theta, max_norm=49, on_nonfinite="raise")
    theta[0][3] += 50
    with pytest.raises(NonFiniteError, match=r"norm of 50, above max_norm=49; .*left as they are"):
        center.exchange(1)
    assert theta[0][3] == 51
    center.pull()
    assert theta[0][3] == 1
    assert center.exchange(1)


# ---- files

RULE = rules.SGD(lr=0.5, momentum=0.9, dampening=0.1)
PLACES = [
    ("direct", [0]),
    ("mailbox", [0]),
    ("mailbox", [0, 1]),
    ("direct", "nodes"),
    ("mailbox", [2, 0, 1]),
    ("auto", [1]),
]


def move_about(folder, direct="direct"):
    """A run that is saved, and goes on in another place each time, equals the one that never was."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    rng = np.random.default_rng(0)
    initial = [rng.standard_normal(s).astype(t) for s, t in zip(SHAPES, DTYPES, strict=True)]
    reference = ReferenceCenter(initial, RULE)
    path = os.path.join(folder, "center.safetensors")
    for i, (transport, hosts) in enumerate(PLACES):
        transport = direct if transport == "direct" else transport
        arrays = [a.copy() if i == 0 else np.ones_like(a) for a in initial]
        with Center(arrays, RULE, transport=transport, center_ranks=hosts) as center:
            if i > 0:
                center.load(path)
            worker = ReferenceClient(reference, [a.dtype for a in initial])
            same(arrays, worker.arrays)
            comm.Barrier()  # load() ends on each rank when its own pull does
            for _ in range(3):
                for array, expected in zip(arrays, worker.arrays, strict=True):
                    update = rng.standard_normal(array.shape).astype(array.dtype)
                    expected += update
                    if comm.rank == 1:
                        array += update
                if comm.rank == 1:
                    center.exchange(2)
                worker.exchange(2)
            comm.Barrier()
            values, slots, version = center._read()
            same(values.values(), reference.center)
            same(slots["momentum"].values(), reference.slots["momentum"])
            assert version == 3 * (i + 1)
            center.save(path)
