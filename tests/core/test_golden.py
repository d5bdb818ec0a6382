"""Gradients mode against the recorded trajectories of tf.contrib's AGNOptimizer: everything, after every step."""

import warnings

import pytest
import torch
from golden import RULES, Local, check_center, close, load, period, runs
from ranks import on_ranks
from torch import nn

from hvd_agn import Center
from hvd_agn.torch import AGNOptimizer

NAMES = ("x0", "x1")
INNER = sorted(RULES)

# ---- without a framework: several clients of one center


@pytest.mark.parametrize("inner", INNER)
def test_dense(inner, kernels):
    inputs, recorded = load("inputs"), load(f"agn_{inner}_rec")
    initial = [inputs[f"init/{name}"] for name in NAMES]
    for run in runs(recorded):
        order = recorded[f"{run}/worker"]
        workers = [[a.copy() for a in initial] for _ in range(max(order) + 1)]
        local = [Local(inner, arrays, period(run)) for arrays in workers]
        with Center(dict(zip(NAMES, workers[0], strict=True)), RULES[inner], accumulate="gradients") as center:
            clients = [center.arrays_client] + [center.client(arrays) for arrays in workers[1:]]
            before = center.snapshot()
            for row, w in enumerate(order):
                gradients = [inputs[f"rec_grad/{name}"][row] for name in NAMES]
                local[w].step(workers[w], gradients)
                clients[w].accumulate(gradients)
                boundary = local[w].steps % period(run) == 0
                if boundary:
                    clients[w].exchange(period(run))
                for array, sums, name in zip(workers[w], clients[w].accumulators(), NAMES, strict=True):
                    close(array, recorded[f"{run}/local/{name}"][row], f"{run} {name} at {row}")
                    close(sums, recorded[f"{run}/acc/{name}"][row], f"{run} accumulator {name} at {row}")
                before = check_center(center, before, recorded, run, row, NAMES, boundary)


@pytest.mark.parametrize("inner", ["sgd", "adam"])
def test_a_gradient_that_is_none(inner):
    """Of x1 at worker 1, all the time: it neither pushes nor pulls x1, which lies in one block with x0."""
    recorded, initial = load("special_none_sparse"), load("inputs")
    prefix = f"none_{inner}"
    workers = [[initial[f"init/{name}"].copy() for name in NAMES] for _ in range(2)]
    local = [Local(inner, arrays, 2) for arrays in workers]
    with Center(dict(zip(NAMES, workers[0], strict=True)), RULES[inner], accumulate="gradients") as center:
        clients = [center.arrays_client, center.client(workers[1])]
        before = center.snapshot()
        for row, w in enumerate(recorded[f"{prefix}/order"]):
            gradients = [recorded[f"{prefix}/grad/{name}"][row] for name in NAMES]
            if w == 1:
                gradients[1] = None
            local[w].step(workers[w], gradients)
            clients[w].accumulate(gradients)
            boundary = local[w].steps % 2 == 0
            if boundary:
                clients[w].exchange(2)
            for i in range(2):
                theirs = f"{prefix}/worker{i}"
                for array, sums, name in zip(workers[i], clients[i].accumulators(), NAMES, strict=True):
                    close(array, recorded[f"{theirs}/local/{name}"][row], f"{theirs} {name} at {row}")
                    close(sums, recorded[f"{theirs}/acc/{name}"][row], f"{theirs} accumulator {name} at {row}")
            before = check_center(center, before, recorded, f"{prefix}/worker0", row, NAMES, boundary)


# ---- through torch


class AsTensorFlow(torch.optim.Optimizer):
    """An inner optimizer that steps as :class:`golden.Local` does."""

    def __init__(self, parameters, inner, every):
        super().__init__(parameters, {})
        self.arrays = [p.detach().numpy() for p in self.param_groups[0]["params"]]
        self.local = Local(inner, self.arrays, every)

    @torch.no_grad()
    def step(self, closure=None):
        gradients = [p.grad for p in self.param_groups[0]["params"]]
        rows = gradients[0].coalesce().indices()[0].numpy() if gradients[0].is_sparse else None
        self.local.step(self.arrays, [g.to_dense().numpy() for g in gradients], rows)


def wrap(inner, parameters, names, every):
    """torch's own optimizer, and the rule like it, where it is TensorFlow's too."""
    own = {
        "sgd": lambda: torch.optim.SGD(parameters, 0.1),
        "momentum": lambda: torch.optim.SGD(parameters, 0.1, 0.9),
        "nesterov": lambda: torch.optim.SGD(parameters, 0.1, 0.9, nesterov=True),
        "adagrad": lambda: torch.optim.Adagrad(parameters, 0.1, initial_accumulator_value=0.1, eps=0.0),
    }
    sparse = "emb" in names
    optimizer = own[inner]() if inner in own and not sparse else AsTensorFlow(parameters, inner, every)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the period of 1
        return AGNOptimizer(
            optimizer,
            every,
            rule=None if type(optimizer).__module__.startswith("torch.optim") else RULES[inner],
            accumulate="gradients",
            named_parameters=zip(names, parameters, strict=True),
        )


def replay(workers):
    """All runs of so many workers; each rank is one, and steps when it is its turn."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    done = 0
    inputs = load("inputs")
    for inner in INNER:
        recorded = load(f"agn_{inner}_rec")
        for run in runs(recorded):
            if f"_w{workers}_" not in run:
                continue
            parameters = [nn.Parameter(torch.from_numpy(inputs[f"init/{name}"].copy())) for name in NAMES]
            opt = wrap(inner, parameters, NAMES, period(run))
            before = opt.center.snapshot()
            comm.Barrier()
            for row, w in enumerate(recorded[f"{run}/worker"]):
                if w == comm.rank:
                    for p, name in zip(parameters, NAMES, strict=True):
                        p.grad = torch.from_numpy(inputs[f"rec_grad/{name}"][row].copy())
                    opt.step()
                    for p, sums, name in zip(parameters, opt._worker.arrays.sums, NAMES, strict=True):
                        close(p.detach(), recorded[f"{run}/local/{name}"][row], f"{inner} {run} {name} at {row}")
                        close(sums, recorded[f"{run}/acc/{name}"][row], f"{inner} {run} accumulator {name} at {row}")
                comm.Barrier()
                boundary = recorded[f"{run}/local_step"][row] % period(run) == 0
                before = check_center(opt.center, before, recorded, run, row, NAMES, boundary)
                comm.Barrier()
            opt.close()
            done += 1
    return done


@pytest.mark.parametrize(("workers", "transport"), [(1, "auto"), (2, "auto"), (4, "auto"), (2, "mailbox")])
def test_dense_through_torch(workers, transport):
    env = {"HVD_AGN_TRANSPORT": transport}
    found = on_ranks(workers, replay, workers, env=env, timeout=240)
    assert found == [6 * 3 * (1 if workers == 1 else 2)] * workers


@pytest.mark.parametrize("inner", [name for name in INNER if name != "nesterov"])
def test_sparse_through_torch(inner):
    """Rows that come twice are summed; a dense parameter beside it."""
    recorded, names, prefix = load("special_none_sparse"), ("emb", "x1"), f"sparse_{inner}"
    parameters = [nn.Parameter(torch.from_numpy(recorded[f"sparse_init/{name}"].copy())) for name in names]
    opt = wrap(inner, parameters, names, 3)
    before = opt.center.snapshot()
    for row in range(9):
        index, value = (recorded[f"{prefix}/feed/{key}"][row] for key in ("idx", "val"))
        gradient = torch.sparse_coo_tensor(
            torch.from_numpy(index)[None], torch.from_numpy(value), (6, 4), check_invariants=True
        )
        parameters[0].grad = gradient
        parameters[1].grad = torch.from_numpy(recorded[f"{prefix}/feed/g1"][row].copy())
        opt.step()
        for p, sums, name in zip(parameters, opt._worker.arrays.sums, names, strict=True):
            close(p.detach(), recorded[f"{prefix}/local/{name}"][row], f"{prefix} {name} at {row}")
            close(sums, recorded[f"{prefix}/acc/{name}"][row], f"{prefix} accumulator {name} at {row}")
        before = check_center(opt.center, before, recorded, prefix, row, names, row % 3 == 2)
