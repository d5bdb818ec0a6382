"""Parameter groups with hyper-parameters of their own: one worker's center does what the optimizer does."""

import copy
import inspect

import numpy as np
import pytest
import torch
from torch import nn

from hvd_agn import rules
from hvd_agn.errors import ConfigError
from hvd_agn.torch import AGNOptimizer

NO_DECAY = {"weight_decay": 0.0}
INNER = {  # the optimizer, and what its three groups have of their own
    "SGD": (torch.optim.SGD, [{"weight_decay": 0.1}, {"lr": 0.05, **NO_DECAY}, {"lr": 0.02, "weight_decay": 0.3}]),
    "momentum": (
        lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=0.1),
        [{}, NO_DECAY, {"lr": 0.02, "momentum": 0.5, "dampening": 0.5}],
    ),
    "nesterov": (
        lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=0.1, nesterov=True),
        [{}, NO_DECAY, {"lr": 0.02, "momentum": 0.0, "nesterov": False}],
    ),
    "Adam": (torch.optim.Adam, [{"weight_decay": 0.1}, {"lr": 0.01, "betas": (0.5, 0.7)}, {"eps": 1e-3}]),
    "AdamW": (torch.optim.AdamW, [{"weight_decay": 0.5}, {"lr": 0.01, **NO_DECAY}, {"lr": 0.002}]),
    "Adagrad": (torch.optim.Adagrad, [{"weight_decay": 0.1}, {"lr": 0.05}, {"lr_decay": 0.5, "eps": 1e-3}]),
    "accumulators": (
        lambda p: torch.optim.Adagrad(p, initial_accumulator_value=0.1),
        [{"weight_decay": 0.1}, {"lr": 0.05}, {"lr": 0.2}],
    ),
    "RMSprop": (
        torch.optim.RMSprop,
        [{"weight_decay": 0.1}, {"lr": 0.003, "alpha": 0.5, "momentum": 0.5}, {"lr": 0.05, "eps": 1e-3}],
    ),
    "centered": (
        lambda p: torch.optim.RMSprop(p, centered=True),
        [{"weight_decay": 0.1}, {"lr": 0.003, **NO_DECAY}, {"lr": 0.05, "momentum": 0.5}],
    ),
}


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.LayerNorm(20), nn.Tanh(), nn.Linear(20, 3))


def grouped(network, of_its_own, make):
    """Weights; biases and norms, the recipe of transformers; and the head."""
    parameters = dict(network.named_parameters())
    weights, head = ["0.weight"], ["3.weight", "3.bias"]
    others = [name for name in parameters if name not in weights + head]
    names = (weights, others, head)
    return make([{"params": [parameters[n] for n in some], **own} for some, own in zip(names, of_its_own, strict=True)])


def train(network, optimizer, scheduled, steps=8):
    x = torch.randn(10, 6, generator=torch.Generator().manual_seed(1))
    factors = (lambda step: 0.9**step, lambda step: 1 / (1 + step), lambda step: float(step % 3))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors) if scheduled else None
    for step in range(steps):
        optimizer.zero_grad()
        (network(x) - step).square().mean().backward()
        optimizer.step()
        if scheduler:
            scheduler.step()
    return list(network.parameters())


@pytest.mark.parametrize("inner", INNER)
def test_the_center_is_the_optimizer(inner):
    """With its learning rates at each push, which schedulers change for each group; and as they were at the start."""
    make, of_its_own = INNER[inner]
    for scheduled in (True, False):
        plain, ours = model(), model()
        expected = train(plain, grouped(plain, of_its_own, make), scheduled)
        optimizer = grouped(ours, of_its_own, make)
        rule = None if scheduled else rules.like(optimizer)
        with AGNOptimizer(optimizer, 1, accumulate="gradients", rule=rule) as opt:
            found = train(ours, opt, scheduled)
            assert isinstance(opt.center.rule, rules.Groups)
            assert opt.center.rule.follows == scheduled
            center = list(opt.center.snapshot().values())
        order = [p for group in optimizer.param_groups for p in group["params"]]
        for p, value in zip(order, center, strict=True):
            np.testing.assert_array_equal(p.detach(), value)
        for p, q in zip(found, expected, strict=True):
            torch.testing.assert_close(p, q, rtol=2e-5, atol=2e-6)
        assert any((p - q).abs().max() > 1e-3 for p, q in zip(found, model().parameters(), strict=True))


def test_one_rule_with_a_learning_rate_for_each_group():
    """Of updates too, with and without overlap; the first group has nothing that is trained."""
    for overlap in (False, True):
        p, q, frozen = nn.Parameter(torch.zeros(300)), nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(2))
        frozen.requires_grad = False
        groups = [{"params": [frozen], "lr": 9.0}, {"params": [p]}, {"params": [q], "lr": 0.5}]
        opt = AGNOptimizer(torch.optim.SGD(groups, lr=1.0), 2, rule=rules.SGD("follow"), overlap=overlap)
        p.grad, q.grad = torch.full_like(p, -1.0), torch.full_like(q, -1.0)
        expected = np.zeros(2)
        for rates in ((1.0, 0.5), (0.25, 2.0)):
            for group, rate in zip(opt.param_groups[1:], rates, strict=True):
                group["lr"] = rate
            opt.step()
            opt.step()
            opt.flush()
            expected += np.square(rates)  # the mean step is the rate
        center = opt.center.snapshot()
        np.testing.assert_allclose(center["param_groups[1].params[0]"], expected[0])
        np.testing.assert_allclose(center["param_groups[2].params[0]"], expected[1])
        assert opt.center.groups == 3


def test_rules_of_ones_own_for_groups():
    p, q = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    groups = [{"params": [p]}, {"params": [q]}]
    rule = rules.Groups([rules.SGD(1.0), rules.SGD(0.5)])
    opt = AGNOptimizer(torch.optim.SGD(groups, lr=1.0), 1, rule=rule)
    p.grad = q.grad = torch.full((3,), -1.0)
    opt.step()
    np.testing.assert_array_equal(p.detach(), 1.0)
    np.testing.assert_array_equal(q.detach(), 0.5)
    opt.close()
    with pytest.raises(ConfigError, match=r"2 rules in rules.Groups, 1 parameter groups in the wrapped optimizer"):
        AGNOptimizer(torch.optim.SGD([p, q], lr=1.0), 1, rule=rule)


def test_a_resumed_run_is_the_same(tmp_path):
    make, of_its_own = INNER["momentum"]

    def begin():
        network = model()
        return network, AGNOptimizer(grouped(network, of_its_own, make), 3, accumulate="gradients")

    network, opt = begin()
    train(network, opt, False, 7)
    opt.center.save(tmp_path / "center")
    saved = copy.deepcopy((network.state_dict(), opt.state_dict()))
    train(network, opt, False, 7)
    again, resumed = begin()
    resumed.center.load(tmp_path / "center")
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(again, resumed, False, 7)
    for p, q in zip(network.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


def test_every_rule_can_be_in_groups():
    """What the rules' classes have in common with Groups."""
    for name, kind in inspect.getmembers(rules, inspect.isclass):
        if name in ("Rule", "Groups"):
            continue
        needed = {"DelayedNesterov": (0.1, 0.5, 2), "Elastic": (0.5,), "SGD": (0.1,), "Custom": (len,)}
        rule = kind(*needed.get(name, ()))
        assert rules.Groups([rule, rule]).active_slots() == rule.active_slots()
        assert rules.Groups([rule, rule]).factor == rule.factor
