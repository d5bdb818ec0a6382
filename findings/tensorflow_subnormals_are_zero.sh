#!/usr/bin/env bash
# tensorflow-cpu 2.21.0, Python 3.11, Linux x86-64.
#
# Guess: arithmetic on the CPU is IEEE 754's: a subnormal float times one is itself, as in NumPy and in PyTorch.
# Seen: TensorFlow's ops take subnormal numbers for zero, and give zero for them: its threads run with FTZ and DAZ set.
# Code that an op calls inherits that: a conversion that passes through a subnormal float, say from half precision by
# shifting and scaling, gives zeros inside of an op and the right values outside. A function's result may differ from the
# same lines run eagerly, since a multiplication by one is removed from its graph.
#
# Output seen:
#   NumPy 1e-40 * 1 = 1e-40, TensorFlow eagerly 0.0, in a function 1e-40
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet tensorflow-cpu==2.21.0 numpy==2.4.6
TF_CPP_MIN_LOG_LEVEL=3 "$folder/env/bin/python" - <<'PYTHON' 2>/dev/null
import numpy as np
import tensorflow as tf

small = np.float32(1e-40)
times_one = tf.function(lambda x: x * 1.0)
found = small * np.float32(1), (tf.constant(small) * 1.0).numpy(), times_one(tf.constant(small)).numpy()
print("NumPy 1e-40 * 1 = {:.3g}, TensorFlow eagerly {}, in a function {:.3g}".format(*found))
assert found == (small, 0, small)
PYTHON
