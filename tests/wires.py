"""What a worker checks of wires that round, on one machine and between hosts; its host does nothing but be there."""

import numpy as np
from mailboxes import at_a_worker, same

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
