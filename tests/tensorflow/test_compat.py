"""compat.v1 does what the original's own tests ask of it, and what its documentation says."""

import re

import numpy as np
import pytest
import tensorflow as tf
from ranks import on_ranks
from tensorflow.compat import v1

from hvd_agn import rules
from hvd_agn.errors import LayoutError, NonFiniteError, NonFiniteWarning
from hvd_agn.tensorflow.compat.v1 import AGNCustomGetter, AGNOptimizer


@pytest.fixture
def graph():
    with tf.Graph().as_default() as made:
        yield made


def getter_of(task=0):
    return AGNCustomGetter(f"/job:worker/task:{task}/cpu:0")


def variables(getter, **values):
    with v1.variable_scope("", custom_getter=getter):
        return [v1.get_variable(name, initializer=value) for name, value in values.items()]


def begin(opt, **session):
    return v1.train.MonitoredTrainingSession(hooks=[opt.make_session_run_hook(True, 0)], **session)


def square(period=1, inner=None, **arguments):
    """The step, the variable, the optimizer and the global step for a loss with gradient x; x begins at 1."""
    getter = getter_of()
    (x,) = variables(getter, x=np.ones(3, np.float32))
    step = v1.train.get_or_create_global_step()
    opt = AGNOptimizer(inner or v1.train.GradientDescentOptimizer(0.5), 1, getter, period, **arguments)
    return opt.minimize(tf.reduce_sum(x * x) / 2, global_step=step), x, opt, step


# ---- the original's own tests


def original(period):
    """Adam without memory, gradients -1: every step, and every push, moves by 0.1."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    rank, size = comm.rank, comm.size
    with tf.Graph().as_default():
        getter = getter_of(rank)
        with v1.variable_scope("", custom_getter=getter), tf.device("/job:ps/task:0"):
            step = v1.train.get_or_create_global_step()
            v0 = v1.get_variable(initializer=0.0, name="v0")
            v1_ = v1.get_variable(initializer=0.5, name="v1")
        with v1.variable_scope("", custom_getter=getter, partitioner=v1.fixed_size_partitioner(2, axis=0)):
            parts = list(v1.get_variable("parts", [2, 4], initializer=v1.zeros_initializer))
        inner = v1.train.AdamOptimizer(0.1, beta1=0.0, beta2=0.0)
        opt = AGNOptimizer(inner, num_worker=size, communication_period=period, custom_getter=getter)
        pairs = [[-tf.ones(v.shape), v] for v in (v0, v1_, *parts)]
        train = opt.apply_gradients(pairs, step)
        hook = opt.make_session_run_hook(rank == 0, rank)
        session = v1.train.MonitoredTrainingSession(is_chief=rank == 0, hooks=[hook])
    seen = [[float(value) for value in session.run([v0, v1_, step])]]
    for _ in range(8 if size == 1 else 3):
        for turn in range(size):
            comm.Barrier()
            if turn == rank:
                session.run(train)
                center = opt.center.snapshot()
                assert all((center[part.op.name] == center["v0"]).all() for part in parts)
                seen.append([float(value) for value in session.run([v0, v1_, step])])
                seen[-1] += [float(center["v0"]), float(center["v1"])]
    comm.Barrier()
    if rank == 1:  # nobody waits for the chief, at the end either
        session.close()
    comm.Barrier()
    return seen


def test_one_worker_with_a_period_of_4():
    (seen,) = on_ranks(1, original, 4)
    local, center = [row[:2] for row in seen], [row[3:] for row in seen]
    assert local[0] == [0, 0.5]
    for steps, expected in {1: (0.1, 0.6), 3: (0.3, 0.8), 4: (0.1, 0.6), 8: (0.2, 0.7)}.items():
        assert local[steps] == pytest.approx(expected, abs=1e-6)
    for steps, expected in {1: (0, 0.5), 3: (0, 0.5), 4: (0.1, 0.6), 8: (0.2, 0.7)}.items():
        assert center[steps] == pytest.approx(expected, abs=1e-6)
    assert [row[2] for row in seen] == [0, 0, 0, 0, 1, 1, 1, 1, 2]


def test_two_workers_with_a_period_of_1():
    seen = on_ranks(2, original, 1)
    for rank, rows in enumerate(seen):
        assert rows[0][:2] == [0, 0.5]
        for i, row in enumerate(rows[1:]):
            pushes = 2 * i + rank + 1
            values = [0.1 * pushes, 0.5 + 0.1 * pushes]
            assert row == pytest.approx([*values, pushes, *values])


def not_finite_on_rank_0():
    from mpi4py import MPI

    rank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
    with tf.Graph().as_default():
        getter = getter_of(rank)
        (x,) = variables(getter, x=1.0 if rank else float("nan"))
        opt = AGNOptimizer(v1.train.GradientDescentOptimizer(0.5), size, getter)
        opt.minimize(x * x)
        with pytest.raises(LayoutError, match=r"\[rank 0\].*'x' has a NaN or an Inf"):
            v1.train.MonitoredTrainingSession(is_chief=rank == 0, hooks=[opt.make_session_run_hook(rank == 0, rank)])
    return True


def test_first_values_that_are_not_finite():
    """All ranks hear of it, and all end."""
    assert on_ranks(2, not_finite_on_rank_0) == [True, True]


# ---- steps and sessions


def test_what_is_left_of_a_period_is_pushed_at_the_end(graph):
    train, _x, opt, step = square(period=4)
    with begin(opt) as session:
        for _ in range(6):
            session.run(train)
        assert session.run(step) == 1
    pushed = np.float32(1)
    pushed -= 0.5 * np.mean([1, 0.5, 0.25, 0.125])
    pushed -= 0.5 * np.mean([pushed, pushed / 2])
    assert opt.center.snapshot()["x"] == pytest.approx(pushed)
    assert opt.stats()["exchanges"] == 2


def test_a_second_session_goes_on_from_the_center(graph):
    train, x, opt, step = square()
    for pushes in (1, 2):
        with begin(opt) as session:
            session.run(train)
            assert session.run([x, step]) == [pytest.approx(0.5**pushes), pushes]


def test_without_the_hook(graph):
    train, x, opt, step = square(period=2)
    init, flush = opt.get_init_op(task_index=0), opt.get_flush_op()
    with v1.Session() as session:
        session.run([v1.global_variables_initializer(), v1.local_variables_initializer()])
        session.run(init)
        session.run(train)
        session.run(flush)
        assert session.run([x, step]) == [pytest.approx(0.5), 1]


def test_a_saved_model_begins_the_center(graph, tmp_path):
    train, x, opt, step = square()
    with begin(opt, checkpoint_dir=str(tmp_path), save_checkpoint_steps=1) as session:
        session.run(train)
    opt.close()
    with tf.Graph().as_default():
        train, x, opt, step = square()
        with begin(opt, checkpoint_dir=str(tmp_path)) as session:
            assert session.run([x, step]) == [pytest.approx(0.5), 1]
            session.run(train)
            assert session.run([x, step]) == [pytest.approx(0.25), 2]


def test_a_loaded_center_is_begun_with(graph, tmp_path):
    path = tmp_path / "center.safetensors"
    train, x, opt, _ = square(inner=v1.train.MomentumOptimizer(0.5, 0.9))
    with begin(opt) as session:
        session.run(train)
    opt.center.save(path)
    saved = opt.center._read()
    opt.close()
    with tf.Graph().as_default():
        train, x, opt, _step = square(inner=v1.train.MomentumOptimizer(0.5, 0.9))
        opt.center.load(path)
        with begin(opt) as session:
            assert session.run(x) == pytest.approx(saved[0]["x"])
            session.run(train)
        assert opt.center._read()[1]["momentum"]["x"] == pytest.approx(0.9 * saved[1]["momentum"]["x"] + saved[0]["x"])


def test_the_learning_rate_is_followed(graph):
    """A schedule, of which each push has the rate of its moment; and a placeholder, which is not fed at the end."""
    step = v1.train.get_or_create_global_step()
    rate = v1.train.piecewise_constant(step, [0], [0.5, 0.25])
    train, x, opt, _ = square(period=2, inner=v1.train.GradientDescentOptimizer(rate))
    with begin(opt) as session:
        for expected in (1 - 0.5 * 0.75, (1 - 0.5 * 0.75) * (1 - 0.25 * 0.875)):
            session.run(train)
            session.run(train)
            assert session.run(x) == pytest.approx(expected)
    opt.close()
    with tf.Graph().as_default():
        fed = v1.placeholder(tf.float32, [])
        train, x, opt, _ = square(period=2, inner=v1.train.GradientDescentOptimizer(lambda: fed))
        with begin(opt) as session:
            session.run(train, {fed: 0.125})
        assert opt.center.snapshot()["x"] == pytest.approx(0.875)


@pytest.mark.parametrize(("choice", "powers"), [("tf_contrib", 1 + 4 + 2), ("correct", 1 + 4)])
def test_bias_correction(graph, choice, powers):
    train, _x, opt, _step = square(period=2, inner=v1.train.AdamOptimizer(0.01), bias_correction=choice)
    power = next(v for v in opt.variables() if "beta1_power" in v.name)
    with begin(opt) as session:
        for _ in range(4):
            session.run(train)
        assert session.run(power) == pytest.approx(0.9**powers)
    assert opt.center.rule.bias_correction == {"tf_contrib": "tf_contrib", "correct": "keras"}[choice]


@pytest.mark.parametrize(
    ("inner", "rule"),
    [
        (lambda: v1.train.GradientDescentOptimizer(0.1), rules.SGD("follow")),
        (lambda: v1.train.MomentumOptimizer(0.1, 0.0, use_nesterov=True), rules.SGD("follow")),
        (
            lambda: v1.train.MomentumOptimizer(0.1, lambda: 0.5, use_nesterov=True),
            rules.SGD("follow", 0.5, nesterov=True),
        ),
        (
            lambda: v1.train.AdamOptimizer(0.1, 0.5, 0.75, 1e-3),
            rules.Adam("follow", (0.5, 0.75), 1e-3, bias_correction="tf_contrib"),
        ),
        (
            lambda: v1.train.AdagradOptimizer(0.1, 0.2),
            rules.Adagrad("follow", initial_accumulator_value=0.2, eps=0.0),
        ),
        (
            lambda: v1.train.RMSPropOptimizer(0.1, 0.75, 0.5, 1e-3, centered=True),
            rules.RMSprop("follow", 0.75, 1e-3, 0.0, 0.5, True, eps_inside_root=True, initial_square_avg=1.0),
        ),
    ],
)
def test_the_rule_is_of_the_same_kind(graph, inner, rule):
    opt = AGNOptimizer(inner(), 1, getter_of())
    assert opt._rule == rule


def test_a_rule_of_ones_own(graph):
    train, x, opt, _step = square(inner=v1.train.FtrlOptimizer(0.1), rule=rules.SGD(0.25))
    with begin(opt) as session:
        session.run(train)
        assert session.run(x) == pytest.approx(0.75)


# ---- the reference page


def test_methods(graph):
    getter = getter_of()
    x, y = variables(getter, x=np.ones(3, np.float32), y=1.0)
    opt = AGNOptimizer(v1.train.MomentumOptimizer(0.1, 0.9), 1, getter, name="Mine")
    assert isinstance(opt, v1.train.Optimizer)
    assert opt.get_name() == "Mine"
    pairs = opt.compute_gradients(
        tf.reduce_sum(x) + 2 * y,
        var_list=[x, y],
        gate_gradients=opt.GATE_GRAPH,
        aggregation_method=v1.AggregationMethod.DEFAULT,
        colocate_gradients_with_ops=True,
        grad_loss=tf.constant(3.0),
    )
    train = opt.apply_gradients(((g, v) for g, v in pairs), name="step")  # also of an iterator
    assert isinstance(train, tf.Operation)
    assert train.name == "step"
    assert opt.get_slot_names() == ["momentum"]
    assert opt.get_slot(x, "momentum") in opt.variables()
    assert opt.get_slot(x, "other") is None
    with begin(opt) as session:
        session.run(train)
        assert session.run(y) == pytest.approx(1 - 0.1 * 6)
        assert session.run(opt.get_slot(x, "momentum")) == pytest.approx(3)


def test_minimize_uses_the_wrapped_optimizers_gradients(graph):
    class Doubling(v1.train.GradientDescentOptimizer):
        def compute_gradients(self, *args, **kwargs):
            return [(2 * g, v) for g, v in super().compute_gradients(*args, **kwargs)]

    train, x, opt, _step = square(inner=Doubling(0.25))
    with begin(opt) as session:
        session.run(train)
        assert session.run(x) == pytest.approx(0.5)


def test_the_getter_makes_resource_variables_on_this_process(graph):
    with v1.variable_scope("", custom_getter=getter_of(3), use_resource=False), tf.device("/job:ps/task:0"):
        x = v1.get_variable("x", [2])
        y = v1.get_variable("y", [2], trainable=False)
    assert hasattr(x, "handle")
    assert hasattr(y, "handle")
    assert {x.device, y.device} == {"/device:CPU:0"}
    assert v1.trainable_variables() == [x]
    with v1.variable_scope("", custom_getter=AGNCustomGetter("/job:worker/task:1")):
        assert v1.get_variable("z", [2]).device == ""


def ref_variables():
    """With disable_v2_behavior, as scripts of TensorFlow 1 are: a ref variable, and the getter's."""
    v1.disable_v2_behavior()
    getter = getter_of()
    x = v1.Variable(1.0, name="x")
    texts = []
    for inner in (v1.train.GradientDescentOptimizer(0.5), v1.train.MomentumOptimizer(0.5, 0.5)):
        opt = AGNOptimizer(inner, 1, getter)
        with v1.variable_scope("", custom_getter=getter):  # of slots too
            try:
                opt.minimize(x * x)
            except (TypeError, ValueError) as error:
                texts.append(f"{type(error).__name__} {error}")
    step = v1.train.get_or_create_global_step()  # a ref variable
    (y,) = variables(getter, y=1.0)
    opt = AGNOptimizer(v1.train.AdamOptimizer(0.5), 1, getter, 2)
    train = opt.minimize(y * y, global_step=step, var_list=[y])
    with begin(opt) as session:
        for _ in range(2):
            session.run(train)
        return texts, session.run([y, step])[1].item(), opt.stats()["exchanges"]


def test_ref_variables():
    ((texts, step, exchanges),) = on_ranks(1, ref_variables)
    assert len(texts) == 2
    for text in texts:
        assert re.match(r"LayoutError .*'x' is a ref variable.*AGNCustomGetter.*use_resource=True", text)
    assert (step, exchanges) == (1, 1)


# ---- errors come out of the session as they were raised


def not_a_number(opt, x):
    return opt.apply_gradients([(tf.constant([1.0, float("nan"), 1.0]), x)])


def test_errors_keep_their_class(graph):
    getter = getter_of()
    (x,) = variables(getter, x=np.ones(3, np.float32))
    opt = AGNOptimizer(v1.train.GradientDescentOptimizer(0.5), 1, getter, 1, on_nonfinite="raise")
    train = not_a_number(opt, x)
    with pytest.raises(NonFiniteError, match=r"rank 0.*'x' has a NaN"), begin(opt) as session:
        session.run(train)


def test_warnings_are_python_warnings(graph):
    getter = getter_of()
    (x,) = variables(getter, x=np.ones(3, np.float32))
    opt = AGNOptimizer(v1.train.GradientDescentOptimizer(0.5), 1, getter, 1)
    train = not_a_number(opt, x)
    with begin(opt) as session:
        with pytest.warns(NonFiniteWarning, match="'x' has a NaN"):
            session.run(train)
        assert session.run(x) == pytest.approx(1)


def test_eager_execution():
    opt = AGNOptimizer(v1.train.GradientDescentOptimizer(0.5), 1, getter_of())
    with pytest.raises(RuntimeError, match="should be a function when eager"):
        opt.compute_gradients(tf.constant(1.0))
    with pytest.raises(RuntimeError, match=r"needs a graph.*hvd_agn\.tensorflow\.AGNOptimizer"):
        opt.apply_gradients([(1.0, tf.Variable(1.0))])
