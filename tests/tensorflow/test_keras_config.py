"""Arguments, configurations and copies of an AGNOptimizer."""

import copy
import json
import pickle

import keras
import numpy as np
import pytest
from keras import optimizers
from keras_runs import fit, network, wrap

from hvd_agn import rules
from hvd_agn.errors import ConfigError, UsageError
from hvd_agn.tensorflow import AGNOptimizer

RULES = [
    None,
    rules.Add(scale=0.5, staleness="inverse", clip_norm=2.0),
    rules.SGD(0.7, momentum=0.9, nesterov=True),
    rules.Adam("follow", betas=(0.8, 0.99), bias_correction="keras"),
    rules.AdamW(weight_decay=0.1, gap_aware=True),
    rules.Adagrad(),
    rules.RMSprop(centered=True, momentum=0.5),
    rules.Lion(),
    rules.DelayedNesterov(lr=0.7, momentum=0.9, every=2),
    rules.Elastic(0.5),
    rules.Groups([rules.AdamW("follow"), rules.AdamW("follow", weight_decay=0.0)]),
]
OPTIONS = {
    "normalize": False,
    "accumulate": "gradients",
    "overlap": True,
    "center_ranks": (np.int64(0),),
    "transport": "mailbox",
    "wire_dtype": "bf16",
    "on_nonfinite": "raise",
    "max_norm": 1e6,
    "push_on_error": True,
    "name": "mine",
}


def again(optimizer):
    """Through a file's text."""
    return optimizers.deserialize(json.loads(json.dumps(optimizers.serialize(optimizer))))


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_rules_survive(rule):
    optimizer = again(AGNOptimizer(optimizers.Adam(0.01, beta_1=0.8), 7, rule=rule))
    assert isinstance(optimizer, AGNOptimizer)
    assert optimizer._settings.rule == rule
    assert optimizer.communication_period == 7
    assert isinstance(optimizer.inner_optimizer, optimizers.Adam)
    assert optimizer.inner_optimizer.beta_1 == 0.8


def test_all_options_survive_and_a_comm_does_not():
    first = AGNOptimizer(optimizers.SGD(schedule := optimizers.schedules.CosineDecay(0.1, 9)), **OPTIONS, comm="any")
    config = first.get_config()
    second = again(first)
    assert second.get_config() == config
    assert second._settings.comm is None
    for name, value in OPTIONS.items():
        found = getattr(second._settings, name)
        assert (tuple(found) if name == "center_ranks" else found) == value
    assert set(config) == {"optimizer", "communication_period", "rule", *OPTIONS}
    assert second.inner_optimizer._learning_rate.get_config() == schedule.get_config()
    assert first.get_config() == AGNOptimizer.from_config(config).get_config() == config  # from_config changes nothing


def test_a_function_as_rule_is_not_for_configurations_but_for_weights(tmp_path):
    def add(center, delta, slots, t):
        center += delta

    model = network()
    fit(model, AGNOptimizer("sgd", 4, rule=rules.Custom(add)), 1)
    with pytest.raises(ConfigError, match=r"Custom\(fn=.*add.* no configuration can hold: save the weights"):
        model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    with pytest.raises(ConfigError, match=r"no rule 'Nonsense' in hvd_agn\.rules"):
        AGNOptimizer.from_config(
            {"optimizer": optimizers.serialize(optimizers.SGD()), "rule": {"class_name": "Nonsense", "config": {}}}
        )


def test_names_and_configurations_of_optimizers():
    assert isinstance(AGNOptimizer("adam").inner_optimizer, optimizers.Adam)
    inner = AGNOptimizer(optimizers.serialize(optimizers.SGD(0.3, momentum=0.5))).inner_optimizer
    assert (float(inner.learning_rate), inner.momentum) == (pytest.approx(0.3), 0.5)
    with pytest.raises(ValueError, match="Could not interpret optimizer identifier: nonsense"):
        AGNOptimizer("nonsense")


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
@pytest.mark.parametrize("started", [False, True])
def test_copies_are_refused(duplicate, started):
    model, optimizer = network(), wrap(optimizers.SGD(0.1))
    if started:
        fit(model, optimizer, 1)
    with pytest.raises(UsageError, match=r"cannot be copied or pickled.*AGNOptimizer.from_config"):
        duplicate(optimizer)


def test_a_pickled_model_has_an_optimizer_of_its_own():
    model = network()
    fit(model, wrap(optimizers.SGD(0.1)), 1)
    twin = pickle.loads(pickle.dumps(model))
    for ours, theirs in zip(model.get_weights(), twin.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    fit(twin, epochs=1)
    assert twin.optimizer.center is not model.optimizer.center


BAD = {
    "communication_period": [0, 1.5, True, "3"],
    "rule": ["add", rules.Add],
    "accumulate": ["grads", None],
    "wire_dtype": ["fp8"],
    "on_nonfinite": ["ignore"],
    "max_norm": [0, -1.0, True, "1"],
    "push_on_error": ["yes"],
    "transport": ["tcp"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_bad_arguments_are_refused_at_once(name, value):
    with pytest.raises(ConfigError, match=rf"{name}={value!r}: give".replace("(", r"\(").replace(")", r"\)")):
        AGNOptimizer("sgd", **{name: value})


def test_bad_arguments_that_need_the_ranks_are_refused_at_the_start():
    with pytest.raises(ConfigError, match=r"center_ranks=\[1\]: give 'nodes', or different ranks from 0 to 0"):
        fit(network(), AGNOptimizer("sgd", center_ranks=[1]))
    with pytest.raises(ConfigError, match="comm='world': give an mpi4py communicator"):
        fit(network(), AGNOptimizer("sgd", comm="world"))


@pytest.mark.parametrize("option", [{"loss_scale_factor": 8.0}, {"gradient_accumulation_steps": 2}], ids=str)
def test_gradients_are_not_summed_where_they_are_not_updates(option):
    with pytest.raises(ConfigError, match="accumulate='gradients' sums gradients as they come"):
        AGNOptimizer(keras.optimizers.SGD(0.1, **option), accumulate="gradients")


def test_parts_that_accumulate_are_refused():
    """Keras counts the calls of a MultiOptimizer, and its parts the updates."""
    part = optimizers.SGD(0.1, gradient_accumulation_steps=2)
    several = optimizers.MultiOptimizer(optimizers.OptimizerMap(optimizers.SGD(0.1), {".*bias": part}))
    with pytest.raises(ConfigError, match="leave gradient_accumulation_steps of its optimizers out"):
        AGNOptimizer(several)
