"""AGNOptimizer(overlap=True): its arithmetic, and every step of every rank counts once."""

import warnings

import pytest
import torch
from mailboxes import same
from ranks import on_ranks
from reference import FEW_RULES, OverlapClient, ReferenceCenter
from training_overlap import assert_all, backward, center_of, count, network, settle, train_and_end

from hvd_agn.torch import AGNOptimizer


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


@pytest.mark.parametrize("transport", ["direct", "mailbox"])
def test_nothing_is_lost_on_two_ranks_and_at_exit(transport):
    on_ranks(2, train_and_end, transport, [1, 0])
