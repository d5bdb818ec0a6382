"""A worker's end of the center: its arrays, its anchor, its exchanges and its statistics."""

import itertools
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from . import _core
from .errors import LayoutError, NonFiniteError, NonFiniteWarning, UsageError

if TYPE_CHECKING:
    from .center import Center


class Stats(TypedDict):
    """What one client has done. Staleness counts pushes of blocks: by others, between a pull and the next push."""

    exchanges: int
    """Pushes that the center took."""
    pushes_refused: int
    """Deltas with a NaN or an Inf."""
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
    center_version: int
    """Pushes that every block of the center has had, from all workers."""


class Client:
    """One worker's arrays, and what it last received from the center (its anchor).

    Made by :meth:`Center.client`; the center's own is :attr:`Center.arrays_client`. Methods are not collective.
    """

    def __init__(self, center: "Center", names: Sequence[str], arrays: Sequence[Any], on_nonfinite: str) -> None:
        self._center = center
        self._names = list(names)
        self._arrays = list(arrays)
        self._on_nonfinite = on_nonfinite
        self._native: _core.Client | None = _core.Client(center._open(), register(names, arrays))

    def _open(self) -> _core.Client:
        if self._native is None:
            raise UsageError(f"{self._center.label}: used after close().")
        return self._native

    def exchange(self, steps: float = 1) -> bool:
        """Push ``(arrays - anchor) / steps``, and set arrays and anchor to the center.

        Args:
            steps: local steps since the last exchange, above 0.

        Returns:
            True, or False if the delta had a NaN or an Inf and was refused: then the center was not touched and the
            arrays are set to it.

        Raises:
            NonFiniteError: refused, with ``on_nonfinite="raise"``; center and arrays are as before the call.
            UsageError: the center is closed.
            StallError: a block stayed locked past ``HVD_AGN_STALL_ABORT_SECONDS``.
        """
        native = self._open()
        refused = native.exchange(steps)
        if refused < 0:
            return True
        text = (
            f"{self._center.label}: the update of {self._names[refused]!r} has a NaN or an Inf; this exchange was "
            f"refused and the center is untouched ({native.stats()['pushes_refused']} so far on this rank). "
        )
        if self._on_nonfinite == "raise":
            raise NonFiniteError(text + "The parameters are left as they are; pull() sets them to the center.")
        native.pull()
        warnings.warn(
            text + "The parameters are set back to the center. Check the loss, the learning rate and, if it goes on, "
            "the state of the local optimizer.",
            NonFiniteWarning,
            stacklevel=3,
        )
        return False

    def pull(self) -> None:
        """Set arrays and anchor to the center; what was not pushed is dropped."""
        self._open().pull()

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
            raise LayoutError(f"{self._center.label}: {self._names[index]!r} cannot change its shape.")
        try:
            self._open().bind(index, buffer)
        except ValueError as error:
            raise LayoutError(f"{self._center.label}: {self._names[index]!r}: {error}.") from None
        self._arrays[index] = array

    def read_anchor(self, index: int, out: Any) -> None:
        """Copy the anchor of array ``index`` to ``out``, an array like it."""
        self._open().read_anchor(index, out)

    def write_anchor(self, index: int, values: Any) -> None:
        """Set the anchor of array ``index`` to ``values``, an array like it."""
        self._open().write_anchor(index, values)

    def stats(self) -> Stats:
        """What this client has done so far."""
        return {**self._open().stats(), "center_version": self._center.version}  # type: ignore[typeddict-item]

    @property
    def extra_bytes(self) -> int:
        """Memory that this client takes beyond the arrays: the anchor and bookkeeping."""
        return self._open().extra_bytes

    def _close(self) -> None:
        """Waits for an exchange that another thread has under way."""
        if self._native is not None:
            self._native.close()
        self._native = None
        self._arrays = []


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
        return _core.Buffer(array)
    except (TypeError, ValueError, BufferError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        if "incompatible function arguments" in reason:
            reason = "it is not a writable array on the CPU"
        raise LayoutError(
            f"{name!r} ({type(array).__name__}) cannot be exchanged: {reason}. Give a writable, contiguous NumPy or "
            "DLPack array on the CPU, of float32, float64, float16 or bfloat16."
        ) from None
