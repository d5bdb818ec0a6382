"""AGNOptimizer beyond its steps: looks at the center, refused updates, flush, close, exit, checkpoints, ranks."""

import copy
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import on_ranks
from torch import nn

from hvd_agn import rules
from hvd_agn.errors import (
    CheckpointError,
    LayoutError,
    NonFiniteError,
    NonFiniteWarning,
    StalenessWarning,
    StallError,
    UsageError,
)
from hvd_agn.torch import AGNOptimizer


def network(seed=0, dtype=torch.float32):
    """A convolution whose weight is channels_last, batch norm with its buffers, and more than one block."""
    torch.manual_seed(seed)
    layers = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 9)
    return nn.Sequential(*layers).to(dtype, memory_format=torch.channels_last)


def backward(model, step):
    model.zero_grad()
    x = torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).dtype)
    model(x).square().mean().backward()


def wrap(model, period=4, rule=None):
    inner = torch.optim.Adam(model.parameters(), lr=0.01)
    return AGNOptimizer(inner, period, rule=rule, named_parameters=model.named_parameters())


def count(period=4, start=0.0, on_nonfinite="skip"):
    """A parameter that goes up by 1 in every step, and its optimizer."""
    p = nn.Parameter(torch.full((300,), start))
    opt = AGNOptimizer(
        torch.optim.SGD([p], lr=1.0), period, named_parameters=[("p", p)], on_nonfinite=on_nonfinite, name="count"
    )
    p.grad = torch.full_like(p, -1.0)
    return p, opt


def push(opt, amount):
    """Another worker of this process adds ``amount`` to every element of the center."""
    arrays = [np.zeros_like(a) for a in opt.center.snapshot().values()]
    client = opt.center.client(arrays)
    for array in arrays:
        array += amount
    client.exchange(1)


def values(tensors):
    return [t.detach().clone() for t in tensors]


def assert_same(tensors, expected):
    for t, e in zip(tensors, expected, strict=True):
        torch.testing.assert_close(t.detach(), torch.as_tensor(e), rtol=0, atol=0)


def assert_all(array, value):
    np.testing.assert_array_equal(torch.as_tensor(array).detach(), value)


# ---- looking at the center


def test_center_weights_are_the_centers_and_then_the_local_ones_again():
    """A run that looks goes on as one that does not, also when the evaluation fails."""
    models = [network(), network()]
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
    model = network(0, dtype)
    model[1].weight.requires_grad_(False)
    opt = wrap(model)
    backward(model, 0)
    opt.step()
    local = values(model.parameters())
    push(opt, 1.0)
    state = opt.center_state_dict(model)
    fresh = network(1, dtype)
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
    model = network()
    opt = wrap(model, 1)
    start = values(model.parameters())
    backward(model, 0)
    model[0].weight.grad[1, 1, 1, 1] = torch.nan
    with pytest.warns(NonFiniteWarning, match=r"'0\.weight'"):
        opt.step()
    assert_same(model.parameters(), start)


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


# ---- checkpoints


def save(folder, model, opt):
    opt.center.save(folder / "center")
    state = {"model": model.state_dict(), "optimizer": opt.state_dict()}
    torch.save(state, folder / f"worker{opt.center.rank}")


def load(folder, model, opt, rank=0):
    """In the documented order."""
    opt.center.load(folder / "center")
    state = torch.load(folder / f"worker{rank}", weights_only=True)
    model.load_state_dict(state["model"])
    opt.load_state_dict(state["optimizer"])


@pytest.mark.parametrize("stop", [5, 6, 7, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", [None, rules.SGD(0.7, momentum=0.9)], ids=["Add", "SGD"])
def test_a_resumed_run_is_bit_identical(stop, dtype, rule, tmp_path):
    """Stopped at every place in a period, with pushes of another worker that this one has not seen."""

    def train(model, opt, steps):
        for step in steps:
            backward(model, step)
            opt.step()
            if step % 3 == 1:
                push(opt, 0.25)

    def seen(model, opt):
        center, slots, version = opt.center._read()
        moments = [state[key] for state in opt.state.values() for key in sorted(state)]
        planes = [torch.from_numpy(a) for named in (center, *slots.values()) for a in named.values()]
        return [*model.state_dict().values(), *moments, *planes, torch.tensor(version)]

    model = network(0, dtype)
    opt = wrap(model, rule=rule)
    train(model, opt, range(14))
    expected = values(seen(model, opt))

    model = network(0, dtype)
    opt = wrap(model, rule=rule)
    train(model, opt, range(stop))
    save(tmp_path, model, opt)
    opt.close()
    model = network(1, dtype)
    opt = wrap(model, rule=rule)
    load(tmp_path, model, opt)
    train(model, opt, range(stop, 14))
    assert_same(seen(model, opt), expected)
    assert opt.state_dict()["hvd_agn"]["steps"] == 14


def test_the_wrapped_optimizers_state_dict_is_taken_too():
    model = network()
    plain = torch.optim.Adam(model.parameters(), lr=0.02)
    backward(model, 0)
    plain.step()
    twin = network()
    opt = wrap(twin)
    backward(twin, 1)
    opt.step()
    local = values(twin.parameters())
    opt.load_state_dict(plain.state_dict())
    assert opt.param_groups[0]["lr"] == 0.02
    assert_same(opt.state_dict()["state"][0].values(), plain.state_dict()["state"][0].values())
    assert_same(twin.parameters(), local)
    assert opt.state_dict()["hvd_agn"]["steps_since_exchange"] == 1
    plain.load_state_dict({key: part for key, part in opt.state_dict().items() if key != "hvd_agn"})


def larger():
    model = network()
    model[3] = nn.Linear(64, 10)
    return model


@pytest.mark.parametrize(
    ("make", "name"),
    [(larger, r"3\.(weight|bias)"), (lambda: network(dtype=torch.float64), r"\d\.(weight|bias)")],
    ids=["shape", "type"],
)
def test_a_state_dict_of_another_model_is_refused_by_name_and_nothing_restored(make, name):
    model, other = network(), make()
    opt, foreign = wrap(model), wrap(other)
    backward(model, 0)
    opt.step()
    before, parameters = copy.deepcopy(opt.state_dict()), values(model.parameters())
    with pytest.raises(CheckpointError, match=rf"\[rank 0\] AGNOptimizer: parameter '{name}' is .* here and"):
        opt.load_state_dict(foreign.state_dict())
    after = opt.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, state in before["state"].items():
        assert_same(after["state"][key].values(), state.values())
    assert_same(after["hvd_agn"].pop("anchor").values(), before["hvd_agn"].pop("anchor").values())
    assert after["hvd_agn"] == before["hvd_agn"]
    assert_same(model.parameters(), parameters)


def test_loading_the_center_sets_all_parameters_and_drops_the_unfinished_period(tmp_path):
    """The channels_last weight too, which is exchanged as a copy."""
    model = network()
    opt = wrap(model)
    push(opt, 1.0)
    opt.center.save(tmp_path / "center")
    saved = opt.center.snapshot()
    push(opt, 1.0)
    backward(model, 0)
    opt.step()
    opt.center.load(tmp_path / "center")
    assert_same(model.parameters(), saved.values())
    opt.flush()
    assert opt.center.version == 1


def continue_on_two_ranks(folder):
    """From one rank's files; then on, and the files of two ranks."""
    from mpi4py import MPI

    comm, folder = MPI.COMM_WORLD, Path(folder)
    model = network(comm.rank + 5)
    opt = wrap(model)
    load(folder, model, opt)
    center = opt.center.snapshot()
    assert_same(model.parameters(), center.values())
    assert opt.state[model[3].bias]["step"] == 6
    comm.Barrier()
    assert opt.center.version == 1
    for _ in range(4):
        backward(model, comm.rank)
        opt.step()
    comm.Barrier()
    assert opt.center.version == 3
    backward(model, 10)
    opt.step()
    comm.Barrier()
    save(folder, model, opt)
    comm.Barrier()  # at exit the last step is pushed


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path):
    """One rank, two, one: the wrapped state is restored, and the parameters are the center's."""
    model = network()
    opt = wrap(model)
    for step in range(6):
        backward(model, step)
        opt.step()
    save(tmp_path, model, opt)
    opt.close()
    on_ranks(2, continue_on_two_ranks, str(tmp_path))
    for rank in (0, 1):
        model = network()
        opt = wrap(model)
        load(tmp_path, model, opt, rank)
        assert opt.center.version == 3
        assert_same(model.parameters(), opt.center.snapshot().values())
        saved = torch.load(tmp_path / f"worker{rank}", weights_only=True)["optimizer"]
        assert_same(opt.state_dict()["state"][0].values(), saved["state"][0].values())
        assert opt.state[model[3].bias]["step"] == 11
        opt.flush()  # nothing left to push
        assert opt.center.version == 3


# ---- several ranks


def wait_for(opt, value):
    deadline = time.monotonic() + 60
    while not (opt.center.snapshot()["p"] == value).all():
        assert time.monotonic() < deadline, opt.center.snapshot()["p"]
        time.sleep(0.01)


def train_and_end_early():
    """Integer gradients and another period on each rank: the center gains what is pushed. Then rank 1 ends early."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    moved = nn.Parameter(torch.full((3, 200), 7.0 * comm.rank).t())
    frozen = nn.Parameter(torch.full((5,), float(comm.rank)), requires_grad=False)
    idle = nn.Parameter(torch.full((5,), 3.0 + comm.rank))
    period = 1 + comm.rank
    opt = AGNOptimizer(torch.optim.SGD([moved, frozen, idle], lr=1.0), period)
    for p, rank_0s in ((moved, 0), (idle, 3), (frozen, comm.rank)):
        assert_all(p, rank_0s)
    rng = np.random.default_rng(comm.rank)
    pushed = np.zeros(moved.shape, np.float32)
    for _ in range(40):
        opt.zero_grad()
        moved.grad = torch.from_numpy(rng.integers(-9, 10, moved.shape)).float() * 2
        pushed -= moved.grad.numpy() / period
        opt.step()
    total = comm.allreduce(pushed)
    assert_all(opt.center.snapshot()["param_groups[0].params[0]"], total)
    assert opt.center.version == 40 + 20
    opt.pull()
    for p, expected in ((moved, total), (idle, 3), (frozen, comm.rank)):
        assert_all(p, expected)

    _, closed = count(5)
    p, left = count(5)
    if comm.rank == 1:  # closes one in the middle of a period, and is gone in the middle of another
        for opt in (closed, left):
            opt.step()
            opt.step()
        closed.close()
        return
    wait_for(closed, 1)
    for _ in range(25):  # five exchanges
        left.step()
    wait_for(left, 5 + 1)
    left.pull()
    assert_all(p, 6)


def test_nothing_is_lost_on_two_ranks_and_a_rank_that_ends_early_holds_up_nobody():
    on_ranks(2, train_and_end_early)


def count_warnings():
    """The staleness warnings of each optimizer, with the file that they point to."""
    told = []
    for period, rule in [(1, None), (2, None), (1, rules.Add(0.5)), (1, rules.SGD(0.75, 0.9))]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            p = nn.Parameter(torch.zeros(3))
            AGNOptimizer(torch.optim.SGD([p], lr=1.0), period, rule=rule)
        mine = [w for w in caught if issubclass(w.category, StalenessWarning)]
        told.append([(str(w.message), Path(w.filename).name) for w in mine])
    return told


def test_too_many_workers_per_period_are_warned_of_once_with_the_remedy():
    rank0, *others = on_ranks(4, count_warnings)
    assert others == [[[], [], [], []]] * 3
    assert [len(told) for told in rank0] == [1, 0, 0, 1]
    assert "4 workers, a communication period of 1" in rank0[0][0][0]
    assert "communication_period=2 or more" in rank0[0][0][0]
    assert "0.5 for 1." in rank0[0][0][0]
    assert "0.5 for 0.75." in rank0[3][0][0]
    assert rank0[0][0][1] == "test_torch_resume.py"


def fail_on_rank_1():
    """Rank 1 alone has a parameter that cannot be exchanged."""
    from mpi4py import MPI

    p = nn.Parameter(torch.zeros(3, dtype=torch.complex64 if MPI.COMM_WORLD.rank == 1 else torch.float32))
    with pytest.raises(LayoutError, match=r"params\[0\]' cannot be exchanged: it is torch.complex64"):
        AGNOptimizer(torch.optim.SGD([p], lr=1.0))


def test_an_error_of_one_rank_reaches_all():
    on_ranks(2, fail_on_rank_1, timeout=30)


@pytest.mark.parametrize("part", ["pull", "center_weights"])
def test_a_look_or_pull_that_is_cut_short_changes_nothing_at_the_center(part, monkeypatch):
    """The native call has done its work when the error comes, as it has for the first blocks when a rank stalls."""
    p = nn.Parameter(torch.zeros(4, 3).t())
    opt = AGNOptimizer(torch.optim.SGD([p], lr=1.0), 5)
    push(opt, 10.0)
    client = opt._client
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


def test_with_closes():
    p, opt = count()
    with opt:
        opt.step()
    assert_all(p, 1)
    with pytest.raises(UsageError, match="used after close"):
        opt.step()
