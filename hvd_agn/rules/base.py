"""What all rules have in common, and the checks of their hyper-parameters."""

import dataclasses
import numbers
import operator
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

from .. import _core
from ..errors import ConfigError

STALENESS = ("none", "inverse", "sqrt")
FOLLOW = "follow"
MOVED = "moved_sq"  # the slot of gap_aware


@dataclass(frozen=True, kw_only=True, repr=False)
class Rule:
    """Base of all rules, and what can be added to any of them.

    Args:
        staleness: factor on a delta whose worker has missed ``tau`` pushes of others to the block since it last pulled
            it: ``"none"``: 1; ``"inverse"``: ``1 / (tau + 1)`` (DynSGD: Jiang, Cui, Zhang, Yu, SIGMOD 2017, section
            4); ``"sqrt"``: ``1 / sqrt(tau + 1)``.
        clip_norm: a delta whose Euclidean norm over all arrays is larger is scaled to this norm, by the worker that
            pushes it. Costs one more reading of its parameters and anchor. What a ``wire_dtype`` has rounded away
            before comes on top.
        gap_aware: divide each element of a delta by ``1 + |center - anchor| / sqrt(s)``: by how many typical moves the
            center is away from what the worker last received (Barkai, Hakimi, Schuster, ICLR 2020, arXiv 1909.10802,
            parameter by parameter). ``s`` is the mean of the squared moves of that element so far, older ones fading
            by 0.999 per push. Memory: ``s`` is one more slot, ``moved_sq``, as large as the center; a host also keeps a
            copy of its shard for every worker on another node. Takes several passes over a block instead of one.
    """

    _slots: ClassVar[tuple[str, ...]] = ()  # that rules of this type may keep at the center

    staleness: str = STALENESS[0]
    clip_norm: float | None = None
    gap_aware: bool = False

    def __post_init__(self) -> None:
        if self.staleness not in STALENESS:
            raise ConfigError(f"{self._label}: staleness={self.staleness!r}: give one of {', '.join(STALENESS)}.")
        if self.clip_norm is not None:
            check_finite(self, "clip_norm", above=0)
        check_flags(self, "gap_aware")

    @property
    def _label(self) -> str:
        return f"rules.{type(self).__name__}"

    def __repr__(self) -> str:
        modifiers = {field.name: field.default for field in dataclasses.fields(Rule)}
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        shown = {name: v for name, v in own.items() if name not in modifiers}
        shown |= {name: own[name] for name, default in modifiers.items() if own[name] != default}
        return f"{type(self).__name__}({', '.join(f'{name}={text_of(value)}' for name, value in shown.items())})"

    @property
    def factor(self) -> float | None:
        """How far the center moves for a delta of 1, without momentum; None where that depends on more than delta."""
        return None

    @property
    def follows(self) -> bool:
        """Whether the learning rate is that of the worker that pushes."""
        return getattr(self, "lr", None) == FOLLOW

    @property
    def each(self) -> "tuple[Rule, ...]":
        """Of :class:`Groups` the rules of the groups; else the rule itself."""
        return (self,)

    def _kind(self) -> tuple[str, dict[str, Any]]:
        raise ConfigError(f"{type(self).__name__} is not a rule: use one of hvd_agn.rules, such as rules.Add().")

    def _keeping(self, slots: Collection[str]) -> tuple[str, dict[str, Any]]:
        """As :meth:`_kind`, with slots that this rule alone may not need."""
        return self._kind()

    def _native(self, slots: Collection[str] = ()) -> _core.Rule:
        kind, hyper = self._keeping(slots)
        if hyper.get("lr") == FOLLOW:
            hyper |= {"lr": 0.0, "follow": True}
        modifiers = {"staleness": self.staleness, "clip_norm": self.clip_norm or 0.0, "gap_aware": self.gap_aware}
        return _core.Rule(kind, hyper | modifiers)

    def _natives(self) -> list[_core.Rule]:
        """One for each of :attr:`each`, all with the same slots."""
        return [self._native()]

    def active_slots(self) -> tuple[str, ...]:
        """Names of the arrays, each as large as the center, that this rule keeps there."""
        return self._own_slots(self._native().slots - self.gap_aware) + (MOVED,) * self.gap_aware

    def _own_slots(self, count: int) -> tuple[str, ...]:
        return self._slots[:count]


# ---- checks of hyper-parameters


def whole(what: str, value: Any, unit: str) -> int:
    """The value as an int of 1 or more; ConfigError if it is none."""
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if isinstance(value, bool) or not 1 <= number < 2**31:
        raise ConfigError(f"{what}={value!r}: give a whole number of {unit}, 1 or more.")
    return number


def text_of(value: Any) -> str:
    """For a rule's repr, which is the same on every rank."""
    return getattr(value, "__qualname__", type(value).__qualname__) if callable(value) else repr(value)


def check_flags(rule: Rule, *names: str) -> None:
    """These hyper-parameters are True or False, or a ConfigError."""
    for name in names:
        value = getattr(rule, name)
        if value not in (False, True):
            raise ConfigError(f"{rule._label}: {name}={value!r}: give True or False.")
        object.__setattr__(rule, name, bool(value))


def hyper_of(rule: Any, *others: str, **renamed: str) -> dict[str, Any]:
    """The rule's own fields by name, but for ``others``; ``betas`` and those ``renamed`` as the core has them."""
    left_out = {field.name for field in dataclasses.fields(Rule)} | {*others, *renamed.values()}
    hyper = {f.name: getattr(rule, f.name) for f in dataclasses.fields(rule) if f.name not in left_out}
    hyper |= {new: getattr(rule, old) for new, old in renamed.items()}
    return hyper | (dict(zip(("beta1", "beta2"), rule.betas, strict=True)) if "betas" in others else {})


def check_finite(
    rule: Rule,
    *names: str,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> None:
    """These hyper-parameters are finite numbers within the bounds, or a ConfigError; they become floats."""
    bounds = {"at least": least, "above": above, "below": below, "at most": most}
    wanted = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)
    for name in names:
        value = getattr(rule, name)
        if not isinstance(value, numbers.Real) or isinstance(value, bool) or not abs(float(value)) < float("inf"):
            raise ConfigError(f"{rule._label}: {name}={value!r}: give a finite number{wanted and ', ' + wanted}.")
        number = float(value)
        if (
            (least is not None and number < least)
            or (above is not None and number <= above)
            or (below is not None and number >= below)
            or (most is not None and number > most)
        ):
            raise ConfigError(f"{rule._label}: {name}={value!r}: give a number {wanted}.")
        object.__setattr__(rule, name, number)  # 1 and 1.0 are one rule


def check_learning_rate(rule: Any) -> None:
    """``lr`` is a number of 0 or more, or follows the worker's, or a ConfigError."""
    if rule.lr != FOLLOW:
        if isinstance(rule.lr, str):
            raise ConfigError(f"{rule._label}: lr={rule.lr!r}: give a number, or {FOLLOW!r}.")
        check_finite(rule, "lr", least=0)


def check_betas(rule: Any) -> None:
    """``betas`` are two numbers from 0 to below 1, or a ConfigError."""
    try:
        first, second = (float(beta) for beta in rule.betas)
    except (TypeError, ValueError):
        first = second = -1.0
    if not (0 <= first < 1 and 0 <= second < 1):
        raise ConfigError(f"{rule._label}: betas={rule.betas!r}: give two numbers from 0 to below 1.")
    object.__setattr__(rule, "betas", (first, second))
