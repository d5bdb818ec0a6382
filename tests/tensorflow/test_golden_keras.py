"""The recorded trajectories of tf.contrib's AGNOptimizer through the Keras optimizer, eagerly.

One worker of each run is Keras'; the others are clients of its center, with local optimizers in NumPy.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from golden import RULES, Local, check_center, close, load, period, runs

from hvd_agn.tensorflow import AGNOptimizer

NAMES = ("x0", "x1")


class Adam(keras.optimizers.Adam):
    """Its bias correction counts a worker's pushes as steps, as the original's does."""

    def __init__(self, every):
        super().__init__(0.01, epsilon=1e-8)
        self.every = every

    def update_step(self, gradient, variable, learning_rate):
        steps = self._iterations
        self._iterations = steps + steps // self.every
        super().update_step(gradient, variable, learning_rate)
        self._iterations = steps


MAKES = {
    "sgd": lambda every: keras.optimizers.SGD(0.1),
    "momentum": lambda every: keras.optimizers.SGD(0.1, 0.9),
    "nesterov": lambda every: keras.optimizers.SGD(0.1, 0.9, nesterov=True),
    "adam": Adam,
    "adagrad": lambda every: keras.optimizers.Adagrad(0.1, initial_accumulator_value=0.1, epsilon=0.0),
    "rmsprop": lambda every: keras.optimizers.RMSprop(0.01, rho=0.9, epsilon=1e-10),
}


def wrapped(inner, every, variables):
    rule = RULES[inner] if inner in ("adam", "rmsprop") else None  # which begin or count otherwise than Keras
    optimizer = AGNOptimizer(MAKES[inner](every), every, accumulate="gradients", rule=rule)
    optimizer.start(variables)
    if inner == "rmsprop":
        for slot in optimizer.inner_optimizer._velocities:
            slot.assign(np.ones(slot.shape))
    return optimizer


def check(optimizer, variables, recorded, prefix, row, local=True):
    native = optimizer._worker.client.native
    for i, variable in enumerate(variables):
        name = variable.name
        if local:
            close(variable.numpy(), recorded[f"{prefix}/local/{name}"][row], f"{prefix} {name} at {row}")
        expected = recorded[f"{prefix}/acc/{name}"][row]
        close(native.accumulator(i).reshape(expected.shape), expected, f"{prefix} accumulator {name} at {row}")


@pytest.mark.parametrize("inner", sorted(RULES))
def test_dense(inner):
    inputs, recorded = load("inputs"), load(f"agn_{inner}_rec")
    initial = [inputs[f"init/{name}"] for name in NAMES]
    for number, run in enumerate(runs(recorded)):
        every, order = period(run), recorded[f"{run}/worker"]
        keras_worker = number % (max(order) + 1)
        variables = [keras.Variable(value, name=name) for name, value in zip(NAMES, initial, strict=True)]
        optimizer = wrapped(inner, every, variables)
        center = optimizer.center
        lr = 0.1 if center.rule.follows else None
        arrays = [[value.copy() for value in initial] for _ in range(max(order) + 1)]
        clients = [center.client(each) for each in arrays]
        local = [Local(inner, each, every) for each in arrays]
        for row, turn in enumerate(order):
            gradients = [inputs[f"rec_grad/{name}"][row] for name in NAMES]
            before = center.snapshot()
            boundary = recorded[f"{run}/local_step"][row] % every == 0
            if turn == keras_worker:
                optimizer.apply([tf.constant(gradient) for gradient in gradients], variables)
                check(optimizer, variables, recorded, run, row)
            else:
                local[turn].step(arrays[turn], gradients)
                clients[turn].accumulate(gradients)
                if boundary:
                    clients[turn].exchange(every, lr=lr)
            check_center(center, before, recorded, run, row, NAMES, boundary)
        optimizer.close()


@pytest.mark.filterwarnings("ignore:Gradients do not exist:UserWarning")  # Keras, of x1
@pytest.mark.parametrize("keras_worker", [0, 1])
@pytest.mark.parametrize("inner", ["sgd", "adam"])
def test_a_gradient_that_is_none(inner, keras_worker):
    """Of x1 at worker 1, all the time: it neither steps, nor pushes nor pulls x1."""
    recorded, inputs, prefix = load("special_none_sparse"), load("inputs"), f"none_{inner}"
    initial = [inputs[f"init/{name}"] for name in NAMES]
    variables = [keras.Variable(value, name=name) for name, value in zip(NAMES, initial, strict=True)]
    optimizer = wrapped(inner, 2, variables)
    arrays = [value.copy() for value in initial]
    client, local = optimizer.center.client(arrays), Local(inner, arrays, 2)
    steps = [0, 0]
    for row, turn in enumerate(recorded[f"{prefix}/order"]):
        gradients = [recorded[f"{prefix}/grad/{name}"][row] for name in NAMES]
        if turn == 1:
            gradients[1] = None
        before = optimizer.center.snapshot()
        steps[turn] += 1
        boundary = steps[turn] % 2 == 0
        if turn == keras_worker:
            given = [None if each is None else tf.constant(each) for each in gradients]
            optimizer.apply(given, variables)
        else:
            local.step(arrays, gradients)
            client.accumulate(gradients)
            if boundary:
                client.exchange(2, lr=0.1 if optimizer.center.rule.follows else None)
        check(optimizer, variables, recorded, f"{prefix}/worker{keras_worker}", row)
        check_center(optimizer.center, before, recorded, f"{prefix}/worker0", row, NAMES, boundary)


@pytest.mark.parametrize("inner", [inner for inner in sorted(RULES) if inner != "nesterov"])
def test_sparse(inner):
    """Sums and center. Keras' own steps differ: slots decay in all rows, a row that comes twice is squared twice."""
    recorded, prefix = load("special_none_sparse"), f"sparse_{inner}"
    variables = [keras.Variable(recorded[f"sparse_init/{name}"], name=name) for name in ("emb", "x1")]
    optimizer = wrapped(inner, 3, variables)
    for row in range(9):
        index, value = (recorded[f"{prefix}/feed/{key}"][row] for key in ("idx", "val"))
        gradient = tf.IndexedSlices(tf.constant(value), tf.constant(index), tf.constant([6, 4]))
        before = optimizer.center.snapshot()
        optimizer.apply([gradient, tf.constant(recorded[f"{prefix}/feed/g1"][row])], variables)
        check(optimizer, variables, recorded, prefix, row, local=inner == "sgd" or row % 3 == 2)
        check_center(optimizer.center, before, recorded, prefix, row, ("emb", "x1"), row % 3 == 2)
