"""The steps of a wrapped optimizer: each is counted once, whoever takes it.

A trainer that holds the wrapped optimizer, SAM's ``second_step()``, an optimizer around another: they call ``step()``
of an optimizer that knows nothing of a center. There a stand-in answers.
"""

import functools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ..errors import LayoutError
from ..worker import Worker
from .parameters import Parameters
from .state import called_by_distributed_checkpoint


class Steps:
    """Counts the steps of an optimizer, and of those inside it, from its making to :meth:`release`."""

    def __init__(self, optimizer: torch.optim.Optimizer, worker: Worker[Parameters]) -> None:
        self.worker = worker
        self.bare: Callable[..., Any] = optimizer.step
        """The optimizer's own ``step``."""
        inside = list(_inside(optimizer))
        self._restore: list[tuple[torch.optim.Optimizer, Any, Any]] = []
        self.stand_in = self._replace(optimizer)
        """What answers in its place."""
        for each in inside:
            self._replace(each)
            worker.take_care()
        self._under_way = False

    def _replace(self, optimizer: torch.optim.Optimizer) -> Any:
        bare = optimizer.step

        # With the marks that torch's learning rate schedulers leave there and look for.
        @functools.wraps(getattr(bare, "__func__", bare))
        def step(_: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
            return self.take(bare, args, kwargs)

        before = optimizer.__dict__.get("step")
        stand_in = types.MethodType(step, optimizer)
        optimizer.step = stand_in  # type: ignore[method-assign]
        self._restore.append((optimizer, before, stand_in))
        return stand_in

    def release(self) -> None:
        """The center has closed: the optimizers have their own ``step`` again, and nobody counts."""
        self.worker.careful = True
        for optimizer, before, stand_in in self._restore:
            if (
                optimizer.__dict__.get("step") is not stand_in
            ):  # wrapped by somebody since: it stays, and passes through
                continue
            if before is None:
                del optimizer.__dict__["step"]
            else:
                optimizer.step = before  # type: ignore[method-assign]
        self._restore = []

    def take(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """A step of the optimizer or of one inside it; counted, unless it is part of one that is under way.

        Raises:
            As ``AGNOptimizer.step``.
        """
        worker = self.worker
        if self._under_way or worker.center.closed or (kwargs and called_by_distributed_checkpoint()):
            return step(*args, **kwargs)
        worker.begin_step()
        self._under_way = True
        try:
            result = self._step_and_accumulate(step, args, kwargs) if worker.arrays.sums else step(*args, **kwargs)
        finally:
            self._under_way = False
        worker.count()
        return result

    def _step_and_accumulate(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """With the gradients as they are before the optimizer works on them, of a closure's last call."""
        closure = kwargs.get("closure", args[0] if args else None)
        if not callable(closure):
            self.accumulate()
            return step(*args, **kwargs)
        kept: list[torch.Tensor | None] = []

        def evaluate() -> Any:
            loss = closure()
            kept[:] = [None if p.grad is None else p.grad.clone() for p in self.worker.arrays.sources()]
            return loss

        if "closure" in kwargs:
            result = step(*args, **{**kwargs, "closure": evaluate})
        else:
            result = step(evaluate, *args[1:], **kwargs)
        self.accumulate(kept)
        return result

    def accumulate(self, gradients: Sequence[torch.Tensor | None] | None = None) -> None:
        """Add the gradients that there are, or those given, to what the next exchange pushes."""
        worker = self.worker
        try:
            touched = worker.arrays.add_gradients(gradients)
        except LayoutError as error:
            raise LayoutError(f"{worker.center.label}: {error}") from None
        worker.client.touch(touched)


def _inside(optimizer: torch.optim.Optimizer) -> Iterator[torch.optim.Optimizer]:
    """Optimizers that another one holds, such as the base of SAM or of Lookahead."""
    seen = {id(optimizer)}
    waiting = list(vars(optimizer).values())
    while waiting:
        value = waiting.pop()
        if isinstance(value, (list, tuple)):
            waiting.extend(value)
        elif isinstance(value, torch.optim.Optimizer) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(vars(value).values())
            yield value
