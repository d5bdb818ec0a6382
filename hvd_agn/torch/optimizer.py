"""AGN for PyTorch: a wrapper around any ``torch.optim.Optimizer``.

This file knows torch and nothing of MPI; the exchange itself is ``hvd_agn.Center``.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from .. import config, rules
from ..center import Center
from ..client import Stats
from ..errors import (
    AGNError,
    CheckpointError,
    ConfigError,
    LayoutError,
    NonFiniteWarning,
    RuleOverflowWarning,
    StalenessWarning,
    UsageError,
)
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
        accumulate: ``"updates"``, or ``"gradients"``: push the mean of the gradients instead, as
            ``tf.contrib.opt.AGNOptimizer`` did. Then ``rule`` is by default the optimizer's own kind,
            :func:`hvd_agn.rules.like`, with the learning rate that the optimizer has at the push. A parameter that has
            had no gradient in a period is neither pushed nor pulled. Costs one more copy of the parameters, in float32
            for half types, and with ``overlap`` two.
        overlap: exchange in the background while training goes on. At the end of a period a snapshot of the parameters
            is taken and pushed; when the center's answer has come, the next ``step()`` adds to the parameters what the
            center had that the snapshot had not. A boundary waits only if the exchange before it has not ended. Costs
            one more copy of the parameters.
        named_parameters: ``model.named_parameters()``: names for messages and files. Without it the names are those of
            the optimizer, or ``param_groups[0].params[0]`` ...
        comm: mpi4py communicator, duplicated here; None is ``MPI.COMM_WORLD``.
        center_ranks, transport, wire_dtype: where the center is, and how it is reached from other nodes; see
            :class:`hvd_agn.Center`.
        on_nonfinite: what to do with an update that has a NaN or an Inf. ``"skip"``: refuse it, warn, set the
            parameters to the center; ``"raise"``: refuse it and raise, leaving the parameters as they are.
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
        name: str = "AGNOptimizer",
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer is a {type(optimizer).__name__}: give a torch.optim.Optimizer.")
        if isinstance(optimizer, AGNOptimizer):
            raise TypeError("optimizer is an AGNOptimizer already: wrap the optimizer inside it.")
        if isinstance(communication_period, bool) or not isinstance(communication_period, int):
            raise ConfigError(f"communication_period={communication_period!r}: give a whole number of steps.")
        if communication_period < 1:
            raise ConfigError(f"communication_period={communication_period}: give 1 or more.")
        # What unpickling an optimizer does: it sets up hooks and profiling without touching groups or state, which are
        # the wrapped optimizer's. Optimizer.__init__ would make its own.
        super().__setstate__({})
        self.optimizer = optimizer
        """The wrapped optimizer."""
        self.communication_period = communication_period

        self._overlap = overlap
        self._normalize = normalize
        self._gradients = accumulate == "gradients"
        self._steps_since_exchange = 0
        self._steps_under_way = 0
        """Of the exchange in the background."""
        self._steps = 0
        self._viewing_center = False
        self._layout_changed = False
        tensors: dict[str, torch.Tensor] = {}
        failed: AGNError | None = None
        try:
            if rule is None and self._gradients:
                rule = rules.SGD(0.0)  # stands in, should the next line fail
                rule = rules.like(optimizer, lr=rules.FOLLOW)
            if isinstance(rule, rules.Rule) and rule.follows:
                _learning_rate(optimizer)
            if not normalize and getattr(rule, "bias_correction", None) == "tf_contrib":
                raise ConfigError("bias_correction='tf_contrib' counts the steps of a mean: leave normalize=False out.")
            self._parameters = Parameters(optimizer, named_parameters)
            tensors = {e.name: e.tensor for e in self._parameters.exchanged}
        except (ConfigError, LayoutError) as error:  # the center tells the other ranks
            failed = error
        self.center = Center(
            tensors,
            rule,
            comm,
            center_ranks=center_ranks,
            transport=transport,
            wire_dtype=wire_dtype,
            overlap=overlap,
            accumulate=accumulate,
            on_nonfinite=on_nonfinite,
            name=name,
            failed=failed,
        )
        """The :class:`hvd_agn.Center`: save, load, snapshot."""
        self._client = self.center.arrays_client
        self._sums = [torch.from_numpy(sums) for sums in self._client.accumulators()] if self._gradients else []
        self._parameters.write_back()
        self.center.own(self)
        self._warn_if_stale()

    def _warn_if_stale(self) -> None:
        factor = self.center.rule.factor
        if factor is None or self._gradients or self.center.rule.staleness != rules.STALENESS[0]:
            return
        moves = factor * self.center.size  # mean updates that the center moves by in a period
        if not self._normalize:
            moves *= self.communication_period
        ratio = moves / self.communication_period
        if ratio > config.STALENESS_LIMIT and self.center.rank == 0:
            period = math.ceil(moves / config.STALENESS_LIMIT)
            longer = f"communication_period={period} or more, or "
            if not self._normalize:
                helps = moves / self.communication_period**2 <= config.STALENESS_LIMIT
                longer = "normalize=True, or " if helps else ""
            warnings.warn(
                f"{self.center.label}: {self.center.size} workers, a communication period of "
                f"{self.communication_period} and {self.center.rule} move the center by {ratio:.1f} mean updates per "
                f"step; published runs of AGN diverge above about 2.5. Use {longer}"
                f"a rule with {factor * config.STALENESS_LIMIT / ratio:.2g} for {factor:g}.",
                StalenessWarning,
                stacklevel=3,
            )

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
        self.check_open("step()")
        if self._client.ready:
            self._land()
        if self._gradients:
            loss = self._step_and_accumulate(closure)
        else:
            loss = self.optimizer.step(closure) if closure is not None else self.optimizer.step()
        self._steps += 1
        self._steps_since_exchange += 1
        if self._steps_since_exchange >= self.communication_period:
            self._exchange()
        return loss

    # ---- exchange

    def _step_and_accumulate(self, closure: Callable[[], float] | None) -> Any:
        """With the gradients as they are before the wrapped optimizer works on them, of a closure's last call."""
        if closure is None:
            self._accumulate()
            return self.optimizer.step()
        kept: list[torch.Tensor | None] = []

        def evaluate() -> float:
            loss = closure()
            kept[:] = [None if p.grad is None else p.grad.clone() for p in self._parameters.sources()]
            return loss

        loss = self.optimizer.step(evaluate)
        self._accumulate(kept)
        return loss

    def _accumulate(self, gradients: Sequence[torch.Tensor | None] | None = None) -> None:
        try:
            touched = self._parameters.add_gradients(self._sums, gradients)
        except LayoutError as error:
            raise LayoutError(f"{self.center.label}: {error}") from None
        self._client.touch(touched)

    def flush(self) -> None:
        """Push the steps taken since the last exchange, if any, and pull. Waits for no other worker.

        With ``rules.Elastic`` an exchange, after which the parameters are not the center's: ``pull()`` makes them so.

        What ``wire_dtype`` has rounded away so far is pushed too.
        """
        self.check_open("flush()")
        self._land()
        if self._steps_since_exchange > 0 or self._client.owes:
            self._exchange_now(exact=True)

    def before_load(self) -> None:
        """For ``Center.load``: end the exchange under way; UsageError inside ``center_weights()``."""
        self.check_open("Center.load()")
        self._land()

    def pull(self) -> None:
        """Set the parameters to the center. Steps not yet pushed are dropped; ``flush()`` keeps them."""
        self.check_open("pull()")
        self._land()
        self._read()
        try:
            self._client.pull()
        finally:  # also when it was cut short: what was pulled has its anchor
            self._parameters.write_back()
        self._steps_since_exchange = 0

    @contextmanager
    def center_weights(self) -> Iterator[None]:
        """Within the context the parameters are the center's, for evaluation; then they are the local ones again.

        Takes a copy of the parameters for as long. Buffers, such as those of batch norm, stay local.
        """
        self.check_open("center_weights()")
        self._land()
        with torch.no_grad():
            local = [e.parameter.detach().clone() for e in self._parameters.exchanged]
        self._read()
        try:
            self._client.peek()
            self._parameters.write_back()
            self._viewing_center = True
            yield
        finally:
            self._viewing_center = False
            with torch.no_grad():
                for e, value in zip(self._parameters.exchanged, local, strict=True):
                    e.parameter.copy_(value)

    def center_state_dict(self, model: torch.nn.Module) -> dict[str, Any]:
        """``model.state_dict()`` with the center's values for the parameters that are exchanged, to save or to load.

        Args:
            model: holds the wrapped optimizer's parameters.

        Returns:
            Tensors of the parameters' own dtype and device; buffers and other parameters are the model's.
        """
        self.check_open("center_state_dict()")
        center = self.center.snapshot()
        names = self._parameters.names()
        state = model.state_dict()
        for key, parameter in model.named_parameters(remove_duplicate=False):
            if id(parameter) in names and key in state:
                value = torch.from_numpy(center[names[id(parameter)]])
                state[key] = value.to(dtype=parameter.dtype, device=parameter.device)
        return state

    def stats(self) -> Stats:
        """What this worker has exchanged so far, see :class:`hvd_agn.Stats`."""
        self.check_open("stats()")
        return self._client.stats()

    def close(self) -> None:
        """Push what is left and let go of the center; the wrapped optimizer can be used on. Waits for nobody.

        A second call does nothing. At exit it is called for you.
        """
        if self._viewing_center:
            self.check_open("close()")
        if self._layout_changed:  # step() has said that they cannot be pushed
            self.center.own(None)
        self.center.close()
        self._sums = []  # which keep the core's memory

    def __enter__(self) -> "AGNOptimizer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check_open(self, call: str) -> None:
        """Raise UsageError after ``close()`` or inside ``center_weights()``; ``call`` is named in the message."""
        if self._viewing_center:
            raise UsageError(f"{self.center.label}: {call} inside center_weights(). Leave that context first.")
        self.center.check_open()

    def _read(self) -> None:
        self._layout_changed = True
        try:
            self._parameters.read(self._client)
        except LayoutError as error:
            raise LayoutError(f"{self.center.label}: {error}") from None
        self._layout_changed = False

    def _exchange(self) -> None:
        if not self._overlap:
            self._exchange_now(exact=False)
            return
        self._land()
        if self._steps_since_exchange == 0:  # the one before was refused, and the steps since with it
            return
        self._read()
        self._client.start(self._divisor(), lr=self._rate())
        self._steps_under_way, self._steps_since_exchange = self._steps_since_exchange, 0

    def _exchange_now(self, *, exact: bool) -> None:
        self._read()
        try:
            self._client.exchange(self._divisor(), exact=exact, lr=self._rate())
        except NonFiniteWarning:  # made an error by a filter: the parameters are the center's all the same
            self._steps_since_exchange = 0
            raise
        finally:
            self._parameters.write_back()
        self._steps_since_exchange = 0

    def _divisor(self) -> int:
        return max(self._steps_since_exchange, 1) if self._normalize else 1

    def _rate(self) -> float | None:
        """For a rule that follows it."""
        if not self.center.rule.follows:
            return None
        try:
            return _learning_rate(self.optimizer)
        except ConfigError as error:
            raise ConfigError(f"{self.center.label}: {error}") from None

    def _land(self) -> None:
        """End the exchange in the background, if there is one: wait for it, and merge what it brought."""
        if not self._client.started:
            return
        self._read()
        try:
            accepted = self._client.finish()
        except NonFiniteWarning as warning:  # as above
            if not isinstance(warning, RuleOverflowWarning):  # of an exchange that was accepted
                self._steps_since_exchange = 0
            raise
        except AGNError:  # what was not pushed is still in the parameters
            self._steps_since_exchange += self._steps_under_way
            raise
        finally:
            self._parameters.write_back()
        if not accepted:
            self._steps_since_exchange = 0

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's, with this worker's counters and anchor under ``"hvd_agn"``. Not collective.

        The center is saved by ``opt.center.save(path)``. With ``overlap`` this ends the exchange under way, which
        changes the parameters: call it, or :meth:`flush`, before the model is copied or the center saved.
        """
        self.check_open("state_dict()")
        self._land()
        anchor = {}
        for index, e in enumerate(self._parameters.exchanged):
            anchor[e.name] = torch.empty(e.shape, dtype=e.dtype)
            self._client.read_anchor(index, anchor[e.name])
        return {
            **self.optimizer.state_dict(),
            _STATE_KEY: {
                "rank": self.center.rank,
                "size": self.center.size,
                "steps": self._steps,
                "steps_since_exchange": self._steps_since_exchange,
                "power": self._client.power,
                "anchor": anchor,
                **self._saved_sums(),
            },
        }

    def _saved_sums(self) -> dict[str, Any]:
        if not self._gradients:
            return {}
        parts = zip(self._parameters.exchanged, self._sums, self._client.touched, strict=True)
        return {"gradients": {e.name: sums.clone() for e, sums, touched in parts if touched}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Restore what :meth:`state_dict` saved. Not collective.

        Load the center first (``opt.center.load``, which pulls), then the model, then this. From another rank, or a run
        with another number of ranks, the counters and the anchor say nothing about this worker: then the wrapped
        optimizer is restored and the center pulled. A state dict of the wrapped optimizer alone is taken too.

        Raises:
            CheckpointError: the anchor is of other parameters; nothing was restored.
        """
        self.check_open("load_state_dict()")
        self._land()
        inner = dict(state_dict)
        own = inner.pop(_STATE_KEY, None)
        mine = own is not None and (own["rank"], own["size"]) == (self.center.rank, self.center.size)
        mine = mine and ("gradients" in own) == self._gradients
        if own is not None:
            found = {name: (value.shape, value.dtype) for name, value in own["anchor"].items()}
            expected = {e.name: (e.shape, e.dtype) for e in self._parameters.exchanged}
            for name in expected.keys() | found.keys():
                if found.get(name) != expected.get(name):
                    raise CheckpointError(
                        f"{self.center.label}: parameter {name!r} is {expected.get(name)} here and {found.get(name)} "
                        "in the state dict. Load it into the same model."
                    )
        self.optimizer.load_state_dict(inner)
        if own is None:
            return
        self._steps = own["steps"]
        if not mine:
            self.pull()
            return
        self._steps_since_exchange = own["steps_since_exchange"]
        self._client.power = own.get("power", 0.0)
        self._client.forget()
        if self._gradients:
            saved = [own.get("gradients", {}).get(e.name) for e in self._parameters.exchanged]
            for sums, value in zip(self._sums, saved, strict=True):
                if value is not None:
                    sums.copy_(value)
            self._client.touch([value is not None for value in saved])
        for index, e in enumerate(self._parameters.exchanged):
            self._client.write_anchor(index, own["anchor"][e.name].detach().cpu().contiguous())


def _learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """The one of all parameter groups, for a rule that follows it."""
    rates = {float(group["lr"]) for group in optimizer.param_groups if "lr" in group}
    if len(rates) != 1:
        found = f"the parameter groups have {sorted(rates)}" if rates else "this optimizer has none"
        raise ConfigError(
            f"the rule follows one learning rate, {found}. Give the rule a number, or wrap one optimizer per group."
        )
    return rates.pop()
