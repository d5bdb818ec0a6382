"""The recorded trajectories of tf.contrib's AGNOptimizer through compat.v1: everything that a worker has, each step."""

import time

import numpy as np
import pytest
from golden import RULES, Local, check_center, close, load, period, runs
from ranks import on_ranks

NAMES = ("x0", "x1")
INNER = sorted(RULES)


def inner_optimizer(inner):
    import tensorflow as tf

    train = tf.compat.v1.train
    makes = {
        "sgd": lambda: train.GradientDescentOptimizer(0.1),
        "momentum": lambda: train.MomentumOptimizer(0.1, 0.9),
        "nesterov": lambda: train.MomentumOptimizer(0.1, 0.9, use_nesterov=True),
        "adam": lambda: train.AdamOptimizer(0.01),
        "adagrad": lambda: train.AdagradOptimizer(0.1),
        "rmsprop": lambda: train.RMSPropOptimizer(0.01),
    }
    return makes[inner]()


class Graph:
    """One worker's part in one run, in the graph that is being built; the run is the scope of its variables."""

    def __init__(self, inner, run, every, comm, initial, gradients):
        import tensorflow as tf

        from hvd_agn.tensorflow.compat.v1 import AGNCustomGetter, AGNOptimizer

        v1 = tf.compat.v1
        rank, size = comm.Get_rank(), comm.Get_size()
        self.run, self.every, self.names = run, every, list(initial)
        getter = AGNCustomGetter(f"/job:worker/task:{rank}/cpu:0")
        with v1.variable_scope(run, custom_getter=getter):
            steps = v1.get_variable("steps", initializer=tf.constant(0, tf.int64), trainable=False)
            self.variables = [  # only rank 0 begins with the values
                v1.get_variable(name, initializer=value if rank == 0 else np.zeros_like(value))
                for name, value in initial.items()
            ]
        self.feeds, given = gradients(self.variables)
        self.opt = opt = AGNOptimizer(inner_optimizer(inner), size, getter, every, name=f"AGN_{run}", comm=comm)
        self.train = opt.apply_gradients(zip(given, self.variables, strict=True), global_step=steps)
        self.hook = opt.make_session_run_hook(rank == 0, rank)
        self.state = {"local": self._by_name(self.variables), "global_step": steps}
        for slot in opt.get_slot_names():
            self.state[f"local_slot/{slot}"] = self._by_name([opt.get_slot(v, slot) for v in self.variables])
        powers = {v.op.name.split("/")[-1]: v for v in opt.variables()}
        self.state["nonslot"] = {name: powers[name] for name in ("beta1_power", "beta2_power") if name in powers}

    def _by_name(self, values):
        return {name: value for name, value in zip(self.names, values, strict=True) if value is not None}

    def step(self, session, values):
        session.run(self.train, dict(zip(self.feeds, values, strict=True)))

    def fields(self, session):
        """The recorded fields that are this worker's."""
        native = self.opt._worker.client.native
        sums = [native.accumulator(i) for i in range(len(self.names))]
        return session.run(self.state) | {"acc": self._by_name(sums)}

    def _read(self):
        """The center's, with the names of the recorded arrays."""
        values, slots, version = self.opt.center._read()
        plain = lambda arrays: {name.removeprefix(f"{self.run}/"): value for name, value in arrays.items()}  # noqa: E731
        return plain(values), {slot: plain(arrays) for slot, arrays in slots.items()}, version


def dense(variables):
    import tensorflow as tf

    feeds = [tf.compat.v1.placeholder(tf.float32, v.shape) for v in variables]
    return feeds, feeds


def only_the_first(variables):
    feeds, given = dense(variables)
    return feeds, [given[0], None]


def rows_of_the_first(variables):
    import tensorflow as tf

    emb, x1 = variables
    feeds = [tf.compat.v1.placeholder(tf.int32, [4]), tf.compat.v1.placeholder(tf.float32, [4, 4])]
    g1 = tf.compat.v1.placeholder(tf.float32, x1.shape)
    return [*feeds, g1], [tf.IndexedSlices(feeds[1], feeds[0], tf.constant(emb.shape.as_list())), g1]


def check(found, recorded, prefix, row, boundary):
    for field, values in found.items():
        if field == "global_step":
            if boundary:  # between its pushes a worker does not see those of others
                assert values == recorded[f"{prefix}/global_step"][row]
            continue
        for name, value in values.items():
            expected = recorded[f"{prefix}/{field}/{name}"][row]
            close(np.reshape(value, expected.shape), expected, f"{prefix} {field} {name} at {row}")


def follow(graph, session, recorded, prefix, order, feeds, comm, tag):
    """Replay a run: each rank is one of its workers, which steps when it is its turn, ``order[row]``."""
    step = 0
    for row, turn in enumerate(order):
        if turn != comm.rank:
            continue
        if row and order[row - 1] != turn:  # asleep: there are fewer cores than ranks
            while not comm.iprobe(order[row - 1], tag):
                time.sleep(1e-4)
            comm.recv(source=order[row - 1], tag=tag)
        step += 1
        before, boundary = graph._read()[0], step % graph.every == 0
        graph.step(session, feeds(row))
        check(graph.fields(session), recorded, prefix, row, boundary)
        check_center(graph, before, recorded, prefix, row, graph.names, boundary)
        if row + 1 < len(order) and order[row + 1] != turn:
            comm.send(None, order[row + 1], tag)


def in_session(comm, runs):
    """Replay ``runs``: inner optimizer, run, period, first values, gradients; recorded, prefix, order, feeds."""
    import tensorflow as tf

    with tf.Graph().as_default():
        graphs = [Graph(inner, run, every, comm, initial, kind) for inner, run, every, initial, kind, *_ in runs]
        hooks = [graph.hook for graph in graphs]
        with tf.compat.v1.train.MonitoredTrainingSession(is_chief=comm.rank == 0, hooks=hooks) as session:
            for tag, (graph, (*_, recorded, prefix, order, feeds)) in enumerate(zip(graphs, runs, strict=True)):
                follow(graph, session, recorded, prefix, [int(w) for w in order], feeds, comm, tag)
            comm.Barrier()  # before what is left of a period is pushed
        for graph in graphs:
            graph.opt.close()
    return len(runs) if comm.rank == 0 else 0


def feeds_of(inputs):
    return lambda row: [inputs[f"rec_grad/{name}"][row] for name in NAMES]


def replay_special():
    """Two ranks: the runs of two workers in irregular order; those in which one of them never has a gradient for x1.

    Then each rank by itself: one worker whose first gradient is IndexedSlices.
    """
    from mpi4py import MPI

    world, inputs, recorded = MPI.COMM_WORLD, load("inputs"), load("special_none_sparse")
    initial = {name: inputs[f"init/{name}"] for name in NAMES}
    pairs = []
    for inner in INNER:
        own = load(f"agn_{inner}_rec")
        for run in (run for run in runs(own) if run.endswith("_w2_irr")):
            order, name = own[f"{run}/worker"], f"{inner}_{run}"
            pairs.append((inner, name, period(run), initial, dense, own, run, order, feeds_of(inputs)))
    for inner in ("sgd", "adam"):
        run = f"none_{inner}"
        own = f"{run}/worker{world.rank}"
        feeds = lambda row, run=run: [recorded[f"{run}/grad/{name}"][row] for name in NAMES]  # noqa: E731
        kind = only_the_first if world.rank else dense
        pairs.append((inner, run, 2, initial, kind, recorded, own, recorded[f"{run}/order"], feeds))
    done = in_session(world, pairs)
    sparse = []
    for inner in ("sgd", "momentum", "adam", "adagrad", "rmsprop")[world.rank :: 2]:
        run = f"sparse_{inner}"
        first = {name: recorded[f"sparse_init/{name}"] for name in ("emb", "x1")}
        feeds = lambda row, run=run: [recorded[f"{run}/feed/{key}"][row] for key in ("idx", "val", "g1")]  # noqa: E731
        sparse.append((inner, run, 3, first, rows_of_the_first, recorded, run, [0] * 9, feeds))
    return done + in_session(MPI.COMM_SELF, sparse)


def test_several_ranks():
    assert sum(on_ranks(2, replay_special)) == 6 * 3 + 2 + 5


@pytest.mark.parametrize("inner", INNER)
def test_dense(inner):
    """All runs, in one session: one worker of each is compat.v1's, the others are clients of its center, in NumPy."""
    import tensorflow as tf
    from mpi4py import MPI

    inputs, recorded = load("inputs"), load(f"agn_{inner}_rec")
    initial = {name: inputs[f"init/{name}"] for name in NAMES}
    with tf.Graph().as_default():
        graphs = [Graph(inner, run, period(run), MPI.COMM_SELF, initial, dense) for run in runs(recorded)]
        with tf.compat.v1.train.MonitoredTrainingSession(hooks=[graph.hook for graph in graphs]) as session:
            for number, graph in enumerate(graphs):
                among_clients(graph, session, inner, recorded, inputs, number)


def among_clients(graph, session, inner, recorded, inputs, number):
    order = recorded[f"{graph.run}/worker"]
    workers = max(order) + 1
    arrays = [[inputs[f"init/{name}"].copy() for name in NAMES] for _ in range(workers)]
    clients = [graph.opt.center.client(each) for each in arrays]
    local = [Local(inner, each, graph.every) for each in arrays]
    for row, turn in enumerate(order):
        gradients, before = feeds_of(inputs)(row), graph._read()[0]
        boundary = recorded[f"{graph.run}/local_step"][row] % graph.every == 0
        if turn == number % workers:
            graph.step(session, gradients)
            check(graph.fields(session), recorded, graph.run, row, boundary)
        else:
            local[turn].step(arrays[turn], gradients)
            clients[turn].accumulate(gradients)
            if boundary:
                clients[turn].exchange(graph.every, lr=0.01 if inner in ("adam", "rmsprop") else 0.1)
        check_center(graph, before, recorded, graph.run, row, NAMES, boundary)
