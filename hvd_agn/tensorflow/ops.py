"""The library of TensorFlow ops, and the way from an op to a worker and back.

The ops are in ``csrc/tensorflow/ops.cpp``. They bring the variables' values to the core, which asks the worker's Python
what to do with them (:meth:`Ops._decide`), without the GIL for as long as it works on them.
"""

import ctypes
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tensorflow as tf

from .. import _core
from ..errors import UsageError
from ..worker import Worker
from .variables import Variables

LIBRARY = Path(_core.__file__).with_name("_tensorflow_ops.so")


@functools.cache
def load() -> Any:
    """The ops, once their library and the core know each other."""
    for path in Path(tf.sysconfig.get_lib()).glob("libtensorflow_framework.so.*"):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)  # whose symbols the library is to find
    ops = tf.load_op_library(str(LIBRARY))
    _native().hvd_agn_connect(ctypes.c_void_p(_core.op_calls()))
    _let_errors_out()
    return ops


@functools.cache
def _native() -> ctypes.CDLL:
    return ctypes.CDLL(str(LIBRARY))


_kept: dict[int, BaseException] = {}  # by worker: what its last call raised
_MARK = re.compile(r"(?:{{.*}} )?(.*) \[hvd_agn worker (\d+)\]")


def own_error(error: tf.errors.OpError) -> BaseException | None:
    """What an op raised in Python, of which TensorFlow's error has but the text; None if the error is not ours."""
    found = _MARK.search(error.message)
    return (_kept.pop(int(found[2]), None) or UsageError(found[1])) if found else None


def _let_errors_out() -> None:
    """Let them come out of functions as they were raised: between Keras' ``fit`` and its ops is no line of ours.

    The method is private: where a TensorFlow does not have it, the error is TensorFlow's, with the same text.
    """
    from tensorflow.python.eager import context

    original: Callable[..., Any] | None = getattr(context.Context, "call_function", None)
    if original is None:
        return

    @functools.wraps(original)
    def call_function(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        except tf.errors.InternalError as error:
            raise (own_error(error) or error) from None

    context.Context.call_function = call_function


@contextmanager
def _own_errors() -> Iterator[None]:
    """The same for an op that is run by itself."""
    try:
        yield
    except tf.errors.InternalError as error:
        raise (own_error(error) or error) from None


class Ops:
    """The ops of one worker.

    Args:
        worker: asked what to do, inside an op.
        since: an int64 variable: the updates applied since the last exchange.
    """

    def __init__(self, worker: Worker[Variables], since: tf.Variable) -> None:
        self._ops = load()
        self._worker = worker
        self._variables = worker.arrays.exchanged
        self._since = since
        self.rate = 0.0
        """The learning rate that came with the op that runs."""
        self._number = _core.op_enter(worker.client.native, self._decide)

    def _decide(self, what: str, since: int, rate: float) -> tuple[int, str]:
        """For the core, while the client has the variables; an error does not pass through it, but is kept."""
        worker = self._worker
        worker.steps_since_exchange, self.rate = since, rate
        _kept.pop(self._number, None)
        text = ""
        try:
            if what in ("exchange", "start", "land"):  # may come from a graph, which knows of no close()
                worker.check_open("apply()")
            worker.perform(what)
        except BaseException as error:  # of any kind: KeyboardInterrupt too comes out where the op was called
            _kept[self._number] = error
            text = str(error) or type(error).__name__
        return worker.steps_since_exchange, text

    def call(self, what: str, rate: Any = 0.0) -> None:
        """Bring the variables' values, and assign what they become; then raise what went wrong, if something did."""
        values = [v.read_value() for v in self._variables]
        results, left, failed = self._ops.hvd_agn_exchange(
            values, self._since.read_value(), tf.cast(rate, tf.float64), worker=self._number, call=what
        )
        assigned = [v.assign(r, read_value=False) for v, r in zip(self._variables, results, strict=True)]
        assigned.append(self._since.assign(left, read_value=False))
        with tf.control_dependencies([op for op in assigned if op is not None]), _own_errors():
            self._ops.hvd_agn_raise(failed, worker=self._number)

    def start(self, rate: Any = 0.0) -> None:
        """Bring the values for an exchange in the background."""
        values = [v.read_value() for v in self._variables]
        with _own_errors():
            left = self._ops.hvd_agn_start(
                values, self._since.read_value(), tf.cast(rate, tf.float64), worker=self._number, call="start"
            )
        self._since.assign(left, read_value=False)

    def ready(self, due: Any) -> Any:
        """Whether an exchange in the background is to be merged; one is waited for if ``due``."""
        return self._ops.hvd_agn_ready(due, worker=self._number)

    def accumulate(self, gradients: Sequence[Any]) -> None:
        """Add gradients, one per variable, None where there is none, to those since the last exchange."""
        places = [i for i, gradient in enumerate(gradients) if gradient is not None]
        dense = [tf.cast(tf.convert_to_tensor(gradients[i]), self._variables[i].dtype) for i in places]
        with _own_errors():
            self._ops.hvd_agn_accumulate(dense, worker=self._number, places=places, arrays=len(self._variables))

    def leave(self) -> None:
        """The worker has gone: ops that are still called raise UsageError."""
        _core.op_leave(self._number)
        _native().hvd_agn_leave(ctypes.c_int64(self._number))
        _kept.pop(self._number, None)
