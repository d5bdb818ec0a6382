"""The exchange inside a step that XLA compiles: a custom call of ``csrc/tensorflow/xla.cpp``, for the CPU."""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

from .. import _core
from ..errors import ConfigError
from . import library

_TYPES = {tf.float32: "f32", tf.float64: "f64", tf.float16: "f16", tf.bfloat16: "bf16", tf.int64: "i64"}
_GET_API = "_ZN3xla3ffi12GetXlaFfiApiEv"  # xla::ffi::GetXlaFfiApi()


def inside() -> bool:
    """Whether what is traced now will be compiled by XLA."""
    if tf.executing_eagerly():
        return False
    from tensorflow.python.ops import control_flow_util  # private, the same in 2.17 to 2.21

    return bool(control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()))


@functools.cache
def why_not() -> str | None:
    """Why XLA of this TensorFlow, on this machine, cannot call an exchange; None if it can."""
    if tf.config.list_logical_devices("GPU"):
        return "XLA compiles it for a GPU"
    if tuple(map(int, tf.__version__.split(".")[:2])) < (2, 20):
        return f"XLA of TensorFlow {tf.__version__} has another interface; 2.20 has the one that is used"
    try:
        from tensorflow.compiler.tf2xla.ops import gen_xla_ops  # noqa: F401 (is it there?)

        get_api = ctypes.CDLL(str(Path(tf.sysconfig.get_lib()) / "libtensorflow_cc.so.2"))[_GET_API]
    except (ImportError, OSError, AttributeError) as error:
        return f"TensorFlow {tf.__version__} does not give its interface to XLA away ({error})"
    get_api.restype = ctypes.c_void_p
    connect = library.functions().hvd_agn_connect_xla
    connect.argtypes, connect.restype = (ctypes.c_void_p, ctypes.c_void_p), ctypes.c_char_p
    reason: bytes | None = connect(_core.op_calls(), get_api())
    return reason and f"XLA of TensorFlow {tf.__version__}: {reason.decode()}"  # type: ignore[return-value]


def refuse(name: str, what: str | None = None) -> None:
    """Raise ConfigError if a step that is traced for XLA cannot exchange; ``what``: an option that it never can."""
    reason = why_not() or (what and f"XLA cannot compile {what}")
    if reason:
        raise ConfigError(
            f"{name}: XLA compiles this step, and cannot compile its exchange: {reason}. Use "
            "model.compile(..., jit_compile=False), or tf.function without jit_compile."
        )


def own_error(error: tf.errors.OpError) -> ConfigError | None:
    """TensorFlow's error of a function that had been traced before XLA was to compile it; None if it is another."""
    if "unsupported operations" not in error.message or "HvdAgn" not in error.message:
        return None
    return ConfigError(
        "XLA compiles a function that was traced before with an AGNOptimizer in it: give jit_compile to the inner "
        "function too, or leave it out."
    )


def exchange(worker: int, what: str, values: Sequence[Any], since: Any, rates: Any) -> tuple[list[Any], Any]:
    """The op HvdAgnExchange as a custom call; an error is kept and raised when the compiled function has ended.

    Returns:
        What the variables become, and the updates that are left.
    """
    from tensorflow.compiler.tf2xla.ops import gen_xla_ops

    arguments = [*values, since, rates]
    results = [*values, since]
    *new, left = gen_xla_ops.xla_call_module(
        arguments,
        version=5,
        module=_module(worker, what, arguments, results),
        Sout=[r.shape for r in results],
        Tout=[r.dtype for r in results],
        platforms=["CPU"],
    )
    return new, left


def _module(worker: int, what: str, arguments: Sequence[Any], results: Sequence[Any]) -> str:
    """The call in StableHLO. Where XLA can, the variables' memory is used as it is."""
    names = [f"%a{i}" for i in range(len(arguments))]
    takes, gives = ", ".join(map(_type, arguments)), ", ".join(map(_type, results))
    aliases = ", ".join(
        f"#stablehlo.output_operand_alias<output_tuple_indices = [{i}], operand_index = {i}, "
        "operand_tuple_indices = []>"
        for i in range(len(results) - 1)
    )
    declared = ", ".join(f"{name}: {_type(a)}" for name, a in zip(names, arguments, strict=True))
    returned = ", ".join(f"%r#{i}" for i in range(len(results)))
    return (
        f"module @hvd_agn {{ func.func @main({declared}) -> ({gives}) {{ "
        f'%r:{len(results)} = "stablehlo.custom_call"({", ".join(names)}) {{call_target_name = "hvd_agn_exchange", '
        f"has_side_effect = true, api_version = 4 : i32, output_operand_aliases = [{aliases}], "
        f'backend_config = {{worker = {worker} : i64, call = "{what}"}}}} : ({takes}) -> ({gives}) '
        f"return {returned} : {gives} }} }}"
    )


def _type(tensor: Any) -> str:
    return "tensor<" + "".join(f"{n}x" for n in tensor.shape) + f"{_TYPES[tensor.dtype]}>"
