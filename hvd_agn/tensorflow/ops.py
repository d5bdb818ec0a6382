"""The library of TensorFlow ops, and the way from an op to a worker and back.

The ops are in ``csrc/tensorflow/ops.cpp``. They bring the variables' values to the core, which asks the worker's Python
what to do with them (:meth:`Ops._decide`), without the GIL for as long as it works on them.
"""

import ctypes
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import tensorflow as tf

from .. import _core
from ..errors import UsageError
from ..worker import Worker
from . import library, xla
from .variables import Variables

_kept: dict[int, BaseException] = {}  # by worker: what its last call raised
_unraised: dict[int, BaseException] = {}  # by worker: the first in a compiled function that runs
_MARK = re.compile(r"(?:{{.*}} )?(.*) \[hvd_agn worker (\d+)\]")


def own_error(error: tf.errors.OpError) -> BaseException | None:
    """What an op raised in Python, of which TensorFlow's error has but the text; None if the error is not ours."""
    found = _MARK.search(error.message)
    return (_kept.pop(int(found[2]), None) or UsageError(found[1])) if found else None


@functools.cache
def _let_errors_out() -> None:
    """Let them come out of functions and sessions as they were raised: between ``fit`` and its ops is no line of ours.

    The first method is private: where a TensorFlow does not have it, the error is TensorFlow's, with the same text.
    """
    from tensorflow.python.eager import context

    for owner, name in ((context.Context, "call_function"), (tf.compat.v1.Session, "run")):
        if (original := getattr(owner, name, None)) is not None:
            setattr(owner, name, _with_own_errors(original))


def _with_own_errors(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            result = original(self, *args, **kwargs)
        except tf.errors.InternalError as error:
            raise (own_error(error) or error) from None
        except tf.errors.InvalidArgumentError as error:
            raise (xla.own_error(error) or error) from None
        if _unraised:
            raise _unraised.popitem()[1]
        return result

    return call


@contextmanager
def _own_errors() -> Iterator[None]:
    """The same for an op that is run by itself."""
    try:
        yield
    except tf.errors.InternalError as error:
        raise (own_error(error) or error) from None


_COMPILED = "compiled "  # begins the name of a call from a function that XLA has compiled


class Ops:
    """The ops of one worker.

    Args:
        worker: asked what to do, inside an op.
        since: an int64 variable: the updates applied since the last exchange.
    """

    def __init__(self, worker: Worker[Variables], since: tf.Variable) -> None:
        self._ops = library.ops()
        _let_errors_out()
        self._worker = worker
        self._variables = worker.arrays.exchanged
        self._since = since
        self.rates: list[float] = []
        """The learning rates that came with the op that runs."""
        self._number = _core.op_enter(worker.client.native, self._decide)

    def _decide(self, what: str, since: int, rates: list[float]) -> tuple[int, str]:
        """For the core, while the client has the variables; an error does not pass through it, but is kept."""
        worker, text = self._worker, ""
        try:
            compiled, what = what.startswith(_COMPILED), what.removeprefix(_COMPILED)
            worker.steps_since_exchange, self.rates = since, rates
            _kept.pop(self._number, None)
            if what in ("exchange", "start", "land"):  # may come from a graph, which knows of no close()
                worker.check_open("apply()")
            worker.perform(what)
        except BaseException as error:  # of any kind: KeyboardInterrupt too comes out where the op was called
            if compiled:  # no op will raise it
                _unraised.setdefault(self._number, error)
            else:
                _kept[self._number] = error
            text = str(error) or type(error).__name__
        return worker.steps_since_exchange, text

    def call(self, what: str, rates: Any = 0.0) -> Any:
        """Bring the variables' values, and assign what they become; then raise what went wrong, if something did.

        In a graph: returns the op that has done so.
        """
        values = [v.read_value() for v in self._variables]
        since, rates = self._since.read_value(), tf.cast(rates, tf.float64)
        if xla.inside():
            results, left = xla.exchange(self._number, _COMPILED + what, values, since, rates)
        else:
            results, left, failed = self._ops.hvd_agn_exchange(values, since, rates, worker=self._number, call=what)
        assigned = [v.assign(r, read_value=False) for v, r in zip(self._variables, results, strict=True)]
        assigned.append(self._since.assign(left, read_value=False))
        if xla.inside():
            return None
        with tf.control_dependencies([op for op in assigned if op is not None]), _own_errors():
            return self._ops.hvd_agn_raise(failed, worker=self._number)

    def start(self, rates: Any = 0.0) -> None:
        """Bring the values for an exchange in the background."""
        values = [v.read_value() for v in self._variables]
        with _own_errors():
            left = self._ops.hvd_agn_start(
                values, self._since.read_value(), tf.cast(rates, tf.float64), worker=self._number, call="start"
            )
        self._since.assign(left, read_value=False)

    def when(self, condition: Any, do: Callable[[], Any]) -> None:
        """In a graph, a branch that does what changes the variables; eagerly, an if."""

        def branch() -> None:
            do()

        def chosen() -> int:
            do()
            return 0

        if tf.executing_eagerly() or xla.inside() or any("GPU" in v.device for v in self._variables):
            tf.cond(condition, chosen, lambda: 0)
            return
        # tf.cond would put the branch's operations, and a switch for each variable, into the graph itself, where they
        # cost time in every step. But an If that calls its branch does so on one device.
        then = tf.function(branch, autograph=False).get_concrete_function()
        inputs = then.captured_inputs
        otherwise = tf.function(
            lambda *inputs: None, input_signature=[tf.TensorSpec(t.shape, t.dtype) for t in inputs], autograph=False
        ).get_concrete_function()
        tf.raw_ops.If(cond=condition, input=inputs, Tout=[], then_branch=then, else_branch=otherwise)

    def ready(self, due: Any) -> Any:
        """Whether an exchange in the background is to be merged; one is waited for if ``due``."""
        return self._ops.hvd_agn_ready(due, worker=self._number)

    def accumulate(self, gradients: Sequence[Any]) -> Any:
        """Add gradients, one per variable, None where there is none, to those since the last exchange.

        In a graph: returns the op that does so.
        """
        places = [i for i, gradient in enumerate(gradients) if gradient is not None]
        dense = [tf.cast(tf.convert_to_tensor(gradients[i]), self._variables[i].dtype) for i in places]
        with _own_errors():
            return self._ops.hvd_agn_accumulate(dense, worker=self._number, places=places, arrays=len(self._variables))

    def leave(self) -> None:
        """The worker has gone: ops that are still called raise UsageError."""
        _core.op_leave(self._number)
        _unraised.pop(self._number, None)
        library.functions().hvd_agn_leave(ctypes.c_int64(self._number))
        _kept.pop(self._number, None)
