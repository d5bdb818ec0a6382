"""Run a test function on several MPI ranks, with a hard time limit.

``on_ranks(n, function, *args)`` starts ``mpirun -np n`` of this file; every rank imports the function's module, calls
the function, and writes its result or traceback to the job's own folder. When the time is over each rank dumps the
stacks of its threads before the job, and nothing else, is killed.
"""

import faulthandler
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from hvd_agn.tools.hosts import EmulatedHosts

TIMEOUT = 120.0
_OUTLIVED = "TEST_RANK_IS_OUTLIVED"


def on_ranks(
    ranks: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = TIMEOUT,
    env: dict[str, str] | None = None,
    expect_death: bool = False,
    hosts: "EmulatedHosts | None" = None,
) -> list[Any]:
    """Call ``function(*args)`` on every rank; args and results are JSON. Fails the test with every rank's traceback.

    ``expect_death``: a rank may end without a result (None stands in its place), and the others must go on.
    ``hosts``: run there, in blocks of ranks, instead of on this machine.
    """
    from hvd_agn.tools.launch import run_ranks

    with tempfile.TemporaryDirectory(prefix="hvd_agn_job_") as name:
        job = Path(name)
        call = json.dumps([function.__code__.co_filename, function.__name__, args])
        command = [sys.executable, __file__, str(job), call, *([str(ranks)] if expect_death else [])]
        try:
            done = run_ranks(
                ranks,
                command,
                timeout=timeout,
                env=env,
                before_kill=lambda: _dump_stacks(job),
                hosts=hosts,
            )
        except subprocess.TimeoutExpired as late:
            pytest.fail(
                f"{function.__name__} on {ranks} ranks ran over {timeout} s\n{late.output}\n{late.stderr}\n"
                + _read(job, "stack"),
                pytrace=False,
            )
        if failures := _read(job, "error"):
            pytest.fail(f"{failures}\n--- stdout\n{done.stdout}\n--- stderr\n{done.stderr}", pytrace=False)
        results = [job / f"result.{r}" for r in range(ranks)]
        missing = [path.suffix for path in results if not path.exists()]
        if len(missing) == ranks or (not expect_death and (missing or done.returncode != 0)):
            pytest.fail(
                f"exit status {done.returncode}, no result from ranks {missing}\n{done.stdout}\n{done.stderr}",
                pytrace=False,
            )
        return [json.loads(path.read_text()) if path.exists() else None for path in results]


def _dump_stacks(job: Path) -> None:
    for path in job.glob("pid.*"):
        try:
            os.kill(int(path.read_text()), signal.SIGUSR1)
        except ProcessLookupError:
            pass
    time.sleep(1)


def _read(job: Path, kind: str) -> str:
    paths = sorted(job.glob(f"{kind}.*"), key=lambda path: int(path.suffix[1:]))
    return "\n".join(f"--- {path.name.replace('.', ' of rank ')}\n{path.read_text()}" for path in paths)


def _outlive(job: Path, started: int, ranks: int) -> None:
    """Run the rank in a child, and stay until all have ended: the launcher ends a job when it sees one rank die."""
    subprocess.call([sys.executable, *sys.argv[:-1]], close_fds=False, env={**os.environ, _OUTLIVED: "1"})
    (job / f"ended.{started}").touch()
    deadline = time.monotonic() + TIMEOUT
    while len(list(job.glob("ended.*"))) < ranks and time.monotonic() < deadline:
        time.sleep(0.02)


def _main() -> None:
    job = Path(sys.argv[1])
    file, name, args = json.loads(sys.argv[2])
    started = int(os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", "0")))
    if len(sys.argv) > 3:
        _outlive(job, started, int(sys.argv[3]))
        return
    stack = (job / f"stack.{started}").open("w")
    faulthandler.register(signal.SIGUSR1, stack, all_threads=True)
    (job / f"pid.{started}").write_text(str(os.getpid()))
    try:
        spec = importlib.util.spec_from_file_location(Path(file).stem, file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        result = getattr(module, name)(*args)
        (job / f"result.{started}").write_text(json.dumps(result))
        if _OUTLIVED in os.environ:  # MPI_Finalize would wait for the dead
            os._exit(0)
    except BaseException:
        (job / f"error.{started}").write_text(traceback.format_exc())
        os._exit(1)  # at once: waiting for the others at exit would hide the failure behind the time limit


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    _main()
