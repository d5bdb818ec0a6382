"""rules.like of Keras' optimizers: against Keras, and what it refuses."""

import numpy as np
import pytest
from ranks import on_ranks

from hvd_agn import Center, rules
from hvd_agn.errors import ConfigError

ADAM = {"eps": 1e-7, "bias_correction": "keras"}

# In Keras, and the same rule.
OPTIMIZERS = [
    ("SGD", {}, rules.SGD(0.01)),
    ("SGD", {"learning_rate": 0.1, "momentum": 0.9}, rules.SGD(0.1, 0.9)),
    ("SGD", {"momentum": 0.8, "nesterov": True}, rules.SGD(0.01, 0.8, nesterov=True)),
    ("SGD", {"nesterov": True, "weight_decay": 0.0}, rules.SGD(0.01)),
    ("Adam", {}, rules.Adam(**ADAM)),
    (
        "Adam",
        {"learning_rate": 0.1, "beta_1": 0.5, "beta_2": 0.7, "epsilon": 0.1},
        rules.Adam(0.1, (0.5, 0.7), 0.1, bias_correction="keras"),
    ),
    ("Adam", {"learning_rate": 0.1, "weight_decay": 0.2}, rules.AdamW(0.1, weight_decay=0.2, **ADAM)),
    ("AdamW", {}, rules.AdamW(weight_decay=0.004, **ADAM)),
    (
        "AdamW",
        {"learning_rate": 0.1, "weight_decay": 0.5, "beta_1": 0.0, "epsilon": 0.1},
        rules.AdamW(0.1, (0.0, 0.999), 0.1, 0.5, "keras"),
    ),
    ("Adagrad", {}, rules.Adagrad(1e-3, initial_accumulator_value=0.1, eps=1e-7, eps_inside_root=True)),
    (
        "Adagrad",
        {"learning_rate": 0.1, "initial_accumulator_value": 0.0, "epsilon": 0.1},
        rules.Adagrad(0.1, eps=0.1, eps_inside_root=True),
    ),
    ("RMSprop", {}, rules.RMSprop(1e-3, 0.9, 1e-7, eps_inside_root=True)),
    (
        "RMSprop",
        {"learning_rate": 0.1, "rho": 0.8, "momentum": 0.5, "epsilon": 0.1},
        rules.RMSprop(0.1, 0.8, 0.1, momentum=0.5, eps_inside_root=True),
    ),
    (
        "RMSprop",
        {"learning_rate": 0.1, "epsilon": 0.1, "centered": True},
        rules.RMSprop(0.1, 0.9, 0.1, centered=True, eps_inside_root=True),
    ),
    (
        "RMSprop",
        {"momentum": 0.5, "epsilon": 0.1, "centered": True},
        rules.RMSprop(1e-3, 0.9, 0.1, momentum=0.5, centered=True, eps_inside_root=True),
    ),
    ("Lion", {}, rules.Lion(1e-3)),
    (
        "Lion",
        {"learning_rate": 0.1, "beta_1": 0.5, "beta_2": 0.8, "weight_decay": 0.2},
        rules.Lion(0.1, (0.5, 0.8), 0.2),
    ),
]


@pytest.fixture(scope="module")
def keras(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_HOME", str(tmp_path_factory.mktemp("keras")))  # it writes its settings when imported
        import keras

        yield keras


def compare_with_keras():
    """In float64, 10 pushes; Keras keeps its learning rate, and computes with it, in float32."""
    import keras

    assert keras.config.backend() == "torch"  # of which Keras' other numbers are float64
    for name, arguments, rule in OPTIMIZERS:
        optimizer = getattr(keras.optimizers, name)(**arguments)
        taken = rules.like(optimizer)
        assert rules.like(optimizer, lr=rule.lr) == rule
        assert taken.lr == np.float32(rule.lr)
        rng = np.random.default_rng(0)
        theta = rng.standard_normal(300)
        variable = keras.Variable(theta, dtype="float64")
        with Center([theta], taken) as center:
            for k in range(1, 11):
                gradient = rng.standard_normal(300)
                optimizer.apply([keras.ops.convert_to_tensor(gradient)], [variable])
                theta -= k * gradient
                center.exchange(k)
                np.testing.assert_allclose(theta, variable.value.detach(), rtol=1e-6, atol=1e-6, err_msg=repr(taken))
    return len(OPTIMIZERS)


def test_a_rule_like_an_optimizer_does_what_it_does(tmp_path):
    """In a process of its own, which may choose what Keras runs on."""
    env = {"KERAS_BACKEND": "torch", "KERAS_HOME": str(tmp_path)}
    assert on_ranks(1, compare_with_keras, env=env) == [17]


def test_like_with_changes(keras):
    adam = keras.optimizers.Adam(0.5, beta_1=0.8, clipnorm=3.0)
    like_adam = rules.Adam("follow", (0.8, 0.999), **ADAM, staleness="sqrt", clip_norm=2.0)
    assert rules.like(adam, lr="follow", staleness="sqrt", clip_norm=2.0) == like_adam
    with pytest.raises(ConfigError, match=r"Adam has no momentum. It is Adam\("):
        rules.like(keras.optimizers.Adam(), momentum=0.9)

    class Mine(keras.optimizers.AdamW):
        pass

    assert rules.like(Mine(0.5)) == rules.AdamW(0.5, weight_decay=0.004, **ADAM)


def test_like_takes_a_schedule_as_it_is_now(keras):
    optimizer = keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.5, decay_steps=1, decay_rate=0.5))
    assert rules.like(optimizer) == rules.SGD(0.5)
    optimizer.apply([keras.ops.ones(3)], [keras.Variable(np.zeros(3))])
    assert rules.like(optimizer) == rules.SGD(0.25)
    assert rules.like(keras.optimizers.SGD(lambda: 0.125)) == rules.SGD(0.125)


BY_HAND = "Name the rule yourself"
OR_CLIP = "Give clip_norm= here, which is over all arrays, or name the rule yourself"
DECOUPLED = f"weight_decay=0.1, decoupled from the gradient as Keras has it. {BY_HAND}"


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("SGD", {"clipnorm": 1.0}, f"no rule has SGD's clipnorm=1.0. {OR_CLIP}"),
        ("SGD", {"global_clipnorm": 1.0}, f"no rule has SGD's global_clipnorm=1.0. {OR_CLIP}"),
        ("SGD", {"clipvalue": 1.0}, f"no rule has SGD's clipvalue=1.0. {OR_CLIP}"),
        ("SGD", {"weight_decay": 0.1}, f"no rule has SGD's {DECOUPLED}"),
        ("Adagrad", {"weight_decay": 0.1}, f"no rule has Adagrad's {DECOUPLED}"),
        ("RMSprop", {"weight_decay": 0.1}, f"no rule has RMSprop's {DECOUPLED}"),
        ("Adam", {"amsgrad": True}, f"no rule has Adam's amsgrad=True. {BY_HAND}"),
        ("AdamW", {"amsgrad": True}, f"no rule has AdamW's amsgrad=True. {BY_HAND}"),
        ("Lion", {"use_ema": True}, f"no rule has Lion's use_ema=True. {BY_HAND}"),
        ("SGD", {"gradient_accumulation_steps": 2}, f"no rule has SGD's gradient_accumulation_steps=2. {BY_HAND}"),
        ("Adam", {"loss_scale_factor": 8.0}, f"no rule has Adam's loss_scale_factor=8.0. {BY_HAND}"),
        (
            "Nadam",
            {},
            "knows torch.optim's SGD, Adam, AdamW, Adagrad, RMSprop and Keras' SGD, Adam, AdamW, Adagrad, RMSprop, "
            "Lion, not Nadam. Name the rule yourself",
        ),
    ],
)
def test_like_says_what_no_rule_does(keras, name, arguments, message):
    with pytest.raises(ConfigError, match=message):
        rules.like(getattr(keras.optimizers, name)(**arguments))


def test_like_of_several_optimizers_in_one(keras):
    def several(*parts):
        by_name = {str(i): part for i, part in enumerate(parts)}
        return keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(parts[-1], by_name))

    make = keras.optimizers.SGD
    assert rules.like(several(make(0.5, 0.5), make(0.25))) == rules.Groups([rules.SGD(0.5, 0.5), rules.SGD(0.25)])
    assert rules.like(several(make(0.5), make(0.25)), lr="follow") == rules.SGD("follow")
    with pytest.raises(ConfigError, match=r"Adam\(.*\) and SGD\(.*\) keep different slots at the center"):
        rules.like(several(make(0.5), keras.optimizers.Adam()))
    with pytest.raises(ConfigError, match="MultiOptimizer has no optimizers yet: build it with its variables"):
        rules.like(keras.optimizers.MultiOptimizer(lambda variable: make()))


@pytest.mark.parametrize("kept_out", ["var_names", "var_list"])
def test_like_of_variables_kept_out_of_the_decay(keras, kept_out):
    optimizer = keras.optimizers.AdamW()
    optimizer.exclude_from_weight_decay(**{kept_out: ["bias"] if kept_out == "var_names" else [keras.Variable([0.0])]})
    decayed, kept = (rules.AdamW(1e-3, weight_decay=decay, **ADAM) for decay in (0.004, 0.0))
    assert rules.like(optimizer, lr=1e-3) == rules.Groups([decayed, kept])
    optimizer.weight_decay = 0.0  # then it makes no difference
    assert rules.like(optimizer).weight_decay == 0
