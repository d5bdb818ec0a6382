#include "center/exchange.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <utility>

#include "center/exchange_remote.hpp"
#include "kernels/staged.hpp"
#include "mailbox/service.hpp"

namespace hvd_agn {

namespace {

constexpr std::size_t kPastCacheBytes = std::size_t{32} << 20;  // more than a rank's share of a cache

/// Adds the life of the object to a sum of seconds.
class Timed {
 public:
  Timed(double* seconds, std::mutex* mutex) : seconds_(seconds), mutex_(mutex) {}
  ~Timed() {
    const std::lock_guard<std::mutex> lock(*mutex_);
    *seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  double* seconds_;
  std::mutex* mutex_;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

}  // namespace

Client::Client(std::shared_ptr<Center> center, std::vector<Buffer> buffers, Options options, std::uint32_t epoch)
    : center_(std::move(center)),
      epoch_(epoch),
      buffers_(std::move(buffers)),
      options_(options),
      leave_{center_.get(), center_->enter_client()} {
  const Layout& layout = center_->layout();
  const auto& segments = layout.segments();
  HVD_AGN_EXPECTS(buffers_.size() == segments.size(), std::invalid_argument, "the center has ", segments.size(),
                  " arrays, this client gives ", buffers_.size());
  for (std::size_t s = 0; s < buffers_.size(); ++s) {
    const Buffer& buffer = buffers_[s];
    HVD_AGN_EXPECTS(buffer.count == segments[s].count && center_dtype(buffer.dtype) == segments[s].dtype,
                    std::invalid_argument, "array ", s, " does not match the center's in size or type");
    offset_.push_back(anchor_bytes_);
    const std::size_t bytes = buffer.count * item_size(buffer.dtype);
    anchor_bytes_ += round_up(bytes, Layout::kAlignment);
    push_bytes_ += bytes;
  }
  past_cache_ = push_bytes_ > kPastCacheBytes;
  anchor_.reset(new std::byte[anchor_bytes_]);
  use_huge_pages(anchor_.get(), anchor_bytes_);
  if (options_.overlap) {
    snapshot_.reset(new std::byte[anchor_bytes_]);
    use_huge_pages(snapshot_.get(), anchor_bytes_);
  }
  if (options_.wire != Wire::center && center_->mailbox()) {
    for (const auto& [begin, end] : center_->remote()) residual_bytes_ += (end - begin) * layout.block_bytes();
    residual_.reset(new std::byte[residual_bytes_]());
    rounded_.resize(layout.block_bytes());
    if (center_->rule().kind == Rule::Kind::custom) residual_before_.reset(new std::byte[residual_bytes_]());
  }
  if (options_.gradients) make_sums();
  if (center_->rule().staged()) staged_.resize(layout.block_bytes());
  seen_.resize(layout.blocks());
  progress_.resize(layout.blocks());
  whole_.assign(layout.blocks(), 1);
  busy_.reserve(seen_.size());
  copy_all(true, true);
}

Client::~Client() {
  if (center_->forked()) {  // where the thread is not: what waits for it, the future's destructor too, must not run
    static_cast<void>(new std::future<std::size_t>(std::move(flight_)));
    return;
  }
  if (flight_.valid()) flight_.wait();
}

std::unique_lock<std::mutex> Client::enter() const {
  center_->check_process();  // first: another thread may have held the mutex at the fork
  std::unique_lock<std::mutex> guard(mutex_);
  HVD_AGN_EXPECTS(!closed_, UsageError, "[rank ", center_->rank(),
                  "] this worker has left the center: used after close().");
  return guard;
}

std::unique_lock<std::mutex> Client::enter_grounded(const char* call) const {
  auto guard = enter();
  HVD_AGN_EXPECTS(!flight_.valid(), UsageError, "[rank ", center_->rank(), "] ", call,
                  " while an exchange is under way in the background: call finish() first.");
  return guard;
}

void Client::close() {
  if (center_->forked()) return;
  const std::lock_guard<std::mutex> guard(mutex_);
  if (flight_.valid()) flight_.wait();
  closed_ = true;
}

void Client::bind(std::size_t segment, const Buffer& buffer) {
  const auto guard = enter();
  Buffer& own = buffers_.at(segment);
  HVD_AGN_EXPECTS(buffer.count == own.count && buffer.dtype == own.dtype, std::invalid_argument, "array ", segment,
                  " does not match the registered one in size or type");
  own.data = buffer.data;
}

void Client::bind_all(const std::vector<const void*>& data, std::vector<void*> results) {
  const auto guard = enter();
  HVD_AGN_EXPECTS(data.size() == buffers_.size() && (results.empty() || results.size() == data.size()),
                  std::invalid_argument, "the center has ", buffers_.size(), " arrays, not ", data.size());
  for (std::size_t s = 0; s < data.size(); ++s) buffers_[s].data = const_cast<void*>(data[s]);
  results_ = std::move(results);
  bound_ = true;
}

void Client::unbind() {
  const std::lock_guard<std::mutex> guard(mutex_);
  copy_to_results();
  for (Buffer& buffer : buffers_) buffer.data = nullptr;
  bound_ = false;
}

void Client::check_bound(const char* call) const {
  HVD_AGN_EXPECTS(bound_, UsageError, "[rank ", center_->rank(), "] ", call,
                  " of a client whose arrays are an optimizer's variables: call the optimizer's own.");
}

void Client::set_rates(std::vector<double> rates) {
  const std::size_t expected = center_->groups().rates();
  HVD_AGN_EXPECTS(rates.size() == expected, std::invalid_argument, "this push brings ", rates.size(),
                  " learning rates, not ", expected);
  rates_ = std::move(rates);
}

std::byte* Client::target(const Layout::Part& part) const {
  if (results_.empty()) return source(part);
  return static_cast<std::byte*>(results_[part.segment]) + part.first * item_size(buffers_[part.segment].dtype);
}

void Client::settle_results() {
  if (results_.empty()) return;
  const Layout& layout = center_->layout();
  for (std::size_t b = 0; b < layout.blocks(); ++b) {
    for (const Layout::Part* part = layout.begin(b); part != layout.end(b); ++part)
      if (progress_[b] != Progress::done || !active(*part, false))
        std::memmove(target(*part), source(*part), part->count * item_size(buffers_[part->segment].dtype));
  }
  for (std::size_t s = 0; s < buffers_.size(); ++s) buffers_[s].data = results_[s];
  results_.clear();
}

void Client::copy_to_results() {
  for (std::size_t s = 0; s < results_.size(); ++s) {
    const std::size_t bytes = buffers_[s].count * item_size(buffers_[s].dtype);
    if (bytes > 0) std::memmove(results_[s], buffers_[s].data, bytes);  // some may be the same memory
    buffers_[s].data = results_[s];
  }
  results_.clear();
}

std::byte* Client::source(const Layout::Part& part) const {
  const Buffer& buffer = buffers_[part.segment];
  const std::size_t offset = part.first * item_size(buffer.dtype);
  if (from_snapshot_) return snapshot_.get() + offset_[part.segment] + offset;
  return static_cast<std::byte*>(buffer.data) + offset;
}

std::byte* Client::anchor(const Layout::Part& part) const {
  return anchor_.get() + offset_[part.segment] + part.first * item_size(buffers_[part.segment].dtype);
}

Piece Client::piece(const Layout::Part& part, const std::byte* in, std::byte* out) const {
  return {source(part),
          anchor(part),
          in ? in + part.block_offset : nullptr,
          out ? out + part.block_offset : nullptr,
          center_->layout().block_bytes(),
          part.count};
}

std::size_t Client::first_block(std::size_t begin, std::size_t end) const {
  return (end - begin) * static_cast<std::size_t>(center_->node_rank()) / center_->node_size();
}

// ---- the check

bool Client::finite_block(std::size_t block, std::size_t* segment) const {
  const Layout& layout = center_->layout();
  for (const Layout::Part* part = layout.begin(block); part != layout.end(block); ++part) {
    if (options_.gradients) {
      *segment = part->segment;
      const DType dtype = buffers_[part->segment].dtype;
      if (active(*part, true) &&
          (kernels().scan(layout.dtype(*part), accumulator(*part), part->count) == Range::nonfinite ||
           // finish() would make a NaN of it
           (from_snapshot_ && kernels().scan(dtype, source(*part), part->count) == Range::nonfinite)))
        return false;
      continue;
    }
    const Piece p = piece(*part, nullptr, nullptr);
    const DType dtype = buffers_[part->segment].dtype;
    const Range range = kernels().scan(dtype, p.theta, p.count);
    *segment = part->segment;
    if (range == Range::nonfinite) return false;
    // Two finite values may differ by more than the type holds, but only if one of them is large.
    if ((range == Range::large || anchor_range_ != Range::normal) &&
        !kernels().finite_delta(dtype, p.theta, p.anchor, p.count))
      return false;
  }
  return true;
}

std::size_t Client::find_nonfinite() const {
  // In the reverse of the order of the exchange, which finds in the cache what was read last here.
  std::size_t segment = 0;
  for (const auto& [begin, end] : center_->remote())
    for (std::size_t b = begin; b < end; ++b)
      if (!finite_block(b, &segment)) return segment;
  for (auto shard = center_->shards().rbegin(); shard != center_->shards().rend(); ++shard) {
    const std::size_t begin = (*shard)->begin(), blocks = (*shard)->end() - begin;
    for (std::size_t i = blocks; i-- > 0;) {
      const std::size_t b = begin + (first_block(begin, begin + blocks) + i) % blocks;
      if (!finite_block(b, &segment)) return segment;
    }
  }
  return kAccepted;
}

double Client::norm() const {
  const Layout& layout = center_->layout();
  double squares = 0;
  for (std::size_t b = 0; b < layout.blocks(); ++b)
    for (const Layout::Part* part = layout.begin(b); part != layout.end(b); ++part) {
      if (!active(*part, true)) continue;
      squares +=
          options_.gradients
              ? kernels().distance(layout.dtype(*part), {accumulator(*part), nullptr, nullptr, nullptr, 0, part->count})
              : kernels().distance(buffers_[part->segment].dtype, piece(*part, nullptr, nullptr));
    }
  return std::sqrt(squares);
}

std::size_t Client::refuse(std::size_t why, double norm) {
  const std::lock_guard<std::mutex> lock(counts_mutex_);
  ++stats_.pushes_refused;
  refused_norm_ = norm;
  return why;
}

// ---- the exchange

std::size_t Client::exchange(double steps, bool exact, std::vector<double> rates) {
  HVD_AGN_EXPECTS(steps > 0, std::invalid_argument, "exchange after ", steps, " steps: give a positive number");
  const auto guard = enter_grounded("exchange()");
  check_bound("exchange()");
  set_rates(std::move(rates));
  if (options_.gradients) choose_active(exact);
  std::size_t refused = kAccepted;
  try {
    refused = exchange_all(steps, exact);
  } catch (...) {
    for (std::size_t b = 0; b < pushed_.size(); ++b) pushed_[b] |= progress_[b] != Progress::untouched;
    settle_results();
    throw;
  }
  if (refused == kAccepted) {
    settle_results();
    std::fill(touched_.begin(), touched_.end(), std::uint8_t{0});
    std::fill(pushed_.begin(), pushed_.end(), std::uint8_t{0});
  }
  return refused;
}

std::size_t Client::exchange_all(double steps, bool exact) {
  const Timed timed(&stats_.seconds, &counts_mutex_);
  if (const std::size_t segment = find_nonfinite(); segment != kAccepted) return refuse(segment);
  Push push;
  push.steps = steps;
  const double limit = center_->rule().clip_norm;
  if (limit > 0 || options_.max_norm > 0) {
    const double whole = norm();
    if (!std::isfinite(whole) || (options_.max_norm > 0 && whole / steps > options_.max_norm))
      return refuse(kTooFar, whole / steps);
    if (limit > 0) push.steps = std::max(steps, whole / limit);  // of the norm of the mean, 1 / steps
  }
  std::fill(progress_.begin(), progress_.end(), Progress::untouched);
  next_range_ = Range::normal;
  failure_.clear();
  restored_ = false;
  Mailbox* mailbox = center_->mailbox();
  push.power = power_ + steps + 1;
  PushTransfer transfer(*this, push, exact);
  if (residual_ && !exact) {  // also when it fails half-way
    owes_ = true;
    for (std::size_t s = 0; s < rounded_off_.size(); ++s) rounded_off_[s] |= active_[s];
  }
  try {
    if (mailbox) mailbox->begin(transfer);
    for (const auto& shard : center_->shards()) exchange_shard(*shard, push);
    if (mailbox) mailbox->wait(transfer);
    check_restored();
    HVD_AGN_EXPECTS(failure_.empty(), RuleError, failure_);
  } catch (...) {
    if (mailbox) mailbox->cancel(transfer);
    throw;
  }
  const std::lock_guard<std::mutex> lock(counts_mutex_);
  power_ = push.power;
  anchor_range_ = next_range_;
  if (exact) {
    owes_ = false;
    std::fill(rounded_off_.begin(), rounded_off_.end(), std::uint8_t{0});
  }
  ++stats_.exchanges;
  stats_.bytes += 2 * push_bytes_;
  return kAccepted;
}

void Client::exchange_shard(Shard& shard, const Push& push) {
  // Ranks start apart, and put off a block that another holds, so that none queues behind another.
  const std::size_t blocks = shard.end() - shard.begin();
  busy_.clear();
  for (std::size_t i = 0; i < blocks; ++i) {
    const std::size_t b = shard.begin() + (first_block(shard.begin(), shard.end()) + i) % blocks;
    if (!active(b, false)) continue;
    auto block = shard.try_lock(b);
    if (block && block->epoch() == epoch_)
      exchange_block(shard, std::move(*block), b, push);
    else
      busy_.push_back(b);
  }
  for (const std::size_t b : busy_) exchange_block(shard, shard.lock(b, epoch_), b, push);
}

void Client::exchange_block(Shard& shard, Shard::Block block, std::size_t index, Push push) {
  const std::uint64_t version = block.version();
  push.version = version;
  push.weight = center_->rule().weight(version > seen_[index] ? version - seen_[index] : 0);
  Range range = Range::normal;
  try {
    range = center_->rule().staged() ? push_staged(shard, block, index, push) : push_fused(shard, block, index, push);
  } catch (const RuleError& error) {  // the other blocks are exchanged all the same
    const std::lock_guard<std::mutex> lock(counts_mutex_);
    if (failure_.empty()) failure_ = error.what();
    return;
  }
  const bool refused = range == Range::nonfinite;
  if (refused)  // the rule overflowed: the block stays as it was, and this worker takes it over
    range = copy_block(index, block.data(), shard.slot_stride(), !from_snapshot_, true, false);
  else
    block.commit(version + 1);
  received(index, refused ? version : version + 1, true, refused, range);
}

Range Client::push_fused(Shard& shard, const Shard::Block& block, std::size_t index, const Push& push) {
  const Layout& layout = center_->layout();
  const Groups& groups = center_->groups();
  Range range = Range::normal;
  for (const Layout::Part* part = layout.begin(index); part != layout.end(index); ++part) {
    if (part != layout.begin(index)) reach(Stage::half_written, index);
    if (options_.gradients) {
      exchange_gradient(shard, block, *part, push, &range);
      continue;
    }
    const DType dtype = buffers_[part->segment].dtype;
    const Piece p = piece(*part, block.data(), block.spare());
    void* const result = from_snapshot_ ? nullptr : target(*part);
    const bool copied = result && result != p.theta && !past_cache_;
    range = std::max(range, kernels().exchange(dtype, groups.rule(*part), groups.push(push, *part, rates_),
                                               copied ? nullptr : result, p));
    if (copied) std::memcpy(result, p.anchor, p.count * item_size(dtype));
  }
  return range;
}

Range Client::push_staged(Shard& shard, const Shard::Block& block, std::size_t index, Push push) {
  const double steps = std::exchange(push.steps, 1);
  const Layout& layout = center_->layout();
  const Groups& groups = center_->groups();
  Range range = Range::normal;
  for (const Layout::Part* part = layout.begin(index); part != layout.end(index); ++part) {
    if (part != layout.begin(index)) reach(Stage::half_written, index);
    if (!active(*part, false)) {
      keep_part(layout, *part, groups.common().slots(), shard.slot_stride(), block.data(), block.spare());
      continue;
    }
    take_delta(*part, steps, staged_.data(), nullptr);
    Piece p = piece(*part, block.data(), block.spare());
    p.theta = staged_.data() + part->block_offset;
    range = std::max(range, apply_staged(layout.dtype(*part), groups.rule(*part), groups.push(push, *part, rates_), p,
                                         buffers_[part->segment].dtype));
  }
  // Only now, when no part can fail any more.
  drop_sums(index, false);
  if (range == Range::nonfinite) return range;
  return std::max(range, copy_block(index, block.spare(), shard.slot_stride(), !from_snapshot_, true, false));
}

void Client::received(std::size_t block, std::uint64_t version, bool pushed, bool refused, Range range) {
  const std::lock_guard<std::mutex> lock(counts_mutex_);
  if (pushed) {
    const std::uint64_t before = refused ? version : version - 1;
    const std::uint64_t staleness = before > seen_[block] ? before - seen_[block] : 0;  // load() may set it back
    stats_.staleness_sum += staleness;
    stats_.staleness_max = std::max(stats_.staleness_max, staleness);
    ++stats_.staleness_histogram[std::min<std::uint64_t>(staleness, Stats::kStalenessBins - 1)];
    stats_.blocks_refused += refused;
  }
  progress_[block] = Progress::done;
  seen_[block] = version;
  next_range_ = std::max(next_range_, range);
  anchor_range_ = std::max(anchor_range_, range);  // should a later block fail
}

// ---- pulls

Range Client::copy_block(std::size_t block, const std::byte* from, std::size_t slot_stride, bool theta,
                         bool with_anchor, bool past_cache) {
  const Layout& layout = center_->layout();
  Range range = Range::normal;
  for (const Layout::Part* part = layout.begin(block); part != layout.end(block); ++part) {
    const Piece p = {theta && active(*part, false) ? target(*part) : nullptr,
                     with_anchor ? anchor(*part) : nullptr,
                     from + part->block_offset,
                     nullptr,
                     slot_stride,
                     part->count};
    range = std::max(range, kernels().pull(buffers_[part->segment].dtype, p, past_cache));
  }
  return range;
}

void Client::copy_all(bool theta, bool with_anchor) {
  const Timed timed(&stats_.seconds, &counts_mutex_);
  copy_to_results();  // for what is not reached, should this be cut short
  next_range_ = Range::normal;
  restored_ = false;
  Mailbox* mailbox = center_->mailbox();
  PullTransfer pull(*this, theta, with_anchor);
  try {
    if (mailbox) mailbox->begin(pull);
    for (const auto& shard : center_->shards()) {
      for (std::size_t b = shard->begin(); b < shard->end(); ++b) {
        const Shard::Block block = shard->lock(b, epoch_, !with_anchor);
        const Range range = copy_block(b, block.data(), shard->slot_stride(), theta, with_anchor, past_cache_);
        if (with_anchor) received(b, block.version(), false, false, range);
      }
    }
    if (mailbox) mailbox->wait(pull);
    check_restored();
  } catch (...) {
    if (mailbox) mailbox->cancel(pull);
    throw;
  }
  const std::lock_guard<std::mutex> lock(counts_mutex_);
  if (with_anchor) anchor_range_ = next_range_;
  stats_.bytes += push_bytes_;
}

void Client::check_restored() const {
  if (restored_) restored(center_->rank());
}

void Client::pull() {
  const auto guard = enter_grounded("pull()");
  check_bound("pull()");
  std::fill(active_.begin(), active_.end(), kTouched);
  copy_all(true, true);
  drop_gradients();
  const std::lock_guard<std::mutex> lock(counts_mutex_);
  ++stats_.pulls;
}

void Client::forget() {
  const auto guard = enter_grounded("forget()");
  drop_gradients();
  if (residual_) std::memset(residual_.get(), 0, residual_bytes_);
  owes_ = false;
  std::fill(rounded_off_.begin(), rounded_off_.end(), std::uint8_t{0});
}

void Client::peek() {
  const auto guard = enter_grounded("peek()");
  check_bound("peek()");
  std::fill(active_.begin(), active_.end(), kTouched);
  copy_all(true, false);
}

// ---- state

void Client::read_anchor(std::size_t segment, void* values) const {
  const auto guard = enter();
  const Buffer& buffer = buffers_.at(segment);
  if (flight_.valid()) flight_.wait();
  std::memcpy(values, anchor_.get() + offset_[segment], buffer.count * item_size(buffer.dtype));
}

void Client::read_snapshot(std::size_t segment, void* values) const {
  const auto guard = enter();
  HVD_AGN_EXPECTS(flight_.valid(), UsageError, "[rank ", center_->rank(), "] read_snapshot() without start().");
  flight_.wait();
  const Buffer& buffer = buffers_.at(segment);
  const bool merged = !options_.gradients || active_[segment];
  std::memcpy(values, (merged ? snapshot_ : anchor_).get() + offset_[segment], buffer.count * item_size(buffer.dtype));
}

void Client::write_anchor(std::size_t segment, const void* values) {
  const auto guard = enter_grounded("write_anchor()");
  const Buffer& buffer = buffers_.at(segment);
  std::memcpy(anchor_.get() + offset_[segment], values, buffer.count * item_size(buffer.dtype));
  anchor_range_ = std::max(anchor_range_, kernels().scan(buffer.dtype, values, buffer.count));
  std::fill(whole_.begin(), whole_.end(), std::uint8_t{1});  // the hosts know another anchor
}

std::vector<std::uint64_t> Client::versions() const {
  const std::lock_guard<std::mutex> lock(counts_mutex_);
  return seen_;
}

void Client::set_versions(const std::vector<std::uint64_t>& versions) {
  const std::lock_guard<std::mutex> lock(counts_mutex_);
  if (versions.size() == seen_.size())
    seen_ = versions;
  else if (!versions.empty())
    std::fill(seen_.begin(), seen_.end(), *std::max_element(versions.begin(), versions.end()));
}

bool Client::owes() const {
  const auto guard = enter();
  return owes_;
}

std::uint64_t Client::blocks_refused() const {
  const std::lock_guard<std::mutex> lock(counts_mutex_);
  return stats_.blocks_refused;
}

double Client::refused_norm() const {
  const std::lock_guard<std::mutex> lock(counts_mutex_);
  return refused_norm_;
}

std::uint64_t Client::latest_version() const {
  const std::lock_guard<std::mutex> lock(counts_mutex_);
  return *std::max_element(seen_.begin(), seen_.end());
}

Stats Client::stats() const {
  const auto guard = enter();
  const std::lock_guard<std::mutex> lock(counts_mutex_);
  Stats stats = stats_;
  stats.center_version = UINT64_MAX;
  for (const auto& shard : center_->shards()) stats.center_version = std::min(stats.center_version, shard->version());
  for (const auto& [begin, end] : center_->remote())
    for (std::size_t b = begin; b < end; ++b) stats.center_version = std::min(stats.center_version, seen_[b]);
  return stats;
}

std::size_t Client::extra_bytes() const {
  return (anchor_bytes_ + sum_bytes_) * (options_.overlap ? 2 : 1) + residual_bytes_ * (residual_before_ ? 2 : 1) +
         rounded_.size() + staged_.size() + center_->mailbox_bytes() + whole_.capacity() + progress_.capacity() +
         (seen_.capacity() + busy_.capacity() + offset_.capacity()) * sizeof(std::size_t);
}

}  // namespace hvd_agn
