// The worker's end: its arrays, its anchor, and the exchange with the center.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "center.hpp"

namespace hvd_agn {

/// A contiguous array of the worker: one registered tensor.
struct Buffer {
  void* data;
  std::size_t count;  // elements
  DType dtype;
};

/// What a client has done so far.
struct Stats {
  static constexpr std::size_t kStalenessBins = 65;  // 0 ... 63, and all above

  std::uint64_t exchanges = 0;       // pushes accepted
  std::uint64_t pushes_refused = 0;  // deltas with NaN or Inf
  std::uint64_t blocks_refused = 0;  // blocks on which the rule overflowed, of accepted pushes
  std::uint64_t pulls = 0;
  std::uint64_t bytes = 0;  // of parameters, pushed and pulled
  double seconds = 0;       // in exchange() and pull()
  std::uint64_t staleness_max = 0;
  std::uint64_t staleness_sum = 0;                                  // over the pushes of all blocks
  std::array<std::uint64_t, kStalenessBins> staleness_histogram{};  // pushes of blocks, by staleness
};

/// One worker of one center. Calls from several threads follow one another. No call is collective, none allocates.
class Client {
 public:
  static constexpr std::size_t kAccepted = static_cast<std::size_t>(-1);

  /// Sets the buffers, one per segment of the center's layout, to the center.
  Client(std::shared_ptr<Center> center, std::vector<Buffer> buffers);

  /// The segment's storage has moved. invalid_argument unless count and dtype are as they were.
  void bind(std::size_t segment, const Buffer& buffer);

  /// One exchange after `steps` local steps. Returns kAccepted, or a segment whose delta has a NaN or Inf: then
  /// neither the center nor the buffers were touched.
  std::size_t exchange(double steps);
  /// Buffers and anchor become the center.
  void pull();
  /// Buffers become the center; the anchor stays.
  void peek();

  /// Copies the anchor of a segment, in the buffer's dtype, to or from `values`.
  void read_anchor(std::size_t segment, void* values) const;
  void write_anchor(std::size_t segment, const void* values);

  /// Waits for a call that is under way; every later one throws UsageError. The buffers may then go.
  void close();

  Stats stats() const;
  const std::vector<Buffer>& buffers() const { return buffers_; }
  /// Memory beyond the buffers, in bytes: the anchor, and bookkeeping.
  std::size_t extra_bytes() const;

 private:
  std::size_t first_block() const;
  std::size_t find_nonfinite() const;
  Range exchange_block(Center::Block block, std::size_t index, double steps);
  Range copy_block(const Center::Block& block, std::size_t index, bool with_anchor);
  void copy_all(bool with_anchor);
  Piece piece(const Layout::Part& part, const std::byte* in, std::byte* out, bool with_anchor) const;

  std::unique_lock<std::mutex> enter() const;

  mutable std::mutex mutex_;
  bool closed_ = false;
  std::shared_ptr<Center> center_;
  std::vector<Buffer> buffers_;
  std::unique_ptr<std::byte[]> anchor_;
  std::size_t anchor_bytes_ = 0;
  std::vector<std::size_t> anchor_offset_;
  std::vector<std::uint64_t> seen_;     // version of each block as last pulled
  std::vector<std::size_t> busy_;       // blocks put off because another held them
  Range anchor_range_ = Range::normal;  // at least that of every element
  Stats stats_;
  std::size_t push_bytes_ = 0;
};

}  // namespace hvd_agn
