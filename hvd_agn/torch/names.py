"""What ``named_parameters=`` may be, and the names of an optimizer's parameters that come of it."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch

from ..errors import ConfigError
from ..names import plain

Named: TypeAlias = torch.nn.Module | Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]

_GIVE = "give model.named_parameters()"


class Names:
    """Names of the parameters of an optimizer, in its order.

    Args:
        optimizer: whose own names stand where none are given, or else the parameter's place in it.
        named_parameters: names, without what wrappers around a module put into them; see :func:`hvd_agn.names.plain`.

    Raises:
        ConfigError: ``named_parameters`` is none of its choices, or names none of the optimizer's parameters.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, named_parameters: Named | None) -> None:
        pairs = None if named_parameters is None else _pairs(named_parameters)
        given: dict[int, str] = {}
        for name, parameter in pairs or ():
            given.setdefault(id(parameter), name)
        self.all: list[str] = []
        """One per parameter."""
        self.places: set[str] = set()
        """Those that are only a place."""
        ids: set[int] = set()
        for g, group in enumerate(optimizer.param_groups):
            own_names = group.get("param_names")
            for i, p in enumerate(group["params"]):
                place = f"param_groups[{g}].params[{i}]"
                self.all.append(given.get(id(p)) or (own_names[i] if own_names else place))
                if self.all[-1] == place:
                    self.places.add(place)
                ids.add(id(p))
        if pairs and ids.isdisjoint(given):
            raise ConfigError(
                f"named_parameters has {len(pairs)} names, from {pairs[0][0]!r} on, and none is of a parameter of the "
                f"optimizer: they are of another model, a copy of it, or its state_dict(). {_GIVE.capitalize()} of the "
                "model that is trained."
            )
        named = [name for name in self.all if name not in self.places]
        without = dict(zip(named, plain(named), strict=True)) if len(set(named)) == len(named) else {}
        self.all = [without.get(name, name) for name in self.all]
        self.others = [(name, parameter) for name, parameter in pairs or () if id(parameter) not in ids]
        """Those given that are no parameters of the optimizer: frozen ones, mostly; of a module, its buffers too."""
        if isinstance(named_parameters, torch.nn.Module):
            self.others += [(name, buffer) for name, buffer in named_parameters.named_buffers() if buffer is not None]


def _pairs(named: Any) -> list[tuple[str, torch.Tensor]]:
    if isinstance(named, torch.nn.Module):
        named = named.named_parameters()
    elif isinstance(named, Mapping):
        named = named.items()
    elif callable(named):
        raise ConfigError(f"named_parameters is a function that was not called: {_GIVE}.")
    try:
        pairs = list(named)
    except TypeError:
        raise ConfigError(f"named_parameters is a {type(named).__name__}: {_GIVE}.") from None
    for pair in pairs:
        if isinstance(pair, torch.Tensor):
            raise ConfigError(f"named_parameters has parameters without names, as model.parameters() does: {_GIVE}.")
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str)):
            raise ConfigError(f"named_parameters has {pair!r}, which is no pair of a name and a parameter: {_GIVE}.")
    if not pairs:
        raise ConfigError(
            "named_parameters has no names: a generator that was used up, or a model without parameters. "
            f"{_GIVE.capitalize()}, not read before, or a list or dict of it."
        )
    return pairs
