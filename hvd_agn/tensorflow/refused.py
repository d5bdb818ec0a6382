"""What cannot be wrapped, and where a wrapped optimizer cannot be used: each with the way out."""

from typing import Any

import keras
import tensorflow as tf

from ..errors import ConfigError, UsageError
from ..rules.like import parts_of
from ..worker import Settings
from . import xla
from .wrapper import Wrapper


def refuse_optimizer(optimizer: Any) -> None:
    """Raise TypeError unless it is a Keras 3 optimizer that can be inside of an AGNOptimizer."""
    kind = f"{type(optimizer).__module__}.{type(optimizer).__name__}"
    if isinstance(optimizer, Wrapper):
        raise TypeError("optimizer is an AGNOptimizer already: wrap the optimizer inside it.")
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        raise TypeError(
            "optimizer is a LossScaleOptimizer, which has to be outside: LossScaleOptimizer(AGNOptimizer(...)), or "
            "leave it to model.compile(), which wraps an AGNOptimizer under a mixed_float16 policy."
        )
    if type(optimizer).__module__.startswith("horovod.") or hasattr(optimizer, "_allreduce_grads"):
        raise TypeError(
            f"optimizer is Horovod's {kind}, which averages the gradients of every step: wrap the optimizer inside it."
        )
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        legacy = kind.startswith(("tf_keras.", "keras.src.legacy", "tensorflow.python.keras"))
        hint = " tf_keras is Keras 2: use Keras 3 (leave TF_USE_LEGACY_KERAS out)." if legacy else ""
        raise TypeError(f"optimizer is a {kind}: give a keras.optimizers.Optimizer of Keras 3.{hint}")


def refuse_accumulation(optimizer: Any, settings: Settings) -> None:
    """Raise ConfigError where it cannot be told how many gradients, of which size, make an update."""
    parts = parts_of(optimizer)
    accumulates = any(part.gradient_accumulation_steps for part in parts)
    if settings.gradients and (accumulates or any(part.loss_scale_factor for part in parts)):
        raise ConfigError(
            "accumulate='gradients' sums gradients as they come: leave loss_scale_factor and "
            "gradient_accumulation_steps of the wrapped optimizer out."
        )
    if accumulates and len(parts) > 1:
        raise ConfigError(
            "Keras does not tell which calls of a MultiOptimizer apply an update: leave gradient_accumulation_steps of "
            "its optimizers out."
        )


def refuse_strategy(name: str) -> None:
    """Raise ConfigError under tf.distribute."""
    if tf.distribute.has_strategy():
        raise ConfigError(
            f"{name}: under a tf.distribute strategy, whose place hvd_agn takes: build and train the model outside of "
            "strategy.scope(), one rank per device."
        )


def refuse_tracing(name: str, call: str) -> None:
    """Raise UsageError where a function is traced: what is done at once would be done then, and never again."""
    if not tf.executing_eagerly() and tf.compat.v1.get_default_graph().building_function:
        raise UsageError(f"{name}: {call}() inside a tf.function would run once, at its tracing: call it outside.")


def refuse_surroundings(name: str, settings: Settings) -> None:
    """Raise ConfigError under tf.distribute, and where XLA compiles the step and cannot compile an exchange."""
    refuse_strategy(name)
    if xla.inside():
        option = "accumulate='gradients'" if settings.gradients else "overlap=True" if settings.overlap else None
        xla.refuse(name, option)
