"""Communicators other than the world: messages have the world's ranks; one that cannot be used is named."""

import os
import re
import tempfile
import time

import numpy as np
import pytest
from ranks import on_ranks

from hvd_agn import Center
from hvd_agn.errors import AGNError, ConfigError, LayoutError, UsageError


def messages_of_a_group():
    """Ranks 2 and 3 of 4 in the other order, so that rank 0 of theirs is 3; what each is told, by what went wrong."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    odd = world.Split(world.rank // 2, -world.rank)
    texts = {}

    def told(what, call, error=AGNError):
        with pytest.raises(error) as caught:
            call()
        texts[what] = str(caught.value)

    first = odd.rank == 0
    told("length", lambda: Center([np.zeros(3 if first else 4, "f4")], comm=odd), LayoutError)
    told("start", lambda: Center([np.full(3, np.nan, "f4")], comm=odd), LayoutError)
    told("host", lambda: Center([np.zeros(3, "i4")], comm=odd, name="digits"), LayoutError)
    with Center([np.zeros(3, "f4")], comm=odd, overlap=True, transport="mailbox") as center:
        told("finish", center.arrays_client.finish, UsageError)
        label = center.label
        assert (center.rank, center.size) == (odd.rank, 2)
        world.Barrier()
    told("closed", center.barrier, UsageError)
    os.environ["HVD_AGN_STALL_SECONDS"] = "0.2"
    with Center([np.zeros(3, "f4")], comm=odd) as center, tempfile.TemporaryFile("w+") as said:
        if first:
            time.sleep(1)
        stderr = os.dup(2)
        os.dup2(said.fileno(), 2)
        center.barrier()
        os.dup2(stderr, 2)
        said.seek(0)
        texts["wait"] = said.read()
    return label, texts


def test_messages_have_the_worlds_rank():
    ranks = on_ranks(4, messages_of_a_group)
    for rank, (label, texts) in enumerate(ranks):
        root = 1 if rank < 2 else 3
        other = root - 1
        assert label == f"[rank {rank}] Center"
        assert texts["length"].startswith(f"[rank {other}] Center: ")
        assert f"on rank {root}. Build the same model" in texts["length"]
        assert f"[rank {root}] Center: 'array 0' has a NaN or an Inf. Initialise it on rank {root}." in texts["start"]
        assert texts["host"].startswith(f"[rank {rank}] digits: ")
        for what in ("finish", "closed"):
            assert texts[what].startswith(f"[rank {rank}] "), what
        if rank == other:
            assert texts["wait"].startswith(f"[rank {rank}] hvd_agn: waits for all ranks to call Center.barrier (")


def unusable():
    """What each rank is told of a communicator that it cannot use, and that the others go on."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    alone = world.rank == 2
    group = world.Split(MPI.UNDEFINED if alone else 0)
    texts = []
    if alone:
        for comm in (group, MPI.COMM_NULL):
            with pytest.raises(ConfigError) as caught:
                Center([np.zeros(3, "f4")], comm=comm)
            texts.append(str(caught.value))
    else:
        Center([np.zeros(3, "f4")], comm=group).close()
    half = world.Split(int(alone))
    between = half.Create_intercomm(0, world, 0 if alone else 2)
    with pytest.raises(ConfigError, match=rf"\[rank {world.rank}\] comm= is an intercommunicator. Give .*Merge\(\)"):
        Center([np.zeros(3, "f4")], comm=between)
    merged = between.Merge()
    Center([np.zeros(3, "f4")], comm=merged).close()
    freed = world.Dup()
    freed.Free()
    with pytest.raises(ConfigError, match=r"comm= is MPI.COMM_NULL.*or a communicator that was freed"):
        Center([np.zeros(3, "f4")], comm=freed)
    return texts


def test_communicators_that_cannot_be_used():
    texts = on_ranks(3, unusable)[2]
    assert len(texts) == 2
    for text in texts:
        assert re.match(r"\[rank 2\] comm= is MPI.COMM_NULL.*Make no center on this rank, or give", text)
