"""The variables of a Keras optimizer as a center sees them: which take part, and under which names."""

import json
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from ..alike import Facts, checksum
from ..client import Client
from ..errors import LayoutError
from ..rules.like import keeps_out_of_decay, parts_by_group, parts_of

_DTYPES = (tf.float32, tf.float64, tf.float16, tf.bfloat16)


def plain(variable: Any) -> Any:
    """TensorFlow's variable inside Keras' one."""
    return variable.value if isinstance(variable, keras.Variable) else variable


class Variables:
    """Those that take part, each once. The others are Keras' to overwrite, such as the scales of float8.

    Args:
        variables: Keras' or TensorFlow's, as they were handed to the optimizer.
        optimizer: Keras' own, built, for its parameter groups.

    Raises:
        LayoutError: names a variable that cannot be exchanged.
    """

    def __init__(self, variables: Sequence[Any], optimizer: Any) -> None:
        self.exchanged: list[tf.Variable] = []
        self.names: list[str] = []
        self.group_of: list[int] = []
        self._parts = parts_by_group(optimizer)
        group_of = _groups_of(optimizer)
        seen: set[int] = set()
        for variable in variables:
            value = plain(variable)
            name = str(getattr(variable, "path", None) or variable.name)
            if getattr(variable, "overwrite_with_gradient", False) or id(value) in seen:
                continue
            refuse_unusable(name, value)
            seen.add(id(value))
            self.exchanged.append(value)
            self.group_of.append(group_of.get(id(value), 0))
            self.names.append(name if name not in self.names else f"{name}#{len(self.names)}")
        self._left_out = [v for v in variables if getattr(v, "overwrite_with_gradient", False)]
        self.sums: list[np.ndarray] = []
        """The core's memory of what is accumulated for each, if gradients are pushed."""
        self._start: dict[str, np.ndarray] | None = {
            name: np.array(value.numpy(), order="C") for name, value in zip(self.names, self.exchanged, strict=True)
        }

    def facts(self, optimizer: Any) -> Facts:
        """What the ranks should have alike besides: hyper-parameters, and variables that do not take part."""
        values = {f"variable {v.path!r}, which is not exchanged,": _checksum(plain(v)) for v in self._left_out}
        for number, part in enumerate(parts_of(optimizer)):
            owner = "the optimizer's" if part is optimizer else f"optimizer {number}'s"
            values |= {f"{owner} {key}": text for key, text in _settings(part).items()}
        return Facts(values)

    def tensors(self) -> dict[str, np.ndarray]:
        """Name -> a copy of its value; only until :meth:`settle`."""
        assert self._start is not None
        return self._start

    def ids(self) -> set[int]:
        """Identities of the variables that take part."""
        return {id(value) for value in self.exchanged}

    @property
    def groups(self) -> int:
        """Of the optimizer's parameters."""
        return len(self._parts)

    def rates(self) -> tf.Tensor:
        """The learning rate of each group in its last update, float64."""
        return tf.stack([tf.cast(_rate_of(part), tf.float64) for part in self._parts])

    def settle(self, client: Client) -> None:
        """Set the variables to what the center has made of the copies; from now on ops bring them."""
        assert self._start is not None
        for variable, value in zip(self.exchanged, self._start.values(), strict=True):
            variable.assign(value)
        self.keep(client)

    def keep(self, client: Client) -> None:
        """Leave the variables as they are; from now on ops bring them."""
        client.unbind()
        self._start = None

    def anchor(self, client: Client) -> list[np.ndarray]:
        """A copy of the anchor of each."""
        return self._copies(client.read_anchor)

    def snapshot(self, client: Client) -> list[np.ndarray]:
        """A copy of what an exchange in the background has pushed of each."""
        return self._copies(client.read_snapshot)

    def _copies(self, read: Callable[[int, np.ndarray], None]) -> list[np.ndarray]:
        copies = [np.empty(variable.shape, variable.dtype.as_numpy_dtype) for variable in self.exchanged]
        for i, values in enumerate(copies):
            read(i, values)
        return copies

    def merge(self, anchor: Sequence[np.ndarray], snapshot: Sequence[np.ndarray]) -> None:
        """Add the difference to each."""
        for variable, center, pushed in zip(self.exchanged, anchor, snapshot, strict=True):
            variable.assign_add((center - pushed).astype(variable.dtype.as_numpy_dtype))

    def set_anchor(self, client: Client, anchor: Sequence[np.ndarray]) -> None:
        """Set the anchor of each."""
        for i, (variable, values) in enumerate(zip(self.exchanged, anchor, strict=True)):
            client.write_anchor(i, np.array(values, variable.dtype.as_numpy_dtype, order="C"))

    def values(self) -> list[np.ndarray]:
        """Copies of their values."""
        return [np.array(variable.numpy(), order="C") for variable in self.exchanged]

    def assign(self, values: Sequence[Any]) -> None:
        """Set them to arrays of their shapes."""
        for variable, value in zip(self.exchanged, values, strict=True):
            variable.assign(value.astype(variable.dtype.as_numpy_dtype))

    def accumulated(self, client: Client) -> list[np.ndarray | None]:
        """A copy of the sum of gradients of each; None where there has been none."""
        return [sums.copy() if touched else None for sums, touched in zip(self.sums, client.touched, strict=True)]

    def set_accumulated(self, client: Client, sums: Sequence[np.ndarray | None]) -> None:
        """Set them to what :meth:`accumulated` returned."""
        for own, values in zip(self.sums, sums, strict=True):
            if values is not None:
                own[...] = values
        client.touch([values is not None for values in sums])

    def read(self, client: Client) -> None:
        """Nothing: the op that calls has brought them."""

    def write_back(self) -> None:
        """Nothing: the op takes them back."""

    def copy(self) -> list[tf.Tensor]:
        """Their values, to be put back."""
        return [tf.identity(variable) for variable in self.exchanged]

    def put_back(self, copy: list[tf.Tensor]) -> None:
        """Set them to what :meth:`copy` returned."""
        for variable, value in zip(self.exchanged, copy, strict=True):
            variable.assign(value)


def _settings(optimizer: Any) -> dict[str, str]:
    """In words; nothing of one that cannot be put into them, such as a schedule without a configuration."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a rate that is a lambda
        try:
            return {key: _text(value) for key, value in optimizer.get_config().items() if key != "name"}
        except Exception:
            return {}


def _checksum(variable: tf.Variable) -> str:
    value = np.ascontiguousarray(variable.numpy())
    return checksum(value.reshape(-1).view(np.uint8), f"{variable.dtype.name}{list(variable.shape)}")


def _text(value: Any) -> str:
    """Of a configuration, which holds what JSON does; the same on every rank."""
    return json.dumps(value, sort_keys=True, default=lambda each: type(each).__qualname__)[:200]


def _rate_of(optimizer: Any) -> Any:
    rate = getattr(optimizer, "_learning_rate", None)
    if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):  # which is at the next update already
        return rate(tf.maximum(tf.convert_to_tensor(optimizer._iterations) - 1, 0))
    return optimizer.learning_rate


def _groups_of(optimizer: Any) -> dict[int, int]:
    """id of a variable -> the number of its parameter group, as :func:`hvd_agn.rules.like` has them."""
    groups, first = {}, 0
    for part in parts_of(optimizer):
        for variable in getattr(part, "_trainable_variables", ()):  # not of one without variables
            kept_out = keeps_out_of_decay(part) and not part._use_weight_decay(variable)
            groups[id(plain(variable))] = first + kept_out
        first += 1 + keeps_out_of_decay(part)
    return groups


def refuse_unusable(name: str, value: Any) -> None:
    """Raise LayoutError, naming it, unless it is a variable that can be exchanged."""
    reason = None
    if isinstance(value, tf.distribute.DistributedValues):
        reason = "belongs to a tf.distribute strategy; hvd_agn takes its place: build the model outside of the scope"
    elif not isinstance(value, tf.Variable):
        reason = f"is a {type(value).__name__}; use a variable"
    elif value.dtype not in _DTYPES:
        reason = f"is {value.dtype.name}; use float32, float64, float16 or bfloat16"
    elif not value.shape.is_fully_defined():
        reason = f"has the shape {value.shape}; use one that is fully defined"
    if reason:
        raise LayoutError(f"{name!r} cannot be exchanged: it {reason}.")
