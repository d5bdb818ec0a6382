"""What tests of exchanges in the background share: the end of one, and ranks that count what they pushed."""

import time

import numpy as np
from exchanges import SHAPES
from mailboxes import wait_until

from hvd_agn import Center

DOUBLES = ["f8"] * 7


def land(client):
    wait_until(lambda: client.ready, "the exchange in the background")


def overlap_and_count(rounds, variants):
    """All ranks push integers with flights of any length; the center is their sum, and so is every worker in the end.

    Each variant: transport, hosts, wire, types.
    """
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    rng = np.random.default_rng(comm.rank)
    for transport, hosts, wire, dtypes in variants:
        arrays = [np.zeros(s, t) for s, t in zip(SHAPES, dtypes, strict=True)]
        center = Center(arrays, transport=transport, center_ranks=hosts, wire_dtype=wire, overlap=True)
        client, pushed = center.arrays_client, [np.zeros(s) for s in SHAPES]
        for _ in range(rounds):
            for _ in range(int(rng.integers(1, 4))):
                for array, total in zip(arrays, pushed, strict=True):
                    delta = rng.integers(-2, 3, array.shape)
                    array += delta.astype(array.dtype)
                    total += delta
                if rng.random() < 0.3:
                    time.sleep(rng.random() * 0.002)
            if client.started and (client.ready or rng.random() < 0.5):
                client.finish()
            if not client.started:
                client.start(1)
        if client.started:
            client.finish()
        client.exchange(1, exact=True)
        comm.Barrier()
        for value, total in zip(center.snapshot().values(), pushed, strict=True):
            np.testing.assert_allclose(value, comm.allreduce(total), rtol=0, atol=1e-6 if wire == "int8" else 0)
        center.pull()
        for array, value in zip(arrays, center.snapshot().values(), strict=True):
            np.testing.assert_array_equal(array, value.astype(array.dtype))
        comm.Barrier()
        center.close()
