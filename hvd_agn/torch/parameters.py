"""The parameters of an optimizer as a center sees them: which take part, where they are, and if that has changed."""

import collections
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .. import _core
from ..alike import Facts
from ..client import Client
from ..errors import CheckpointError, LayoutError
from ..names import match, missing
from .facts import checksum, settings
from .names import Named, Names


@dataclass
class Exchanged:
    """A parameter that takes part, and the contiguous CPU tensor that the center knows it by."""

    name: str
    parameter: torch.Tensor
    tensor: torch.Tensor  # the parameter's own storage, or a copy
    copied: bool  # the parameter is not contiguous, or not on the CPU
    address: int
    dtype: torch.dtype
    shape: torch.Size
    group: int  # of the optimizer's param_groups


class Parameters:
    """The parameters of an optimizer, each storage once, as they were when this was made.

    Args:
        optimizer: the wrapped optimizer.
        named_parameters: names for them; else the optimizer's own, else their place in it.

    Raises:
        ConfigError: see :class:`Names`.
        LayoutError: names a parameter that cannot be exchanged.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, named_parameters: Named | None) -> None:
        self._names = Names(optimizer, named_parameters)
        self.exchanged: list[Exchanged] = []
        self.sums: list[torch.Tensor] = []
        """Of their gradients, if these are pushed: on the CPU, of the parameters' shapes, float64 or float32."""
        self._tied: list[tuple[str, torch.Tensor, Exchanged]] = []  # to the storage of an exchanged one
        self._frozen: list[tuple[str, torch.Tensor]] = []
        self._optimizer = optimizer
        self._all = _all(optimizer)
        self.groups = len(optimizer.param_groups)
        storages: dict[tuple[Any, ...], Exchanged] = {}
        groups = [g for g, group in enumerate(optimizer.param_groups) for _ in group["params"]]
        for name, p, group in zip(self._names.all, self._all, groups, strict=True):
            if not p.requires_grad:
                self._frozen.append((name, p))
                continue
            _refuse_unusable(name, p)
            storage = (p.device, p.data_ptr(), p.shape, p.stride())
            if p.numel() > 0 and storage in storages:
                self._tied.append((name, p, storages[storage]))
                continue
            tensor = p.detach() if _direct(p) else _copy(p)
            storages[storage] = Exchanged(name, p, tensor, not _direct(p), tensor.data_ptr(), p.dtype, p.shape, group)
            self.exchanged.append(storages[storage])
        for name, times in collections.Counter(e.name for e in self.exchanged).items():
            if times > 1:
                raise LayoutError(f"two parameters are named {name!r}. Give named_parameters with different names.")
        _refuse_shared(self.exchanged)
        self._copied = any(e.copied for e in self.exchanged)
        self._changed = [e.parameter for e in self.exchanged]  # what an exchange changes
        self._views = _core.Views(self._all)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Name -> contiguous CPU tensor of each parameter that takes part."""
        return {e.name: e.tensor for e in self.exchanged}

    def ids(self) -> set[int]:
        """Identities of the parameters that take part."""
        return {id(e.parameter) for e in self.exchanged}

    @property
    def group_of(self) -> list[int]:
        """Of each parameter that takes part: the number of its group."""
        return [e.group for e in self.exchanged]

    @torch.no_grad()
    def copy(self) -> list[torch.Tensor]:
        """Their values, to be put back."""
        return [e.parameter.detach().clone() for e in self.exchanged]

    @torch.no_grad()
    def put_back(self, copy: Sequence[torch.Tensor]) -> None:
        """Set them to what :meth:`copy` returned."""
        for e, value in zip(self.exchanged, copy, strict=True):
            e.parameter.copy_(value)

    def values(self) -> list[torch.Tensor]:
        """Contiguous CPU tensors with their values, as of the last :meth:`read`."""
        return [e.tensor for e in self.exchanged]

    def assign(self, values: Sequence[np.ndarray]) -> None:
        """Set them to arrays of their shapes."""
        self.put_back([torch.from_numpy(value) for value in values])
        with torch.inference_mode(False), torch.no_grad():
            for e in self.exchanged:
                if e.copied:
                    e.tensor.copy_(e.parameter)

    def anchor(self, client: Client) -> list[torch.Tensor]:
        """A copy of the anchor of each, of its type, on the CPU."""
        return self._copies(client.read_anchor)

    def snapshot(self, client: Client) -> list[torch.Tensor]:
        """A copy of what an exchange in the background has pushed of each, likewise."""
        return self._copies(client.read_snapshot)

    def _copies(self, read: Callable[[int, torch.Tensor], None]) -> list[torch.Tensor]:
        copies = [torch.empty(e.shape, dtype=e.dtype, device="cpu") for e in self.exchanged]
        for index, values in enumerate(copies):
            read(index, values)
        return copies

    @torch.no_grad()
    def merge(self, anchor: Sequence[torch.Tensor], snapshot: Sequence[torch.Tensor]) -> None:
        """Add the difference to each."""
        for e, center, pushed in zip(self.exchanged, anchor, snapshot, strict=True):
            e.parameter.add_((center - pushed).to(e.parameter.device))

    def set_anchor(self, client: Client, anchor: Sequence[torch.Tensor]) -> None:
        """Set the anchor of each."""
        for index, (e, values) in enumerate(zip(self.exchanged, anchor, strict=True)):
            client.write_anchor(index, values.detach().to("cpu", e.dtype).contiguous())

    def accumulated(self, client: Client) -> list[torch.Tensor | None]:
        """A copy of the sum of gradients of each; None where there has been none."""
        return [sums.clone() if touched else None for sums, touched in zip(self.sums, client.touched, strict=True)]

    def set_accumulated(self, client: Client, sums: Sequence[torch.Tensor | None]) -> None:
        """Set them to what :meth:`accumulated` returned."""
        for own, values in zip(self.sums, sums, strict=True):
            if values is not None:
                own.copy_(values)
        client.touch([values is not None for values in sums])

    def parameters(self) -> list[tuple[str, torch.Tensor]]:
        """Those that are the center's, each with the name by which the center has it: also those that are tied."""
        own = [(e.name, e.parameter) for e in self.exchanged]
        return own + [(leader.name, parameter) for _, parameter, leader in self._tied]

    def facts(self, optimizer: torch.optim.Optimizer) -> Facts:
        """What the ranks should have alike besides: hyper-parameters, and what of the model the center has not."""
        frozen = [(f"frozen parameter {name!r}", p) for name, p in self._frozen]
        others = [
            (f"{'parameter' if isinstance(t, torch.nn.Parameter) else 'buffer'} {name!r}, which is not exchanged,", t)
            for name, t in self._names.others
        ]
        sums = {name: text for name, tensor in frozen + others if (text := checksum(tensor))}
        places = [e for e in self.exchanged if e.name in self._names.places]
        times = collections.Counter((e.dtype, e.shape) for e in places)
        twins = [e for e in places if times[e.dtype, e.shape] > 1]
        nameless = {e.name: (f"{e.dtype}{list(e.shape)}", checksum(e.tensor) or "") for e in twins}
        return Facts({**settings(optimizer), **sums}, nameless)

    def recognized(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """A worker's saved state, with what it has by name under the names that mean the same here.

        Raises:
            CheckpointError: its anchor is of other parameters.
        """
        names, there = [e.name for e in self.exchanged], list(saved["anchor"])
        here = {theirs: ours for ours, theirs in match(names, there).items()}

        def rename(part: Mapping[str, Any]) -> dict[str, Any]:
            return {here.get(name, name): value for name, value in part.items()}

        renamed = {key: rename(saved[key]) for key in ("anchor", "snapshot", "gradients") if key in saved}
        found = {name: f"{value.dtype}{list(value.shape)}" for name, value in renamed["anchor"].items()}
        expected = {e.name: f"{e.dtype}{list(e.shape)}" for e in self.exchanged}
        for name in [*expected, *found]:
            if found.get(name) != expected.get(name):
                instead = f": {missing(name, names, there)}" if name not in found else ""
                raise CheckpointError(
                    f"parameter {name!r} is {expected.get(name)} here and {found.get(name)} in the state dict{instead}."
                )
        if "center" in saved:
            center = saved["center"]
            slots = {slot: rename(values) for slot, values in center["slots"].items()}
            renamed["center"] = {**center, "values": rename(center["values"]), "slots": slots}
        return {**saved, **renamed}

    def read(self, client: Client) -> None:
        """Make sure that the client knows each parameter where it is now; fill the copies.

        Raises:
            LayoutError: the parameters are not those of the start any more.
        """
        now = _all(self._optimizer)
        if not self._copied and not self._thawed() and not self._views.changed(now):
            return
        self._check(now)
        with torch.inference_mode(False), torch.no_grad():
            for index, e in enumerate(self.exchanged):
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
                    client.rebind(index, e.tensor)
        self._copied = any(e.copied for e in self.exchanged)
        self._views.remember(now)

    def sources(self) -> list[torch.Tensor]:
        """Parameters that have gradients: the exchanged, and those tied to them."""
        return [*(e.parameter for e in self.exchanged), *(parameter for _, parameter, _ in self._tied)]

    @torch.no_grad()
    def add_gradients(self, gradients: Sequence[torch.Tensor | None] | None = None) -> list[bool]:
        """Add each parameter's gradient, and those of what is tied to it, to its sum; sparse ones sparsely.

        Args:
            gradients: one per entry of :meth:`sources`; None: those that they have now.

        Returns:
            Which parameters have a gradient.

        Raises:
            LayoutError: a gradient has another shape than its parameter had; nothing was added.
        """
        sums = self.sums
        if gradients is None:
            gradients = [parameter.grad for parameter in self.sources()]
        places = {id(e): i for i, e in enumerate(self.exchanged)}
        of = [*range(len(self.exchanged)), *(places[id(leader)] for _, _, leader in self._tied)]
        found = list(zip(of, gradients, strict=True))
        for i, gradient in found:
            if gradient is not None and gradient.shape != sums[i].shape:
                e = self.exchanged[i]
                raise LayoutError(f"the gradient of {e.name!r} is {list(gradient.shape)}, it was {list(e.shape)}.")
        plain: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for i, gradient in found:
            if gradient is None:
                continue
            if gradient.layout == torch.strided and gradient.device.type == "cpu" and gradient.dtype == sums[i].dtype:
                plain[0].append(sums[i])
                plain[1].append(gradient)
            else:
                sums[i].add_(gradient.to("cpu", sums[i].dtype))
        if plain[0]:
            torch._foreach_add_(*plain)
        touched = {i for i, gradient in found if gradient is not None}
        return [i in touched for i in range(len(self.exchanged))]

    @torch.no_grad()
    def write_back(self) -> None:
        """Tell autograd that the parameters changed; empty the copies into those that have one."""
        if self._copied:
            for e in self.exchanged:
                if e.copied:
                    e.parameter.copy_(e.tensor)
        torch.autograd.graph.increment_version(self._changed)

    def _thawed(self) -> bool:
        return any(parameter.requires_grad for _, parameter in self._frozen)

    def _check(self, now: list[torch.Tensor]) -> None:
        """The center was laid out for the parameters as they were at the start."""
        reason = None
        addresses: set[int] = set()
        if len(now) != len(self._all):
            reason = f"the wrapped optimizer has {len(now)} parameters, it had {len(self._all)}"
        elif any(p is not q for p, q in zip(now, self._all, strict=True)):
            reason = "the wrapped optimizer has another parameter in the place of one that it had"
        for e in self.exchanged:
            p = e.parameter
            if p.dtype != e.dtype or p.shape != e.shape:
                reason = f"{e.name!r} is {p.dtype}{list(p.shape)}, it was {e.dtype}{list(e.shape)}"
            elif p.numel() > 0 and p.data_ptr() in addresses:
                reason = f"{e.name!r} shares its storage with another parameter, it did not"
            elif not p.is_contiguous() and _overlaps_itself(p):
                reason = f"{e.name!r} is a view whose elements share memory, it was not"
            addresses.add(p.data_ptr())
        for name, parameter, leader in self._tied:
            if parameter.data_ptr() != leader.parameter.data_ptr():
                reason = f"{name!r} has a storage of its own, it shared that of {leader.name!r}"
        for name, parameter in self._frozen:
            if parameter.requires_grad:
                reason = f"{name!r} has no place in the center: it requires a gradient, it was frozen"
        if reason:
            raise LayoutError(
                f"{reason} at the start. Close this AGNOptimizer and wrap the optimizer again, on every rank."
            )


def _direct(parameter: torch.Tensor) -> bool:
    """Whether the core can work on the parameter's own storage."""
    return parameter.device.type == "cpu" and parameter.is_contiguous()


def _copy(parameter: torch.Tensor) -> torch.Tensor:
    """A contiguous copy on the CPU."""
    return parameter.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _all(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


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


def _refuse_shared(exchanged: list[Exchanged]) -> None:
    """Raise LayoutError if an element of one parameter is an element of another."""
    by_storage: dict[int, list[Exchanged]] = {}
    for e in exchanged:
        if e.parameter.numel() > 0:
            by_storage.setdefault(e.parameter.untyped_storage().data_ptr(), []).append(e)
    for group in by_storage.values():
        if len(group) == 1:
            continue
        unit = min(e.parameter.element_size() for e in group)
        elements = group[0].parameter.untyped_storage().nbytes() // unit
        owner = torch.zeros(elements, dtype=torch.int32, device="cpu")
        for number, e in enumerate(group, start=1):
            p, units = e.parameter, e.parameter.element_size() // unit
            strides = [stride * units for stride in p.stride()]
            place = owner.as_strided([*p.shape, units], [*strides, 1], p.storage_offset() * units)
            if other := int(place.max()):
                names = f"{group[other - 1].name!r} and {e.name!r}"
                raise LayoutError(f"{names} share memory in part. Give each its own storage.")
            place.fill_(number)
