"""Wires that round, by mailbox between ranks of one machine: nothing is lost, and errors stay small."""

import numpy as np
import pytest
from ranks import on_ranks
from wires import WIRES, check_wires

from hvd_agn import Center


@pytest.mark.parametrize(
    "checks",
    [
        ["sums_are_exact", "small_deltas_arrive_later"],
        ["errors_stay_bounded", "float32_workers_reach_the_center"],
        ["what_fp16_cannot_hold_follows", "another_anchor_or_center", "clients_of_two_types"],
    ],
    ids=lambda checks: checks[0],
)
def test_wires(checks, tmp_path):
    on_ranks(2, check_wires, str(tmp_path), checks)


def hammer_through_wires(exchanges):
    """Many ranks, several shards, every wire: the sum is exact in the end."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    rng = np.random.default_rng(comm.rank)
    for wire in WIRES:
        shapes = [(7, 13), (300,), (), (255,)]
        arrays = [np.zeros(s, "f8") for s in shapes]
        center = Center(arrays, transport="mailbox", wire_dtype=wire, center_ranks=(0, 2))
        pushed = [np.zeros(s) for s in shapes]
        for _ in range(exchanges):
            for array, total in zip(arrays, pushed, strict=True):
                delta = rng.integers(-5000, 5001, array.shape)
                array += delta
                total += delta
            center.exchange(1)
        center.exchange(1, exact=True)
        comm.Barrier()
        # Every rank's deltas are what its arrays were off its anchor: rounding of the answers is no part of them.
        everyones = [comm.allreduce(total) for total in pushed]
        for value, expected in zip(center.snapshot().values(), everyones, strict=True):
            np.testing.assert_allclose(value, expected, rtol=0, atol=1e-6)
        center.close()


def test_wires_on_many_ranks():
    on_ranks(4, hammer_through_wires, 20)
