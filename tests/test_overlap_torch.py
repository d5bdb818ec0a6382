"""AGNOptimizer(overlap=True): what may be done to an optimizer while its exchange is under way."""

import os
import signal
import time
import warnings

import numpy as np
import pytest
import torch
from mailboxes import same, state, wait_until
from ranks import on_ranks
from reference import FEW_RULES, ReferenceCenter
from test_overlap import OverlapClient
from torch import nn

from hvd_agn import _core
from hvd_agn.errors import NonFiniteError, NonFiniteWarning, StallError, UsageError
from hvd_agn.torch import AGNOptimizer


def network(seed=0):
    """A convolution whose weight is channels_last, and so exchanged through a copy; more than one block."""
    torch.manual_seed(seed)
    layers = nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 9)
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def backward(model, step):
    model.zero_grad()
    x = torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(step))
    model(x).square().mean().backward()


def count(period=4, dtype=torch.float32, **options):
    """A parameter that goes up by 1 in every step, and its optimizer; each push moves the center by 1."""
    p = nn.Parameter(torch.zeros(300, dtype=dtype))
    opt = AGNOptimizer(torch.optim.SGD([p], lr=1.0), period, overlap=True, named_parameters=[("p", p)], **options)
    p.grad = torch.full_like(p, -1.0)
    return p, opt


def settle(opt):
    """What is under way has ended, and waits to be merged."""
    wait_until(lambda: opt._client.ready or not opt._client.started, "the exchange in the background")


def steps(opt, n):
    for _ in range(n):
        opt.step()
        settle(opt)


def assert_all(array, value):
    np.testing.assert_array_equal(torch.as_tensor(array).detach().float(), value)


def center_of(opt):
    return opt.center.snapshot()["p"]


# ---- arithmetic


@pytest.mark.parametrize("period", [1, 3])
@pytest.mark.parametrize("rule", FEW_RULES, ids=repr)
def test_a_run_equals_the_same_run_written_out(period, rule):
    """With a scheduler; against a plain optimizer and the reference, bit for bit; another worker pushes in between."""
    ours, theirs = network(), network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the period of 1
        opt = AGNOptimizer(torch.optim.Adam(ours.parameters(), lr=0.01), period, rule=rule, overlap=True)
    plain = torch.optim.Adam(theirs.parameters(), lr=0.01)
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 2, 0.7) for o in (opt, plain)]
    shared = [p.detach().contiguous().numpy() for p in theirs.parameters()]
    reference = ReferenceCenter(shared, rule)
    worker, their_other = (OverlapClient(reference, [a.dtype for a in shared]) for _ in range(2))
    our_other = [a.copy() for a in shared]
    our_client = opt.center.client(our_other)

    def write_back():
        with torch.no_grad():
            for p, array in zip(theirs.parameters(), worker.arrays, strict=True):
                p.copy_(torch.from_numpy(array))

    under_way = False
    for step in range(1, 12):
        backward(ours, step)
        opt.step()
        settle(opt)
        if under_way:
            worker.finish()
            write_back()
            under_way = False
        # The local step of a network is the same before and after the merge only if it comes after it.
        backward_of_reference(ours, theirs)
        plain.step()
        worker.arrays = [p.detach().contiguous().numpy().copy() for p in theirs.parameters()]
        if step % period == 0:
            worker.start(period)
            under_way = True
        for scheduler in schedulers:
            scheduler.step()
        same([p.detach().numpy() for p in ours.parameters()], worker.arrays)
        if step == 4:
            for mine, expected in zip(our_other, their_other.arrays, strict=True):
                mine += 0.01
                expected += 0.01
            our_client.exchange(2)
            their_other.exchange(2)
        same(opt.center.snapshot().values(), reference.center)
    opt.flush()
    if under_way:
        worker.finish()
    if 11 % period:
        worker.exchange(11 % period)
    same(opt.center.snapshot().values(), reference.center)
    same([p.detach().numpy() for p in ours.parameters()], worker.arrays)


def backward_of_reference(ours, theirs):
    """Both took their gradient at the same place: that of ours."""
    for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
        p.grad = q.grad.clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("period", [1, 4])
def test_every_step_counts_once(dtype, period):
    """However long flights last: here they end when they do."""
    p, opt = count(period, dtype)
    for _ in range(10 * period):
        opt.step()
    opt.flush()
    assert_all(center_of(opt), 10)
    assert_all(p, 10)
    opt.step()
    opt.flush()  # a part of a period, or a flight of one step
    assert_all(center_of(opt), 11)
    opt.flush()
    assert opt.center.version == 11


# ---- other calls during a flight


def test_flush_pull_and_looks_during_a_flight():
    p, opt = count(2)
    steps(opt, 3)
    opt.step()  # the second flight
    with opt.center_weights():
        assert_all(p, 2)
    assert_all(p, 2)
    opt.step()
    with opt.center_weights():
        assert_all(p, 2)
    assert_all(p, 3)
    opt.step()
    opt.step()
    opt.pull()  # ends the third flight and drops one step
    assert_all(p, 3)
    opt.step()
    opt.step()
    assert opt.stats()["exchanges"] in (3, 4)
    opt.flush()
    assert_all(p, 4)
    assert_all(center_of(opt), 4)
    assert opt.center.version == 4


def test_a_load_ends_the_flight(tmp_path):
    p, opt = count(2)
    opt.center.save(tmp_path / "c.safetensors")
    opt.step()
    opt.step()
    opt.center.load(tmp_path / "c.safetensors")
    assert_all(p, 0)
    assert_all(center_of(opt), 0)
    opt.step()
    opt.flush()
    assert_all(center_of(opt), 1)


@pytest.mark.parametrize("before", ["flush", "in flight", "between"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(before, tmp_path):
    model = network()
    opt = AGNOptimizer(torch.optim.Adam(model.parameters(), lr=0.01), 3, overlap=True)

    def train(model, opt, first, last):
        for step in range(first, last):
            backward(model, step)
            opt.step()
            settle(opt)

    train(model, opt, 0, 8 if before == "between" else 9)
    assert opt._client.started == (before != "between")
    if before == "flush":
        opt.flush()
    state = opt.state_dict()  # first: it ends the flight
    torch.save({"model": model.state_dict(), "optimizer": state}, tmp_path / "worker.pt")
    opt.center.save(tmp_path / "c.safetensors")
    train(model, opt, 9, 20)
    opt.flush()

    again = network(seed=5)
    resumed = AGNOptimizer(torch.optim.Adam(again.parameters(), lr=0.5), 3, overlap=True)
    train(again, resumed, 0, 3)  # and is itself in flight when it is loaded
    resumed.center.load(tmp_path / "c.safetensors")
    saved = torch.load(tmp_path / "worker.pt")
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(again, resumed, 9, 20)
    resumed.flush()
    same([p.detach() for p in again.parameters()], [p.detach() for p in model.parameters()])
    same(resumed.center.snapshot().values(), opt.center.snapshot().values())


def test_close_during_a_flight_pushes_everything():
    p, opt = count(2)
    arrays = [np.zeros(300, np.float32)]
    watch = opt.center.client(arrays)
    for _ in range(5):
        opt.step()
    seen = []
    close = type(watch).close

    def look_and_close(client):
        if client is watch:
            client.pull()
            seen.append(arrays[0].copy())
        close(client)

    watch.close = lambda: look_and_close(watch)
    opt.close()
    assert_all(seen[0], 3)
    assert_all(p, 3)
    opt.close()
    with pytest.raises(UsageError, match="used after close"):
        opt.step()
    opt.optimizer.step()
    assert_all(p, 4)


def test_several_optimizers():
    """Each with a flight of its own."""
    pairs = [count(period, name=f"count {period}") for period in (1, 2, 3)]
    for _ in range(12):
        for _, opt in pairs:
            opt.step()
    for (p, opt), expected in zip(pairs, (12, 6, 4), strict=True):
        opt.flush()
        assert_all(p, expected)
        assert_all(center_of(opt), expected)


# ---- what goes wrong in the background is told at the next step


def poison(p, opt):
    """The snapshot of a flight has a NaN."""
    opt.step()
    with torch.no_grad():
        p[7] = float("nan")
    opt.step()
    settle(opt)
    assert opt._client.started


def test_a_refused_flight_warns_at_the_next_step():
    p, opt = count(2)
    steps(opt, 2)
    poison(p, opt)
    with pytest.warns(NonFiniteWarning, match=r"\[rank 0\] AGNOptimizer: the update of 'p' has a NaN"):
        opt.step()
    assert_all(p, 1 + 1)  # the center, and this step
    assert_all(center_of(opt), 1)
    steps(opt, 1)
    opt.flush()
    assert_all(center_of(opt), 2)
    assert opt.stats()["pushes_refused"] == 1


def test_a_refused_flight_raises_at_the_next_step_if_asked_to():
    p, opt = count(2, on_nonfinite="raise")
    steps(opt, 2)
    poison(p, opt)
    with pytest.raises(NonFiniteError, match="left as they are"):
        opt.step()
    assert torch.isnan(p[7])
    opt.pull()
    assert_all(p, 1)
    steps(opt, 2)
    opt.flush()
    assert_all(center_of(opt), 2)


def test_a_warning_that_is_an_error_leaves_the_parameters_at_the_center():
    p, opt = count(2)
    poison(p, opt)
    with pytest.raises(NonFiniteWarning):  # pytest makes all warnings errors here
        opt.step()
    assert_all(p, 0)
    steps(opt, 1)
    opt.flush()
    assert_all(p, 1)
    assert_all(center_of(opt), 1)


# ---- several ranks


def wait_for(opt, value):
    wait_until(lambda: np.allclose(center_of(opt), value, rtol=1e-6), f"the center to be {value}")


def train_and_end(transport, hosts):
    """Every type and wire; then rank 1 ends in the middle of flights and periods: all of its steps are pushed."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    warnings.simplefilter("ignore")  # of the short period
    variants = [(torch.float32, None), (torch.float16, None), (torch.bfloat16, None), (torch.float64, "int8")]
    for dtype, wire in variants:
        p, opt = count(2, dtype, transport=transport, wire_dtype=wire, center_ranks=hosts)
        for _ in range(15):
            opt.step()
        opt.flush()
        comm.Barrier()
        np.testing.assert_allclose(center_of(opt), 2 * 8, rtol=0, atol=1e-9 if wire else 0)
        opt.pull()
        np.testing.assert_allclose(p.detach().double(), 16, rtol=0, atol=1e-9 if wire else 0)
        comm.Barrier()
        opt.close()

    last = [count(period, transport=transport, wire_dtype="int8", center_ranks=(0,)) for period in (3, 4)]
    for _, opt in last:
        for _ in range(7 if comm.rank == 1 else 0):
            opt.step()
    if comm.rank == 1:
        return  # two flights and an open period; three pushes and two
    wait_for(last[0][1], 3)
    wait_for(last[1][1], 2)


@pytest.mark.parametrize("transport", ["direct", "mailbox"])
def test_nothing_is_lost_on_two_ranks_and_at_exit(transport):
    on_ranks(2, train_and_end, transport, [1, 0])


def hold_a_flight():
    """Rank 1 stops with a block half written: rank 0's flight cannot end, and its next boundary gives up."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    os.environ["HVD_AGN_STALL_SECONDS"] = "0"
    os.environ["HVD_AGN_STALL_ABORT_SECONDS"] = "1" if comm.rank == 0 else "0"
    parameters = [nn.Parameter(torch.zeros(128)) for _ in range(8)]  # two in a block
    opt = AGNOptimizer(torch.optim.SGD(parameters, lr=1.0), 2, overlap=True)
    pids = comm.allgather(os.getpid())
    for p in parameters:
        p.grad = torch.full_like(p, -1.0 if comm.rank == 0 else -8.0)
    if comm.rank == 1:
        _core.signal_at(_core.Stage.half_written, 1, signal.SIGSTOP)
        opt.step()
        opt.step()
        opt.flush()
    else:
        opt.step()
        wait_for_stop(opt, pids[1])
        for _ in range(2):
            opt.step()  # the first begins a flight, during which local steps go on
        assert not opt._client.ready
        with pytest.raises(StallError, match=r"waits for block 1, locked by rank 1.*given up"):
            opt.step()
        os.kill(pids[1], signal.SIGCONT)
        opt.flush()
    comm.Barrier()
    # Of rank 0's four steps, two were pushed to all blocks but the one that was held up: 2 / 2, and then 2 / 4 where
    # those two had gone, 4 / 4 where they had not.
    for i, value in enumerate(opt.center.snapshot().values()):
        np.testing.assert_array_equal(value, 8 + (1 if i in (2, 3) else 1.5))


def wait_for_stop(opt, pid):
    wait_until(lambda: state(pid) == "T", "rank 1 to stop")
    time.sleep(0.05)


def test_a_flight_that_is_given_up_on():
    on_ranks(2, hold_a_flight)
