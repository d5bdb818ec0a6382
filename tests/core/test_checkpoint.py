"""Center.save and Center.load: what comes back, by how many ranks, and what a bad file does."""

import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from ranks import on_ranks
from reference import RULES

from hvd_agn import Center, rules
from hvd_agn.errors import CheckpointError

RULE = rules.SGD(lr=0.5, momentum=0.9, dampening=0.1)


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "weight": rng.standard_normal((30, 50)).astype(np.float32),
        "half": rng.standard_normal(77).astype(np.float16),
        "double": rng.standard_normal(()).astype(np.float64),
    }


def train(center, theta, seed, exchanges):
    rng = np.random.default_rng(seed)
    for _ in range(exchanges):
        for array in theta.values():
            array += (0.1 * rng.standard_normal(array.shape)).astype(array.dtype)
        center.exchange(2)


@pytest.mark.parametrize("rule", [r for r in RULES if getattr(r, "bias_correction", "") != "tf_contrib"], ids=repr)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(rule, tmp_path):
    theta = arrays()
    whole = Center(theta, rule)
    train(whole, theta, 1, 5)
    whole.save(tmp_path / "center.safetensors")
    whole.pull()
    train(whole, theta, 2, 5)

    again = arrays(seed=9)
    resumed = Center(again, rule)
    resumed.load(tmp_path / "center.safetensors")
    assert resumed.version == 5
    train(resumed, again, 2, 5)
    for name, expected in theta.items():
        np.testing.assert_array_equal(again[name], expected)
    for mine, expected in zip(resumed._read(), whole._read(), strict=True):
        np.testing.assert_equal(mine, expected)


def test_what_is_in_the_file(tmp_path):
    center = Center(theta := arrays(), RULE)
    center.save(str(tmp_path / "c.safetensors"))
    found = safetensors.numpy.load_file(tmp_path / "c.safetensors")
    assert set(found) == set(theta) | {f"slot/momentum/{name}" for name in theta}
    for name, array in theta.items():
        np.testing.assert_array_equal(found[name], array.astype(found[name].dtype))
    assert os.listdir(tmp_path) == ["c.safetensors"]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "c.safetensors"
    center = Center([np.zeros(5, np.float32)])
    center.save(path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        center.save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["c.safetensors"]


def write(path, names=("array 0",), dtype=np.float32, count=5, value=1.0, **metadata):
    data = {name: np.full(count, value, dtype) for name in names}
    safetensors.numpy.save_file(data, path, {"format": "hvd_agn center 1", "version": "3", **metadata})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, r"it cannot be read .*Give a file that save\(\) wrote"),
        (lambda path: path.write_bytes(b"nonsense" * 10), "it cannot be read"),
        (lambda path: write(path, format="other"), r"was not written by Center.save\(\)"),
        (lambda path: write(path, version="x"), r"was not written by Center.save\(\)"),
        (lambda path: write(path, count=6), r"'array 0' is float32\[6\]; expected float32\[5\]"),
        (lambda path: write(path, dtype=np.float64), r"'array 0' is float64\[5\]; expected float32\[5\]"),
        (lambda path: write(path, names=["other"]), "'array 0' is missing; 'other' is there instead; expected float32"),
        (lambda path: write(path, names=["array 0", "more"]), "also has 'more', which this center has not"),
        (lambda path: write(path, value=np.inf), "'array 0' has a NaN or an Inf"),
    ],
)
def test_bad_files(tmp_path, make, message):
    path = tmp_path / "c.safetensors"
    make(path)
    theta = np.full(5, 7, np.float32)
    center = Center([theta])
    with pytest.raises(CheckpointError, match=rf"\[rank 0\] Center: .*{message}"):
        center.load(path)
    np.testing.assert_array_equal(center.snapshot()["array 0"], 7)


def test_slots_must_match(tmp_path):
    Center([np.zeros(5, np.float32)], rules.Add()).save(tmp_path / "add")
    Center([np.zeros(5, np.float32)], RULE).save(tmp_path / "momentum")
    with pytest.raises(CheckpointError, match=r"'slot/momentum/array 0' is missing.*The file has rule Add"):
        Center([np.zeros(5, np.float32)], RULE).load(tmp_path / "add")
    with pytest.raises(CheckpointError, match="also has 'slot/momentum/array 0'"):
        Center([np.zeros(5, np.float32)]).load(tmp_path / "momentum")


def save_under_load(folder):
    """Rank 0 saves while all push; every file is consistent per block and in all slots."""
    from mpi4py import MPI

    theta = np.zeros(20_000, np.float32)
    center = Center([theta], rules.SGD(lr=1.0, momentum=0.5))
    for i in range(60):
        theta += 1
        center.exchange(1)
        if i % 6 == 5:
            center.save(Path(folder) / "c.safetensors")
            if MPI.COMM_WORLD.rank == 0:
                for array in safetensors.numpy.load_file(Path(folder) / "c.safetensors").values():
                    full = array[: len(array) // 256 * 256].reshape(-1, 256)
                    assert (full == full[:, :1]).all()
    MPI.COMM_WORLD.Barrier()
    center.save(Path(folder) / "c.safetensors")
    return center.version


def load_and_add(folder, expect_version):
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    theta = np.full(20_000, 5.0, np.float32)
    center = Center([theta], rules.SGD(lr=1.0, momentum=0.5))
    theta += comm.rank  # not pushed, so dropped
    center.load(Path(folder) / "c.safetensors")
    assert center.version >= expect_version
    assert comm.allreduce(float(theta[0]), op=MPI.MAX) >= 60
    comm.Barrier()
    center.exchange(1)
    with pytest.raises(CheckpointError, match="it cannot be read"):  # on every rank
        center.load(Path(folder) / "missing")
    with pytest.raises(CheckpointError, match="it cannot be read"):
        center.load(Path(folder))
    return float(theta[0])


def test_other_numbers_of_ranks(tmp_path):
    version = on_ranks(2, save_under_load, str(tmp_path))[0]
    assert version == 120
    on_ranks(4, load_and_add, str(tmp_path), version)
    on_ranks(1, load_and_add, str(tmp_path), version)
