#include "kernels/staged.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace hvd_agn {

namespace {

constexpr double kRemembered = 0.999;  // of a push, in the mean square of the center's moves

template <class T>
void weigh(void* values, double weight, std::size_t count) {
  T* delta = static_cast<T*>(values);
  for (std::size_t i = 0; i < count; ++i) delta[i] *= static_cast<T>(weight);
}

Range apply_function(DType center, const Rule& rule, const Push& push, const Piece& p) {
  const std::size_t bytes = p.count * item_size(center);
  for (int plane = 0; plane <= rule.own_slots(); ++plane)
    std::memcpy(p.out + plane * p.slot_stride, p.in + plane * p.slot_stride, bytes);
  rule.function->apply(center, static_cast<std::byte*>(p.theta), p.out, p.slot_stride, p.count, push.version + 1);
  Range range = Range::normal;
  for (int plane = 0; plane <= rule.own_slots(); ++plane)
    range = std::max(range, kernels().scan(center, p.out + plane * p.slot_stride, p.count));
  std::memcpy(p.theta, p.out, bytes);
  return range;
}

}  // namespace

Range apply_staged(DType center, const Rule& rule, const Push& push, const Piece& piece, DType dtype) {
  Push weighed = push;
  weighed.weight = 1;
  if (push.weight != 1)
    center == DType::f64 ? weigh<double>(piece.theta, push.weight, piece.count)
                         : weigh<float>(piece.theta, push.weight, piece.count);
  const std::size_t moved = (1 + rule.own_slots()) * piece.slot_stride;
  if (rule.gap_aware && push.version > 0)  // nothing has moved before
    kernels().damp(dtype, piece, moved, 1 - std::pow(kRemembered, static_cast<double>(push.version)));
  Range range = rule.kind == Rule::Kind::custom ? apply_function(center, rule, weighed, piece)
                                                : kernels().apply(center, rule, weighed, piece);
  if (rule.gap_aware) range = std::max(range, kernels().remember(center, piece, moved, kRemembered));
  return range;
}

}  // namespace hvd_agn
