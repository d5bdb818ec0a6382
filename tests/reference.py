"""AGN written again in NumPy, one operation at a time: what the native core is held against."""

import numpy as np


class ReferenceCenter:
    """A center of float32 or float64 arrays with a rule given by name and hyper-parameters."""

    def __init__(self, arrays, rule="add", **hyper):
        self.center = [wide(a).copy() for a in arrays]
        self.slots = [np.zeros_like(c) for c in self.center]
        self.rule, self.hyper, self.pushes = rule, hyper, 0

    def push(self, index, delta):
        c = self.center[index]
        T = c.dtype.type
        if self.rule == "add":
            c += T(self.hyper.get("scale", 1.0)) * delta
            return
        lr, mu = T(self.hyper["lr"]), T(self.hyper.get("momentum", 0.0))
        gradient = -delta + T(self.hyper.get("weight_decay", 0.0)) * c
        if mu != 0:
            slot = self.slots[index]
            damped = T(1) if self.pushes == 0 else T(1 - self.hyper.get("dampening", 0.0))
            slot *= mu
            slot += damped * gradient
            gradient = gradient + mu * slot if self.hyper.get("nesterov") else slot
        c -= lr * gradient


class ReferenceClient:
    """A worker: ``arrays`` are what it trains on."""

    def __init__(self, center, dtypes):
        self.center = center
        self.arrays = [c.astype(t) for c, t in zip(center.center, dtypes, strict=True)]
        self.anchor = [a.copy() for a in self.arrays]

    def exchange(self, steps):
        for i, (theta, anchor) in enumerate(zip(self.arrays, self.anchor, strict=True)):
            delta = (wide(theta) - wide(anchor)) / self.center.center[i].dtype.type(steps)
            self.center.push(i, delta)
            theta[...] = self.center.center[i].astype(theta.dtype)
            anchor[...] = theta
        self.center.pushes += 1


def wide(array):
    """In the center's type."""
    return array.astype(np.float64 if array.dtype == np.float64 else np.float32)
