// Gradients mode: what is accumulated, and which arrays take part in an exchange.
#include <algorithm>
#include <cstring>

#include "center/exchange.hpp"
#include "mailbox/service.hpp"

namespace hvd_agn {

// ---- what there is

void Client::make_sums() {
  const auto& segments = center_->layout().segments();
  for (const Layout::Segment& segment : segments) {
    sum_offset_.push_back(sum_bytes_);
    sum_bytes_ += round_up(segment.count * item_size(segment.dtype), Layout::kAlignment);
  }
  for (auto* sums : {&sums_, options_.overlap ? &flying_sums_ : nullptr}) {
    if (!sums) continue;
    sums->reset(new std::byte[sum_bytes_]);
    use_huge_pages(sums->get(), sum_bytes_);
    std::memset(sums->get(), 0, sum_bytes_);
  }
  touched_.resize(segments.size());
  active_.assign(segments.size(), kTouched);
  rounded_off_.resize(segments.size());
  pushed_.resize(center_->layout().blocks());
}

void Client::choose_active(bool exact) {
  active_ = touched_;
  for (std::size_t s = 0; exact && s < active_.size(); ++s)
    if (rounded_off_[s]) active_[s] |= kOwing;
}

void Client::set_sums_aside() {
  active_ = touched_;
  std::memcpy(flying_sums_.get(), sums_.get(), sum_bytes_);
  std::memset(sums_.get(), 0, sum_bytes_);
  std::fill(touched_.begin(), touched_.end(), std::uint8_t{0});
}

bool Client::active(std::size_t block, bool remote) const {
  const Layout& layout = center_->layout();
  if (!options_.gradients) return true;
  if (pushed_[block]) return false;
  return std::any_of(layout.begin(block), layout.end(block),
                     [&](const Layout::Part& part) { return active(part, remote); });
}

std::byte* Client::accumulator(const Layout::Part& part) const {
  const std::byte* sums = from_snapshot_ ? flying_sums_.get() : sums_.get();
  return const_cast<std::byte*>(sums) + sum_offset_[part.segment] +
         part.first * item_size(center_->layout().dtype(part));
}

void Client::accumulate(const std::vector<const Buffer*>& gradients) {
  const auto guard = enter();
  HVD_AGN_EXPECTS(options_.gradients, UsageError, "[rank ", center_->rank(),
                  "] accumulate() needs a center made with accumulate=\"gradients\".");
  HVD_AGN_EXPECTS(gradients.size() == buffers_.size(), std::invalid_argument, "the center has ", buffers_.size(),
                  " arrays, here are ", gradients.size(), " gradients");
  for (std::size_t s = 0; s < gradients.size(); ++s) {
    if (gradients[s])
      HVD_AGN_EXPECTS(gradients[s]->count == buffers_[s].count &&
                          center_dtype(gradients[s]->dtype) == center_->layout().segments()[s].dtype,
                      std::invalid_argument, "gradient ", s, " does not match its array in size or type");
  }
  for (std::size_t s = 0; s < gradients.size(); ++s) {
    if (!gradients[s]) continue;
    kernels().accumulate(gradients[s]->dtype, gradients[s]->data, sums_.get() + sum_offset_[s], gradients[s]->count);
    touched_[s] = kTouched;
  }
  std::fill(pushed_.begin(), pushed_.end(), std::uint8_t{0});
}

Buffer Client::accumulator(std::size_t segment) const {
  HVD_AGN_EXPECTS(options_.gradients, UsageError, "[rank ", center_->rank(), "] nothing is accumulated here.");
  const Layout::Segment& s = center_->layout().segments().at(segment);
  return {sums_.get() + sum_offset_[segment], s.count, s.dtype};
}

void Client::touch(const std::vector<bool>& segments) {
  const auto guard = enter();
  for (std::size_t s = 0; s < touched_.size(); ++s) touched_[s] |= segments.at(s) ? kTouched : 0;
  std::fill(pushed_.begin(), pushed_.end(), std::uint8_t{0});
}

void Client::drop_gradients() {
  if (!options_.gradients) return;
  std::memset(sums_.get(), 0, sum_bytes_);
  std::fill(touched_.begin(), touched_.end(), std::uint8_t{0});
  std::fill(pushed_.begin(), pushed_.end(), std::uint8_t{0});
}

void Client::drop_sums(std::size_t block, bool remote) {
  const Layout& layout = center_->layout();
  if (!options_.gradients) return;
  for (const Layout::Part* part = layout.begin(block); part != layout.end(block); ++part)
    if (active(*part, remote)) std::memset(accumulator(*part), 0, layout.bytes(*part));
}

void Client::settle_gradients() {
  // What was not pushed is accumulated again.
  const Layout& layout = center_->layout();
  for (std::size_t b = 0; b < layout.blocks(); ++b) {
    if (progress_[b] != Progress::untouched) continue;
    for (const Layout::Part* part = layout.begin(b); part != layout.end(b); ++part) {
      const std::size_t at = sum_offset_[part->segment] + part->first * item_size(layout.dtype(*part));
      kernels().accumulate(layout.dtype(*part), flying_sums_.get() + at, sums_.get() + at, part->count);
    }
  }
  for (std::size_t s = 0; s < touched_.size(); ++s) touched_[s] |= active_[s];
}

// ---- in an exchange

void Client::exchange_gradient(Shard& shard, const Shard::Block& block, const Layout::Part& part, Push push,
                               Range* range) {
  const Layout& layout = center_->layout();
  if (!active(part, false)) {
    keep_part(layout, part, center_->rule().slots(), shard.slot_stride(), block.data(), block.spare());
    return;
  }
  // The sum becomes the center's new values on its way.
  push.weight = -push.weight;
  const Piece sum = {
      accumulator(part),   nullptr,   block.data() + part.block_offset, block.spare() + part.block_offset,
      shard.slot_stride(), part.count};
  const Groups& groups = center_->groups();
  *range =
      std::max(*range, kernels().apply(layout.dtype(part), groups.rule(part), groups.push(push, part, rates_), sum));
  const Piece p = piece(part, nullptr, nullptr);
  const Piece taken = {
      from_snapshot_ ? nullptr : target(part), p.anchor, static_cast<std::byte*>(sum.theta), nullptr, 0, part.count};
  if (*range != Range::nonfinite)
    *range = std::max(*range, kernels().pull(buffers_[part.segment].dtype, taken, past_cache_));
  std::memset(sum.theta, 0, layout.bytes(part));
}

}  // namespace hvd_agn
