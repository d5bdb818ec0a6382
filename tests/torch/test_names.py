"""``named_parameters=``, and parameters whose names wrappers have changed: in files, and in ``center_state_dict``."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from training import assert_all, assert_same, backward, network, push, values

from hvd_agn import Center
from hvd_agn.errors import CheckpointError, ConfigError, LayoutError
from hvd_agn.torch import AGNOptimizer

NAMES = ["0.weight", "0.bias", "2.weight", "2.bias"]


def sgd(model, named_parameters=None, period=10):
    return AGNOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), period, named_parameters=named_parameters)


# ---- what is taken


@pytest.mark.parametrize(
    "give",
    [
        lambda model: dict(model.named_parameters()),
        lambda model: list(model.named_parameters()),
        lambda model: (pair for pair in model.named_parameters()),
        lambda model: model,
        lambda model: model.state_dict(keep_vars=True),
    ],
    ids=["dict", "list", "generator", "module", "state dict of the parameters"],
)
def test_names_are_taken(give):
    model = network()
    assert list(sgd(model, give(model)).center.snapshot()) == NAMES


def center(opt):
    return [torch.from_numpy(values) for values in opt.center.snapshot().values()]


def used_up(model):
    pairs = model.named_parameters()
    list(pairs)
    return pairs


@pytest.mark.parametrize(
    ("give", "message"),
    [
        (
            lambda model: model.parameters(),
            "has parameters without names, as model.parameters.. does: give model.named",
        ),
        (lambda model: list(model.parameters()), "has parameters without names"),
        (used_up, "has no names: a generator that was used up"),
        (lambda model: [], "has no names"),
        (lambda model: network().named_parameters(), "has 4 names, from '0.weight' on, and none is of a parameter of"),
        (lambda model: copy.deepcopy(model), ".* another model, a copy of it"),
        (lambda model: model.state_dict(), ".* or its state_dict"),
        (lambda model: model.named_parameters, "is a function that was not called: give model.named_parameters"),
        (lambda model: ["0.weight", "0.bias"], "has '0.weight', which is no pair"),
        (lambda model: 7, "is a int: give model.named_parameters"),
    ],
    ids=["parameters()", "parameters", "used up", "empty", "other", "copy", "values", "method", "names", "number"],
)
def test_mistakes_are_named(give, message):
    model = network()
    with pytest.raises(ConfigError, match=rf"\[rank 0\] AGNOptimizer: named_parameters {message}") as caught:
        sgd(model, give(model))
    assert "model.named_parameters()" in str(caught.value).replace("Give", "give")


def test_whole_numbers_of_numpy_and_of_torch():
    p = nn.Parameter(torch.zeros(3))
    for number in (np.int64(2), np.uint8(2), torch.tensor(2)):
        with AGNOptimizer(torch.optim.SGD([p], lr=1.0), number) as opt:
            assert opt.communication_period == 2
            assert type(opt.communication_period) is int
            p.grad = torch.full((3,), -1.0)
            for _ in range(4):
                opt.step()
            assert opt.stats()["exchanges"] == 2
    for number in (10.0, np.float64(2), np.True_, True, "10", 0, np.int64(-1)):
        with pytest.raises(ConfigError, match=r"communication_period=.*: give a whole number of steps, 1 or more"):
            AGNOptimizer(torch.optim.SGD([p], lr=1.0), number)


def test_the_default_device_does_not_matter(tmp_path):
    """Set to one on which nothing can be read, it is used nowhere."""
    model, base = network(), torch.zeros(20)
    views = [nn.Parameter(base[:8]), nn.Parameter(base[8:])]
    torch.set_default_device("meta")
    try:
        opt = AGNOptimizer(torch.optim.Adam(model.parameters(), lr=0.1), 2, named_parameters=model)
        for _ in range(5):
            for p in model.parameters():
                p.grad = torch.ones(p.shape, device="cpu")
            opt.step()
        state = opt.state_dict()
        local = values(model.parameters())
        with opt.center_weights():
            assert_same(model.parameters(), center(opt))
        opt.load_state_dict(state)
        assert_same(model.parameters(), local)
        opt.center.save(tmp_path / "center")
        opt.center.load(tmp_path / "center")
        assert_same(model.parameters(), opt.center_state_dict(model).values())
        assert all(t.device.type == "cpu" for t in state["hvd_agn"]["anchor"].values())
        shared = AGNOptimizer(torch.optim.SGD(views, lr=1.0), 1)  # the two are told apart in their storage
        for p in views:
            p.grad = torch.ones(p.shape, device="cpu")
        shared.step()
        assert_same([base], [torch.full((20,), -1.0, device="cpu")])
        opt.close()
        gradients = AGNOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), 1, accumulate="gradients")
        gradients.step()
        gradients.load_state_dict(gradients.state_dict())
    finally:
        torch.set_default_device("cpu")


# ---- wrappers

WRAPPERS = {
    "plain": lambda model: model,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "a part compiled": lambda model: nn.Sequential(torch.compile(model[0], backend="eager"), *model[1:]),
    "activation checkpoints": lambda model: nn.Sequential(checkpoint_wrapper(model[0]), *model[1:]),
    "data parallel": nn.DataParallel,  # which names parameters as DistributedDataParallel does
    "all": lambda model: torch.compile(
        nn.DataParallel(nn.Sequential(checkpoint_wrapper(model[0]), *model[1:])), backend="eager"
    ),
}


@pytest.mark.parametrize("wrapper", list(WRAPPERS))
def test_what_was_saved_with_a_wrapper_is_found_without_it_and_the_other_way_around(tmp_path, wrapper):
    for save, load in ((WRAPPERS[wrapper], WRAPPERS["plain"]), (WRAPPERS["plain"], WRAPPERS[wrapper])):
        model = network(0)
        saving = save(model)
        opt = sgd(saving, saving.named_parameters())
        assert list(opt.center.snapshot()) == NAMES
        push(opt, 1.0)
        backward(model)
        opt.step()
        opt.center.save(tmp_path / "center")
        center, state, local = opt.center.snapshot(), opt.state_dict(), values(model.parameters())
        opt.close()
        model = network(1)
        loading = load(model)
        with sgd(loading, loading.named_parameters()) as again:
            again.center.load(tmp_path / "center")
            assert_same(model.parameters(), center.values())
            with torch.no_grad():
                for p, value in zip(model.parameters(), local, strict=True):
                    p.copy_(value)
            again.load_state_dict(state)
            again.flush()  # one step, from the anchor of before
            for value, before, start, after in zip(
                center.values(), local, state["hvd_agn"]["anchor"].values(), model.parameters(), strict=True
            ):
                np.testing.assert_allclose(after.detach(), value + (before - start).numpy(), rtol=1e-6)


def test_files_with_the_names_of_wrappers(tmp_path):
    """As older versions, and arrays that are named by hand, have them."""
    arrays = {f"module._orig_mod.{name}": np.full(p.shape, 3, "f4") for name, p in network().named_parameters()}
    with Center(arrays) as center:
        center.save(tmp_path / "center")
    model = network()
    with sgd(model, model) as opt:
        opt.center.load(tmp_path / "center")
        opt.center.save(tmp_path / "plain")
        for p in model.parameters():
            assert_all(p, 3)
        state = opt.state_dict()
    own = state["hvd_agn"]
    own["anchor"] = {f"_orig_mod.{name}": value for name, value in own["anchor"].items()}
    with sgd(model, model) as opt:
        opt.load_state_dict(state)
        anchor = opt.state_dict()["hvd_agn"]["anchor"]
        assert list(anchor) == NAMES
        assert_same(anchor.values(), own["anchor"].values())
    with Center(arrays) as center:
        center.load(tmp_path / "plain")


def test_a_name_that_is_not_found_is_said_with_the_one_that_is_there(tmp_path):
    model = network()
    with sgd(model, model) as opt:
        opt.center.save(tmp_path / "center")
        state = opt.state_dict()
    renamed = [(name.replace("2.", "head."), p) for name, p in model.named_parameters()]
    with sgd(model, renamed) as opt:
        with pytest.raises(CheckpointError, match=r"'head\.weight' is missing; '2\.weight' is there instead"):
            opt.center.load(tmp_path / "center")
        with pytest.raises(CheckpointError, match=r"'head\.weight' is missing; '2\.weight' is there instead"):
            opt.load_state_dict(state)


def test_names_that_would_become_one_keep_the_wrappers_part():
    model = nn.ModuleDict({"a": nn.Linear(2, 1, bias=False), "module": nn.Linear(2, 1, bias=False)})
    with sgd(model, model) as opt:
        assert list(opt.center.snapshot()) == ["a.weight", "module.weight"]
    model["a"]._orig_mod = nn.Linear(2, 1, bias=False)
    with sgd(model, model) as opt:
        assert list(opt.center.snapshot()) == ["a.weight", "a._orig_mod.weight", "module.weight"]
    with pytest.raises(LayoutError, match="two parameters are named 'x'"):
        sgd(model, [("x", p) for p in model.parameters()])


# ---- center_state_dict


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("wrapper", list(WRAPPERS))
def test_the_state_dict_of_a_wrapped_model_is_all_the_centers(wrapper, named):
    model = network()
    wrapped = WRAPPERS[wrapper](model)
    opt = sgd(wrapped, wrapped.named_parameters() if named else None)
    push(opt, 1.0)
    center = opt.center.snapshot()
    for given in (wrapped, model):
        state = opt.center_state_dict(given)
        assert list(state) == list(given.state_dict())
        assert_same(state.values(), center.values())
    part = opt.center_state_dict(model[2])
    assert_same(part.values(), list(center.values())[2:])


class Copying(nn.Module):
    """Its state dict has a copy of the weight, in another type and on its side if so wanted, for deployment."""

    def __init__(self, change):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(9.0).reshape(3, 3))
        self.register_state_dict_post_hook(lambda _, state, prefix, __: self.replace(state, prefix + "weight", change))

    def replace(self, state, key, change):
        state[key] = change(state[key])


def test_a_copy_that_a_hook_has_put_into_the_state_dict_is_filled_or_refused():
    model = nn.Sequential(Copying(torch.Tensor.half), nn.Linear(3, 1))
    opt = sgd(model)
    push(opt, 1.0)
    state = opt.center_state_dict(model)
    assert state["0.weight"].dtype == torch.float16
    assert_same(state.values(), [value.to(t.dtype) for value, t in zip(center(opt), state.values(), strict=True)])
    model = nn.Sequential(Copying(torch.t_copy), nn.Linear(3, 1))
    opt = sgd(model, model)
    with pytest.raises(ConfigError, match=r"no place for '0\.weight'.*Take the state dict inside"):
        opt.center_state_dict(model)


def test_a_copy_of_the_model_is_refused_and_said_what_to_give():
    model = network()
    opt = sgd(model, model)
    push(opt, 1.0)
    average = torch.optim.swa_utils.AveragedModel(model)
    for other in (copy.deepcopy(model), average, network()):
        with pytest.raises(
            ConfigError, match=r"\[rank 0\] AGNOptimizer: center_state_dict\(\): model= holds none.*Give"
        ):
            opt.center_state_dict(other)
    half = nn.Sequential(model[0], nn.Tanh(), copy.deepcopy(model[2]))
    with pytest.raises(
        ConfigError, match=r"does not hold '2\.weight', which is exchanged, but '2\.weight', which is not"
    ):
        opt.center_state_dict(half)
    average.module.load_state_dict(opt.center_state_dict(model))  # as the message says
    assert_same(average.module.parameters(), opt.center.snapshot().values())
    larger = nn.Sequential(model, nn.Linear(3, 1))  # parameters besides are its own
    assert_same(list(opt.center_state_dict(larger).values())[:4], opt.center.snapshot().values())
