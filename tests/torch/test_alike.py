"""What the ranks should have alike and no center makes so: differences are said, on the rank that has them."""

import functools
import warnings

import pytest
import torch
from ranks import on_ranks
from torch import nn
from training import image_network, network, values

from hvd_agn.errors import LayoutError, RankDifferenceWarning
from hvd_agn.torch import AGNOptimizer


def adam(model, **options):
    return torch.optim.Adam(model.parameters(), **{"lr": 0.1, "weight_decay": 0.25, **options})


def lr(model, odd):
    return adam(model, lr=0.2 if odd else 0.1), model


def betas(model, odd):
    return adam(model, betas=(0.5 if odd else 0.9, 0.999)), None


def rate_as_a_tensor(model, odd):
    return adam(model, lr=torch.tensor(0.5 if odd else 0.25), fused=odd), None


def group(model, odd):
    parameters = list(model.parameters())
    cut = 2 if odd else 3
    return torch.optim.SGD(
        [{"params": parameters[:cut]}, {"params": parameters[cut:]}], lr=0.1
    ), model.named_parameters()


def frozen(model, odd):
    model[0].bias.requires_grad_(False)
    if odd:
        model[0].bias.data[1] += 1
    return adam(model), model.named_parameters()


def frozen_elsewhere(model, odd):
    """Not among the optimizer's, as fine-tuning has it."""
    model[0].requires_grad_(False)
    if odd:
        model[0].weight.data.mul_(2)
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), model.named_parameters()


def buffer(model, odd):
    if odd:
        model[1].running_var[3] = 4
    return adam(model), model


def buffer_out_of_reach(model, odd):
    return buffer(model, odd)[0], model.named_parameters()


def everything_equal(model, odd):
    model[0].bias.requires_grad_(False)
    model.register_buffer("later", nn.parameter.UninitializedBuffer())
    inner = adam(model, fused=odd, lr=torch.tensor(0.1))
    inner.param_groups[0]["function"] = lambda: odd  # as some keep there, at another address on each rank
    return inner, model


DIFFERENT = {
    lr: r"param_groups[0]['lr'] is 0.2 here and 0.1 on rank 0. The center does not hold it",
    betas: r"param_groups[0]['betas'] is (0.5, 0.999) here and (0.9, 0.999) on rank 0.",
    rate_as_a_tensor: r"param_groups[0]['lr'] is 0.5 here and 0.25 on rank 0.",
    group: "the number of parameters in param_groups[0] is 2 here and 3 on rank 0.",
    frozen: "frozen parameter '0.bias' is torch.float32[4] of checksum ",
    frozen_elsewhere: "parameter '0.weight', which is not exchanged, is torch.float32[4, 2, 3, 3] of checksum ",
    buffer: "buffer '1.running_var', which is not exchanged, is torch.float32[4] of checksum ",
    buffer_out_of_reach: None,
    everything_equal: None,
}


def said(make):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make()
    return [str(w.message) for w in caught if w.category is RankDifferenceWarning]


def wrap_differently():
    """What each case says on this rank; on ranks other than 1 all is as on rank 0."""
    from mpi4py import MPI

    odd = MPI.COMM_WORLD.rank == 1

    def wrap(case):
        inner, named = case(image_network(), odd)
        AGNOptimizer(inner, named_parameters=named).close()

    return [said(functools.partial(wrap, case)) for case in DIFFERENT]


def check_differences(ranks):
    assert ranks[0] == ranks[2] == [[]] * len(DIFFERENT)
    for (case, expected), texts in zip(DIFFERENT.items(), ranks[1], strict=True):
        if expected is None:
            assert texts == [], case.__name__
        else:
            assert len(texts) == 1, (case.__name__, texts)
            assert texts[0].startswith(f"[rank 1] AGNOptimizer: {expected}"), texts[0]


# ---- the order of parameters without names


def layers(seed=0):
    torch.manual_seed(seed)
    return nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(5))


def refused(parameters, named=None):
    with pytest.raises(LayoutError) as caught:
        AGNOptimizer(torch.optim.SGD(parameters, lr=0.1), named_parameters=named)
    return str(caught.value)


def orders():
    """Wrap five layers of one shape in an order of this rank's own: with equal values, with others, with names."""
    from mpi4py import MPI

    rank = MPI.COMM_WORLD.rank
    model = layers()
    before = values(model.parameters())
    turned = [model[(i + rank) % 5].weight for i in range(5)]
    texts = {"turned": refused(turned)}
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))

    def wrap(model, parameters, named):
        AGNOptimizer(torch.optim.SGD(parameters, lr=0.1), named_parameters=named).close()

    texts["equal"] = said(lambda: wrap(model, model.parameters(), None))
    other = layers(rank)
    texts["seeds"] = said(lambda: wrap(other, other.parameters(), None))
    named = layers(rank)
    texts["seeds, names"] = said(lambda: wrap(named, named.parameters(), named.named_parameters()))
    shapes = network(rank)
    texts["seeds, shapes"] = said(lambda: wrap(shapes, shapes.parameters(), None))
    fresh = nn.ModuleList(nn.LayerNorm(4) for _ in range(3))
    if rank == 0:  # as after loading a file on rank 0 alone
        for p in list(fresh.parameters())[:4]:
            p.data.uniform_()
    texts["file on rank 0"] = said(lambda: wrap(fresh, fresh.parameters(), None))
    norm = nn.LayerNorm(4)
    texts["norm"] = refused([norm.bias, norm.weight] if rank == 1 else [norm.weight, norm.bias])
    pairs = [(name, nn.Parameter(torch.zeros(6))) for name in ("ba" if rank == 1 else "ab")]
    texts["named"] = refused([p for _, p in pairs], pairs)
    return texts


def check_orders(ranks):
    for rank, texts in enumerate(ranks):
        assert f"[rank {max(rank, 1)}] AGNOptimizer: param_groups[0].params[" in texts["turned"]
        assert "the parameters come in another order, as from a set. Give them in one order" in texts["turned"]
        assert "the parameters come in another order" in texts["norm"]
        assert '["b", [6], "float32"] here, ["a", [6], "float32"] on rank 0. They come in another' in texts["named"]
        assert texts["equal"] == texts["seeds, names"] == texts["seeds, shapes"] == []
        for case in ("seeds", "file on rank 0"):
            assert len(texts[case]) == (rank > 0)
            assert all(
                "params[0] and param_groups[0].params[1] have one shape and no names" in text for text in texts[case]
            )
    assert "param_groups[0].params[4] here has the values of param_groups[0].params[0] on rank 0" in ranks[1]["turned"]


def differ():
    return wrap_differently(), orders()


def test_ranks_that_are_not_alike():
    """What differs from rank 0 is named there; another order of parameters of one shape is told from their values."""
    differences, places = zip(*on_ranks(3, differ), strict=True)
    check_differences(differences)
    check_orders(places)
