"""What the tests of AGNOptimizer share: models, optimizers, another worker, comparisons."""

import numpy as np
import torch
from torch import nn

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


def network(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 3)).to(dtype)


def image_network(seed=0, dtype=torch.float32):
    """A convolution whose weight is channels_last, batch norm with its buffers, and more than one block."""
    torch.manual_seed(seed)
    layers = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 9)
    return nn.Sequential(*layers).to(dtype, memory_format=torch.channels_last)


def backward(model, step=0):
    """Leaves gradients of a loss that depends on the step."""
    model.zero_grad()
    first = next(model.parameters())
    shape = (8, first.shape[1]) if first.dim() == 2 else (5, first.shape[1], 6, 6)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(step)).to(first.dtype)
    loss = (model(x) - 1).square().mean()
    loss.backward()
    return loss


def vector(*elements):
    return nn.Parameter(torch.tensor(elements))


def wrap(model, period=4, rule=None):
    inner = torch.optim.Adam(model.parameters(), lr=0.01)
    return AGNOptimizer(inner, period, rule=rule, named_parameters=model.named_parameters())


def count(period=4, start=0.0, **options):
    """A parameter that goes up by 1 in every step, and its optimizer."""
    p = nn.Parameter(torch.full((300,), start))
    opt = AGNOptimizer(torch.optim.SGD([p], lr=1.0), period, named_parameters=[("p", p)], name="count", **options)
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
        torch.testing.assert_close(t.detach(), torch.as_tensor(e, device=t.device), rtol=0, atol=0)


def assert_all(array, value):
    np.testing.assert_array_equal(torch.as_tensor(array).detach().double(), value)
