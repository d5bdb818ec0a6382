"""What the ranks' Keras optimizers should have alike and no center makes so; whole numbers of NumPy."""

import json
import warnings

import keras
import numpy as np
from ranks import on_ranks
from tensorflow.compat import v1

from hvd_agn.errors import RankDifferenceWarning
from hvd_agn.tensorflow import AGNOptimizer
from hvd_agn.tensorflow.compat.graph import GraphVariables


def inner(case, odd):
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 30 if odd else 10, 0.5)
    return {
        "lr": lambda: keras.optimizers.Adam(0.5 if odd else 0.25),
        "momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.5 if odd else 0.25),
        "schedule": lambda: keras.optimizers.SGD(schedule if case == "schedule" else 0.1),
        "float8": lambda: keras.optimizers.SGD(0.1),
        "equal": lambda: keras.optimizers.SGD(lambda: 0.1, name="mine" if odd else "theirs"),
    }[case]()


EXPECTED = {
    "lr": "the optimizer's learning_rate is 0.5 here and 0.25 on rank 0. The center does not hold it",
    "momentum": "the optimizer's momentum is 0.5 here and 0.25 on rank 0.",
    "schedule": "the optimizer's learning_rate is ",
    "float8": "variable 'scale', which is not exchanged, is float32[2] of checksum ",
    "equal": None,
}


def wrap_differently():
    """What each case says on this rank."""
    from mpi4py import MPI

    odd = MPI.COMM_WORLD.rank == 1
    texts = []
    for case in EXPECTED:
        weight = keras.Variable(np.full(3, MPI.COMM_WORLD.rank, "f4"), name="weight")
        scale = keras.Variable(np.full(2, 1.0 + odd if case == "float8" else 1.0, "f4"), name="scale")
        scale.overwrite_with_gradient = True
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer = AGNOptimizer(inner(case, odd), np.int64(2), name="AGN")
            optimizer.start([weight, scale])
        texts.append([str(w.message) for w in caught if w.category is RankDifferenceWarning])
        np.testing.assert_array_equal(weight, 0)
        if case == "momentum":
            assert json.loads(json.dumps(optimizer.get_config()))["communication_period"] == 2
        optimizer.close()
    return texts


def test_what_differs_from_rank_0_is_named_there():
    first, second = on_ranks(2, wrap_differently)
    assert first == [[]] * len(EXPECTED)
    for (case, expected), texts in zip(EXPECTED.items(), second, strict=True):
        if expected is None:
            assert texts == [], case
        else:
            assert len(texts) == 1, (case, texts)
            assert texts[0].startswith(f"[rank 1] AGN: {expected}"), texts[0]


def test_the_hyper_parameters_of_tensorflow_1():
    facts = GraphVariables([]).facts(v1.train.MomentumOptimizer(0.25, 0.5, use_nesterov=True)).values
    assert facts["the optimizer's learning_rate"] == "0.25"
    assert facts["the optimizer's momentum"] == "0.5"
    assert facts["the optimizer's use_nesterov"] == "True"
