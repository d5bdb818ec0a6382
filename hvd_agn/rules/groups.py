"""Rules with hyper-parameters of their own for groups of arrays."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields

from .. import _core
from ..errors import ConfigError
from .base import STALENESS, Rule

_MOST_RATES = 2**16  # learning rates of a push, which each of its messages carries


@dataclass(frozen=True, repr=False)
class Groups(Rule):
    """A rule for each group of arrays: the same kind, with other hyper-parameters.

    Most recipes for transformers have two: weight decay, and none for biases and norms. An optimizer's groups are its
    parameter groups, in their order; :class:`hvd_agn.Center` is told by ``groups=`` which array is in which. All
    that is said of a rule holds for each array and the rule of its group, and ``lr="follow"`` takes the learning rate
    of the group.

    Args:
        rules: one per group, at least one. They keep the same slots: rules of one class, ``Adam`` and ``AdamW``, or
            ``SGD`` with and without a momentum; ``RMSprop`` is centered in all groups or in none. ``staleness``,
            ``clip_norm``, which is over all arrays, and ``gap_aware`` are the same in all.

    Raises:
        ConfigError: they are not.
    """

    rules: tuple[Rule, ...]
    staleness: str = field(default=STALENESS[0], init=False)  # of the rules, as the next two are
    clip_norm: float | None = field(default=None, init=False)
    gap_aware: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        given = tuple(self.rules) if isinstance(self.rules, Iterable) else ()
        if not given or not all(isinstance(rule, Rule) and not isinstance(rule, Groups) for rule in given):
            raise ConfigError(
                f"rules.Groups: rules={self.rules!r}: give one for each group: [rules.SGD(0.1), rules.SGD(0.2)]."
            )
        object.__setattr__(self, "rules", given)
        for modifier in fields(Rule):
            values = [getattr(rule, modifier.name) for rule in given]
            if any(value != values[0] for value in values):
                raise ConfigError(
                    f"rules.Groups: {modifier.name}={values}: it concerns whole pushes, give all groups the same."
                )
            object.__setattr__(self, modifier.name, values[0])
        super().__post_init__()
        most = max(given, key=lambda rule: len(rule.active_slots()))
        slots = most.active_slots()
        kind = most._native(slots).kind
        for rule in given:
            native = rule._native(slots)
            if native.kind != kind or native.slots != len(slots) or set(rule.active_slots()) - set(slots):
                raise ConfigError(
                    f"rules.Groups: {most} and {rule} keep different slots at the center: give rules of one kind."
                )

    def __repr__(self) -> str:
        return f"Groups({', '.join(map(repr, self.rules))})"

    @property
    def each(self) -> tuple[Rule, ...]:  # noqa: D102 (inherited)
        return self.rules

    @property
    def factor(self) -> float | None:  # noqa: D102 (inherited)
        factors = [rule.factor for rule in self.rules]
        known = [factor for factor in factors if factor is not None]
        return max(known) if len(known) == len(factors) else None

    @property
    def follows(self) -> bool:  # noqa: D102 (inherited)
        return any(rule.follows for rule in self.rules)

    def _natives(self) -> list[_core.Rule]:
        return [rule._native(self.active_slots()) for rule in self.rules]

    def active_slots(self) -> tuple[str, ...]:  # noqa: D102 (inherited)
        return max((rule.active_slots() for rule in self.rules), key=len)


def grouped(rules: Iterable[Rule]) -> Rule:
    """The rule of all groups, or if they differ :class:`Groups`."""
    each = tuple(rules)
    return each[0] if all(rule == each[0] for rule in each) else Groups(each)


def group_of(rule: Rule, names: Sequence[str], groups: Mapping[str, int] | Sequence[int] | None) -> list[int]:
    """Of each array the number of its group; 0 where groups make no difference.

    Args:
        rule: of a center.
        names: of its arrays.
        groups: as of :class:`hvd_agn.Center`.

    Raises:
        ConfigError: ``groups`` is missing, or does not say it of these arrays, or names a group without a rule.
    """
    among = len(rule.each)
    if among == 1 and (groups is None or not rule.follows):
        return [0] * len(names)
    if groups is None:
        raise ConfigError(f"{rule} needs groups=: the number of each array's group, from 0 to {among - 1}.")
    given = groups if isinstance(groups, Mapping) else dict(zip(names, groups, strict=False))
    if len(groups) != len(names) or given.keys() != set(names):
        raise ConfigError(f"groups={groups!r}: give a number for each of the {len(names)} arrays.")
    last = (among if isinstance(rule, Groups) else _MOST_RATES) - 1
    numbers = []
    for name in names:
        try:
            number = -1 if isinstance(given[name], bool) else operator.index(given[name])
        except TypeError:
            number = -1
        if not 0 <= number <= last:
            raise ConfigError(f"groups: {name!r} is in {given[name]!r}: give a number from 0 to {last}.")
        numbers.append(number)
    return numbers
