"""What of an AGNOptimizer goes into files: where its worker is in its period, on rank 0 the center, and the rule.

Keras' files hold the state as an array of bytes, TensorFlow's checkpoints as a string; the bytes are safetensors.
Arrays have numbers, not names: Keras makes names up, and others for a second model of the same process.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import tensorflow as tf

from .. import rules
from ..checkpoint import Resume
from ..errors import CheckpointError, ConfigError
from ..worker import Settings, Worker
from .variables import Variables

_FORMAT = "hvd_agn worker 1"


class State:
    """A worker, and on rank 0 the center, as they were.

    Args:
        facts: ``worker``: its counters; ``gradients``: whether it pushes them; ``center``: version, rule, slots. Each
            may be missing.
        tensors: ``anchor/0`` ..., ``sum/0`` ... of gradients, ``value/0`` ..., ``center/0`` ..., ``slot/<slot>/0`` ...
    """

    def __init__(self, facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
        self._facts = facts
        self._tensors = tensors

    @classmethod
    def of(cls, worker: Worker[Variables]) -> "State":
        """That of a worker now, whose updates since the exchange are counted. Ends an exchange in the background.

        While the variables show the center's values, only the center is saved: the model's file has its values.
        """
        tensors: dict[str, np.ndarray] = {}
        facts: dict[str, Any] = {}
        if not worker.viewing_center:
            if worker.client.started:  # the file may have the values of before already
                worker.land()
                tensors |= _numbered("value", [variable.numpy() for variable in worker.arrays.exchanged])
            facts["worker"], facts["gradients"] = worker.counters(), worker.settings.gradients
            tensors |= _numbered("anchor", worker.arrays.anchor(worker.client))
            tensors |= _numbered("sum", worker.arrays.sums, worker.client.touched)
        if worker.center.rank == 0:
            center, slots, version = worker.center._read()
            facts["center"] = {"version": version, "rule": repr(worker.center.rule), "slots": list(slots)}
            tensors |= _numbered("center", list(center.values()))
            for slot, arrays in slots.items():
                tensors |= _numbered(f"slot/{slot}", list(arrays.values()))
        return cls(facts, tensors)

    def to_bytes(self) -> bytes:
        """For a file."""
        tensors = {name: _as_numpy_has_it(array) for name, array in self._tensors.items()}
        data: bytes = safetensors.numpy.save(tensors, {"format": _FORMAT, "facts": json.dumps(self._facts)})
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> "State":
        """What :meth:`to_bytes` gave.

        Raises:
            CheckpointError: it did not.
        """
        try:
            tensors = safetensors.numpy.load(data)
            head = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
            facts = json.loads(head["facts"]) if head["format"] == _FORMAT else None
        except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"the file's state of an AGNOptimizer cannot be read: {error}.") from None
        if facts is None:
            raise CheckpointError(f"the file's state of an AGNOptimizer is {head['format']!r}, not {_FORMAT!r}.")
        return cls(facts, tensors)

    @property
    def center(self) -> Resume | None:
        """The center, for one to begin with; None if the file has none."""
        center = self._facts.get("center")
        if center is None:
            return None
        slots = {slot: self._group(f"slot/{slot}") for slot in center["slots"]}
        return Resume(self._group("center"), slots, center["version"], center["rule"])

    def _group(self, name: str) -> list[np.ndarray]:
        return [
            self._tensors[f"{name}/{i}"] for i in range(sum(key.rpartition("/")[0] == name for key in self._tensors))
        ]

    def check(self, variables: Variables) -> None:
        """Raise CheckpointError if the worker's anchor is that of other variables."""
        if self._facts.get("worker") is None:
            return
        found = [anchor.shape for anchor in self._group("anchor")]
        expected = [tuple(variable.shape) for variable in variables.exchanged]
        if found != expected:
            names = [*variables.names, *(f"variable {i}" for i in range(len(expected), len(found)))]
            padded = zip(names, [*expected, *[None] * len(found)], [*found, *[None] * len(expected)], strict=False)
            name, here, there = next(each for each in padded if each[1] != each[2])
            raise CheckpointError(f"{name!r} is {here} here and {there} in the file. Load it into the same model.")

    def belongs_to(self, worker: Worker[Variables]) -> bool:
        """Whether it is this worker's: of its rank, among as many, that pushes the same."""
        counters = self._facts.get("worker")
        return counters is not None and worker.owns(counters) and self._facts["gradients"] == worker.settings.gradients

    def restore(self, worker: Worker[Variables]) -> None:
        """Make the worker what it was; it is its own state."""
        worker.restore(self._facts["worker"])
        worker.arrays.set_anchor(worker.client, self._group("anchor"))
        if worker.arrays.sums:
            touched = [f"sum/{i}" in self._tensors for i in range(len(worker.arrays.sums))]
            for i, sums in enumerate(worker.arrays.sums):
                if touched[i]:
                    sums[...] = self._tensors[f"sum/{i}"]
            worker.client.touch(touched)
        for variable, value in zip(worker.arrays.exchanged, self._group("value"), strict=False):
            variable.assign(value.astype(variable.dtype.as_numpy_dtype))


def _numbered(name: str, arrays: list[np.ndarray], chosen: list[bool] | None = None) -> dict[str, np.ndarray]:
    return {f"{name}/{i}": array for i, array in enumerate(arrays) if chosen is None or chosen[i]}


def _as_numpy_has_it(array: np.ndarray) -> np.ndarray:
    """bfloat16, which is none of NumPy's own types, as float32, which holds it exactly."""
    return np.asarray(array, np.float32 if array.dtype.name == "bfloat16" else None, order="C")


class Files(tf.train.experimental.PythonState):
    """Saves and loads a worker's state, for Keras' files, and for the checkpoints of TensorFlow, which tracks this.

    What is loaded before there is a worker waits for it: Keras loads a model before it trains.
    """

    def __init__(self) -> None:
        self._worker: Worker[Variables] | None = None
        self._since: Any = None
        self._waiting: State | None = None

    @property
    def center(self) -> Resume | None:
        """What waits for a center."""
        return self._waiting.center if self._waiting else None

    def checked(self, variables: Variables) -> Variables:
        """The variables, unless what waits is of others: CheckpointError."""
        if self._waiting is not None:
            self._waiting.check(variables)
        return variables

    def resume(self, worker: Worker[Variables]) -> bool:
        """Whether a worker that has been made, with its center, is the one that waits."""
        return self._waiting is not None and worker.center.resumed and self._waiting.belongs_to(worker)

    def begin(self, worker: Worker[Variables], since: Any) -> None:
        """The worker is there; what waits for it is restored. ``since``: its updates since the last exchange."""
        self._worker, self._since = worker, since
        if self._waiting is not None and self.resume(worker):
            self._restore(self._waiting)
        self._waiting = None

    def serialize(self) -> bytes:
        """For a file. TensorFlow reads the variables after this, Keras before."""
        worker = self._worker
        if worker is None or worker.center.closed:
            return (self._waiting or State({}, {})).to_bytes()
        worker.steps_since_exchange = int(self._since)
        return State.of(worker).to_bytes()

    def load(self, data: bytes) -> None:
        """From Keras' file, which has set the variables before."""
        self._load(State.from_bytes(data), Worker.pull)

    def deserialize(self, string_value: bytes) -> None:
        """From TensorFlow's checkpoint, which sets the variables after this."""
        self._load(State.from_bytes(string_value), _refuse_another)

    def _load(self, state: State, of_another: Callable[[Worker[Variables]], None]) -> None:
        worker = self._worker
        if worker is None:
            self._waiting = state
            return
        if worker.center.closed:
            return
        worker.before_load()
        try:
            state.check(worker.arrays)
        except CheckpointError as error:
            raise CheckpointError(f"{worker.center.label}: {error}") from None
        if state.belongs_to(worker):
            self._restore(state)
        else:
            of_another(worker)

    def _restore(self, state: State) -> None:
        assert self._worker is not None
        state.restore(self._worker)
        self._since.assign(self._worker.steps_since_exchange)


def _refuse_another(worker: Worker[Variables]) -> None:
    raise CheckpointError(
        f"{worker.center.label}: the checkpoint has another rank's state, or one of another number of ranks. Restore "
        "it before start() and the first step: then this rank takes the center over."
    )


# ---- a configuration


def config_of(settings: Settings) -> dict[str, Any]:
    """The arguments in words of JSON, but for ``comm``.

    Raises:
        ConfigError: the rule is a function.
    """
    rule = settings.rule
    if rule is not None and any(isinstance(each, rules.Custom) for each in rule.each):
        raise ConfigError(
            f"{rule} is a function, which no configuration can hold: save the weights (model.save_weights), which "
            "hold this optimizer's state too, and load them into a model that was compiled with the same rule."
        )
    arguments = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    del arguments["comm"]
    if rule is not None:
        arguments["rule"] = _words(rule)
    if not isinstance(settings.center_ranks, str):
        arguments["center_ranks"] = [int(rank) for rank in settings.center_ranks]
    return arguments


def _words(rule: rules.Rule) -> dict[str, Any]:
    given = {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule) if field.init}
    if isinstance(rule, rules.Groups):
        given["rules"] = [_words(each) for each in rule.rules]
    return {"class_name": type(rule).__name__, "config": given}


def rule_of(config: Mapping[str, Any] | None) -> rules.Rule | None:
    """The rule that :func:`config_of` put into words."""
    if config is None:
        return None
    kind = getattr(rules, config["class_name"], None)
    if not (isinstance(kind, type) and issubclass(kind, rules.Rule)):
        raise ConfigError(f"there is no rule {config['class_name']!r} in hvd_agn.rules.")
    given = dict(config["config"])
    if kind is rules.Groups:
        given["rules"] = [rule_of(each) for each in given["rules"]]
    return kind(**given)
