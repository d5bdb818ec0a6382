"""AGN for PyTorch: a wrapper around any ``torch.optim.Optimizer``.

This file knows torch and nothing of MPI; the exchange itself is ``hvd_agn.Center``.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from .. import config, rules
from ..client import Stats
from ..errors import CheckpointError, LayoutError, UsageError
from ..worker import Settings, Worker
from .parameters import Parameters

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["AGNOptimizer"]

_STATE_KEY = "hvd_agn"


class AGNOptimizer(torch.optim.Optimizer):
    """Wraps an optimizer so that its parameters are exchanged with a center every ``communication_period`` steps.

    ``step()`` is the wrapped optimizer's; at the end of a period it also pushes ``(theta - anchor) / steps`` and sets
    the parameters to the center (Hermans, Spanakis, Moeckel, ACML 2017, arXiv 1710.02368, algorithm 1). No rank waits
    for another. ``param_groups``, ``state`` and ``defaults`` are the wrapped optimizer's own objects.

    Construction is collective, and sets the parameters of all ranks to rank 0's. What has not been pushed when the
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
        named_parameters: ``model.named_parameters()``: names for messages and files. Without it the names are those of
            the optimizer, or ``param_groups[0].params[0]`` ...
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

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        communication_period: int = config.COMMUNICATION_PERIOD,
        *,
        rule: rules.Rule | None = None,
        normalize: bool = True,
        accumulate: str = config.ACCUMULATE[0],
        overlap: bool = False,
        named_parameters: Iterable[tuple[str, torch.Tensor]] | None = None,
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
            settings, optimizer, lambda: Parameters(optimizer, named_parameters), lambda: _learning_rates(optimizer)
        )
        self.center = self._worker.center
        """The :class:`hvd_agn.Center`: save, load, snapshot."""
        sums = self._worker.client.accumulators() if settings.gradients else []
        self._sums = [torch.from_numpy(each) for each in sums]

    @property
    def communication_period(self) -> int:
        """Local steps between two exchanges."""
        return self._worker.settings.communication_period

    # ---- what torch, schedulers and scalers see

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The wrapped optimizer's."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The wrapped optimizer's."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The wrapped optimizer's."""
        return self.optimizer.defaults if "optimizer" in self.__dict__ else {}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The wrapped optimizer's."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: the center was laid out for the parameters that there were.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            f"{self.center.label}: parameters cannot be added once the center exists, which all ranks share. Close "
            "this AGNOptimizer, add the group to the optimizer inside it, and wrap that again, on every rank."
        )

    def register_state_dict_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped optimizer's, as the next three are: its ``state_dict`` is the one that is called."""
        return self.optimizer.register_state_dict_pre_hook(*args, **kwargs)

    def register_state_dict_post_hook(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped optimizer's."""
        return self.optimizer.register_state_dict_post_hook(*args, **kwargs)

    def register_load_state_dict_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped optimizer's."""
        return self.optimizer.register_load_state_dict_pre_hook(*args, **kwargs)

    def register_load_state_dict_post_hook(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped optimizer's."""
        return self.optimizer.register_load_state_dict_post_hook(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        raise UsageError(
            f"{self.center.label}: an AGNOptimizer cannot be copied or pickled, the center is shared memory. Use "
            "state_dict(), or copy the optimizer inside it."
        )

    def step(self, closure: Callable[[], float] | None = None) -> Any:  # type: ignore[override]
        """One local step, and at the end of a period an exchange, or with ``overlap`` the start of one.

        Args:
            closure: handed to the wrapped optimizer.

        Returns:
            What the wrapped optimizer returns.

        Raises:
            NonFiniteError: with ``on_nonfinite="raise"``.
            StallError, MPIError, RuleError: of this exchange, or with ``overlap`` of one in the background; steps that
                were not pushed are part of the next exchange.
            LayoutError: a parameter has changed its shape, type or ties, or was added or unfrozen since the start.
            UsageError: after ``close()`` or inside ``center_weights()``.
        """
        if self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks:
            return self._step_with_hooks(closure)
        update = self._step_and_accumulate if self._sums else self.optimizer.step  # here: a call more would show
        return self._worker.step(update if closure is None else functools.partial(update, closure))

    step.hooked = True  # type: ignore[attr-defined]  # not by torch: profiled and hooked is the wrapped optimizer's step

    @torch.optim.Optimizer.profile_hook_step
    def _step_with_hooks(self, closure: Callable[[], float] | None) -> Any:
        update = self._step_and_accumulate if self._sums else self.optimizer.step
        return self._worker.step(update if closure is None else functools.partial(update, closure))

    def _step_and_accumulate(self, closure: Callable[[], float] | None = None) -> Any:
        """With the gradients as they are before the wrapped optimizer works on them, of a closure's last call."""
        if closure is None:
            self._accumulate()
            return self.optimizer.step()
        kept: list[torch.Tensor | None] = []

        def evaluate() -> float:
            loss = closure()
            kept[:] = [None if p.grad is None else p.grad.clone() for p in self._worker.arrays.sources()]
            return loss

        loss = self.optimizer.step(evaluate)
        self._accumulate(kept)
        return loss

    def _accumulate(self, gradients: Sequence[torch.Tensor | None] | None = None) -> None:
        try:
            touched = self._worker.arrays.add_gradients(self._sums, gradients)
        except LayoutError as error:
            raise LayoutError(f"{self.center.label}: {error}") from None
        self._worker.client.touch(touched)

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
            model: holds the wrapped optimizer's parameters.

        Returns:
            Tensors of the parameters' own dtype and device; buffers and other parameters are the model's.
        """
        self._worker.check_open("center_state_dict()")
        center = self.center.snapshot()
        names = self._worker.arrays.names()
        state = model.state_dict()
        for key, parameter in model.named_parameters(remove_duplicate=False):
            if id(parameter) in names and key in state:
                value = torch.from_numpy(center[names[id(parameter)]])
                state[key] = value.to(dtype=parameter.dtype, device=parameter.device)
        return state

    def stats(self) -> Stats:
        """What this worker has exchanged so far, see :class:`hvd_agn.Stats`."""
        self._worker.check_open("stats()")
        return self._worker.client.stats()

    def close(self) -> None:
        """Push what is left and let go of the center; the wrapped optimizer can be used on. Waits for nobody.

        A second call does nothing. At exit it is called for you.
        """
        self._worker.close()
        self._sums = []  # which keep the core's memory

    def __enter__(self) -> "AGNOptimizer":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._worker.close(error)
        self._sums = []

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's, with this worker's counters and anchor under ``"hvd_agn"``. Not collective.

        The center is saved by ``opt.center.save(path)``. With ``overlap`` this ends the exchange under way, which
        changes the parameters: call it, or :meth:`flush`, before the model is copied or the center saved.
        """
        worker = self._worker
        worker.check_open("state_dict()")
        worker.land()
        anchor = {}
        for index, e in enumerate(worker.arrays.exchanged):
            anchor[e.name] = torch.empty(e.shape, dtype=e.dtype)
            worker.client.read_anchor(index, anchor[e.name])
        own = {**worker.counters(), "anchor": anchor, **self._saved_sums()}
        return {**self.optimizer.state_dict(), _STATE_KEY: own}

    def _saved_sums(self) -> dict[str, Any]:
        if not self._sums:
            return {}
        parts = zip(self._worker.arrays.exchanged, self._sums, self._worker.client.touched, strict=True)
        return {"gradients": {e.name: sums.clone() for e, sums, touched in parts if touched}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Restore what :meth:`state_dict` saved. Not collective.

        Load the center first (``opt.center.load``, which pulls), then the model, then this. From another rank, or a run
        with another number of ranks, the counters and the anchor say nothing about this worker: then the wrapped
        optimizer is restored and the center pulled. A state dict of the wrapped optimizer alone is taken too.

        Raises:
            CheckpointError: the anchor is of other parameters; nothing was restored.
        """
        worker = self._worker
        worker.check_open("load_state_dict()")
        worker.land()
        inner = dict(state_dict)
        own = inner.pop(_STATE_KEY, None)
        if own is not None:
            found = {name: (value.shape, value.dtype) for name, value in own["anchor"].items()}
            expected = {e.name: (e.shape, e.dtype) for e in worker.arrays.exchanged}
            for name in expected.keys() | found.keys():
                if found.get(name) != expected.get(name):
                    raise CheckpointError(
                        f"{self.center.label}: parameter {name!r} is {expected.get(name)} here and {found.get(name)} "
                        "in the state dict. Load it into the same model."
                    )
        self.optimizer.load_state_dict(inner)
        if own is None:
            return
        if not worker.owns(own) or ("gradients" in own) != bool(self._sums):
            worker.pull()
            return
        worker.restore(own)
        if self._sums:
            saved = [own["gradients"].get(e.name) for e in worker.arrays.exchanged]
            for sums, value in zip(self._sums, saved, strict=True):
                if value is not None:
                    sums.copy_(value)
            worker.client.touch([value is not None for value in saved])
        for index, e in enumerate(worker.arrays.exchanged):
            worker.client.write_anchor(index, own["anchor"][e.name].detach().cpu().contiguous())


def _learning_rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups if "lr" in group]
