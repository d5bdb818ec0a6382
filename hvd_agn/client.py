"""A worker's end of the center: its arrays, its anchor, its exchanges and its statistics."""

import itertools
import numbers
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import numpy as np

from . import _core, shutdown
from .errors import (
    LayoutError,
    NonFiniteError,
    NonFiniteWarning,
    RestoredError,
    RuleError,
    RuleOverflowWarning,
    UsageError,
    say,
    warn,
)
from .rules import Rule

_ACCEPTED, _TOO_FAR = -1, -2  # from the core, else the number of an array


class Stats(TypedDict):
    """What one client has done. Staleness counts pushes of blocks: by others, between a pull and the next push."""

    exchanges: int
    """Pushes that the center took."""
    pushes_refused: int
    """Deltas with a NaN or an Inf, or above ``max_norm``."""
    blocks_refused: int
    """Blocks left as they were because the rule would have overflowed there."""
    pulls: int
    """Calls of ``pull()``, and those after a refused push."""
    staleness_mean: float
    staleness_max: int
    staleness_histogram: list[int]
    """Element t: block pushes of staleness t; element 64: of 64 and more."""
    exchange_seconds: float
    """Spent in exchanges, pulls and looks at the center."""
    bytes: int
    """Of parameters, pushed and pulled, the first copy included."""
    wire_bytes: int
    """Of these, in the form in which they went to and came from other nodes."""
    center_version: int
    """Pushes that every block of the center has had, from all workers; of blocks on other nodes, as last received."""


class Client:
    """One worker's arrays, and what it last received from the center (its anchor).

    Made by :meth:`Center.client`; the center's own is :attr:`Center.arrays_client`. Methods are not collective.
    """

    def __init__(
        self,
        center: _core.Center,
        names: Sequence[str],
        arrays: Sequence[Any],
        *,
        label: str,
        rule: Rule,
        groups: int,
        on_nonfinite: str,
        max_norm: float | None,
        wire_dtype: str | None,
        overlap: bool,
        gradients: bool,
        on_close: "Callable[[Client], None]",
        epoch: int,
    ) -> None:
        self._label = label
        self._rule = rule
        self._groups = groups
        self._on_close = on_close
        self._names = list(names)
        self._arrays = list(arrays)
        self._on_nonfinite = on_nonfinite
        self._max_norm = max_norm
        self._blocks_refused = 0
        self._held_back: dict[type[Warning], int] = {}  # by kind, once there was a warning
        self._native: _core.Client | None = None
        buffers = register(names, arrays)
        while self._native is None:
            try:
                self._native = _core.Client(
                    center, buffers, wire_dtype or "none", overlap, gradients, max_norm or 0.0, epoch
                )
            except RestoredError:  # rank 0 was fast
                epoch += 1

    def _open(self) -> _core.Client:
        if self._native is None:
            raise shutdown.used_after_close(self._label)
        return self._native

    @property
    def native(self) -> _core.Client:
        """The core's client, for ops that call it."""
        return self._open()

    def accumulate(self, gradients: Sequence[Any]) -> None:
        """Add a local step's gradients to those since the last exchange; for ``accumulate="gradients"``.

        Args:
            gradients: one per array, of its size, contiguous and writable; None where there is none. An array without
                any gradient since its last push is neither pushed nor pulled by the next exchange.

        Raises:
            LayoutError: a gradient does not match its array; nothing was added.
            UsageError: the center pushes updates.
        """
        buffers = [
            None if gradient is None else _buffer(f"the gradient of {name}", gradient)
            for name, gradient in zip(self._names, gradients, strict=False)
        ]
        if len(gradients) != len(self._names):
            raise LayoutError(f"{self._label}: {len(gradients)} gradients for {len(self._names)} arrays.")
        try:
            self._open().accumulate(buffers)
        except ValueError as error:
            raise LayoutError(f"{self._label}: {error}.") from None

    def accumulators(self) -> list[np.ndarray]:
        """What is accumulated for each array, in its shape and the center's type: the memory itself.

        Whoever adds to one calls :meth:`touch` with True in its place.
        """
        native = self._open()
        return [native.accumulator(i).reshape(tuple(a.shape)) for i, a in enumerate(self._arrays)]

    @property
    def touched(self) -> list[bool]:
        """Of each array: whether it has had a gradient since its last push."""
        return self._open().touched

    def touch(self, arrays: Sequence[bool]) -> None:
        """Say which arrays have had a gradient."""
        self._open().touch(list(arrays))

    def exchange(self, steps: float = 1, *, exact: bool = False, lr: float | Sequence[float] | None = None) -> bool:
        """Push ``(arrays - anchor) / steps``, and set arrays and anchor to the center.

        With ``rules.Elastic``: push the arrays, and move them towards the center.
        With ``accumulate="gradients"``: push the accumulated gradients divided by ``steps``, and drop them.

        Args:
            steps: local steps since the last exchange, above 0.
            exact: push in the center's own type, with all that ``wire_dtype`` has rounded away so far.
            lr: this worker's learning rate now, for a rule with ``lr="follow"``, and for no other; of several groups
                one for all, or one for each.

        Returns:
            True, or False if the delta had a NaN or an Inf, or was above ``max_norm``, and was refused: then the
            center was not touched and the arrays are set to it.

        Raises:
            NonFiniteError: refused, with ``on_nonfinite="raise"``; center and arrays are as before the call.
            UsageError: the center is closed, an exchange is under way in the background, or ``lr`` is missing.
            RuleError: the function of a ``rules.Custom`` failed. What was not pushed is pushed by the next exchange.
            StallError: a wait lasted longer than ``HVD_AGN_STALL_ABORT_SECONDS``. What was not pushed is still in the
                arrays, or the accumulators, for the next exchange.
            RestoredError: an optimizer on rank 0 has set the center to a checkpoint; :meth:`pull` takes it over.
        """
        rates = self._rates(lr)
        return self._accept(lambda native: native.exchange(steps, exact, rates))

    def _accept(self, exchange: Callable[[_core.Client], int]) -> bool:
        native = self._open()
        try:
            refused = exchange(native)
        except RuleError as error:
            raise RuleError(
                f"{self._label}: {error}. The blocks concerned stay as they were; what was to be pushed to them "
                "goes into the next exchange."
            ) from None
        if refused == _ACCEPTED:
            self._warn_of_refused_blocks(native.blocks_refused)
            return True
        if refused == _TOO_FAR:
            bound = f"max_norm={self._max_norm}" if self._max_norm else "what clip_norm can be taken of"
            what = f"the update has a norm of {native.refused_norm:.6g}, above {bound}"
        else:
            what = f"the update of {self._names[refused]!r} has a NaN or an Inf"
        text = (
            f"{self._label}: {what}; this exchange was refused and the center is untouched "
            f"({native.stats()['pushes_refused']} so far on this rank). "
        )
        if self._on_nonfinite == "raise":
            raise NonFiniteError(text + "The parameters are left as they are; pull() sets them to the center.")
        self.pull()
        self._warn_once(
            text + "The parameters are set back to the center. Check the loss, the learning rate and, if it goes on, "
            "the state of the local optimizer.",
            NonFiniteWarning,
        )
        return False

    def _warn_of_refused_blocks(self, count: int) -> None:
        refused, self._blocks_refused = count - self._blocks_refused, count
        if refused > 0:
            self._warn_once(
                f"{self._label}: {self._rule} overflowed in {refused} blocks of the center. They stay as "
                "they were, and this worker's update of them is dropped. Check the learning rate.",
                RuleOverflowWarning,
            )

    def _warn_once(self, text: str, category: type[Warning]) -> None:
        """Warn of the first of a kind; of later ones :meth:`close` tells the number."""
        first = category not in self._held_back
        held_back = warn(text, category, first)
        self._held_back[category] = self._held_back.get(category, 0) + held_back

    def _tell_held_back(self) -> None:
        if more := self._held_back.get(NonFiniteWarning):
            say(f"{self._label}: {more} more exchanges were refused after the one that was warned of.")
        if more := self._held_back.get(RuleOverflowWarning):
            say(f"{self._label}: {self._rule} overflowed in {more} more exchanges after the one that was warned of.")

    def start(self, steps: float = 1, *, lr: float | Sequence[float] | None = None) -> None:
        """Begin an exchange of the arrays as they are now, in the background; they may change meanwhile.

        Args:
            steps: local steps since the last exchange began, above 0.
            lr: as of :meth:`exchange`.

        Raises:
            UsageError: the client was not made with ``overlap=True``, an exchange is under way, or ``lr`` is missing.
        """
        self._open().start(steps, self._rates(lr))

    def _rates(self, lr: float | Sequence[float] | None) -> list[float]:
        if (lr is None) == self._rule.follows:
            what = "needs the worker's learning rate: give lr=" if lr is None else "has its own learning rate: no lr="
            raise UsageError(f"{self._label}: {self._rule} {what}.")
        if lr is None:
            return []
        rates: list[Any] = list(lr) if isinstance(lr, Sequence | np.ndarray) and np.ndim(lr) else [lr] * self._groups
        if len(rates) != self._groups:
            raise UsageError(
                f"{self._label}: lr={lr!r}: give one number, or one for each of the {self._groups} groups."
            )
        if not all(isinstance(rate, numbers.Real) and 0 <= float(rate) < float("inf") for rate in rates):
            raise UsageError(f"{self._label}: lr={lr!r}: give a finite number, 0 or more.")
        return [float(rate) for rate in rates]

    @property
    def started(self) -> bool:
        """Whether an exchange is under way in the background, or waits for :meth:`finish`."""
        return self._open().started

    @property
    def ready(self) -> bool:
        """Whether :meth:`finish` would not wait."""
        return self._open().ready

    def finish(self) -> bool:
        """Wait for the exchange that :meth:`start` began; then add to the arrays what the center had that they had not.

        ``arrays <- arrays + (center - arrays at start())``, ``anchor <- center``: what was done to the arrays since
        :meth:`start` stays, and is part of the next push.

        Returns:
            As :meth:`exchange`. If the push was refused, what was done since is dropped too.

        Raises:
            As :meth:`exchange`, for what happened in the background.
        """
        return self._accept(_core.Client.finish)

    @property
    def owes(self) -> bool:
        """Whether ``wire_dtype`` has rounded something away that later exchanges will push."""
        return self._open().owes

    def pull(self) -> None:
        """Set arrays and anchor to the center; what was not pushed or is accumulated is dropped.

        After a RestoredError too: then this client has taken over the checkpoint that the center was set to.
        """
        native, epoch = self._open(), self.epoch
        while True:
            try:
                native.pull()
                return
            except RestoredError:
                native.epoch += 1
            except BaseException:  # cut short: it has not taken anything over
                native.epoch = epoch
                raise

    @property
    def epoch(self) -> int:
        """How often the center had been set to a checkpoint when it became this client's anchor."""
        return self._open().epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._open().epoch = epoch

    def forget(self) -> None:
        """Owe the center nothing: it is another now than what was rounded away or accumulated was meant for."""
        self._open().forget()

    def peek(self) -> None:
        """Set the arrays to the center and leave the anchor: a look that the next exchange must not see."""
        self._open().peek()

    def rebind(self, index: int, array: Any) -> None:
        """Array ``index`` is now ``array``, of the same shape and type: its storage has moved.

        Raises:
            LayoutError: it is not; the old array stays.
        """
        buffer = _buffer(self._names[index], array)
        if tuple(array.shape) != tuple(self._arrays[index].shape):
            raise LayoutError(f"{self._label}: {self._names[index]!r} cannot change its shape.")
        try:
            self._open().bind(index, buffer)
        except ValueError as error:
            raise LayoutError(f"{self._label}: {self._names[index]!r}: {error}.") from None
        self._arrays[index] = array

    def unbind(self) -> None:
        """The arrays are nowhere from now on: they are the variables of a framework, whose ops bring them."""
        self._open().unbind()
        self._arrays = []

    def read_anchor(self, index: int, out: Any) -> None:
        """Copy the anchor of array ``index`` to ``out``, an array like it. Waits for an exchange in the background."""
        self._open().read_anchor(index, _buffer(self._names[index], out))

    def read_snapshot(self, index: int, out: Any) -> None:
        """Between :meth:`start` and :meth:`finish`, which will add the anchor less this to array ``index``.

        Waits for the exchange to end.
        """
        self._open().read_snapshot(index, _buffer(self._names[index], out))

    def write_anchor(self, index: int, values: Any) -> None:
        """Set the anchor of array ``index`` to ``values``, an array like it."""
        self._open().write_anchor(index, _buffer(self._names[index], values))

    def stats(self) -> Stats:
        """What this client has done so far."""
        return self._open().stats()  # type: ignore[return-value]

    @property
    def versions(self) -> list[int]:
        """Of the center's blocks, as last pulled: what staleness is counted from.

        Setting a list of another length sets them all to its largest.
        """
        return self._open().versions

    @versions.setter
    def versions(self, versions: Sequence[int]) -> None:
        self._open().versions = list(versions)

    @property
    def power(self) -> float:
        """Local steps and pushes so far, added up: what ``Adam(bias_correction="tf_contrib")`` counts by."""
        return self._open().power

    @power.setter
    def power(self, value: float) -> None:
        self._open().power = value

    @property
    def extra_bytes(self) -> int:
        """Bytes that this client takes beyond the arrays: the anchor, the rank's mailbox, and bookkeeping.

        With ``overlap`` one more copy of the arrays, and with a ``wire_dtype`` one more copy of what is on other nodes.
        """
        return self._open().extra_bytes

    def close(self) -> None:
        """This client is done; its arrays stay as they are. Again: does nothing. ``Center.close()`` closes them all.

        What was not pushed is dropped. Waits for an exchange that another thread, or the background, has under way.
        """
        if self._native is None:
            return
        self._native.close()
        self._native = None
        self._tell_held_back()
        self._arrays = []
        self._on_close(self)


def register(names: Sequence[str], arrays: Sequence[Any]) -> list[_core.Buffer]:
    """Native descriptions of arrays.

    Raises:
        LayoutError: names an array that is of a wrong kind, or two that share memory.
    """
    buffers = [_buffer(name, array) for name, array in zip(names, arrays, strict=True)]
    spans = sorted((b.address, b.address + b.nbytes, n) for b, n in zip(buffers, names, strict=True) if b.count)
    for (_, end, first), (start, _, second) in itertools.pairwise(spans):
        if start < end:
            raise LayoutError(f"{first!r} and {second!r} share memory. Give each array once, or a copy of one.")
    return buffers


def _buffer(name: str, array: Any) -> _core.Buffer:
    try:
        if isinstance(array, np.ndarray) and array.dtype.name == "bfloat16":  # of ml_dtypes: NumPy knows but its size
            return _core.Buffer.of_bfloat16(array.view(np.uint16))
        return _core.Buffer(array)
    except (TypeError, ValueError, BufferError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        if "incompatible function arguments" in reason:
            reason = "it is not a writable array on the CPU"
        raise LayoutError(
            f"{name!r} ({type(array).__name__}) cannot be exchanged: {reason}. Give a writable, contiguous NumPy or "
            "DLPack array on the CPU, of float32, float64, float16 or bfloat16."
        ) from None
