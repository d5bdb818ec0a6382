"""Train on handwritten digits with a loop of one's own, asynchronously: a GradientTape inside a tf.function.

    mpirun -np 2 python examples/tf_custom_loop.py

Lines marked AGN are all that a script for one process needs to change.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow greets from every rank
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import digits
import keras
import tensorflow as tf

import hvd_agn.tensorflow as agn  # AGN


def main() -> None:
    args = digits.arguments(__doc__, epochs=10).parse_args()
    comm = digits.world()
    tf.config.threading.set_intra_op_parallelism_threads(1)  # the ranks are the parallelism
    tf.config.threading.set_inter_op_parallelism_threads(1)
    keras.utils.set_random_seed(args.seed + comm.rank)
    train_x, train_y, test_x, test_y = digits.load(args.data)
    share = train_x[comm.rank :: comm.size], train_y[comm.rank :: comm.size]
    batches = tf.data.Dataset.from_tensor_slices(share).shuffle(len(share[0])).batch(args.batch, drop_remainder=True)
    run = digits.Run(comm, args, len(batches))

    layers = [keras.layers.Flatten(), keras.layers.Dense(128, activation="relu"), keras.layers.Dense(10)]
    model = keras.Sequential([keras.Input((28, 28)), *layers])
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = agn.AGNOptimizer(  # AGN
        keras.optimizers.Adam(args.lr),
        args.period,
        overlap=args.overlap,
        wire_dtype=args.wire_dtype,
        center_ranks="nodes" if args.center_ranks == "nodes" else (0,),
    )
    optimizer.start(model.trainable_variables)  # AGN: or by the first step; all ranks come here

    @tf.function
    def train_step(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = loss_of(y, model(x, training=True))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    def center_accuracy() -> float:
        with optimizer.center_weights():  # AGN
            return float(tf.reduce_mean(tf.cast(tf.argmax(model(test_x), 1) == test_y, tf.float32)))

    for _ in range(args.epochs):
        for x, y in batches:
            loss = train_step(x, y)
            run.advance(1, loss.numpy, optimizer.stats)
        if comm.rank == 0:
            run.measured(center_accuracy())

    optimizer.flush()  # AGN: what was not yet pushed
    run.report(optimizer.stats(), center_accuracy, len(test_y))


if __name__ == "__main__":
    main()
