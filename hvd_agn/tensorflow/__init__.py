"""AGN for TensorFlow with Keras 3: :class:`AGNOptimizer` wraps any ``keras.optimizers.Optimizer``."""

import keras

from ..errors import ConfigError

if keras.config.backend() != "tensorflow":
    raise ConfigError(
        f"hvd_agn.tensorflow needs Keras on TensorFlow, it runs on {keras.config.backend()!r}: set "
        "KERAS_BACKEND=tensorflow before Keras is imported, or use hvd_agn.torch."
    )

from . import callbacks
from .optimizer import AGNOptimizer

__all__ = ["AGNOptimizer", "callbacks"]
