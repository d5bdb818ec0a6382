"""Files with an AGNOptimizer inside: training goes on as if nothing had been, and foreign files are told apart."""

import json
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import optimizers
from keras_files import CASES, assert_same, compiled, seen, train
from keras_runs import PERIOD, agn, assert_close, fit, network

from hvd_agn import rules
from hvd_agn.errors import CheckpointError
from hvd_agn.tensorflow import AGNOptimizer


def load_model(folder, options, dtype):
    model = keras.saving.load_model(folder / "model.keras")
    model.run_eagerly = True  # which no file holds
    return model


def load_weights(folder, options, dtype):
    model = compiled(options, dtype)
    model.optimizer.build(model.trainable_variables)
    model.load_weights(folder / "model.weights.h5")
    return model


def restore(folder, options, dtype):
    """Before the optimizer has variables."""
    model = compiled(options, dtype)
    tf.train.Checkpoint(model=model, optimizer=model.optimizer).restore(str(folder / "checkpoint-1"))
    return model


WAYS = {
    "load_model": (lambda model, folder: model.save(folder / "model.keras"), load_model),
    "load_weights": (lambda model, folder: model.save_weights(folder / "model.weights.h5"), load_weights),
    "Checkpoint": (
        lambda model, folder: tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(
            str(folder / "checkpoint")
        ),
        restore,
    ),
}


@pytest.mark.parametrize("stop", [4, 6])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_is_bit_identical(way, case, stop, tmp_path):
    """Stopped within a period and at its end, where with ``overlap`` an exchange is under way: loading merges it.

    But not from a checkpoint of TensorFlow, which sets the variables after all else: there it is merged before.
    """
    save, load = WAYS[way]
    model = compiled(CASES[case])
    train(model, range(stop))
    before = model.get_weights()
    if way == "Checkpoint":
        agn(model)._worker.land()
    save(model, tmp_path)
    assert way == "Checkpoint" or all((a == b).all() for a, b in zip(before, model.get_weights(), strict=True))
    agn(model)._worker.land()
    middle = seen(model)
    train(model, range(stop, 11))
    expected = seen(model)
    agn(model).close()

    model = load(tmp_path, CASES[case], None)
    agn(model).start(model.trainable_variables)
    assert_same(seen(model), middle)
    train(model, range(stop, 11))
    assert_same(seen(model), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("way", ["load_weights", "Checkpoint"])
def test_other_types_resume_too(way, dtype, tmp_path):
    save, load = WAYS[way]
    options = {"accumulate": "gradients", "overlap": True}
    model = compiled(options, dtype)
    train(model, range(4))
    save(model, tmp_path)
    train(model, range(4, 8))
    expected = seen(model)
    agn(model).close()
    model = load(tmp_path, options, dtype)
    train(model, range(4, 8))
    assert_same(seen(model), expected)


def test_a_fresh_process_goes_on(tmp_path):
    model = compiled(CASES["Adam"], graph=True)
    train(model, range(4))
    model.save(tmp_path / "model.keras")
    train(model, range(4, 8))
    np.savez(tmp_path / "expected.npz", *seen(model))
    script = """
        import sys, pathlib
        sys.path[:0] = sys.argv[2:]
        import numpy as np, keras, hvd_agn.tensorflow
        from test_keras_files import seen, train
        folder = pathlib.Path(sys.argv[1])
        model = keras.saving.load_model(folder / "model.keras")
        train(model, range(4, 8))
        np.savez(folder / "found.npz", *seen(model))
    """
    paths = [path for path in sys.path if path.rstrip("/").endswith("tests")]
    paths.append(str(__file__).rpartition("/")[0])
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(tmp_path), *paths], check=True, timeout=120)
    found, expected = (np.load(tmp_path / f"{name}.npz") for name in ("found", "expected"))
    assert_same([found[key] for key in found], [expected[key] for key in expected])


@pytest.mark.parametrize("center_first", [True, False])
def test_a_checkpoint_restored_into_a_run(center_first, tmp_path):
    """The center first, by itself, or with the rest."""
    model = compiled(CASES["Adam"])
    checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    train(model, range(4))
    model.optimizer.center.save(tmp_path / "center")
    path = checkpoint.save(str(tmp_path / "checkpoint"))
    middle = seen(model)
    train(model, range(4, 9))
    expected = seen(model)
    if center_first:
        model.optimizer.center.load(tmp_path / "center")
    checkpoint.restore(path).assert_consumed()
    assert_same(seen(model), middle)
    train(model, range(4, 9))
    assert_same(seen(model), expected)


def test_weights_loaded_into_a_run_bring_counters_and_center(tmp_path):
    model = compiled(CASES["Adam"])
    train(model, range(4))
    model.save_weights(tmp_path / "model.weights.h5")
    saved, anchor = model.get_weights(), model.optimizer._worker.arrays.anchor(model.optimizer._worker.client)
    center = model.optimizer.center.snapshot()
    train(model, range(4, 9))
    model.load_weights(tmp_path / "model.weights.h5")
    assert_same(model.get_weights(), saved)
    assert_same(model.optimizer._worker.arrays.anchor(model.optimizer._worker.client), anchor)
    assert_same(model.optimizer.center.snapshot().values(), center.values())
    assert int(model.optimizer._since) == 1


class Stop(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 1:
            raise InterruptedError


def test_backup_and_restore(tmp_path):
    """An epoch of 6 updates ends within a period of 4."""

    def made():
        return network(), AGNOptimizer(optimizers.Adam(0.01), 4, rule=rules.Adam(0.05))

    model, optimizer = made()
    fit(model, optimizer)
    expected = seen(model)
    for stop in ([Stop()], []):
        model, optimizer = made()
        backup = keras.callbacks.BackupAndRestore(str(tmp_path))
        try:
            fit(model, optimizer, callbacks=[backup, *stop])
        except InterruptedError:
            assert stop
        else:
            assert not stop
    assert_same(seen(model), expected)
    assert model.optimizer.stats()["exchanges"] == 2  # since it came back: the others were before


def test_the_bare_optimizers_file_is_taken_and_nothing_warned_of(tmp_path):
    bare, wrapped = network(), network()
    fit(bare, optimizers.Adam(0.01), 1)
    bare.save_weights(tmp_path / "bare.weights.h5")
    wrapped.compile(AGNOptimizer(optimizers.Adam(0.5), PERIOD, rule=rules.Add(scale=PERIOD)), "mse")
    wrapped.optimizer.build(wrapped.trainable_variables)
    for _ in range(2):
        wrapped.load_weights(tmp_path / "bare.weights.h5")
    assert_close(wrapped, bare, 0)
    fit(bare, epochs=1)
    fit(wrapped, epochs=1)
    assert_close(wrapped, bare)
    wrapped.save_weights(tmp_path / "wrapped.weights.h5")
    wrapped.load_weights(tmp_path / "wrapped.weights.h5")
    assert_close(wrapped, bare)


def test_the_bare_optimizers_checkpoint_goes_into_the_wrapped_one(tmp_path):
    bare, wrapped = network(), network()
    fit(bare, optimizers.Adam(0.01), 1)
    path = tf.train.Checkpoint(model=bare, optimizer=bare.optimizer).save(str(tmp_path / "bare"))
    wrapped.compile(AGNOptimizer(optimizers.Adam(0.01), PERIOD, rule=rules.Add(scale=PERIOD)), "mse")
    inner = wrapped.optimizer.inner_optimizer
    wrapped.optimizer.build(wrapped.trainable_variables)
    tf.train.Checkpoint(model=wrapped, optimizer=inner).restore(path)
    assert_close(wrapped, bare, 0)
    fit(bare, epochs=1)
    fit(wrapped, epochs=1)
    assert_close(wrapped, bare)


def test_a_wrapped_optimizers_file_in_a_bare_one_is_warned_of_by_keras(tmp_path):
    bare, wrapped = network(), compiled({})
    train(wrapped, range(3))
    wrapped.save_weights(tmp_path / "wrapped.weights.h5")
    bare.compile(optimizers.Adam(0.01), "mse")
    bare.optimizer.build(bare.trainable_variables)
    with pytest.warns(UserWarning, match="Skipping variable loading for optimizer 'adam"):
        bare.load_weights(tmp_path / "wrapped.weights.h5")
    assert_same(bare.get_weights(), wrapped.get_weights())


def stored(optimizer):
    store = {}
    optimizer.save_own_variables(store)
    return store


def test_a_file_before_the_first_step_and_one_of_a_closed_optimizer_hold_nothing():
    model = compiled({})
    train(model, range(4))
    model.optimizer.close()
    for store in (stored(model.optimizer), stored(AGNOptimizer("sgd"))):
        other = compiled({})
        other.optimizer.load_own_variables(store)
        other.optimizer.start(other.trainable_variables)
        assert int(other.optimizer._since) == 0
    model.optimizer.load_own_variables(store)  # there is nothing to be restored any more


def test_what_was_loaded_is_saved_again_before_the_first_step(tmp_path):
    model = compiled(CASES["Adam"])
    train(model, range(4))
    expected = seen(model)
    model.save(tmp_path / "1.keras")
    agn(model).close()
    keras.saving.load_model(tmp_path / "1.keras").save(tmp_path / "2.keras")
    model = keras.saving.load_model(tmp_path / "2.keras")
    model.optimizer.start()
    assert_same(seen(model), expected)


def test_a_file_saved_while_looking_at_the_center_is_the_centers(tmp_path):
    model = compiled(CASES["Adam"])
    train(model, range(4))
    center, slots, version = model.optimizer.center._read()
    with model.optimizer.center_weights():
        model.save(tmp_path / "center.keras")
    model.optimizer.close()
    loaded = keras.saving.load_model(tmp_path / "center.keras")
    assert_same(loaded.get_weights(), center.values())
    loaded.optimizer.start()
    assert_same(loaded.get_weights(), center.values())
    found = loaded.optimizer.center._read()
    assert_same(found[1]["exp_avg"].values(), slots["exp_avg"].values())
    assert (found[2], int(loaded.optimizer._since)) == (version, 0)


def test_a_file_that_does_not_fit_is_refused():
    model = compiled(CASES["Adam"])
    train(model, range(4))
    store = stored(model.optimizer)

    with pytest.raises(CheckpointError, match=r"slot/exp_avg/.*which this center has not"):
        start_from(store, compiled({}))
    other = compiled({})
    train(other, range(4))
    with pytest.raises(CheckpointError, match=r"slot/exp_avg/.* is missing; .* The file has rule Add"):
        start_from(stored(other.optimizer), compiled(CASES["Adam"]))

    larger = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(6), keras.layers.Dense(2)])
    larger.compile(AGNOptimizer("adam", PERIOD, rule=rules.Adam(0.05)), "mse")
    different = r"kernel' is \(4, 6\) here and \(4, 5\) in the file. Load it into the same model"
    with pytest.raises(CheckpointError, match=different):
        start_from(store, larger)
    larger.compile(AGNOptimizer("adam", PERIOD, rule=rules.Adam(0.05)), "mse")
    train(larger, range(1))
    before = seen(larger)
    with pytest.raises(CheckpointError, match=rf"\[rank 0\] agn_optimizer.*{different}"):
        larger.optimizer.load_own_variables(store)
    assert_same(seen(larger), before)

    fewer = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(5)])
    fewer.compile(AGNOptimizer("adam", PERIOD, rule=rules.Adam(0.05)), "mse")
    with pytest.raises(CheckpointError, match=r"'variable 2' is None here and \(5, 2\) in the file"):
        start_from(store, fewer)

    with pytest.raises(CheckpointError, match="state of an AGNOptimizer cannot be read"):
        model.optimizer.load_own_variables({"hvd_agn": np.zeros(100, np.uint8)})
    data = store["hvd_agn"].tobytes().replace(b"hvd_agn worker 1", b"hvd_agn worker 7")
    with pytest.raises(CheckpointError, match="is 'hvd_agn worker 7', not 'hvd_agn worker 1'"):
        model.optimizer.load_own_variables({"hvd_agn": np.frombuffer(data, np.uint8)})


def start_from(store, model):
    model.optimizer.load_own_variables(store)
    model.optimizer.start(model.trainable_variables)


def test_a_file_of_another_number_of_ranks(tmp_path):
    """Before the start, the worker takes the center over; into a run, Keras' file too, and a checkpoint is refused."""
    model = compiled(CASES["Adam"])
    train(model, range(4))
    store = stored(model.optimizer)
    center, _, version = model.optimizer.center._read()
    data = store["hvd_agn"].tobytes()
    assert json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["format"] == "hvd_agn worker 1"
    foreign = data.replace(rb"\"size\": 1", rb"\"size\": 2")
    assert foreign != data
    store = {"hvd_agn": np.frombuffer(foreign, np.uint8)}
    other = compiled(CASES["Adam"])
    start_from(store, other)
    assert_same(other.get_weights(), center.values())
    assert (other.optimizer.center.version, int(other.optimizer._since)) == (version, 0)
    assert np.abs(other.get_weights()[0] - model.get_weights()[0]).max() > 1e-4

    model.optimizer.load_own_variables(store)
    assert_same(model.get_weights(), center.values())
    assert int(model.optimizer._since) == 0
    with pytest.raises(CheckpointError, match=r"another number of ranks. Restore it before start\(\)"):
        model.optimizer._files.deserialize(foreign)
