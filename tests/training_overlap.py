"""What the tests of AGNOptimizer(overlap=True) share: a model, a parameter that counts, ranks that train and end."""

import warnings

import numpy as np
import torch
from mailboxes import wait_until
from torch import nn

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
    wait_until(lambda: opt._worker.client.ready or not opt._worker.client.started, "the exchange in the background")


def steps(opt, n):
    for _ in range(n):
        opt.step()
        settle(opt)


def assert_all(array, value):
    np.testing.assert_array_equal(torch.as_tensor(array).detach().float(), value)


def center_of(opt):
    return opt.center.snapshot()["p"]


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
