"""A model's state dict with the center's values in it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..center import Center
from ..errors import ConfigError
from ..names import plain

_GIVE = (
    "Give the model whose parameters the optimizer has; load what this returns into a copy, or into the module of an "
    "AveragedModel."
)


def fill(model: torch.nn.Module, parameters: Sequence[tuple[str, torch.Tensor]], center: Center) -> dict[str, Any]:
    """``model.state_dict()`` with the center's values wherever it holds memory of a parameter that is exchanged.

    By that memory, for wrappers give parameters other names than the state dict has. Where a hook has put a copy of a
    parameter into the state dict, by its name and values.

    Args:
        model: or a part of it.
        parameters: the name by which the center has it, and the parameter; several of one name if they are tied.
        center: has the values.

    Raises:
        ConfigError: the model holds none of the parameters, or others instead of some, or its state dict has no place
            for one.
    """
    try:
        return _filled(model, parameters, center.snapshot())
    except ConfigError as error:
        raise ConfigError(f"{center.label}: center_state_dict(): {error}") from None


def _filled(
    model: torch.nn.Module, parameters: Sequence[tuple[str, torch.Tensor]], center: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    names = {_memory(p): name for name, p in parameters if p.numel() > 0}
    own = {key: p for key, p in model.named_parameters(remove_duplicate=False) if p.numel() > 0}
    held = {key: names[_memory(p)] for key, p in own.items() if _memory(p) in names}
    _refuse_others(own, held, list(names.values()))
    state = model.state_dict()
    filled = set()
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and (name := names.get(_memory(value))):
            state[key] = _like(value, center[name])
            filled.add(name)
    keys = dict(zip(plain(list(state)), state, strict=True))
    for (key, name), meaning in zip(held.items(), plain(list(held)), strict=True):
        if name not in filled:
            place = keys.get(meaning, "")
            value = state.get(place)
            if not (isinstance(value, torch.Tensor) and _is_copy(value, own[key])):
                raise ConfigError(
                    f"model.state_dict() has no place for {name!r}, which the model holds as {key!r}: a hook of it "
                    "changes that parameter. Take the state dict inside `with optimizer.center_weights():`."
                )
            state[place] = _like(value, center[name])
    return state


def _refuse_others(own: Mapping[str, torch.Tensor], held: Mapping[str, str], names: Sequence[str]) -> None:
    if not held:
        raise ConfigError(
            f"model= holds none of the parameters that are exchanged, such as {names[0] if names else None!r}: it is "
            f"another model or a copy, as deepcopy or AveragedModel makes. {_GIVE}"
        )
    missing = [name for name in names if name not in held.values()]
    strangers = [key for key, p in own.items() if key not in held and p.requires_grad]
    if missing and strangers:
        raise ConfigError(
            f"model= does not hold {missing[0]!r}, which is exchanged, but {strangers[0]!r}, which is not: a part "
            f"of it is of another model or a copy. {_GIVE}"
        )


def _memory(tensor: torch.Tensor) -> tuple[Any, ...] | None:
    """Where a tensor's elements are; None where that cannot be said."""
    if torch.nn.parameter.is_lazy(tensor) or tensor.is_meta or tensor.layout != torch.strided or tensor.numel() == 0:
        return None
    return tensor.device, tensor.dtype, tensor.data_ptr(), tensor.shape, tensor.stride()


def _like(value: torch.Tensor, center: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(center).to(dtype=value.dtype, device=value.device)


def _is_copy(value: torch.Tensor, parameter: torch.Tensor) -> bool:
    return value.shape == parameter.shape and torch.equal(value, parameter.detach().to(value))
