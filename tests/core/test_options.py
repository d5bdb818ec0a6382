"""How a center is hosted and reached: good and bad choices and variables, and ranks that choose differently."""

import os

import numpy as np
import pytest
from ranks import on_ranks

from hvd_agn import Center
from hvd_agn.errors import ConfigError, LayoutError


@pytest.mark.parametrize("ranks", [np.zeros(1, int), [np.int32(0)], "nodes"])
def test_good_center_ranks(ranks):
    with Center([theta := np.ones(3, "f4")], center_ranks=ranks) as center:
        theta += 1
        center.exchange(1)
        np.testing.assert_array_equal(center.snapshot()["array 0"], 2)


@pytest.mark.parametrize("ranks", [(1,), (-1,), (0, 0), "node", "", (), (True,), (0.0,), 0, None])
def test_bad_center_ranks(ranks):
    with pytest.raises(ConfigError, match=r"center_ranks=.*: give 'nodes', or different ranks from 0 to 0") as caught:
        Center([np.zeros(3, "f4")], center_ranks=ranks)
    assert f"center_ranks={ranks!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("argument", "value", "choices"),
    [("transport", "shm", "auto, direct, mailbox"), ("wire_dtype", "fp8", "None, bf16, fp16, int8")],
)
def test_bad_choices(argument, value, choices):
    with pytest.raises(ConfigError, match=f"{argument}={value!r}: give one of {choices}"):
        Center([np.zeros(3, "f4")], **{argument: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("HVD_AGN_TRANSPORT", "shm", "give one of auto, direct, mailbox"),
        ("HVD_AGN_RING_BLOCKS", "0", "give a whole number of blocks, from 1 to 4096"),
        ("HVD_AGN_RING_BLOCKS", "4097", "give a whole number of blocks, from 1 to 4096"),
        ("HVD_AGN_RING_BLOCKS", "many", "give a whole number of blocks, from 1 to 4096"),
    ],
)
def test_bad_variables(monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises((ConfigError, LayoutError), match=f"{name}={value!r}: {message}"):
        Center([np.zeros(3, "f4")])


DIFFERENT = {
    "hosts": ({"center_ranks": [1]}, '["center_ranks", [1]] here, ["center_ranks", [0]] on rank 0.'),
    "sharding": ({"center_ranks": [0, 2]}, '["center_ranks", [0, 2]] here, ["center_ranks", [0]] on rank 0.'),
    "transport": ({"transport": "direct"}, '["transport (HVD_AGN_TRANSPORT)", "direct"] here, ["transport (HVD_AGN_'),
    "ring": ({}, '["blocks of a ring (HVD_AGN_RING_BLOCKS)", 3] here'),
}


def differ():
    from mpi4py import MPI

    told = {}
    for name, (options, _) in DIFFERENT.items():
        odd = MPI.COMM_WORLD.rank == 1
        os.environ["HVD_AGN_RING_BLOCKS"] = "3" if odd and name == "ring" else "8"
        with pytest.raises(LayoutError) as caught:
            Center([np.zeros(3, "f4")], **{"transport": "mailbox", **(options if odd else {})})
        told[name] = str(caught.value)
    os.environ["HVD_AGN_RING_BLOCKS"] = "8"
    with pytest.raises(ConfigError) as caught:
        Center([np.zeros(3, "f4")], center_ranks=[7 if odd else 0])
    told["one bad"] = str(caught.value)
    theta = np.zeros(3, "f4")
    with Center([theta], transport="mailbox") as center:  # all ranks are still in step
        center.exchange(1)
    return told


def test_ranks_that_differ():
    for told in on_ranks(3, differ):
        for name, (_, message) in DIFFERENT.items():
            assert f"[rank 1] Center: {message}" in told[name]
        assert "[rank 1] Center: center_ranks=[7]: give 'nodes', or different ranks from 0 to 2" in told["one bad"]
