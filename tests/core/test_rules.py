"""Rules: against torch's optimizers, what they take over from a push, and what they refuse. Keras: test_rules_keras."""

import math
import warnings

import numpy as np
import pytest
import torch
from mailboxes import at_a_worker
from ranks import on_ranks
from reference import ReferenceCenter, ReferenceClient
from torch import nn

from hvd_agn import Center, presets, rules
from hvd_agn.errors import ConfigError, StalenessWarning, UsageError
from hvd_agn.torch import AGNOptimizer

# ---- what torch does with the gradient -delta

TORCH = [
    (rules.SGD(0.1), lambda p: torch.optim.SGD(p, 0.1)),
    (
        rules.SGD(0.1, 0.9, dampening=0.2, weight_decay=0.3),
        lambda p: torch.optim.SGD(p, 0.1, 0.9, dampening=0.2, weight_decay=0.3),
    ),
    (rules.SGD(0.1, 0.9, nesterov=True), lambda p: torch.optim.SGD(p, 0.1, 0.9, nesterov=True)),
    (rules.Adam(), torch.optim.Adam),
    (
        rules.Adam(0.1, (0.5, 0.7), 1e-2, 0.1),
        lambda p: torch.optim.Adam(p, 0.1, (0.5, 0.7), 1e-2, 0.1),
    ),
    (rules.AdamW(), torch.optim.AdamW),
    (rules.AdamW(0.1, weight_decay=0.5), lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.5)),
    (rules.Adagrad(), torch.optim.Adagrad),
    (rules.Adagrad(0.1, 0.3, 0.2, 0.1, 1e-3), lambda p: torch.optim.Adagrad(p, 0.1, 0.3, 0.2, 0.1, 1e-3)),
    (rules.RMSprop(), torch.optim.RMSprop),
    (
        rules.RMSprop(0.1, 0.8, 1e-2, 0.1, momentum=0.5, centered=True),
        lambda p: torch.optim.RMSprop(p, 0.1, 0.8, 1e-2, 0.1, momentum=0.5, centered=True),
    ),
]


@pytest.mark.parametrize(("rule", "make"), TORCH, ids=[repr(rule) for rule, _ in TORCH])
def test_a_rule_is_the_optimizer_of_that_name(rule, make):
    """In float64, 30 pushes, the defaults among them: to rounding; the slots are the optimizer's state."""
    rng = np.random.default_rng(0)
    theta = rng.standard_normal(300)
    parameter = nn.Parameter(torch.from_numpy(theta.copy()))
    optimizer = make([parameter])
    with Center([theta], rule) as center:
        for k in range(1, 31):
            update = rng.standard_normal(300)
            parameter.grad = torch.from_numpy(-update)
            theta += k * update
            center.exchange(k)
            optimizer.step()
            np.testing.assert_allclose(theta, parameter.detach(), rtol=1e-11, atol=1e-12)
        slots = center._read()[1]
    state = optimizer.state[parameter]
    for name in rule.active_slots():
        found = state["momentum_buffer" if name == "momentum" else name]
        np.testing.assert_allclose(slots[name]["array 0"], found, rtol=1e-10, atol=1e-12)


def test_lion_moves_by_its_learning_rate():
    theta = np.array([1.0, -2.0, 3.0])
    with Center([theta], rules.Lion(0.25, weight_decay=0.1)) as center:
        theta += [5.0, -0.001, 0.0]
        center.exchange(1)
        np.testing.assert_allclose(theta, [1 * 0.975 + 0.25, -2 * 0.975 - 0.25, 3 * 0.975])


def test_delayed_nesterov_by_hand():
    theta = np.zeros(1)
    with Center([theta], rules.DelayedNesterov(1.0, 0.5, every=2)) as center:
        at = []
        for _ in range(4):
            theta += 4.0  # g = -4
            center.exchange(1)
            at.append(theta[0])
    # 4/2; then m = -4 and 0.5 * 4 + 2; 2; then m = -6 and 3 + 2.
    assert at == [2.0, 6.0, 8.0, 13.0]


def test_elastic_keeps_the_distance():
    """Worker and center move towards each other by the same amount; two workers stay apart."""
    one, two = np.zeros(3, "f4"), np.zeros(3, "f4")
    with Center([one], rules.Elastic(0.25)) as center:
        client = center.client([two])
        one += 8
        center.exchange(1)
        np.testing.assert_array_equal(one, 6)
        np.testing.assert_array_equal(center.snapshot()["array 0"], 2)
        two -= 2
        client.exchange(5)  # however many steps
        np.testing.assert_array_equal(two, -1)
        np.testing.assert_array_equal(center.snapshot()["array 0"], 1)


# ---- staleness, norm, learning rate


def clip(make):
    """Both ways of pushing, several arrays and blocks, against the reference; a small delta goes as it is."""
    rng = np.random.default_rng(0)
    for dtypes in (["f4", "f8", "f2"], ["f4"] * 3, ["f2"] * 3):
        rule = rules.SGD(0.5, 0.9, clip_norm=2.0)
        initial = [rng.standard_normal(n).astype(t) for n, t in zip((700, 5, 300), dtypes, strict=True)]
        reference = ReferenceCenter(initial, rule)
        worker = ReferenceClient(reference, [a.dtype for a in initial])
        arrays = [a.copy() for a in initial]
        center = make(arrays, rule)
        for size in (1.0, 1e-3, 30.0):
            for array, expected in zip(arrays, worker.arrays, strict=True):
                update = (size * rng.standard_normal(array.shape)).astype(array.dtype)
                array += update
                expected += update
            before = center.snapshot()
            center.exchange(3)
            worker.exchange(3)
            for value, expected in zip(center.snapshot().values(), reference.center, strict=True):
                np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
            if size == 1.0:  # the first: the center moves by lr times the clipped delta
                moved = [value - before[name] for name, value in center.snapshot().items()]
                assert math.isclose(math.sqrt(sum(float(np.square(m).sum()) for m in moved)), 1.0, rel_tol=1e-5)


def test_clip_norm(kernels):
    clip(Center)


def follow_a_scheduler(make):
    theta = np.zeros(300)
    center = make([theta], rules.SGD("follow"))
    for lr in (1.0, 0.5, 0.0, 2.0):
        before = center.snapshot()["array 0"]
        theta += 3
        center.exchange(3, lr=lr)
        np.testing.assert_array_equal(center.snapshot()["array 0"] - before, lr)
    with pytest.raises(UsageError, match=r"SGD\(lr='follow'.* needs the worker's learning rate: give lr="):
        center.exchange(3)
    for lr in (float("nan"), float("inf"), -1.0, "1"):
        with pytest.raises(UsageError, match=f"lr={lr!r}: give a finite number, 0 or more"):
            center.exchange(3, lr=lr)


def by_mailbox(folder):
    return at_a_worker(folder, lambda host: (clip(host.center), follow_a_scheduler(host.center)) and "done")


def test_what_a_push_brings_by_mailbox(tmp_path):
    assert on_ranks(2, by_mailbox, str(tmp_path)) == [None, "done"]


def test_a_rule_follows_the_learning_rate_of_the_push():
    follow_a_scheduler(Center)
    with (
        Center([np.zeros(3)], rules.SGD(0.1)) as center,
        pytest.raises(UsageError, match="has its own learning rate: no lr="),
    ):
        center.exchange(1, lr=0.1)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_rule_follows_the_scheduler_of_an_optimizer(overlap):
    p = nn.Parameter(torch.zeros(300))
    opt = AGNOptimizer(torch.optim.SGD([p], lr=1.0), 2, rule=rules.SGD("follow"), overlap=overlap)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    p.grad = torch.full_like(p, -1.0)
    expected = 0.0
    for lr in (1.0, 0.5, 0.25):
        opt.step()
        opt.step()
        opt.flush()
        expected += lr * lr  # the mean step is lr
        np.testing.assert_allclose(opt.center.snapshot()["param_groups[0].params[0]"], expected)
        scheduler.step()


def test_a_rule_follows_the_learning_rates_there_were():
    (p,) = parameters()
    opt = AGNOptimizer(torch.optim.SGD([p], lr=1.0), 1, rule=rules.SGD("follow"))
    opt.param_groups.append({**opt.param_groups[0], "params": [], "lr": 0.5})
    p.grad = torch.ones(3)
    with pytest.raises(ConfigError, match=r"AGNOptimizer: .* rates of 1 parameter groups, the wrapped optimizer has 2"):
        opt.step()
    rateless = torch.optim.SGD(parameters(), lr=1.0)
    del rateless.param_groups[0]["lr"]
    with pytest.raises(ConfigError, match=r"rates of 1 parameter groups, the wrapped optimizer has 0: give the rule a"):
        AGNOptimizer(rateless, 1, rule=rules.SGD("follow"))


# ---- the rule of an optimizer, and presets


def parameters(n=1):
    return [nn.Parameter(torch.zeros(3)) for _ in range(n)]


@pytest.mark.parametrize(("rule", "make"), TORCH, ids=[repr(rule) for rule, _ in TORCH])
def test_like_takes_over_the_hyper_parameters(rule, make):
    assert rules.like(make(parameters())) == rule


def test_like_with_changes():
    adam = torch.optim.Adam(parameters(), lr=0.5, betas=(0.8, 0.9))
    assert rules.like(adam, lr="follow", staleness="sqrt") == rules.Adam("follow", (0.8, 0.9), staleness="sqrt")
    assert rules.like(torch.optim.SGD(parameters(), lr=torch.tensor(0.5))) == rules.SGD(0.5)
    assert rules.like(torch.optim.Adam(parameters(), decoupled_weight_decay=True, weight_decay=0.1)) == rules.AdamW(
        weight_decay=0.1
    )

    class Mine(torch.optim.AdamW):
        pass

    assert rules.like(Mine(parameters())) == rules.AdamW()
    p, q = parameters(2)
    two = torch.optim.SGD([{"params": [p]}, {"params": [q], "lr": 0.5}], lr=1.0)
    assert rules.like(two, lr=0.1) == rules.SGD(0.1)
    assert rules.like(two) == rules.Groups([rules.SGD(1.0), rules.SGD(0.5)])
    both = [{"params": [p]}, {"params": [q], "decoupled_weight_decay": True}]
    adam = torch.optim.Adam(both, weight_decay=0.1)
    assert rules.like(adam) == rules.Groups([rules.Adam(weight_decay=0.1), rules.AdamW(weight_decay=0.1)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            torch.optim.LBFGS,
            r"knows torch.optim's SGD, Adam, AdamW, .* and Keras' SGD, .*, Lion, not LBFGS. Name the rule",
        ),
        (lambda p: "sgd", "not str. Name the rule yourself"),
        (lambda p: torch.optim.Adam(p, amsgrad=True), "no rule has Adam's amsgrad=True"),
        (lambda p: torch.optim.SGD(p, maximize=True), "no rule has SGD's maximize=True"),
    ],
)
def test_like_says_what_it_does_not_know(make, message):
    with pytest.raises(ConfigError, match=message):
        rules.like(make(parameters()))


def test_presets():
    """Three steps of 1 are pushed as their mean, their sum, ... and every preset trains."""
    expected = {
        "agn": 1.0,
        "downpour": 3.0,
        "easgd": 3 * 0.45,
        "dynsgd": 3.0,  # its first push has missed nobody's
        "diloco_async": 0.7 * 3 / 2,
    }
    for name, value in expected.items():
        preset = getattr(presets, name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (p,) = parameters()
            arguments = preset(workers=2) if name in ("easgd", "diloco_async") else preset()
            opt = AGNOptimizer(torch.optim.SGD([p], lr=1.0), 3, **arguments)
        p.grad = torch.full_like(p, -1.0)
        for _ in range(3):
            opt.step()
        np.testing.assert_allclose(opt.center.snapshot()["param_groups[0].params[0]"], value, rtol=1e-6)
        opt.close()


def test_without_normalisation_the_warning_counts_all_steps():
    with pytest.warns(
        StalenessWarning, match=r"by 4.0 mean updates per step.*Use normalize=True, or a rule with 2 for 4"
    ):
        AGNOptimizer(torch.optim.SGD(parameters(), lr=1.0), 50, rule=rules.Add(4.0), normalize=False)


# ---- bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rules.Adam(betas=(0.9, 1.0)), r"rules.Adam: betas=\(0.9, 1.0\): give two numbers from 0 to below 1"),
        (lambda: rules.Lion(betas=0.9), "rules.Lion: betas=0.9: give two numbers"),
        (lambda: rules.Adam(lr="auto"), "rules.Adam: lr='auto': give a number, or 'follow'"),
        (lambda: rules.AdamW(lr=-1), "rules.AdamW: lr=-1: give a number at least 0"),
        (lambda: rules.Adam(eps=float("inf")), "rules.Adam: eps=inf: give a finite number, above 0"),
        (lambda: rules.Adam(bias_correction="tf"), "bias_correction='tf': give one of torch, keras, tf_contrib"),
        (lambda: rules.RMSprop(alpha=1), "rules.RMSprop: alpha=1: give a number at least 0 and below 1"),
        (lambda: rules.DelayedNesterov(0.1, 0.9, 0), "rules.DelayedNesterov: every=0: give a whole number of pushes"),
        (lambda: rules.DelayedNesterov(0.1, 0.9, 2.0), "every=2.0: give a whole number of pushes"),
        (lambda: rules.Adam(eps=0), "rules.Adam: eps=0: give a number above 0"),
        (lambda: rules.Adagrad(eps=0), "eps=0 divides 0 by 0 where a gradient is 0: give initial_accumulator_value"),
        (lambda: rules.Adagrad(eps_inside_root=2), "rules.Adagrad: eps_inside_root=2: give True or False"),
        (lambda: rules.SGD(0.1, 0.9, 0.2), "rules.SGD: nesterov=0.2: give True or False"),
        (lambda: presets.easgd(0), "workers=0: give a whole number of workers"),
        (lambda: rules.like(torch.optim.SGD(parameters(), 0.1), eps=1), r"SGD has no eps. It is SGD\(.*lr, momentum"),
        (lambda: Center([np.zeros(3)], rules.Rule()), "Rule is not a rule: use one of hvd_agn.rules"),
        (lambda: rules.Elastic(0), "rules.Elastic: alpha=0: give a number above 0 and at most 1"),
        (lambda: rules.Elastic(0.5, clip_norm=1), "rules.Elastic: clip_norm: workers push parameters"),
        (lambda: rules.Add(staleness="old"), "rules.Add: staleness='old': give one of none, inverse, sqrt"),
        (lambda: rules.SGD(0.1, clip_norm=0), "rules.SGD: clip_norm=0: give a number above 0"),
        (
            lambda: Center([np.zeros(3)], rules.Elastic(0.5), wire_dtype="int8"),
            r"wire_dtype='int8': Elastic\(alpha=0.5\) pushes parameters, not deltas",
        ),
    ],
)
def test_bad_hyper_parameters(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_rules_are_values():
    assert rules.SGD(1, 0) == rules.SGD(1.0)
    assert rules.Adam(betas=[0.9, 0.99]) == rules.Adam(betas=(0.9, 0.99))
    assert repr(rules.Add(clip_norm=2, staleness="sqrt")) == "Add(scale=1.0, staleness='sqrt', clip_norm=2.0)"
    assert repr(rules.Elastic(0.5)) == "Elastic(alpha=0.5)"
    assert rules.RMSprop(centered=True, momentum=0.1).active_slots() == ("square_avg", "grad_avg", "momentum_buffer")
    assert rules.RMSprop(momentum=0.1).active_slots() == ("square_avg", "momentum_buffer")
