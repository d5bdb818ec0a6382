"""A worker whose variables are in a graph of TensorFlow 1, and have values only in a session."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.compat import v1

from ... import rules
from ...alike import Facts
from ...errors import ConfigError, LayoutError, UsageError
from ...worker import Worker
from ..variables import Variables, refuse_unusable


class GraphVariables(Variables):
    """The center is made for them while the graph is built, of zeros; their values come with the first session.

    Raises:
        LayoutError: names a variable that cannot be exchanged.
    """

    def __init__(self, variables: Sequence[Any]) -> None:
        self.exchanged = list(variables)
        self.names = [str(variable.name).removesuffix(":0") for variable in variables]
        for name, variable in zip(self.names, self.exchanged, strict=True):
            if is_ref(variable):
                raise LayoutError(
                    f"{name!r} is a ref variable, which no op of hvd_agn can reach. Make it with tf.get_variable in a "
                    "variable_scope with AGNCustomGetter, or give use_resource=True, or call "
                    "tf.compat.v1.enable_resource_variables() first."
                )
            refuse_unusable(name, variable)
        self._parts, self.group_of = [None], [0] * len(self.names)
        self.sums = []
        self._start = {
            name: np.zeros(variable.shape.as_list(), variable.dtype.as_numpy_dtype)
            for name, variable in zip(self.names, self.exchanged, strict=True)
        }

    def facts(self, optimizer: Any) -> Facts:
        """Hyper-parameters that are numbers, as the optimizers of TensorFlow 1 keep them."""
        numbers = {key.strip("_"): v for key, v in vars(optimizer).items() if isinstance(v, bool | int | float)}
        return Facts({f"the optimizer's {key}": repr(value) for key, value in numbers.items()})


def is_ref(variable: Any) -> bool:
    """Whether it is a variable of TensorFlow 1's own kind, with a buffer that ops are handed as it is."""
    return isinstance(variable, tf.Variable) and not hasattr(variable, "handle")


class GraphWorker(Worker[Variables]):
    """What it does inside of ops, besides what every worker does: begin."""

    _first: tuple[list[np.ndarray], int] = ([], 0)
    _before: int | None = None  # the global step, less the center's version; None: not begun

    @property
    def pushes(self) -> int:
        """The global step: that of rank 0 when training began, and the pushes of all workers since."""
        return (self._before or 0) + self.client.native.latest_version

    def bring(self, step: np.ndarray, *values: np.ndarray) -> None:
        """The global step, and on rank 0 the values that the center is to begin with."""
        self._first = [np.array(value, order="C") for value in values], int(step)

    def perform(self, what: str) -> None:
        """As every worker; "begin": the first time set the center to rank 0's values, and then pull."""
        if what == "begin":
            if self._before is None:
                version = self.center.version  # nobody pushes before all have begun
                self._before = self.center.restart(*self._first) - version
            self._first = [], 0
            self.client.forget()
            what = "pull"
        elif what == "exchange" and self.steps_since_exchange <= 0:
            raise UsageError(
                f"{self.center.label}: a training step in a session that has not begun: give make_session_run_hook() "
                "to MonitoredTrainingSession(hooks=[...]), or run get_init_op() after the initializers."
            )
        super().perform(what)


# By the optimizer's class: the rule, by its arguments the attributes that they are, and what is always given.
_RULES: dict[type, tuple[type[rules.Rule], dict[str, str], dict[str, Any]]] = {
    v1.train.GradientDescentOptimizer: (rules.SGD, {}, {}),
    v1.train.MomentumOptimizer: (rules.SGD, {"momentum": "_momentum", "nesterov": "_use_nesterov"}, {}),
    v1.train.AdamOptimizer: (rules.Adam, {"beta1": "_beta1", "beta2": "_beta2", "eps": "_epsilon"}, {}),
    v1.train.AdagradOptimizer: (
        rules.Adagrad,
        {"initial_accumulator_value": "_initial_accumulator_value"},
        {"eps": 0.0},
    ),
    v1.train.RMSPropOptimizer: (
        rules.RMSprop,
        {"alpha": "_decay", "momentum": "_momentum", "eps": "_epsilon", "centered": "_centered"},
        {"eps_inside_root": True, "initial_square_avg": 1.0},
    ),
}


def refuse_cluster(session: Any, label: str) -> None:
    """Raise ConfigError if the session's operations may run in other processes, where our ops find other workers."""
    tasks = {device.name.split("/device:")[0] for device in session.list_devices()}
    if len(tasks) > 1:
        raise ConfigError(
            f"{label}: the session is one of a cluster of {len(tasks)} tasks: leave tf.train.Server and master= out. "
            "Each rank has a session of its own."
        )


def like(optimizer: Any, bias_correction: str) -> rules.Rule:
    """The rule that does at the center what an optimizer of TensorFlow 1 does; it follows the learning rate.

    Raises:
        ConfigError: there is none, or a hyper-parameter is not known before there is a session.
    """
    known = next((base for base in type(optimizer).__mro__ if base in _RULES), None)
    if known is None:
        raise ConfigError(
            f"there is no rule like {type(optimizer).__name__}, only like {', '.join(k.__name__ for k in _RULES)}. "
            "Name one: rule=rules.SGD('follow') or another of hvd_agn.rules."
        )
    kind, names, fixed = _RULES[known]
    found = {argument: _constant(optimizer, name) for argument, name in names.items()}
    if kind is rules.Adam:
        found["betas"] = (found.pop("beta1"), found.pop("beta2"))
        found["bias_correction"] = bias_correction
    if not found.get("momentum"):
        found.pop("nesterov", None)
    return kind(**{"lr": rules.FOLLOW, **found, **fixed})


def _constant(optimizer: Any, name: str) -> Any:
    value = getattr(optimizer, name)
    value = value() if callable(value) else value
    value = tf.get_static_value(value) if tf.is_tensor(value) else value
    if isinstance(value, bool):
        return value
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ConfigError(
            f"the {name.removeprefix('_')} of {type(optimizer).__name__} has to be a number: the rule at the center "
            "has it from the start. Only the learning rate may change."
        ) from None


def learning_rate(optimizer: Any) -> Any:
    """A tensor of what the optimizer was given: a number, a tensor, or a function that makes one.

    Raises:
        ConfigError: it has none.
    """
    rate = getattr(optimizer, "_lr", getattr(optimizer, "_learning_rate", None))
    if rate is None:
        raise ConfigError(f"the rule follows a learning rate, {type(optimizer).__name__} has none: give it a number.")
    return tf.cast(rate() if callable(rate) else rate, tf.float64)


def adam_powers(optimizer: Any) -> list[tuple[Any, Any]]:
    """Of an Adam: the powers of its betas that its bias correction uses, and the betas."""
    if not isinstance(optimizer, v1.train.AdamOptimizer):
        return []
    return list(zip(optimizer._get_beta_accumulators(), (optimizer._beta1_t, optimizer._beta2_t), strict=True))
