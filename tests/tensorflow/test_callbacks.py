"""The Keras callbacks: what they see of the center, and what they leave to training."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from ranks import on_ranks

import hvd_agn.tensorflow as agn
from hvd_agn.errors import ConfigError, UsageError
from hvd_agn.tensorflow.callbacks import CenterWeights, Statistics

X = np.random.default_rng(0).standard_normal((64, 4)).astype(np.float32)
Y = X.sum(1, keepdims=True)
STEPS = 8  # of an epoch; no multiple of the period


def compiled(outside=lambda optimizer: optimizer):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, name="dense")], name="model")
    optimizer = agn.AGNOptimizer(keras.optimizers.SGD(0.05), communication_period=3)
    model.compile(outside(optimizer), "mse")
    return model, optimizer


def fit(model, *callbacks, epochs=2, **options):
    options = {"batch_size": len(X) // STEPS, "shuffle": False, "verbose": 0, **options}
    return model.fit(X, Y, epochs=epochs, callbacks=list(callbacks), **options)


def kernel(model):
    return model.get_layer("dense").kernel.numpy().copy()


def center_kernel(optimizer):
    return optimizer.center.snapshot()["model/dense/kernel"]


class Look(keras.callbacks.Callback):
    """Notes the kernel at some hooks."""

    def __init__(self, *hooks):
        super().__init__()
        self.seen = []
        for hook in hooks:
            setattr(self, hook, lambda *_, **__: self.seen.append(kernel(self.model)))


def test_validation_sees_the_center_and_training_goes_on_with_the_local_values():
    bare, _ = compiled()
    outside = Look("on_epoch_end")
    fit(bare, outside)
    model, optimizer = compiled()
    centers = []
    after = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: centers.append(center_kernel(optimizer)))
    during, at_end = Look("on_test_batch_end"), Look("on_epoch_end")
    fit(model, during, CenterWeights(), at_end, after, validation_data=(X, Y), validation_batch_size=len(X))
    assert np.array_equal(during.seen, centers)
    assert np.array_equal(at_end.seen, outside.seen)
    assert np.array_equal(kernel(model), kernel(bare))
    assert not any(np.array_equal(a, b) for a, b in zip(centers, outside.seen, strict=True))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras, when it saves
def test_the_callbacks_inside_see_the_center_at_the_end_of_an_epoch(tmp_path):
    model, optimizer = compiled()
    centers = []
    before = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: centers.append(center_kernel(optimizer)))
    files = [
        keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.weights.h5", save_weights_only=True),
        keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras"),
    ]
    local = Look("on_train_batch_end")
    fit(model, before, CenterWeights(*files, local))
    assert len(local.seen) == 2 * STEPS
    for epoch, expected in enumerate(centers, 1):
        assert np.array_equal(kernel(keras.models.load_model(tmp_path / f"{epoch}.keras")), expected)
        other, _ = compiled()
        other.load_weights(tmp_path / f"{epoch}.weights.h5")
        assert np.array_equal(kernel(other), expected)
        assert not np.array_equal(local.seen[epoch * STEPS - 1], expected)


def test_early_stopping_inside_ends_fit_with_the_best_center():
    model, optimizer = compiled()
    best = []
    stop = keras.callbacks.EarlyStopping("val_loss", patience=1, min_delta=1e9, restore_best_weights=True)
    first = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: best.append(center_kernel(optimizer)))
    done = fit(model, first, CenterWeights(stop), epochs=5, validation_data=(X, Y))
    assert len(done.epoch) == 2
    assert optimizer.stats()["exchanges"] == 2 * STEPS // 3 + 1  # with the flush
    assert np.array_equal(kernel(model), best[0])


@pytest.mark.parametrize("scaled", [False, True])
def test_evaluate_and_predict_see_the_center(scaled):
    model, optimizer = compiled(keras.optimizers.LossScaleOptimizer if scaled else lambda optimizer: optimizer)
    with pytest.raises(UsageError, match=r"there is no center yet: call start\(\), or train a step"):
        model.evaluate(X, Y, verbose=0, callbacks=[CenterWeights()])
    optimizer.start(model.trainable_variables)
    for layer in model.layers:
        layer.set_weights([weight + 1 for weight in layer.get_weights()])
    local = kernel(model)
    seen = Look("on_test_batch_end", "on_predict_batch_end")
    model.evaluate(X, Y, batch_size=len(X), verbose=0, callbacks=[CenterWeights(seen)])
    assert np.array_equal(kernel(model), local)
    predicted = model.predict(X, batch_size=len(X), verbose=0, callbacks=[CenterWeights(seen)])
    assert np.array_equal(kernel(model), local)
    assert np.array_equal(seen.seen, [center_kernel(optimizer)] * 2)
    assert np.allclose(predicted, X @ (local - 1), atol=1e-6)


def other_pushes_are_evaluated():
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    model, optimizer = compiled()
    optimizer.start(model.trainable_variables)
    before = kernel(model)
    if comm.rank == 1:
        fit(model, epochs=1)
    comm.Barrier()
    seen = Look("on_test_batch_end")
    model.evaluate(X, Y, batch_size=len(X), verbose=0, callbacks=[CenterWeights(seen)])
    assert np.array_equal(seen.seen[0], center_kernel(optimizer))
    assert not np.array_equal(seen.seen[0], before)
    assert comm.rank == 1 or np.array_equal(kernel(model), before)
    return optimizer.stats()["exchanges"]


def test_evaluation_on_a_rank_sees_what_others_have_pushed():
    assert on_ranks(2, other_pushes_are_evaluated) == [0, 3]


class Fails(keras.callbacks.Callback):
    def on_test_batch_end(self, batch, logs=None):
        raise KeyboardInterrupt


def test_an_evaluation_that_fails_is_mended_by_the_next_fit():
    model, optimizer = compiled()
    local = Look("on_train_batch_end")
    with pytest.raises(KeyboardInterrupt):
        fit(model, local, CenterWeights(), Fails(), validation_data=(X, Y))
    first = Look("on_train_begin")
    fit(model, first, CenterWeights(first), epochs=1)
    assert np.array_equal(first.seen, [local.seen[-1]] * 2)
    assert optimizer.stats()["exchanges"] == 2 * STEPS // 3 + 1


def test_an_evaluation_that_fails_is_mended_at_exit():
    lines = ["import test_callbacks as t", "model, _ = t.compiled()"]
    lines += ["t.fit(model, t.CenterWeights(), t.Fails(), validation_data=(t.X, t.Y))"]
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        env={**os.environ, "PYTHONPATH": f"{here}:{here.parent}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "KeyboardInterrupt" in done.stderr
    assert "closing failed" not in done.stderr


@pytest.mark.parametrize("scaled", [False, True])
def test_statistics_are_in_the_logs(scaled, tmp_path, capsys):
    model, optimizer = compiled(keras.optimizers.LossScaleOptimizer if scaled else lambda optimizer: optimizer)
    stats = []
    look = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: stats.append(optimizer.stats()))
    logged = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    history = fit(model, look, Statistics(), logged, verbose=2).history
    for key in Statistics.KEYS:
        assert history[key] == [s[key] for s in stats], key
    with (tmp_path / "log.csv").open() as file:
        assert [row["exchanges"] for row in csv.DictReader(file)] == ["2", "5"]
    assert "center_version: 5" in capsys.readouterr().out


def test_statistics_are_in_tensorboard(tmp_path):
    model, _ = compiled()
    fit(model, Statistics(), keras.callbacks.TensorBoard(tmp_path, write_graph=False))
    written = {}
    for file in (tmp_path / "train").iterdir():
        for record in tf.data.TFRecordDataset(str(file)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                written[value.tag, event.step] = float(tf.make_ndarray(value.tensor))
    assert [written["epoch_exchanges", epoch] for epoch in range(2)] == [2, 5]
    assert {f"epoch_{key}" for key in Statistics.KEYS} <= {tag for tag, _ in written}


def test_what_cannot_be_seen_is_an_error():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    for callback in (Statistics(), CenterWeights()):
        with pytest.raises(UsageError, match=r"the model's optimizer is a SGD: compile the model with"):
            fit(model, callback)
    with pytest.raises(ConfigError, match="ModelCheckpoint with save_freq=10 would save local values"):
        CenterWeights(keras.callbacks.ModelCheckpoint("x.keras", save_freq=10))
