"""AGN for PyTorch: a wrapper around any ``torch.optim.Optimizer``.

This file knows torch and nothing of MPI; the exchange itself is ``hvd_agn.Center``.
"""

import collections
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from . import config, rules
from .center import Center
from .client import Stats
from .errors import CheckpointError, ConfigError, LayoutError, NonFiniteWarning, StalenessWarning, UsageError

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["AGNOptimizer"]

_STATE_KEY = "hvd_agn"


@dataclass
class _Exchanged:
    """A parameter that takes part, and the contiguous CPU tensor that the center knows it by."""

    name: str
    parameter: torch.Tensor
    tensor: torch.Tensor  # the parameter's own storage, or a copy
    copied: bool  # the parameter is not contiguous, or not on the CPU
    address: int
    dtype: torch.dtype
    shape: torch.Size


@dataclass
class _Parameters:
    """The wrapped optimizer's parameters, by what becomes of them."""

    exchanged: list[_Exchanged] = field(default_factory=list)
    tied: list[tuple[str, torch.Tensor, _Exchanged]] = field(default_factory=list)  # to the storage of an exchanged one
    frozen: list[tuple[str, torch.Tensor]] = field(default_factory=list)


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
        named_parameters: ``model.named_parameters()``: names for messages and files. Without it the names are those of
            the optimizer, or ``param_groups[0].params[0]`` ...
        comm: mpi4py communicator, duplicated here; None is ``MPI.COMM_WORLD``.
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
        named_parameters: Iterable[tuple[str, torch.Tensor]] | None = None,
        comm: "MPI.Comm | None" = None,
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

        self._steps_since_exchange = 0
        self._steps = 0
        self._viewing_center = False
        self._layout_changed = False
        self._parameters = _Parameters()
        failed: LayoutError | None = None
        try:
            self._parameters = _select(optimizer, named_parameters)
        except LayoutError as error:  # the center tells the other ranks
            failed = error
        self._exchanged = self._parameters.exchanged
        self._all_parameters = _all(optimizer)
        self.center = Center(
            {e.name: e.tensor for e in self._exchanged},
            rule,
            comm,
            on_nonfinite=on_nonfinite,
            name=name,
            failed=failed,
        )
        """The :class:`hvd_agn.Center`: save, load, snapshot."""
        self._client = self.center.arrays_client
        self._write_back()
        self.center.own(self)
        self._warn_if_stale()

    def _warn_if_stale(self) -> None:
        factor = self.center.rule.factor
        ratio = factor * self.center.size / self.communication_period
        if ratio > config.STALENESS_LIMIT and self.center.rank == 0:
            period = math.ceil(factor * self.center.size / config.STALENESS_LIMIT)
            warnings.warn(
                f"{self.center.label}: {self.center.size} workers, a communication period of "
                f"{self.communication_period} and {self.center.rule} move the center by {ratio:.1f} mean updates per "
                f"step; published runs of AGN diverge above about 2.5. Use communication_period={period} or more, or "
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
        """One local step, and at the end of a period an exchange.

        Args:
            closure: handed to the wrapped optimizer.

        Returns:
            What the wrapped optimizer returns.

        Raises:
            NonFiniteError: with ``on_nonfinite="raise"``.
            LayoutError: a parameter has changed its shape, type or ties, or was added or unfrozen since the start.
            UsageError: after ``close()`` or inside ``center_weights()``.
        """
        self.check_open("step()")
        loss = self.optimizer.step(closure) if closure is not None else self.optimizer.step()
        self._steps += 1
        self._steps_since_exchange += 1
        if self._steps_since_exchange >= self.communication_period:
            self._exchange()
        return loss

    # ---- exchange

    def flush(self) -> None:
        """Push the steps taken since the last exchange, if any, and pull. Waits for nobody."""
        self.check_open("flush()")
        if self._steps_since_exchange > 0:
            self._exchange()

    def pull(self) -> None:
        """Set the parameters to the center. Steps not yet pushed are dropped; ``flush()`` keeps them."""
        self.check_open("pull()")
        self._read()
        self._client.pull()
        self._write_back()
        self._steps_since_exchange = 0

    @contextmanager
    def center_weights(self) -> Iterator[None]:
        """Within the context the parameters are the center's, for evaluation; then they are the local ones again.

        Takes a copy of the parameters for as long. Buffers, such as those of batch norm, stay local.
        """
        self.check_open("center_weights()")
        with torch.no_grad():
            local = [e.parameter.detach().clone() for e in self._exchanged]
        self._read()
        self._client.peek()
        self._write_back()
        self._viewing_center = True
        try:
            yield
        finally:
            self._viewing_center = False
            with torch.no_grad():
                for e, value in zip(self._exchanged, local, strict=True):
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
        names = {id(e.parameter): e.name for e in self._exchanged}
        names |= {id(parameter): leader.name for _, parameter, leader in self._parameters.tied}
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
            self._steps_since_exchange = 0
        self.center.close()

    def check_open(self, call: str) -> None:
        """Raise UsageError after ``close()`` or inside ``center_weights()``; ``call`` is named in the message."""
        if self._viewing_center:
            raise UsageError(f"{self.center.label}: {call} inside center_weights(). Leave that context first.")
        self.center.check_open()

    def _exchange(self) -> None:
        self._read()
        try:
            self._client.exchange(self._steps_since_exchange)
        except NonFiniteWarning:  # made an error by a filter: the parameters are the center's all the same
            self._steps_since_exchange = 0
            raise
        finally:
            self._write_back()
        self._steps_since_exchange = 0

    def _read(self) -> None:
        """Make sure that the center knows each parameter where it is now; fill the copies."""
        self._layout_changed = True
        self._check_parameters()
        with torch.inference_mode(False), torch.no_grad():
            for index, e in enumerate(self._exchanged):
                p = e.parameter
                if _direct(p):
                    moved = e.copied or p.data_ptr() != e.address
                    e.tensor, e.copied = (p.detach() if moved else e.tensor), False
                elif e.copied:
                    moved = False
                    e.tensor.copy_(p)
                else:
                    moved = True
                    e.tensor, e.copied = _copy(p), True
                if moved:
                    e.address = e.tensor.data_ptr()
                    self._client.rebind(index, e.tensor)
        self._layout_changed = False

    @torch.no_grad()
    def _write_back(self) -> None:
        """Tell autograd that the parameters changed; empty the copies into those that have one."""
        for e in self._exchanged:
            if e.copied:
                e.parameter.copy_(e.tensor)
        torch.autograd.graph.increment_version([e.parameter for e in self._exchanged])

    def _check_parameters(self) -> None:
        """The center was laid out for the parameters as they were at the start."""
        reason = None
        addresses: set[int] = set()
        now = _all(self.optimizer)
        if len(now) != len(self._all_parameters):
            reason = f"the wrapped optimizer has {len(now)} parameters, it had {len(self._all_parameters)}"
        elif any(p is not q for p, q in zip(now, self._all_parameters, strict=True)):
            reason = "the wrapped optimizer has another parameter in the place of one that it had"
        for e in self._exchanged:
            p = e.parameter
            if p.dtype != e.dtype or p.shape != e.shape:
                reason = f"{e.name!r} is {p.dtype}{list(p.shape)}, it was {e.dtype}{list(e.shape)}"
            elif p.numel() > 0 and p.data_ptr() in addresses:
                reason = f"{e.name!r} shares its storage with another parameter, it did not"
            elif not p.is_contiguous() and _overlaps_itself(p):
                reason = f"{e.name!r} is a view whose elements share memory, it was not"
            addresses.add(p.data_ptr())
        for name, parameter, leader in self._parameters.tied:
            if parameter.data_ptr() != leader.parameter.data_ptr():
                reason = f"{name!r} has a storage of its own, it shared that of {leader.name!r}"
        for name, parameter in self._parameters.frozen:
            if parameter.requires_grad:
                reason = f"{name!r} has no place in the center: it requires a gradient, it was frozen"
        if reason:
            raise LayoutError(
                f"{self.center.label}: {reason} at the start. Close this AGNOptimizer and wrap the optimizer again, "
                "on every rank."
            )

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's, with this worker's counters and anchor under ``"hvd_agn"``. Not collective.

        The center is saved by ``opt.center.save(path)``.
        """
        self.check_open("state_dict()")
        anchor = {}
        for index, e in enumerate(self._exchanged):
            anchor[e.name] = torch.empty(e.shape, dtype=e.dtype)
            self._client.read_anchor(index, anchor[e.name])
        return {
            **self.optimizer.state_dict(),
            _STATE_KEY: {
                "rank": self.center.rank,
                "size": self.center.size,
                "steps": self._steps,
                "steps_since_exchange": self._steps_since_exchange,
                "anchor": anchor,
            },
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Restore what :meth:`state_dict` saved. Not collective.

        Load the center first (``opt.center.load``, which pulls), then the model, then this. From another rank, or a run
        with another number of ranks, the counters and the anchor say nothing about this worker: then the wrapped
        optimizer is restored and the center pulled. A state dict of the wrapped optimizer alone is taken too.

        Raises:
            CheckpointError: the anchor is of other parameters; nothing was restored.
        """
        self.check_open("load_state_dict()")
        inner = dict(state_dict)
        own = inner.pop(_STATE_KEY, None)
        mine = own is not None and (own["rank"], own["size"]) == (self.center.rank, self.center.size)
        if own is not None:
            found = {name: (value.shape, value.dtype) for name, value in own["anchor"].items()}
            expected = {e.name: (e.shape, e.dtype) for e in self._exchanged}
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
        for index, e in enumerate(self._exchanged):
            self._client.write_anchor(index, own["anchor"][e.name].detach().cpu().contiguous())


def _direct(parameter: torch.Tensor) -> bool:
    """Whether the core can work on the parameter's own storage."""
    return parameter.device.type == "cpu" and parameter.is_contiguous()


def _copy(parameter: torch.Tensor) -> torch.Tensor:
    """A contiguous copy on the CPU."""
    return parameter.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _all(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _select(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, torch.Tensor]] | None
) -> _Parameters:
    """Which parameters are exchanged, each storage once.

    Raises:
        LayoutError: names a parameter that cannot be.
    """
    given = {id(parameter): name for name, parameter in named_parameters or ()}
    found = _Parameters()
    storages: dict[tuple[Any, ...], _Exchanged] = {}
    for g, group in enumerate(optimizer.param_groups):
        own_names = group.get("param_names")
        for i, p in enumerate(group["params"]):
            name = own_names[i] if own_names else f"param_groups[{g}].params[{i}]"
            name = given.get(id(p), name)
            if not p.requires_grad:
                found.frozen.append((name, p))
                continue
            _refuse_unusable(name, p)
            storage = (p.device, p.data_ptr(), p.shape, p.stride())
            if p.numel() > 0 and storage in storages:
                found.tied.append((name, p, storages[storage]))
                continue
            tensor = p.detach() if _direct(p) else _copy(p)
            storages[storage] = _Exchanged(name, p, tensor, not _direct(p), tensor.data_ptr(), p.dtype, p.shape)
            found.exchanged.append(storages[storage])
    name, times = collections.Counter(e.name for e in found.exchanged).most_common(1)[0] if storages else ("", 0)
    if times > 1:
        raise LayoutError(f"two parameters are named {name!r}. Give named_parameters with different names.")
    _refuse_shared(found.exchanged)
    return found


def _refuse_unusable(name: str, p: torch.Tensor) -> None:
    reason = None
    if isinstance(p, torch.nn.parameter.UninitializedParameter):
        reason = "has no shape yet; run one forward pass before wrapping the optimizer"
    elif p.layout != torch.strided:
        reason = f"has layout {p.layout}; use a dense parameter"
    elif p.is_meta:
        reason = "is on the meta device; materialise the model before wrapping the optimizer"
    elif p.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        reason = f"is {p.dtype}; use float32, float64, float16 or bfloat16"
    elif _overlaps_itself(p):
        reason = "is a view whose elements share memory; use p.contiguous()"
    if reason:
        raise LayoutError(f"{name!r} cannot be exchanged: it {reason}.")


def _overlaps_itself(p: torch.Tensor) -> bool:
    """Whether two elements have one address, as after expand(). True also of some exotic views that have none."""
    reach = 0  # of the dimensions with smaller strides
    for stride, size in sorted((stride, size) for size, stride in zip(p.shape, p.stride(), strict=True) if size > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _refuse_shared(exchanged: list[_Exchanged]) -> None:
    """Raise LayoutError if an element of one parameter is an element of another."""
    by_storage: dict[int, list[_Exchanged]] = {}
    for e in exchanged:
        if e.parameter.numel() > 0:
            by_storage.setdefault(e.parameter.untyped_storage().data_ptr(), []).append(e)
    for group in by_storage.values():
        if len(group) == 1:
            continue
        unit = min(e.parameter.element_size() for e in group)
        owner = torch.zeros(group[0].parameter.untyped_storage().nbytes() // unit, dtype=torch.int32)
        for number, e in enumerate(group, start=1):
            p, units = e.parameter, e.parameter.element_size() // unit
            strides = [stride * units for stride in p.stride()]
            place = owner.as_strided([*p.shape, units], [*strides, 1], p.storage_offset() * units)
            if other := int(place.max()):
                names = f"{group[other - 1].name!r} and {e.name!r}"
                raise LayoutError(f"{names} share memory in part. Give each its own storage.")
            place.fill_(number)
