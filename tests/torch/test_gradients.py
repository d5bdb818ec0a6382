"""AGNOptimizer(accumulate="gradients"): its arithmetic, resumed runs, and what else may happen to gradients."""

import copy

import numpy as np
import pytest
import torch
from mailboxes import wait_until
from torch import nn

from hvd_agn import rules
from hvd_agn.errors import ConfigError, LayoutError
from hvd_agn.torch import AGNOptimizer


def wrapped(seed=0, dtype=torch.float32, **options):
    torch.manual_seed(seed)
    layers = nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 9)
    model = nn.Sequential(*layers).to(dtype, memory_format=torch.channels_last)
    options = {"accumulate": "gradients", "named_parameters": model.named_parameters(), **options}
    return model, AGNOptimizer(torch.optim.Adam(model.parameters(), 0.01), 3, **options)


def backward(model, step):
    model.zero_grad()
    x = torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).dtype)
    model(x).square().mean().backward()


def test_the_default_rule_is_that_of_the_optimizer():
    assert wrapped()[1].center.rule == rules.Adam("follow")
    assert wrapped(rule=rules.SGD(0.5))[1].center.rule == rules.SGD(0.5)
    with pytest.raises(ConfigError, match="not LBFGS"):
        AGNOptimizer(torch.optim.LBFGS([nn.Parameter(torch.zeros(3))]), accumulate="gradients")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_worker_written_out(dtype):
    """Adam at the worker, Adam at the center on the mean of three gradients, and a part of a period at the end."""
    model, opt = wrapped(dtype=dtype)
    names = [name for name, _ in model.named_parameters()]
    center = [nn.Parameter(p.detach().float().clone()) for p in model.parameters()]
    outer = torch.optim.Adam(center, 0.01)
    sums = [torch.zeros_like(p) for p in center]
    for step in range(1, 9):
        backward(model, step)
        for s, p in zip(sums, model.parameters(), strict=True):
            s += p.grad
        opt.step()
        if step == 8:
            opt.flush()
        if step % 3 == 0 or step == 8:
            for c, s in zip(center, sums, strict=True):
                c.grad = s / (3 if step < 8 else 2)
            outer.step()
            sums = [torch.zeros_like(p) for p in center]
            for p, c in zip(model.parameters(), center, strict=True):
                torch.testing.assert_close(p.detach().float(), c.detach().to(dtype).float(), rtol=1e-5, atol=1e-6)
        for name, c in zip(names, center, strict=True):
            np.testing.assert_allclose(opt.center.snapshot()[name], c.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_resumed_run_is_bit_identical(overlap, tmp_path):
    """Stopped in the middle of a period."""

    def train(model, opt, first, last):
        for step in range(first, last):
            backward(model, step)
            opt.step()
            wait_until(
                lambda: opt._worker.client.ready or not opt._worker.client.started, "the exchange in the background"
            )

    model, opt = wrapped(overlap=overlap)
    train(model, opt, 0, 5)
    inner = opt.state_dict()
    opt.center.save(tmp_path / "center")
    saved = copy.deepcopy((model.state_dict(), inner))
    train(model, opt, 5, 11)
    again, resumed = wrapped(seed=1, overlap=overlap)
    resumed.center.load(tmp_path / "center")
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(again, resumed, 5, 11)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)
    for value, expected in zip(resumed.center.snapshot().values(), opt.center.snapshot().values(), strict=True):
        np.testing.assert_array_equal(value, expected)


def test_closures_and_tied_parameters():
    p = nn.Parameter(torch.zeros(3))
    q = nn.Parameter(p.detach())  # the same storage
    opt = AGNOptimizer(torch.optim.SGD([p, q], lr=1.0), 2, accumulate="gradients", rule=rules.SGD(1.0))

    def closure():
        p.grad, q.grad = torch.full((3,), 1.0), torch.full((3,), 4.0)
        return 0.0

    opt.step(closure)
    opt.step(closure)
    np.testing.assert_array_equal(opt.center.snapshot()["param_groups[0].params[0]"], -5)
    np.testing.assert_array_equal(p.detach(), -5)


def test_what_the_optimizer_does_to_gradients_is_not_pushed():
    class Careless(torch.optim.SGD):
        def step(self, closure=None):
            loss = None if closure is None else closure()
            for p in self.param_groups[0]["params"]:
                p.grad.zero_()
            return loss

    p = nn.Parameter(torch.zeros(3))
    opt = AGNOptimizer(Careless([p], lr=1.0), 1, accumulate="gradients", rule=rules.SGD(1.0))

    def closure():
        p.grad = torch.ones(3)

    opt.step(closure)
    p.grad = torch.ones(3)
    opt.step()
    np.testing.assert_array_equal(p.detach(), -2)


def test_schedulers_reach_the_center():
    p = nn.Parameter(torch.zeros(3))
    inner = torch.optim.SGD([p], lr=1.0)
    torch.optim.lr_scheduler.LambdaLR(inner, lambda step: 0.0)  # as a warm-up begins
    opt = AGNOptimizer(inner, 1, accumulate="gradients")
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.5)
    p.grad = torch.ones(3)
    opt.step()
    scheduler.step()
    np.testing.assert_array_equal(opt.center.snapshot()["param_groups[0].params[0]"], -0.5)


def test_a_gradient_of_another_shape():
    p = nn.Parameter(torch.zeros(3))
    opt = AGNOptimizer(torch.optim.SGD([p], lr=1.0), 2, accumulate="gradients")
    p.data = torch.zeros(1)
    p.grad = torch.ones(1)
    with pytest.raises(LayoutError, match=r"AGNOptimizer: the gradient of .* is \[1\], it was \[3\]"):
        opt.step()


def test_a_state_of_the_other_mode_is_a_fresh_start():
    p = nn.Parameter(torch.zeros(3))
    opt = AGNOptimizer(torch.optim.SGD([p], lr=1.0), 5)
    p.grad = torch.ones(3)
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    q = nn.Parameter(torch.zeros(3))
    other = AGNOptimizer(torch.optim.SGD([q], lr=1.0), 5, accumulate="gradients")
    other.load_state_dict(saved)
    assert other.state_dict()["hvd_agn"]["steps_since_exchange"] == 0
