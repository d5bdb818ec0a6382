"""As test_keras_matrix.py, by what is trained: types, embeddings, missing gradients, layers that come and go."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import optimizers
from keras_runs import MODES, PERIOD, STEPS, agn, compare, embedding, fit, network, wrap

# ---- types

POLICIES = ["mixed_float16", "mixed_bfloat16", "float16", "bfloat16", "float64"]


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_and_types(policy):
    keras.config.set_dtype_policy(policy)
    _, wrapped = compare(lambda: optimizers.SGD(0.05, momentum=0.5))
    assert isinstance(wrapped.optimizer, optimizers.LossScaleOptimizer) == (policy == "mixed_float16")
    assert wrapped.trainable_variables[0].dtype == (policy if "mixed" not in policy else "float32")


@pytest.mark.parametrize("overlap", [False, True])
def test_types_side_by_side(overlap):
    def build():
        model = network()
        types = ["float16", "bfloat16", "float64"]
        layers = [
            keras.layers.Dense(3, dtype=each, kernel_initializer=keras.initializers.GlorotUniform(9)) for each in types
        ]
        built = keras.Sequential([*model.layers, *layers])
        built(np.zeros((1, 4), "float32"))
        return built

    def train(model, optimizer):
        model.compile(optimizer, lambda y, out: keras.ops.mean(keras.ops.cast(out, "float32") ** 2))
        fit(model)

    compare(lambda: optimizers.SGD(0.05), build, train, overlap=overlap)


def test_the_scales_of_float8_are_not_exchanged():
    """A scale's gradient is its next value, not a direction: it stays each worker's. (Eagerly Keras itself fails.)"""

    def build():
        model = network()
        for layer in model.layers:
            if isinstance(layer, keras.layers.Dense):
                layer.quantize("float8")
        return model

    _, wrapped = compare(lambda: optimizers.SGD(0.05), build)
    scales = [v for v in wrapped.trainable_variables if v.overwrite_with_gradient]
    assert len(scales) >= 6
    exchanged = wrapped.optimizer.center.snapshot()
    assert len(exchanged) == len(wrapped.trainable_variables) - len(scales)
    assert not any("scale" in name or "amax" in name for name in exchanged)


# ---- sparse gradients, and none

EMBEDDINGS = {
    "SGD": lambda: optimizers.SGD(0.1),
    "Adam": lambda: optimizers.Adam(0.01),
    "Adagrad": lambda: optimizers.Adagrad(0.1),
    "clip": lambda: optimizers.SGD(0.1, global_clipnorm=0.1),
    "accumulation": lambda: optimizers.SGD(0.1, gradient_accumulation_steps=2),
}


@pytest.mark.parametrize("inner", EMBEDDINGS)
@pytest.mark.parametrize("mode", ["graph", "eager"])
def test_embeddings(inner, mode):
    exchanges = (STEPS if inner == "accumulation" else 2 * STEPS) // PERIOD
    compare(EMBEDDINGS[inner], embedding, exchanges=exchanges, **MODES[mode])


def test_an_embedding_that_is_in_copy_on_read_mode():
    """Writing through the value that was read would be lost there, without an error."""

    def train(model, optimizer):
        table = model.layers[0].embeddings.value
        table.scatter_add(tf.IndexedSlices(tf.ones((1, 3)), tf.constant([2])))
        table.sparse_read([1])
        fit(model, optimizer)

    compare(lambda: optimizers.SGD(0.1), embedding, train)


class Unused(keras.Model):
    """Trains one of two variables."""

    def __init__(self, none=False):
        super().__init__()
        self.used = self.add_weight(shape=(4, 2), name="used", initializer=keras.initializers.GlorotUniform(1))
        self.spare = self.add_weight(shape=(3,), name="spare", initializer="ones")
        self.none = none

    def call(self, x):
        return tf.stop_gradient(x @ self.used) if self.none else x @ self.used


def unused(none=False):
    model = Unused(none)
    model.build((None, 4))
    return model


def gradients_of(model):
    x, y = (values[:4] for values in (np.ones((4, 4), "float32"), np.zeros((4, 2), "float32")))
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((model(x) - y) ** 2)
    return tape.gradient(loss, model.trainable_variables)


def test_a_variable_without_gradient_is_warned_of_as_ever():
    def train(model, optimizer):
        model.optimizer = optimizer
        for _ in range(2 * STEPS):
            with pytest.warns(UserWarning, match=r"Gradients do not exist for variables \['unused(_\d)?/spare'\]"):
                optimizer.apply(gradients_of(model), model.trainable_variables)

    compare(lambda: optimizers.SGD(0.1), unused, train)


@pytest.mark.parametrize("accumulate", ["updates", "gradients"])
def test_no_gradient_at_all_is_refused_as_ever(accumulate):
    options = {} if accumulate == "updates" else {"accumulate": accumulate, "rule": None}
    for optimizer in (optimizers.SGD(0.1), wrap(optimizers.SGD(0.1), **options)):
        model = unused(none=True)
        with pytest.raises(ValueError, match=r"^No gradients provided for any variable\.$"):
            optimizer.apply(gradients_of(model), model.trainable_variables)
        optimizer.apply([], [])


# ---- layers that come and go


def test_frozen_layers():
    def train(model, optimizer):
        model.layers[0].trainable = False
        fit(model, optimizer)

    _, wrapped = compare(lambda: optimizers.Adam(0.01), train=train)
    assert len(agn(wrapped).center.snapshot()) == 2
    np.testing.assert_array_equal(wrapped.layers[0].get_weights()[0], network().get_weights()[0])


def test_frozen_on_the_way():
    def train(model, optimizer):
        fit(model, optimizer, 1)
        model.layers[0].trainable = False
        fit(model, optimizer, 1)

    compare(lambda: optimizers.SGD(0.1, momentum=0.9), train=train)


def test_a_variable_that_comes_later_is_refused_as_ever():
    for optimizer in (optimizers.SGD(0.1), wrap(optimizers.SGD(0.1))):
        model = network()
        model.layers[0].trainable = False
        fit(model, optimizer, 1)
        model.layers[0].trainable = True
        with pytest.raises(ValueError, match="Unknown variable"):
            fit(model, optimizer, 1)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_compiled_twice_with_the_same_optimizer(policy):
    def train(model, optimizer):
        fit(model, optimizer, 1)
        fit(model, optimizer, 1)

    keras.config.set_dtype_policy(policy)
    compare(lambda: optimizers.SGD(0.1), train=train)


def test_what_keras_reads_is_the_wrapped_optimizers():
    """And of the wrapper nothing, so that lists of variables have the same order with and without it."""
    bare, wrapped = network(), network()
    fit(bare, optimizers.Adam(0.01, beta_1=0.8, use_ema=True), 1)
    fit(wrapped, wrap(optimizers.Adam(0.01, beta_1=0.8, use_ema=True)), 1)
    assert wrapped.optimizer.beta_1 == 0.8
    assert wrapped.optimizer.use_ema
    with pytest.raises(AttributeError, match="'AGNOptimizer' object has no attribute '_nothing'"):
        _ = wrapped.optimizer._nothing
    wrapped.optimizer.clipnorm = 3.0
    assert wrapped.optimizer.inner_optimizer.clipnorm == 3.0
    values = [v.value.numpy() + 1 for v in bare.optimizer.variables]
    wrapped.optimizer.set_weights(values)
    for found, expected in zip(wrapped.optimizer.inner_optimizer.variables, values, strict=True):
        np.testing.assert_array_equal(found.value.numpy(), expected)
