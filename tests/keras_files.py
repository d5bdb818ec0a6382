"""Models whose training is stopped, saved and resumed, and all that has to be the same then."""

import time

import numpy as np
from keras import optimizers
from keras_runs import PERIOD, agn, data, network

from hvd_agn import rules
from hvd_agn.tensorflow import AGNOptimizer

CASES = {
    "Add": {},
    "Adam": {"rule": rules.Adam(0.05)},
    "gradients": {"accumulate": "gradients"},
    "overlap": {"overlap": True},
    "gradients, overlap": {"accumulate": "gradients", "overlap": True},
    "tf_contrib": {"accumulate": "gradients", "rule": rules.Adam(0.05, bias_correction="tf_contrib")},
    "gap_aware": {"rule": rules.Add(gap_aware=True)},
}


def compiled(options, dtype=None, graph=False):
    model = network(dtype)
    model.compile(AGNOptimizer(optimizers.Adam(0.01), PERIOD, **options), "mse", run_eagerly=not graph)
    return model


def train(model, steps):
    """Update by update, without the flush at the end of ``fit``."""
    x, y = data(model, 14)
    for i in steps:
        model.train_on_batch(x[4 * i : 4 * i + 4], y[4 * i : 4 * i + 4])
        client = agn(model)._worker.client
        while client.started and not client.ready:  # so that it is merged by the next update, each time
            time.sleep(1e-4)


def seen(model):
    """Everything: what is trained, the optimizer's variables, the center with slots and version, and the counters."""
    optimizer = agn(model)
    center, slots, version = optimizer.center._read()
    worker = optimizer._worker
    planes = [a for named in (center, *slots.values()) for a in named.values()]
    variables = [v.value.numpy() for v in (*model.variables, *optimizer.variables)]
    sums = [a.copy() for a, touched in zip(worker.arrays.sums, worker.client.touched, strict=False) if touched]
    counters = [version, int(optimizer._since), worker.client.power]
    return [*variables, *planes, *worker.arrays.anchor(worker.client), *sums, np.array(counters)]


def assert_same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
