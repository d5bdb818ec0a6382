"""A bare Keras optimizer and the same one wrapped, on one rank, where both must do the same.

With one worker and the rule ``Add(scale=period)`` the center moves by ``period * (theta - anchor) / period``, to theta.
"""

from functools import partial

import keras
import numpy as np

from hvd_agn import rules
from hvd_agn.tensorflow import AGNOptimizer

PERIOD = 3
STEPS = 6  # in an epoch: a multiple of the period
MODES = {
    "graph": {},
    "eager": {"compiled": {"run_eagerly": True}},
    "one step per call": {"compiled": {"steps_per_execution": 1}},
    "three steps per call": {"compiled": {"steps_per_execution": 3}},
}


def wrap(optimizer, period=PERIOD, **options):
    return AGNOptimizer(optimizer, period, **{"rule": rules.Add(scale=period), **options})


def network(dtype=None):
    """The same weights each time."""
    dense = partial(keras.layers.Dense, dtype=dtype)
    init = [keras.initializers.GlorotUniform(seed) for seed in (1, 2)]
    return keras.Sequential(
        [
            keras.layers.Input((4,)),
            dense(5, activation="tanh", kernel_initializer=init[0]),
            dense(2, kernel_initializer=init[1]),
        ]
    )


def embedding():
    init = [keras.initializers.GlorotUniform(seed) for seed in (1, 2)]
    return keras.Sequential(
        [
            keras.layers.Input((2,)),
            keras.layers.Embedding(9, 3, embeddings_initializer=init[0]),
            keras.layers.Flatten(),
            keras.layers.Dense(2, kernel_initializer=init[1]),
        ]
    )


def data(model, steps=STEPS, batch=4):
    random = np.random.default_rng(0)
    words = isinstance(model.layers[0], keras.layers.Embedding)
    x = random.integers(0, 9, (steps * batch, 2)) if words else random.normal(size=(steps * batch, 4))
    return x.astype("int32" if words else "float32"), random.normal(size=(steps * batch, 2)).astype("float32")


def fit(model, optimizer=None, epochs=2, *, compiled=None, **options):
    """Compile, unless there is no optimizer, and train without shuffling."""
    if optimizer is not None:
        model.compile(optimizer, "mse", **(compiled or {}))
    x, y = data(model)
    return model.fit(x, y, batch_size=4, epochs=epochs, shuffle=False, verbose=0, **options)


def numbers(model):
    """All that is trained, and the optimizer's variables, by name."""
    variables = [*model.variables, *model.optimizer.variables]
    return {f"{i} {v.path}": v.value.numpy().astype("float64") for i, v in enumerate(variables)}


def agn(model):
    """The model's AGNOptimizer."""
    optimizer = model.optimizer
    return optimizer if isinstance(optimizer, AGNOptimizer) else optimizer.inner_optimizer


def assert_close(model, expected, tolerance=2e-7):
    for (name, found), there in zip(numbers(model).items(), numbers(expected).values(), strict=True):
        np.testing.assert_allclose(found, there, rtol=tolerance, atol=tolerance, err_msg=name)


def compare(optimizer, build=network, train=fit, exchanges=2 * STEPS // PERIOD, outside=lambda opt: opt, **options):
    """Train with the bare optimizer and with the wrapped one.

    Args:
        optimizer: makes it.
        outside: makes of an optimizer the one to compile with.
        options: ``overlap`` and others of the wrapper, the rest for ``train``.
    """
    ours = {key: options.pop(key) for key in ("overlap",) if key in options}
    bare, wrapped = build(), build()
    train(bare, outside(optimizer()), **options)
    train(wrapped, outside(wrap(optimizer(), **ours)), **options)
    assert any(np.abs(a - b).max() > 1e-6 for a, b in zip(bare.get_weights(), build().get_weights(), strict=True))
    assert_close(wrapped, bare)
    assert agn(wrapped).stats()["exchanges"] == exchanges
    return bare, wrapped
