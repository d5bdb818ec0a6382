"""AGNOptimizer as an optimizer: its arithmetic, and what torch, schedulers and scalers may do to it."""

import copy
import io
import math

import numpy as np
import pytest
import torch
from reference import FEW_RULES, ReferenceCenter, ReferenceClient
from torch import nn
from torch.optim import lr_scheduler
from training import INNER, assert_all, backward, network, push, vector

from hvd_agn import rules
from hvd_agn.errors import ConfigError, UsageError
from hvd_agn.torch import AGNOptimizer

# ---- arithmetic


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("rule", FEW_RULES, ids=repr)
def test_a_run_equals_the_same_run_written_out(inner, rule):
    """Against a second, plain optimizer and the reference center, bit for bit; another worker pushes in between."""
    ours, theirs = network(), network()
    plain, opt = INNER[inner](theirs.parameters()), AGNOptimizer(INNER[inner](ours.parameters()), 3, rule=rule)
    shared = [p.detach().numpy() for p in theirs.parameters()]
    reference = ReferenceCenter(shared, rule)
    worker, their_other = (ReferenceClient(reference, [a.dtype for a in shared]) for _ in range(2))
    worker.arrays = shared
    our_other = [a.copy() for a in shared]
    our_client = opt.center.client(our_other)
    for step in range(1, 12):
        opt.step(lambda step=step: backward(ours, step))
        plain.step(lambda step=step: backward(theirs, step))
        if step % 3 == 0:
            worker.exchange(3)
        if step == 4:
            for mine, expected in zip(our_other, their_other.arrays, strict=True):
                mine += 0.01
                expected += 0.01
            our_client.exchange(2)
            their_other.exchange(2)
        for p, expected in zip(ours.parameters(), shared, strict=True):
            np.testing.assert_array_equal(p.detach().numpy(), expected)
    opt.flush()
    worker.exchange(2)
    for center, expected in zip(opt.center.snapshot().values(), reference.center, strict=True):
        np.testing.assert_array_equal(center, expected)
    for p, expected in zip(ours.parameters(), shared, strict=True):
        np.testing.assert_array_equal(p.detach().numpy(), expected)
    assert opt.stats()["exchanges"] == 4


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_the_sgd_rule_is_torchs_sgd_with_minus_delta_as_gradient(momentum, nesterov):
    torch.manual_seed(0)
    p, center = nn.Parameter(torch.ones(600)), nn.Parameter(torch.ones(600))
    outer = torch.optim.SGD([center], lr=0.7, momentum=momentum, nesterov=nesterov)
    opt = AGNOptimizer(torch.optim.SGD([p], lr=0.1), 4, rule=rules.SGD(0.7, momentum, nesterov))
    for _ in range(10):
        gradients = torch.randn(4, 600)
        for gradient in gradients:
            p.grad = gradient
            opt.step()
        center.grad = 0.1 * gradients.mean(0)
        outer.step()
        torch.testing.assert_close(p, center, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_train(dtype):
    model = network(dtype=dtype)
    opt = AGNOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), 2)
    first = backward(model).item()
    for _ in range(20):
        backward(model)
        opt.step()
    assert backward(model).item() < first
    for p, values in zip(model.parameters(), opt.center.snapshot().values(), strict=True):
        assert values.dtype == (np.float64 if dtype == torch.float64 else np.float32)
        torch.testing.assert_close(p.detach(), torch.from_numpy(values).to(dtype), rtol=0, atol=0)


def test_the_center_keeps_what_bfloat16_cannot_hold():
    """Steps of one unit in the last place of 1, of which a quarter is pushed."""
    p = nn.Parameter(torch.ones(100, dtype=torch.bfloat16))
    opt = AGNOptimizer(torch.optim.SGD([p], lr=1.0), 4)
    for exchange in range(1, 9):
        p.grad = torch.full_like(p, -(2.0**-7))
        opt.step()
        p.grad = None
        for _ in range(3):
            opt.step()
        center = 1 + exchange * 2.0**-9
        np.testing.assert_array_equal(opt.center.snapshot()["param_groups[0].params[0]"], center)
        assert_all(p, torch.tensor(center).bfloat16().item())


# ---- to torch it is an optimizer


@pytest.mark.parametrize("inner", INNER)
def test_groups_state_and_defaults_are_the_wrapped_optimizers_which_is_left_as_it_was(inner):
    model = network()
    wrapped = INNER[inner](model.parameters())
    attributes, defaults, step = set(vars(wrapped)), dict(wrapped.defaults), type(wrapped).step
    opt = AGNOptimizer(wrapped, 2)
    assert isinstance(opt, torch.optim.Optimizer)
    assert wrapped.defaults == defaults
    for _ in range(2):
        opt.step(lambda: backward(model))
        assert opt.param_groups is wrapped.param_groups
        assert opt.state is wrapped.state
        assert opt.defaults is wrapped.defaults
        wrapped.load_state_dict(copy.deepcopy(wrapped.state_dict()))
    assert type(wrapped).step is step
    opt.close()
    assert set(vars(wrapped)) == attributes


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6, 2.0),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.2, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.3, total_steps=12),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=3), lr_scheduler.ExponentialLR(o, 0.8)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, total_iters=3), lr_scheduler.ExponentialLR(o, 0.8)], o
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.05, anneal_epochs=5),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name):
    """Rates and momenta as over the bare optimizer; the scheduler's state goes to a file and back."""
    seen = []
    for wrap in (lambda inner: inner, lambda inner: AGNOptimizer(inner, 2)):
        p = vector(1.0, 2.0)
        opt = wrap(torch.optim.SGD([p], lr=0.1, momentum=0.9))
        scheduler = SCHEDULERS[name](opt)
        rates = []
        for _ in range(10):
            p.grad = torch.ones(2)
            opt.step()
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            rates.append((opt.param_groups[0]["lr"], opt.param_groups[0]["momentum"], scheduler.get_last_lr()))
        scheduler.load_state_dict(copy.deepcopy(scheduler.state_dict()))
        seen.append(rates)
    assert seen[0] == seen[1]
    assert len({rate for rate, _, _ in seen[0]}) > 1
    assert opt.stats()["exchanges"] == 5


def test_a_scheduler_made_before_wrapping_goes_on():
    p = vector(0.0)
    inner = torch.optim.SGD([p], lr=1.0)
    scheduler = lr_scheduler.StepLR(inner, 1, gamma=0.5)
    opt = AGNOptimizer(inner, 1)
    for _ in range(3):
        p.grad = torch.full((1,), -1.0)
        opt.step()
        scheduler.step()
    assert_all(p, 1.75)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_grad_scaler_skips_is_none_of_the_period(fused):
    p = vector(0.0, 0.0)
    opt = AGNOptimizer(torch.optim.SGD([p], lr=1.0, fused=fused), 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    versions = []
    for gradient in (-4.0, math.inf, -8.0):
        opt.zero_grad()
        scaler.scale((p * gradient).sum()).backward()
        scaler.step(opt)
        scaler.update()
        versions.append(opt.center.version)
    assert versions == [0, 0, 1]
    assert scaler.get_scale() == 2.0
    assert_all(p, 6.0)


def test_gradients_are_clipped():
    p = vector(0.0, 0.0)
    opt = AGNOptimizer(torch.optim.SGD([p], lr=1.0), 1)
    p.grad = torch.tensor([-30.0, -40.0])
    nn.utils.clip_grad_norm_(opt.param_groups[0]["params"], 5.0)
    opt.step()
    torch.testing.assert_close(p.detach(), torch.tensor([3.0, 4.0]))


def test_step_returns_what_the_closure_returns():
    p = vector(0.0)
    opt = AGNOptimizer(torch.optim.SGD([p], lr=1.0), 2)
    assert opt.step(lambda: 42.0) == 42.0
    assert opt.step(closure=lambda: 43.0) == 43.0
    assert opt.step() is None
    assert opt.center.version == 1


def test_step_hooks_run_once_and_see_the_wrapper_after_the_exchange():
    p = vector(0.0)
    opt = AGNOptimizer(torch.optim.SGD([p], lr=1.0), 1)
    seen = []
    before = opt.register_step_pre_hook(lambda o, args, kwargs: seen.append(("pre", o, o.center.version)))
    opt.register_step_post_hook(lambda o, args, kwargs: seen.append(("post", o, o.center.version)))
    opt.step()
    assert seen == [("pre", opt, 0), ("post", opt, 1)]
    before.remove()
    opt.step()
    assert seen[2:] == [("post", opt, 2)]


def test_state_dict_hooks_are_the_wrapped_optimizers():
    opt = AGNOptimizer(torch.optim.SGD([vector(0.0)], lr=1.0))
    seen = []
    opt.register_state_dict_pre_hook(lambda o: seen.append("pre save"))
    opt.register_state_dict_post_hook(lambda o, state: {**state, "more": 1})
    opt.register_load_state_dict_pre_hook(lambda o, state: seen.append("pre load"))
    opt.register_load_state_dict_post_hook(lambda o: seen.append("post load"))
    state = opt.state_dict()
    assert (state["more"], state["hvd_agn"]["steps_since_exchange"]) == (1, 0)
    opt.load_state_dict(state)
    assert seen == ["pre save", "pre load", "post load"]


def test_zero_grad_and_repr():
    p = vector(1.0)
    opt = AGNOptimizer(torch.optim.SGD([p], lr=0.25))
    p.grad = torch.ones(1)
    opt.zero_grad(set_to_none=False)
    assert_all(p.grad, 0)
    opt.zero_grad()
    assert p.grad is None
    assert repr(opt).startswith("AGNOptimizer (\nParameter Group 0")
    assert "lr: 0.25" in repr(opt)


def test_a_compiled_model():
    """Parameters that change behind the compiled code are seen by it; center_state_dict has the compiled names."""
    models = [network(), network()]
    compiled = torch.compile(models[0], backend="eager")
    opts = [AGNOptimizer(INNER["Adam"](m.parameters()), 2) for m in models]
    for step in range(5):
        for model, opt in zip((compiled, models[1]), opts, strict=True):
            backward(model, step)
            opt.step()
            push(opt, 0.125)
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)
    assert opts[0].center_state_dict(compiled).keys() == compiled.state_dict().keys()


# ---- refused arguments


def test_what_is_not_an_optimizer_is_a_type_error():
    with pytest.raises(TypeError, match="optimizer is a Linear: give a"):
        AGNOptimizer(nn.Linear(1, 1))
    with pytest.raises(TypeError, match="AGNOptimizer already"):
        AGNOptimizer(AGNOptimizer(torch.optim.SGD([vector(0.0)], lr=1.0)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"communication_period": 0}, "communication_period=0"),
        ({"communication_period": -3}, "communication_period=-3"),
        ({"communication_period": 2.5}, "communication_period=2.5"),
        ({"communication_period": True}, "communication_period=True"),
        ({"communication_period": "10"}, "communication_period='10'"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite='ignore': give one of skip, raise"),
        ({"rule": "add"}, "rule='add'"),
        ({"comm": 7}, "comm=7"),
    ],
)
def test_bad_arguments_are_named_with_their_value(arguments, message):
    with pytest.raises(ConfigError, match=message):
        AGNOptimizer(torch.optim.SGD([vector(0.0)], lr=1.0), **arguments)


def test_copies_and_pickles_are_refused():
    opt = AGNOptimizer(torch.optim.SGD([vector(0.0)], lr=1.0))
    for copied in (copy.copy, copy.deepcopy, lambda o: torch.save(o, io.BytesIO())):
        with pytest.raises(UsageError, match=r"\[rank 0\] AGNOptimizer: .*cannot be copied or pickled"):
            copied(opt)
