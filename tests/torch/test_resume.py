"""AGNOptimizer over more than one run and rank: checkpoints, ranks, an early end."""

import copy
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import on_ranks
from torch import nn
from training import assert_all, assert_same, backward, count, image_network, push, values, wrap

from hvd_agn import rules
from hvd_agn.errors import CheckpointError, LayoutError, StalenessWarning
from hvd_agn.torch import AGNOptimizer

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

    model = image_network(0, dtype)
    opt = wrap(model, rule=rule)
    train(model, opt, range(14))
    expected = values(seen(model, opt))

    model = image_network(0, dtype)
    opt = wrap(model, rule=rule)
    train(model, opt, range(stop))
    save(tmp_path, model, opt)
    opt.close()
    model = image_network(1, dtype)
    opt = wrap(model, rule=rule)
    load(tmp_path, model, opt)
    train(model, opt, range(stop, 14))
    assert_same(seen(model, opt), expected)
    assert opt.state_dict()["hvd_agn"]["steps_since_exchange"] == 14 % opt.communication_period


def test_the_wrapped_optimizers_state_dict_is_taken_too():
    model = image_network()
    plain = torch.optim.Adam(model.parameters(), lr=0.02)
    backward(model, 0)
    plain.step()
    twin = image_network()
    opt = wrap(twin)
    backward(twin, 1)
    opt.step()
    local = values(twin.parameters())
    opt.load_state_dict(plain.state_dict())
    assert opt.param_groups[0]["lr"] == 0.02
    assert_same(opt.state_dict()["state"][0].values(), plain.state_dict()["state"][0].values())
    assert_same(twin.parameters(), local)
    assert_same([torch.from_numpy(each) for each in opt.center.snapshot().values()], local)
    assert opt.state_dict()["hvd_agn"]["steps_since_exchange"] == 0
    plain.load_state_dict({key: part for key, part in opt.state_dict().items() if key != "hvd_agn"})


def larger():
    model = image_network()
    model[3] = nn.Linear(64, 10)
    return model


@pytest.mark.parametrize(
    ("make", "name"),
    [(larger, r"3\.(weight|bias)"), (lambda: image_network(dtype=torch.float64), r"\d\.(weight|bias)")],
    ids=["shape", "type"],
)
def test_a_state_dict_of_another_model_is_refused_by_name_and_nothing_restored(make, name):
    model, other = image_network(), make()
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
    for part in (lambda own: own.pop("anchor"), lambda own: own["center"].pop("values")):
        assert_same(part(after["hvd_agn"]).values(), part(before["hvd_agn"]).values())
    assert after["hvd_agn"] == before["hvd_agn"]
    assert_same(model.parameters(), parameters)


def test_loading_the_center_sets_all_parameters_and_drops_the_unfinished_period(tmp_path):
    """The channels_last weight too, which is exchanged as a copy."""
    model = image_network()
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
    model = image_network(comm.rank + 5)
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
    model = image_network()
    opt = wrap(model)
    for step in range(6):
        backward(model, step)
        opt.step()
    save(tmp_path, model, opt)
    opt.close()
    on_ranks(2, continue_on_two_ranks, str(tmp_path))
    for rank in (0, 1):
        model = image_network()
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
    assert rank0[0][0][1] == Path(__file__).name


def restore_and_owe_nothing():
    """With another anchor: what was rounded away on the way from the old one is of another life."""
    from mpi4py import MPI

    p = nn.Parameter(torch.zeros(300, dtype=torch.float64))
    opt = AGNOptimizer(torch.optim.SGD([p], lr=1.0), 2, transport="mailbox", wire_dtype="int8")
    p.grad = -torch.linspace(1, 2, 300, dtype=torch.float64)
    if MPI.COMM_WORLD.rank == 1:
        state = copy.deepcopy(opt.state_dict())
        opt.step()
        opt.step()
        assert opt._worker.client.owes
        opt.load_state_dict(state)
        assert not opt._worker.client.owes
    MPI.COMM_WORLD.Barrier()


def test_a_restored_worker_owes_nothing():
    on_ranks(2, restore_and_owe_nothing)


def fail_on_rank_1():
    """Rank 1 alone has a parameter that cannot be exchanged."""
    from mpi4py import MPI

    p = nn.Parameter(torch.zeros(3, dtype=torch.complex64 if MPI.COMM_WORLD.rank == 1 else torch.float32))
    with pytest.raises(LayoutError, match=r"params\[0\]' cannot be exchanged: it is torch.complex64"):
        AGNOptimizer(torch.optim.SGD([p], lr=1.0))


def test_an_error_of_one_rank_reaches_all():
    on_ranks(2, fail_on_rank_1, timeout=60)
