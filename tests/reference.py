"""AGN and its rules written again in NumPy, one operation at a time: what the native core is held against.

Of ``hvd_agn.rules`` only the hyper-parameters are used.
"""

import numpy as np

from hvd_agn import rules


def heavy_ball(center, delta, slots, t):
    """For rules.Custom."""
    assert center.ndim == delta.ndim == slots["velocity"].ndim == 1
    assert t > 1 or not slots["velocity"].any()
    slots["velocity"] *= center.dtype.type(0.5)
    slots["velocity"] += delta
    center += center.dtype.type(0.3) * slots["velocity"]
    delta[:] = 0  # ours to write to


RULES = [
    rules.Add(),
    rules.Add(0.3),
    rules.SGD(0.7),
    rules.SGD(0.7, weight_decay=0.01),
    rules.SGD(0.5, 0.9),
    rules.SGD(0.5, 0.9, nesterov=True),
    rules.SGD(0.5, 0.8, dampening=0.3, weight_decay=0.1),
    rules.Adam(0.1),
    rules.Adam(0.1, (0.5, 0.6), eps=1e-3, weight_decay=0.1),
    rules.Adam(0.1, eps=1e-3, bias_correction="keras"),
    rules.Adam(0.1, bias_correction="tf_contrib"),
    rules.AdamW(0.1),
    rules.Adagrad(0.3),
    rules.Adagrad(0.3, lr_decay=0.5, weight_decay=0.1, initial_accumulator_value=0.1, eps=0.0),
    rules.Adagrad(0.3, eps=1e-3, eps_inside_root=True),
    rules.RMSprop(0.1),
    rules.RMSprop(0.1, 0.9, weight_decay=0.1, momentum=0.5),
    rules.RMSprop(0.1, centered=True),
    rules.RMSprop(0.1, centered=True, momentum=0.5),
    rules.RMSprop(0.1, eps=1e-3, eps_inside_root=True, initial_square_avg=1.0),
    rules.Lion(0.1, weight_decay=0.1),
    rules.DelayedNesterov(0.5, 0.9, every=3),
    rules.Elastic(0.3),
    rules.Add(staleness="inverse"),
    rules.SGD(0.5, 0.9, staleness="sqrt"),
    rules.Elastic(0.5, staleness="inverse"),
    rules.Add(gap_aware=True),
    rules.Adam(0.1, gap_aware=True, staleness="sqrt"),
    rules.Custom(heavy_ball, ("velocity",)),
    rules.Custom(heavy_ball, ("velocity",), gap_aware=True, staleness="inverse"),
]
FEW_RULES = [
    rules.Add(),
    rules.SGD(0.7, 0.9, nesterov=True),
    rules.Adam(0.1, bias_correction="tf_contrib", staleness="sqrt"),
    rules.Elastic(0.3),
    rules.Custom(heavy_ball, ("velocity",), gap_aware=True),
]


class ReferenceCenter:
    """A center of float32 or float64 arrays."""

    def __init__(self, arrays, rule=None):
        self.center = [wide(a).copy() for a in arrays]
        self.rule, self.pushes = rule or rules.Add(), 0
        self.slots = {name: [np.zeros_like(c) for c in self.center] for name in self.rule.active_slots()}
        for name in ("sum", "square_avg"):
            start = {"sum": "initial_accumulator_value", "square_avg": "initial_square_avg"}[name]
            for slot in self.slots.get(name, []):
                slot += slot.dtype.type(getattr(self.rule, start))

    def push(self, index, delta, lr, power, anchor):
        """One array's part of a push; ``lr``, ``power`` and ``anchor`` are the worker's."""
        c = self.center[index]
        slots = {name: arrays[index] for name, arrays in self.slots.items()}
        h = self.rule
        lr = lr if h.follows else getattr(h, "lr", None)
        before, T = c.copy(), c.dtype.type
        if h.gap_aware and self.pushes:
            typical = np.sqrt(slots["moved_sq"] / T(1 - 0.999**self.pushes)) + T(1e-12)
            delta = delta / (1 + np.abs(wide(c.astype(anchor.dtype)) - wide(anchor)) / typical)
        UPDATES[type(h)](c, delta, slots, h, self.pushes + 1, lr, power)
        if h.gap_aware:
            slots["moved_sq"] += T(1 - 0.999) * ((c - before) ** 2 - slots["moved_sq"])


def add(c, delta, slots, h, t, lr, power):
    c += c.dtype.type(h.scale) * delta


def sgd(c, delta, slots, h, t, lr, power):
    T = c.dtype.type
    gradient = -delta + T(h.weight_decay) * c
    if h.momentum:
        damped = T(1) if t == 1 else T(1 - h.dampening)
        slot, momentum = slots["momentum"], T(h.momentum)
        slot *= momentum
        slot += damped * gradient
        gradient = gradient + momentum * slot if h.nesterov else slot
    c -= T(lr) * gradient


def adam(c, delta, slots, h, t, lr, power):
    T = c.dtype.type
    g = -delta
    decoupled = isinstance(h, rules.AdamW)
    if not decoupled:
        g = g + T(h.weight_decay) * c
    m, v = slots["exp_avg"], slots["exp_avg_sq"]
    m += T(1 - h.betas[0]) * (g - m)
    v += T(1 - h.betas[1]) * (g * g - v)
    n = float(power if h.bias_correction == "tf_contrib" else t)
    first, root_of_second = 1 - h.betas[0] ** n, np.sqrt(1 - h.betas[1] ** n)
    if h.bias_correction in ("keras", "tf_contrib"):
        step, denominator = T(lr * root_of_second / first), np.sqrt(v) + T(h.eps)
    else:
        step, denominator = T(lr / first), np.sqrt(v) * T(1 / root_of_second) + T(h.eps)
    if decoupled:
        c *= T(1 - lr * h.weight_decay)
    c -= step * m / denominator


def adagrad(c, delta, slots, h, t, lr, power):
    T = c.dtype.type
    g = -delta + T(h.weight_decay) * c
    slots["sum"] += g * g
    c -= T(lr / (1 + (t - 1) * h.lr_decay)) * g / root(slots["sum"], h)


def rmsprop(c, delta, slots, h, t, lr, power):
    T = c.dtype.type
    g = -delta + T(h.weight_decay) * c
    square = slots["square_avg"]
    square += T(1 - h.alpha) * (g * g - square)
    if h.centered:
        slots["grad_avg"] += T(1 - h.alpha) * (g - slots["grad_avg"])
        square = np.maximum(square - slots["grad_avg"] * slots["grad_avg"], T(0))
    step = g / root(square, h)
    if h.momentum:
        slots["momentum_buffer"] *= T(h.momentum)
        slots["momentum_buffer"] += step
        step = slots["momentum_buffer"]
    c -= T(lr) * step


def root(square, h):
    eps = square.dtype.type(h.eps)
    return np.sqrt(square + eps) if h.eps_inside_root else np.sqrt(square) + eps


def lion(c, delta, slots, h, t, lr, power):
    T = c.dtype.type
    g, m = -delta, slots["exp_avg"]
    sign = np.sign(m + T(1 - h.betas[0]) * (g - m))
    m += T(1 - h.betas[1]) * (g - m)
    c *= T(1 - lr * h.weight_decay)
    c -= T(lr) * sign


def delayed_nesterov(c, delta, slots, h, t, lr, power):
    T = c.dtype.type
    share = T(1 / h.every)
    slots["buffer"] += -delta
    step = share * -delta
    if t % h.every == 0:
        slots["momentum"] *= T(h.momentum)
        slots["momentum"] += share * slots["buffer"]
        slots["buffer"][...] = 0
        step = T(h.momentum) * slots["momentum"] + step
    c -= T(lr) * step


UPDATES = {
    rules.Add: add,
    rules.SGD: sgd,
    rules.Adam: adam,
    rules.AdamW: adam,
    rules.Adagrad: adagrad,
    rules.RMSprop: rmsprop,
    rules.Lion: lion,
    rules.DelayedNesterov: delayed_nesterov,
    rules.Custom: lambda c, delta, slots, h, t, lr, power: h.fn(
        c.reshape(-1), delta.copy().reshape(-1), {name: slots[name].reshape(-1) for name in h.slots}, t
    ),
}


class ReferenceClient:
    """A worker: ``arrays`` are what it trains on."""

    def __init__(self, center, dtypes):
        self.center = center
        self.arrays = [c.astype(t) for c, t in zip(center.center, dtypes, strict=True)]
        self.anchor = [a.copy() for a in self.arrays]
        self.seen, self.power = center.pushes, 0

    def weight(self):
        missed = self.center.pushes - self.seen
        return {"none": 1.0, "inverse": 1 / (missed + 1), "sqrt": 1 / np.sqrt(missed + 1)}[self.center.rule.staleness]

    def exchange(self, steps, lr=None):
        self.power += steps + 1
        rule, clip = self.center.rule, self.center.rule.clip_norm
        if clip:
            squares = sum(
                np.square(wide(theta) - wide(anchor), dtype=float).sum()
                for theta, anchor in zip(self.arrays, self.anchor, strict=True)
            )
            steps = max(steps, np.sqrt(squares) / clip)
        for i, (theta, anchor) in enumerate(zip(self.arrays, self.anchor, strict=True)):
            c = self.center.center[i]
            T = c.dtype.type
            if isinstance(rule, rules.Elastic):
                alpha = T(rule.alpha * self.weight())
                move = alpha * (wide(theta) - c)
                theta[...] = (wide(theta) - move).astype(theta.dtype)
                c += move
            else:
                delta = (wide(theta) - wide(anchor)) / T(steps) * T(self.weight())
                self.center.push(i, delta, lr, self.power, anchor)
                theta[...] = c.astype(theta.dtype)
            anchor[...] = theta
        self.center.pushes += 1
        self.seen = self.center.pushes


def wide(array):
    """In the center's type."""
    return array.astype(np.float64 if array.dtype == np.float64 else np.float32)
