"""Hosts that are blocked or fail while others exchange with them, on one machine and between hosts."""

import ctypes
import os
import time

import numpy as np

from hvd_agn import Center


def block_the_host(folder, where):
    """The host's main thread is in a call that does not return; the worker exchanges all the same."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    theta = np.zeros(5000, "f4")
    center = Center([theta], transport="mailbox")
    pipe = os.path.join(folder, "pipe")
    if comm.rank == 0:
        if where == "in MPI":
            comm.recv(source=1)
        else:  # no thread of Python runs here until the other end is opened
            os.close(ctypes.PyDLL(None).open(pipe.encode(), os.O_RDONLY))
        return None
    time.sleep(0.5)  # for the host to get there
    for _ in range(50):
        theta += 1
        center.exchange(1)
    assert center.version == 50
    np.testing.assert_array_equal(center.snapshot()["array 0"], 50)
    if where == "in MPI":
        comm.send(None, dest=0)
    else:
        os.close(os.open(pipe, os.O_WRONLY))
    return "exchanged"


FAILS_AT_ONCE = """
import numpy
from mpi4py import MPI
from hvd_agn import Center
theta = numpy.zeros(1000, numpy.float32)
center = Center([theta], transport="mailbox")
if center.rank == 0:
    theta += 1000
    center.exchange(1)
    1 / 0
for _ in range(50):
    theta += 1
    center.exchange(1)
while center.version < 1 + 50 * (center.size - 1):
    pass
there = (center.snapshot()["array 0"] == 1000 + 50 * (center.size - 1)).all()
print(f"all there: {there}")  # in one write, so that those of two ranks do not mix
"""
