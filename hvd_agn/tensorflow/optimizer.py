"""AGN for Keras 3 on TensorFlow: a wrapper around any ``keras.optimizers.Optimizer``.

This file knows Keras and nothing of MPI; when to exchange is :class:`hvd_agn.worker.Worker`'s.
"""

import copy
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf

from .. import config, rules
from ..center import Center
from ..client import Stats
from ..errors import UsageError
from ..rules.like import parts_by_group, parts_of
from ..worker import Settings, Worker
from . import library
from .ops import Ops
from .refused import refuse_accumulation, refuse_optimizer, refuse_strategy, refuse_surroundings, refuse_tracing
from .state import Files, config_of, rule_of
from .variables import Variables, plain
from .wrapper import Wrapper

if TYPE_CHECKING:
    from mpi4py import MPI

_STATE_KEY = "hvd_agn"  # in Keras' files


@keras.saving.register_keras_serializable(package="hvd_agn")
class AGNOptimizer(Wrapper):
    """Wraps an optimizer so that its variables are exchanged with a center every ``communication_period`` updates.

    ``apply()`` is the wrapped optimizer's; at the end of a period it also pushes ``(theta - anchor) / updates`` and
    sets the variables to the center (Hermans, Spanakis, Moeckel, ACML 2017, arXiv 1710.02368, algorithm 1). No rank
    waits for another. An update is counted when it is applied: not while gradients are accumulated, nor when a loss
    scale leaves one out.

    The center is made by the first ``apply()``, or by :meth:`start`, which is collective: all ranks' variables become
    rank 0's. What has not been pushed is pushed at the end of ``fit``, when the program ends, or by :meth:`flush` or
    :meth:`close`.

    Args:
        optimizer: any ``keras.optimizers.Optimizer``, with the same variables on every rank; or a name or
            configuration, as ``keras.optimizers.get`` takes it.
        communication_period, rule, normalize, accumulate, overlap, comm, center_ranks, transport, wire_dtype,
            on_nonfinite, max_norm, push_on_error: see :class:`hvd_agn.torch.AGNOptimizer`. Besides the anchor, an
            exchange takes memory for one more copy of the variables.
        name: of this optimizer, as Keras has it, and in messages.

    Raises:
        TypeError: ``optimizer`` is not a Keras 3 optimizer, or is one that has to be outside of this one.
        ConfigError: another argument is none of its choices.
    """

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
        max_norm: float | None = config.MAX_NORM,
        push_on_error: bool = config.PUSH_ON_ERROR,
        name: str | None = None,
    ) -> None:
        if isinstance(optimizer, (str, dict)):
            optimizer = keras.optimizers.get(optimizer)
        refuse_optimizer(optimizer)
        super().__init__(optimizer, name)
        refuse_strategy(self.name)
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
            max_norm=max_norm,
            push_on_error=push_on_error,
            name=self.name,
        )
        refuse_accumulation(optimizer, self._settings)
        self._worker: Worker[Variables] | None = None
        self._ops: Ops | None = None
        self._files = Files()

    # ---- what fit and loops call

    def start(self, variables: Iterable[Any] | None = None) -> None:
        """Make the center. Collective; the first ``apply()`` does it otherwise. Again: does nothing.

        Args:
            variables: those to train, as ``model.trainable_variables``; None: those that the optimizer is built for.

        Raises:
            LayoutError: a variable cannot be exchanged, or the ranks' variables differ.
            CheckpointError: what was loaded is of other variables, or of a rule with other slots.
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
        library.ops()  # before anything that other ranks wait for
        worker: Worker[Variables] = Worker(
            self._settings,
            self.inner_optimizer,
            lambda: self._files.checked(Variables(self._trainable_variables, self.inner_optimizer)),
            self._rates,
            self._through,
            self._closed,
            self._files.center,
        )
        variables = worker.arrays
        if self._settings.gradients:
            variables.sums = worker.client.accumulators()
        (variables.keep if self._files.resume(worker) else variables.settle)(worker.client)
        # Not tracked: it is for the files to say what becomes of it when a checkpoint is restored.
        self.__dict__["_since"] = tf.Variable(0, dtype=tf.int64, trainable=False, name="updates_since_exchange")
        self._files.begin(worker, self._since)
        self._ops = Ops(worker, self._since)
        self._worker = worker

    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        """The wrapped optimizer's, and at the end of a period an exchange, or with ``overlap`` the start of one.

        Raises:
            NonFiniteError: with ``on_nonfinite="raise"``.
            StallError, MPIError, RuleError: of this exchange, or with ``overlap`` of one in the background; updates
                that were not pushed are part of the next exchange.
            UsageError: after ``close()`` or inside ``center_weights()``.
            ConfigError: the step is compiled by XLA, and cannot be.
        """
        if len(grads) == 0:
            return
        refuse_surroundings(self.name, self._settings)
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
        if trainable_variables is not None or self.built:
            self.start(trainable_variables)
            self._open().check_open("apply()")
        before = tf.cast(tf.convert_to_tensor(self.iterations), tf.int64)
        self.inner_optimizer.apply(grads, trainable_variables)
        accumulated = [self._accumulate(grads, trainable_variables)] if self._settings.gradients else []
        applied = tf.cast(tf.convert_to_tensor(self.iterations), tf.int64) - before
        with tf.control_dependencies([each for each in accumulated if each is not None]):
            since = self._since.assign_add(applied)
        self._exchange_when_due(since)

    def apply_gradients(self, grads_and_vars: Iterable[tuple[Any, Any]]) -> Any:
        """As ``apply()``; returns the updates applied so far."""
        super().apply_gradients(grads_and_vars)
        return self.iterations

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """The end of ``fit``: push what is left; then the wrapped optimizer's own, such as averages.

        Where ``SwapEMAWeights`` has put the averages into the model for good, what is left is lost: they are no update.
        """
        if self._worker is not None and self._ops is not None:
            if self._has_averages():
                self.pull()
            else:
                self.flush()
        if self.inner_optimizer.built:
            self.inner_optimizer.finalize_variable_values(var_list)

    def _has_averages(self) -> bool:
        """Whether the variables are their own averages, and not because the wrapped optimizer overwrites them."""
        if int(self.iterations) < 2:
            return False
        parts = [p for p in parts_of(self.inner_optimizer) if p.use_ema and not p.ema_overwrite_frequency]
        pairs = [
            each for p in parts for each in zip(p._trainable_variables, p._model_variables_moving_average, strict=True)
        ]
        return bool(pairs) and all(bool(tf.reduce_all(plain(v) == plain(a))) for v, a in pairs if a is not None)

    # ---- exchange

    def _exchange_when_due(self, since: Any) -> None:
        ops = self._ops
        assert ops is not None
        due = since >= self._settings.communication_period
        if self._settings.overlap:
            ops.when(ops.ready(due), lambda: ops.call("land"))
            ops.when(due, lambda: ops.start(self._rates_now()))
        else:
            ops.when(due, lambda: ops.call("exchange", self._rates_now()))

    def _accumulate(self, grads: Sequence[Any], variables: Sequence[Any] | None) -> Any:
        assert self._worker is not None
        assert self._ops is not None
        by_id = {id(plain(v)): g for v, g in zip(variables or self._trainable_variables, grads, strict=True)}
        # A graph orders by resources, of which sums of gradients are none: after the exchange of the step before.
        with tf.control_dependencies([self._since.read_value()]):
            return self._ops.accumulate([by_id.get(id(v)) for v in self._worker.arrays.exchanged])

    def _rates_now(self) -> Any:
        if self._worker is None or not self._worker.center.rule.follows:
            return 0.0
        return self._worker.arrays.rates()

    def _rates(self) -> list[float]:
        """For the worker: at the start, those there are; then, inside an op, those that came with it."""
        if self._ops is not None:
            return self._ops.rates
        return [float(part.learning_rate) for part in parts_by_group(self.inner_optimizer)]

    def _through(self, what: str) -> None:
        assert self._ops is not None
        refuse_tracing(self.name, what)
        with tf.init_scope():
            self._ops.call(what, self._rates_now())

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
        refuse_tracing(self.name, "center_weights")
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
        if self._worker is not None:
            self._worker.arrays.sums = []  # which keep the core's memory

    def __enter__(self) -> "AGNOptimizer":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._worker is not None:
            self._worker.close(error)

    @property
    def communication_period(self) -> int:
        """Updates between two exchanges."""
        return self._settings.communication_period

    # ---- files

    def save_own_variables(self, store: Any) -> None:
        """This worker's counters and anchor, and the center. Keras finds the wrapped optimizer by itself.

        Not collective. With ``overlap`` it waits for the exchange under way, but merges nothing.
        """
        store[_STATE_KEY] = np.frombuffer(self._files.serialize(), np.uint8)

    def load_own_variables(self, store: Any) -> None:
        """What :meth:`save_own_variables` saved, or else the wrapped optimizer's own file. Not collective.

        Before there is a center: it will begin as rank 0's file has it, and so will a worker whose file is of its own
        rank among as many; the others take the center over. Later: every rank loads, each for itself; rank 0 sets the
        center to the one in its file.

        Raises:
            CheckpointError: the file is damaged, or of other variables.
        """
        if _STATE_KEY in store.keys():  # noqa: SIM118 (not a dict)
            self._files.load(np.asarray(store[_STATE_KEY]).tobytes())
        elif len(store.keys()) > 0:
            self.load_of_wrapped(store)
            self._files.load_nothing()

    def get_config(self) -> dict[str, Any]:
        """The arguments, with which :meth:`from_config` makes the same; but not ``comm``, which no file can hold.

        Raises:
            ConfigError: the rule is a ``rules.Custom``, a function.
        """
        inner = keras.saving.serialize_keras_object(self.inner_optimizer)
        return {"optimizer": inner, **config_of(self._settings)}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> "AGNOptimizer":
        """The optimizer that :meth:`get_config` described."""
        inner = copy.deepcopy(config["optimizer"])  # Keras would write over it
        inner = keras.saving.deserialize_keras_object(inner, custom_objects=custom_objects)
        return cls(**{**config, "optimizer": inner, "rule": rule_of(config.get("rule"))})

    def __reduce__(self) -> Any:
        raise UsageError(
            f"{self.name}: an AGNOptimizer cannot be copied or pickled, its center is shared memory. For another like "
            "it: AGNOptimizer.from_config(optimizer.get_config())."
        )
