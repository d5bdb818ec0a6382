"""What of an AGNOptimizer goes into files: where its worker is in its period, the center, and the rule.

Keras' files hold the state as an array of bytes, TensorFlow's checkpoints as a string; the bytes are safetensors.
Arrays have numbers, not names: Keras makes names up, and others for a second model of the same process.
"""

import dataclasses
import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import tensorflow as tf

from .. import rules
from ..checkpoint import Resume, WorkerState
from ..errors import CheckpointError, ConfigError
from ..worker import Settings, Worker
from .variables import Variables

_FORMAT = "hvd_agn worker 1"


class State:
    """A worker and a center, as they were.

    Args:
        facts: ``worker``: its counters; ``gradients``: whether it pushes them; ``center``: version, rule, slots,
            identity. Each may be missing.
        tensors: ``anchor/0`` ..., ``snapshot/0`` ..., ``sum/0`` ... of gradients, ``center/0`` ...,
            ``slot/<slot>/0`` ...
    """

    def __init__(self, facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
        self._facts = facts
        self._tensors = tensors

    @classmethod
    def of(cls, worker: Worker[Variables]) -> "State":
        """That of a worker now, whose updates since the exchange are counted.

        While the variables show the center's values, only the center is saved: the model's file has its values.
        """
        tensors: dict[str, np.ndarray] = {}
        facts: dict[str, Any] = {}
        if not worker.viewing_center:
            state = worker.state()
            facts["worker"], facts["gradients"] = state.counters, state.sums is not None
            tensors |= _numbered("anchor", state.anchor) | _numbered("snapshot", state.snapshot or [])
            tensors |= _numbered("sum", state.sums or [])
        center = worker.center.resume()
        facts["center"] = {
            **{"version": center.version, "rule": center.rule, "identity": center.identity},
            "slots": list(center.slots),
        }
        tensors |= _numbered("center", center.center)
        for slot, arrays in center.slots.items():
            tensors |= _numbered(f"slot/{slot}", arrays)
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
        identity = center.get("identity") or secrets.randbits(63)  # of files from before there was one
        return Resume(self._group("center"), slots, center["version"], center["rule"], identity)

    @property
    def worker(self) -> WorkerState | None:
        """The worker; None if the file has none."""
        counters = self._facts.get("worker")
        if counters is None:
            return None
        anchor, snapshot, sums = self._group("anchor"), self._group("snapshot"), None
        if self._facts["gradients"]:
            sums = [self._tensors.get(f"sum/{i}") for i in range(len(anchor))]
        return WorkerState(counters, anchor, snapshot or None, sums)

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


def _numbered(name: str, arrays: Sequence[Any]) -> dict[str, np.ndarray]:
    return {f"{name}/{i}": array for i, array in enumerate(arrays) if array is not None}


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
        return self._waiting is not None and worker.center.resumed and worker.owns(self._waiting.worker)

    def begin(self, worker: Worker[Variables], since: Any) -> None:
        """The worker is there; what waits for it is restored. ``since``: its updates since the last exchange."""
        self._worker, self._since = worker, since
        if self._waiting is not None and self.resume(worker):
            own = self._waiting.worker
            assert own is not None
            worker.restore(own)
            since.assign(worker.steps_since_exchange)
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
        self._load(State.from_bytes(data))

    def load_nothing(self) -> None:
        """What was loaded was saved without a center."""
        self._load(State({}, {}))

    def deserialize(self, string_value: bytes) -> None:
        """From TensorFlow's checkpoint, which sets the variables after this."""
        state, worker = State.from_bytes(string_value), self._worker
        if worker is not None and not worker.center.closed and not worker.owns(state.worker):
            raise CheckpointError(
                f"{worker.center.label}: the checkpoint has another rank's state, or one of another number of ranks. "
                "Restore it before start() and the first step: then this rank takes the center over."
            )
        self._load(state, merge=False)

    def _load(self, state: State, *, merge: bool = True) -> None:
        worker = self._worker
        if worker is None:
            self._waiting = state
            return
        if worker.center.closed:
            return
        try:
            state.check(worker.arrays)
        except CheckpointError as error:
            raise CheckpointError(f"{worker.center.label}: {error}") from None
        worker.check_state(state.center)
        own = state.worker
        if own is not None and own.snapshot is not None and not merge:  # it counts from there what was not pushed
            own = own._replace(anchor=own.snapshot, snapshot=None)
        worker.load(own, state.center)
        self._since.assign(worker.steps_since_exchange)


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
