"""What compat.v1 refuses, with the classes of the old reference page and a way out."""

import socket

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.compat import v1

from hvd_agn.errors import ConfigError, LayoutError, UsageError
from hvd_agn.tensorflow.compat.v1 import AGNCustomGetter, AGNOptimizer

GETTER = AGNCustomGetter("/job:worker/task:0")


@pytest.fixture(autouse=True)
def graph():
    with tf.Graph().as_default() as made:
        yield made


def sgd():
    return v1.train.GradientDescentOptimizer(0.5)


def variable(name="x", value=1.0, **arguments):
    with v1.variable_scope("", custom_getter=GETTER):
        return v1.get_variable(name, initializer=value, **arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"num_worker": 3}, ConfigError, r"\[rank 0\] AGNOptimizer: num_worker=3.*1 ranks.*mpirun -np 3"),
        ({"optimizer": None}, TypeError, "NoneType: give one of tf.compat.v1.train"),
        ({"optimizer": keras.optimizers.SGD()}, TypeError, r"keras.*hvd_agn\.tensorflow\.AGNOptimizer"),
        ({"custom_getter": "/job:worker/task:0"}, TypeError, "custom_getter is a str: give the AGNCustomGetter"),
        ({"custom_getter": None}, TypeError, "custom_getter is a NoneType"),
        ({"communication_period": 0}, ConfigError, "communication_period=0: give a whole number of steps, 1 or more"),
        ({"communication_period": 1.5}, ConfigError, "whole number of steps"),
        ({"bias_correction": "none"}, ConfigError, "bias_correction='none': give one of tf_contrib, correct"),
    ],
)
def test_arguments(arguments, error, text):
    with pytest.raises(error, match=text):
        AGNOptimizer(**{"optimizer": sgd(), "num_worker": 1, "custom_getter": GETTER, **arguments})


def test_optimizers():
    with pytest.raises(TypeError, match="is an AGNOptimizer already"):
        AGNOptimizer(AGNOptimizer(sgd(), 1, GETTER), 1, GETTER)
    with pytest.raises(ConfigError, match=r"no rule like FtrlOptimizer.*Name one: rule="):
        AGNOptimizer(v1.train.FtrlOptimizer(0.1), 1, GETTER)
    with pytest.raises(ConfigError, match="momentum of MomentumOptimizer has to be a number"):
        AGNOptimizer(v1.train.MomentumOptimizer(0.1, v1.placeholder(tf.float32, [])), 1, GETTER)


def test_locks_stay():
    with pytest.warns(UserWarning, match="use_locking=False: the center's blocks are locked") as said:
        AGNOptimizer(sgd(), 1, GETTER, 10, False)
    assert len(said) == 1
    assert said[0].filename == __file__


def test_compute_gradients():
    x = variable()
    opt = AGNOptimizer(sgd(), 1, GETTER)
    with pytest.raises(TypeError, match="var_list has a str: give variables"):
        opt.compute_gradients(x * x, var_list=["x"])
    with pytest.raises(ValueError, match="var_list has a SymbolicTensor: give variables"):
        opt.minimize(x * x, var_list=[x * 2])
    with pytest.raises(ValueError, match="gate_gradients"):
        opt.compute_gradients(x * x, gate_gradients=7)


def test_apply_gradients():
    x, y = variable(), variable("y")
    opt = AGNOptimizer(sgd(), 1, GETTER)
    with pytest.raises(ValueError, match="No variables provided"):
        opt.apply_gradients([])
    with pytest.raises(ValueError, match="No gradients provided for any variable"):
        opt.apply_gradients([(None, x)])
    with pytest.raises(TypeError):
        opt.apply_gradients([("one", x)])
    with pytest.raises(ValueError, match="No gradients provided"):
        opt.minimize(y * y, var_list=[x])
    opt.minimize(x * x)
    with pytest.raises(UsageError, match="one AGNOptimizer per graph"):
        opt.minimize(x * x)


def test_variables_that_cannot_be_exchanged():
    x = variable("x", np.ones(2, np.complex64))
    opt = AGNOptimizer(v1.train.GradientDescentOptimizer(0.5), 1, GETTER)
    with pytest.raises(LayoutError, match=r"\[rank 0\].*'x' cannot be exchanged: it is complex64"):
        opt.apply_gradients([(tf.constant([1, 1j], tf.complex64), x)])


def test_before_there_is_a_step():
    opt = AGNOptimizer(sgd(), 1, GETTER)
    with pytest.raises(UsageError, match=r"call minimize\(\) or apply_gradients\(\) first"):
        opt.get_init_op(0)
    with (
        pytest.raises(RuntimeError, match=r"call minimize\(\) or apply_gradients\(\) first"),
        v1.train.MonitoredTrainingSession(hooks=[opt.make_session_run_hook(True, 0)]),
    ):
        pass


def test_the_hooks_arguments():
    opt = AGNOptimizer(sgd(), 1, GETTER)
    with pytest.raises(ConfigError, match="task_index=1: give the rank"):
        opt.make_session_run_hook(False, 1)
    with pytest.raises(ConfigError, match=r"is_chief=False: give is_chief=\(rank == 0\)"):
        opt.make_session_run_hook(False, 0)
    with pytest.raises(ConfigError, match="task_index=2"):
        opt.get_init_op(2)


def test_a_session_that_has_not_begun():
    """It says so in the first step already, and does not touch the center; with the hook's op run it goes on."""
    x = variable()
    opt = AGNOptimizer(sgd(), 1, GETTER)
    train = opt.minimize(x * x)
    init = opt.get_init_op(0)
    with v1.train.MonitoredTrainingSession() as session:
        for _ in range(2):
            with pytest.raises(UsageError, match=r"a session that has not begun: give make_session_run_hook\(\)"):
                session.run(train)
        assert opt.center.version == 0
    with v1.Session() as session:
        session.run([v1.global_variables_initializer(), v1.local_variables_initializer()])
        session.run(init)
        session.run(train)
        assert session.run(x) == 0


def test_after_close():
    x = variable()
    opt = AGNOptimizer(sgd(), 1, GETTER)
    train = opt.minimize(x * x)
    hook = opt.make_session_run_hook(True, 0)
    session = v1.train.MonitoredTrainingSession(hooks=[hook])
    session.run(train)
    opt.close()
    opt.close()
    with pytest.raises(UsageError, match=r"after close\(\)"):
        session.run(train)
    with pytest.raises(UsageError, match=r"after close\(\)"):
        opt.stats()
    session.close()


def test_a_session_of_a_cluster():
    """Of a script that still makes its servers: operations without a device would run in other processes."""
    with socket.socket() as one, socket.socket() as other:
        for each in one, other:
            each.bind(("localhost", 0))
        places = [f"localhost:{each.getsockname()[1]}" for each in (one, other)]
    servers = [v1.train.Server({"worker": places}, "worker", task) for task in range(2)]
    optimizer = AGNOptimizer(sgd(), 1, GETTER)
    optimizer.minimize(variable() ** 2)
    hook = optimizer.make_session_run_hook(True, 0)
    with pytest.raises(ConfigError, match=r"a cluster of 2 tasks: leave tf.train.Server and master= out"):
        v1.train.MonitoredTrainingSession(servers[0].target, hooks=[hook])
