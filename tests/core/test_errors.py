"""Bad input and bad surroundings: each message names the thing, the rank and the fix, on every rank."""

import os
import re
import subprocess

import numpy as np
import pytest
from ranks import on_ranks

from hvd_agn import Center, _core, mpi, rules
from hvd_agn.errors import ConfigError, LayoutError, SharedMemoryError, UsageError


def readonly():
    array = np.zeros(3, np.float32)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros(3, np.int64), "its type is none of float32, float64, float16, bfloat16"),
        (np.zeros(3, np.complex64), "its type is none of"),
        (np.zeros((4, 4), np.float32)[:, 1], r"it is not contiguous \(C order\)"),
        (np.zeros((4, 4), np.float32).T[1:], "it is not contiguous"),
        (readonly(), "it is not a writable array on the CPU"),
        ([1.0, 2.0], "it is not a writable array on the CPU"),
        (None, "it is not a writable array on the CPU"),
    ],
)
def test_unusable_arrays(array, reason):
    with pytest.raises(LayoutError, match=rf"'bad' \(.*\) cannot be exchanged: {reason}.*Give a writable, contiguous"):
        Center({"good": np.zeros(3, np.float32), "bad": array})


def test_arrays_that_share_memory():
    array = np.zeros(10, np.float32)
    with pytest.raises(LayoutError, match=r"'array [01]' and 'array [01]' share memory. Give each array once"):
        Center([array, array[5:]])


def test_no_arrays():
    with pytest.raises(LayoutError, match=r"\[rank 0\] Center: no arrays to exchange. Give at least one"):
        Center([])


def test_a_start_that_is_not_finite():
    with pytest.raises(LayoutError, match=r"'b' has a NaN or an Inf. Initialise it on rank 0"):
        Center({"a": np.zeros(3, np.float32), "b": np.array([1, np.nan], np.float32)})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rules.Add(scale=float("nan")), "rules.Add: scale=nan: give a finite number"),
        (lambda: rules.Add(scale="1"), "rules.Add: scale='1': give a finite number"),
        (lambda: rules.SGD(lr=-1), "rules.SGD: lr=-1: give a number at least 0"),
        (lambda: rules.SGD(lr=1, momentum=-0.1), "momentum=-0.1: give a number at least 0"),
        (lambda: rules.SGD(lr=1, nesterov=True), "nesterov=True needs momentum > 0 and dampening=0"),
        (lambda: Center([np.zeros(1, np.float32)], rule="add"), "rule='add': give one of hvd_agn.rules"),
        (lambda: Center([np.zeros(1, np.float32)], comm=7), "comm=7: give an mpi4py communicator, or None"),
        (lambda: Center([np.zeros(1, np.float32)], on_nonfinite="x"), "on_nonfinite='x': give one of skip, raise"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("HVD_AGN_BLOCK_BYTES", "100", "HVD_AGN_BLOCK_BYTES='100': give a whole number of bytes, a multiple of 64"),
        ("HVD_AGN_BLOCK_BYTES", "big", "HVD_AGN_BLOCK_BYTES='big': give a whole number.*default 260032"),
        ("HVD_AGN_STALL_SECONDS", "-1", "HVD_AGN_STALL_SECONDS='-1': give a number of seconds; 0 switches"),
        ("HVD_AGN_STALL_ABORT_SECONDS", "nan", "HVD_AGN_STALL_ABORT_SECONDS='nan': give a number of seconds"),
        ("HVD_AGN_BLOCKBYTES", "64", "HVD_AGN_BLOCKBYTES is not a variable of hvd_agn. There are: HVD_AGN_BLOCK_BYTES"),
    ],
)
def test_bad_variables(monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        Center([np.zeros(1, np.float32)])


def test_use_after_close():
    center = Center([np.zeros(3, np.float32)], name="digits")
    client = center.arrays_client
    center.close()
    center.close()
    for call in (center.exchange, center.pull, center.stats, center.snapshot, client.exchange, client.pull):
        with pytest.raises(UsageError, match=r"\[rank 0\] digits: used after close\(\)"):
            call()
    with pytest.raises(UsageError, match="used after close"):
        center.save("nowhere")


def test_steps_must_be_positive():
    with pytest.raises(ValueError, match="exchange after 0 steps: give a positive number"):
        Center([np.zeros(3, np.float32)]).exchange(0)


# ---- ranks that differ


def build(differing):
    """Rank 1 differs from rank 0 in one way; returns the message that each rank gets."""
    from mpi4py import MPI

    odd = MPI.COMM_WORLD.rank == 1
    arrays = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.float32)}
    rule = None
    if odd and differing == "shape":
        arrays["b"] = np.zeros(5, np.float32)
    if odd and differing == "type":
        arrays["b"] = np.zeros(4, np.float64)
    if odd and differing == "name":
        arrays["c"] = arrays.pop("b")
    if odd and differing == "count":
        del arrays["b"]
    if odd and differing == "rule":
        rule = rules.SGD(lr=0.5)
    if odd and differing == "block":
        os.environ["HVD_AGN_BLOCK_BYTES"] = "2048"
    if odd and differing == "unusable":
        arrays["b"] = np.zeros(4, np.int32)
    with pytest.raises(LayoutError) as caught:
        Center(arrays, rule)
    os.environ["HVD_AGN_BLOCK_BYTES"] = "1024"
    Center({"a": np.zeros(3, np.float32)}).close()  # all ranks are still in step
    return str(caught.value)


@pytest.mark.parametrize(
    ("differing", "message"),
    [
        ("shape", '["b", [5], "float32"] here, ["b", [4], "float32"] on rank 0.'),
        ("type", '["b", [4], "float64"] here, ["b", [4], "float32"] on rank 0.'),
        ("name", '["c", [4], "float32"] here, ["b", [4], "float32"] on rank 0.'),
        ("count", "1 arrays here, 2 on rank 0."),
        ("rule", '"SGD(lr=0.5'),
        ("block", '["block bytes (HVD_AGN_BLOCK_BYTES)", 2048] here'),
        ("unusable", "'b' (ndarray) cannot be exchanged"),
    ],
)
def test_ranks_that_differ(differing, message):
    for text in on_ranks(3, build, differing):
        assert message in text
        if differing != "unusable":
            assert "[rank 1] Center: " in text


def test_half_and_float_workers_share_a_center():
    on_ranks(2, mixed_types)


def mixed_types():
    """The center's type must agree, the worker's need not."""
    from mpi4py import MPI

    theta = np.zeros(100, [np.float32, np.float16][MPI.COMM_WORLD.rank])
    center = Center([theta])
    for _ in range(10):
        theta += 1
        center.exchange(1)
    MPI.COMM_WORLD.Barrier()
    np.testing.assert_array_equal(center.snapshot()["array 0"], 20)


# ---- shared memory


def need_too_much():
    """What each rank is told when the center does not fit."""
    free = 10_000_000
    mpi.shared_memory_free = lambda: free
    with pytest.raises(SharedMemoryError) as caught:
        Center([np.zeros(5_000_000, np.float32)])
    Center([np.zeros(100, np.float32)]).close()
    return str(caught.value)


def test_no_room_for_the_center():
    for text in on_ranks(2, need_too_much):
        assert "[rank 0] Center: the center needs 2" in text  # the host
        assert "bytes of shared memory" in text
        assert "has 10000000 free" in text
        assert "docker run --shm-size" in text


def really_need_too_much(directory):
    """As above, in a file system that is really that small."""
    assert mpi.shared_memory_free() < 2**20
    with pytest.raises(SharedMemoryError, match=f"{directory} on the host has .* free"):
        Center([np.zeros(2**20, np.float32)])


def test_a_small_shared_memory_file_system(tmp_path):
    if "Open MPI" not in _core.mpi_library_version():
        pytest.skip("only Open MPI can be told where to keep shared windows")
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", tmp_path]).returncode:
        pytest.skip("mounting a small tmpfs needs root and the right to mount")
    try:
        on_ranks(2, really_need_too_much, str(tmp_path), env={"OMPI_MCA_osc_sm_backing_directory": str(tmp_path)})
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def fail_on_rank_0(where):
    """What goes wrong on rank 0 alone, of any kind, is raised on every rank."""
    if where == "room":
        mpi.shared_memory_free = lambda: os.statvfs("/nonexistent").f_bavail
    else:
        _core.widen = fail
    with pytest.raises((SharedMemoryError, LayoutError)) as caught:
        Center([np.zeros(100, np.float32)])
    return str(caught.value)


def fail(*_):
    raise MemoryError("no memory for this")


@pytest.mark.parametrize(
    ("where", "message"), [("room", "no place for shared memory: .*nonexistent"), ("values", "MemoryError: no memory")]
)
def test_rank_0_fails_alone(where, message):
    for text in on_ranks(2, fail_on_rank_0, where, timeout=30):
        assert re.search(rf"\[rank 0\] Center: {message}", text)
