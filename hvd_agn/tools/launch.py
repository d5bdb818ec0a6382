"""Start ranks under mpirun, with a hard time limit: the one harness of the benchmarks and of the tests."""

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .. import _core, mpi
from ..errors import LaunchError
from .hosts import EmulatedHosts

_OVERSUBSCRIBE = {
    "OMPI_MCA_rmaps_base_oversubscribe": "1",  # Open MPI 4
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",  # Open MPI 5
}
_AS_ROOT = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")


def mpirun() -> str:
    """Path of the launcher that belongs to the core's MPI library: beside it, or on PATH.

    Raises:
        LaunchError: there is none.
    """
    beside = Path(mpi.core_library()).parent.parent / "bin" / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if not found:
        raise LaunchError(f"mpirun is not on PATH; it came with {mpi.core_library()}. Put that MPI's bin there.")
    return found


def missing_root_variables() -> list[str]:
    """Variables without which this MPI's launcher refuses to run as root, if this is root."""
    if os.geteuid() != 0 or "Open MPI" not in _core.mpi_library_version():
        return []
    return [name for name in _AS_ROOT if os.environ.get(name) != "1"]


def run_ranks(
    ranks: int,
    command: Sequence[str],
    *,
    timeout: float,
    env: Mapping[str, str] | None = None,
    before_kill: Callable[[], object] | None = None,
    hosts: EmulatedHosts | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run ``command`` on ``ranks`` ranks of this machine, more than it has cores if need be.

    Args:
        timeout: seconds, after which the job, and nothing else, is killed.
        env: variables to set besides this process's own.
        before_kill: called first when the time is over.
        hosts: where to run: as many ranks on each as on the others, the first ranks on the first host. The time over,
            everything there is killed. None: all on this machine.

    Returns:
        Exit status and text of both outputs.

    Raises:
        LaunchError: there is no launcher, or it would refuse root; names the variables to set.
        subprocess.TimeoutExpired: with what the job had printed.
    """
    if missing := missing_root_variables():
        raise LaunchError(f"mpirun refuses to run as root. Set {' and '.join(f'{name}=1' for name in missing)}.")
    line = [mpirun(), "-np", str(ranks), *command]
    if hosts is not None:
        line = hosts.command(0, [line[0], *_placement(ranks, hosts), *line[1:]])
    process = subprocess.Popen(
        line,
        env={**_OVERSUBSCRIBE, **_yielding(ranks, hosts), **os.environ, **_agents(hosts), **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException as interruption:
        if before_kill is not None:
            before_kill()
        _kill(process)
        if hosts is not None:
            hosts.kill()  # launchers' daemons leave the family
        out, err = process.communicate()
        if isinstance(interruption, subprocess.TimeoutExpired):
            raise subprocess.TimeoutExpired(process.args, timeout, out, err) from None  # type: ignore[arg-type]
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def _placement(ranks: int, hosts: EmulatedHosts) -> list[str]:
    """The launcher's arguments that spread ranks over hosts, in blocks."""
    count = len(hosts.names)
    slots = [(ranks + count - 1 - i) // count for i in range(count)]
    where = ",".join(f"{name}:{n}" for name, n in zip(hosts.names, slots, strict=True) if n)
    if "Open MPI" not in _core.mpi_library_version():
        return ["-hosts", where]
    return ["--host", where, "--map-by", "slot", "--bind-to", "none"]  # else each host's first rank is bound to core 0


def _agents(hosts: EmulatedHosts | None) -> dict[str, str]:
    """Variables that make every MPI start its daemons through the hosts' agent instead of ssh."""
    if hosts is None:
        return {}
    return {
        "OMPI_MCA_plm_rsh_agent": hosts.agent,  # Open MPI 4
        "PRTE_MCA_plm_ssh_agent": hosts.agent,  # Open MPI 5
        "HYDRA_LAUNCHER": "ssh",  # MPICH
        "HYDRA_LAUNCHER_EXEC": hosts.agent,
    }


def _yielding(ranks: int, hosts: EmulatedHosts | None) -> dict[str, str]:
    """What mpi.prepare() sets where a node has more ranks than cores: emulated hosts have them together."""
    return {"OMPI_MCA_mpi_yield_when_idle": "1"} if hosts is not None and ranks > (os.cpu_count() or 1) else {}


def _kill(process: subprocess.Popen[str]) -> None:
    """End mpirun and everything that descends from it."""
    for pid in [process.pid, *_descendants(process.pid)]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def _descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # ended meanwhile
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, todo = [], [pid]
    while todo:
        todo += (mine := children.get(todo.pop(), []))
        found += mine
    return found
