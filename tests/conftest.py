"""Small blocks, so that small arrays have many; and centers that a test leaves open are closed after it."""

import pytest


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setenv("HVD_AGN_BLOCK_BYTES", "1024")


@pytest.fixture(autouse=True)
def close_centers():
    yield
    from hvd_agn import shutdown

    for left in list(shutdown.centers):
        owner = left._owner
        left.own(None)
        left.close()
        if owner is not None:
            owner.closed()


@pytest.fixture(params=["avx2", "baseline"])
def kernels(request):
    """Each set of loops that this processor has."""
    from hvd_agn import _core

    best = _core.kernels()
    if not _core.use_kernels(request.param):
        pytest.skip(f"this processor or build has no {request.param} loops")
    yield request.param
    assert _core.use_kernels(best)
