"""Restored as frameworks do it: wrap, load the model, load the optimizer, on every rank; nobody loads a center.

Integers throughout: a gradient of -1 and a rate of 1 move a parameter by 1 per step, and the center by 1 per push.
"""

import time
import warnings

import numpy as np
import pytest
import torch
from ranks import on_ranks
from training import vector

from hvd_agn import rules
from hvd_agn.errors import CheckpointError, LayoutError, RestoredError, RestoredWarning, StallError
from hvd_agn.torch import AGNOptimizer

PERIOD = 4


def barrier():
    from mpi4py import MPI

    MPI.COMM_WORLD.Barrier()


def wrap(value=0.0, period=PERIOD, momentum=0.0, **arguments):
    p = vector(value)
    return p, AGNOptimizer(torch.optim.SGD([p], lr=1.0, momentum=momentum), period, **arguments)


def train(p, opt, steps):
    for _ in range(steps):
        p.grad = torch.full_like(p, -1.0)
        opt.step()


def center(opt):
    values = next(iter(opt.center.snapshot().values()))
    assert (values == values[0]).all()
    return float(values[0])


def files(path, rank):
    return f"{path}/worker{rank}.pt"


def save(path, p, opt):
    torch.save({"p": p.detach().clone(), "optimizer": opt.state_dict()}, files(path, opt.center.rank))


def load(path, p, opt, rank):
    state = torch.load(files(path, rank), weights_only=True)
    with torch.no_grad():
        p.copy_(state["p"])
    opt.load_state_dict(state["optimizer"])


def phase_one(path, transport):
    """Two pushes of 1 by each rank, then a step that is pending on even ranks and two on odd ones."""
    p, opt = wrap(transport=transport)
    train(p, opt, 2 * PERIOD)
    barrier()
    opt.flush()
    opt.pull()
    barrier()
    assert center(opt) == 2 * opt.center.size
    train(p, opt, 1 + opt.center.rank % 2)
    save(path, p, opt)
    barrier()
    train(p, opt, 20)  # what a learning rate finder has tried
    barrier()  # a rank that took over would push what it does after that
    return p, opt


def go_on(p, opt, own):
    """All that was pending is pushed once, in the period that it belongs to."""
    size = opt.center.size
    pending = 1 + opt.center.rank % 2 if own else 0
    assert p[0] == 2 * size + pending
    train(p, opt, PERIOD - pending)
    barrier()
    opt.pull()
    assert center(opt) == 3 * size
    assert p[0] == 3 * size
    return True


def resume(path, transport, source, in_place, lag):
    """``source``: the rank whose file all ranks load; None: each its own. ``lag``: the rank that comes late."""
    if in_place:
        p, opt = phase_one(path, transport)
    else:
        p, opt = wrap(100.0, transport=transport)
    rank = opt.center.rank
    if rank == lag:
        time.sleep(0.5)
    load(path, p, opt, rank if source is None else source)
    return go_on(p, opt, source in (None, rank))


def save_only(path, transport):
    phase_one(path, transport)[1].close()
    return True


@pytest.mark.parametrize("transport", ["auto", "mailbox"])
def test_each_from_its_own_file_or_all_from_one(transport, tmp_path):
    on_ranks(3, save_only, str(tmp_path), transport)
    for source, lag in (None, 0), (0, 1), (2, 0):
        assert all(on_ranks(3, resume, str(tmp_path), transport, source, False, lag))


@pytest.mark.parametrize(("lag", "transport"), [(0, "auto"), (1, "mailbox")])
def test_in_place(lag, transport, tmp_path):
    """The center has moved on."""
    assert all(on_ranks(3, resume, str(tmp_path), transport, None, True, lag))


def resume_more(path):
    p, opt = wrap(100.0)
    load(path, p, opt, 0)
    size = opt.center.size
    assert p[0] == 2 * 3  # the center of three ranks: pending steps are of another number of ranks
    train(p, opt, PERIOD)
    barrier()
    assert center(opt) == 6 + size
    return True


def test_on_another_number_of_ranks(tmp_path):
    on_ranks(3, save_only, str(tmp_path), "auto")
    assert all(on_ranks(4, resume_more, str(tmp_path)))


def trains_on_beside(path, transport, arguments):
    """Rank 0 goes back; rank 1 does not, and has steps that belong to what is no more."""
    arguments = {**arguments, "rule": rules.SGD(1.0)} if "accumulate" in arguments else arguments
    p, opt = wrap(transport=transport, **arguments)
    rank = opt.center.rank
    train(p, opt, PERIOD)
    opt.flush()
    barrier()
    opt.pull()
    if rank == 0:
        save(path, p, opt)
    barrier()
    train(p, opt, 3)
    more = np.zeros(p.shape, np.float32)
    client = opt.center.client([more])
    barrier()
    if rank == 0:
        load(path, p, opt, 0)
    barrier()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if rank == 1:
            train(p, opt, 1)
            opt.flush()
            assert (p[0], center(opt)) == (2.0, 2.0)  # dropped, and taken over
            assert not caught
            train(p, opt, 2 * PERIOD)
            opt.flush()
            assert (p[0], center(opt)) == (4.0, 4.0)
            assert [w.category for w in caught] == [RestoredWarning]
            assert "[rank 1]" in str(caught[0].message)
            more += 100
            if "accumulate" not in arguments:
                with pytest.raises(RestoredError):
                    client.exchange(1)
            client.pull()
            assert (more == 4.0).all()
    barrier()
    return True


@pytest.mark.parametrize("transport", ["auto", "mailbox"])
def test_a_rank_that_does_not_load_takes_over_and_is_told(transport, tmp_path):
    for arguments in {}, {"overlap": True}, {"accumulate": "gradients"}, {"wire_dtype": "bf16"}:
        assert all(on_ranks(2, trains_on_beside, str(tmp_path), transport, arguments))


def refused_on_rank_0(path):
    """What rank 0 could not make the center leaves it as it was, for rank 0 and for the others."""
    p, opt = wrap()
    train(p, opt, PERIOD)
    barrier()
    opt.pull()
    bare = torch.optim.SGD([vector(0.0)], lr=1.0).state_dict()
    if opt.center.rank == 0:
        with torch.no_grad():
            p.fill_(float("nan"))
        with pytest.raises(LayoutError, match="NaN"):
            opt.load_state_dict(bare)
        opt.pull()
    barrier()
    train(p, opt, PERIOD)
    barrier()
    assert center(opt) == 4.0
    barrier()
    return True


def test_what_rank_0_cannot_load_leaves_the_center_as_it_was(tmp_path):
    assert all(on_ranks(2, refused_on_rank_0, str(tmp_path)))


def loads_alone(path):
    p, opt = wrap()
    save(path, p, opt)
    if opt.center.rank == 1:
        load(path, p, opt, 1)
        # Of a shard elsewhere the host says what it waits for.
        what = "answer block" if opt.stats()["wire_bytes"] else "load the checkpoint that this rank has loaded"
        with pytest.raises(StallError, match=f"rank 0 to {what}"):
            train(p, opt, PERIOD)
    barrier()
    load(path, p, opt, 0) if opt.center.rank == 0 else None
    barrier()
    if opt.center.rank == 1:
        train(p, opt, 1)
        # What was sent to a host elsewhere was pushed when rank 0 had loaded; what came since is of a period of 5.
        assert center(opt) == pytest.approx(1.2 if opt.stats()["wire_bytes"] else 1.0)
    barrier()
    return True


@pytest.mark.parametrize("transport", ["direct", "mailbox"])
def test_a_rank_that_loads_alone_waits_for_rank_0_and_says_so(transport, tmp_path):
    limits = {"HVD_AGN_STALL_ABORT_SECONDS": "1", "HVD_AGN_STALL_SECONDS": "0.5", "HVD_AGN_TRANSPORT": transport}
    assert all(on_ranks(2, loads_alone, str(tmp_path), env=limits))


# ---- one rank


@pytest.mark.parametrize("stop", [4, 5, 6])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"rule": rules.SGD(0.5, momentum=0.5)},
        {"rule": rules.SGD(1.0), "accumulate": "gradients"},
        {"rule": rules.Add(staleness="inverse")},
    ],
    ids=["Add", "slots", "gradients", "staleness"],
)
def test_model_and_optimizer_alone_are_a_whole_checkpoint(arguments, stop, tmp_path):
    p, opt = wrap(momentum=0.5, **arguments)
    train(p, opt, stop)
    save(tmp_path, p, opt)
    train(p, opt, 10)
    q, again = wrap(50.0, momentum=0.5, **arguments)
    load(tmp_path, q, again, 0)
    train(q, again, 10)
    assert torch.equal(p, q)
    assert center(opt) == center(again)
    assert opt.center.version == again.center.version
    assert again.stats()["staleness_max"] == 0


def test_the_wrapped_optimizers_state_alone_makes_the_model_the_center():
    p, opt = wrap(7.0)
    train(p, opt, 6)
    with torch.no_grad():
        p.fill_(40.0)
    opt.load_state_dict(torch.optim.SGD([vector(0.0)], lr=1.0).state_dict())
    assert (p[0], center(opt)) == (40.0, 40.0)
    train(p, opt, PERIOD)
    assert (p[0], center(opt)) == (41.0, 41.0)


def test_a_state_of_another_center_than_was_loaded_is_refused(tmp_path):
    p, opt = wrap()
    other = wrap(5.0)[1]
    train(p, opt, 5)
    opt.center.save(tmp_path / "center")
    state = opt.state_dict()
    train(p, opt, 4)
    opt.center.load(tmp_path / "center")
    with pytest.raises(CheckpointError, match=r"another center than the one that was just loaded(.|\n)*center.load\("):
        opt.load_state_dict(other.state_dict())
    with torch.no_grad():
        p.fill_(2.0)
    opt.load_state_dict(state)  # its own
    train(p, opt, 3)
    assert center(opt) == 2.0


def test_a_rule_with_other_slots_is_refused_and_nothing_restored():
    p, opt = wrap(rule=rules.SGD(1.0, momentum=0.5))
    other = wrap(5.0)[1]
    train(p, opt, 5)
    before = (p[0].item(), center(opt))
    with pytest.raises(CheckpointError, match="does not fit SGD"):
        opt.load_state_dict(other.state_dict())
    assert before == (p[0].item(), center(opt))
