"""Several ranks that train with Keras: nothing is lost or counted twice, through ``fit``, with kills, beside torch."""

import os
import signal
import warnings

import numpy as np
import pytest
from mailboxes import meet, same, state, wait_until
from ranks import on_ranks

from hvd_agn import Center, _core
from hvd_agn.errors import StalenessWarning

WORDS, WIDTH = 50, 8


def integers_that_count():
    """A dense layer that goes up by 1 in each step, and an embedding whose row of the step's word does."""
    import keras

    keras.utils.set_random_seed(1)
    number, word = keras.Input((4,), name="number"), keras.Input((1,), dtype="int32", name="word")
    dense = keras.layers.Dense(WIDTH, use_bias=False, kernel_initializer="zeros", name="dense")(number)
    rows = keras.layers.Embedding(WORDS, WIDTH, embeddings_initializer="zeros", name="rows")(word)
    return keras.Model([number, word], [dense, rows])


def minus_sum(_, predicted):
    import keras

    return -keras.ops.sum(predicted)


def count_through_fit(epochs, options):
    """Periods differ by rank, and do not divide the steps; the sum of updates is pushed, an integer."""
    import keras
    from mpi4py import MPI

    from hvd_agn.tensorflow import AGNOptimizer

    comm = MPI.COMM_WORLD
    warnings.simplefilter("ignore", StalenessWarning)
    model = integers_that_count()
    optimizer = AGNOptimizer(keras.optimizers.SGD(1.0), 2 + comm.rank % 3, normalize=False, **options)
    model.compile(optimizer, loss=[minus_sum, minus_sum])
    words = np.random.default_rng(comm.rank).integers(0, WORDS, (20, 1))
    inputs = {"number": np.ones((20, 4), np.float32), "word": words.astype(np.int32)}
    model.fit(inputs, [np.zeros((20, WIDTH)), np.zeros((20, 1, WIDTH))], batch_size=1, epochs=epochs, verbose=0)
    meet(comm)
    visits = epochs * np.bincount(words[:, 0], minlength=WORDS).astype(float)
    expected = [
        np.full((4, WIDTH), 20.0 * epochs * comm.size),
        np.repeat(comm.allreduce(visits)[:, None], WIDTH, 1),
    ]
    same(optimizer.center.snapshot().values(), expected)
    optimizer.pull()
    same(model.get_weights(), expected)
    meet(comm)
    return optimizer.stats()["exchanges"]


@pytest.mark.parametrize(
    ("ranks", "epochs", "options"),
    [
        (1, 2, {}),
        (2, 2, {"overlap": True}),
        (2, 2, {"transport": "mailbox", "wire_dtype": "bf16"}),
        (4, 2, {"transport": "mailbox", "center_ranks": [1, 2], "overlap": True}),
        (16, 1, {}),
    ],
    ids=str,
)
def test_fit_conserves(ranks, epochs, options):
    exchanges = on_ranks(ranks, count_through_fit, epochs, options, timeout=240)
    steps = 20 * epochs
    assert exchanges == [-(-steps // (2 + rank % 3)) for rank in range(ranks)]


# ---- a rank that dies

BLOCK, BLOCKS = 256, 3  # float32 elements in a block of 1024 bytes


def die_in_the_pass(stage, block):
    """Rank 1 is killed over a block, in the op; rank 0 looks, and exchanges over it."""
    import keras
    import tensorflow as tf
    from mpi4py import MPI

    from hvd_agn.tensorflow import AGNOptimizer

    comm = MPI.COMM_WORLD
    variable = tf.Variable(tf.zeros([BLOCKS * BLOCK]))
    optimizer = AGNOptimizer(keras.optimizers.SGD(-1.0), 2)
    optimizer.start([variable])
    train = tf.function(lambda: optimizer.apply([tf.ones([BLOCKS * BLOCK])], [variable]))
    train()
    pids = comm.allgather(os.getpid())
    first = BLOCKS // 2  # of rank 1 of 2
    if comm.rank == 1:
        _core.signal_at(getattr(_core.Stage, stage), (first + block) % BLOCKS, signal.SIGKILL)
        train()
        raise AssertionError("still alive")
    wait_until(lambda: state(pids[1]) in "XZ", "the end of rank 1")
    values = np.zeros((BLOCKS, BLOCK))
    for i in range(block + (stage == "committed")):
        values[(first + i) % BLOCKS] = 1
    (center,) = optimizer.center.snapshot().values()
    np.testing.assert_array_equal(center.reshape(BLOCKS, BLOCK), values)
    train()
    np.testing.assert_array_equal(variable.numpy().reshape(BLOCKS, BLOCK), values + 1)
    return "checked"


@pytest.mark.parametrize(("stage", "block"), [("written", 1), ("committed", 0)])
def test_a_killed_rank_leaves_blocks_whole(stage, block):
    assert on_ranks(2, die_in_the_pass, stage, block, expect_death=True) == ["checked", None]


# ---- one center, two frameworks

NAMES = ["dense/kernel", "dense/bias"]
SHAPES = [(40, 30), (30,)]


def torch_beside_tensorflow(overlap, transport):
    """Even ranks train with torch, odd ones with Keras."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    warnings.simplefilter("ignore", StalenessWarning)
    options = {"normalize": False, "overlap": overlap, "transport": transport}
    train = (of_torch if comm.rank % 2 == 0 else of_keras)(options)
    steps = 12 + comm.rank
    center = train(steps)
    meet(comm)
    total = sum(comm.allgather(steps))
    same(center.snapshot().values(), [np.full(shape, total) for shape in SHAPES])
    meet(comm)


def of_torch(options):
    import torch

    from hvd_agn.torch import AGNOptimizer

    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    named = zip(NAMES, parameters, strict=True)
    optimizer = AGNOptimizer(torch.optim.SGD(parameters, lr=1.0), 3, named_parameters=named, **options)

    def train(steps) -> Center:
        for parameter in parameters:
            parameter.grad = -torch.ones_like(parameter)
        for _ in range(steps):
            optimizer.step()
        optimizer.flush()
        return optimizer.center

    return train


def of_keras(options):
    import keras
    import tensorflow as tf

    from hvd_agn.tensorflow import AGNOptimizer

    layer = keras.layers.Dense(30, name="dense", kernel_initializer="ones")  # the center starts as rank 0's
    layer.build((None, 40))
    optimizer = AGNOptimizer(keras.optimizers.SGD(1.0), 3, **options)
    optimizer.start(layer.trainable_variables)

    @tf.function
    def step():
        optimizer.apply([-tf.ones(v.shape) for v in layer.trainable_variables], layer.trainable_variables)

    def train(steps) -> Center:
        for _ in range(steps):
            step()
        optimizer.flush()
        return optimizer.center

    return train


@pytest.mark.parametrize(("overlap", "transport"), [(False, "auto"), (True, "mailbox")])
def test_torch_and_tensorflow_share_a_center(overlap, transport):
    on_ranks(4, torch_beside_tensorflow, overlap, transport)
