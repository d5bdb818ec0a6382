"""Every exception and warning that hvd_agn raises, one type per kind. The native core raises these too."""

import sys
import warnings
from types import FrameType
from typing import TYPE_CHECKING, Any


class AGNError(Exception):
    """Base of all errors of hvd_agn."""

    # Not that of a second base: TensorFlow's autograph makes an error anew, with the place in the user's code, and does
    # so with the same class only if that has no __init__ but Exception's.
    if not TYPE_CHECKING:
        __init__ = Exception.__init__


class ConfigError(AGNError, ValueError):
    """An argument or an environment variable has a value that is not one of its choices."""


class LaunchError(AGNError, RuntimeError):
    """The processes were not started in a way that lets them talk to each other through MPI."""


class LayoutError(AGNError, ValueError):
    """An array cannot be exchanged, or the ranks do not have the same arrays."""


class SharedMemoryError(AGNError, MemoryError):
    """The shared-memory file system has no room for the center."""


class NonFiniteError(AGNError, FloatingPointError):
    """A delta has a NaN or an Inf, or is above ``max_norm``, and ``on_nonfinite="raise"`` was asked for."""


class CheckpointError(AGNError, ValueError):
    """A saved center or optimizer state does not fit this one."""


class UsageError(AGNError, RuntimeError):
    """A call that makes no sense now: after ``close()``, or on an optimizer that has started."""


class MPIError(AGNError, RuntimeError):
    """An MPI call failed; the message has the rank, the operation and MPI's own text."""


class RuleError(AGNError, RuntimeError):
    """The function of a :class:`hvd_agn.rules.Custom` has failed; the blocks concerned stay as they were."""


class StallError(AGNError, TimeoutError):
    """A wait lasted longer than ``HVD_AGN_STALL_ABORT_SECONDS``."""


class RestoredError(AGNError, RuntimeError):
    """The center was set to a checkpoint that this rank has not loaded; nothing was pushed."""


class NonFiniteWarning(RuntimeWarning):
    """A delta with a NaN or an Inf, or above ``max_norm``, was refused."""


class RuleOverflowWarning(NonFiniteWarning):
    """A rule took blocks of the center beyond their type; they stay as they were."""


class RestoredWarning(RuntimeWarning):
    """The center was set to a checkpoint, and this rank, which did not load it, has taken the center over."""


class StalenessWarning(RuntimeWarning):
    """More workers per period than published runs of AGN train well with."""


class RankDifferenceWarning(RuntimeWarning):
    """Something differs from rank 0 that the center does not make equal, or may differ without being seen."""


class UsageWarning(UserWarning):
    """A call that makes sense only after something else, which was done for you."""


_FRAMEWORKS = ("hvd_agn.", "torch.", "tensorflow.", "keras.")


def say(text: str) -> None:
    """A line on stderr, for what is neither an error nor a warning of this place in the code."""
    print(text, file=sys.stderr, flush=True)


def warn(message: str, category: type[Warning], first: bool = True) -> bool:
    """Warn, at the line of the user's code that led here.

    Args:
        first: False: only if a filter makes an error of it.

    Returns:
        Whether it was held back, though a filter would have let it through.
    """
    level, frame = 2, sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").startswith(_FRAMEWORKS):
        level, frame = level + 1, frame.f_back  # type: ignore[assignment]
    if first or (action := _action(message, category, frame)) == "error":
        warnings.warn(message, category, stacklevel=level)
        return False
    return action != "ignore"


def _action(message: str, category: type[Warning], frame: FrameType | None) -> str:
    """What the filters say of a warning at a frame, as ``warnings.warn`` reads them."""
    module, line = (frame.f_globals.get("__name__", ""), frame.f_lineno) if frame else ("sys", 1)

    def matches(pattern: Any, text: str) -> bool:
        return pattern is None or (pattern == text if isinstance(pattern, str) else bool(pattern.match(text)))

    for action, text, kind, where, number in warnings.filters:
        if matches(text, message) and issubclass(category, kind) and matches(where, module) and number in (0, line):
            return action
    return "default"
