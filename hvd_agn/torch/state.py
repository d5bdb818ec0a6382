"""What of an AGNOptimizer is in its state dict: plain tensors and numbers, under a key of its own."""

import sys
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

import numpy as np
import torch

from ..checkpoint import Resume, WorkerState
from ..errors import CheckpointError
from ..worker import Worker
from .parameters import Parameters

KEY = "hvd_agn"


def add(state_dict: Mapping[str, Any], worker: Worker[Parameters]) -> dict[str, Any]:
    """A state dict of the wrapped optimizer, with the worker and the center."""
    own = _of(worker)
    if called_by_distributed_checkpoint():  # which drops what is not in a group
        first, *others = state_dict["param_groups"]
        return {**state_dict, "param_groups": [{**first, KEY: own}, *others]}
    return {**state_dict, KEY: own}


def take_out(state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The state dict of the wrapped optimizer alone, and what :func:`add` had added, if it had."""
    inner = dict(state_dict)
    own = inner.pop(KEY, None)
    groups = inner.get("param_groups") or []
    if groups and KEY in groups[0]:
        own = groups[0][KEY]
        inner["param_groups"] = [{k: v for k, v in groups[0].items() if k != KEY}, *groups[1:]]
    return inner, own


def called_by_distributed_checkpoint() -> bool:
    """Whether torch.distributed.checkpoint asks for the state dict, or steps so that there is a state."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.distributed.checkpoint.state_dict":
            return True
        frame = frame.f_back
    return False


def _of(worker: Worker[Parameters]) -> dict[str, Any]:
    state, center = worker.state(), worker.center.resume()
    names = [e.name for e in worker.arrays.exchanged]
    own = {**state.counters, "anchor": dict(zip(names, state.anchor, strict=True))}
    if state.snapshot is not None:
        own["snapshot"] = dict(zip(names, state.snapshot, strict=True))
    if state.sums is not None:
        own["gradients"] = {name: sums for name, sums in zip(names, state.sums, strict=True) if sums is not None}
    own["center"] = {
        **{"identity": center.identity, "version": center.version, "rule": center.rule},
        "values": _named(names, center.center),
        "slots": {slot: _named(names, arrays) for slot, arrays in center.slots.items()},
    }
    return own


def _named(names: Sequence[str], arrays: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}


def read(own: Mapping[str, Any], parameters: Parameters) -> tuple[WorkerState, Resume | None]:
    """The worker and the center that are in a state dict.

    Raises:
        CheckpointError: they are of other parameters.
    """
    try:
        own = parameters.recognized(own)
    except CheckpointError as error:
        raise CheckpointError(f"{error} Load it into the same model.") from None
    expected = [e.name for e in parameters.exchanged]
    counters: dict[str, Any] = {
        key: own[key] for key in ("rank", "size", "steps_since_exchange", "power", "versions") if key in own
    }
    anchor = [own["anchor"][name] for name in expected]
    snapshot = [own["snapshot"][name] for name in expected] if "snapshot" in own else None
    sums = [own["gradients"].get(name) for name in expected] if "gradients" in own else None
    return WorkerState(counters, anchor, snapshot, sums), _center(own.get("center"), expected)


def _center(center: Mapping[str, Any] | None, names: Sequence[str]) -> Resume | None:
    if center is None:
        return None

    def ordered(values: Mapping[str, torch.Tensor]) -> list[np.ndarray]:
        return [values[name].detach().cpu().numpy() for name in names]

    slots = {slot: ordered(values) for slot, values in center["slots"].items()}
    return Resume(ordered(center["values"]), slots, center["version"], center["rule"], center["identity"])
