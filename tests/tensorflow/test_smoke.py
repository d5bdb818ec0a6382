"""What has to work in every TensorFlow that we support; `make test-tf` runs this file alone in another one."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from hvd_agn import rules
from hvd_agn.errors import NonFiniteError, UsageError
from hvd_agn.tensorflow import AGNOptimizer

PERIOD = 3


def model():
    keras.utils.set_random_seed(1)
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "tanh"), keras.layers.Dense(1)])


def fit(optimizer, **options):
    made = model()
    made.compile(optimizer, "mse", **options)
    x = np.random.default_rng(0).normal(size=(48, 4)).astype(np.float32)
    made.fit(x, x.sum(1, keepdims=True), batch_size=8, epochs=2, shuffle=False, verbose=0)
    return made.get_weights()


def wrap(inner, **options):
    return AGNOptimizer(inner, PERIOD, **{"rule": rules.Add(scale=PERIOD), **options})


@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}, {"steps_per_execution": 3}], ids=str)
@pytest.mark.parametrize("overlap", [False, True])
def test_fit_as_without(options, overlap):
    with wrap(keras.optimizers.Adam(0.01), overlap=overlap) as optimizer:
        for ours, bare in zip(fit(optimizer, **options), fit(keras.optimizers.Adam(0.01), **options), strict=True):
            np.testing.assert_allclose(ours, bare, atol=2e-7)
        assert optimizer.stats()["exchanges"] == 4


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_every_type_in_a_function(dtype):
    variables = [keras.Variable(np.zeros(shape), dtype=dtype) for shape in [(5, 7), (), (300,), (0,)]]
    with wrap(keras.optimizers.SGD(1.0)) as optimizer:
        optimizer.start(variables)

        @tf.function
        def train():
            optimizer.apply([tf.fill(v.shape, tf.cast(-1.0, dtype)) for v in variables], variables)

        for _ in range(2 * PERIOD + 1):
            train()
        for value in optimizer.center.snapshot().values():
            np.testing.assert_array_equal(value, 2 * PERIOD)
        for variable in variables:
            np.testing.assert_array_equal(tf.cast(variable.value, tf.float64), 2 * PERIOD + 1)
        with optimizer.center_weights():
            np.testing.assert_array_equal(tf.cast(variables[0].value, tf.float64), 2 * PERIOD)
        optimizer.flush()
        assert optimizer.center.version == 3


def test_an_error_keeps_its_class_in_a_function_and_loses_nothing():
    variable = tf.Variable([1.0, 2.0])
    optimizer = wrap(keras.optimizers.SGD(1.0), on_nonfinite="raise")

    @tf.function
    def train(gradient):
        optimizer.apply_gradients([(gradient, variable)])

    train(tf.constant([-1.0, -1.0]))
    train(tf.constant([-1.0, -1.0]))
    with pytest.raises(NonFiniteError, match="has a NaN or an Inf"):
        train(tf.constant([float("nan"), -1.0]))
    np.testing.assert_array_equal(variable, [float("nan"), 5.0])
    np.testing.assert_array_equal(next(iter(optimizer.center.snapshot().values())), [1.0, 2.0])
    optimizer.pull()
    np.testing.assert_array_equal(variable, [1.0, 2.0])
    optimizer.close()
    train(tf.constant([-1.0, -1.0]))
    train(tf.constant([-1.0, -1.0]))
    with pytest.raises(UsageError, match=r"used after close\(\)"):
        train(tf.constant([-1.0, -1.0]))
