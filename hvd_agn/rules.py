"""What the center does with a pushed delta.

A rule is an immutable description; the arithmetic is in the native core (``csrc/rules.hpp``) and runs inside the fused
pass over each block. ``delta = (theta - anchor) / k`` is the mean update of a worker over its k local steps.
"""

import numbers
from dataclasses import dataclass
from typing import ClassVar

from . import _core
from .errors import ConfigError


class Rule:
    """Base of all rules."""

    slots: ClassVar[tuple[str, ...]] = ()
    """Names of the arrays that rules of this type may keep at the center, each as large as the center."""

    @property
    def factor(self) -> float:
        """How far the center moves for a delta of 1, without momentum."""
        raise TypeError(f"{type(self).__name__} is not a rule: use hvd_agn.rules.Add or hvd_agn.rules.SGD.")

    def _native(self) -> _core.Rule:
        raise TypeError(f"{type(self).__name__} is not a rule: use hvd_agn.rules.Add or hvd_agn.rules.SGD.")

    def active_slots(self) -> tuple[str, ...]:
        """The slots that this rule keeps, with its hyper-parameters."""
        return self.slots[: self._native().slots]


@dataclass(frozen=True)
class Add(Rule):
    """``center <- center + scale * delta``.

    With ``scale=1`` the rule of Accumulated Gradient Normalization (Hermans, Spanakis, Moeckel, ACML 2017, section 3).

    Args:
        scale: factor on every delta, any finite number.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        _finite(self, "scale")

    @property
    def factor(self) -> float:  # noqa: D102 (inherited)
        return abs(self.scale)

    def _native(self) -> _core.Rule:
        return _core.Rule.add(self.scale)


@dataclass(frozen=True)
class SGD(Rule):
    """Stochastic gradient descent at the center, with ``g = -delta`` as its gradient.

    The outer optimizer of DiLoCo (Douillard et al. 2023, arXiv 2311.08105, algorithm 1), in the arithmetic and with the
    meaning of ``torch.optim.SGD``: ``g <- g + weight_decay * center``;
    ``slot <- momentum * slot + (1 - dampening) * g`` (the first push sets ``slot <- g``);
    ``center <- center - lr * slot``, or with Nesterov ``center <- center - lr * (g + momentum * slot)``.
    One slot if ``momentum`` is not 0.

    Args:
        lr: learning rate, at least 0.
        momentum: at least 0.
        nesterov: needs a momentum and no dampening.
        dampening: of the momentum.
        weight_decay: L2 factor, at least 0.
    """

    slots: ClassVar[tuple[str, ...]] = ("momentum",)

    lr: float
    momentum: float = 0.0
    nesterov: bool = False
    dampening: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _finite(self, "lr", "momentum", "dampening", "weight_decay")
        for name in ("lr", "momentum", "weight_decay"):
            if getattr(self, name) < 0:
                raise ConfigError(f"rules.SGD: {name}={getattr(self, name)}: give 0 or more.")
        if self.nesterov and (self.momentum <= 0 or self.dampening != 0):
            raise ConfigError("rules.SGD: nesterov=True needs momentum > 0 and dampening=0.")

    @property
    def factor(self) -> float:  # noqa: D102 (inherited)
        return self.lr

    def _native(self) -> _core.Rule:
        return _core.Rule.sgd(self.lr, self.momentum, self.dampening, self.weight_decay, self.nesterov)


def _finite(rule: Rule, *names: str) -> None:
    for name in names:
        value = getattr(rule, name)
        if not isinstance(value, numbers.Real) or not abs(float(value)) < float("inf"):
            raise ConfigError(f"rules.{type(rule).__name__}: {name}={value!r}: give a finite number.")
        object.__setattr__(rule, name, float(value))  # 1 and 1.0 are one rule
