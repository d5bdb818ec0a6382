// Rules that take more than the fused pass: the delta of a block is made first, in memory of its own, and several
// passes go over it while it is in the cache.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/kernels.hpp"

namespace hvd_agn {

/// What a rule of kind custom does to one piece of a block.
class Function {
 public:
  virtual ~Function() = default;
  virtual int slots() const = 0;
  /// Changes `out`, center and slots as they were before, by a delta of the center's type; `t`: pushes of the block,
  /// this one among them. RuleError, or what is no error but an interrupt, if it cannot; then `out` is not used.
  virtual void apply(DType center, std::byte* delta, std::byte* out, std::size_t slot_stride, std::size_t count,
                     std::uint64_t t) const = 0;
};

/// For rules with Rule::staged(). As Kernels::apply, of a delta that is divided by the steps already, and with the
/// worker's anchor, of its `dtype`. RuleError as above.
Range apply_staged(DType center, const Rule& rule, const Push& push, const Piece& piece, DType dtype);

}  // namespace hvd_agn
