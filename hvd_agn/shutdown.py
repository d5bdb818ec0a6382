"""The end of a process: what is left is pushed, then windows are given back together, before MPI ends."""

import atexit
import gc
import os
import sys
from types import ModuleType
from typing import Protocol

from . import _core, mpi
from .errors import StallError


class Closing(Protocol):
    """A center, as its end sees it."""

    label: str

    def close(self) -> None:
        """Push what is left, and let go."""


centers: list[Closing] = []  # open, in order of creation
finished: list[tuple[int, _core.Comm, _core.Center]] = []  # closed; their windows go at exit, which is collective
missing: list[str] = []  # centers for which a rank did not come
_process = os.getpid()
_finalize_key: int | None = None  # of the attribute that MPI_Finalize deletes first


def register(MPI: ModuleType) -> None:
    """Finish before MPI does: at exit, or when someone calls MPI_Finalize before."""
    global _finalize_key
    if _finalize_key is None:
        _finalize_key = MPI.Comm.Create_keyval(delete_fn=lambda *_: finish())
        MPI.COMM_SELF.Set_attr(_finalize_key, True)
        atexit.register(finish_at_exit)  # after mpi4py's import: runs before its MPI_Finalize


def finish_at_exit() -> None:
    """Do so, once, unless MPI has ended already."""
    if gc.get_freeze_count() > 0:  # what trainers froze is not collected any more, and no leak
        _core.set_leak_warnings(False)
    from mpi4py import MPI

    if os.getpid() == _process and _finalize_key is not None and not MPI.Is_finalized():
        MPI.COMM_SELF.Delete_attr(_finalize_key)


def finish() -> None:
    """Push what is left, then wait, asleep, for the other ranks, and give the windows back in the same order."""
    try:
        for center in list(centers):
            try:
                center.close()
            except Exception as error:  # the others are closed all the same
                print(f"{center.label}: closing failed: {error}", file=sys.stderr)
        failure = getattr(sys, "last_type", None)
        if failure is not None and finished:
            print(
                f"[rank {mpi.world_rank()}] hvd_agn: this rank ends with {failure.__name__}. What it pushed stays "
                "in the center and the other ranks go on; this one waits for them to end.",
                file=sys.stderr,
                flush=True,
            )
        for _, _, memory in finished:  # before any call of MPI, which a stuck thread may hold up
            memory.await_thread()
        for _, comm, memory in sorted(finished, key=lambda entry: entry[0]):
            memory.free(comm)
            comm.free()
        finished.clear()
        if missing:
            raise StallError(f"hvd_agn: not all ranks created {missing[0]}; this process ends without MPI_Finalize.")
    except BaseException as error:
        # MPI_Finalize would wait for the same ranks, without a limit.
        print(str(error) or type(error).__name__, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
