"""The end of a process: what is left is pushed, then windows are given back together, before MPI ends."""

import atexit
import gc
import os
import signal
import sys
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol

from . import _core
from .errors import AGNError, StallError, UsageError, say

if TYPE_CHECKING:
    from mpi4py import MPI


class Closing(Protocol):
    """A center, as its end sees it."""

    label: str

    def end(self, failed: bool) -> None:
        """Push what is left, unless the process ends with an error, and let go."""


class Finished(NamedTuple):
    """A center that this rank has closed."""

    serial: int  # in order of creation, here
    key: str  # the same on all of its ranks
    comm: _core.Comm
    memory: _core.Center

    def free(self) -> None:
        """Give the windows back. Collective."""
        self.memory.free(self.comm)
        self.comm.free()


centers: list[Closing] = []  # open, in order of creation
finished: list["Finished"] = []  # closed; their windows go when the ranks next meet, because that is collective
missing: list[str] = []  # centers for which a rank did not come
_process = os.getpid()
_ENDINGS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
_rank = 0  # of this process; known before a stuck thread can hold up MPI's calls
_ending = False
_finalize_key: int | None = None  # of the attribute that MPI_Finalize deletes first
_exit: BaseException | None = None  # what sys.exit() was last called for; no hook of Python's tells it


def register(MPI: ModuleType) -> None:
    """Finish before MPI does: at exit, or when someone calls MPI_Finalize before."""
    global _finalize_key, _rank
    if _finalize_key is None:
        _rank = MPI.COMM_WORLD.Get_rank()
        _finalize_key = MPI.Comm.Create_keyval(delete_fn=lambda *_: finish())
        MPI.COMM_SELF.Set_attr(_finalize_key, True)
        atexit.register(finish_at_exit)  # after mpi4py's import: runs before its MPI_Finalize
        sys.exit = _noting(sys.exit)


def _noting(exit_: Callable[..., NoReturn]) -> Callable[..., NoReturn]:
    def exit(status: Any = None, /) -> NoReturn:
        global _exit
        try:
            exit_(status)
        except SystemExit as error:
            if threading.current_thread() is threading.main_thread():  # another would end itself alone
                _exit = SystemExit(error.code)
            raise

    return exit


def is_failure(error: BaseException | None) -> bool:
    """Whether what ends with it has failed: with any but ``sys.exit()`` of status 0, and a generator's end."""
    if isinstance(error, SystemExit):
        return error.code not in (None, 0)
    return error is not None and not isinstance(error, GeneratorExit)


def _failure() -> BaseException | None:
    """What the process ends with, if that is an error."""
    uncaught = None if hasattr(sys, "ps1") else getattr(sys, "last_value", None)  # at a prompt, one of long ago
    for error in (uncaught, sys.exc_info()[1], _exit):
        if is_failure(error):
            return error
    return None


def free_finished(comm: "MPI.Comm") -> str:
    """Free the centers that all of their ranks have closed, where these are among the ranks of ``comm``. Collective.

    Returns:
        A key for another center, the same on all ranks.
    """
    offers = comm.allgather((uuid.uuid4().hex, [each.key for each in finished if not each.comm.given_up]))
    closed = Counter(key for _, keys in offers for key in keys)
    for each in sorted(finished, key=lambda each: each.key):  # an order that all ranks have
        if closed[each.key] == each.comm.size:
            finished.remove(each)
            each.free()
    return offers[0][0]  # type: ignore[no-any-return]


def finish_at_exit() -> None:
    """Do so, once, unless MPI has ended already."""
    if os.getpid() != _process:
        return
    try:
        _finish_at_exit()
    except SystemExit:  # a handler's, before it was held back
        _finish_at_exit()


def _finish_at_exit() -> None:
    with _handlers_held_back() as handlers:
        if gc.get_freeze_count() > 0:  # what trainers froze is not collected any more, and no leak
            _core.set_leak_warnings(False)
        from mpi4py import MPI

        if _finalize_key is not None and not MPI.Is_finalized():
            MPI.COMM_SELF.Delete_attr(_finalize_key)
    for number in handlers:  # Python would set the default action, which kills, while MPI_Finalize is still to come
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _handlers_held_back() -> Iterator[dict[int, Any]]:
    """Meanwhile the user's handlers of signals that ask for an end cannot raise: Slurm sends two or three of them."""
    held: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in _ENDINGS}
        held = {n: h for n, h in handlers.items() if callable(h) and h is not signal.default_int_handler}
    for number, handler in held.items():
        signal.signal(number, _held_back(handler))
    try:
        yield held
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)


def _held_back(handler: Callable[[int, FrameType | None], Any]) -> Callable[[int, FrameType | None], None]:
    def handle(number: int, frame: FrameType | None) -> None:
        try:
            handler(number, frame)
        except BaseException as error:
            said = f"{signal.Signals(number).name}: {type(error).__name__}"
            _say(f"{said}, while this rank is ending already: it goes on to its end.")

    return handle


def finish() -> None:
    """Push what is left, then wait, asleep, for the other ranks, and give the windows back in the same order."""
    with _handlers_held_back():
        try:
            _close_all()
            for each in finished:  # before any call of MPI, which a stuck thread may hold up
                each.memory.await_thread()
            for each in sorted(finished, key=lambda each: each.serial):
                each.free()
            finished.clear()
            if missing:
                raise StallError(f"not all ranks created {missing[0]}")
        except BaseException as error:
            # MPI_Finalize would wait for the same ranks, without a limit.
            what = str(error) if isinstance(error, AGNError) else f"{type(error).__name__}: {error}"
            _say(f"{what.removeprefix(_prefix())}; this process ends without MPI_Finalize.")
            sys.stdout.flush()
            os._exit(1)


def _close_all() -> None:
    global _ending
    failure, _ending = _failure(), True
    for center in list(centers):
        try:
            center.end(failure is not None)
        except Exception as error:  # the others are closed all the same
            say(f"{center.label}: closing failed: {error}")
    if failure is not None and finished:
        what = f"status {failure.code!r}" if isinstance(failure, SystemExit) else type(failure).__name__
        _say(
            f"this rank ends with {what}. What it pushed stays in the center, what it has not pushed is dropped unless "
            "push_on_error=True. The other ranks go on; this one waits for them to end."
        )


def used_after_close(label: str) -> UsageError:
    """For a center that was; with what a function called at exit needs to know."""
    how = (
        " The end of the program, or MPI_Finalize, closes all centers. Register a function that uses one with atexit "
        "after that one was made: then it is called before."
    )
    return UsageError(f"{label}: used after close().{how if _ending else ''}")


def _prefix() -> str:
    return f"[rank {_rank}] hvd_agn: "


def _say(text: str) -> None:
    say(_prefix() + text)
