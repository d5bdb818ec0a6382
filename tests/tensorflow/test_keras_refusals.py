"""What is refused, with the name of the thing and the way out; and errors that keep their class."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import optimizers
from keras_runs import PERIOD, data, fit, network, wrap

from hvd_agn import rules
from hvd_agn.errors import (
    ConfigError,
    LayoutError,
    NonFiniteError,
    NonFiniteWarning,
    RuleError,
    StalenessWarning,
    UsageError,
)
from hvd_agn.tensorflow import AGNOptimizer

# ---- optimizers that cannot be inside


def of(module, name="Adam", **attributes):
    return type(name, (), {"__module__": module, **attributes})()


HOROVODS = type("Adam", (optimizers.Adam,), {"__module__": "horovod._keras"})
REFUSED = {
    "an AGNOptimizer": (lambda: AGNOptimizer("sgd"), "is an AGNOptimizer already: wrap the optimizer inside"),
    "a loss scale": (
        lambda: optimizers.LossScaleOptimizer(optimizers.SGD()),
        r"LossScaleOptimizer, which has to be outside: .*leave it to model.compile\(\)",
    ),
    "a loss scale around": (
        lambda: optimizers.LossScaleOptimizer(AGNOptimizer("sgd")),
        "LossScaleOptimizer, which has to be outside",
    ),
    "Horovod's": (HOROVODS, r"is Horovod's horovod._keras.Adam, which averages .*: wrap the optimizer inside it"),
    "tf_keras": (lambda: of("tf_keras.src.optimizers.adam"), "tf_keras.src.* Keras 2: use Keras 3"),
    "nothing": (lambda: None, "a builtins.NoneType: give a keras.optimizers.Optimizer of Keras 3"),
    "TensorFlow 1": (lambda: tf.compat.v1.train.AdamOptimizer(), "AdamOptimizer: give a keras.optimizers.Optimizer"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_optimizers_that_cannot_be_inside(what):
    make, text = REFUSED[what]
    with pytest.raises(TypeError, match=text):
        AGNOptimizer(make())


def test_another_backend():
    done = subprocess.run(
        [sys.executable, "-c", "import hvd_agn.tensorflow"],
        env={**os.environ, "KERAS_BACKEND": "torch"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "ConfigError: hvd_agn.tensorflow needs Keras on TensorFlow, it runs on 'torch'" in done.stderr
    assert "KERAS_BACKEND=tensorflow" in done.stderr


# ---- surroundings

STRATEGY = r"under a tf.distribute strategy, whose place hvd_agn takes: .*outside of strategy.scope\(\)"


def test_a_strategy():
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    optimizer = wrap(optimizers.SGD(0.1))
    with strategy.scope():
        with pytest.raises(ConfigError, match=STRATEGY):
            AGNOptimizer("sgd")
        model = network()
        with pytest.raises(ConfigError, match=STRATEGY):
            optimizer.apply([tf.zeros(v.shape) for v in model.trainable_variables], model.trainable_variables)
    with pytest.raises((ConfigError, LayoutError), match=r"tf.distribute strategy.*outside of"):
        fit(model, optimizer)


def test_variables_of_a_strategy():
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:0"][:1]).scope():
        variable = tf.Variable([1.0])
    with pytest.raises(LayoutError, match=r"belongs to a tf.distribute strategy.*outside of the scope"):
        wrap(optimizers.SGD(0.1)).start([variable])


def test_a_graph_of_tensorflow_1():
    optimizer = wrap(optimizers.SGD(0.1))
    with tf.Graph().as_default():
        variable = tf.Variable([1.0])
        with pytest.raises(UsageError, match=r"a graph of TensorFlow 1: use hvd_agn.tensorflow.compat.v1.AGN"):
            optimizer.apply([tf.constant([1.0])], [variable])


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        (tf.Variable([1, 2], name="whole"), "'whole:0' cannot be exchanged: it is int32; use float32, float64"),
        (tf.Variable([1j], name="complex"), "'complex:0' cannot be exchanged: it is complex128"),
        (tf.Variable([1.0], shape=[None], name="open"), r"'open:0' cannot be exchanged: it has the shape \(None,\)"),
    ],
    ids=["whole", "complex", "open"],
)
def test_variables_that_cannot_be_exchanged(variable, text):
    with pytest.raises(LayoutError, match=text):
        wrap(optimizers.SGD(0.1)).start([variable])


# ---- calls at a wrong time


def test_before_there_is_a_center():
    optimizer = wrap(optimizers.SGD(0.1))
    for call in (optimizer.flush, optimizer.pull, optimizer.center_weights, optimizer.stats, lambda: optimizer.center):
        with pytest.raises(UsageError, match=r"there is no center yet: call start\(\), or train a step"):
            call()
    with pytest.raises(UsageError, match=r"start\(\) before the model has variables: give start\(variables\)"):
        optimizer.start()
    optimizer.close()


@pytest.mark.parametrize("mode", ["graph", "eager"])
def test_after_close(mode):
    model = network()
    fit(model, wrap(optimizers.SGD(0.1)), 1, compiled={"run_eagerly": mode == "eager"})
    model.optimizer.close()
    model.optimizer.close()
    for call in (model.optimizer.flush, model.optimizer.pull, model.optimizer.stats, lambda: fit(model, epochs=1)):
        with pytest.raises(UsageError, match=r"used after close\(\)"):
            call()
    fit(model, model.optimizer.inner_optimizer, 1)


@pytest.mark.parametrize("mode", ["graph", "eager"])
def test_training_while_looking_at_the_center(mode):
    model = network()
    fit(model, wrap(optimizers.SGD(0.1)), 1, compiled={"run_eagerly": mode == "eager"})
    with model.optimizer.center_weights(), pytest.raises(UsageError, match=r"apply\(\) inside center_weights\(\)"):
        fit(model, epochs=1)
    model.optimizer.pull()
    fit(model, epochs=1)


# ---- errors and warnings of an exchange


def fails(center, delta, slots, t):
    raise KeyError("mine")


def in_fit(optimizer, poison=1.0, **compiled):
    model = network()
    model.compile(optimizer, "mse", **compiled)
    x, y = data(model)
    return model.fit(x * poison, y, batch_size=4, verbose=0)


def in_loop(optimizer, poison=1.0, graph=True):
    variable = tf.Variable([1.0, 2.0])

    def step(gradient):
        optimizer.apply_gradients([(gradient, variable)])

    step = tf.function(step) if graph else step
    for _ in range(PERIOD):
        step(tf.constant([1.0, 1.0]) * poison)


RUNS = {
    "fit": in_fit,
    "fit, eager": lambda opt, poison=1.0: in_fit(opt, poison, run_eagerly=True),
    "fit, three at once": lambda opt, poison=1.0: in_fit(opt, poison, steps_per_execution=3),
    "function": in_loop,
    "eager": lambda opt, poison=1.0: in_loop(opt, poison, graph=False),
}


@pytest.mark.parametrize("run", RUNS)
def test_errors_keep_their_class(run):
    with pytest.raises(NonFiniteError, match=r"^\[rank 0\] agn_optimizer\w*: the update of .* has a NaN or an Inf"):
        RUNS[run](wrap(optimizers.SGD(0.1), on_nonfinite="raise"), np.nan)
    with pytest.raises(RuleError, match=r"^\[rank 0\] agn_optimizer\w*: .*KeyError: 'mine'.* stay as they were"):
        RUNS[run](wrap(optimizers.SGD(0.1), rule=rules.Custom(fails)))


@pytest.mark.parametrize("run", RUNS)
def test_warnings_are_warnings(run):
    with pytest.warns(NonFiniteWarning, match="has a NaN or an Inf; this exchange was refused"):
        RUNS[run](wrap(optimizers.SGD(0.1)), np.nan)


def test_too_many_workers_per_period_are_warned_of():
    with pytest.warns(StalenessWarning, match="published runs of AGN diverge"):
        in_fit(AGNOptimizer("sgd", 1, rule=rules.Add(scale=3.0)))


def test_the_trace_that_comes_after_an_error_works():
    """The error came out of Keras' own function, which goes on to be used."""
    model = network()
    model.compile(wrap(optimizers.SGD(0.1), on_nonfinite="raise"), "mse")
    x, y = data(model)
    with pytest.raises(NonFiniteError):
        model.fit(x * np.nan, y, batch_size=4, verbose=0)
    model.optimizer.pull()
    model.fit(x, y, batch_size=4, verbose=0)
    assert np.isfinite(model.get_weights()[0]).all()
    assert isinstance(model.optimizer, keras.optimizers.Optimizer)
