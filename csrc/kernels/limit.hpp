// What the hardware allows: the figure that `python -m hvd_agn bench` compares the exchange with.
#pragma once

#include <cstddef>
#include <vector>

#include "kernels/rules.hpp"

namespace hvd_agn {

/// Seconds of `repeats` runs of the fused pass (float32) over private memory of `count` elements, on this
/// thread, without locks, checks or messages.
std::vector<double> time_private_pass(std::size_t count, std::size_t block_bytes, int repeats, const Rule& rule);

}  // namespace hvd_agn
