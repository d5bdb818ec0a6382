"""AGNOptimizer as an optimizer: its arithmetic, and what torch, schedulers, scalers and models may do to it."""

import copy
import io
import math

import numpy as np
import pytest
import torch
from reference import ReferenceCenter, ReferenceClient
from torch import nn
from torch.optim import lr_scheduler

from hvd_agn import rules
from hvd_agn.errors import ConfigError, LayoutError, UsageError
from hvd_agn.torch import AGNOptimizer

INNER = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "Adam foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}


def network(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 3)).to(dtype)


def backward(model, step=0):
    """Leaves gradients of a loss that depends on the step."""
    model.zero_grad()
    first = next(model.parameters())
    x = torch.randn(8, first.shape[1], generator=torch.Generator().manual_seed(step)).to(first.dtype)
    loss = (model(x) - 1).square().mean()
    loss.backward()
    return loss


def vector(*values):
    return nn.Parameter(torch.tensor(values))


def push(opt, amount):
    """Another worker of this process adds ``amount`` to every element of the center."""
    arrays = [np.zeros_like(a) for a in opt.center.snapshot().values()]
    client = opt.center.client(arrays)
    for array in arrays:
        array += amount
    client.exchange(1)


def assert_all(tensor, value):
    np.testing.assert_array_equal(tensor.detach().float().numpy(), value)


# ---- arithmetic


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize(
    ("rule", "name", "hyper"),
    [
        (None, "add", {}),
        (rules.SGD(0.7, 0.9, nesterov=True), "sgd", {"lr": 0.7, "momentum": 0.9, "nesterov": True}),
    ],
    ids=["Add", "SGD"],
)
def test_a_run_equals_the_same_run_written_out(inner, rule, name, hyper):
    """Against a second, plain optimizer and the reference center, bit for bit; another worker pushes in between."""
    ours, theirs = network(), network()
    plain, opt = INNER[inner](theirs.parameters()), AGNOptimizer(INNER[inner](ours.parameters()), 3, rule=rule)
    shared = [p.detach().numpy() for p in theirs.parameters()]
    reference = ReferenceCenter(shared, name, **hyper)
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
    for p, center, expected in zip(ours.parameters(), opt.center.snapshot().values(), reference.center, strict=True):
        np.testing.assert_array_equal(center, expected)
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
    model = network(dtype)
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
def test_groups_state_and_defaults_are_the_wrapped_optimizers_which_is_not_patched(inner):
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
    assert set(vars(wrapped)) == attributes
    assert type(wrapped).step is step


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
    assert opt.state_dict()["hvd_agn"]["steps"] == 2
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
    assert (state["more"], state["hvd_agn"]["steps"]) == (1, 0)
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


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.zeros(3, dtype=torch.complex64), "complex64"),
        (lambda: torch.zeros(3).to(torch.float8_e5m2), "float8_e5m2"),
        (lambda: torch.eye(3).to_sparse(), "sparse_coo"),
        (lambda: torch.zeros(3, device="meta"), "meta"),
        (lambda: torch.zeros(3, 1).expand(3, 4), "share memory"),
        (lambda: torch.zeros(7).as_strided((4, 4), (1, 1)), "share memory"),
        (nn.parameter.UninitializedParameter, "no shape yet"),
    ],
    ids=["complex", "float8", "sparse", "meta", "expanded", "overlapping", "lazy"],
)
def test_parameters_that_cannot_be_exchanged_are_refused_by_name(make, reason):
    bad = make()
    bad = bad if isinstance(bad, nn.Parameter) else nn.Parameter(bad)
    with pytest.raises(LayoutError, match=rf"'body\.bad' cannot be exchanged: .*{reason}"):
        AGNOptimizer(torch.optim.SGD([vector(0.0), bad], lr=1.0), named_parameters=[("body.bad", bad)])


@pytest.mark.parametrize(
    "part", [lambda base, i: base[i : i + 4], lambda base, i: base[:, i : i + 4]], ids=["rows", "columns"]
)
def test_parameters_that_overlap_in_part_are_refused_by_name(part):
    base = torch.zeros(6, 6)
    with pytest.raises(LayoutError, match=r"params\[0\]' and '.*params\[1\]' share memory"):
        AGNOptimizer(torch.optim.SGD([nn.Parameter(part(base, i)) for i in (0, 2)], lr=1.0))


# ---- names


def test_names():
    model = network()
    expected = ["0.weight", "0.bias", "2.weight", "2.bias"]
    plain = torch.optim.SGD(model.parameters(), lr=1.0)
    assert list(AGNOptimizer(plain, named_parameters=model.named_parameters()).center.snapshot()) == expected
    opt = AGNOptimizer(plain, named_parameters=((f"net.{n}", p) for n, p in model.named_parameters()))
    assert list(opt.center.snapshot()) == [f"net.{n}" for n in expected]
    assert list(AGNOptimizer(torch.optim.SGD(model.named_parameters(), lr=1.0)).center.snapshot()) == expected
    two = torch.optim.SGD([{"params": [p]} for p in model[0].parameters()], lr=1.0)
    assert list(AGNOptimizer(two).center.snapshot()) == ["param_groups[0].params[0]", "param_groups[1].params[0]"]


@pytest.mark.parametrize("own_names", [True, False])
def test_two_parameters_of_one_name_are_refused_by_name(own_names):
    """As when the named_parameters() of two models are chained; one of the two would not be exchanged."""
    models = [nn.Linear(2, 1, bias=False), nn.Linear(3, 1, bias=False)]
    named = [pair for m in models for pair in m.named_parameters()]
    groups = [{"params": m.named_parameters() if own_names else m.parameters()} for m in models]
    with pytest.raises(LayoutError, match="'weight'"):
        AGNOptimizer(torch.optim.SGD(groups, lr=1.0), named_parameters=None if own_names else named)


# ---- parameters that are special


def test_a_frozen_parameter_is_left_alone_and_refused_by_name_once_unfrozen():
    model = network()
    model[0].bias.requires_grad_(False)
    frozen = model[0].bias.detach().clone()
    opt = AGNOptimizer(INNER["Adam"](model.parameters()), 1, named_parameters=model.named_parameters())
    assert list(opt.center.snapshot()) == ["0.weight", "2.weight", "2.bias"]
    backward(model)
    opt.step()
    push(opt, 1.0)
    opt.pull()
    assert_all(model[0].bias, frozen)
    model[0].bias.requires_grad_(True)
    backward(model)
    with pytest.raises(LayoutError, match=r"'0\.bias' .*frozen"):
        opt.step()
    with pytest.raises(LayoutError, match="no arrays"):
        AGNOptimizer(torch.optim.SGD([torch.zeros(3)], lr=1.0))


def test_a_parameter_frozen_later_still_follows_the_center():
    p = vector(1.0, 2.0)
    opt = AGNOptimizer(torch.optim.SGD([p], lr=1.0), 1)
    p.requires_grad_(False)
    push(opt, 3.0)
    opt.step()
    assert_all(p, [4.0, 5.0])


def test_parameters_cannot_be_added():
    opt = AGNOptimizer(torch.optim.SGD([vector(0.0)], lr=1.0), 1)
    with pytest.raises(UsageError, match="once the center exists"):
        opt.add_param_group({"params": [vector(1.0)]})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda p, inner: setattr(p, "data", p.data.half()), r"'p' .*torch.float16\[2\]"),
        (lambda p, inner: setattr(p, "data", p.data[:1]), r"'p' .*torch.float32\[1\]"),
        (lambda p, inner: inner.param_groups[0]["params"].__setitem__(0, vector(9.0, 9.0)), "another parameter"),
        (lambda p, inner: inner.add_param_group({"params": [vector(0.0)]}), "has 2 parameters, it had 1 at the start"),
    ],
    ids=["type", "shape", "swapped", "group"],
)
def test_a_changed_parameter_is_refused_until_the_optimizer_is_wrapped_again(change, reason):
    p = vector(1.0, 2.0)
    inner = torch.optim.SGD([p], lr=1.0)
    opt = AGNOptimizer(inner, 1, named_parameters=[("p", p)])
    change(p, inner)
    with pytest.raises(LayoutError, match=rf"{reason}.*Close this AGNOptimizer and wrap the optimizer again"):
        opt.step()
    opt.close()  # as the message says
    AGNOptimizer(inner, 1).step()


class Tied(nn.Module):
    """One weight under two names: one Parameter, or two that share their storage."""

    def __init__(self, one):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.b.weight = self.a.weight if one else nn.Parameter(self.a.weight.data)

    def forward(self, x):
        return self.b(self.a(x))


@pytest.mark.parametrize("one", [True, False])
def test_tied_parameters_are_exchanged_once(one):
    torch.manual_seed(0)
    model = Tied(one)
    opt = AGNOptimizer(INNER["SGD"](model.parameters()), 2, named_parameters=model.named_parameters())
    torch.manual_seed(0)
    twin = Tied(one)
    plain = INNER["SGD"](twin.parameters())
    assert list(opt.center.snapshot()) == ["a.weight"]
    start = model.a.weight.detach().clone()
    for _ in range(2):
        backward(twin)
        plain.step()
        backward(model)
        opt.step()
    assert_all(model.a.weight, (start + (twin.a.weight.detach() - start) / 2).numpy())
    assert_all(model.b.weight, model.a.weight.detach().numpy())


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_that_become_tied_or_untied_are_refused_by_name(tied):
    """``model.to(memory_format=...)`` gives two Parameters of one storage a storage each."""
    first = nn.Parameter(torch.zeros(2, 3, 4, 4))
    second = nn.Parameter(first.data if tied else first.data.clone())
    opt = AGNOptimizer(torch.optim.SGD([first, second], lr=1.0), 1, named_parameters=[("1", first), ("2", second)])
    second.data = first.data.to(memory_format=torch.channels_last) if tied else first.data
    with pytest.raises(LayoutError, match="'2'"):
        opt.step()


def test_a_parameter_without_gradient_for_a_while():
    """Its delta is 0 meanwhile, and it takes over what others push."""
    p, q = vector(0.0), vector(0.0)
    opt = AGNOptimizer(torch.optim.SGD([p, q], lr=1.0), 2)
    for step in range(6):
        p.grad = torch.full((1,), -2.0)
        q.grad = torch.full((1,), -6.0) if step >= 3 else None
        opt.step()
        if step == 0:
            push(opt, 100.0)
    assert_all(p, 100 + 3 * 2)
    assert_all(q, 100 + 3 + 6)


def test_two_optimizers_on_one_model_have_a_center_each():
    model = network()
    opts = [AGNOptimizer(torch.optim.SGD(model[i].parameters(), lr=0.1), 1 + i, name=f"part {i}") for i in (0, 2)]
    for step in range(6):
        backward(model, step)
        for opt in opts:
            opt.step()
    assert [opt.center.version for opt in opts] == [6, 2]
    opts[0].close()
    with pytest.raises(UsageError, match="part 0: used after"):
        opts[0].step()
    push(opts[1], 1.0)
    opts[1].pull()
    for p, values in zip(model[2].parameters(), opts[1].center.snapshot().values(), strict=True):
        assert_all(p, values)


# ---- storage


def test_storage_that_moves_is_followed():
    p = nn.Parameter(torch.zeros(6, 8))
    opt = AGNOptimizer(torch.optim.SGD([p], lr=1.0), 1)
    moves = [
        torch.clone,
        lambda t: t.t().contiguous().t(),
        lambda t: t,
        lambda t: t.t().contiguous().t(),
        lambda t: torch.zeros(10, 8)[2:8].copy_(t),
        lambda t: torch.zeros(6, 20)[:, 3:11].copy_(t),
        torch.Tensor.contiguous,
        lambda t: t.clone().share_memory_(),
    ]
    expected = np.zeros((6, 8), np.float32)
    for i, move in enumerate(moves):
        p.data = move(p.data)
        layout, address = p.stride(), p.data_ptr()
        p.grad = -(torch.arange(48.0).reshape(6, 8) + i)
        expected -= p.grad.numpy()
        opt.step()
        assert_all(p, expected)
        np.testing.assert_array_equal(opt.center.snapshot()["param_groups[0].params[0]"], expected)
        assert (p.stride(), p.data_ptr()) == (layout, address)
        with opt.center_weights():
            assert_all(p, expected)


def test_columns_of_one_tensor_are_parameters_like_others():
    base = torch.zeros(4, 6)
    opt = AGNOptimizer(torch.optim.SGD([nn.Parameter(base[:, i::2]) for i in (0, 1)], lr=1.0), 1)
    for i, p in enumerate(opt.param_groups[0]["params"]):
        p.grad = torch.full((4, 3), -1.0 - i)
    opt.step()
    assert_all(base, np.tile([1, 2], (4, 3)))


def test_moved_to_an_expanded_view_is_refused_by_name():
    p = nn.Parameter(torch.zeros(3, 4))
    opt = AGNOptimizer(torch.optim.SGD([p], lr=1.0), 1, named_parameters=[("p", p)])
    p.data = torch.ones(3, 1).expand(3, 4)
    with pytest.raises(LayoutError, match="'p'"):
        opt.step()


@pytest.mark.parametrize("when", ["before", "after"])
def test_channels_last_weights(when):
    model = nn.Conv2d(3, 5, 2, bias=False)
    nn.init.zeros_(model.weight)
    if when == "before":
        model.to(memory_format=torch.channels_last)
    opt = AGNOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), 2, named_parameters=model.named_parameters())
    model.to(memory_format=torch.channels_last)
    gradient = torch.arange(60.0).reshape(5, 3, 2, 2)
    for _ in range(2):
        model.weight.grad = gradient.to(memory_format=torch.channels_last)
        opt.step()
    np.testing.assert_array_equal(opt.center.snapshot()["weight"], -gradient)
    assert_all(model.weight, -gradient)
    push(opt, 1.0)
    opt.pull()
    assert_all(model.weight, 1 - gradient)
    assert model.weight.is_contiguous(memory_format=torch.channels_last)
    assert not model.weight.is_contiguous()
