"""AGN for Keras 3 on TensorFlow: a wrapper around any ``keras.optimizers.Optimizer``.

This file knows Keras and nothing of MPI; when to exchange is :class:`hvd_agn.worker.Worker`'s.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf

from .. import config, rules
from ..center import Center
from ..client import Stats
from ..errors import ConfigError, UsageError
from ..worker import Settings, Worker
from .ops import Ops
from .variables import Variables, plain

if TYPE_CHECKING:
    from mpi4py import MPI

# What keras.optimizers.Optimizer has as plain attributes: they are the wrapped optimizer's.
_FORWARDED = (
    "weight_decay",
    "clipnorm",
    "global_clipnorm",
    "clipvalue",
    "use_ema",
    "ema_momentum",
    "ema_overwrite_frequency",
    "loss_scale_factor",
    "gradient_accumulation_steps",
)


def _forwarded(name: str) -> property:
    def get(self: "AGNOptimizer") -> Any:
        if self._own_only or "inner_optimizer" not in self.__dict__:
            return None
        return getattr(self.inner_optimizer, name)

    def set_(self: "AGNOptimizer", value: Any) -> None:
        if "inner_optimizer" in self.__dict__:
            setattr(self.inner_optimizer, name, value)

    return property(get, set_, doc="The wrapped optimizer's.")


@keras.saving.register_keras_serializable(package="hvd_agn")
class AGNOptimizer(keras.optimizers.Optimizer):
    """Wraps an optimizer so that its variables are exchanged with a center every ``communication_period`` updates.

    ``apply()`` is the wrapped optimizer's; at the end of a period it also pushes ``(theta - anchor) / updates`` and
    sets the variables to the center (Hermans, Spanakis, Moeckel, ACML 2017, arXiv 1710.02368, algorithm 1). No rank waits
    for another. An update is counted when it is applied: not while gradients are accumulated, nor when a loss scale
    leaves one out.

    The center is made by the first ``apply()``, or by :meth:`start`, which is collective: all ranks' variables become
    rank 0's. What has not been pushed is pushed at the end of ``fit``, when the program ends, or by :meth:`flush` or
    :meth:`close`.

    Args:
        optimizer: any ``keras.optimizers.Optimizer``, with the same variables on every rank; or a name or
            configuration, as ``keras.optimizers.get`` takes it.
        communication_period, rule, normalize, accumulate, overlap, comm, center_ranks, transport, wire_dtype,
            on_nonfinite: see :class:`hvd_agn.torch.AGNOptimizer`. Besides the anchor, an exchange takes memory for one
            more copy of the variables.
        name: of this optimizer, as Keras has it, and in messages.

    Raises:
        TypeError: ``optimizer`` is not a Keras 3 optimizer, or is one that has to be outside of this one.
        ConfigError: another argument is none of its choices.
    """

    _own_only = False

    def __init__(
        self,
        optimizer: Any,
        communication_period: int = config.COMMUNICATION_PERIOD,
        *,
        rule: rules.Rule | None = None,
        normalize: bool = True,
        accumulate: str = config.ACCUMULATE[0],
        overlap: bool = False,
        comm: "MPI.Comm | None" = None,
        center_ranks: Sequence[int] | str = config.CENTER_RANKS,
        transport: str | None = None,
        wire_dtype: str | None = config.WIRES[0],
        on_nonfinite: str = config.ON_NONFINITE[0],
        name: str | None = None,
    ) -> None:
        if isinstance(optimizer, (str, dict)):
            optimizer = keras.optimizers.get(optimizer)
        _refuse_unusable(optimizer)
        # A callable, so that Keras makes no variable for a learning rate of ours.
        super().__init__(learning_rate=lambda: optimizer.learning_rate, name=name)
        self._settings = Settings(
            communication_period=communication_period,
            rule=rule,
            normalize=normalize,
            accumulate=accumulate,
            overlap=overlap,
            comm=comm,
            center_ranks=center_ranks,
            transport=transport,
            wire_dtype=wire_dtype,
            on_nonfinite=on_nonfinite,
            name=self.name,
        )
        self.inner_optimizer = optimizer
        """The wrapped optimizer. Keras' own wrapper, its callbacks and its files know it by this name."""
        if self._settings.gradients and (self.loss_scale_factor or self.gradient_accumulation_steps):
            raise ConfigError(
                "accumulate='gradients' sums gradients as they come: leave loss_scale_factor and "
                "gradient_accumulation_steps of the wrapped optimizer out."
            )
        self._worker: Worker[Variables] | None = None
        self._ops: Ops | None = None

    # ---- what fit and loops call

    def build(self, variables: Iterable[Any]) -> None:
        """Make the wrapped optimizer's variables, and no center: Keras builds before it loads a model's values."""
        if self.built:
            return
        variables = list(variables)
        if not self.inner_optimizer.built:
            self.inner_optimizer.build(variables)
        # Keras would make a second set of averages and accumulators here, and evaluate with it.
        self._own_only = True
        try:
            super().build(variables)
        finally:
            self._own_only = False

    def start(self, variables: Iterable[Any] | None = None) -> None:
        """Make the center. Collective; the first ``apply()`` does it otherwise. Again: does nothing.

        Args:
            variables: those to train, as ``model.trainable_variables``; None: those that the optimizer is built for.

        Raises:
            LayoutError: a variable cannot be exchanged, or the ranks' variables differ.
            ConfigError, LaunchError, SharedMemoryError: see :class:`hvd_agn.Center`.
            UsageError: there are no variables yet, or TensorFlow runs in graph mode.
        """
        if self._worker is not None:
            return
        with tf.init_scope():
            if not tf.executing_eagerly():
                raise UsageError(
                    f"{self.name}: a graph of TensorFlow 1: use hvd_agn.tensorflow.compat.v1.AGNOptimizer."
                )
            if not self.built:
                if variables is None:
                    raise UsageError(f"{self.name}: start() before the model has variables: give start(variables).")
                self.build(variables)
            self._start()

    def _start(self) -> None:
        worker: Worker[Variables] = Worker(
            self._settings,
            self.inner_optimizer,
            lambda: Variables(self._trainable_variables),
            self._rates,
            self._through,
            self._closed,
        )
        worker.arrays.settle(worker.client)
        self._ops = Ops(worker, self._since)
        self._worker = worker

    @property
    def _since(self) -> Any:
        """Updates since the last exchange, in the counter that Keras makes for every optimizer."""
        return plain(self._iterations)

    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        """The wrapped optimizer's, and at the end of a period an exchange, or with ``overlap`` the start of one.

        Raises:
            NonFiniteError: with ``on_nonfinite="raise"``.
            StallError, MPIError, RuleError: of this exchange, or with ``overlap`` of one in the background; updates
                that were not pushed are part of the next exchange.
            UsageError: after ``close()`` or inside ``center_weights()``.
            ConfigError: the step is compiled by XLA.
        """
        if len(grads) == 0:
            return
        _refuse_surroundings(self.name)
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
        if trainable_variables is not None or self.built:
            self.start(trainable_variables)
            self._open().check_open("apply()")
        before = tf.cast(tf.convert_to_tensor(self.iterations), tf.int64)
        if self._settings.gradients:
            self._accumulate(grads, trainable_variables)
        self.inner_optimizer.apply(grads, trainable_variables)
        applied = tf.cast(tf.convert_to_tensor(self.iterations), tf.int64) - before
        self._exchange_when_due(self._since.assign_add(applied))

    def apply_gradients(self, grads_and_vars: Iterable[tuple[Any, Any]]) -> Any:
        """As ``apply()``; returns the updates applied so far."""
        super().apply_gradients(grads_and_vars)
        return self.iterations

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """The end of ``fit``: push what is left; then the wrapped optimizer's own, such as averages."""
        if self._worker is not None and self._ops is not None:
            self.flush()
        if self.inner_optimizer.built:
            self.inner_optimizer.finalize_variable_values(var_list)

    # ---- exchange

    def _exchange_when_due(self, since: Any) -> None:
        ops = self._ops
        assert ops is not None
        due = since >= self._settings.communication_period
        if self._settings.overlap:
            _when(ops.ready(due), lambda: ops.call("land"))
            _when(due, lambda: ops.start(self._rate_now()))
        else:
            _when(due, lambda: ops.call("exchange", self._rate_now()))

    def _accumulate(self, grads: Sequence[Any], variables: Sequence[Any] | None) -> None:
        assert self._worker is not None
        assert self._ops is not None
        by_id = {id(plain(v)): g for v, g in zip(variables or self._trainable_variables, grads, strict=True)}
        self._ops.accumulate([by_id.get(id(v)) for v in self._worker.arrays.exchanged])

    def _rate_now(self) -> Any:
        return self.learning_rate if self._worker is not None and self._worker.center.rule.follows else 0.0

    def _rates(self) -> list[float]:
        """For the worker: at the start, those there are; then, inside an op, the one that came with it."""
        if self._ops is not None:
            return [self._ops.rate]
        try:
            return [float(self.learning_rate)]
        except (AttributeError, TypeError, ValueError):  # several optimizers in one
            return []

    def _through(self, what: str) -> None:
        assert self._ops is not None
        with tf.init_scope():
            self._ops.call(what, self._rate_now())

    def _open(self) -> "Worker[Variables]":
        if self._worker is None:
            raise UsageError(f"{self.name}: there is no center yet: call start(), or train a step.")
        return self._worker

    @property
    def center(self) -> Center:
        """The :class:`hvd_agn.Center`: save, load, snapshot."""
        return self._open().center

    def flush(self) -> None:
        """Push the updates since the last exchange, if any, and pull. Waits for no other worker.

        With ``rules.Elastic`` an exchange, after which the variables are not the center's: ``pull()`` makes them so.

        What ``wire_dtype`` has rounded away so far is pushed too.
        """
        self._open().flush()

    def pull(self) -> None:
        """Set the variables to the center. Updates not yet pushed are dropped; ``flush()`` keeps them."""
        self._open().pull()

    def center_weights(self) -> AbstractContextManager[None]:
        """Within the context the variables are the center's, for evaluation; then they are the local ones again.

        Takes a copy of the variables for as long. What is not trained, such as the moments of batch norm, stays local.
        """
        return self._open().center_weights()

    def stats(self) -> Stats:
        """What this worker has exchanged so far, see :class:`hvd_agn.Stats`."""
        worker = self._open()
        worker.check_open("stats()")
        return worker.client.stats()

    def close(self) -> None:
        """Push what is left and let go of the center; the wrapped optimizer can be used on. Waits for nobody.

        A second call does nothing. At exit it is called for you.
        """
        if self._worker is not None:
            self._worker.close()

    def _closed(self) -> None:
        if self._ops is not None:
            self._ops.leave()
            self._ops = None

    def __enter__(self) -> "AGNOptimizer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- what Keras sees of the wrapped optimizer

    @property
    def communication_period(self) -> int:
        """Updates between two exchanges."""
        return self._settings.communication_period

    @property
    def variables(self) -> list[Any]:
        """This optimizer's own, and the wrapped optimizer's."""
        return [*self._variables, *self.inner_optimizer.variables]

    @property
    def iterations(self) -> Any:
        """Updates applied: the wrapped optimizer's."""
        return self.inner_optimizer.iterations

    @property
    def learning_rate(self) -> Any:
        """The wrapped optimizer's."""
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        self.inner_optimizer.learning_rate = learning_rate

    def scale_loss(self, loss: Any) -> Any:
        """The wrapped optimizer's."""
        return self.inner_optimizer.scale_loss(loss)

    def exclude_from_weight_decay(self, var_list: Any = None, var_names: Any = None) -> None:
        """The wrapped optimizer's."""
        self.inner_optimizer.exclude_from_weight_decay(var_list, var_names)

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Set this optimizer's variables and the wrapped optimizer's, in the order of :attr:`variables`."""
        own = len(self._variables)
        for variable, value in zip(self._variables, weights[:own], strict=True):
            variable.assign(value)
        self.inner_optimizer.set_weights(weights[own:])

    def __getattr__(self, name: str) -> Any:
        """What only the wrapped optimizer has: momentum, beta_1; SwapEMAWeights asks for its averages."""
        public = not name.startswith("_") or name == "_model_variables_moving_average"
        if not public or "inner_optimizer" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.__dict__["inner_optimizer"], name)

    # ---- files

    def save_own_variables(self, store: Any) -> None:
        """This optimizer's own variables; Keras finds the wrapped optimizer's by itself."""
        for i, variable in enumerate(self._variables):
            store[str(i)] = np.asarray(variable)

    def load_own_variables(self, store: Any) -> None:
        """What :meth:`save_own_variables` saved; nothing where the file is the wrapped optimizer's alone."""
        if len(store.keys()) == len(self._variables):
            for i, variable in enumerate(self._variables):
                variable.assign(store[str(i)])

    def get_config(self) -> dict[str, Any]:
        """The arguments, with which :meth:`from_config` makes the same; not ``comm``, which no file can hold."""
        return {
            "name": self.name,
            "communication_period": self._settings.communication_period,
            "optimizer": keras.saving.serialize_keras_object(self.inner_optimizer),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> "AGNOptimizer":
        """The optimizer that :meth:`get_config` described."""
        inner = keras.saving.deserialize_keras_object(config["optimizer"], custom_objects=custom_objects)
        return cls(**{**config, "optimizer": inner})


for _name in _FORWARDED:
    setattr(AGNOptimizer, _name, _forwarded(_name))


def _when(condition: Any, do: Any) -> None:
    """In a graph, a branch; eagerly, an if."""

    def branch() -> Any:
        do()
        return tf.constant(0)

    tf.cond(condition, branch, lambda: tf.constant(0))


def _refuse_unusable(optimizer: Any) -> None:
    """Raise TypeError unless it is a Keras 3 optimizer that can be inside of this one."""
    kind = f"{type(optimizer).__module__}.{type(optimizer).__name__}"
    if isinstance(optimizer, AGNOptimizer):
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


def _refuse_surroundings(name: str) -> None:
    """Raise ConfigError under tf.distribute, and where XLA compiles the step."""
    if tf.distribute.has_strategy():
        raise ConfigError(
            f"{name}: under a tf.distribute strategy, whose place hvd_agn takes: build and train the model outside of "
            "strategy.scope(), one rank per device."
        )
    if tf.executing_eagerly():
        return
    from tensorflow.python.ops import control_flow_util  # private, the same in 2.17 to 2.21

    if control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()):
        raise ConfigError(
            f"{name}: XLA compiles this step, and cannot compile an exchange: use "
            "model.compile(..., jit_compile=False), or tf.function without jit_compile."
        )
