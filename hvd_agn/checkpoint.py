"""The center's file: safetensors. Parameters have their own names, slots ``slot/<slot>/<name>``.

And what other files hold of a center and of a worker (:class:`Resume`, :class:`WorkerState`).
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from .errors import CheckpointError
from .names import match, missing

_FORMAT = "hvd_agn center 1"

Named = Mapping[str, np.ndarray]
Like = Mapping[str, tuple[tuple[int, ...], str]]
"""Shape and dtype that each parameter must have."""


class Resume(NamedTuple):
    """A center as it was, for one to begin with. Arrays come in their order, whatever they were called."""

    center: Sequence[np.ndarray]
    slots: Mapping[str, Sequence[np.ndarray]]
    version: int
    rule: str
    """In words."""
    identity: int
    """Of the center: made at random when it began, and the same in all that was saved of it."""

    def planes(self, like: Like, slots: Sequence[str]) -> list[list[np.ndarray]]:
        """As those of :func:`read`."""
        names = list(like)
        tensors = dict(_numbered(names, self.center))
        for slot, arrays in self.slots.items():
            tensors |= {f"slot/{slot}/{name}": array for name, array in _numbered(names, arrays)}
        return _planes(tensors, like, slots, self.rule)


class WorkerState(NamedTuple):
    """A worker as it was. Arrays come in their order."""

    counters: Mapping[str, Any]
    """``rank``, ``size``, ``steps_since_exchange``, ``power``; ``versions`` of the center's blocks as it knew them."""
    anchor: Sequence[Any]
    """What its next push is counted from."""
    snapshot: Sequence[Any] | None
    """If an exchange in the background has brought the anchor, and is still to be merged: what it had pushed."""
    sums: Sequence[Any] | None
    """Of gradients, None where there has been none; None in all if it does not push them."""


def _numbered(names: Sequence[str], arrays: Sequence[np.ndarray]) -> list[tuple[str, np.ndarray]]:
    return [(names[i] if i < len(names) else f"array {i}", array) for i, array in enumerate(arrays)]


def write(path: Path, center: Named, slots: Mapping[str, Named], version: int, rule: str, identity: int) -> None:
    """Write the file; it appears whole or not at all.

    Args:
        center: parameters by name.
        slots: the rule's arrays, by slot and name.
        version: of the center.
        rule: in words, for whoever reads the file.
        identity: of the center, as in :class:`Resume`.

    Raises:
        OSError: the file cannot be written; an older one is as it was.
    """
    tensors = dict(center)
    for slot, arrays in slots.items():
        tensors |= {f"slot/{slot}/{name}": array for name, array in arrays.items()}
    metadata = {"format": _FORMAT, "rule": rule, "version": str(version), "identity": str(identity)}
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        safetensors.numpy.save_file(tensors, partial, metadata)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read(path: Path, like: Like, slots: Sequence[str]) -> tuple[list[list[np.ndarray]], int, int | None]:
    """The arrays of a file, in the order of ``like``: the center's, then those of each slot; version; identity, if any.

    Args:
        like: what must be there.
        slots: names of the slots that must be there.

    Raises:
        CheckpointError: the file is missing or damaged, or what is in it does not fit.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, safetensors.SafetensorError) as failure:
        raise CheckpointError(f"it cannot be read ({failure}). Give a file that save() wrote.") from None
    if metadata.get("format") != _FORMAT or not metadata.get("version", "").isdigit():
        raise CheckpointError("it was not written by Center.save().")
    identity = metadata.get("identity")
    planes = _planes(tensors, like, slots, metadata.get("rule"))
    return planes, int(metadata["version"]), None if identity is None else int(identity)


def _planes(
    tensors: dict[str, np.ndarray], like: Like, slots: Sequence[str], rule: str | None
) -> list[list[np.ndarray]]:
    planes = []
    there = [key for key in tensors if not key.startswith("slot/")]
    names = match(list(like), there)
    for prefix in ["", *(f"slot/{slot}/" for slot in slots)]:
        plane = []
        for name, (shape, dtype) in like.items():
            found = tensors.pop(prefix + names.get(name, name), None)
            if found is None or found.shape != shape or str(found.dtype) != dtype:
                what = f"{prefix + name!r} is {found.dtype}{list(found.shape)}" if found is not None else ""
                what = what or (f"{prefix + name!r} is missing" if prefix else missing(name, list(like), there))
                raise CheckpointError(f"{what}; expected {dtype}{list(shape)}. The file has rule {rule}.")
            if not np.isfinite(found).all():
                raise CheckpointError(f"{prefix + name!r} has a NaN or an Inf.")
            plane.append(np.ascontiguousarray(found).reshape(shape))
        planes.append(plane)
    if tensors:
        raise CheckpointError(f"it also has {sorted(tensors)[0]!r}, which this center has not.")
    return planes
