#include "kernels/limit.hpp"

#include <algorithm>
#include <chrono>
#include <utility>

#include "kernels/kernels.hpp"
#include "mpi/error.hpp"

namespace hvd_agn {

std::vector<double> time_private_pass(std::size_t count, std::size_t block_bytes, int repeats, const Rule& rule) {
  HVD_AGN_EXPECTS(!rule.staged(), std::invalid_argument, "this rule has more than one pass");
  const std::size_t block = block_bytes / sizeof(float);
  const std::size_t blocks = (count + block - 1) / block;
  const std::size_t stride = block * (1 + rule.slots());
  std::vector<float> theta(count, 1.0f), anchor(count, 0.5f), center((blocks + 1) * stride, 1.0f);
  std::vector<std::size_t> place(blocks);
  for (std::size_t b = 0; b < blocks; ++b) place[b] = b;
  std::size_t spare = blocks;

  Push push;
  push.steps = 10;
  std::vector<double> seconds;
  for (int r = 0; r < repeats; ++r) {
    const auto start = std::chrono::steady_clock::now();
    for (std::size_t b = 0; b < blocks; ++b) {
      const std::size_t first = b * block;
      const Piece piece = {&theta[first],
                           &anchor[first],
                           reinterpret_cast<const std::byte*>(&center[place[b] * stride]),
                           reinterpret_cast<std::byte*>(&center[spare * stride]),
                           block_bytes,
                           std::min(block, count - first)};
      kernels().exchange(DType::f32, rule, push, piece.theta, piece);
      std::swap(place[b], spare);
    }
    seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return seconds;
}

}  // namespace hvd_agn
