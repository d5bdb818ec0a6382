"""The classes of ``tf.contrib.opt`` for graphs and sessions of TensorFlow 1, with the center in MPI's memory.

``docs/migrate-from-tf-contrib.md`` has each argument and method, as it was and as it is.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import tensorflow as tf
from tensorflow.compat import v1

from ... import config, mpi, rules
from ...center import Center
from ...client import Stats
from ...errors import ConfigError, UsageError, warn
from ...worker import Settings
from ..ops import Ops
from .graph import GraphVariables, GraphWorker, adam_powers, is_ref, learning_rate, like, refuse_cluster

if TYPE_CHECKING:
    from mpi4py import MPI

BIAS_CORRECTIONS = {"tf_contrib": "tf_contrib", "correct": "keras"}
"""Of Adam: the choices, and what the rule at the center calls them; TensorFlow 1 has Keras' formula."""

_UNBEGUN = -(2**62)  # steps since the exchange in a session that has not begun: the first step exchanges, and fails


class AGNCustomGetter:
    """For ``variable_scope(custom_getter=...)``: makes resource variables, on this process' own device.

    Args:
        worker_device: such as ``"/job:worker/task:0/cpu:0"``. Its device type and index count; its job and task do
            not: each process is a worker, and has a local session.
    """

    def __init__(self, worker_device: str) -> None:
        spec = v1.DeviceSpec.from_string(worker_device)
        self._device = v1.DeviceSpec(device_type=spec.device_type, device_index=spec.device_index).to_string()

    def __call__(
        self,
        getter: Callable[..., Any],
        name: str,
        trainable: bool | None = None,
        collections: Sequence[str] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The variable that ``getter`` makes, whatever the surrounding ``tf.device`` says."""
        kwargs["use_resource"] = True
        with v1.device(None), v1.device(self._device):
            return getter(name, *args, trainable=trainable, collections=collections, **kwargs)


class AGNOptimizer(v1.train.Optimizer):  # type: ignore[misc]
    """Wraps an optimizer of TensorFlow 1: each worker trains on its own variables, with a center for all.

    A step is the wrapped optimizer's, and its gradients are summed up; every ``communication_period`` steps their mean
    goes to the center, which does with it what the wrapped optimizer would, with slots of its own, and the variables
    become the center's. No rank waits for another. Steps of an unfinished period are pushed at the session's end.

    ``apply_gradients()`` is collective: it makes the center. So is the beginning of the first session, when rank 0's
    values, restored or initial, become everybody's.

    Args:
        optimizer: GradientDescent, Momentum, Adam, Adagrad or RMSProp of ``tf.compat.v1.train``; another with ``rule``.
        num_worker: ranks of ``comm``; anything else is an error.
        custom_getter: the AGNCustomGetter of the variables' scope. Resource variables made without it are as good.
        communication_period: steps between two exchanges.
        use_locking: the center's blocks have locks in any case; False is told so.
        name: of the operations, and in messages.
        bias_correction: of Adam. ``"tf_contrib"`` counts as the original: the worker's own steps and pushes, at the
            center and in its own steps, which also count its pushes. ``"correct"``: the worker's steps; at the center
            its pushes, from all workers.
        rule: what the center does with a mean gradient, any of ``hvd_agn.rules``; None: as ``optimizer``, with the
            learning rate that this has at the push.
        comm, center_ranks, transport, wire_dtype, on_nonfinite, max_norm: see
            :class:`hvd_agn.torch.AGNOptimizer`.

    Raises:
        TypeError: ``optimizer`` or ``custom_getter`` is of another kind.
        ConfigError: another argument is none of its choices; it is a ``ValueError``.
    """

    def __init__(
        self,
        optimizer: Any,
        num_worker: int,
        custom_getter: AGNCustomGetter,
        communication_period: int = config.COMMUNICATION_PERIOD,
        use_locking: bool = True,
        name: str = "AGNOptimizer",
        *,
        bias_correction: str = "tf_contrib",
        rule: rules.Rule | None = None,
        comm: "MPI.Comm | None" = None,
        center_ranks: Sequence[int] | str = config.CENTER_RANKS,
        transport: str | None = None,
        wire_dtype: str | None = config.WIRES[0],
        on_nonfinite: str = config.ON_NONFINITE[0],
        max_norm: float | None = config.MAX_NORM,
    ) -> None:
        _refuse_unusable(optimizer, custom_getter)
        super().__init__(use_locking, name)
        config.choose("bias_correction", bias_correction, tuple(BIAS_CORRECTIONS))
        self._inner = optimizer
        self._rule = like(optimizer, BIAS_CORRECTIONS[bias_correction]) if rule is None else rule
        self._settings = Settings(
            communication_period=communication_period,
            rule=self._rule,
            accumulate="gradients",
            comm=comm,
            center_ranks=center_ranks,
            transport=transport,
            wire_dtype=wire_dtype,
            on_nonfinite=on_nonfinite,
            max_norm=max_norm,
            name=name,
        )
        ranks = mpi.initialize().COMM_WORLD if comm is None else comm
        self._rank = ranks.Get_rank()
        if num_worker != ranks.Get_size():
            raise ConfigError(
                f"[rank {self._rank}] {name}: num_worker={num_worker}, and there are {ranks.Get_size()} ranks: start "
                f"as many, mpirun -np {num_worker}, or give num_worker=MPI.COMM_WORLD.Get_size()."
            )
        if not use_locking and self._rank == 0:
            warn(f"{name}: use_locking=False: the center's blocks are locked for each push all the same.", UserWarning)
        self._worker: GraphWorker | None = None
        self._ops: Ops | None = None
        self._session: Callable[[], Any] = lambda: None

    # ---- building the graph

    def compute_gradients(
        self,
        loss: Any,
        var_list: Any = None,
        gate_gradients: int = v1.train.Optimizer.GATE_OP,
        aggregation_method: int | None = None,
        colocate_gradients_with_ops: bool = False,
        grad_loss: Any = None,
    ) -> list[tuple[Any, Any]]:
        """The wrapped optimizer's.

        Raises:
            TypeError: ``var_list`` has something else than variables.
            ValueError, RuntimeError: as ``tf.compat.v1.train.Optimizer.compute_gradients``.
        """
        _refuse_others(var_list, TypeError)
        return self._inner.compute_gradients(  # type: ignore[no-any-return]
            loss, var_list, gate_gradients, aggregation_method, colocate_gradients_with_ops, grad_loss
        )

    def minimize(self, loss: Any, global_step: Any = None, var_list: Any = None, *args: Any, **kwargs: Any) -> Any:
        """``compute_gradients()``, then ``apply_gradients()``.

        Raises:
            ValueError: ``var_list`` has something else than variables, or none has a gradient.
        """
        _refuse_others(var_list, ValueError)
        return super().minimize(loss, global_step, var_list, *args, **kwargs)

    def apply_gradients(
        self, grads_and_vars: Iterable[tuple[Any, Any]], global_step: Any = None, name: str | None = None
    ) -> Any:
        """The training step. Collective; the ranks' variables must be the same, some gradients may be None.

        Args:
            grads_and_vars: as from ``compute_gradients()``.
            global_step: set to the pushes of all workers, as this one knows them when it has pushed.
            name: of the returned operation.

        Raises:
            TypeError, ValueError: as ``tf.compat.v1.train.Optimizer.apply_gradients``.
            LayoutError: a variable cannot be exchanged, or the ranks' variables differ; it is a ``ValueError``.
            ConfigError, LaunchError, SharedMemoryError: see :class:`hvd_agn.Center`.
            UsageError: TensorFlow executes eagerly, or it is the second call; it is a ``RuntimeError``.
        """
        if tf.executing_eagerly():
            raise UsageError(
                f"{self._name}: needs a graph: build it in `with tf.Graph().as_default():`, or call "
                "tf.compat.v1.disable_eager_execution(). For Keras and tf.function: hvd_agn.tensorflow.AGNOptimizer."
            )
        if self._worker is not None:
            raise UsageError(f"{self._name}: apply_gradients() was called before: use one AGNOptimizer per graph.")
        pairs = [(gradient, variable) for gradient, variable in grads_and_vars]
        variables = [variable for _, variable in pairs]
        with v1.name_scope(name or self._name) as scope:
            if any(map(is_ref, variables)):
                self._start(variables, global_step)  # refuses them, where TensorFlow may fail on their slots
            update = self._inner.apply_gradients(pairs)
            ops = self._start(variables, global_step)
            rate = learning_rate(self._inner) if self._rule.follows else tf.constant(0.0, tf.float64)
            done = [update, ops.accumulate([gradient for gradient, _ in pairs]), self._rate.assign(rate)]
            with tf.control_dependencies(done):
                since = self._since.assign_add(1)
            due = (since >= self._settings.communication_period) | (since <= 0)
            exchanged = tf.cond(due, self._boundary, lambda: tf.constant(False))
            return tf.group(exchanged, name=scope)

    def _start(self, variables: Sequence[Any], global_step: Any) -> Ops:
        """Make the center and, in the graph, what the worker counts."""
        self._worker = GraphWorker(
            self._settings,
            self._inner,
            lambda: GraphVariables(variables),
            lambda: self._ops.rates if self._ops else [0.0],
            self._through,
            self._closed,
        )
        self._worker.arrays.keep(self._worker.client)
        local = {"trainable": False, "collections": [v1.GraphKeys.LOCAL_VARIABLES], "use_resource": True}
        with v1.device(None):
            self._since = v1.Variable(_UNBEGUN, dtype=tf.int64, name="steps_since_exchange", **local)
            self._rate = v1.Variable(0.0, dtype=tf.float64, name="learning_rate", **local)  # of the last step
        self._global_step = global_step
        self._ops = Ops(self._worker, self._since)
        self._begin: Any = None
        self._flush: Any = None
        return self._ops

    def _boundary(self) -> Any:
        """The end of a period, in the graph."""
        assert self._ops is not None
        exchanged = self._ops.call("exchange", self._rate.read_value())
        with tf.control_dependencies([exchanged]):
            then = [exchanged, *self._count(1)]
            if getattr(self._rule, "bias_correction", "") == "tf_contrib":
                then += [power.assign(power * beta) for power, beta in adam_powers(self._inner)]
        with tf.control_dependencies(then):
            return tf.constant(True)

    def _count(self, own: int) -> list[Any]:
        """Set the global step to all workers' pushes, and further by ``own`` in any case."""
        step, worker = self._global_step, self._worker
        if step is None or worker is None:
            return []
        pushes = tf.cast(tf.numpy_function(lambda: worker.pushes, [], tf.int64), step.dtype.base_dtype)
        return [v1.assign(step, tf.maximum(step + own, pushes))]

    # ---- sessions

    def get_init_op(self, task_index: int) -> Any:
        """The op to be run after the initializers: all variables become the center's. Collective the first time.

        Args:
            task_index: this process' rank.

        Raises:
            ConfigError: it is another.
            UsageError: before ``apply_gradients()``, which ``minimize()`` calls.
        """
        self._check_task(task_index)
        worker, ops = self._open()
        if self._begin is None:
            with v1.device(None), v1.name_scope(f"{self._name}_begin"):
                step = 0 if self._global_step is None else self._global_step
                values = worker.arrays.exchanged if self._rank == 0 else []
                brought = tf.numpy_function(worker.bring, [tf.convert_to_tensor(v) for v in (step, *values)], [])
                with tf.control_dependencies([brought]):
                    begun = ops.call("begin")
                with tf.control_dependencies([begun]):
                    self._begin = tf.group(begun, *self._count(0))
        return self._begin

    def get_flush_op(self) -> Any:
        """The op that pushes the steps of an unfinished period, and pulls. The hook runs it at the session's end.

        Raises:
            UsageError: before ``apply_gradients()``.
        """
        _, ops = self._open()
        if self._flush is None:
            with v1.device(None), v1.name_scope(f"{self._name}_flush"):
                flushed = ops.call("flush", self._rate.read_value())
                with tf.control_dependencies([flushed]):
                    self._flush = tf.group(flushed, *self._count(0))
        return self._flush

    def make_session_run_hook(self, is_chief: bool, task_index: int) -> v1.train.SessionRunHook:
        """For ``MonitoredTrainingSession``: begins with the center's values, and pushes what is left at the end.

        Args:
            is_chief: whether this is rank 0; the session's ``is_chief`` should be the same.
            task_index: this process' rank.

        Raises:
            ConfigError: one of them is wrong.
        """
        self._check_task(task_index)
        if bool(is_chief) != (self._rank == 0):
            raise ConfigError(f"[rank {self._rank}] {self._name}: is_chief={is_chief}: give is_chief=(rank == 0).")
        return _Hook(self, task_index)

    def _enter(self, session: Any) -> None:
        refuse_cluster(session, f"[rank {self._rank}] {self._name}")
        session.run(self._begin)
        self._session = weakref.ref(session)

    def _end(self, session: Any) -> None:
        self._session = lambda: None
        if self._ops is not None:
            session.run(self._flush)

    def _check_task(self, task_index: int) -> None:
        if task_index != self._rank:
            raise ConfigError(
                f"[rank {self._rank}] {self._name}: task_index={task_index}: give the rank, MPI.COMM_WORLD.Get_rank()."
            )

    def _through(self, what: str) -> None:
        """For the worker, when it is called outside of a session's run: where there is no session, do nothing."""
        session = self._session()
        if session is not None and not session._closed:
            session.run(self.get_flush_op() if what == "flush" else self._begin)

    def _open(self) -> tuple[GraphWorker, Ops]:
        if self._worker is None:
            raise UsageError(f"{self._name}: there is no center yet: call minimize() or apply_gradients() first.")
        self._worker.check_open("this")
        assert self._ops is not None
        return self._worker, self._ops

    @property
    def center(self) -> Center:
        """The :class:`hvd_agn.Center`: save, load, snapshot; from ``apply_gradients()`` on."""
        return self._open()[0].center

    def stats(self) -> Stats:
        """What this worker has exchanged so far, see :class:`hvd_agn.Stats`."""
        return self._open()[0].client.stats()

    def close(self) -> None:
        """Let go of the center; the training step raises UsageError from now on. Waits for nobody.

        A second call does nothing. At exit it is called for you.
        """
        if self._worker is not None:
            self._worker.close()

    def _closed(self) -> None:
        if self._ops is not None:
            self._ops.leave()
            self._ops = None

    # ---- the wrapped optimizer's state

    def get_slot(self, var: Any, name: str) -> Any:
        """The wrapped optimizer's slot of a variable, None if there is none; the center's are not in the graph."""
        return self._inner.get_slot(var, name)

    def get_slot_names(self) -> list[str]:
        """The names of the wrapped optimizer's slots."""
        return self._inner.get_slot_names()  # type: ignore[no-any-return]

    def variables(self) -> list[Any]:
        """The wrapped optimizer's variables: slots, and others such as Adam's powers."""
        return self._inner.variables()  # type: ignore[no-any-return]


class _Hook(v1.train.SessionRunHook):  # type: ignore[misc]
    def __init__(self, optimizer: AGNOptimizer, task_index: int) -> None:
        self._optimizer = optimizer
        self._task_index = task_index

    def begin(self) -> None:
        self._optimizer.get_flush_op()
        self._optimizer.get_init_op(self._task_index)
        keys = v1.GraphKeys
        if self._task_index == 0 or v1.get_collection(keys.READY_FOR_LOCAL_INIT_OP):
            return
        # The session of a worker that is no chief would wait for a chief to initialize the variables, for two hours:
        # say that they need nothing, and initialize them as local ones.
        v1.add_to_collection(keys.READY_FOR_LOCAL_INIT_OP, tf.constant([], tf.string))
        initializers = (v1.global_variables_initializer, v1.local_variables_initializer, v1.tables_initializer)
        v1.add_to_collection(keys.LOCAL_INIT_OP, tf.group(*(initializer() for initializer in initializers)))

    def after_create_session(self, session: Any, coord: Any) -> None:
        self._optimizer._enter(session)

    def end(self, session: Any) -> None:
        self._optimizer._end(session)


def _refuse_others(var_list: Any, error: type[Exception]) -> None:
    for variable in tf.nest.flatten([] if var_list is None else var_list):
        if not isinstance(variable, tf.Variable):
            raise error(f"var_list has a {type(variable).__name__}: give variables.")


def _refuse_unusable(optimizer: Any, custom_getter: Any) -> None:
    kind = f"{type(optimizer).__module__}.{type(optimizer).__name__}"
    if isinstance(optimizer, AGNOptimizer):
        raise TypeError("optimizer is an AGNOptimizer already: wrap the optimizer inside it.")
    if not isinstance(optimizer, v1.train.Optimizer):
        raise TypeError(
            f"optimizer is a {kind}: give one of tf.compat.v1.train. For those of Keras there is "
            "hvd_agn.tensorflow.AGNOptimizer."
        )
    if not isinstance(custom_getter, AGNCustomGetter):
        raise TypeError(
            f"custom_getter is a {type(custom_getter).__name__}: give the AGNCustomGetter of the variables' scope."
        )
