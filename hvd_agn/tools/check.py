"""``python -m hvd_agn check``: one screen that says whether hvd_agn can train here, and what to do if not."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import _core, config, mpi
from ..center import Center
from ..errors import AGNError
from . import launch

OK, NOTE, PROBLEM = "OK", "note", "PROBLEM"


@dataclass
class Line:
    """What was looked at, what was found, and how to mend it."""

    subject: str
    finding: str
    status: str = OK
    fix: str = ""


def lines() -> Iterator[Line]:
    """Every check."""
    yield Line("hvd_agn", f"{importlib.metadata.version('hvd-agn')} in {Path(_core.__file__).parent}")
    yield Line("Python", platform.python_version())
    yield _attempt("environment", _environment)
    yield Line("MPI", f"{_core.mpi_library_version().splitlines()[0].split(', package')[0]}, {mpi.core_library()}")
    yield _attempt("mpi4py", _mpi4py)
    yield _thread_level()
    yield _attempt("launcher", _launcher)
    yield _attempt("shared windows", _shared_window)
    yield _attempt("between nodes", _between_nodes)
    yield _shared_memory()
    yield _framework("torch", "torch", "torch")
    yield from _tensorflow()
    yield Line("native core", f"{_core.compiler()}; {_core.kernels()} loops")
    yield Line("CUDA", "built" if _core.cuda else "not built: GPU parameters are exchanged through a copy on the CPU")


def main() -> int:
    """Print the lines, on rank 0 if there are several; 1 if there is a problem."""
    found = list(lines())
    width = max(len(line.subject) for line in found)
    if mpi.world_rank() == 0:
        for line in found:
            fix = f"\n{'':{width + 10}}fix: {line.fix}" if line.fix else ""
            print(f"{line.status:8}{line.subject:{width}}  {line.finding}{fix}")
    return 1 if any(line.status == PROBLEM for line in found) else 0


def _attempt(subject: str, probe: Callable[[], Line]) -> Line:
    try:
        return probe()
    except (AGNError, RuntimeError) as error:  # its message ends with the fix
        return Line(subject, str(error), PROBLEM)


def _environment() -> Line:
    config.check_environment()
    chosen = [f"{v.name}={os.environ[v.name]}" for v in config.VARIABLES if v.name in os.environ]
    return Line("environment", ", ".join(chosen) or "no HVD_AGN_ variable is set")


def _mpi4py() -> Line:
    world = mpi.initialize().COMM_WORLD
    return Line("mpi4py", f"{importlib.metadata.version('mpi4py')}, the same MPI; rank {world.rank} of {world.size}")


def _thread_level() -> Line:
    level = _core.mpi_thread_level()
    if level == "multiple":
        return Line("thread level", level)
    if not level:
        return Line("thread level", "MPI did not start", PROBLEM, "mend mpi4py first")
    return Line("thread level", level, PROBLEM, "leave mpi4py.rc.thread_level at 'multiple'")


def _launcher() -> Line:
    found = launch.mpirun()
    if started := mpi.launched_ranks(config.MPI_LAUNCHERS):
        return Line("launcher", f"this process was started by one ({', '.join(started)} is set); {found}")
    if missing := launch.missing_root_variables():
        fix = f"set {' and '.join(f'{name}=1' for name in missing)}"
        return Line("launcher", f"{found} refuses to run as root", PROBLEM, fix)
    return Line("launcher", found)


def _shared_window() -> Line:
    MPI = mpi.initialize()
    node = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
    with Center([np.zeros(1, np.float32)], comm=node) as center:
        return Line("shared windows", f"a center of {center.nbytes} bytes works, ranks on this node: {center.size}")


def _between_nodes() -> Line:
    """Every rank pushes once to a center at rank 0."""
    MPI = mpi.initialize()
    world = MPI.COMM_WORLD
    nodes = world.allreduce(int(world.Split_type(MPI.COMM_TYPE_SHARED).rank == 0))
    if nodes == 1:
        return Line("between nodes", "not tried: all ranks are on one node")
    with Center([theta := np.zeros(1, np.float32)]) as center:
        theta += 1
        center.exchange(1)
        world.Barrier()
        return Line("between nodes", f"one-sided puts work: {center.version} pushes from {nodes} nodes")


def _shared_memory() -> Line:
    free = mpi.shared_memory_free()
    finding = f"{free / 2**30:.1f} GiB free in {mpi.shared_memory_directory()}"
    if free >= 2**30:
        return Line("shared memory", finding)
    fix = "a center takes 4 bytes per parameter; docker run --shm-size or mount -o remount,size=... gives more"
    return Line("shared memory", finding, NOTE, fix)


def _framework(subject: str, extra: str, *packages: str) -> Line:
    for package in packages:
        try:
            return Line(subject, f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return Line(subject, "not installed", NOTE, f"pip install 'hvd-agn[{extra}]', for hvd_agn.{extra}")


def _tensorflow() -> Iterator[Line]:
    """TensorFlow and the library of its ops, which is loaded in a process of its own: TensorFlow takes seconds."""
    found = _framework("TensorFlow", "tensorflow", "tensorflow", "tensorflow-cpu")
    yield found
    if found.status != OK or mpi.world_rank() != 0:
        return
    command = [sys.executable, "-c", "from hvd_agn.tensorflow import library; library.ops(); print(library.PATH)"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMIX_", "PMI_", "PRTE_"))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode == 0:
        yield Line("TensorFlow ops", done.stdout.strip())
    else:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        fix = "hvd_agn.tensorflow is tested with TensorFlow 2.17 to 2.21 and Keras 3"
        yield Line("TensorFlow ops", f"cannot be loaded: {reason[0]}", PROBLEM, fix)
