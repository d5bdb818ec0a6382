"""The exchange in one process: against the reference, bit for bit, for every rule, type and instruction set."""

import threading

import numpy as np
import pytest
from reference import RULES, ReferenceCenter, ReferenceClient, wide

from hvd_agn import Center, rules
from hvd_agn.errors import LayoutError, NonFiniteError, NonFiniteWarning, RuleOverflowWarning


def interleave(rule, shapes, dtypes, schedule, clients, seed):
    """Several clients take turns; after each exchange all that can be seen equals the reference."""
    rng = np.random.default_rng(seed)
    initial = [rng.standard_normal(s).astype(t) for s, t in zip(shapes, dtypes, strict=True)]
    reference = ReferenceCenter(initial, rule)
    theirs = [ReferenceClient(reference, dtypes) for _ in range(clients)]
    ours = [[a.copy() for a in initial] for _ in range(clients)]
    with Center(ours[0], rule) as center:
        native = [center.arrays_client] + [center.client(arrays) for arrays in ours[1:]]
        for who, steps in schedule:
            for mine, expected in zip(ours[who], theirs[who].arrays, strict=True):
                update = rng.standard_normal(mine.shape).astype(mine.dtype)
                mine += update
                expected += update
            assert native[who].exchange(steps)
            theirs[who].exchange(steps)
            for mine, expected in zip(ours[who], theirs[who].arrays, strict=True):
                np.testing.assert_array_equal(mine, expected)
            for mine, expected in zip(center.snapshot().values(), reference.center, strict=True):
                np.testing.assert_array_equal(mine, expected)
        for name, slots in center._read()[1].items():
            for mine, expected in zip(slots.values(), reference.slots[name], strict=True):
                np.testing.assert_array_equal(mine, expected)
        assert center.version == len(schedule)


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("dtype", ["f4", "f8", "f2"])
def test_interleavings(rule, dtype, kernels):
    schedule = [(i * 7 % 3, 1 + i % 4) for i in range(12)]
    shapes = [(3, 5), (700,), (), (0,), (257,)]
    interleave(rule, shapes, [np.dtype(dtype)] * len(shapes), schedule, 3, seed=1)


def test_division_by_the_steps_is_exact():
    """Multiplying by a rounded 1/49 would not give 1 back."""
    theta = np.zeros(100, np.float32)
    center = Center([theta])
    for k in range(1, 200):
        theta += k * np.arange(100, dtype=np.float32)
        center.exchange(k)
    np.testing.assert_array_equal(theta, 199 * np.arange(100, dtype=np.float32))


def test_every_half_value(kernels):
    """All 65,536 patterns to float32 and back; NaN stays NaN, so those are left out of the exchange."""
    bits = np.arange(65536, dtype=np.uint16).view(np.float16)
    halves = bits[np.isfinite(bits)]
    center = Center([halves.copy()])
    np.testing.assert_array_equal(center.snapshot()["array 0"], halves.astype(np.float32))
    back = np.ones_like(halves)
    center.client([back])
    np.testing.assert_array_equal(back.view(np.uint16), halves.view(np.uint16))


def test_rounding_to_half(kernels):
    """Ties, subnormals and overflow of the center's float32 values as NumPy rounds them."""
    rng = np.random.default_rng(0)
    sizes = 10.0 ** rng.uniform(-9, 4.8, 20000)
    values = (sizes * rng.choice([-1, 1], 20000)).astype(np.float32)
    ties = (np.arange(1, 4097) + np.float32(0.5)).astype(np.float32) * np.float32(2.0**-24)
    values = np.concatenate([values, ties, -ties, np.float32([65504, 65519.9, 0, -0.0])])
    center = Center([values.copy()])
    half = np.zeros(values.shape, np.float16)
    center.client([half])
    np.testing.assert_array_equal(half.view(np.uint16), values.astype(np.float16).view(np.uint16))


def test_half_parameters_keep_what_they_cannot_hold():
    """1e-4 is below half's resolution at 1, but 100 pushes of it are not lost at the float32 center."""
    theta = np.ones(64, np.float16)
    center = Center([theta])
    anchor = np.zeros(64, np.float16)
    for _ in range(100):
        theta += np.float16(0.001)
        center.arrays_client.read_anchor(0, anchor)
        pushed = theta.astype(np.float32) - anchor.astype(np.float32)
        before = center.snapshot()["array 0"]
        center.exchange(10)
        np.testing.assert_array_equal(center.snapshot()["array 0"], before + pushed / np.float32(10))
    assert center.snapshot()["array 0"][0] > 1.009


def test_pull_drops_and_peek_keeps():
    theta = np.zeros(1000, np.float32)
    center = Center([theta])
    other = np.zeros(1000, np.float32)
    client = center.client([other])
    other += 3
    client.exchange(1)
    theta += 1
    center.arrays_client.peek()
    np.testing.assert_array_equal(theta, 3)
    theta[:] = 1  # what a look at the center puts back
    center.exchange(1)
    np.testing.assert_array_equal(theta, 4)
    theta += 5
    center.pull()
    center.exchange(1)
    np.testing.assert_array_equal(center.snapshot()["array 0"], 4)


def test_staleness_counts_the_pushes_of_others():
    arrays = [np.zeros(256, np.float32) for _ in range(3)]  # one block each
    center = Center([arrays[0]])
    a, b, c = center.arrays_client, center.client([arrays[1]]), center.client([arrays[2]])
    for who in (a, b, b, c, a):
        who.exchange(1)
    assert [x.stats()["staleness_max"] for x in (a, b, c)] == [3, 1, 3]
    assert a.stats()["staleness_histogram"] == [1, 0, 0, 1]
    assert b.stats()["staleness_mean"] == 0.5
    assert a.stats()["center_version"] == 5


def test_stats():
    center = Center([np.zeros(1000, np.float32), np.zeros(10, np.float16)])
    center.exchange(2)
    center.exchange(2)
    center.pull()
    stats = center.stats()
    assert (stats["exchanges"], stats["pulls"], stats["pushes_refused"]) == (2, 1, 0)
    assert stats["bytes"] == 6 * 4020  # the first pull, two exchanges both ways, one pull
    assert stats["exchange_seconds"] > 0


def test_memory_of_a_worker_is_one_copy(monkeypatch):
    monkeypatch.delenv("HVD_AGN_BLOCK_BYTES")
    arrays = [np.zeros(1_000_000, np.float32), np.zeros(1_000_000, np.float16), np.zeros(5000, np.float64)]
    center = Center(arrays)
    assert sum(a.nbytes for a in arrays) <= center.arrays_client.extra_bytes <= 1.02 * sum(a.nbytes for a in arrays)


def test_threads_of_one_process_conserve():
    arrays = [np.zeros(5000, np.float32) for _ in range(4)]
    center = Center([arrays[0]])
    clients = [center.arrays_client] + [center.client([a]) for a in arrays[1:]]

    def work(array, client):
        for _ in range(200):
            array += 2
            client.exchange(2)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(arrays, clients, strict=True)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    np.testing.assert_array_equal(center.snapshot()["array 0"], 800)


# ---- NaN and Inf


@pytest.mark.parametrize("dtype", ["f4", "f8", "f2"])
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, 1, 255, 256, 998, 999])
def test_a_poisoned_delta_is_refused_whole(dtype, poison, where, kernels):
    good, bad = np.ones(1000, dtype), np.ones(1000, dtype)
    center = Center({"good": good, "bad": bad})
    good += 1
    bad += 1
    bad[where] = poison
    with pytest.warns(NonFiniteWarning, match=r"\[rank 0\] Center: the update of 'bad' has a NaN or an Inf.*1 so far"):
        assert not center.exchange(1)
    assert center.version == 0
    for array in (good, bad, *center.snapshot().values()):
        np.testing.assert_array_equal(array, 1)
    assert center.stats()["pushes_refused"] == 1
    good += 1
    assert center.exchange(1)
    np.testing.assert_array_equal(center.snapshot()["good"], 2)


def test_a_poisoned_delta_raises_if_asked_to():
    theta = np.ones(10, np.float32)
    center = Center([theta], on_nonfinite="raise")
    theta[3] = np.nan
    with pytest.raises(NonFiniteError, match=r"'array 0' has a NaN or an Inf.*left as they are"):
        center.exchange(1)
    assert np.isnan(theta[3])
    assert center.version == 0
    center.pull()
    np.testing.assert_array_equal(theta, 1)


@pytest.mark.parametrize(("dtype", "large"), [("f4", 3e38), ("f8", 1.7e308)])
def test_a_difference_that_overflows_is_refused(dtype, large):
    theta = np.full(600, -large, dtype)
    center = Center([theta])
    theta[77] = large  # finite, but large - -large is not
    with pytest.warns(NonFiniteWarning):
        assert not center.exchange(1)
    assert center.version == 0
    theta[77] = -large / 2  # large values with a finite difference pass
    assert center.exchange(1)
    assert center.snapshot()["array 0"][77] == theta.dtype.type(-large / 2)


def test_arrays_that_no_cache_holds(kernels, monkeypatch):
    """They are written around the cache: the same values at any alignment, and nothing beside them."""
    monkeypatch.setenv("HVD_AGN_BLOCK_BYTES", "")
    sizes, dtypes = [7_000_001, 1_000_003, 5], ["f4", "f8", "f4"]
    rng = np.random.default_rng(2)
    values = [rng.integers(-9, 9, n).astype(t) for n, t in zip(sizes, dtypes, strict=True)]
    around = [np.full(n + 4, 7, t) for n, t in zip(sizes, dtypes, strict=True)]
    inner = [whole[1 + i : 1 + i + n] for i, (whole, n) in enumerate(zip(around, sizes, strict=True))]
    for array, value in zip(inner, values, strict=True):
        array[:] = value
    center = Center(inner, overlap=True)
    other = center.client([value.copy() for value in values])
    for array in other._arrays:
        array += 3
    assert other.exchange(1)
    center.pull()
    for i, (whole, array, value) in enumerate(zip(around, inner, values, strict=True)):
        np.testing.assert_array_equal(array, value + 3)
        assert (whole[: 1 + i] == 7).all()
        assert (whole[1 + i + array.size :] == 7).all()
    center.arrays_client.write_anchor(1, inner[1] + 1)
    assert center.exchange(1)  # from the anchor that the pull has set
    np.testing.assert_array_equal(inner[0], values[0] + 3)
    np.testing.assert_array_equal(inner[1], values[1] + 2)
    center.arrays_client.start(1)  # of the arrays as they are now
    for array in inner:
        array += 5
    assert center.arrays_client.finish()
    assert other.exchange(1)
    assert center.exchange(1)
    np.testing.assert_array_equal(inner[0], values[0] + 8)
    np.testing.assert_array_equal(inner[1], values[1] + 7)


def test_a_rule_that_overflows_leaves_its_block():
    theta = np.full(512, 1.0, np.float32)  # two blocks
    center = Center([theta], rules.Add(scale=1e38))
    theta[0] += 100
    theta[300] += 1e-3
    with pytest.warns(RuleOverflowWarning, match=r"Add\(scale=1e\+38\) overflowed in 1 blocks of the center"):
        assert center.exchange(1)
    values = center.snapshot()["array 0"]
    np.testing.assert_array_equal(values[:256], 1)
    assert values[300] > 1e34
    np.testing.assert_array_equal(theta, values)
    assert center.stats()["blocks_refused"] == 1


def test_clients_must_match():
    center = Center([np.zeros(5, np.float32)])
    with pytest.raises(LayoutError, match=r"shapes \[\(6,\)\], the center's \[\(5,\)\]"):
        center.client([np.zeros(6, np.float32)])
    with pytest.raises(LayoutError, match="array 0 does not match"):
        center.client([np.zeros(5, np.float64)])
    with pytest.raises(LayoutError, match="'array 0' cannot change its shape"):
        center.arrays_client.rebind(0, np.zeros(4, np.float32))
    with pytest.raises(LayoutError, match="array 0 does not match the registered one"):
        center.arrays_client.rebind(0, np.zeros(5, np.float16))
    center.exchange(1)
    assert wide(np.zeros(1, np.float16)).dtype == np.float32
