"""Parameter groups of Keras: several optimizers in one, and variables that are kept out of the weight decay."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import optimizers
from keras.optimizers import schedules
from keras_runs import fit, network

from hvd_agn import rules
from hvd_agn.errors import ConfigError
from hvd_agn.tensorflow import AGNOptimizer, xla


def several(first, second, kept_out=False):
    """Biases have an optimizer of their own."""
    if kept_out:
        first.exclude_from_weight_decay(var_names=["kernel"])
    return optimizers.MultiOptimizer(optimizers.OptimizerMap(first, {".*bias": second}))


def without_decay_of_biases(optimizer):
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    return optimizer


def halving(rate):
    return schedules.ExponentialDecay(rate, 1, 0.5)


CASES = {
    "AdamW": lambda: without_decay_of_biases(optimizers.AdamW(halving(0.1), weight_decay=0.5)),
    "Lion": lambda: without_decay_of_biases(optimizers.Lion(0.01, weight_decay=0.5)),
    "Adam with decay": lambda: without_decay_of_biases(optimizers.Adam(0.01, weight_decay=0.5)),
    "SGD, SGD": lambda: several(optimizers.SGD(0.1), optimizers.SGD(halving(0.4))),
    "SGD, momentum": lambda: several(optimizers.SGD(0.1, 0.9, nesterov=True), optimizers.SGD(0.02)),
    "RMSprop, RMSprop": lambda: several(optimizers.RMSprop(halving(0.1)), optimizers.RMSprop(0.002, 0.5)),
    "Adagrad, Adagrad": lambda: several(
        optimizers.Adagrad(0.1), optimizers.Adagrad(halving(0.5), initial_accumulator_value=0.3)
    ),
    "Adam, AdamW": lambda: several(
        optimizers.AdamW(halving(0.1), weight_decay=0.5), optimizers.Adam(0.02, 0.5, 0.7, weight_decay=0.1), True
    ),
}


def apply(optimizer, steps=6):
    """Eagerly, on variables of their own."""
    random = np.random.default_rng(0)
    shapes = {"one_kernel": (20, 7), "one_bias": (7,), "two_kernel": (3, 2), "two_bias": ()}
    variables = [keras.Variable(random.standard_normal(shape), name=name) for name, shape in shapes.items()]
    for _ in range(steps):
        gradients = [tf.constant(random.standard_normal(v.shape), tf.float32) for v in variables]
        optimizer.apply(gradients, variables)
    return [v.numpy() for v in variables]


def train(optimizer):
    """In a graph."""
    model = network()
    fit(model, optimizer, 1)
    return model.get_weights()


def as_bare(make, run):
    expected = run(make())
    with AGNOptimizer(make(), 1, accumulate="gradients") as optimizer:
        for found, theirs in zip(run(optimizer), expected, strict=True):
            np.testing.assert_allclose(found, theirs, rtol=2e-5, atol=2e-6)
        assert optimizer.center.rule.follows
        assert optimizer.center.groups > 1
        assert optimizer.stats()["exchanges"] == 6


@pytest.mark.parametrize("case", CASES)
def test_the_center_is_the_optimizer(case):
    """With the learning rate that each group had in the update that is pushed."""
    as_bare(CASES[case], apply)


@pytest.mark.parametrize("case", ["AdamW", "SGD, SGD"])
def test_the_center_is_the_optimizer_in_a_graph(case):
    as_bare(CASES[case], train)


def follow_two_rates(jit_compile):
    variables = [tf.Variable(tf.zeros(300), name="kernel"), tf.Variable(0.0, name="bias")]
    chosen = {"kernel": optimizers.SGD(0.5), "bias": optimizers.SGD(2.0)}
    inner = optimizers.MultiOptimizer(lambda variable: chosen[variable.name.removesuffix(":0")])
    with AGNOptimizer(inner, 2, rule=rules.SGD("follow")) as optimizer:

        @tf.function(jit_compile=jit_compile)
        def step():
            optimizer.apply([-tf.ones_like(v) for v in variables], variables)

        for _ in range(4):
            step()
        optimizer.flush()
        # Each period the mean update is the rate, and the center moves by it times the rate.
        kernel, bias = optimizer.center.snapshot().values()
        np.testing.assert_array_equal(kernel, 2 * 0.5**2)
        np.testing.assert_array_equal(bias, 2 * 2.0**2)


def test_one_rule_follows_the_rates_of_several_optimizers():
    follow_two_rates(False)


@pytest.mark.skipif(xla.why_not() is not None, reason=str(xla.why_not()))
def test_where_xla_compiles_the_step():
    follow_two_rates(True)


def test_rules_of_ones_own_for_groups():
    rule = rules.Groups([rules.Add(0.0), rules.Add(1.0)])
    with AGNOptimizer(several(optimizers.SGD(0.1), optimizers.SGD(0.1)), 1, rule=rule) as optimizer:
        moved = apply(optimizer, 3)  # Keras has those that are mapped first, and the default last
    for found, before, after in zip(moved, apply(None, 0), apply(optimizers.SGD(0.1), 3), strict=True):
        np.testing.assert_allclose(found, before if found.ndim < 2 else after)
    with pytest.raises(ConfigError, match=r"2 rules in rules.Groups, 1 parameter groups in the wrapped optimizer"):
        apply(AGNOptimizer(optimizers.SGD(0.1), 1, rule=rule))


def test_optimizers_of_other_kinds_in_one():
    with pytest.raises(ConfigError, match="keep different slots at the center: give rules of one kind"):
        apply(AGNOptimizer(several(optimizers.Adam(), optimizers.SGD(0.1)), accumulate="gradients"))
