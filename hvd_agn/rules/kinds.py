"""The rules. Their arithmetic is in ``csrc/kernels/kernels_rules.hpp``."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .. import _core
from ..errors import ConfigError
from .base import MOVED, Rule, check_betas, check_finite, check_flags, check_learning_rate, hyper_of, whole

BIAS_CORRECTIONS = ("torch", "keras", "tf_contrib")


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
        check_finite(self, "scale")

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
        check_learning_rate(self)
        check_finite(self, "momentum", "weight_decay", least=0)
        check_finite(self, "dampening")
        check_flags(self, "nesterov")
        if self.nesterov and (self.momentum <= 0 or self.dampening != 0):
            raise ConfigError("rules.SGD: nesterov=True needs momentum > 0 and dampening=0.")

    @property
    def factor(self) -> float | None:  # noqa: D102 (inherited)
        return None if isinstance(self.lr, str) else self.lr

    def _kind(self) -> tuple[str, dict[str, Any]]:
        return "momentum" if self.momentum else "sgd", hyper_of(self)

    def _keeping(self, slots: Collection[str]) -> tuple[str, dict[str, Any]]:
        kind, hyper = self._kind()
        if "momentum" not in slots or kind == "momentum":
            return kind, hyper
        return "momentum", hyper | {"dampening": 0.0}  # the same bits, and the slot is the gradient


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
        check_learning_rate(self)
        check_betas(self)
        check_finite(self, "eps", above=0)
        check_finite(self, "weight_decay", least=0)
        if self.bias_correction not in BIAS_CORRECTIONS:
            choices = ", ".join(BIAS_CORRECTIONS)
            raise ConfigError(f"{self._label}: bias_correction={self.bias_correction!r}: give one of {choices}.")

    def _kind(self) -> tuple[str, dict[str, Any]]:
        flags = {
            "own_count": self.bias_correction == "tf_contrib",
            "eps_hat": self.bias_correction != "torch",
            "decoupled": self._decoupled,
        }
        return "adam", hyper_of(self, "betas", "bias_correction") | flags


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
        check_learning_rate(self)
        check_finite(self, "lr_decay", "weight_decay", "initial_accumulator_value", "eps", least=0)
        check_flags(self, "eps_inside_root")
        if self.eps == 0 and self.initial_accumulator_value == 0:
            raise ConfigError(
                "rules.Adagrad: eps=0 divides 0 by 0 where a gradient is 0: give initial_accumulator_value."
            )

    def _kind(self) -> tuple[str, dict[str, Any]]:
        renamed = {"eps_inside": "eps_inside_root", "initial": "initial_accumulator_value"}
        return "adagrad", hyper_of(self, **renamed)


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
        check_learning_rate(self)
        check_finite(self, "alpha", least=0, below=1)
        check_finite(self, "eps", above=0)
        check_finite(self, "weight_decay", "momentum", "initial_square_avg", least=0)
        check_flags(self, "centered", "eps_inside_root")

    def _own_slots(self, count: int) -> tuple[str, ...]:
        return tuple(slot for slot, on in zip(self._slots, (True, self.centered, self.momentum), strict=True) if on)

    def _kind(self) -> tuple[str, dict[str, Any]]:
        renamed = {"beta2": "alpha", "eps_inside": "eps_inside_root", "initial": "initial_square_avg"}
        return "rmsprop", hyper_of(self, **renamed) | {"buffered": self.momentum != 0}

    def _keeping(self, slots: Collection[str]) -> tuple[str, dict[str, Any]]:
        kind, hyper = self._kind()
        return kind, hyper | {"buffered": self.momentum != 0 or "momentum_buffer" in slots}


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
        check_learning_rate(self)
        check_betas(self)
        check_finite(self, "weight_decay", least=0)

    def _kind(self) -> tuple[str, dict[str, Any]]:
        return "lion", hyper_of(self, "betas")


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
        check_learning_rate(self)
        check_finite(self, "momentum", least=0)
        object.__setattr__(self, "every", whole(f"{self._label}: every", self.every, "pushes"))

    def _kind(self) -> tuple[str, dict[str, Any]]:
        return "delayed_nesterov", hyper_of(self)


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
        check_finite(self, "alpha", above=0, most=1)
        if self.clip_norm is not None:
            raise ConfigError("rules.Elastic: clip_norm: workers push parameters, there is no delta to clip.")
        if self.gap_aware:
            raise ConfigError("rules.Elastic: gap_aware: workers push parameters, there is no delta to make smaller.")

    def _kind(self) -> tuple[str, dict[str, Any]]:
        return "elastic", {"scale": self.alpha}


@dataclass(frozen=True, repr=False)
class Custom(Rule):
    """A function of yours on NumPy arrays: to try a rule out, not for speed.

    ``fn(center, delta, slots, t)`` is called for every piece of an array that lies in one block (254 KiB, unless
    ``HVD_AGN_BLOCK_BYTES`` says otherwise), under the block's lock: by the worker that pushes, or, for workers on other
    nodes, in the host's process, in a thread of its own that waits for the GIL. All arrays are one-dimensional, of the
    center's type, and valid during the call only:

    * ``center``: its values, to be changed in place;
    * ``delta``: the mean update, after ``staleness``, ``gap_aware`` and ``clip_norm``; it may be written over;
    * ``slots``: name -> array, to be changed in place; zero at first;
    * ``t``: pushes of the block, this one among them.

    It must not call the center or its clients, and in gradients mode ``delta`` is minus the mean gradient. If it
    raises, the exchange raises :class:`hvd_agn.errors.RuleError`, the block stays as it was, and what was to be pushed
    to it is pushed by the next exchange. Elements must not depend on each other: where blocks end is no property
    of a model. All ranks need the same function. Several times slower than the rules above.

    Args:
        fn: the function.
        slots: names of the arrays that it keeps at the center, or one name.
    """

    fn: Callable[[np.ndarray, np.ndarray, dict[str, np.ndarray], int], object]
    slots: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.fn):
            raise ConfigError(f"rules.Custom: fn={self.fn!r}: give a function of (center, delta, slots, t).")
        try:
            slots = (self.slots,) if isinstance(self.slots, str) else tuple(self.slots)
        except TypeError:
            slots = (None,)  # type: ignore[assignment]
        names = [slot for slot in slots if isinstance(slot, str) and slot.isidentifier() and slot != MOVED]
        if len(set(names)) < len(slots):
            raise ConfigError(f"rules.Custom: slots={self.slots!r}: give different names, such as ('momentum',).")
        object.__setattr__(self, "slots", slots)

    def _own_slots(self, count: int) -> tuple[str, ...]:
        return self.slots

    def _kind(self) -> tuple[str, dict[str, Any]]:
        return "custom", {"function": _core.Function(self.fn, repr(self), list(self.slots))}
