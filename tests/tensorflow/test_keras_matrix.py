"""Whatever Keras does with an optimizer it does with a wrapped one: the same run, bare and wrapped."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import optimizers
from keras.optimizers import schedules
from keras_runs import MODES, PERIOD, STEPS, agn, compare, data, fit, network, wrap

from hvd_agn.tensorflow import AGNOptimizer

# ---- how Keras runs it


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_every_way_to_fit(mode, overlap):
    compare(lambda: optimizers.AdamW(0.01), overlap=overlap, **MODES[mode])


def loop(how, graph):
    """A custom training loop, handing over gradients in one of the ways that Keras has."""

    def train(model, optimizer):
        model.optimizer = optimizer
        variables = model.trainable_variables
        if how == "apply alone":
            optimizer.build(variables)

        def step(x, y):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((model(x) - y) ** 2)
            gradients = tape.gradient(loss, variables)
            if how == "apply_gradients":
                optimizer.apply_gradients(zip(gradients, variables, strict=True))
            elif how == "apply":
                optimizer.apply(gradients, variables)
            else:
                optimizer.apply(gradients)

        step = tf.function(step) if graph else step
        x, y = data(model)
        for i in 2 * list(range(0, len(x), 4)):
            step(tf.constant(x[i : i + 4]), tf.constant(y[i : i + 4]))
        if isinstance(optimizer, AGNOptimizer):
            optimizer.flush()  # with overlap the last exchange is still under way

    return train


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "function"])
@pytest.mark.parametrize("how", ["apply", "apply alone", "apply_gradients"])
def test_custom_loops(how, graph, overlap):
    _, wrapped = compare(lambda: optimizers.Adam(0.01), train=loop(how, graph), overlap=overlap)
    assert int(wrapped.optimizer.iterations) == 2 * STEPS


def test_variables_of_tensorflow_without_a_model():
    def trained(optimizer):
        variables = [tf.Variable([1.0, 2.0]), tf.Variable(3.0)]
        for _ in range(6):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(variables[0] ** 2) * variables[1]
            optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return [v.numpy() for v in variables]

    for found, expected in zip(trained(wrap(optimizers.Adam(0.1))), trained(optimizers.Adam(0.1)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-7)


# ---- every optimizer

SPECIAL = {"LossScaleOptimizer", "MultiOptimizer", "Optimizer"}  # has to be outside; has a test of its own; abstract
ALL = sorted(
    name
    for name, kind in vars(optimizers).items()
    if isinstance(kind, type) and issubclass(kind, optimizers.Optimizer) and name not in SPECIAL
)


def test_all_optimizers_are_there():
    assert {"Adam", "Ftrl", "Lamb", "Lion", "Muon", "Nadam", "SGD"} <= set(ALL)


@pytest.mark.parametrize("name", ALL)
def test_every_optimizer(name):
    def train(model, optimizer):
        model.compile(optimizer, "mse")
        if name == "ScheduleFreeAdamW":  # built in the trace, as Keras 3.15 builds it, it begins with zeros
            optimizer.build(model.trainable_variables)
        fit(model)

    compare(getattr(optimizers, name), train=train)


def test_several_optimizers_in_one():
    def make():
        by_name = optimizers.OptimizerMap(optimizers.SGD(0.1), {".*bias": optimizers.Adam(0.01)})
        return optimizers.MultiOptimizer(by_name)

    compare(make)


# ---- the learning rate

RATES = {
    "ExponentialDecay": lambda: schedules.ExponentialDecay(0.1, 2, 0.5),
    "CosineDecay": lambda: schedules.CosineDecay(0.1, 10),
    "PiecewiseConstantDecay": lambda: schedules.PiecewiseConstantDecay([4, 8], [0.1, 0.05, 0.01]),
}


@pytest.mark.parametrize("rate", RATES)
def test_schedules(rate):
    compare(lambda: optimizers.SGD(RATES[rate](), momentum=0.9))


class Assigns(keras.callbacks.Callback):
    def on_train_batch_begin(self, batch, logs=None):
        self.model.optimizer.learning_rate = 0.1 / (batch + 1)


@pytest.mark.parametrize(
    "callback",
    [
        lambda: keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.1 / (epoch + 1)),
        lambda: keras.callbacks.ReduceLROnPlateau(monitor="loss", factor=0.5, patience=0, min_delta=10.0),
        Assigns,
    ],
    ids=["LearningRateScheduler", "ReduceLROnPlateau", "assignment"],
)
@pytest.mark.parametrize("scaled", [False, True], ids=["", "LossScale"])
def test_callbacks_that_set_the_learning_rate(callback, scaled):
    def train(model, optimizer):
        fit(model, optimizers.LossScaleOptimizer(optimizer, 8.0) if scaled else optimizer, callbacks=[callback()])

    _, wrapped = compare(lambda: optimizers.SGD(0.2), train=train)
    assert float(agn(wrapped).inner_optimizer.learning_rate) != pytest.approx(0.2)


def test_the_learning_rate_between_fits():
    def train(model, optimizer):
        fit(model, optimizer, 1)
        model.optimizer.learning_rate = 0.02
        fit(model, epochs=1)

    compare(lambda: optimizers.SGD(0.2), train=train)


# ---- what optimizers do besides

OPTIONS = {
    "clipnorm": {"clipnorm": 0.1},
    "global_clipnorm": {"global_clipnorm": 0.1},
    "clipvalue": {"clipvalue": 0.01},
    "weight_decay": {"weight_decay": 0.1},
    "ema": {"use_ema": True, "ema_momentum": 0.5},
    "ema that overwrites": {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 2},
    "loss scale factor": {"loss_scale_factor": 8.0},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_the_wrapped_optimizer(option):
    compare(lambda: optimizers.Adam(0.01, **OPTIONS[option]))


@pytest.mark.parametrize("more", [{}, {"clipnorm": 0.1}, {"use_ema": True, "ema_overwrite_frequency": 2}], ids=str)
def test_accumulated_gradients_are_one_update(more):
    def make():
        return optimizers.SGD(0.1, momentum=0.9, gradient_accumulation_steps=2, **more)

    _, wrapped = compare(make, exchanges=STEPS // PERIOD)
    assert int(wrapped.optimizer.iterations) == STEPS


def test_what_weight_decay_leaves_out():
    def train(model, optimizer):
        optimizer.exclude_from_weight_decay(var_names=["bias"])
        optimizer.exclude_from_weight_decay(var_list=[model.trainable_variables[0]])
        fit(model, optimizer)

    bare, _ = compare(lambda: optimizers.AdamW(0.01, weight_decay=0.5), train=train)
    other = network()
    fit(other, optimizers.AdamW(0.01, weight_decay=0.5))
    assert np.abs(other.get_weights()[0] - bare.get_weights()[0]).max() > 1e-3


@pytest.mark.parametrize("on_epoch", [False, True])
def test_averaged_weights_swapped_in_for_evaluation(on_epoch):
    def train(model, optimizer):
        swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=on_epoch)
        history = fit(model, optimizer, callbacks=[swap], validation_data=data(model))
        model.seen = history.history["val_loss"]

    bare, wrapped = compare(lambda: optimizers.Adam(0.05, use_ema=True, ema_momentum=0.7), train=train)
    np.testing.assert_allclose(wrapped.seen, bare.seen, rtol=1e-6)


def averaging():
    return optimizers.SGD(0.1, use_ema=True, ema_momentum=0.9)


def averaging_by_parts():
    return optimizers.MultiOptimizer(optimizers.OptimizerMap(averaging(), {".*bias": averaging()}))


@pytest.mark.parametrize("make", [averaging, averaging_by_parts])
def test_averages_left_in_the_model_are_not_pushed_as_an_update(make):
    """After the last epoch SwapEMAWeights leaves them there; the two updates of the unfinished period are gone."""
    models = network(), network()
    for model, swaps in zip(models, ([], [keras.callbacks.SwapEMAWeights(swap_on_epoch=True)]), strict=True):
        model.compile(wrap(make()), "mse")
        x, y = data(model, 2 * PERIOD + 2)
        end = len(x) if swaps else 4 * 2 * PERIOD
        model.fit(x[:end], y[:end], batch_size=4, shuffle=False, verbose=0, callbacks=swaps)
    for center, expected in zip(*(m.optimizer.center.snapshot().values() for m in models), strict=True):
        np.testing.assert_array_equal(center, expected)
    for variable, average in averages_of(models[1].optimizer.inner_optimizer):
        np.testing.assert_array_equal(variable.value.numpy(), average.value.numpy())


def averages_of(optimizer):
    parts = getattr(optimizer, "optimizers", [optimizer])
    return [pair for p in parts for pair in zip(p._trainable_variables, p._model_variables_moving_average, strict=True)]


# ---- loss scaling

SCALED = {
    "Adam": lambda: optimizers.Adam(0.01),
    "SGD": lambda: optimizers.SGD(0.1),
    "clip": lambda: optimizers.SGD(0.1, global_clipnorm=0.5),
}


@pytest.mark.parametrize("inner", SCALED)
@pytest.mark.parametrize("overlap", [False, True])
def test_a_loss_scale_outside(inner, overlap):
    compare(SCALED[inner], outside=lambda opt: optimizers.LossScaleOptimizer(opt, 8.0), overlap=overlap)


@pytest.mark.parametrize("mode", ["graph", "eager"])
def test_a_step_that_overflows_is_no_update(mode):
    def train(model, optimizer):
        model.compile(optimizer, "mse", **MODES[mode].get("compiled", {}))
        x, y = data(model, STEPS + 1)
        y[8] = 1e38  # in the third of seven batches
        model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)

    _, wrapped = compare(
        lambda: optimizers.Adam(0.01),
        train=train,
        outside=lambda opt: optimizers.LossScaleOptimizer(opt, 8.0, dynamic_growth_steps=2),
    )
    assert int(wrapped.optimizer.iterations) == 2 * STEPS
