// Loops over contiguous elements: pure functions, no locks, no allocation, no exceptions. kernels.cpp is compiled once
// for every instruction set; kernels() picks the best that this processor has. All sets give the same bits: the
// compiler may not contract a multiply and an add.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/rules.hpp"

namespace hvd_agn {

/// Type of a worker's parameters. The center is f32 for f32, f16 and bf16, and f64 for f64.
enum class DType : std::uint8_t { f32, f64, f16, bf16 };

constexpr DType center_dtype(DType dtype) {
  return dtype == DType::f64 ? DType::f64 : DType::f32;
}
constexpr std::size_t item_size(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

/// Largest magnitude met: `large` from half the largest power of two of the center's type on, where the difference
/// of two values may overflow. Ordered.
enum class Range : std::uint8_t { normal, large, nonfinite };

/// What a message carries: the center's own type, or fewer bits. int8 has a scale per part of a block.
enum class Wire : std::uint8_t { center, bf16, fp16, int8 };

/// Bytes of `count` encoded elements.
constexpr std::size_t wire_bytes(DType center, Wire wire, std::size_t count) {
  return wire == Wire::center ? count * item_size(center)
         : wire == Wire::int8 ? sizeof(float) + (count + 3) / 4 * 4
                              : (2 * count + 3) / 4 * 4;
}

/// One piece of one block: theta and anchor have the worker's dtype, the others the center's. All are `count` elements.
struct Piece {
  void* theta;
  void* anchor;
  const std::byte* in;      // center before
  std::byte* out;           // center after; does not overlap `in`
  std::size_t slot_stride;  // bytes from the center to its slot, the same in `in` and `out`
  std::size_t count;
};

struct Kernels {
  const char* name;
  /// delta = (theta - anchor) / steps; out, slots = rule(in, weight * delta); anchor = result = out, or what the rule
  /// gives a worker. `result`: theta itself, or null, or memory that none of the others overlaps: past the cache, but
  /// for half types and where it begins no cache line. Returns the range of `out` and the slots.
  Range (*exchange)(DType, const Rule&, const Push&, void* result, const Piece&);
  /// out, slots = rule(in, weight * theta / steps); theta = out. Of the center's type; no anchor.
  Range (*apply)(DType center, const Rule&, const Push&, const Piece&);
  /// theta, a delta of the center's type, /= 1 + |in - anchor| / typical move of the center, as far as the worker's
  /// dtype can tell. `moved`: bytes from `in` to the sum of squared moves, `sum_of_weights` that it is to be divided
  /// by.
  void (*damp)(DType, const Piece&, std::size_t moved, double sum_of_weights);
  /// The same sum in `out`: `kept` of it, and the rest of (out - in)^2. Returns its range.
  Range (*remember)(DType center, const Piece&, std::size_t moved, double kept);
  /// theta = in and anchor = in, unless null. Returns the range of `in`. `past_cache`: around the cache, but
  /// for half types.
  Range (*pull)(DType, const Piece&, bool past_cache);
  /// As memcpy(), past the cache.
  void (*copy)(const void* from, void* to, std::size_t bytes);
  /// Range of `count` values of a worker's dtype.
  Range (*scan)(DType, const void* values, std::size_t count);
  /// True if (theta - anchor), computed in the center's type, is finite in every element. Slow, exact.
  bool (*finite_delta)(DType, const void* theta, const void* anchor, std::size_t count);
  /// Sum of the squares of (theta - anchor), or of theta if anchor is null.
  double (*distance)(DType, const Piece&);
  /// sum (center's dtype) += values (worker's).
  void (*accumulate)(DType, const void* values, void* sum, std::size_t count);
  /// values (worker's dtype) to out (center's).
  void (*widen)(DType, const void* values, std::byte* out, std::size_t count);

  /// out = (theta - anchor) / steps, or -theta / steps if anchor is null and theta of the center's type; plus the
  /// residual unless that is null; in the center's type.
  void (*delta)(DType, double steps, const Piece&, const std::byte* residual);
  /// theta += anchor - snapshot: what the center did while theta was trained on.
  void (*merge)(DType, const Piece&, const void* snapshot);
  /// out = a - b, in the center's type.
  void (*subtract)(DType center, const std::byte* a, const std::byte* b, std::byte* out, std::size_t count);
  /// Rounds values (finite, of the center's type) to `wire`, which is not Wire::center; values become what was rounded
  /// away.
  void (*encode)(DType center, Wire, std::byte* values, std::byte* out, std::size_t count);
  /// values = in, or += in, of the center's type. All machines get the same bits.
  void (*decode)(DType center, Wire, const std::byte* in, bool add, std::byte* values, std::size_t count);
};

/// The set in use: the best one for this processor.
const Kernels& kernels();

/// For tests: use the set of that name. False if this processor or build has none.
bool use_kernels(const char* name);

}  // namespace hvd_agn
