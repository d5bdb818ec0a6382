"""MPI as this process has it: mpi4py, checked against the library that the native core is bound to."""

import ctypes
import os
import sys
from pathlib import Path
from types import ModuleType

from . import _core
from .config import RANK_COUNT_VARIABLES
from .errors import LaunchError

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


def launched_ranks() -> dict[str, int]:
    """The launchers' variables that are set, and how many ranks they say there are."""
    texts = {name: os.environ.get(name, "") for name in RANK_COUNT_VARIABLES}
    return {name: int(text) for name, text in texts.items() if text.isdigit()}


def world_rank() -> int:
    """Rank in ``MPI.COMM_WORLD``; 0 if MPI does not run."""
    if _core.mpi_thread_level() == "":
        return 0
    from mpi4py import MPI

    return int(MPI.COMM_WORLD.Get_rank())


def _check_rank_count(MPI: ModuleType, library: str) -> None:
    size = MPI.COMM_WORLD.Get_size()
    for name, launched in launched_ranks().items():
        if launched > size:
            raise LaunchError(
                f"{name} says {launched} ranks, MPI says {size}: these processes were started by a launcher that does "
                f"not belong to {library} ({_first_line(_core.mpi_library_version())}), or without MPI "
                f"(horovodrun --gloo). {HOW_TO_LAUNCH} of that MPI."
            )


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
