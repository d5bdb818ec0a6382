"""Steps that XLA compiles: an exchange is a custom call there, on the CPU; where it cannot be, an error says so."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from hvd_agn import rules
from hvd_agn.errors import ConfigError, NonFiniteError, RuleError, UsageError
from hvd_agn.tensorflow import AGNOptimizer, xla

PERIOD = 3

if reason := xla.why_not():
    pytest.skip(reason, allow_module_level=True)


def wrap(inner, **options):
    return AGNOptimizer(inner, PERIOD, **{"rule": rules.Add(scale=PERIOD), **options})


def fit(optimizer, **options):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "tanh"), keras.layers.Dense(1)])
    model.compile(optimizer, "mse", jit_compile=True, **options)
    x = np.random.default_rng(0).normal(size=(48, 4)).astype(np.float32)
    model.fit(x, x.sum(1, keepdims=True), batch_size=8, epochs=2, shuffle=False, verbose=0)
    return model.get_weights()


@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("steps", [1, 3])
def test_fit_as_without(steps, scaled):
    def outside(optimizer):
        return keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=8.0) if scaled else optimizer

    bare = fit(outside(keras.optimizers.Adam(0.01)), steps_per_execution=steps)
    with wrap(keras.optimizers.Adam(0.01)) as optimizer:
        for ours, theirs in zip(fit(outside(optimizer), steps_per_execution=steps), bare, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-7)
        assert optimizer.stats()["exchanges"] == 4


def step_of(optimizer, variables):
    """A compiled step that adds its argument."""

    @tf.function(jit_compile=True)
    def step(update):
        optimizer.apply([tf.fill(v.shape, tf.cast(update, v.dtype)) for v in variables], variables)

    return step


def test_every_type_and_a_rate_that_the_rule_follows():
    shapes = {"float32": (5, 7), "float64": (), "float16": (300,), "bfloat16": (3,)}
    variables = [tf.Variable(tf.zeros(shape, dtype)) for dtype, shape in shapes.items()]
    with wrap(keras.optimizers.SGD(0.5), rule=rules.SGD(lr="follow")) as optimizer:
        step = step_of(optimizer, variables)
        for _ in range(2 * PERIOD):
            step(-2.0)
        # Each period: three updates of 1, whose mean is taken by the center times 0.5.
        for value in optimizer.center.snapshot().values():
            np.testing.assert_array_equal(value, 1.0)
        for variable in variables:
            np.testing.assert_array_equal(tf.cast(variable, tf.float64), 1.0)


def test_an_error_keeps_its_class_and_loses_nothing():
    variable = tf.Variable([1.0, 2.0])
    optimizer = wrap(keras.optimizers.SGD(-1.0), on_nonfinite="raise")
    step = step_of(optimizer, [variable])
    step(1.0)
    step(1.0)
    with pytest.raises(NonFiniteError, match="has a NaN or an Inf"):
        step(float("nan"))
    assert np.isnan(variable.numpy()).all()
    np.testing.assert_array_equal(next(iter(optimizer.center.snapshot().values())), [1.0, 2.0])
    optimizer.pull()
    for _ in range(PERIOD):
        step(1.0)  # the error was raised once
    np.testing.assert_array_equal(variable, [4.0, 5.0])
    optimizer.close()
    step(1.0)
    step(1.0)
    with pytest.raises(UsageError, match=r"used after close\(\)"):
        step(1.0)


def fail_once(center, delta, slots, t):
    if not failures:
        failures.append(t)
        raise ValueError("once")
    center += delta


failures = []


def test_an_error_that_is_followed_by_steps_comes_out_all_the_same():
    failures.clear()
    inner = keras.optimizers.SGD(0.01)
    with AGNOptimizer(inner, 1, rule=rules.Custom(fail_once)) as optimizer:
        with pytest.raises(RuleError, match="raised ValueError: once"):
            fit(optimizer, steps_per_execution=3)
        assert optimizer.stats()["exchanges"] == 2


# ---- refused

REFUSED = r"XLA compiles this step, and cannot compile its exchange: {}. Use model.compile\(..., jit_compile=False\)"


@pytest.mark.parametrize(
    ("options", "what"),
    [({"overlap": True}, "overlap=True"), ({"accumulate": "gradients", "rule": None}, "accumulate='gradients'")],
)
@pytest.mark.parametrize("nested", [False, True])
def test_what_xla_cannot_compile(options, what, nested):
    optimizer, variable = wrap(keras.optimizers.SGD(0.1), **options), tf.Variable([1.0])

    def step():
        optimizer.apply([tf.constant([1.0])], [variable])

    with pytest.raises(ConfigError, match=REFUSED.format(f"XLA cannot compile {what}")):
        tf.function(tf.function(step) if nested else step, jit_compile=True)()


def test_a_tensorflow_that_does_not_let_us(monkeypatch):
    monkeypatch.setattr(xla, "why_not", lambda: "XLA of TensorFlow 2.17.1 has another interface")
    with pytest.raises(ConfigError, match=REFUSED.format("XLA of TensorFlow 2.17.1 has another interface")):
        fit(wrap(keras.optimizers.SGD(0.1)))


def test_a_function_that_was_traced_before():
    optimizer, variable = wrap(keras.optimizers.SGD(0.1)), tf.Variable([1.0])
    inner = tf.function(lambda: optimizer.apply([tf.constant([1.0])], [variable]))
    inner()
    with pytest.raises(ConfigError, match="traced before"):
        tf.function(inner, jit_compile=True)()
