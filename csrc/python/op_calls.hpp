// How TensorFlow's ops reach the core: see csrc/tensorflow/calls.hpp.
#pragma once

#include <nanobind/nanobind.h>

namespace hvd_agn {

void register_op_calls(nanobind::module_& m);

}  // namespace hvd_agn
