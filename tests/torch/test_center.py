"""AGNOptimizer and its center: looks at it, flush and pull, close, refused updates."""

import numpy as np
import pytest
import torch
from torch import nn
from training import assert_all, assert_same, backward, count, image_network, push, values, wrap

from hvd_agn.errors import NonFiniteError, NonFiniteWarning, StallError, UsageError
from hvd_agn.torch import AGNOptimizer

# ---- looking at the center


def test_center_weights_are_the_centers_and_then_the_local_ones_again():
    """A run that looks goes on as one that does not, also when the evaluation fails."""
    models = [image_network(), image_network()]
    opts = [wrap(m) for m in models]
    for step in range(7):
        for model, opt in zip(models, opts, strict=True):
            backward(model, step)
            opt.step()
            push(opt, 0.125)
        local = values(models[0].parameters())
        with opts[0].center_weights():
            assert_same(models[0].parameters(), opts[0].center.snapshot().values())
            assert not torch.equal(models[0][0].bias, local[1])
        assert_same(models[0].parameters(), local)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), opts[0].center_weights():
            models[0][3](torch.zeros(1, 1))
        assert_same(models[0].parameters(), local)
    assert_same(models[0].parameters(), values(models[1].parameters()))


def test_only_looking_is_possible_inside_center_weights():
    p, opt = count()
    opt.step()
    state = opt.state_dict()
    refused = {
        "step": opt.step,
        "flush": opt.flush,
        "pull": opt.pull,
        "center_weights": lambda: opt.center_weights().__enter__(),
        "state_dict": opt.state_dict,
        "load_state_dict": lambda: opt.load_state_dict(state),
        "Center.load": lambda: opt.center.load("nowhere"),
    }
    with opt.center_weights():
        for name, call in refused.items():
            with pytest.raises(UsageError, match=rf"{name}\(\) inside center_weights\(\)"):
                call()
        with pytest.raises(UsageError, match="Call its step"):
            opt.center.exchange()
        assert_all(opt.center.snapshot()["p"], 0)
        assert_all(p, 0)
    assert_all(p, 1)
    opt.flush()
    assert_all(opt.center.snapshot()["p"], 1)


def test_close_inside_center_weights_loses_nothing():
    p, opt = count()
    opt.step()
    with opt.center_weights(), pytest.raises(UsageError, match=r"inside center_weights\(\)"):
        opt.close()
    opt.flush()
    assert_all(opt.center.snapshot()["p"], 1)
    assert_all(p, 1)


@pytest.mark.parametrize("layout", ["contiguous", "transposed later"])
def test_evaluation_in_inference_mode(layout):
    p = nn.Parameter(torch.zeros(4, 3))
    opt = AGNOptimizer(torch.optim.SGD([p], lr=1.0), 2)
    if layout != "contiguous":
        p.data = torch.zeros(3, 4).t()
    with torch.inference_mode(), opt.center_weights():
        assert_all(p, 0)
    for _ in range(2):
        p.grad = torch.full((4, 3), -1.0)
        opt.step()
    assert_all(p, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_center_state_dict_fills_a_fresh_model(dtype):
    """Exchanged parameters from the center, in their own type; frozen ones and buffers from the model."""
    model = image_network(0, dtype)
    model[1].weight.requires_grad_(False)
    opt = wrap(model)
    backward(model, 0)
    opt.step()
    local = values(model.parameters())
    push(opt, 1.0)
    state = opt.center_state_dict(model)
    fresh = image_network(1, dtype)
    fresh.load_state_dict(state)
    assert_same(model.parameters(), local)
    assert_same(fresh.buffers(), model.buffers())
    assert_same([fresh[1].weight], [model[1].weight])
    opt.pull()
    assert_same(fresh.parameters(), values(model.parameters()))
    assert {key: t.dtype for key, t in state.items()} == {key: t.dtype for key, t in model.state_dict().items()}


class Tied(nn.Module):
    """One weight under two names: one Parameter, or two that share their storage."""

    def __init__(self, one):
        super().__init__()
        self.a = nn.Parameter(torch.zeros(4))
        self.b = self.a if one else nn.Parameter(self.a.data)


@pytest.mark.parametrize("one", [True, False])
def test_center_state_dict_has_a_tied_parameter_under_both_names(one):
    model = Tied(one)
    opt = AGNOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), 3, named_parameters=model.named_parameters())
    push(opt, 1.0)
    state = opt.center_state_dict(model)
    assert_all(state["a"], 1)
    assert_all(state["b"], 1)


def test_pull_drops_and_flush_keeps_the_unfinished_period():
    p, opt = count()
    opt.step()
    opt.pull()
    assert_all(p, 0)
    opt.flush()  # nothing to push
    assert opt.center.version == 0
    opt.step()
    opt.step()
    opt.flush()
    assert_all(p, 1)
    for _ in range(4):
        opt.step()
    assert_all(p, 2)
    assert opt.center.version == 2
    opt.step()
    opt.center.pull()  # is the optimizer's
    opt.flush()
    assert opt.center.version == 2


def test_autograd_notices_that_the_center_changed_a_parameter():
    p, opt = count()
    loss, version = (p * p).sum(), p._version
    opt.pull()
    assert p._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_stats():
    p, opt = count(2)
    for _ in range(5):
        opt.step()
    push(opt, 1.0)
    opt.step()
    p.grad.fill_(torch.inf)
    opt.step()
    with pytest.warns(NonFiniteWarning):
        opt.step()
    stats = opt.stats()
    assert (stats["exchanges"], stats["pushes_refused"], stats["pulls"], stats["staleness_max"]) == (3, 1, 1, 1)
    assert stats["center_version"] == 4
    assert stats.keys() == opt.center.stats().keys()


@pytest.mark.parametrize("part", ["pull", "center_weights"])
def test_a_look_or_pull_that_is_cut_short_changes_nothing_at_the_center(part, monkeypatch):
    """The native call has done its work when the error comes, as it has for the first blocks when a rank stalls."""
    p = nn.Parameter(torch.zeros(4, 3).t())
    opt = AGNOptimizer(torch.optim.SGD([p], lr=1.0), 5)
    push(opt, 10.0)
    client = opt._worker.client
    native = {"pull": client.pull, "center_weights": client.peek}[part]

    def cut_short():
        native()
        raise StallError("cut short")

    monkeypatch.setattr(client, "pull" if part == "pull" else "peek", cut_short)
    p.grad = torch.full((3, 4), -1.0)
    opt.step()
    with pytest.raises(StallError):
        opt.pull() if part == "pull" else opt.center_weights().__enter__()
    opt.flush()
    expected = 10 if part == "pull" else 11
    np.testing.assert_array_equal(opt.center.snapshot()["param_groups[0].params[0]"], expected)


# ---- close


def test_close_pushes_and_leaves_the_wrapped_optimizer_usable():
    p, opt = count()
    opt.step()
    opt.step()
    push(opt, 10.0)
    opt.close()
    opt.close()
    assert_all(p, 11)
    for name in ("step", "flush", "pull", "stats", "state_dict"):
        with pytest.raises(UsageError, match=r"\[rank 0\] count: used after close"):
            getattr(opt, name)()
    for call in (lambda: opt.load_state_dict({}), lambda: opt.center_state_dict(nn.Linear(1, 1))):
        with pytest.raises(UsageError, match="used after close"):
            call()
    with pytest.raises(UsageError, match="used after close"), opt.center_weights():
        pass
    assert_all(p, 11)
    opt.optimizer.step()
    assert_all(p, 12)
    again = AGNOptimizer(opt.optimizer, 1)
    again.step()
    assert_all(again.center.snapshot()["param_groups[0].params[0]"], 13)


def test_with_closes():
    p, opt = count()
    with opt:
        opt.step()
    assert_all(p, 1)
    with pytest.raises(UsageError, match="used after close"):
        opt.step()


@pytest.mark.parametrize(("push_on_error", "expected"), [(False, 1), (True, 11)])
def test_with_that_an_error_leaves_pushes_only_if_asked_to(push_on_error, expected):
    p, opt = count(push_on_error=push_on_error)
    opt.step()
    push(opt, 10.0)
    with pytest.raises(ZeroDivisionError), opt:
        raise ZeroDivisionError
    assert_all(p, expected)  # its own step, or with that of the other, from the center
    with pytest.raises(UsageError, match="used after close"):
        opt.step()


# ---- NaN and Inf


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_poisoned_update_is_refused_and_the_parameters_set_back(poison):
    p, opt = count(2)
    opt.step()
    p.grad[123] = poison
    with pytest.warns(NonFiniteWarning, match=r"\[rank 0\] count: the update of 'p' has a NaN or an Inf"):
        opt.step()
    assert_all(p, 0)
    assert opt.center.version == 0
    p.grad.fill_(-1.0)
    for _ in range(4):
        opt.step()
    assert_all(p, 2)
    assert_all(opt.center.snapshot()["p"], 2)


def test_a_poisoned_update_of_a_parameter_that_is_exchanged_as_a_copy():
    model = image_network()
    opt = wrap(model, 1)
    start = values(model.parameters())
    backward(model, 0)
    model[0].weight.grad[1, 1, 1, 1] = torch.nan
    with pytest.warns(NonFiniteWarning, match=r"'0\.weight'"):
        opt.step()
    assert_same(model.parameters(), start)


def test_an_update_that_is_far_out_is_refused():
    """300 elements that go up by 1 have a norm of 17.32."""
    p, opt = count(2, max_norm=18.0)
    opt.step()
    opt.step()
    p.grad[:] = -1.1
    opt.step()
    with pytest.warns(
        NonFiniteWarning, match=r"\[rank 0\] count: the update has a norm of 19\.05.*, above max_norm=18\.0"
    ):
        opt.step()
    assert_all(p, 1)
    assert opt.stats()["pushes_refused"] == 1
    p.grad[:] = -1
    opt.step()
    opt.step()
    assert_all(opt.center.snapshot()["p"], 2)


def test_a_poisoned_update_raises_if_asked_to():
    p, opt = count(2, on_nonfinite="raise")
    opt.step()
    p.grad[123] = torch.nan
    with pytest.raises(NonFiniteError, match="'p' has a NaN or an Inf"):
        opt.step()
    assert p[123].isnan()
    assert_all(p[0], 2)
    opt.pull()
    p.grad.fill_(-1.0)
    opt.step()
    opt.step()
    assert_all(p, 1)


def test_the_steps_of_a_refused_update_are_forgotten_when_the_warning_is_an_error():
    p, opt = count(2)
    opt.step()
    p.grad.fill_(torch.nan)
    with pytest.raises(NonFiniteWarning):  # the filter of all tests
        opt.step()
    p.grad.fill_(-1.0)
    opt.step()
    opt.step()
    assert_all(p, 1)
