"""AGN for PyTorch: a wrapper around any ``torch.optim.Optimizer``.

This file knows torch and nothing of MPI; the exchange itself is ``hvd_agn.Center``.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from .. import config, rules
from ..center import Center
from ..client import Stats
from ..errors import CheckpointError, UsageError
from ..worker import Settings, Worker
from . import state
from .center_state import fill
from .names import Named
from .parameters import Parameters
from .steps import Steps

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["AGNOptimizer"]


def _of_wrapped(name: str) -> Any:
    def call(self: "AGNOptimizer", *args: Any, **kwargs: Any) -> Any:
        """The wrapped optimizer's, which takes what it takes."""
        return getattr(self.optimizer, name)(*args, **kwargs)

    return call


class AGNOptimizer(torch.optim.Optimizer):
    """Wraps an optimizer so that its parameters are exchanged with a center every ``communication_period`` steps.

    ``step()`` is the wrapped optimizer's; at the end of a period it also pushes ``(theta - anchor) / steps`` and sets
    the parameters to the center (Hermans, Spanakis, Moeckel, ACML 2017, arXiv 1710.02368, algorithm 1). No rank waits
    for another. ``param_groups``, ``state`` and ``defaults`` are the wrapped optimizer's own objects.

    Construction is collective, and sets the parameters of all ranks to rank 0's. What the center does not hold is
    compared with rank 0's: hyper-parameters, frozen parameters, and buffers if ``named_parameters`` is the model; the
    first that differs is named in a ``RankDifferenceWarning``. What has not been pushed when the
    program ends is pushed then, or by :meth:`flush` or :meth:`close`.

    Args:
        optimizer: any ``torch.optim.Optimizer``, with the same parameters on every rank. Parameters with
            ``requires_grad=False`` are left alone. A parameter that is not contiguous, or not on the CPU, is exchanged
            through a contiguous copy on the CPU.
        communication_period: local steps between two exchanges, at least 1.
        rule: what the center does with a delta; None is ``hvd_agn.rules.Add()``.
        normalize: push the mean update per step, as AGN does; False: their sum, as DOWNPOUR does.
        accumulate: ``"updates"``, or ``"gradients"``: push the mean of the gradients, as tf.contrib's AGNOptimizer did.
            Then ``rule`` is by default the optimizer's own kind, :func:`hvd_agn.rules.like`, with its learning rate at
            the push. A parameter that has had no gradient in a period is neither pushed nor pulled. Costs one more copy
            of the parameters, in float32 for half types, and with ``overlap`` two.
        overlap: exchange in the background while training goes on. At the end of a period a snapshot of the parameters
            is pushed; when the answer has come, the next ``step()`` adds to the parameters what the center had that the
            snapshot had not. A boundary waits only for the exchange before. Costs one more copy of the parameters.
        named_parameters: ``model.named_parameters()``, or a list or dict of it: names for messages and files, without
            what wrappers such as ``torch.compile`` add. Without it the names are those of the optimizer, or
            ``param_groups[0].params[0]`` ... The model itself may be given: then its buffers are compared too, see
            below.
        comm: mpi4py communicator, duplicated here; None is ``MPI.COMM_WORLD``.
        center_ranks, transport, wire_dtype: where the center is, and how it is reached from other nodes; see
            :class:`hvd_agn.Center`.
        on_nonfinite: what to do with an update that has a NaN or an Inf. ``"skip"``: refuse it, warn, set the
            parameters to the center; ``"raise"``: refuse it and raise, leaving the parameters as they are.
        max_norm: refuse an update whose Euclidean norm over all parameters, as it would be pushed but before the rule's
            ``clip_norm``, is above this, as one with a NaN. Costs one more pass over the parameters. None: do not.
        push_on_error: push the unfinished period also where an exception leaves ``with``, or the program ends with one
            or with ``sys.exit`` of a status other than 0. By default what a failing rank has not pushed is dropped.
        name: used in messages.

    Raises:
        TypeError: ``optimizer`` is not a ``torch.optim.Optimizer``.
        ConfigError: another argument, or an environment variable, is none of its choices.
        LayoutError: a parameter cannot be exchanged, or the ranks' parameters differ.
        LaunchError, SharedMemoryError: see :class:`hvd_agn.Center`.
    """

    center: Center

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        communication_period: int = config.COMMUNICATION_PERIOD,
        *,
        rule: rules.Rule | None = None,
        normalize: bool = True,
        accumulate: str = config.ACCUMULATE[0],
        overlap: bool = False,
        named_parameters: Named | None = None,
        comm: "MPI.Comm | None" = None,
        center_ranks: Sequence[int] | str = config.CENTER_RANKS,
        transport: str | None = None,
        wire_dtype: str | None = config.WIRES[0],
        on_nonfinite: str = config.ON_NONFINITE[0],
        max_norm: float | None = config.MAX_NORM,
        push_on_error: bool = config.PUSH_ON_ERROR,
        name: str = "AGNOptimizer",
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer is a {type(optimizer).__name__}: give a torch.optim.Optimizer.")
        if isinstance(optimizer, AGNOptimizer):
            raise TypeError("optimizer is an AGNOptimizer already: wrap the optimizer inside it.")
        settings = Settings(
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
            name=name,
        )
        # What unpickling an optimizer does: it sets up hooks and profiling without touching groups or state, which are
        # the wrapped optimizer's. Optimizer.__init__ would make its own.
        super().__setstate__({})
        self.optimizer = optimizer
        """The wrapped optimizer."""
        self._worker = Worker(
            settings,
            optimizer,
            lambda: Parameters(optimizer, named_parameters),
            lambda: _learning_rates(optimizer),
            closed=self._closed,
        )
        super().__setattr__("center", self._worker.center)  # the wrapped optimizer may have one too
        if settings.gradients:
            self._worker.arrays.sums = [torch.from_numpy(each) for each in self._worker.client.accumulators()]
        self._steps = Steps(optimizer, self._worker)

    @property
    def communication_period(self) -> int:
        """Local steps between two exchanges."""
        return self._worker.settings.communication_period

    # ---- what torch, schedulers and scalers see

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The wrapped optimizer's."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The wrapped optimizer's."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The wrapped optimizer's."""
        return self.optimizer.defaults if "optimizer" in self.__dict__ else {}

    def __getattr__(self, name: str) -> Any:
        """What only the wrapped optimizer has: ``train()`` of a schedule-free one, ``first_step()`` of SAM."""
        if name.startswith("_") or "optimizer" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.optimizer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """What only the wrapped optimizer has is set there."""
        own = name.startswith("_") or name in self.__dict__ or hasattr(type(self), name)
        if own or "optimizer" not in self.__dict__ or not hasattr(self.optimizer, name):
            super().__setattr__(name, value)
        else:
            setattr(self.optimizer, name, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: the center was laid out for the parameters that there were.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            f"{self.center.label}: parameters cannot be added once the center exists, which all ranks share. Close "
            "this AGNOptimizer, add the group to the optimizer inside it, and wrap that again, on every rank."
        )

    def register_step_pre_hook(self, hook: Any) -> Any:
        """As of any optimizer; it is called before the wrapped optimizer's own."""
        self._worker.take_care()
        return super().register_step_pre_hook(hook)

    def register_step_post_hook(self, hook: Any) -> Any:
        """As of any optimizer; it is called after the exchange."""
        self._worker.take_care()
        return super().register_step_post_hook(hook)

    register_state_dict_pre_hook = _of_wrapped("register_state_dict_pre_hook")
    register_state_dict_post_hook = _of_wrapped("register_state_dict_post_hook")
    register_load_state_dict_pre_hook = _of_wrapped("register_load_state_dict_pre_hook")
    register_load_state_dict_post_hook = _of_wrapped("register_load_state_dict_post_hook")
    zero_grad = _of_wrapped("zero_grad")

    def __getstate__(self) -> dict[str, Any]:
        raise UsageError(
            f"{self.center.label}: an AGNOptimizer cannot be copied or pickled, the center is shared memory. Use "
            "state_dict(), or copy the optimizer inside it."
        )

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """One local step, and at the end of a period an exchange, or with ``overlap`` the start of one.

        Args:
            args, kwargs: handed to the wrapped optimizer: a closure, and whatever its ``step()`` takes.

        Returns:
            What the wrapped optimizer returns.

        Raises:
            NonFiniteError: with ``on_nonfinite="raise"``.
            StallError, MPIError, RuleError: of this exchange, or with ``overlap`` of one in the background; steps that
                were not pushed are part of the next exchange.
            LayoutError: a parameter has changed its shape, type or ties, or was added or unfrozen since the start.
            UsageError: after ``close()`` or inside ``center_weights()``.
        """
        worker, steps = self._worker, self._steps
        if worker.careful or kwargs or self.optimizer.step is not steps.stand_in:
            hooked = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
            return self._step_with_hooks(*args, **kwargs) if hooked else self._step(*args, **kwargs)
        result = steps.bare(*args)  # here, as take() does it: a call more would show
        worker.steps_since_exchange += 1
        if worker.steps_since_exchange >= worker.period:
            worker.perform("exchange")
        return result

    step.hooked = True  # type: ignore[attr-defined]  # not by torch: profiled and hooked is the wrapped optimizer's step

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        self._worker.check_open("step()")
        return self.optimizer.step(*args, **kwargs)

    _step_with_hooks = torch.optim.Optimizer.profile_hook_step(_step)

    # ---- exchange

    def flush(self) -> None:
        """Push the steps taken since the last exchange, if any, and pull. Waits for no other worker.

        With ``rules.Elastic`` an exchange, after which the parameters are not the center's: ``pull()`` makes them so.

        What ``wire_dtype`` has rounded away so far is pushed too.
        """
        self._worker.flush()

    def pull(self) -> None:
        """Set the parameters to the center. Steps not yet pushed are dropped; ``flush()`` keeps them."""
        self._worker.pull()

    def center_weights(self) -> AbstractContextManager[None]:
        """Within the context the parameters are the center's, for evaluation; then they are the local ones again.

        Takes a copy of the parameters for as long. Buffers, such as those of batch norm, stay local.
        """
        return self._worker.center_weights()

    def center_state_dict(self, model: torch.nn.Module) -> dict[str, Any]:
        """``model.state_dict()`` with the center's values for the parameters that are exchanged, to save or to load.

        Args:
            model: holds the wrapped optimizer's parameters, itself or in a wrapper; or a part of it.

        Returns:
            Tensors of the parameters' own dtype and device; buffers and other parameters are the model's.

        Raises:
            ConfigError: the model, or a part of it, is a copy: its values would be local ones.
        """
        self._worker.check_open("center_state_dict()")
        return fill(model, self._worker.arrays.parameters(), self.center)

    def stats(self) -> Stats:
        """What this worker has exchanged so far, see :class:`hvd_agn.Stats`."""
        self._worker.check_open("stats()")
        return self._worker.client.stats()

    def close(self) -> None:
        """Push what is left and let go of the center; the wrapped optimizer can be used on. Waits for nobody.

        A second call does nothing. At exit it is called for you.
        """
        self._worker.close()

    def _closed(self) -> None:
        self._steps.release()
        self._worker.arrays.sums = []  # which keep the core's memory

    def __enter__(self) -> "AGNOptimizer":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._worker.close(error)

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's, with this worker's part and the center under ``"hvd_agn"``. Changes nothing.

        Not collective. With the model's parameters it is a whole checkpoint. With ``overlap`` it waits for the exchange
        under way, but merges nothing. On the CPU; takes two copies of the parameters, and one of the rule's slots.
        """
        self._worker.check_open("state_dict()")
        return state.add(self.optimizer.state_dict(), self._worker)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Restore what :meth:`state_dict` saved, after the model's parameters, as every rank does, each for itself.

        Not collective: rank 0 sets the center to the one in its state dict, and the next exchanges of the others wait
        for that. A rank that loads its own, among as many ranks, goes on with what it had not pushed. Other states, of
        another rank or from another number of ranks: then the parameters become the saved center. A state dict of the
        wrapped optimizer alone: then the center becomes rank 0's parameters as they are.

        Raises:
            CheckpointError: the state is of other parameters, of a rule with other slots, or of another run's center
                than ``opt.center.load`` has just loaded; nothing was restored.
            LayoutError: the center is to become parameters that have a NaN or an Inf; it stays.
            UsageError: after ``close()`` or inside ``center_weights()``.
        """
        worker = self._worker
        inner, own = state.take_out(state_dict)
        worker.check_open("load_state_dict()")
        try:
            saved, center = (None, None) if own is None else state.read(own, worker.arrays)
        except CheckpointError as error:
            raise CheckpointError(f"{self.center.label}: {error}") from None
        worker.check_state(center)
        self.optimizer.load_state_dict(inner)
        worker.load(saved, center)


def _learning_rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups if "lr" in group]
