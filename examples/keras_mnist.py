"""Train a small convolutional network on handwritten digits with Keras, asynchronously.

    mpirun -np 4 python examples/keras_mnist.py

Every rank trains on its own share of the digits with its own Adam; every ``--period`` steps it exchanges with the
center. Lines marked AGN are all that a script for one process needs to change.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow greets from every rank
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import digits
import keras
import tensorflow as tf

import hvd_agn.tensorflow as agn  # AGN


def build_model() -> keras.Model:
    layers = keras.layers
    return keras.Sequential([
        keras.Input((28, 28, 1)),
        layers.Conv2D(16, 3, activation="relu"), layers.MaxPooling2D(2),
        layers.Conv2D(32, 3, activation="relu"), layers.MaxPooling2D(2),
        layers.Flatten(), layers.Dropout(0.25), layers.Dense(128, activation="relu"), layers.Dense(10),
    ])  # fmt: skip


class Progress(keras.callbacks.Callback):
    """After each epoch; the logs have what Statistics has put there."""

    def __init__(self, run: digits.Run) -> None:
        super().__init__()
        self.run = run

    def on_epoch_end(self, epoch: int, logs: dict) -> None:
        self.run.advance(self.run.steps, lambda: logs["loss"], lambda: logs)
        if "val_accuracy" in logs:
            self.run.measured(logs["val_accuracy"])


def main() -> None:
    args = digits.arguments(__doc__, epochs=40).parse_args()
    comm = digits.world()
    tf.config.threading.set_intra_op_parallelism_threads(1)  # the ranks are the parallelism
    tf.config.threading.set_inter_op_parallelism_threads(1)
    keras.utils.set_random_seed(args.seed + comm.rank)
    train_x, train_y, test_x, test_y = digits.load(args.data)
    share_x, share_y = train_x[comm.rank :: comm.size, ..., None], train_y[comm.rank :: comm.size]
    held_out = test_x[..., None], test_y
    run = digits.Run(comm, args, -(-len(share_y) // args.batch))

    schedule = keras.optimizers.schedules.CosineDecay(args.lr, run.total)
    optimizer = agn.AGNOptimizer(  # AGN
        keras.optimizers.Adam(schedule),
        args.period,
        overlap=args.overlap,
        wire_dtype=args.wire_dtype,
        center_ranks="nodes" if args.center_ranks == "nodes" else (0,),
    )
    model = build_model()
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    model.fit(
        share_x,
        share_y,
        batch_size=args.batch,
        epochs=args.epochs,
        validation_data=held_out if comm.rank == 0 else None,
        validation_batch_size=500,
        callbacks=[agn.callbacks.CenterWeights(), agn.callbacks.Statistics(), Progress(run)],  # AGN
        verbose=0,
    )

    def center_accuracy() -> float:
        with optimizer.center_weights():  # AGN
            return model.evaluate(*held_out, batch_size=500, verbose=0, return_dict=True)["accuracy"]

    run.report(optimizer.stats(), center_accuracy, len(test_y))


if __name__ == "__main__":
    main()
