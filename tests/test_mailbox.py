"""Exchanges by mailbox between ranks of one machine: conservation, the reference, wires, refusals, files."""

import os

import numpy as np
import pytest
from mailboxes import add_integers, at_a_worker, same
from ranks import on_ranks
from reference import FEW_RULES, RULES, ReferenceCenter, ReferenceClient

from hvd_agn import Center, rules
from hvd_agn.errors import ConfigError, LayoutError, NonFiniteError, NonFiniteWarning

# In blocks of 1024 bytes: several parts in one block, arrays over several blocks, a short last block, empty arrays.
SHAPES = [(7, 13), (1000,), (), (0,), (255,), (3, 3, 3), (300,)]
DTYPES = ["f4", "f8", "f2", "f4", "f8", "f2", "f4"]
MAILBOX = {"HVD_AGN_TRANSPORT": "mailbox"}

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


@pytest.mark.parametrize(
    ("ranks", "exchanges", "variants"),
    [
        (2, 30, [([0], 8, None, False), ([1], 1, None, False), ([1, 0], 2, None, False), ([0, 1], 2, None, True)]),
        (2, 30, [([0], 1, None, True), ([1], 8, None, True), ([0, 1], 8, ONE_BLOCK, False)]),
        (4, 15, [([0, 2], 2, None, False), ([0, 1, 2, 3], 1, None, True), ([3, 0, 1, 2], 8, ONE_BLOCK, False)]),
        (16, 3, [([0], 2, None, False), (list(range(16)), 8, None, True), (list(range(16)), 1, ONE_BLOCK, False)]),
    ],
)
def test_nothing_is_lost(ranks, exchanges, variants):
    on_ranks(ranks, conserve, exchanges, variants)


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


@pytest.mark.parametrize(("how", "ring"), [("asleep", "8"), ("busy", "2")])
def test_a_host_that_does_nothing_gives_what_the_reference_gives(how, ring, tmp_path):
    """Asleep, or busy in pure Python: no bit differs."""
    on_ranks(2, interleave_all, how, str(tmp_path), env={"HVD_AGN_RING_BLOCKS": ring})


# ---- wires that round

WIRES = ["bf16", "fp16", "int8"]


def rounding(wire, values):
    """How far one rounding may be off: half a step, of the block's scale with int8. Values of one float64 array."""
    v = np.abs(values) * (1 + 1e-6)
    if wire == "bf16":
        return v * 2.0**-8
    if wire == "fp16":
        return v * 2.0**-11 + 2.0**-25
    blocks = np.split(v, range(128, len(v), 128))
    return np.concatenate([np.full(len(b), b.max() / 254) for b in blocks])


def sums_are_exact(host):
    """Integers up to 5000, which no wire holds, sum up exactly once what was rounded away has been pushed too."""
    rng = np.random.default_rng(0)
    for wire in WIRES:
        arrays = [np.zeros(700, "f8"), np.zeros((), "f8"), np.zeros(37, "f8")]
        if wire != "int8":  # whose scale makes fractions of all integers; float64 holds those
            arrays += [np.zeros(700, "f4"), np.zeros((3, 3), "f4")]
        center = host.center(arrays, wire_dtype=wire)
        client, total = center.arrays_client, [np.zeros(a.shape) for a in arrays]
        for rounds in (1, 6):
            for _ in range(rounds):
                k = int(rng.integers(1, 5))
                for array, sum_ in zip(arrays, total, strict=True):
                    delta = rng.integers(-5000, 5001, array.shape)
                    array += (k * delta).astype(array.dtype)
                    sum_ += delta
                client.exchange(k)
                assert client.owes
            assert any((a != e).any() for a, e in zip(center.snapshot().values(), total, strict=True))
            client.exchange(1, exact=True)
            assert not client.owes
            same(center.snapshot().values(), total)


def errors_stay_bounded(host):
    """The center is off by one rounding of the last delta, and the worker by one of the center's last change."""
    rng = np.random.default_rng(0)
    for wire in WIRES:
        start = 1000 + rng.standard_normal(1000)  # rounding these would be 1000 times worse
        mine, other = start.astype("f8"), start.astype("f8")
        center = host.center([mine], wire_dtype=wire)
        clients = [(center.arrays_client, mine), (center.client([other]), other)]
        owed = [np.zeros(1000), np.zeros(1000)]
        for i in range(12):
            client, array = clients[who := i % 2]
            before, had = center.snapshot()["array 0"], array.copy()
            delta = rng.standard_normal(1000) * 10.0 ** rng.integers(-2, 2)
            array += delta
            pushed = array - had  # as float64 has it
            client.exchange(1)
            after = center.snapshot()["array 0"]
            to_push = pushed + owed[who]
            owed[who] = to_push - (after - before)
            assert (np.abs(owed[who]) <= rounding(wire, to_push) + 1e-12).all()
            assert (np.abs(array - after) <= rounding(wire, after - had) + 1e-12).all()
            assert i == 0 or (array != after).any()
        for client, _ in clients:
            client.exchange(1, exact=True)
        final = center.snapshot()["array 0"]
        np.testing.assert_allclose(sum(owed), final - after, rtol=0, atol=1e-11)
        for client, _ in clients:  # each brings the worker closer by the same factor
            for _ in range(8):
                client.exchange(1)
        np.testing.assert_array_equal(center.snapshot()["array 0"], final)
        if wire == "fp16":  # whose smallest step is 2^-24
            for _, array in clients:
                np.testing.assert_allclose(array, final, rtol=0, atol=2.0**-25)
        else:
            same([array for _, array in clients], [final] * 2)


def float32_workers_reach_the_center(host):
    """As above with float32, whose own steps at 1000 every wire can send."""
    for wire in WIRES:
        start = (1000 + np.random.default_rng(1).random(600)).astype("f4")
        mine, other = start.copy(), start.copy()
        center = host.center([mine], wire_dtype=wire)
        client = center.client([other])
        other += np.linspace(-3, 3, 600, dtype="f4")
        client.exchange(1, exact=True)
        center.exchange(1)
        final = center.snapshot()["array 0"]
        assert (mine != final).any()
        for _ in range(8):
            center.exchange(1)
        np.testing.assert_array_equal(mine, final)
        np.testing.assert_array_equal(center.snapshot()["array 0"], final)


def small_deltas_arrive_later(host):
    theta = np.zeros(256, "f8")
    center = host.center([theta], wire_dtype="int8")
    for i in range(1, 41):
        theta[0] += 127  # makes the block's step 1
        theta[1] += 0.1
        center.exchange(1)
        values = center.snapshot()["array 0"]
        assert abs(values[1] - i * 0.1) <= 0.5001
        if i == 4:
            assert values[1] == 0
    assert values[1] >= 3
    theta[:] = 0
    center = host.center([theta], wire_dtype="fp16")
    for i in range(1, 101):
        theta += 1e-9  # fp16 begins at 6e-8
        center.exchange(1)
        assert (np.abs(center.snapshot()["array 0"] - i * 1e-9) <= 2.0**-25 * 1.001).all()
    assert (center.snapshot()["array 0"] > 5e-8).all()


def what_fp16_cannot_hold_follows(host):
    theta = np.zeros(300, "f4")
    center = host.center([theta], wire_dtype="fp16")
    theta[7] += 1e6
    theta[8] -= 1e6
    for i in range(1, 17):
        center.exchange(1)
        now = min(i * 65504, 1e6)
        expected = np.zeros(300)
        expected[7:9] = now, -now
        np.testing.assert_array_equal(center.snapshot()["array 0"], expected)
        np.testing.assert_array_equal(theta, expected)
    theta[7] += 1e6
    center.exchange(1, exact=True)
    assert center.snapshot()["array 0"][7] == 2e6
    assert theta[7] == 1e6 + 65504  # answers are rounded all the same
    for _ in range(16):
        center.exchange(1)
    assert theta[7] == 2e6


def another_anchor_or_center(host):
    """What host and worker have agreed on is forgotten with an anchor of the worker's, and with a loaded center."""
    path = str(host.folder / "center.safetensors")
    for wire in WIRES:
        theta = np.full(600, 3.0, "f4")
        center = host.center([theta], wire_dtype=wire)
        host.save(center, path)
        theta += np.linspace(1, 2, 600, dtype="f4")
        center.exchange(1)
        client = center.arrays_client
        center.exchange(1, exact=True)
        values = center.snapshot()["array 0"]
        client.write_anchor(0, np.full(600, 100.0, "f4"))
        theta[:] = 100 + 2
        client.exchange(1, exact=True)
        np.testing.assert_array_equal(center.snapshot()["array 0"], values + 2)
        np.testing.assert_array_equal(theta, values + 2)  # whole, not as a difference to what the host knows
        theta += 0.3
        client.exchange(1)
        assert client.owes
        host.load(center, path)
        assert not client.owes
        np.testing.assert_array_equal(theta, 3)
        for _ in range(3):
            client.exchange(1)
        np.testing.assert_array_equal(center.snapshot()["array 0"], 3)  # nothing old is owed to the loaded center
        theta += 4
        client.exchange(1)
        np.testing.assert_allclose(theta, 7, rtol=1e-6)
        np.testing.assert_allclose(center.snapshot()["array 0"], 7, rtol=1e-6)


def clients_of_two_types(host):
    """Halves come as they are, floats as differences; both workers of one process push."""
    for wire in WIRES:
        single, half = [np.zeros(600, "f4"), np.zeros(5, "f8")], [np.zeros(600, "f2"), np.zeros(5, "f8")]
        center = host.center(single, wire_dtype=wire)
        client = center.client(half)
        for _ in range(20):
            for arrays, who in ((single, center.arrays_client), (half, client)):
                for array in arrays:
                    array += 1
                who.exchange(1)
        client.exchange(1, exact=True)
        center.exchange(1, exact=True)
        for value in center.snapshot().values():
            np.testing.assert_allclose(value, 40, rtol=1e-6)
        client.exchange(1)
        np.testing.assert_array_equal(half[0], 40)
        for _ in range(4):
            center.exchange(1)
        same(single, center.snapshot().values())


def check_wires(folder, names):
    def drive(host):
        for name in names:
            globals()[name](host)
            print(f"{name}: passed")  # the output is shown when a later one fails

    return at_a_worker(folder, drive)


@pytest.mark.parametrize(
    "checks",
    [
        ["sums_are_exact", "small_deltas_arrive_later"],
        ["errors_stay_bounded", "float32_workers_reach_the_center"],
        ["what_fp16_cannot_hold_follows", "another_anchor_or_center", "clients_of_two_types"],
    ],
    ids=lambda checks: checks[0],
)
def test_wires(checks, tmp_path):
    on_ranks(2, check_wires, str(tmp_path), checks)


def hammer_through_wires(exchanges):
    """Many ranks, several shards, every wire: the sum is exact in the end."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    rng = np.random.default_rng(comm.rank)
    for wire in WIRES:
        shapes = [(7, 13), (300,), (), (255,)]
        arrays = [np.zeros(s, "f8") for s in shapes]
        center = Center(arrays, transport="mailbox", wire_dtype=wire, center_ranks=(0, 2))
        pushed = [np.zeros(s) for s in shapes]
        for _ in range(exchanges):
            for array, total in zip(arrays, pushed, strict=True):
                delta = rng.integers(-5000, 5001, array.shape)
                array += delta
                total += delta
            center.exchange(1)
        center.exchange(1, exact=True)
        comm.Barrier()
        # Every rank's deltas are what its arrays were off its anchor: rounding of the answers is no part of them.
        everyones = [comm.allreduce(total) for total in pushed]
        for value, expected in zip(center.snapshot().values(), everyones, strict=True):
            np.testing.assert_allclose(value, expected, rtol=0, atol=1e-6)
        center.close()


def test_wires_on_many_ranks():
    on_ranks(4, hammer_through_wires, 20)


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
    return at_a_worker(folder, refusals)


def test_what_is_not_finite_is_refused(tmp_path):
    on_ranks(2, refuse, str(tmp_path))


# ---- files, and bad input

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


def test_a_saved_center_goes_on_elsewhere(tmp_path):
    on_ranks(3, move_about, str(tmp_path))


@pytest.mark.parametrize("ranks", [np.zeros(1, int), [np.int32(0)], "nodes"])
def test_good_center_ranks(ranks):
    with Center([theta := np.ones(3, "f4")], center_ranks=ranks) as center:
        theta += 1
        center.exchange(1)
        np.testing.assert_array_equal(center.snapshot()["array 0"], 2)


@pytest.mark.parametrize("ranks", [(1,), (-1,), (0, 0), "node", "", (), (True,), (0.0,), 0, None])
def test_bad_center_ranks(ranks):
    with pytest.raises(ConfigError, match=r"center_ranks=.*: give 'nodes', or different ranks from 0 to 0") as caught:
        Center([np.zeros(3, "f4")], center_ranks=ranks)
    assert f"center_ranks={ranks!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("argument", "value", "choices"),
    [("transport", "shm", "auto, direct, mailbox"), ("wire_dtype", "fp8", "None, bf16, fp16, int8")],
)
def test_bad_choices(argument, value, choices):
    with pytest.raises(ConfigError, match=f"{argument}={value!r}: give one of {choices}"):
        Center([np.zeros(3, "f4")], **{argument: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("HVD_AGN_TRANSPORT", "shm", "give one of auto, direct, mailbox"),
        ("HVD_AGN_RING_BLOCKS", "0", "give a whole number of blocks, from 1 to 4096"),
        ("HVD_AGN_RING_BLOCKS", "4097", "give a whole number of blocks, from 1 to 4096"),
        ("HVD_AGN_RING_BLOCKS", "many", "give a whole number of blocks, from 1 to 4096"),
    ],
)
def test_bad_variables(monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises((ConfigError, LayoutError), match=f"{name}={value!r}: {message}"):
        Center([np.zeros(3, "f4")])


DIFFERENT = {
    "hosts": ({"center_ranks": [1]}, '["center_ranks", [1]] here, ["center_ranks", [0]] on rank 0.'),
    "sharding": ({"center_ranks": [0, 2]}, '["center_ranks", [0, 2]] here, ["center_ranks", [0]] on rank 0.'),
    "transport": ({"transport": "direct"}, '["transport (HVD_AGN_TRANSPORT)", "direct"] here, ["transport (HVD_AGN_'),
    "ring": ({}, '["blocks of a ring (HVD_AGN_RING_BLOCKS)", 3] here'),
}


def differ():
    from mpi4py import MPI

    told = {}
    for name, (options, _) in DIFFERENT.items():
        odd = MPI.COMM_WORLD.rank == 1
        os.environ["HVD_AGN_RING_BLOCKS"] = "3" if odd and name == "ring" else "8"
        with pytest.raises(LayoutError) as caught:
            Center([np.zeros(3, "f4")], **{"transport": "mailbox", **(options if odd else {})})
        told[name] = str(caught.value)
    os.environ["HVD_AGN_RING_BLOCKS"] = "8"
    with pytest.raises(ConfigError) as caught:
        Center([np.zeros(3, "f4")], center_ranks=[7 if odd else 0])
    told["one bad"] = str(caught.value)
    theta = np.zeros(3, "f4")
    with Center([theta], transport="mailbox") as center:  # all ranks are still in step
        center.exchange(1)
    return told


def test_ranks_that_differ():
    for told in on_ranks(3, differ):
        for name, (_, message) in DIFFERENT.items():
            assert f"[rank 1] Center: {message}" in told[name]
        assert "[rank 1] Center: center_ranks=[7]: give 'nodes', or different ranks from 0 to 2" in told["one bad"]
