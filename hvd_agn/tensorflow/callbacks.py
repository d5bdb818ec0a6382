"""Keras callbacks: evaluate and save the center, and see the exchanges in the logs of ``fit``.

None is needed for the end of ``fit``: there the optimizer itself pushes what is left.
"""

import atexit
import functools
import weakref
from contextlib import ExitStack
from typing import Any

import keras

from ..errors import ConfigError, UsageError
from .optimizer import AGNOptimizer


class Statistics(keras.callbacks.Callback):
    """Puts numbers of :meth:`AGNOptimizer.stats` into the logs at the end of each epoch, counted from the start.

    ``History`` and the progress bar show them, and so do the callbacks that come after this one.

    Raises:
        UsageError: when ``fit`` begins: the model's optimizer is no AGNOptimizer.
    """

    KEYS = ("exchanges", "pushes_refused", "staleness_mean", "staleness_max", "exchange_seconds", "center_version")

    def set_model(self, model: Any) -> None:
        """Keras': the model that trains."""
        super().set_model(model)
        self._optimizer = _optimizer_of(model, type(self).__name__)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Add them."""
        stats = self._optimizer.stats()
        if logs is not None:
            logs.update({key: value for key, value in stats.items() if key in self.KEYS})


# What CenterWeights hands on as it comes.
_HOOKS = (
    "on_epoch_begin",
    *(f"on_train_{hook}" for hook in ("begin", "end", "batch_begin", "batch_end")),
    *(f"on_{what}_{hook}" for what in ("test", "predict") for hook in ("batch_begin", "batch_end")),
)


class CenterWeights(keras.callbacks.Callback):
    """Evaluates the center: in ``evaluate``, ``predict`` and the validation of ``fit`` the variables are the center's.

    Then the local ones are back, and training goes on with them::

        model.fit(x, y, validation_data=held_out, callbacks=[CenterWeights(ModelCheckpoint("center.weights.h5"))])

    Args:
        callbacks: those that are to see the center at the end of an epoch too, such as ``ModelCheckpoint``. Give them
            here, not to ``fit``: between the end of an epoch and what follows Keras calls nothing that could bring the
            local values back in time. At the end of a batch they see these.

    Raises:
        ConfigError: one saves at the end of a batch.
        UsageError: when ``fit`` begins: the model's optimizer is no AGNOptimizer; or there is no center yet.
    """

    def __init__(self, *callbacks: Any) -> None:
        super().__init__()
        for callback in callbacks:
            if getattr(callback, "save_freq", "epoch") != "epoch":
                raise ConfigError(
                    f"CenterWeights: {type(callback).__name__} with save_freq={callback.save_freq!r} would save local "
                    "values, the center's are there at the end of an epoch: use save_freq='epoch'."
                )
        self._callbacks = callbacks
        if callbacks:  # else Keras need not wait for these hooks after each batch
            for hook in _HOOKS:
                setattr(self, hook, functools.partial(self._tell, hook))

    def _tell(self, hook: str, *args: Any, **kwargs: Any) -> None:
        for callback in self._callbacks:
            getattr(callback, hook)(*args, **kwargs)

    def set_params(self, params: Any) -> None:
        """Keras': numbers of epochs and steps."""
        super().set_params(params)
        self._tell("set_params", params)

    def set_model(self, model: Any) -> None:
        """Keras': the model that trains or is evaluated."""
        super().set_model(model)
        self._optimizer = _optimizer_of(model, type(self).__name__)
        _leave(self._optimizer)
        self._tell("set_model", model)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """The callbacks inside see the center."""
        if self._callbacks:
            with self._optimizer.center_weights():
                self._tell("on_epoch_end", epoch, logs)

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """The variables become the center's."""
        _look(self._optimizer)
        self._tell("on_test_begin", logs)

    def on_test_end(self, logs: dict[str, Any] | None = None) -> None:
        """The local ones are back."""
        self._tell("on_test_end", logs)
        _leave(self._optimizer)

    def on_predict_begin(self, logs: dict[str, Any] | None = None) -> None:
        """The variables become the center's."""
        _look(self._optimizer)
        self._tell("on_predict_begin", logs)

    def on_predict_end(self, logs: dict[str, Any] | None = None) -> None:
        """The local ones are back."""
        self._tell("on_predict_end", logs)
        _leave(self._optimizer)


# Open looks at the center. An evaluation that fails leaves its own open, for the next call of Keras to end, or the
# exit: what was not pushed is in the local values.
_views: "weakref.WeakKeyDictionary[AGNOptimizer, ExitStack]" = weakref.WeakKeyDictionary()


def _look(optimizer: AGNOptimizer) -> None:
    _leave(optimizer)
    view = ExitStack()
    view.enter_context(optimizer.center_weights())
    atexit.register(view.close)
    view.callback(atexit.unregister, view.close)
    _views[optimizer] = view


def _leave(optimizer: AGNOptimizer) -> None:
    view = _views.pop(optimizer, None)
    if view is not None:
        view.close()


def _optimizer_of(model: Any, callback: str) -> AGNOptimizer:
    """The model's AGNOptimizer, also one inside of a LossScaleOptimizer."""
    found = outer = getattr(model, "optimizer", None)
    while found is not None and not isinstance(found, AGNOptimizer):
        found = getattr(found, "inner_optimizer", None)
    if found is None:
        raise UsageError(
            f"{callback}: the model's optimizer is a {type(outer).__name__}: compile the model with a "
            "hvd_agn.tensorflow.AGNOptimizer around it."
        )
    return found
