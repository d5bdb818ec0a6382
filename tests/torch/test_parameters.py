"""The parameters of an AGNOptimizer: which are refused, their names, special ones, storage that moves."""

import numpy as np
import pytest
import torch
from torch import nn
from training import INNER, assert_all, backward, network, push, vector

from hvd_agn.errors import LayoutError, UsageError
from hvd_agn.torch import AGNOptimizer

# ---- refused


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

    def names(optimizer, **arguments):
        with AGNOptimizer(optimizer, **arguments) as opt:
            return list(opt.center.snapshot())

    assert names(plain, named_parameters=model.named_parameters()) == expected
    more = names(plain, named_parameters=((f"net.{n}", p) for n, p in model.named_parameters()))
    assert more == [f"net.{n}" for n in expected]
    assert names(torch.optim.SGD(model.named_parameters(), lr=1.0)) == expected
    two = torch.optim.SGD([{"params": [p]} for p in model[0].parameters()], lr=1.0)
    assert names(two) == ["param_groups[0].params[0]", "param_groups[1].params[0]"]


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
