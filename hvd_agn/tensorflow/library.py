"""The library of our TensorFlow ops, ``csrc/tensorflow/``: one binary for every TensorFlow."""

import ctypes
import functools
from pathlib import Path
from typing import Any

import tensorflow as tf

from .. import _core

PATH = Path(_core.__file__).with_name("_tensorflow_ops.so")


@functools.cache
def ops() -> Any:
    """The ops, once their library and the core know each other."""
    loaded = tf.load_op_library(str(PATH))
    ctypes.CDLL(str(PATH)).hvd_agn_connect(ctypes.c_void_p(_core.op_calls()))
    return loaded


@functools.cache
def functions() -> ctypes.CDLL:
    """The library's functions. TensorFlow loads it first: it takes for a library's ops what loading it has brought."""
    ops()
    return ctypes.CDLL(str(PATH))
