"""The recorded trajectories of tf.contrib's AGNOptimizer, and its local optimizers written in NumPy.

A run ``p<period>_w<workers>_<schedule>`` has for each step, counted over all workers: the worker that stepped, its
parameters (``local``), its accumulator (``acc``), and the center with its slots, after the step.
"""

from pathlib import Path

import numpy as np

from hvd_agn import rules

DATA = Path(__file__).parent / "data"
TOLERANCE = 5e-6  # of |difference| / (1 + |value|)

RULES = {
    "sgd": rules.SGD(0.1),
    "momentum": rules.SGD(0.1, 0.9),
    "nesterov": rules.SGD(0.1, 0.9, nesterov=True),
    "adam": rules.Adam(0.01, bias_correction="tf_contrib"),
    "adagrad": rules.Adagrad(0.1, initial_accumulator_value=0.1, eps=0.0),
    "rmsprop": rules.RMSprop(0.01, alpha=0.9, eps=1e-10, eps_inside_root=True, initial_square_avg=1.0),
}
SLOTS = {"momentum": "momentum", "m": "exp_avg", "v": "exp_avg_sq", "accumulator": "sum", "rms": "square_avg"}


def load(name):
    with np.load(DATA / f"{name}.npz") as file:
        return dict(file)


def runs(recorded):
    return sorted({key.split("/")[0] for key in recorded})


def period(run):
    return int(run.split("_")[0][1:])


def close(actual, expected, what):
    actual, expected = np.asarray(actual, float), np.asarray(expected, float)
    worst = np.max(np.abs(actual - expected) / (1 + np.abs(expected)), initial=0.0)
    assert worst <= TOLERANCE, f"{what}: off by {worst:.2e}"


def check_center(center, before, recorded, prefix, row, names, pushed):
    """The center and its slots. ``before``: the center before this step; ``pushed``: it was a boundary."""
    values, slots, _ = center._read()
    for name in names:
        value = values[name]
        close(value, recorded[f"{prefix}/center/{name}"][row], f"{prefix} center {name} at {row}")
        for theirs, ours in SLOTS.items():
            key = f"{prefix}/center_slot/{theirs}/{name}"
            if key not in recorded:
                continue
            if ours in slots:
                close(slots[ours][name], recorded[key][row], f"{prefix} {ours} {name} at {row}")
            elif pushed:  # RMSprop without a momentum: there the slot is the last step itself
                close(before[name] - value, recorded[key][row], f"{prefix} step {name} at {row}")
    return values


class Local:
    """One worker's inner optimizer, in TensorFlow's order of operations; ``rows``: of a sparse gradient, else all."""

    def __init__(self, inner, arrays, period):
        self.inner, self.period, self.steps = inner, period, 0
        start = {"adagrad": 0.1, "rmsprop": 1.0}.get(inner, 0.0)
        self.first = [np.full_like(a, start) for a in arrays]
        self.second = [np.zeros_like(a) for a in arrays]

    def step(self, arrays, gradients, rows=None):
        T = np.float32
        self.steps += 1
        power = self.steps + (self.steps - 1) // self.period
        alpha = T(0.01 * np.sqrt(1 - 0.999**power) / (1 - 0.9**power))
        for i, (x, g) in enumerate(zip(arrays, gradients, strict=True)):
            if g is None:
                continue
            at = rows if rows is not None and i == 0 and self.inner in ("momentum", "rmsprop") else slice(None)
            a, b, g = self.first[i], self.second[i], g[at]
            if self.inner == "sgd":
                x[at] -= T(0.1) * g
            elif self.inner == "momentum":
                a[at] = a[at] * T(0.9) + g
                x[at] -= a[at] * T(0.1)
            elif self.inner == "nesterov":
                a[at] = a[at] * T(0.9) + g
                x[at] -= g * T(0.1) + a[at] * T(0.9) * T(0.1)
            elif self.inner == "adam":
                a += (g - a) * T(1 - 0.9)
                b += (g * g - b) * T(1 - 0.999)
                x -= (a * alpha) / (np.sqrt(b) + T(1e-8))
            elif self.inner == "adagrad":
                a += g * g
                x -= g * T(0.1) / np.sqrt(a)
            else:
                a[at] += (g * g - a[at]) * T(1 - 0.9)
                x[at] -= g * T(0.01) / np.sqrt(a[at] + T(1e-10))
