// Overlap: the exchange of a snapshot in the background, and what becomes of it.
#include <cstring>
#include <utility>

#include "center/exchange.hpp"

namespace hvd_agn {

void Client::start(double steps, std::vector<double> rates) {
  HVD_AGN_EXPECTS(steps > 0, std::invalid_argument, "exchange after ", steps, " steps: give a positive number");
  const auto guard = enter_grounded("start()");
  check_bound("start()");
  HVD_AGN_EXPECTS(snapshot_, UsageError, "[rank ", center_->rank(), "] start() needs a client made with overlap=True.");
  set_rates(std::move(rates));
  for (std::size_t s = 0; s < buffers_.size(); ++s) {
    const std::size_t bytes = buffers_[s].count * item_size(buffers_[s].dtype);
    if (past_cache_)
      kernels().copy(buffers_[s].data, snapshot_.get() + offset_[s], bytes);
    else
      std::memcpy(snapshot_.get() + offset_[s], buffers_[s].data, bytes);
  }
  if (options_.gradients) set_sums_aside();
  std::fill(progress_.begin(), progress_.end(), Progress::untouched);
  from_snapshot_ = true;
  landed_ = false;
  try {
    flight_ = std::async(std::launch::async, [this, steps] { return fly(steps); });
  } catch (...) {  // no thread to be had
    from_snapshot_ = false;
    if (options_.gradients) settle_gradients();
    throw;
  }
  started_ = true;
}

std::size_t Client::fly(double steps) {
  try {
    const std::size_t refused = exchange_all(steps, false);
    if (refused != kAccepted) std::memcpy(snapshot_.get(), anchor_.get(), anchor_bytes_);  // nothing to be merged
    landed_ = true;
    return refused;
  } catch (...) {
    settle_untouched();
    landed_ = true;
    throw;
  }
}

void Client::settle_untouched() {
  // What was not pushed is still to be: the center has moved nothing that finish() must add.
  const Layout& layout = center_->layout();
  for (std::size_t b = 0; b < layout.blocks(); ++b) {
    if (progress_[b] != Progress::untouched) continue;
    for (const Layout::Part* part = layout.begin(b); part != layout.end(b); ++part)
      std::memcpy(source(*part), anchor(*part), part->count * item_size(buffers_[part->segment].dtype));
  }
}

std::size_t Client::finish() {
  const auto guard = enter();
  HVD_AGN_EXPECTS(flight_.valid(), UsageError, "[rank ", center_->rank(), "] finish() without start().");
  check_bound("finish()");
  std::size_t refused = kAccepted;
  std::exception_ptr failure;
  try {
    refused = flight_.get();
  } catch (...) {
    failure = std::current_exception();
  }
  from_snapshot_ = false;
  started_ = false;
  copy_to_results();
  if (refused == kAccepted) {
    for (std::size_t s = 0; s < buffers_.size(); ++s) {
      if (options_.gradients && !active_[s]) continue;
      const Piece p = {buffers_[s].data, anchor_.get() + offset_[s], nullptr, nullptr, 0, buffers_[s].count};
      kernels().merge(buffers_[s].dtype, p, snapshot_.get() + offset_[s]);
    }
  }
  if (options_.gradients && (failure || refused != kAccepted)) settle_gradients();
  if (failure) std::rethrow_exception(failure);
  return refused;
}

}  // namespace hvd_agn
