#include "exchange.hpp"

#include <algorithm>
#include <chrono>
#include <cstring>

namespace hvd_agn {

namespace {

/// Adds the life of the object to a sum of seconds.
class Timed {
 public:
  explicit Timed(double* seconds) : seconds_(seconds) {}
  ~Timed() { *seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count(); }

 private:
  double* seconds_;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

}  // namespace

Client::Client(std::shared_ptr<Center> center, std::vector<Buffer> buffers)
    : center_(std::move(center)), buffers_(std::move(buffers)) {
  const auto& segments = center_->layout().segments();
  HVD_AGN_EXPECTS(buffers_.size() == segments.size(), std::invalid_argument, "the center has ", segments.size(),
                  " arrays, this client gives ", buffers_.size());
  for (std::size_t s = 0; s < buffers_.size(); ++s) {
    const Buffer& buffer = buffers_[s];
    HVD_AGN_EXPECTS(buffer.count == segments[s].count && center_dtype(buffer.dtype) == segments[s].dtype,
                    std::invalid_argument, "array ", s, " does not match the center's in size or type");
    anchor_offset_.push_back(anchor_bytes_);
    const std::size_t bytes = buffer.count * item_size(buffer.dtype);
    anchor_bytes_ += (bytes + Layout::kAlignment - 1) / Layout::kAlignment * Layout::kAlignment;
    push_bytes_ += bytes;
  }
  anchor_.reset(new std::byte[anchor_bytes_]);
  use_huge_pages(anchor_.get(), anchor_bytes_);
  seen_.resize(center_->layout().blocks());
  busy_.reserve(seen_.size());
  copy_all(true);
}

std::unique_lock<std::mutex> Client::enter() const {
  std::unique_lock<std::mutex> guard(mutex_);
  HVD_AGN_EXPECTS(!closed_, UsageError, "[rank ", center_->rank(),
                  "] this worker has left the center: used after close().");
  return guard;
}

void Client::close() {
  const std::lock_guard<std::mutex> guard(mutex_);
  closed_ = true;
}

void Client::bind(std::size_t segment, const Buffer& buffer) {
  const auto guard = enter();
  Buffer& own = buffers_.at(segment);
  HVD_AGN_EXPECTS(buffer.count == own.count && buffer.dtype == own.dtype, std::invalid_argument, "array ", segment,
                  " does not match the registered one in size or type");
  own.data = buffer.data;
}

Piece Client::piece(const Layout::Part& part, const std::byte* in, std::byte* out, bool with_anchor) const {
  const Buffer& buffer = buffers_[part.segment];
  const std::size_t offset = part.first * item_size(buffer.dtype);
  return {static_cast<std::byte*>(buffer.data) + offset,
          with_anchor ? anchor_.get() + anchor_offset_[part.segment] + offset : nullptr,
          in ? in + part.block_offset : nullptr,
          out ? out + part.block_offset : nullptr,
          center_->slot_stride(),
          part.count};
}

std::size_t Client::first_block() const {
  return seen_.size() * static_cast<std::size_t>(center_->rank()) / center_->ranks();
}

std::size_t Client::find_nonfinite() const {
  // In the reverse of the order of the exchange, which finds in the cache what was read last here.
  const Layout& layout = center_->layout();
  const std::size_t blocks = seen_.size();
  for (std::size_t i = blocks; i-- > 0;) {
    const std::size_t b = (first_block() + i) % blocks;
    for (const Layout::Part* part = layout.begin(b); part != layout.end(b); ++part) {
      const Piece p = piece(*part, nullptr, nullptr, true);
      const DType dtype = buffers_[part->segment].dtype;
      const Range range = kernels().scan(dtype, p.theta, p.count);
      if (range == Range::nonfinite) return part->segment;
      // Two finite values may differ by more than the type holds, but only if one of them is large.
      if ((range == Range::large || anchor_range_ != Range::normal) &&
          !kernels().finite_delta(dtype, p.theta, p.anchor, p.count))
        return part->segment;
    }
  }
  return kAccepted;
}

std::size_t Client::exchange(double steps) {
  HVD_AGN_EXPECTS(steps > 0, std::invalid_argument, "exchange after ", steps, " steps: give a positive number");
  const auto guard = enter();
  const Timed timed(&stats_.seconds);
  if (const std::size_t segment = find_nonfinite(); segment != kAccepted) {
    ++stats_.pushes_refused;
    return segment;
  }
  // Ranks start apart, and put off a block that another holds, so that none queues behind another.
  Range range = Range::normal;
  const std::size_t blocks = seen_.size();
  busy_.clear();
  for (std::size_t i = 0; i < blocks; ++i) {
    const std::size_t b = (first_block() + i) % blocks;
    if (auto block = center_->try_lock(b))
      range = std::max(range, exchange_block(std::move(*block), b, steps));
    else
      busy_.push_back(b);
  }
  for (const std::size_t b : busy_) range = std::max(range, exchange_block(center_->lock(b), b, steps));
  anchor_range_ = range;
  ++stats_.exchanges;
  stats_.bytes += 2 * push_bytes_;
  return kAccepted;
}

Range Client::exchange_block(Center::Block block, std::size_t index, double steps) {
  const Layout& layout = center_->layout();
  const std::uint64_t version = block.version();
  Range range = Range::normal;
  for (const Layout::Part* part = layout.begin(index); part != layout.end(index); ++part) {
    if (part != layout.begin(index)) reach(Stage::half_written, index);
    const Piece p = piece(*part, block.data(), block.spare(), true);
    range = std::max(range, kernels().exchange(buffers_[part->segment].dtype, center_->rule(), version == 0, steps, p));
  }
  const std::uint64_t staleness = version > seen_[index] ? version - seen_[index] : 0;  // load() may set it back
  stats_.staleness_sum += staleness;
  stats_.staleness_max = std::max(stats_.staleness_max, staleness);
  ++stats_.staleness_histogram[std::min<std::uint64_t>(staleness, Stats::kStalenessBins - 1)];
  if (range == Range::nonfinite) {  // the rule overflowed: the block stays as it was, and this worker takes it over
    ++stats_.blocks_refused;
    range = copy_block(block, index, true);
  } else {
    block.commit(version + 1);
    seen_[index] = version + 1;
  }
  anchor_range_ = std::max(anchor_range_, range);  // should a later block fail
  return range;
}

Range Client::copy_block(const Center::Block& block, std::size_t index, bool with_anchor) {
  const Layout& layout = center_->layout();
  Range range = Range::normal;
  for (const Layout::Part* part = layout.begin(index); part != layout.end(index); ++part) {
    const Piece p = piece(*part, block.data(), nullptr, with_anchor);
    range = std::max(range, kernels().pull(buffers_[part->segment].dtype, p));
  }
  if (with_anchor) seen_[index] = block.version();
  return range;
}

void Client::copy_all(bool with_anchor) {
  const Timed timed(&stats_.seconds);
  Range range = Range::normal;
  for (std::size_t b = 0; b < seen_.size(); ++b) range = std::max(range, copy_block(center_->lock(b), b, with_anchor));
  if (with_anchor) anchor_range_ = range;
  stats_.bytes += push_bytes_;
}

void Client::pull() {
  const auto guard = enter();
  copy_all(true);
  ++stats_.pulls;
}

void Client::peek() {
  const auto guard = enter();
  copy_all(false);
}

void Client::read_anchor(std::size_t segment, void* values) const {
  const auto guard = enter();
  const Buffer& buffer = buffers_.at(segment);
  std::memcpy(values, anchor_.get() + anchor_offset_[segment], buffer.count * item_size(buffer.dtype));
}

void Client::write_anchor(std::size_t segment, const void* values) {
  const auto guard = enter();
  const Buffer& buffer = buffers_.at(segment);
  std::memcpy(anchor_.get() + anchor_offset_[segment], values, buffer.count * item_size(buffer.dtype));
  anchor_range_ = std::max(anchor_range_, kernels().scan(buffer.dtype, values, buffer.count));
}

Stats Client::stats() const {
  const auto guard = enter();
  return stats_;
}

std::size_t Client::extra_bytes() const {
  return anchor_bytes_ + (seen_.capacity() + busy_.capacity() + anchor_offset_.capacity()) * sizeof(std::size_t);
}

}  // namespace hvd_agn
