"""MPI as this process has it: mpi4py, checked against the library that the native core is bound to."""

import ctypes
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from . import _core
from .config import MPI_LAUNCHERS, OTHER_LAUNCHERS
from .errors import ConfigError, LaunchError

# Built, and not from pip's cache: the wheel takes the first libmpi that it finds, the cache may be of another MPI.
HOW_TO_BUILD_MPI4PY = "`pip install --force-reinstall --no-deps --no-cache-dir --no-binary=mpi4py mpi4py`"
INFINIBAND = Path("/sys/class/infiniband")
HOW_TO_LAUNCH = "Launch with `mpirun -np N python script.py` or `horovodrun -np N python script.py`, using the mpirun"


def core_library() -> str:
    """Path of the MPI library that the native core calls."""
    return _core.path_of(_core.mpi_init_address())


def prepare() -> None:
    """Set, unless the user has, what Open MPI reads at start-up: for whoever starts MPI after ``import hvd_agn``.

    Its place, if it came in a wheel and there is no mpirun to tell it; and yielding instead of busy polling where the
    launcher put more ranks on this node than it has cores. And no windows by UCX where no network is of its kind: Open
    MPI 5 does not use it there either, but each rank prints an error, "component priority set inside component query".
    """
    version = _core.mpi_library_version()
    if "Open MPI" not in version:
        return
    prefix = Path(core_library()).parent.parent
    if prefix == Path(sys.prefix):
        os.environ.setdefault("OPAL_PREFIX", str(prefix))
    if int(os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1")) > (os.cpu_count() or 1):
        os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    if version.startswith("Open MPI v5") and not list(INFINIBAND.glob("*")):
        os.environ.setdefault("OMPI_MCA_osc", "^ucx")


def initialize() -> ModuleType:
    """``mpi4py.MPI``, with MPI initialised and fit for use by the core.

    Raises:
        LaunchError: no MPI, two different MPIs, MPI already finalised, no ``MPI_THREAD_MULTIPLE``, or a launcher that
            started more processes than MPI knows of.
    """
    library = core_library()
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise LaunchError(
            f"mpi4py cannot load an MPI library ({error}); the native core uses {library}. Build mpi4py for that "
            f"MPI, with its mpicc first on PATH: {HOW_TO_BUILD_MPI4PY}."
        ) from error
    _check_same_library(MPI, library)
    if MPI.Is_finalized():
        raise LaunchError("MPI is already finalised in this process. Create the optimizer before MPI_Finalize.")
    if not MPI.Is_initialized():
        MPI.Init_thread(MPI.THREAD_MULTIPLE)
    level = _core.mpi_thread_level()
    if level != "multiple":
        raise LaunchError(
            f"MPI runs at thread level {level!r}, hvd_agn needs 'multiple': let `import mpi4py.MPI` start MPI, before "
            "anything else does, and leave mpi4py.rc.thread_level and MPI4PY_RC_THREAD_LEVEL at 'multiple'."
        )
    _check_rank_count(MPI, library)
    return MPI


def _check_same_library(MPI: ModuleType, library: str) -> None:
    theirs = _core.path_of(ctypes.cast(ctypes.CDLL(MPI.__file__).MPI_Init, ctypes.c_void_p).value or 0)
    if not theirs or not library or os.path.realpath(theirs) == os.path.realpath(library):
        return
    raise LaunchError(
        f"two MPI libraries in one process: mpi4py uses {theirs} ({_first_line(MPI.Get_library_version())}), hvd_agn "
        f"was built with {library} ({_first_line(_core.mpi_library_version())}). Build the one that is wrong again, "
        f"with the MPI you launch with first on PATH: mpi4py with {HOW_TO_BUILD_MPI4PY}, or hvd_agn with "
        "`pip install .`."
    )


def launched_ranks(launchers: Iterable[str]) -> dict[str, int]:
    """The launchers' variables that are set, and how many processes they say there are."""
    counts = {name: _count(os.environ.get(name, "")) for name in launchers}
    return {name: count for name, count in counts.items() if count}


def _count(text: str) -> int:
    """A number as it is; of TensorFlow's TF_CONFIG, those that train. 0 if it says nothing."""
    if text.isdecimal():
        return int(text)
    try:
        cluster = json.loads(text)["cluster"]
        return sum(len(cluster.get(job, ())) for job in ("chief", "master", "worker"))
    except (ValueError, LookupError, TypeError, AttributeError):
        return 0


def world_rank() -> int:
    """Rank in ``MPI.COMM_WORLD``; 0 if MPI does not run."""
    if _core.mpi_thread_level() == "":
        return 0
    from mpi4py import MPI

    return int(MPI.COMM_WORLD.Get_rank())


def communicator(MPI: ModuleType, comm: Any) -> Any:
    """The communicator that was given, or else the world.

    Raises:
        ConfigError: it is no communicator, or one that this rank cannot make a center with.
    """
    if comm is None:
        return MPI.COMM_WORLD
    reason = None
    if isinstance(comm, MPI.Comm) and comm == MPI.COMM_NULL:
        reason = (
            "MPI.COMM_NULL, which Split and Create give a rank that belongs to no group, or a communicator that was "
            "freed. Make no center on this rank, or give the communicator of its group"
        )
    elif isinstance(comm, MPI.Intercomm):
        reason = "an intercommunicator. Give a communicator of its own ranks, such as comm.Merge()"
    elif not isinstance(comm, MPI.Intracomm):
        raise ConfigError(f"comm={comm!r}: give an mpi4py communicator, or None for MPI.COMM_WORLD.")
    if reason:
        raise ConfigError(f"[rank {world_rank()}] comm= is {reason}, or None for MPI.COMM_WORLD.")
    return comm


def _check_rank_count(MPI: ModuleType, library: str) -> None:
    size = MPI.COMM_WORLD.Get_size()
    this = f"{library} ({_first_line(_core.mpi_library_version())})"
    own = launched_ranks(MPI_LAUNCHERS)
    for name, count in own.items():
        if count > size:
            raise LaunchError(
                f"{name} says {count} ranks, MPI says {size}: these processes were started by {MPI_LAUNCHERS[name]} "
                f"that does not belong to {this}. {HOW_TO_LAUNCH} of that MPI."
            )
    others = launched_ranks(OTHER_LAUNCHERS)
    if own:  # Open MPI's mpirun starts its daemons with srun, and the ranks on other nodes inherit what that sets
        others.pop("SLURM_STEP_NUM_TASKS", None)
    for name, count in others.items():
        if count > size:
            raise LaunchError(
                f"{name} says {count} ranks, MPI says {size}: these processes were started by {OTHER_LAUNCHERS[name]}, "
                f"and not through {this}: each would train alone. {_how_to_launch(name, count)} of that MPI. If this "
                f"process is meant to train alone: `env -u {name} python script.py`."
            )


def _how_to_launch(name: str, count: int) -> str:
    if name == "SLURM_STEP_NUM_TASKS":
        return (
            f"Launch with `srun --mpi=pmix -n {count} python script.py` (`srun --mpi=list` says what there is: pmix "
            f"for Open MPI, pmi2 or pmix for MPICH), or inside the allocation, without srun, with `mpirun "
            f"-np {count} python script.py`, using the mpirun"
        )
    return HOW_TO_LAUNCH


def _first_line(text: str) -> str:
    return text.split("\n")[0].split(",")[0].strip().strip("\0")


def shared_memory_directory() -> str:
    """Directory of the file system that holds MPI's shared windows."""
    chosen = os.environ.get("OMPI_MCA_osc_sm_backing_directory")  # noqa: SIM112 (its real name)
    if chosen:
        return chosen
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else "/tmp"


def shared_memory_free() -> int:
    """Bytes free there."""
    status = os.statvfs(shared_memory_directory())
    return status.f_bavail * status.f_frsize
