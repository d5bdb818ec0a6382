"""A script of TensorFlow 1 that trained with tf.contrib.opt.AGNOptimizer on parameter servers, and runs again.

    mpirun -np 2 python examples/tf_v1_migrated.py

Lines marked AGN are those that changed. There is no parameter server: each rank is a worker, the center is in memory
that rank 0 exposes. docs/migrate-from-tf-contrib.md tells what became of the others.
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow greets from every rank
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import digits
import numpy as np
import tensorflow.compat.v1 as tf  # AGN: was import tensorflow as tf

from hvd_agn.tensorflow.compat.v1 import AGNCustomGetter, AGNOptimizer  # AGN: was from tf.contrib.opt

BATCH = 32


def build(task: int, workers: int, period: int) -> dict:
    """The graph of one worker: a network with one hidden layer, its loss, and the step."""
    worker_device = f"/job:worker/task:{task}/cpu:0"
    getter = AGNCustomGetter(worker_device)
    with tf.variable_scope("", custom_getter=getter):  # AGN: was also in tf.device(tf.train.replica_device_setter(...))
        global_step = tf.train.get_or_create_global_step()
        images = tf.placeholder(tf.float32, [None, 784])
        labels = tf.placeholder(tf.int64, [None])
        hidden = tf.nn.relu(dense("hidden", images, 784, 128))
        logits = dense("logits", hidden, 128, 10)
    loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits))
    rate = tf.train.exponential_decay(4e-3, global_step, decay_steps=100, decay_rate=0.7)
    optimizer = AGNOptimizer(
        tf.train.AdamOptimizer(rate), num_worker=workers, custom_getter=getter, communication_period=period
    )
    train = optimizer.minimize(loss, global_step=global_step)
    return dict(locals())


def dense(name: str, inputs: tf.Tensor, size: int, units: int) -> tf.Tensor:
    with tf.variable_scope(name):
        weights = tf.get_variable("weights", [size, units], initializer=tf.glorot_uniform_initializer())
        return inputs @ weights + tf.get_variable("biases", [units], initializer=tf.zeros_initializer())


def accuracy(center: dict[str, np.ndarray], images: np.ndarray, labels: np.ndarray) -> float:
    hidden = np.maximum(images @ center["hidden/weights"] + center["hidden/biases"], 0)
    logits = hidden @ center["logits/weights"] + center["logits/biases"]
    return float((logits.argmax(1) == labels).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--period", type=int, default=5, help="steps between two exchanges")
    parser.add_argument("--pushes", type=int, default=200, help="of all workers together, after which they stop")
    args = parser.parse_args()
    # AGN: was flags for the cluster's hosts, the job's name and the task's index. Not above: this import starts Open
    # MPI, for which hvd_agn's has set what it needs.
    from mpi4py import MPI

    task, workers = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size  # AGN: was a tf.train.Server of the cluster
    is_chief = task == 0

    tf.disable_eager_execution()  # AGN: graphs were the only way
    train_x, train_y, test_x, test_y = digits.load("digits")
    train_x, test_x = train_x.reshape(-1, 784), test_x.reshape(-1, 784)
    model = build(task, workers, args.period)
    optimizer = model["optimizer"]
    hooks = [optimizer.make_session_run_hook(is_chief, task), tf.train.StopAtStepHook(last_step=args.pushes)]
    random = np.random.default_rng(task)
    with tf.train.MonitoredTrainingSession(is_chief=is_chief, hooks=hooks) as session:  # AGN: was master=server.target
        while not session.should_stop():
            rows = random.integers(len(train_y), size=BATCH)
            feed = {model["images"]: train_x[rows], model["labels"]: train_y[rows]}
            session.run(model["train"], feed)

    everyone = MPI.COMM_WORLD.gather(optimizer.stats()["exchanges"])  # rank 0 waits for all: only to report
    if is_chief:
        for rank, exchanges in enumerate(everyone):
            print(f"rank {rank}: {exchanges} exchanges")
        center = optimizer.center.snapshot()
        print(f"center: {optimizer.center.version} pushes, accuracy {accuracy(center, test_x, test_y):.4f}")


if __name__ == "__main__":
    main()
