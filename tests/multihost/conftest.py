"""Emulated hosts for the tests of this folder, which skip where there can be none."""

import pytest

from hvd_agn import _core
from hvd_agn.tools import hosts as emulated


@pytest.fixture(scope="session")
def hosts():
    """Two hosts with fast links."""
    yield from _hosts()


@pytest.fixture
def slow_hosts(request):
    """Two hosts with links as the test's parameter has it, e.g. ``{"rate": "1gbit"}``."""
    yield from _hosts(**request.param)


def _hosts(**links):
    if reason := emulated.unavailable(**links):
        pytest.skip(reason)
    with emulated.EmulatedHosts(2, **links) as made:
        yield made


@pytest.fixture
def rma():
    """One-sided communication between hosts under MPI_THREAD_MULTIPLE."""
    version = _core.mpi_library_version()
    if "Open MPI v4" in version:
        pytest.skip(f"{version.split(',')[0]} has no one-sided communication over TCP: needs Open MPI 5 or MPICH")
