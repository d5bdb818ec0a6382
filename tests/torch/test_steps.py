"""A step is counted once, whoever takes it; and what the wrapped optimizer has more than others is reached."""

import warnings

import numpy as np
import pytest
import torch
from ranks import on_ranks
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import lr_scheduler
from training import vector

from hvd_agn import rules
from hvd_agn.errors import UsageError, UsageWarning
from hvd_agn.torch import AGNOptimizer


class TwoFaced(torch.optim.SGD):
    """As SAM without a base, and as schedule-free: methods of its own, which call its step()."""

    training = True

    def train(self):
        self.training = True

    def eval(self):
        self.training = False

    def first_step(self, zero_grad=False):
        for p in self.param_groups[0]["params"]:
            self.state[p]["moved"] = p.grad * 0.5
            p.data.add_(self.state[p]["moved"])
        if zero_grad:
            self.zero_grad()

    def second_step(self):
        for p in self.param_groups[0]["params"]:
            p.data.sub_(self.state[p]["moved"])
        self.step()


class Around(torch.optim.Optimizer):
    """As SAM and Lookahead with a base: an optimizer around another, with a zero_grad() of its own."""

    def __init__(self, base):
        self.base = base
        super().__init__(base.param_groups[0]["params"], {})
        self.param_groups = base.param_groups

    def zero_grad(self):
        self.base.zero_grad()

    def second_step(self):
        self.base.step()

    def step(self, closure=None):
        return self.base.step(closure)


class OfOwn(torch.optim.SGD):
    """Takes an argument of its own, and calls the step of the class that it derives from."""

    def step(self, closure=None, *, scale=1.0):
        for p in self.param_groups[0]["params"]:
            p.grad = p.grad * scale
        return super().step(closure)


def gradient(p, value=-1.0):
    p.grad = torch.full_like(p, value)


def counted(opt):
    return opt.stats()["exchanges"]


def test_steps_of_methods_of_its_own():
    p = vector(0.0)
    with AGNOptimizer(TwoFaced([p], lr=1.0), 2) as opt:
        for _ in range(8):
            gradient(p)
            opt.first_step(True)
            gradient(p)
            opt.second_step()
        assert counted(opt) == 4
        opt.eval()
        assert not opt.optimizer.training
        opt.training = True
        assert opt.optimizer.training
        with pytest.raises(AttributeError, match="nothing"):
            _ = opt.nothing


@pytest.mark.parametrize("accumulate", ["updates", "gradients"])
def test_an_optimizer_around_another_steps_once(accumulate):
    p = vector(0.0)
    rule = rules.SGD(1.0) if accumulate == "gradients" else None
    with AGNOptimizer(Around(torch.optim.SGD([p], lr=1.0)), 2, accumulate=accumulate, rule=rule) as opt:
        opt.zero_grad()
        for _ in range(4):
            gradient(p)
            opt.step()
        assert counted(opt) == 2
        for _ in range(4):
            gradient(p)
            opt.second_step()
        assert counted(opt) == 4
        gradient(p)
        opt.optimizer.step()
        opt.step(lambda: gradient(p))
        assert counted(opt) == 5
        assert opt.center.snapshot()["param_groups[0].params[0]"][0] == 5.0


def test_arguments_of_its_own_and_a_step_that_calls_its_class():
    torch.optim.SGD([vector(0.0)])  # whose step torch has made its hooks part of, by now
    p = vector(0.0)
    with AGNOptimizer(OfOwn([p], lr=1.0), 3) as opt:
        for _ in range(3):
            gradient(p)
            opt.step(scale=4.0)
        assert counted(opt) == 1
        assert opt.center.snapshot()["param_groups[0].params[0]"][0] == 4.0


def test_the_optimizer_inside_is_counted_until_close():
    p = vector(0.0)
    inner = torch.optim.SGD([p], lr=1.0)
    opt = AGNOptimizer(inner, 2)
    for _ in range(4):
        gradient(p)
        inner.step()
    assert counted(opt) == 2
    with opt.center_weights(), pytest.raises(UsageError, match="inside center_weights"):
        inner.step()
    opt.close()
    inner.step()
    assert p[0] == 3.0  # two mean updates of 1, and a step more
    with pytest.raises(UsageError, match=r"after close\(\)"):
        opt.step()


@pytest.mark.parametrize("on", ["before", "inner", "wrapper"])
def test_schedulers_see_steps(on):
    p = vector(0.0)
    gradient(p)
    inner = torch.optim.SGD([p], lr=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if on == "before":
            scheduler = lr_scheduler.StepLR(inner, 1)
        with AGNOptimizer(inner, 2) as opt:
            if on != "before":
                scheduler = lr_scheduler.StepLR(inner if on == "inner" else opt, 1)
            for _ in range(4):
                opt.step()
                scheduler.step()
            assert counted(opt) == 2
        inner.step()
        scheduler.step()


def test_a_trainers_copy_that_shares_its_attributes():
    """Lightning hands out an object of a class derived from the optimizer's, with a copy of its dict."""
    p = vector(0.0)
    opt = AGNOptimizer(torch.optim.SGD([p], lr=1.0), 3)
    other = object.__new__(type("LightningAGNOptimizer", (AGNOptimizer,), {}))
    other.__dict__ = dict(opt.__dict__)
    gradient(p)
    opt.step()
    other.flush()
    assert counted(opt) == 1
    other.flush()
    assert counted(other) == 1
    other.step()
    with other.center_weights(), pytest.raises(UsageError):
        opt.step()
    assert other.state_dict()["hvd_agn"]["steps_since_exchange"] == 1
    opt.load_state_dict(other.state_dict())
    assert other.communication_period == 3
    other.close()
    with pytest.raises(UsageError, match=r"after close\(\)"):
        opt.step()
    opt.close()


def test_state_and_groups_can_be_assigned():
    p = vector(0.0)
    with AGNOptimizer(torch.optim.SGD([p], lr=1.0), 3) as opt:
        groups, state = [{**opt.param_groups[0], "lr": 0.5}], {p: {"momentum_buffer": torch.ones(4)}}
        opt.param_groups, opt.state = groups, state
        assert opt.optimizer.param_groups is groups
        assert opt.optimizer.state is state


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_a_distributed_checkpoint_is_no_training_and_keeps_our_part(kind):
    model = torch.nn.Linear(3, 1)
    with AGNOptimizer(kind(model.parameters(), lr=0.1), 2) as opt:
        get_optimizer_state_dict(model, opt)
        assert (counted(opt), opt.state_dict()["hvd_agn"]["steps_since_exchange"]) == (0, 0)
        model(torch.ones(3)).backward()
        opt.step()
        saved = get_optimizer_state_dict(model, opt)
        opt.zero_grad()
        anchor = opt.state_dict()["hvd_agn"]["anchor"]
        values = [p.detach().clone() for p in model.parameters()]
        for p in model.parameters():
            gradient(p)
        opt.step()
        opt.zero_grad()
        model.load_state_dict(dict(zip(model.state_dict(), values, strict=True)))
        set_optimizer_state_dict(model, opt, saved)
        own = opt.state_dict()["hvd_agn"]
        assert own["steps_since_exchange"] == 1
        for name, value in anchor.items():
            np.testing.assert_array_equal(own["anchor"][name], value)
        assert "hvd_agn" not in opt.param_groups[0]


def wrap_twice(close):
    p = vector(0.0)
    first = AGNOptimizer(torch.optim.SGD([p], lr=1.0), 10, name="first")
    gradient(p)
    first.step()
    first.step()
    if close:
        first.close()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        second = AGNOptimizer(torch.optim.SGD([p], lr=1.0), 10, name="second")
    assert [w.category for w in caught] == ([] if close else [UsageWarning])
    assert close or "first had some of these parameters" in str(caught[0].message)
    assert first.center.closed
    start = p[0].item()
    gradient(p)
    if second.center.rank == 0:
        for _ in range(101):
            second.step()
        assert p[0] == start + 11  # ten mean updates, and a step that is pending
    return start


@pytest.mark.parametrize("close", [True, False])
def test_a_second_optimizer_over_the_same_parameters_closes_the_first(close):
    assert on_ranks(2, wrap_twice, close)[0] in (1.0, 2.0)  # whether the other has pushed before
