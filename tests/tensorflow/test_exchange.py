"""The op's exchange against the reference, bit for bit: values in one place, results in another."""

import threading
import warnings

import numpy as np
import pytest
from exchanges import DTYPES, SHAPES
from mailboxes import at_a_worker, same, wait_until
from overlaps import DOUBLES
from ranks import on_ranks
from reference import FEW_RULES, OverlapClient, ReferenceCenter, ReferenceClient

from hvd_agn import Center, rules
from hvd_agn.errors import NonFiniteWarning, RuleError, RuleOverflowWarning, UsageError

PERIOD = 2


def variables_of(arrays):
    import tensorflow as tf

    return [tf.Variable(a, name=f"v{i}") for i, a in enumerate(arrays)]


def wrap(variables, **options):
    """An optimizer that adds what it is given as gradients, and has a center."""
    import keras

    from hvd_agn.tensorflow import AGNOptimizer

    optimizer = AGNOptimizer(keras.optimizers.SGD(-1.0), PERIOD, **options)
    optimizer.start(variables)
    return optimizer


def compiled(optimizer, variables):
    import tensorflow as tf

    return tf.function(lambda updates: optimizer.apply(updates, variables))


def random(rng, dtypes=DTYPES):
    return [rng.standard_normal(s).astype(t) for s, t in zip(SHAPES, dtypes, strict=True)]


def follow_the_reference(rule, overlap, in_graph, dtypes=DTYPES, **options):
    """A worker on variables and one on plain arrays, in turn."""
    rng = np.random.default_rng(1)
    initial = random(rng, dtypes)
    reference = ReferenceCenter([a.copy() for a in initial], rule)
    kind = OverlapClient if overlap else ReferenceClient
    theirs, their_other = (kind(reference, [a.dtype for a in initial]) for _ in range(2))
    variables = variables_of(initial)
    optimizer = wrap(variables, rule=rule, overlap=overlap, **options)
    apply = compiled(optimizer, variables) if in_graph else lambda updates: optimizer.apply(updates, variables)
    our_other = [a.copy() for a in initial]
    client = optimizer.center.client(our_other)
    for turn in range(1, 13):
        updates = random(rng, dtypes)
        if overlap and turn % PERIOD == 1 and turn > 1:
            wait_until(lambda: optimizer._worker.client.ready, "the exchange in the background")
        apply(updates)
        for array, update in zip(theirs.arrays, updates, strict=True):
            array += update
        if overlap and turn % PERIOD == 1 and turn > 1:
            theirs.finish()
        if turn % PERIOD == 0:
            theirs.start(PERIOD) if overlap else theirs.exchange(PERIOD)
            if overlap:
                wait_until(lambda: optimizer._worker.client.ready, "the exchange in the background")
        if turn % 3 == 0:
            for mine, expected, update in zip(our_other, their_other.arrays, random(rng, dtypes), strict=True):
                mine += update
                expected += update
            client.exchange(3)
            their_other.exchange(3)
        same([v.numpy() for v in variables], theirs.arrays)
    if overlap:
        theirs.finish()
    optimizer.flush()
    same(optimizer.center.snapshot().values(), reference.center)
    assert optimizer.stats()["exchanges"] == 12 // PERIOD
    optimizer.close()


@pytest.mark.parametrize("in_graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("overlap", [False, True], ids=["", "overlap"])
@pytest.mark.parametrize("rule", FEW_RULES, ids=repr)
def test_as_the_reference(rule, overlap, in_graph):
    follow_the_reference(rule, overlap, in_graph)


@pytest.mark.parametrize("rule", [rules.Add(), rules.Adam(0.1), rules.Elastic(0.3)], ids=repr)
def test_more_than_a_cache_holds_as_in_place(rule, kernels, monkeypatch):
    """There results go past the cache, first to new memory, then to what the variables have vacated."""
    import tensorflow as tf

    monkeypatch.setenv("HVD_AGN_BLOCK_BYTES", str(1 << 18))
    dtypes = ["f4", "f4", "f8", "f2", tf.bfloat16.as_numpy_dtype]
    shapes = [(3_000_003,), (7,), (1_500_001,), (5_000_003,), (700_001,)]
    rng = np.random.default_rng(1)
    initial = [rng.standard_normal(s).astype(t) for s, t in zip(shapes, dtypes, strict=True)]
    assert sum(a.nbytes for a in initial) > 32 << 20
    variables, arrays = variables_of(initial), [a.copy() for a in initial]
    optimizer, center = wrap(variables, rule=rule), Center(arrays, rule)
    apply = compiled(optimizer, variables)
    for _ in range(4):
        for _ in range(PERIOD):
            updates = [rng.standard_normal(s).astype(t) for s, t in zip(shapes, dtypes, strict=True)]
            apply(updates)
            for array, update in zip(arrays, updates, strict=True):
                array += update
        center.exchange(PERIOD)
        same([v.numpy() for v in variables], arrays)
        same(list(optimizer.center.snapshot().values()), list(center.snapshot().values()))
    assert optimizer.stats()["exchanges"] == 4


def follow_by_mailbox(host):
    for number, rule in enumerate(FEW_RULES):
        overlap = number % 2 == 1
        dtypes = DOUBLES if rule.gap_aware else DTYPES  # whose mirror does not know how a worker rounds
        names = {f"v{i}:0": a for i, a in enumerate(random(np.random.default_rng(1), dtypes))}
        host._post("center", names, rule, {"transport": "mailbox", "overlap": overlap})
        follow_the_reference(rule, overlap, True, dtypes, transport="mailbox")
    return "checked"


def test_by_mailbox_as_the_reference(tmp_path):
    assert on_ranks(2, at_a_worker_of_variables, str(tmp_path)) == [None, "checked"]


def at_a_worker_of_variables(folder):
    return at_a_worker(folder, follow_by_mailbox)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_a_value_that_was_read_stays(sparse):
    """Whatever buffers the variables get; after a sparse update they copy when they are read."""
    import tensorflow as tf

    variables = variables_of([np.zeros((100, 8), "f4")])
    optimizer = wrap(variables)
    update = tf.IndexedSlices(tf.ones((1, 8)), tf.constant([3]), (100, 8)) if sparse else tf.ones((100, 8))
    apply = tf.function(lambda: optimizer.apply([update], variables))
    read = []
    for step in range(1, 6 * PERIOD + 1):
        apply()
        read.append((variables[0].read_value(), step))
        if step % 3 == 0:
            del read[0]  # whose buffer may be used again
    for value, step in read:
        pushed = step // PERIOD + step % PERIOD  # the center takes the mean of a period's updates
        np.testing.assert_array_equal(value[3], pushed)
        np.testing.assert_array_equal(value[4], 0 if sparse else pushed)


# ---- what an exchange leaves as it is, and what it refuses


def test_a_refused_update_sets_the_variables_to_the_center():
    variables = variables_of([np.ones(300, "f4"), np.ones(5, "f8")])
    optimizer = wrap(variables)
    apply = compiled(optimizer, variables)
    apply([np.full(300, 3, "f4"), np.ones(5)])
    with pytest.warns(NonFiniteWarning, match="'v0:0'"):
        apply([np.full(300, np.nan, "f4"), np.ones(5)])
    same([v.numpy() for v in variables], [np.ones(300), np.ones(5)])
    assert optimizer.stats()["pushes_refused"] == 1
    apply([np.ones(300, "f4"), np.ones(5)])
    apply([np.ones(300, "f4"), np.ones(5)])
    same(optimizer.center.snapshot().values(), [np.full(300, 2), np.full(5, 2)])


def test_an_update_that_is_far_out_is_refused():
    variables = variables_of([np.ones(300, "f4"), np.ones(100, "f8")])
    optimizer = wrap(variables, max_norm=20.0)
    apply = compiled(optimizer, variables)
    for amount in (1.0, 1.0, 1.01):  # the mean of two has a norm of 20
        apply([np.full(300, amount, "f4"), np.full(100, amount)])
    with pytest.warns(NonFiniteWarning, match=r"the update has a norm of 20\.2, above max_norm=20\.0"):
        apply([np.full(300, 1.01, "f4"), np.full(100, 1.01)])
    same([v.numpy() for v in variables], [np.full(300, 2), np.full(100, 2)])
    assert optimizer.stats()["pushes_refused"] == 1


def test_a_warning_that_is_an_error_comes_out_and_the_variables_are_the_centers():
    variables = variables_of([np.ones(300, "f4")])
    optimizer = wrap(variables)
    apply = compiled(optimizer, variables)
    apply([np.ones(300, "f4")])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(NonFiniteWarning):
            apply([np.full(300, np.inf, "f4")])
    same([v.numpy() for v in variables], [np.ones(300)])
    assert int(optimizer._since) == 0


def test_blocks_that_overflow_stay_and_the_others_move():
    variables = variables_of([np.full(256, 3.2e38, "f4"), np.ones(256, "f4")])
    optimizer = wrap(variables, rule=rules.Add(scale=4))
    apply = compiled(optimizer, variables)
    apply([np.full(256, 9e36, "f4"), np.ones(256, "f4")])
    with pytest.warns(RuleOverflowWarning, match="overflowed in 1 blocks"):
        apply([np.full(256, 9e36, "f4"), np.ones(256, "f4")])
    expected = [np.full(256, 3.2e38, "f4"), np.full(256, 5, "f4")]
    same([v.numpy() for v in variables], expected)
    same(optimizer.center.snapshot().values(), expected)


def fail_where_there_is_a_seven(center, delta, slots, t):
    if (delta == 7).any():
        raise ValueError("seven")
    center += delta


def test_a_function_that_fails_in_some_blocks_loses_nothing():
    """Those blocks keep their steps in the variables; the error comes out when the others are exchanged."""
    variables = variables_of([np.zeros(256, "f4"), np.zeros(256, "f4"), np.zeros(256, "f4")])
    optimizer = wrap(variables, rule=rules.Custom(fail_where_there_is_a_seven))
    apply = compiled(optimizer, variables)
    apply([np.full(256, x, "f4") for x in (1, 7, 3)])
    with pytest.raises(RuleError, match="raised ValueError: seven"):
        apply([np.full(256, x, "f4") for x in (1, 7, 3)])
    same([v.numpy() for v in variables], [np.full(256, x) for x in (1, 14, 3)])
    same(optimizer.center.snapshot().values(), [np.full(256, x) for x in (1, 0, 3)])
    assert int(optimizer._since) == PERIOD
    apply([np.full(256, x, "f4") for x in (0, 1, 0)])  # at once, and the middle block with all of its steps
    same(optimizer.center.snapshot().values(), [np.full(256, x) for x in (1, 5, 3)])
    assert int(optimizer._since) == 0


def test_gradients_leave_variables_without_one_alone():
    import keras
    import tensorflow as tf

    from hvd_agn.tensorflow import AGNOptimizer

    variables = variables_of([np.zeros(10, "f4"), np.zeros(300, "f2"), np.zeros(7, "f8")])
    optimizer = AGNOptimizer(keras.optimizers.SGD(0.5), PERIOD, accumulate="gradients", rule=rules.SGD(1.0))
    optimizer.start(variables)
    apply = tf.function(lambda gradients: optimizer.apply(gradients, variables[:2]))
    other = [np.zeros(10, "f4"), np.zeros(300, "f2"), np.zeros(7, "f8")]
    rival = optimizer.center.client(other)
    rival.accumulate([np.full_like(a, -1) for a in other])
    rival.exchange(1)
    for _ in range(PERIOD):
        apply([np.full(10, -2, "f4"), np.full(300, -4, "f2")])
    same([v.numpy() for v in variables], [np.full(10, 3), np.full(300, 5), np.zeros(7)])
    same(optimizer.center.snapshot().values(), [np.full(10, 3), np.full(300, 5), np.ones(7)])


def test_gradients_of_several_steps_in_one_function_stay_apart():
    """Constant gradients, which nothing but their order ties to the variables."""
    import keras
    import tensorflow as tf

    from hvd_agn.tensorflow import AGNOptimizer

    variables = variables_of([np.zeros(10, "f4")])
    optimizer = AGNOptimizer(keras.optimizers.SGD(0.5), 1, accumulate="gradients", rule=rules.SGD(1.0, momentum=0.5))
    optimizer.start(variables)

    @tf.function
    def six():
        for step in range(6):
            optimizer.apply([tf.fill([10], -float(step))], variables)

    for _ in range(20):
        optimizer.center._native.write([[np.zeros(10, "f4")], [np.zeros(10, "f4")]], 0, 0)
        optimizer.pull()
        six()
        expected = momentum = 0.0
        for step in range(6):
            momentum = momentum * 0.5 - step
            expected -= momentum
        np.testing.assert_array_equal(variables[0], expected)


@pytest.mark.parametrize(("push_on_error", "expected"), [(False, 1), (True, 11)])
def test_with_that_an_error_leaves_pushes_only_if_asked_to(push_on_error, expected):
    variables = variables_of([np.zeros(3, "f4")])
    optimizer = wrap(variables, push_on_error=push_on_error)
    optimizer.apply([np.ones(3, "f4")], variables)
    other = np.zeros(3, "f4")
    client = optimizer.center.client([other])
    other += 10
    client.exchange(1)
    with pytest.raises(ZeroDivisionError), optimizer:
        raise ZeroDivisionError
    same([v.numpy() for v in variables], [np.full(3, expected)])


# ---- calls where they make no sense, and several at once


def test_calls_inside_a_function_are_refused():
    import tensorflow as tf

    variables = variables_of([np.zeros(3, "f4")])
    optimizer = wrap(variables)

    def look():
        with optimizer.center_weights():
            pass

    for call, name in (optimizer.flush, "flush"), (optimizer.pull, "pull"), (look, "center_weights"):
        with pytest.raises(UsageError, match=rf"{name}\(\) inside a tf.function would run once"):
            tf.function(call)()


def test_threads_take_turns():
    variables = variables_of([np.full(5000, 7, "f4"), np.full(3, 7, "f8")])
    optimizer = wrap(variables)
    errors = []

    def exchange():
        try:
            for _ in range(200):
                optimizer._through("pull")
                optimizer._through("exchange")
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=exchange) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    same([v.numpy() for v in variables], [np.full(5000, 7), np.full(3, 7)])


def test_a_call_from_within_an_exchange_is_an_error():
    variables = variables_of([np.zeros(3, "f4")])
    optimizer, seen = None, []

    def look(center, delta, slots, t):
        try:
            optimizer.pull()
        except UsageError as error:
            seen.append(str(error))
        center += delta

    optimizer = wrap(variables, rule=rules.Custom(look))
    apply = compiled(optimizer, variables)
    apply([np.full(3, 1, "f4")])
    apply([np.full(3, 1, "f4")])
    assert len(seen) == 1
    assert "its own exchange" in seen[0]
    same(optimizer.center.snapshot().values(), [np.ones(3)])


def fail_at_length(center, delta, slots, t):
    raise ValueError("long " * 2000)


def test_a_long_text_keeps_its_error():
    variables = variables_of([np.zeros(3, "f4")])
    apply = compiled(wrap(variables, rule=rules.Custom(fail_at_length)), variables)
    apply([np.ones(3, "f4")])
    with pytest.raises(RuleError, match="long long"):
        apply([np.ones(3, "f4")])
