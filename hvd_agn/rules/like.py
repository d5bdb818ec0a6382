"""The rule that does what an optimizer of a framework does."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from .base import Rule
from .groups import grouped
from .kinds import SGD, Adagrad, Adam, AdamW, Lion, RMSprop


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


def parts_of(optimizer: Any) -> list[Any]:
    """Of Keras' MultiOptimizer its optimizers; else the optimizer itself."""
    return list(getattr(optimizer, "optimizers", [optimizer]))


def keeps_out_of_decay(optimizer: Any) -> bool:
    """Whether a Keras optimizer has two parameter groups: variables that it decays, and those that it does not."""
    own = vars(optimizer)
    kept_out = ("_exclude_from_weight_decay", "_exclude_from_weight_decay_pattern")
    return bool(own.get("weight_decay")) and any(own.get(name) for name in kept_out)


def parts_by_group(optimizer: Any) -> list[Any]:
    """Of each parameter group of a Keras optimizer the optimizer that it is in."""
    return [part for part in parts_of(optimizer) for _ in range(1 + keeps_out_of_decay(part))]


def _keras_groups(optimizer: Any) -> list[dict[str, Any]]:
    """Names are torch's where Keras has no single attribute for it."""
    own = vars(optimizer)
    decay = own.get("weight_decay") or 0.0
    derived = {
        "lr": float(optimizer.learning_rate),  # of a schedule: the value that it has now
        "betas": (own.get("beta_1"), own.get("beta_2")),
        "nesterov": own.get("nesterov") and own.get("momentum") != 0,  # Keras ignores it without a momentum
        "weight_decay": decay,
        "decoupled_weight_decay": decay != 0,
    }
    decayed = own | derived
    return [decayed, decayed | {"weight_decay": 0.0}] if keeps_out_of_decay(optimizer) else [decayed]


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
        | {"weight_decay": ", decoupled from the gradient as Keras has it"},
    ),
}


def like(optimizer: Any, **changes: Any) -> Rule:
    """The rule that does at the center what an optimizer of ``torch.optim`` or Keras 3 does, with its hyper-parameters.

    Args:
        optimizer: SGD, Adam, AdamW, Adagrad or RMSprop, Keras' Lion, or of a class derived from one of them, or Keras'
            MultiOptimizer of one class. Keras' Adam with a ``weight_decay`` is :class:`AdamW`. Of a learning rate
            schedule of Keras the value is taken that it has now.
        changes: arguments of the rule to set otherwise, in all groups, such as ``lr=0.1``, ``lr="follow"`` or
            ``staleness="sqrt"``.

    Returns:
        The rule; :class:`Groups` where the parameter groups differ in what it takes over. Groups are torch's
        ``param_groups``, or Keras' optimizers in a MultiOptimizer; variables kept out of Keras' weight decay are a
        group that comes after the others of their optimizer.

    Raises:
        ConfigError: the optimizer is another one, or its groups need different slots, or it does something that no rule
            does; the message says what there is instead.
    """
    parts = parts_of(optimizer)
    if not parts:
        raise ConfigError(f"rules.like: {type(optimizer).__name__} has no optimizers yet: build it with its variables.")
    return grouped(rule for part in parts for rule in _like_one(part, changes))


def _like_one(optimizer: Any, changes: dict[str, Any]) -> list[Rule]:
    """One rule per parameter group."""
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
    if unknown := [key for key in changes if key not in {field.name for field in dataclasses.fields(kind)}]:
        raise ConfigError(f"rules.like: {kind.__name__} has no {unknown[0]}. It is {kind.__name__}{_arguments(kind)}.")
    made = []
    for group in groups:
        decoupled = name == "Adam" and group.get("decoupled_weight_decay")
        own = {argument: group[key] for argument, key in names.items()}
        made.append((AdamW if decoupled else kind)(**own | fixed | changes))
    return made


def _arguments(kind: type[Rule]) -> str:
    return f"({', '.join(field.name for field in dataclasses.fields(kind))})"
