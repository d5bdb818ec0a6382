#!/usr/bin/env bash
# tensorflow-cpu 2.21.0, Python 3.11, Linux x86-64.
#
# Guess: a variable that was assigned a tensor on memory which TensorFlow has not allocated (DLPack, or TF_NewTensor of
# the C API) lives on that memory, and is updated in place, as any variable is that nobody else reads.
# Seen: it lives there until its next update, which copies the whole variable to memory of TensorFlow's own. In-place
# updates ask, besides the reference count, whether the buffer "owns its memory", and a foreign one never does. So an op
# that hands out buffers of its own, to save allocations, makes the next training step allocate and copy all of them.
#
# Output seen:
#   own memory: moved by assign_add: False
#   foreign memory: on it after assign: True, moved by the first assign_add: True, by the second: False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet tensorflow-cpu==2.21.0 numpy==2.4.6
TF_CPP_MIN_LOG_LEVEL=3 "$folder/env/bin/python" - <<'PYTHON' 2>/dev/null
import numpy as np
import tensorflow as tf


def address(variable):
    return np.frombuffer(memoryview(variable.read_value()), np.float32).ctypes.data


one = tf.ones(1000)
own = tf.Variable(tf.zeros(1000))
before = address(own)
own.assign_add(one)
moved = address(own) != before
print("own memory: moved by assign_add:", moved)

memory = np.zeros(1016, np.float32)
skipped = -memory.ctypes.data % 64 // 4
memory = memory[skipped : skipped + 1000]  # which begins at a multiple of 64 bytes, as TensorFlow wants it
variable = tf.Variable(tf.zeros(1000))
variable.assign(tf.experimental.dlpack.from_dlpack(memory.__dlpack__()))
places = [address(variable)]
for _ in range(2):
    variable.assign_add(one)
    places.append(address(variable))
there = places[0] == memory.ctypes.data
first, second = places[0] != places[1], places[1] != places[2]
print(f"foreign memory: on it after assign: {there}, moved by the first assign_add: {first}, by the second: {second}")
assert (moved, there, first, second) == (False, True, True, False)
PYTHON
