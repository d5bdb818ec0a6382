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
    """A center of float32 or float64 arrays; ``groups``: of each array, for ``rules.Groups`` and learning rates."""

    def __init__(self, arrays, rule=None, groups=None):
        self.center = [wide(a).copy() for a in arrays]
        self.rule, self.pushes = rule or rules.Add(), 0
        self.groups = groups or [0] * len(arrays)
        each = self.rule.each
        self.rules = [each[group if len(each) > 1 else 0] for group in self.groups]
        self.slots = {name: [np.zeros_like(c) for c in self.center] for name in self.rule.active_slots()}
        for name in ("sum", "square_avg"):
            start = {"sum": "initial_accumulator_value", "square_avg": "initial_square_avg"}[name]
            for slot, own in zip(self.slots.get(name, []), self.rules, strict=False):
                slot += slot.dtype.type(getattr(own, start))

    @property
    def counts(self):
        """Pushes that each block has had: here all of them."""
        return [self.pushes]

    def push(self, index, delta, lr, power, anchor, dtype):
        """One array's part of a push; ``lr`` (or one per group), ``power``, ``anchor``, ``dtype`` are the worker's."""
        c = self.center[index]
        slots = {name: arrays[index] for name, arrays in self.slots.items()}
        h = self.rules[index]
        own = lr[self.groups[index]] if isinstance(lr, list) else lr
        lr = own if h.follows else getattr(h, "lr", None)
        before, T = c.copy(), c.dtype.type
        if h.gap_aware and self.pushes:
            typical = np.sqrt(slots["moved_sq"] / T(1 - 0.999**self.pushes)) + T(1e-12)
            delta = delta / (1 + np.abs(wide(narrow(c, dtype)) - wide(anchor)) / typical)
        UPDATES[type(h)](c, delta, slots, h, self.pushes + 1, lr, power)
        if h.gap_aware:
            slots["moved_sq"] += T(1 - 0.999) * ((c - before) ** 2 - slots["moved_sq"])


def add(c, delta, slots, h, t, lr, power):
    c += c.dtype.type(h.scale) * delta


def sgd(c, delta, slots, h, t, lr, power):
    T = c.dtype.type
    gradient = -delta + T(h.weight_decay) * c
    if "momentum" in slots:  # a group without momentum may have one, beside others with
        damped = T(1) if t == 1 or not h.momentum else T(1 - h.dampening)
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
    if "momentum_buffer" in slots:
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
        self.center, self.dtypes = center, dtypes
        self.arrays = [narrow(c, t) for c, t in zip(center.center, dtypes, strict=True)]
        self.anchor = [a.copy() for a in self.arrays]
        self.seen, self.power = center.pushes, 0

    def weight(self):
        return weight(self.center, self.seen)

    def pull(self):
        for c, theta, anchor, dtype in zip(self.center.center, self.arrays, self.anchor, self.dtypes, strict=True):
            theta[...] = anchor[...] = narrow(c, dtype)
        self.seen = self.center.pushes

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
                theta[...] = narrow(wide(theta) - move, self.dtypes[i])
                c += move
            else:
                delta = (wide(theta) - wide(anchor)) / T(steps) * T(self.weight())
                self.center.push(i, delta, lr, self.power, anchor, self.dtypes[i])
                theta[...] = narrow(c, self.dtypes[i])
            anchor[...] = theta
        self.center.pushes += 1
        self.seen = self.center.pushes


class OverlapClient(ReferenceClient):
    """The reference, with an exchange of a snapshot."""

    def start(self, steps):
        kept = [a.copy() for a in self.arrays]
        self.exchange(steps)
        self.taken, self.arrays[:] = self.arrays[:], kept
        self.snapshot = [a.copy() for a in kept]

    def finish(self):
        for theta, c, s in zip(self.arrays, self.taken, self.snapshot, strict=True):
            theta[...] = (wide(theta) + (wide(c) - wide(s))).astype(theta.dtype)


class ReferenceBlocks:
    """A center in blocks like the core's, each with a count of its own: a :class:`ReferenceCenter` of the parts in it.

    Arrays begin at multiples of 64 bytes; a center of less than a block is one block.
    """

    def __init__(self, arrays, rule, block_bytes, groups=None):
        self.rule, groups = rule, groups or [0] * len(arrays)
        self.like = [wide(a) for a in arrays]
        aligned = [-(-a.nbytes // 64) * 64 for a in self.like]
        block_bytes = min(block_bytes, max(sum(aligned), 64))
        places, start = {}, 0
        for i, (array, nbytes) in enumerate(zip(self.like, aligned, strict=True)):
            block_of = (start + np.arange(array.size) * array.itemsize) // block_bytes
            for block in np.unique(block_of):
                places.setdefault(block, []).append((i, np.flatnonzero(block_of == block)))
            start += nbytes
        self.blocks = [
            (
                parts,
                ReferenceCenter(
                    [self.like[i].reshape(-1)[elements] for i, elements in parts], rule, [groups[i] for i, _ in parts]
                ),
            )
            for _, parts in sorted(places.items())
        ]

    @property
    def center(self):
        return self._gather(lambda block: block.center)

    @property
    def slots(self):
        return {name: self._gather(lambda block, n=name: block.slots[n]) for name in self.rule.active_slots()}

    @property
    def counts(self):
        return [block.pushes for _, block in self.blocks] or [0]

    def _gather(self, values_of):
        whole = [np.empty_like(a).reshape(-1) for a in self.like]
        for parts, block in self.blocks:
            for (i, elements), values in zip(parts, values_of(block), strict=True):
                whole[i][elements] = values
        return [w.reshape(a.shape) for w, a in zip(whole, self.like, strict=True)]


class GradientsClient:
    """A worker of :class:`ReferenceBlocks` that pushes the mean of its gradients."""

    def __init__(self, center, dtypes):
        self.center, self.dtypes = center, dtypes
        self.sums = [np.zeros_like(c) for c in center.center]
        self.touched = [False] * len(dtypes)
        self.arrays = [narrow(c, t) for c, t in zip(center.center, dtypes, strict=True)]
        self.anchor = [a.copy() for a in self.arrays]
        self.seen, self.power = [block.pushes for _, block in center.blocks], 0

    def accumulate(self, gradients):
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                self.sums[i] += wide(gradient)
                self.touched[i] = True

    def push(self, steps, lr=None):
        """The center's part; what the worker then takes over."""
        self.power += steps + 1
        clip, touched = self.center.rule.clip_norm, self.touched
        if clip:
            squares = sum(np.square(s, dtype=float).sum() for s, t in zip(self.sums, touched, strict=True) if t)
            steps = max(steps, np.sqrt(squares) / clip)
        for b, (parts, block) in enumerate(self.center.blocks):
            if not any(touched[i] for i, _ in parts):
                continue
            factor = weight(block, self.seen[b])
            for place, (i, elements) in enumerate(parts):
                if touched[i]:
                    T = self.sums[i].dtype.type
                    gradient = self.sums[i].reshape(-1)[elements] / T(steps)
                    anchor = self.anchor[i].reshape(-1)[elements]
                    block.push(place, -gradient * T(factor), lr, self.power, anchor, self.dtypes[i])
            for place, (i, elements) in enumerate(parts):  # those without a gradient too
                self.anchor[i].reshape(-1)[elements] = narrow(block.center[place], self.dtypes[i])
            block.pushes += 1
            self.seen[b] = block.pushes
        values = self.center.center
        taken = {i: narrow(values[i], self.dtypes[i]) for i in range(len(values)) if touched[i]}
        self.drop()
        return taken

    def drop(self):
        for total in self.sums:
            total[...] = 0
        self.touched = [False] * len(self.sums)

    def exchange(self, steps, lr=None):
        for i, value in self.push(steps, lr).items():
            self.arrays[i][...] = value

    def pull(self):
        for theta, anchor, c, dtype in zip(self.arrays, self.anchor, self.center.center, self.dtypes, strict=True):
            theta[...] = anchor[...] = narrow(c, dtype)
        self.seen = [block.pushes for _, block in self.center.blocks]
        self.drop()

    def start(self, steps, lr=None):
        self.snapshot = [a.copy() for a in self.arrays]
        self.taken = self.push(steps, lr)

    def finish(self):
        for i, value in self.taken.items():
            theta = self.arrays[i]
            theta[...] = narrow(wide(theta) + (wide(value) - wide(self.snapshot[i])), self.dtypes[i])


def weight(center, seen):
    """Of a delta whose worker last saw the center, or a block, after so many pushes."""
    missed = center.pushes - seen
    return {"none": 1.0, "inverse": 1 / (missed + 1), "sqrt": 1 / np.sqrt(missed + 1)}[center.rule.staleness]


def wide(array):
    """In the center's type."""
    return array.astype(np.float64 if array.dtype == np.float64 else np.float32)


def narrow(values, dtype):
    """In a worker's type; "bf16", which NumPy has not, as float32 with the lower 16 bits rounded off, to even."""
    if dtype != "bf16":
        return np.asarray(values).astype(dtype)
    bits = np.asarray(values).astype(np.float32).view(np.uint32)
    return np.asarray((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000, np.uint32).view(np.float32)
