"""``bench exchange --framework``, ``bench step``: what the wrappers of torch and Keras add, in one run and in turn."""

import functools
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .. import _core, config, rules
from .bench import Columns

ROUNDS = 43
MANY_ROUNDS = 4 * ROUNDS  # where what is looked for is a few hundredths of what is timed
WARM = 3  # of them, not counted
NEVER = 10**9  # a period that does not end

EXCHANGE_COLUMNS: Columns = (
    ("framework", "framework", "{}"),
    ("ranks", "ranks", "{:d}"),
    ("params", "params", "{:d}"),
    ("variables", "variables", "{:d}"),
    ("limit_ms", "limit", "{:.1f}"),
    ("exchange_ms", "exchange", "{:.2f}"),
    ("torch_exchange_ms", "torch's", "{:.2f}"),
    ("ratio", "exchange/torch's", "{:.3f}"),
)
STEP_COLUMNS: Columns = (
    ("framework", "framework", "{}"),
    ("optimizer", "optimizer", "{}"),
    ("params", "params", "{:d}"),
    ("variables", "tensors", "{:d}"),
    ("inner_ms", "bare step", "{:.4f}"),
    ("agn_ms", "AGN step", "{:.4f}"),
    ("ratio", "AGN/bare", "{:.4f}"),
    ("exchange_ms", "exchange", "{:.4f}"),
)


# ---- the exchange


def exchanges(params: int, variables: Sequence[int]) -> list[dict[str, Any]]:
    """:func:`exchange` for each number of variables."""
    return [exchange(params, number) for number in variables]


def exchange(params: int, variables: int) -> dict[str, Any]:
    """What an exchange adds to its step and the next, of one rank, with ``tf.function`` and with torch, in turn.

    The next, because what an exchange leaves in the cache is to its account. Medians, in ms.
    """
    size = params // variables
    made = {"tensorflow": _tensorflow(variables, size), "torch": _torch(variables, size)}
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in made}
    for i in range(2 * ROUNDS):
        for name in sorted(made, reverse=i % 2 == 0):
            step, step_and_exchange, _ = made[name]
            pair = (0, step), (1, step_and_exchange)
            for which, first in pair if i % 4 < 2 else pair[::-1]:
                step()  # each comes after a step of the same framework
                times[name][which].append(timed(first) + timed(step))
    limits = _core.time_private_pass(variables * size, config.BLOCK_BYTES.read(), 7, rules.Add()._native())
    for _, _, optimizer in made.values():
        optimizer.close()
    added = {name: statistics.median(b - a for a, b in zip(*both, strict=True)) for name, both in times.items()}
    return {
        "framework": "tensorflow",
        "ranks": 1,
        "params": variables * size,
        "variables": variables,
        "exchange_ms": 1e3 * added["tensorflow"],
        "torch_exchange_ms": 1e3 * added["torch"],
        "limit_ms": 1e3 * min(limits),
        "ratio": added["tensorflow"] / added["torch"],
    }


def _torch(variables: int, size: int) -> tuple[Callable[[], object], Callable[[], object], Any]:
    """A step, a step that exchanges, and the optimizer."""
    import torch

    from ..torch import AGNOptimizer

    torch.set_num_threads(1)
    parameters = [torch.nn.Parameter(torch.zeros(size)) for _ in range(variables)]
    optimizer = AGNOptimizer(torch.optim.SGD(parameters, lr=1e-3), NEVER)

    def step() -> None:
        with torch.no_grad():
            torch._foreach_add_(list[Any](parameters), 1.0)
        optimizer._worker.steps_since_exchange += 1

    def step_and_exchange() -> None:
        step()
        optimizer._worker.perform("exchange")

    return step, step_and_exchange, optimizer


def _tensorflow(variables: int, size: int) -> tuple[Callable[[], object], Callable[[], object], Any]:
    """The same, each a ``tf.function``."""
    tf, keras = import_tensorflow()
    from ..tensorflow import AGNOptimizer

    model = [tf.Variable(tf.zeros(size)) for _ in range(variables)]
    optimizer: Any = AGNOptimizer(keras.optimizers.SGD(1e-3), NEVER)
    optimizer.start(model)
    update = tf.ones(size)

    def step() -> None:
        for variable in model:
            variable.assign_add(update)
        optimizer._since.assign_add(1)

    def step_and_exchange() -> None:
        step()
        optimizer._ops.call("exchange")

    return tf.function(step), tf.function(step_and_exchange), optimizer


# ---- a step


def step(params: int) -> list[dict[str, Any]]:
    """A step between two boundaries against the wrapped optimizer's own, on one rank, in torch and, where it is
    installed, in Keras; and of small tensors the exchange. Times in ms, medians.

    And what gradients mode adds to torch's step, against ``torch._foreach_add_`` of as many elements.
    """
    rows = torch_steps(params)
    try:
        import_tensorflow()
    except ImportError:
        return rows
    for variables, size in (160, params // 160), (160, 64):
        rows.append(_keras_step(variables, size))
    return rows


def torch_steps(params: int) -> list[dict[str, Any]]:
    """The rows of torch."""
    import torch

    from ..torch import AGNOptimizer

    torch.set_num_threads(1)
    rows = []
    for kind, tensors, size in (
        (torch.optim.SGD, 1, params),
        (torch.optim.Adam, 1, params),
        (torch.optim.SGD, 4, 1000),
        (torch.optim.SGD, 160, 64),
        (torch.optim.Adam, 160, 64),
    ):
        parameters = [torch.nn.Parameter(torch.zeros(size)) for _ in range(tensors)]
        for parameter in parameters:
            parameter.grad = torch.full((size,), 1e-3)
        inner: Any = kind(parameters, lr=1e-3)
        repeats = max(1, 1_000_000 // (size * tensors) // 20)
        row = {"framework": "torch", "optimizer": kind.__name__, "params": tensors * size, "variables": tensors}
        bare = inner.step  # before the wrapper's stands in for it
        with AGNOptimizer(inner, NEVER) as wrapped:
            row |= _in_turn(bare, wrapped.step, repeats, MANY_ROUNDS if kind is torch.optim.SGD else ROUNDS)
            if tensors > 1:
                exchanges = [_exchange_seconds(wrapped._worker) for _ in range(200)]
                row["exchange_ms"] = 1e3 * statistics.median(exchanges)
        rows.append(row)
    gradient = torch.full((params,), 1e-3)
    parameter = torch.nn.Parameter(torch.zeros(params))
    parameter.grad = gradient
    with AGNOptimizer(torch.optim.SGD([parameter], lr=1e-3), NEVER, accumulate="gradients") as wrapped:
        add: Any = functools.partial(torch._foreach_add_, [torch.zeros(params)], [gradient])
        row = {"framework": "torch", "optimizer": "accumulate", "params": params, "variables": 1}
        rows.append(row | _in_turn(add, wrapped._steps.accumulate, 1))
    return rows


def _exchange_seconds(worker: Any) -> float:
    worker.steps_since_exchange = 1
    return timed(functools.partial(worker.perform, "exchange"))


def _keras_step(variables: int, size: int) -> dict[str, Any]:
    """A training step of Keras, compiled as ``fit`` does."""
    tf, keras = import_tensorflow()
    from ..tensorflow import AGNOptimizer

    def make(wrap: bool) -> Callable[[], object]:
        model = [keras.Variable(np.zeros(size, np.float32)) for _ in range(variables)]
        gradients = [tf.fill([size], 1e-3) for _ in range(variables)]
        optimizer = keras.optimizers.SGD(1e-3)
        if wrap:
            optimizer = AGNOptimizer(optimizer, NEVER)
        optimizer.build(model)

        function: Callable[[], object] = tf.function(lambda: optimizer.apply(gradients, model))
        return function

    row = {"framework": "tensorflow", "optimizer": "SGD", "params": variables * size, "variables": variables}
    repeats = max(1, 100_000 // (variables * size))
    return row | _in_turn(make(False), make(True), repeats, MANY_ROUNDS)


def _in_turn(
    bare: Callable[[], object], ours: Callable[[], object], repeats: int, rounds: int = ROUNDS
) -> dict[str, float]:
    """Medians of two calls that alternate, in ms, and the median of their ratios."""
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(rounds):
        pair = (0, bare), (1, ours)
        for which, call in pair if i % 2 else pair[::-1]:
            times[which].append(timed(call, repeats))
    first, second = (each[WARM:] for each in times)
    return {
        "inner_ms": 1e3 * statistics.median(first),
        "agn_ms": 1e3 * statistics.median(second),
        "ratio": _ratio(first, second),
    }


def _ratio(bare: Sequence[float], ours: Sequence[float]) -> float:
    return statistics.median(b / a for a, b in zip(bare, ours, strict=True))


def timed(call: Callable[[], object], repeats: int = 1) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def import_tensorflow() -> tuple[Any, Any]:
    """TensorFlow, on one thread per operation, and Keras; quietly."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import keras
        import tensorflow as tf
    try:
        tf.config.threading.set_intra_op_parallelism_threads(1)
    except RuntimeError:  # it runs already, with the same
        pass
    return tf, keras
