"""Scripts of TensorFlow 1 that used ``tf.contrib.opt.AGNOptimizer``: see :mod:`hvd_agn.tensorflow.compat.v1`."""
