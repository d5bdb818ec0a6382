"""What the center does with a pushed delta.

A rule is an immutable description; the arithmetic is in the native core (``csrc/rules.hpp``) and runs inside the fused
pass over each block. ``delta = (theta - anchor) / k`` is the mean update of a worker over its k local steps. Rules that
are optimizers take ``g = -delta`` as their gradient (Douillard et al. 2023, arXiv 2311.08105, algorithm 1), and ``t``
is the number of pushes that the block has had, this one among them. Slots live at the center; all workers share them.
"""

import dataclasses
import numbers
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from . import _core
from .errors import ConfigError

STALENESS = ("none", "inverse", "sqrt")
BIAS_CORRECTIONS = ("torch", "keras", "tf_contrib")
FOLLOW = "follow"
_MOVED = "moved_sq"  # the slot of gap_aware


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
            _finite(self, "clip_norm", above=0)
        _flags(self, "gap_aware")

    @property
    def _label(self) -> str:
        return f"rules.{type(self).__name__}"

    def __repr__(self) -> str:
        modifiers = {field.name: field.default for field in dataclasses.fields(Rule)}
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        shown = {name: v for name, v in own.items() if name not in modifiers}
        shown |= {name: own[name] for name, default in modifiers.items() if own[name] != default}
        return f"{type(self).__name__}({', '.join(f'{name}={_text(value)}' for name, value in shown.items())})"

    @property
    def factor(self) -> float | None:
        """How far the center moves for a delta of 1, without momentum; None where that depends on more than delta."""
        return None

    @property
    def follows(self) -> bool:
        """Whether the learning rate is that of the worker that pushes."""
        return getattr(self, "lr", None) == FOLLOW

    def _kind(self) -> tuple[str, dict[str, Any]]:
        raise ConfigError(f"{type(self).__name__} is not a rule: use one of hvd_agn.rules, such as rules.Add().")

    def _native(self) -> _core.Rule:
        kind, hyper = self._kind()
        if hyper.get("lr") == FOLLOW:
            hyper |= {"lr": 0.0, "follow": True}
        modifiers = {"staleness": self.staleness, "clip_norm": self.clip_norm or 0.0, "gap_aware": self.gap_aware}
        return _core.Rule(kind, hyper | modifiers)

    def active_slots(self) -> tuple[str, ...]:
        """Names of the arrays, each as large as the center, that this rule keeps there."""
        return self._own_slots(self._native().slots - self.gap_aware) + (_MOVED,) * self.gap_aware

    def _own_slots(self, count: int) -> tuple[str, ...]:
        return self._slots[:count]


@dataclass(frozen=True, repr=False)
class Add(Rule):
    """``center <- center + scale * delta``.

    With ``scale=1`` the rule of Accumulated Gradient Normalization (Hermans, Spanakis, Moeckel, ACML 2017, section 3).

    Args:
        scale: factor on every delta, any finite number.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _finite(self, "scale")

    @property
    def factor(self) -> float:  # noqa: D102 (inherited)
        return abs(self.scale)

    def _kind(self) -> tuple[str, dict[str, Any]]:
        return "add", {"scale": self.scale}


@dataclass(frozen=True, repr=False)
class SGD(Rule):
    """Stochastic gradient descent at the center: the outer optimizer of DiLoCo, as ``torch.optim.SGD`` does it.

    ``g <- g + weight_decay * center``; ``slot <- momentum * slot + (1 - dampening) * g`` (the first push sets
    ``slot <- g``); ``center <- center - lr * slot``, or ``center - lr * (g + momentum * slot)`` with Nesterov. One
    slot if ``momentum`` is not 0.

    Args:
        lr: learning rate, at least 0, or ``"follow"``: that of the worker that pushes, at that moment.
        momentum: at least 0.
        nesterov: needs a momentum and no dampening.
        dampening: of the momentum.
        weight_decay: L2 factor, at least 0.
    """

    _slots: ClassVar[tuple[str, ...]] = ("momentum",)

    lr: float | str
    momentum: float = 0.0
    nesterov: bool = False
    dampening: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _learning_rate(self)
        _finite(self, "momentum", "weight_decay", least=0)
        _finite(self, "dampening")
        _flags(self, "nesterov")
        if self.nesterov and (self.momentum <= 0 or self.dampening != 0):
            raise ConfigError("rules.SGD: nesterov=True needs momentum > 0 and dampening=0.")

    @property
    def factor(self) -> float | None:  # noqa: D102 (inherited)
        return None if isinstance(self.lr, str) else self.lr

    def _kind(self) -> tuple[str, dict[str, Any]]:
        return "momentum" if self.momentum else "sgd", _hyper(self)


@dataclass(frozen=True, repr=False)
class Adam(Rule):
    """Adam at the center (Kingma, Ba, ICLR 2015, arXiv 1412.6980, algorithm 1), as ``torch.optim.Adam`` does it.

    ``g <- g + weight_decay * center``; ``m <- m + (1 - beta1) * (g - m)``; ``v <- v + (1 - beta2) * (g^2 - v)``;
    ``center <- center - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)``. Slots: ``exp_avg`` (m) and
    ``exp_avg_sq`` (v).

    Args:
        lr: learning rate, at least 0, or ``"follow"``: that of the worker that pushes, at that moment.
        betas: of m and v, each from 0 to below 1.
        eps: above 0.
        weight_decay: L2 factor, at least 0.
        bias_correction: ``"torch"``: as above. ``"keras"``: ``eps`` is added to ``sqrt(v)`` before the correction, as
            Keras' Adam has it and the paper before section 2.1 (epsilon hat). ``"tf_contrib"``: what
            ``tf.contrib.opt.AGNOptimizer`` did, for comparisons with it: as ``"keras"``, and instead of ``t`` the steps
            and the pushes of the pushing worker alone.
    """

    _slots: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    _decoupled: ClassVar[bool] = False

    lr: float | str = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    bias_correction: str = BIAS_CORRECTIONS[0]

    def __post_init__(self) -> None:
        super().__post_init__()
        _learning_rate(self)
        _betas(self)
        _finite(self, "eps", above=0)
        _finite(self, "weight_decay", least=0)
        if self.bias_correction not in BIAS_CORRECTIONS:
            choices = ", ".join(BIAS_CORRECTIONS)
            raise ConfigError(f"{self._label}: bias_correction={self.bias_correction!r}: give one of {choices}.")

    def _kind(self) -> tuple[str, dict[str, Any]]:
        flags = {
            "own_count": self.bias_correction == "tf_contrib",
            "eps_hat": self.bias_correction != "torch",
            "decoupled": self._decoupled,
        }
        return "adam", _hyper(self, "betas", "bias_correction") | flags


@dataclass(frozen=True, repr=False)
class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov, Hutter, ICLR 2019, arXiv 1711.05101), as ``torch.optim.AdamW``.

    As :class:`Adam`, but ``g`` stays as it is, and the center is multiplied by ``1 - lr * weight_decay`` instead.
    """

    _decoupled: ClassVar[bool] = True

    weight_decay: float = 1e-2


@dataclass(frozen=True, repr=False)
class Adagrad(Rule):
    """Adagrad at the center (Duchi, Hazan, Singer, JMLR 2011), as ``torch.optim.Adagrad`` does it.

    ``g <- g + weight_decay * center``; ``sum <- sum + g^2``;
    ``center <- center - lr / (1 + (t - 1) * lr_decay) * g / (sqrt(sum) + eps)``. Slot: ``sum``.

    Args:
        lr: learning rate, at least 0, or ``"follow"``: that of the worker that pushes, at that moment.
        lr_decay: at least 0.
        weight_decay: L2 factor, at least 0.
        initial_accumulator_value: of ``sum``, at least 0. TensorFlow's default is 0.1, with ``eps=0``.
        eps: at least 0, and above 0 if ``initial_accumulator_value`` is 0.
        eps_inside_root: ``sqrt(sum + eps)``, as Keras has it, instead of ``sqrt(sum) + eps``.
    """

    _slots: ClassVar[tuple[str, ...]] = ("sum",)

    lr: float | str = 1e-2
    lr_decay: float = 0.0
    weight_decay: float = 0.0
    initial_accumulator_value: float = 0.0
    eps: float = 1e-10
    eps_inside_root: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _learning_rate(self)
        _finite(self, "lr_decay", "weight_decay", "initial_accumulator_value", "eps", least=0)
        _flags(self, "eps_inside_root")
        if self.eps == 0 and self.initial_accumulator_value == 0:
            raise ConfigError(
                "rules.Adagrad: eps=0 divides 0 by 0 where a gradient is 0: give initial_accumulator_value."
            )

    def _kind(self) -> tuple[str, dict[str, Any]]:
        renamed = {"eps_inside": "eps_inside_root", "initial": "initial_accumulator_value"}
        return "adagrad", _hyper(self, **renamed)


@dataclass(frozen=True, repr=False)
class RMSprop(Rule):
    """RMSprop at the center (Tieleman, Hinton, lecture 6.5 of *Neural Networks for Machine Learning*, 2012).

    As ``torch.optim.RMSprop`` does it: ``g <- g + weight_decay * center``; ``s <- s + (1 - alpha) * (g^2 - s)``; if
    centered ``a <- a + (1 - alpha) * (g - a)`` and ``s - a^2`` takes the place of ``s`` in the next line;
    ``step = g / (sqrt(s) + eps)``; with a momentum ``step = buffer <- momentum * buffer + step``;
    ``center <- center - lr * step``. Slots: ``square_avg`` (s); ``grad_avg`` (a) if centered; ``momentum_buffer`` if
    ``momentum`` is not 0.

    Args:
        lr: learning rate, at least 0, or ``"follow"``: that of the worker that pushes, at that moment.
        alpha: from 0 to below 1.
        eps: above 0.
        weight_decay: L2 factor, at least 0.
        momentum: at least 0.
        centered: divide by the deviation from the mean gradient.
        eps_inside_root: ``sqrt(s + eps)``, as TensorFlow and Keras have it, instead of ``sqrt(s) + eps``.
        initial_square_avg: of ``s``, at least 0. It is 1 in TensorFlow 1.
    """

    _slots: ClassVar[tuple[str, ...]] = ("square_avg", "grad_avg", "momentum_buffer")

    lr: float | str = 1e-2
    alpha: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    centered: bool = False
    eps_inside_root: bool = False
    initial_square_avg: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _learning_rate(self)
        _finite(self, "alpha", least=0, below=1)
        _finite(self, "eps", above=0)
        _finite(self, "weight_decay", "momentum", "initial_square_avg", least=0)
        _flags(self, "centered", "eps_inside_root")

    def _own_slots(self, count: int) -> tuple[str, ...]:
        return tuple(slot for slot, on in zip(self._slots, (True, self.centered, self.momentum), strict=True) if on)

    def _kind(self) -> tuple[str, dict[str, Any]]:
        renamed = {"beta2": "alpha", "eps_inside": "eps_inside_root", "initial": "initial_square_avg"}
        return "rmsprop", _hyper(self, **renamed)


@dataclass(frozen=True, repr=False)
class Lion(Rule):
    """Lion at the center (Chen et al., NeurIPS 2023, arXiv 2302.06675, algorithm 2).

    ``u = beta1 * m + (1 - beta1) * g``; ``m <- beta2 * m + (1 - beta2) * g``;
    ``center <- center - lr * (sign(u) + weight_decay * center)``. Slot: ``exp_avg`` (m).

    Args:
        lr: learning rate, at least 0, or ``"follow"``: that of the worker that pushes, at that moment.
        betas: each from 0 to below 1.
        weight_decay: decoupled, at least 0.
    """

    _slots: ClassVar[tuple[str, ...]] = ("exp_avg",)

    lr: float | str = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _learning_rate(self)
        _betas(self)
        _finite(self, "weight_decay", least=0)

    def _kind(self) -> tuple[str, dict[str, Any]]:
        return "lion", _hyper(self, "betas")


@dataclass(frozen=True, repr=False)
class DelayedNesterov(Rule):
    """Nesterov's momentum, updated by every Nth push only (Liu et al. 2024, arXiv 2401.09135, algorithm 3 with c = 0).

    ``buffer <- buffer + g``. If N divides ``t``: ``m <- momentum * m + buffer / N``, ``buffer <- 0``,
    ``center <- center - lr * (momentum * m + g / N)``. Otherwise ``center <- center - lr * g / N``. Slots: ``momentum``
    (m) and ``buffer``.

    Args:
        lr: learning rate, at least 0, or ``"follow"``: that of the worker that pushes, at that moment.
        momentum: at least 0.
        every: N, at least 1; the number of workers is a good choice.
    """

    _slots: ClassVar[tuple[str, ...]] = ("momentum", "buffer")

    lr: float | str
    momentum: float
    every: int

    def __post_init__(self) -> None:
        super().__post_init__()
        _learning_rate(self)
        _finite(self, "momentum", least=0)
        object.__setattr__(self, "every", whole(f"{self._label}: every", self.every, "pushes"))

    def _kind(self) -> tuple[str, dict[str, Any]]:
        return "delayed_nesterov", _hyper(self)


@dataclass(frozen=True, repr=False)
class Elastic(Rule):
    """Worker and center move towards each other (EASGD: Zhang, Choromanska, LeCun, NeurIPS 2015, arXiv 1412.6651).

    ``d = theta - center``; ``theta <- theta - alpha * d``; ``center <- center + alpha * d``. A worker pushes its
    parameters and keeps ones of its own; the number of local steps does not count. ``clip_norm``, ``gap_aware``
    and ``wire_dtype`` are refused: there is no delta.

    Args:
        alpha: above 0, at most 1. The paper has 0.9 divided by the number of workers.
    """

    alpha: float

    def __post_init__(self) -> None:
        super().__post_init__()
        _finite(self, "alpha", above=0, most=1)
        if self.clip_norm is not None:
            raise ConfigError("rules.Elastic: clip_norm: workers push parameters, there is no delta to clip.")
        if self.gap_aware:
            raise ConfigError("rules.Elastic: gap_aware: workers push parameters, there is no delta to make smaller.")

    def _kind(self) -> tuple[str, dict[str, Any]]:
        return "elastic", {"scale": self.alpha}


@dataclass(frozen=True, repr=False)
class Custom(Rule):
    """A function of yours on NumPy arrays: to try a rule out, not for speed.

    ``fn(center, delta, slots, t)`` is called for every piece of an array that lies in one block (256 KiB, unless
    ``HVD_AGN_BLOCK_BYTES`` says otherwise), under the block's lock: by the worker that pushes, or, for workers on other
    nodes, in the host's process, in a thread of its own that waits for the GIL. All arrays are one-dimensional, of the
    center's type, and valid during the call only:

    * ``center``: its values, to be changed in place;
    * ``delta``: the mean update, after ``staleness``, ``gap_aware`` and ``clip_norm``; it may be written over;
    * ``slots``: name -> array, to be changed in place; zero at first;
    * ``t``: pushes of the block, this one among them.

    If it raises, the exchange raises :class:`hvd_agn.errors.RuleError`, the block stays as it was, and what was to be
    pushed to it is pushed by the next exchange. Elements must not depend on each other: where blocks end is no property
    of a model. All ranks need the same function. Several times slower than the rules above.

    Args:
        fn: the function.
        slots: names of the arrays that it keeps at the center.
    """

    fn: Callable[[np.ndarray, np.ndarray, dict[str, np.ndarray], int], object]
    slots: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.fn):
            raise ConfigError(f"rules.Custom: fn={self.fn!r}: give a function of (center, delta, slots, t).")
        slots = (self.slots,) if isinstance(self.slots, str) else tuple(self.slots)
        names = [slot for slot in slots if isinstance(slot, str) and slot.isidentifier() and slot != _MOVED]
        if len(set(names)) < len(slots):
            raise ConfigError(f"rules.Custom: slots={self.slots!r}: give different names, such as ('momentum',).")
        object.__setattr__(self, "slots", slots)

    def _own_slots(self, count: int) -> tuple[str, ...]:
        return self.slots

    def _kind(self) -> tuple[str, dict[str, Any]]:
        return "custom", {"function": _core.Function(self.fn, repr(self), list(self.slots))}


# ---- the rule of an optimizer


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


@dataclass(frozen=True)
class _Framework:
    """What is known of a framework's optimizers."""

    name: str
    groups: Callable[[Any], list[dict[str, Any]]]
    """The hyper-parameters of an optimizer, by name, for each group of its parameters."""
    rules: dict[str, tuple[type[Rule], dict[str, str], dict[str, Any]]]
    """By the optimizer's name: the rule, which hyper-parameter each of its arguments is, and what is always given."""
    refused: dict[str, str]
    """Hyper-parameters that change what an optimizer does; set, and no argument of its rule, they are an error."""


def _torch_groups(optimizer: Any) -> list[dict[str, Any]]:
    return [group | {"lr": float(group["lr"])} for group in optimizer.param_groups]  # a tensor, maybe


def _keras_groups(optimizer: Any) -> list[dict[str, Any]]:
    """One group, in which names are torch's where Keras has no single attribute for it."""
    own = vars(optimizer)
    decay = own.get("weight_decay") or 0.0
    kept_out = ("_exclude_from_weight_decay", "_exclude_from_weight_decay_pattern")
    derived = {
        "lr": float(optimizer.learning_rate),  # of a schedule: the value that it has now
        "betas": (own.get("beta_1"), own.get("beta_2")),
        "nesterov": own.get("nesterov") and own.get("momentum") != 0,  # Keras ignores it without a momentum
        "weight_decay": decay,
        "decoupled_weight_decay": decay != 0,
        "exclude_from_weight_decay": decay != 0 and any(own.get(name) for name in kept_out),
    }
    return [own | derived]


_CLIPS = ("clipnorm", "global_clipnorm", "clipvalue")
_EPS = {"eps": "epsilon"}
_FRAMEWORKS = {  # by the package that has the optimizers
    "torch.optim": _Framework(
        name="torch.optim's",
        groups=_torch_groups,
        rules={
            "SGD": (SGD, _same("lr", "momentum", "dampening", "nesterov", "weight_decay"), {}),
            "Adam": (Adam, _same("lr", "betas", "eps", "weight_decay"), {}),
            "AdamW": (AdamW, _same("lr", "betas", "eps", "weight_decay"), {}),
            "Adagrad": (Adagrad, _same("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps"), {}),
            "RMSprop": (RMSprop, _same("lr", "alpha", "eps", "weight_decay", "momentum", "centered"), {}),
        },
        refused=dict.fromkeys(("amsgrad", "maximize"), ""),
    ),
    "keras": _Framework(
        name="Keras'",
        groups=_keras_groups,
        rules={
            "SGD": (SGD, _same("lr", "momentum", "nesterov"), {}),
            "Adam": (Adam, _same("lr", "betas", "weight_decay") | _EPS, {"bias_correction": "keras"}),
            "AdamW": (AdamW, _same("lr", "betas", "weight_decay") | _EPS, {"bias_correction": "keras"}),
            "Adagrad": (Adagrad, _same("lr", "initial_accumulator_value") | _EPS, {"eps_inside_root": True}),
            "RMSprop": (
                RMSprop,
                _same("lr", "momentum", "centered") | _EPS | {"alpha": "rho"},
                {"eps_inside_root": True},
            ),
            "Lion": (Lion, _same("lr", "betas", "weight_decay"), {}),
        },
        refused=dict.fromkeys((*_CLIPS, "amsgrad", "use_ema", "gradient_accumulation_steps", "loss_scale_factor"), "")
        | {"weight_decay": ", decoupled from the gradient as Keras has it", "exclude_from_weight_decay": ""},
    ),
}


def like(optimizer: Any, **changes: Any) -> Rule:
    """The rule that does at the center what an optimizer of ``torch.optim`` or Keras 3 does, with its hyper-parameters.

    Args:
        optimizer: SGD, Adam, AdamW, Adagrad or RMSprop, Keras' Lion, or of a class derived from one of them. Keras'
            Adam with a ``weight_decay`` is :class:`AdamW`. Of a learning rate schedule of Keras the value is taken that
            it has now.
        changes: arguments of the rule to set otherwise, such as ``lr=0.1``, ``lr="follow"`` or ``staleness="sqrt"``.

    Raises:
        ConfigError: the optimizer is another one, or its parameter groups differ in what the rule takes over, or it
            does something that no rule does; the message says what there is instead.
    """
    package, name = next(
        (
            (package, base.__name__)
            for base in type(optimizer).__mro__
            for package in _FRAMEWORKS
            if base.__module__.startswith(f"{package}.")
        ),
        ("torch.optim", ""),
    )
    framework = _FRAMEWORKS[package]
    if name not in framework.rules:
        known = " and ".join(f"{each.name} {', '.join(each.rules)}" for each in _FRAMEWORKS.values())
        raise ConfigError(
            f"rules.like knows {known}, not {type(optimizer).__name__}. Name the rule yourself: "
            "rule=rules.Add(), rules.SGD(lr=...) or another of hvd_agn.rules."
        )
    kind, names, fixed = framework.rules[name]
    groups = framework.groups(optimizer)
    settled = {*names.values(), *(_CLIPS if "clip_norm" in changes else ())}
    for key, how in framework.refused.items():
        values = [group[key] for group in groups if group.get(key)]
        if values and key not in settled:
            advice = "Give clip_norm= here, which is over all arrays, or name" if key in _CLIPS else "Name"
            raise ConfigError(f"rules.like: no rule has {name}'s {key}={values[0]!r}{how}. {advice} the rule yourself.")
    decoupled = [bool(group.get("decoupled_weight_decay")) for group in groups]
    if name == "Adam" and any(decoupled):
        if not all(decoupled):
            raise ConfigError(
                "rules.like: the parameter groups differ in decoupled_weight_decay. Name the rule yourself."
            )
        kind = AdamW
    if unknown := [key for key in changes if key not in {field.name for field in dataclasses.fields(kind)}]:
        raise ConfigError(f"rules.like: {kind.__name__} has no {unknown[0]}. It is {kind.__name__}{_arguments(kind)}.")
    for argument, key in names.items():
        values = [group[key] for group in groups]
        if argument not in changes and any(value != values[0] for value in values):
            raise ConfigError(
                f"rules.like: the parameter groups differ in {key} ({values}), a rule has one. Give {argument}= here."
            )
    return kind(**{argument: groups[0][key] for argument, key in names.items()} | fixed | changes)


# ---- checks of hyper-parameters


def _arguments(kind: type[Rule]) -> str:
    return f"({', '.join(field.name for field in dataclasses.fields(kind))})"


def whole(what: str, value: Any, unit: str) -> int:
    """The value as an int of 1 or more; ConfigError if it is none."""
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if isinstance(value, bool) or not 1 <= number < 2**31:
        raise ConfigError(f"{what}={value!r}: give a whole number of {unit}, 1 or more.")
    return number


def _text(value: Any) -> str:
    """For a rule's repr, which is the same on every rank."""
    return getattr(value, "__qualname__", type(value).__qualname__) if callable(value) else repr(value)


def _flags(rule: Rule, *names: str) -> None:
    for name in names:
        value = getattr(rule, name)
        if value not in (False, True):
            raise ConfigError(f"{rule._label}: {name}={value!r}: give True or False.")
        object.__setattr__(rule, name, bool(value))


def _hyper(rule: Any, *others: str, **renamed: str) -> dict[str, Any]:
    """The rule's own fields by name, but for ``others``; ``betas`` and those ``renamed`` as the core has them."""
    left_out = {field.name for field in dataclasses.fields(Rule)} | {*others, *renamed.values()}
    hyper = {f.name: getattr(rule, f.name) for f in dataclasses.fields(rule) if f.name not in left_out}
    hyper |= {new: getattr(rule, old) for new, old in renamed.items()}
    return hyper | (dict(zip(("beta1", "beta2"), rule.betas, strict=True)) if "betas" in others else {})


def _finite(
    rule: Rule,
    *names: str,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> None:
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


def _learning_rate(rule: Any) -> None:
    if rule.lr != FOLLOW:
        if isinstance(rule.lr, str):
            raise ConfigError(f"{rule._label}: lr={rule.lr!r}: give a number, or {FOLLOW!r}.")
        _finite(rule, "lr", least=0)


def _betas(rule: Any) -> None:
    try:
        first, second = (float(beta) for beta in rule.betas)
    except (TypeError, ValueError):
        first = second = -1.0
    if not (0 <= first < 1 and 0 <= second < 1):
        raise ConfigError(f"{rule._label}: betas={rule.betas!r}: give two numbers from 0 to below 1.")
    object.__setattr__(rule, "betas", (first, second))
