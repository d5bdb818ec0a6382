"""Files with an AGNOptimizer inside, of several ranks."""

import numpy as np
from keras_files import CASES, assert_same, compiled, train
from ranks import on_ranks


def of_worker(model):
    worker = model.optimizer._worker
    return [*model.get_weights(), *worker.arrays.anchor(worker.client), np.array(int(model.optimizer._since))]


def saved_by_each(folder):
    from mpi4py import MPI

    model = compiled(CASES["Adam"])
    rank = MPI.COMM_WORLD.rank
    train(model, range(4 + rank))
    MPI.COMM_WORLD.barrier()
    model.save_weights(f"{folder}/{rank}.weights.h5")
    np.savez(f"{folder}/{rank}.npz", *of_worker(model))
    if rank == 0:
        np.savez(f"{folder}/center.npz", *model.optimizer.center.snapshot().values())
    MPI.COMM_WORLD.barrier()  # before one of them flushes


def loaded_by_each(folder, of_rank=None, running=False):
    """Before training, or, as Keras' callbacks do, in a run, each rank when it comes to it."""
    from mpi4py import MPI

    rank = MPI.COMM_WORLD.rank
    of_rank = rank if of_rank is None else of_rank
    model = compiled(CASES["Adam"])
    if running:
        train(model, range(6 + rank))
    else:
        model.optimizer.build(model.trainable_variables)
    model.load_weights(f"{folder}/{of_rank}.weights.h5")
    model.optimizer.start()
    MPI.COMM_WORLD.barrier()
    expected = list(np.load(f"{folder}/{rank}.npz").values())
    center = list(np.load(f"{folder}/center.npz").values())
    assert model.optimizer.center.resumed != running
    if of_rank != rank:
        expected = [*center, *center, np.array(0)]
    assert_same(of_worker(model), expected)
    assert_same(model.optimizer.center.snapshot().values(), center)
    version = model.optimizer.center.version
    MPI.COMM_WORLD.barrier()  # before one of them flushes
    return version


def test_two_ranks_resume(tmp_path):
    """Each from its own file; then both from rank 0's, where rank 1 takes the center over; then from rank 1's."""
    on_ranks(2, saved_by_each, str(tmp_path))
    assert on_ranks(2, loaded_by_each, str(tmp_path)) == [2, 2]
    assert on_ranks(2, loaded_by_each, str(tmp_path), 0) == [2, 2]
    assert on_ranks(2, loaded_by_each, str(tmp_path), 1) == [2, 2]
    assert on_ranks(2, loaded_by_each, str(tmp_path), None, True) == [2, 2]
    assert on_ranks(2, loaded_by_each, str(tmp_path), 0, True) == [2, 2]
