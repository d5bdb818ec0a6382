"""Starting and ending: without a launcher, with a wrong one, two MPIs, a rank that fails, an end under an exchange."""

import os
import subprocess
import sys
import sysconfig
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from ranks import on_ranks

from hvd_agn import Center, _core, mpi
from hvd_agn.errors import LaunchError, UsageError
from hvd_agn.tools import check, launch

# ---- launching


def python(code, **env):
    """Run code in a new process without a launcher; returns its error text."""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, timeout=60
    )
    return done.stderr


CREATE = "import numpy, hvd_agn; hvd_agn.Center([numpy.zeros(3, numpy.float32)]).close()"


def test_without_a_launcher_there_is_one_rank():
    assert python(CREATE + "; print('done')") == ""


CLUSTER = '{"cluster": {"chief": ["a:1"], "worker": ["b:1", "c:1", "d:1"], "ps": ["e:1"]}, "task": {"index": 0}}'


@pytest.mark.parametrize(
    ("name", "value", "types"),
    [
        ("OMPI_COMM_WORLD_SIZE", "4", "mpirun -np N python"),
        ("PMI_SIZE", "4", "mpirun -np N python"),
        ("HOROVOD_SIZE", "4", "mpirun -np N python"),
        ("WORLD_SIZE", "4", "mpirun -np N python.*If this process is meant to train alone: `env -u WORLD_SIZE python"),
        ("SLURM_STEP_NUM_TASKS", "4", r"srun --mpi=pmix -n 4 python .*inside the allocation.*`mpirun -np 4 python"),
        ("TF_CONFIG", CLUSTER, "mpirun -np N python"),
    ],
)
def test_a_launcher_that_mpi_does_not_know(monkeypatch, name, value, types):
    monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match=rf"{name} says 4 ranks, MPI says 1: .*Launch with `{types}"):
        Center([np.zeros(3, np.float32)])


def test_check_says_the_same(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    found = check._attempt("mpi4py", check._mpi4py)
    assert found.status == check.PROBLEM
    assert found.finding.startswith("WORLD_SIZE says 4 ranks, MPI says 1")
    assert "started by one" not in check._launcher().finding
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert check._attempt("mpi4py", check._mpi4py).status == check.OK


ALLOCATION = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_NPROCS": "4", "SLURM_PROCID": "0", "SLURM_NNODES": "2"}


def test_variables_that_are_no_contradiction(monkeypatch):
    """A batch script of four tasks that starts one process; a step of one task; a world of one; nonsense."""
    alone = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_ID": "0", "WORLD_SIZE": "1", "TF_CONFIG": '{"cluster": {}}'}
    for name, value in (ALLOCATION | alone | {"FLUX_JOB_SIZE": "", "JSM_NAMESPACE_SIZE": "many"}).items():
        monkeypatch.setenv(name, value)
    Center([np.zeros(3, np.float32)]).close()


def test_mpirun_inside_an_allocation_and_where_others_say_as_many():
    """On nodes other than the first, mpirun's daemons are tasks of a step of their own."""
    step = {"SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "WORLD_SIZE": "2"}
    done = launch.run_ranks(2, [sys.executable, "-c", CREATE], timeout=60, env=ALLOCATION | step)
    assert (done.returncode, done.stderr) == (0, "")


TORCHRUN = """
import numpy, hvd_agn
hvd_agn.Center([numpy.zeros(3, numpy.float32)])
"""


def test_torchrun(tmp_path):
    (tmp_path / "script.py").write_text(TORCHRUN)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(tmp_path / "script.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "LaunchError: WORLD_SIZE says 2 ranks, MPI says 1: these processes were started by torchrun" in done.stderr


@pytest.mark.parametrize(
    ("version", "devices", "chosen", "expected"),
    [
        ("Open MPI v5.0.11, package", [], None, "^ucx"),
        ("Open MPI v5.0.11, package", ["mlx5_0"], None, None),
        ("Open MPI v5.0.11, package", [], "ucx", "ucx"),
        ("Open MPI v4.1.8, package", [], None, None),
        ("MPICH Version: 5.0.2", [], None, None),
    ],
)
def test_windows_by_ucx_are_off_with_open_mpi_5_without_its_network(
    monkeypatch, tmp_path, version, devices, chosen, expected
):
    for device in devices:
        (tmp_path / device).mkdir()
    monkeypatch.setattr(_core, "mpi_library_version", lambda: version)
    monkeypatch.setattr(mpi, "INFINIBAND", tmp_path)
    monkeypatch.setenv("OMPI_MCA_osc", chosen or "")
    if not chosen:
        monkeypatch.delenv("OMPI_MCA_osc")
    mpi.prepare()
    assert os.environ.get("OMPI_MCA_osc") == expected  # noqa: SIM112 (its real name)


def test_starting_prints_nothing():
    done = launch.run_ranks(2, [sys.executable, "-c", CREATE], timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_ending_after_a_freeze_prints_nothing():
    """gc.freeze(), as trainers call it, leaves all objects to the end of the process."""
    optimizer = "agn.AGNOptimizer(torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))], 0.1))"
    assert python(f"import gc, torch, hvd_agn.torch as agn; optimizer = {optimizer}; gc.freeze()") == ""


def test_a_low_thread_level():
    text = python(CREATE, MPI4PY_RC_THREAD_LEVEL="serialized")
    assert "LaunchError: MPI runs at thread level 'serialized', hvd_agn needs 'multiple'" in text


def test_after_mpi_is_finalised():
    text = python(f"from mpi4py import MPI; import hvd_agn; MPI.Finalize(); {CREATE}")
    assert "LaunchError: MPI is already finalised in this process" in text


def test_mpi_that_mpi4py_did_not_start():
    text = python(f"import mpi4py; mpi4py.rc.initialize = False; {CREATE}; from mpi4py import MPI; MPI.Finalize()")
    assert text == ""


def other_mpi():
    """The library of the other MPI, in the environment that make sets up for it."""
    ours = "" if "Open MPI" in _core.mpi_library_version() else "-mpich"
    name = f".venv{'' if ours else '-mpich'}"
    found = sorted((Path(__file__).parents[2] / name / "lib").glob("libmpi.so.[0-9]*"))
    return found[0] if found else None


def test_two_mpi_libraries_in_one_process():
    library = other_mpi()
    if library is None:
        pytest.skip("the other MPI's environment is missing: `make environment` and `make environment MPI=mpich`")
    if not list(Path(find_spec("mpi4py").origin).parent.glob("MPI.*mp*.*.so")):
        pytest.skip("mpi4py was built here: only its wheel can be told which MPI to take")
    env = {"MPI4PY_LIBMPI": str(library), "OPAL_PREFIX": str(library.parents[1])}
    texts = [python(CREATE, **env), python(f"from mpi4py import MPI; {CREATE}", **env)]
    two = [
        f"LaunchError: two MPI libraries in one process: mpi4py uses {library}" in text
        and f"hvd_agn was built with {mpi.core_library()}" in text
        and "--no-binary=mpi4py mpi4py`, or hvd_agn with `pip install .`" in text
        for text in texts
    ]
    # In one order or the other, the libraries that the two bring along may not even load together.
    unloadable = [
        "LaunchError: mpi4py cannot load an MPI library" in text
        or "ImportError: the native core of hvd_agn cannot be loaded" in text
        for text in texts
    ]
    assert any(two)
    assert all(a or b for a, b in zip(two, unloadable, strict=True)), texts


@pytest.mark.parametrize("error", ["ImportError", "RuntimeError"])  # of a built mpi4py, of its wheel
def test_mpi4py_without_an_mpi(tmp_path, error):
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py/__init__.py").touch()
    (tmp_path / "mpi4py/MPI.py").write_text(f"raise {error}('no such library')")
    text = python(CREATE, PYTHONPATH=str(tmp_path))
    assert "LaunchError: mpi4py cannot load an MPI library (no such library)" in text
    assert f"the native core uses {mpi.core_library()}" in text
    assert "first on PATH: `pip install --force-reinstall --no-deps --no-cache-dir --no-binary=mpi4py mpi4py`" in text


def test_root_needs_two_variables(monkeypatch):
    if "Open MPI" not in _core.mpi_library_version() or os.geteuid() != 0:
        pytest.skip("only Open MPI refuses to run as root, and only root is refused")
    monkeypatch.delenv("OMPI_ALLOW_RUN_AS_ROOT", raising=False)
    with pytest.raises(LaunchError, match=r"mpirun refuses to run as root. Set OMPI_ALLOW_RUN_AS_ROOT=1"):
        launch.run_ranks(1, ["true"], timeout=10)


def test_a_source_tree_without_the_core(tmp_path):
    (tmp_path / "hvd_agn").mkdir()
    for path in Path(mpi.__file__).parent.glob("*.py"):
        (tmp_path / "hvd_agn" / path.name).write_bytes(path.read_bytes())
    site = sysconfig.get_paths()["platlib"]
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {site!r}]; import hvd_agn"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, timeout=60)
    assert "the native core of hvd_agn is not in" in done.stderr
    assert "pip install -e ." in done.stderr


# ---- a rank that fails


FAILING = """
import sys, time
import numpy as np
from mpi4py import MPI
import hvd_agn
theta = np.zeros(10, np.float32)
center = hvd_agn.Center([theta])
rank = MPI.COMM_WORLD.rank
theta += 1 + rank
center.exchange(1)
if rank == 1:
    raise ZeroDivisionError("on purpose")
while center.version < 2:
    time.sleep(0.01)
time.sleep(1)
print("rank 0 has", center.snapshot()["array 0"][0], flush=True)
"""


def test_a_rank_that_raises_leaves_its_pushes_and_the_others(tmp_path):
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    done = launch.run_ranks(2, [sys.executable, str(script)], timeout=60)
    assert "rank 0 has 3.0" in done.stdout
    assert "on purpose" in done.stderr
    assert "[rank 1] hvd_agn: this rank ends with ZeroDivisionError. What it pushed stays" in done.stderr
    assert done.returncode != 0


FINALIZE = """
import numpy as np
from mpi4py import MPI
import hvd_agn
theta = np.zeros(10, np.float32)
center = hvd_agn.Center([theta])
class Owner:
    def before_close(self, failed):
        theta[:] += 1
        center.arrays_client.exchange(1)
        print("flushed", flush=True)
center.own(Owner())
MPI.Finalize()
print("finalized", center.label, flush=True)
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_mpi_finalised_by_the_script(tmp_path, ranks):
    (tmp_path / "script.py").write_text(FINALIZE)
    done = launch.run_ranks(ranks, [sys.executable, str(tmp_path / "script.py")], timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("flushed") == ranks
    assert done.stdout.count("finalized") == ranks


LATE = """
import sys, time
import numpy as np
from mpi4py import MPI
import hvd_agn
if MPI.COMM_WORLD.rank == 1:
    time.sleep(4)
    sys.exit()
try:
    hvd_agn.Center([np.zeros(3, np.float32)])
except hvd_agn.errors.StallError:
    print("gave up", flush=True)
"""


def test_a_process_that_gave_up_ends(tmp_path):
    (tmp_path / "script.py").write_text(LATE)
    env = {"HVD_AGN_STALL_ABORT_SECONDS": "1"}
    done = launch.run_ranks(2, [sys.executable, str(tmp_path / "script.py")], timeout=60, env=env)
    assert "gave up" in done.stdout
    assert "not all ranks created Center; this process ends without MPI_Finalize" in done.stderr
    assert done.returncode != 0


def close_under_an_exchange():
    """Closing waits for the exchange of another thread, whose next one is refused."""
    center = Center([np.zeros(100_000, np.float32)])
    client = center.arrays_client
    refused = []

    def work():
        try:
            while True:
                client.exchange(1)
        except UsageError as error:
            refused.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.2)
    center.close()
    thread.join()
    return refused[0]


def test_closing_while_another_thread_exchanges():
    for text in on_ranks(2, close_under_an_exchange):
        assert "used after close()" in text


def hang():
    from mpi4py import MPI

    if MPI.COMM_WORLD.rank == 1:
        time.sleep(1000)
    MPI.COMM_WORLD.Barrier()


def test_the_harness_ends_a_hang_and_shows_the_stacks(tmp_path):
    before = set(os.listdir("/proc"))
    with pytest.raises(pytest.fail.Exception) as caught:
        on_ranks(2, hang, timeout=5)
    text = str(caught.value)
    assert "hang on 2 ranks ran over 5 s" in text
    assert "stack of rank 0" in text
    assert "stack of rank 1" in text
    assert text.count("in hang") == 2
    deadline = time.monotonic() + 20  # a killed process takes a moment to go
    while left := [p for p in set(os.listdir("/proc")) - before if b"test_errors.py" in _command_line(p)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def _command_line(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
