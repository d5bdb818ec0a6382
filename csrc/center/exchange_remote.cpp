#include "center/exchange_remote.hpp"

#include <algorithm>
#include <cstring>

#include "mailbox/service.hpp"

namespace hvd_agn {

// ---- what is asked

void Client::ask(Message& head) const {
  // Halves are sent as they are at the worker: exact, and half the bytes. Other types come as differences when the wire
  // rounds, once host and worker agree on what the worker has. A block with both comes whole.
  const Layout& layout = center_->layout();
  bool halves[2] = {}, others = false;
  for (const Layout::Part* part = layout.begin(head.block); part != layout.end(head.block); ++part) {
    const DType dtype = buffers_[part->segment].dtype;
    halves[0] |= dtype == DType::f16;
    halves[1] |= dtype == DType::bf16;
    others |= dtype != DType::f16 && dtype != DType::bf16;
  }
  head.client = leave_.id;
  head.epoch = epoch_;
  head.mirrored = center_->rule().gap_aware;
  if (!others && halves[0] != halves[1]) {
    head.half_values = true;
    head.answer_wire = halves[0] ? Wire::fp16 : Wire::bf16;
  } else if (others && !halves[0] && !halves[1] && options_.wire != Wire::center) {
    head.mirrored = true;
    head.difference = !whole_[head.block];
    if (head.difference) head.answer_wire = options_.wire;
  }
}

void Client::take_delta(const Layout::Part& part, double steps, std::byte* values, const std::byte* residual) const {
  const DType dtype = buffers_[part.segment].dtype;
  const Piece p = piece(part, nullptr, values);
  if (residual) residual += part.block_offset;
  if (!active(part, true)) {
    std::memset(p.out, 0, center_->layout().bytes(part));
  } else if (options_.gradients) {
    const Piece sum = {accumulator(part), nullptr, nullptr, p.out, 0, p.count};
    kernels().delta(center_->layout().dtype(part), steps, sum, residual);
  } else if (center_->rule().pushes_values()) {
    kernels().widen(dtype, p.theta, p.out, p.count);
  } else {
    kernels().delta(dtype, steps, p, residual);
  }
}

bool Client::PushTransfer::wants(std::size_t block) const {
  return client_.active(block, true);
}

void Client::PushTransfer::request(Message& head, std::byte* payload) {
  Client& c = client_;
  const Layout& layout = c.center_->layout();
  head.kind = Message::Kind::push;
  head.version = c.seen_[head.block];
  head.power = push_.power;
  head.wire = exact_ ? Wire::center : c.options_.wire;
  c.ask(head);
  const bool rounds = head.wire != Wire::center;
  std::byte* values = rounds ? c.rounded_.data() : payload;
  std::byte* residual = c.residual(head.block);
  if (c.residual_before_)
    std::memcpy(c.residual_before_.get() + (residual - c.residual_.get()), residual, layout.block_bytes());
  for (const Layout::Part* part = layout.begin(head.block); part != layout.end(head.block); ++part)
    c.take_delta(*part, push_.steps, values, residual);
  if (rounds) encode_block(layout, head.block, head.wire, values, payload);
  head.payload_bytes = encoded_bytes(layout, head.block, head.wire);
  std::byte* mask = payload + head.payload_bytes;
  std::memset(mask, 0, layout.mask_bytes());
  for (const Layout::Part* part = layout.begin(head.block); part != layout.end(head.block); ++part) {
    if (!c.active(*part, true)) {
      head.masked = true;
      continue;
    }
    const std::size_t number = part - layout.begin(head.block);
    mask[number / 8] |= std::byte{1} << (number % 8);
    if (rounds)
      std::memcpy(residual + part->block_offset, values + part->block_offset, layout.bytes(*part));
    else if (residual)
      std::memset(residual + part->block_offset, 0, layout.bytes(*part));
  }
  if (head.masked) head.payload_bytes += layout.mask_bytes();
  if (!c.rates_.empty()) {
    const std::size_t bytes = c.rates_.size() * sizeof(double);
    std::memcpy(payload + head.payload_bytes, c.rates_.data(), bytes);
    head.payload_bytes += bytes;
  }
  const std::lock_guard<std::mutex> lock(c.counts_mutex_);
  c.progress_[head.block] = Progress::sent;
  c.stats_.wire_bytes += head.payload_bytes;
}

void Client::PullTransfer::request(Message& head, std::byte*) {
  head.kind = Message::Kind::pull;
  client_.ask(head);
  head.looks = !anchor_;
  head.mirrored &= anchor_;  // the host is to remember it only if it becomes the anchor
  if (head.half_values) return;
  head.answer_wire = Wire::center;  // all of it: the worker may be anywhere
  head.difference = false;
}

std::byte* Client::residual(std::size_t block) const {
  if (!residual_) return nullptr;
  std::size_t before = 0;
  for (const auto& [begin, end] : center_->remote()) {
    if (begin <= block && block < end)
      return residual_.get() + (before + block - begin) * center_->layout().block_bytes();
    before += end - begin;
  }
  return nullptr;
}

// ---- what comes back

Range Client::take(const Message& head, const std::byte* payload, bool theta, bool with_anchor) {
  const Layout& layout = center_->layout();
  Range range = Range::normal;
  if (!head.half_values && !head.difference) {
    range = copy_block(head.block, payload, layout.block_bytes(), theta, with_anchor, past_cache_);
  } else {
    for (const Layout::Part* part = layout.begin(head.block); part != layout.end(head.block); ++part) {
      const DType dtype = buffers_[part->segment].dtype;
      const std::size_t bytes = part->count * item_size(dtype);
      const void* values = payload;
      if (head.difference) {
        kernels().decode(dtype, head.answer_wire, payload, true, anchor(*part), part->count);
        values = anchor(*part);
      } else if (with_anchor) {
        std::memcpy(anchor(*part), payload, bytes);
      }
      if (theta && active(*part, false)) std::memcpy(target(*part), values, bytes);
      range = std::max(range, kernels().scan(dtype, values, part->count));
      payload += wire_bytes(layout.dtype(*part), head.answer_wire, part->count);
    }
  }
  if (head.mirrored) whole_[head.block] = 0;
  const std::lock_guard<std::mutex> lock(counts_mutex_);
  stats_.wire_bytes += head.payload_bytes;
  return range;
}

void Client::PushTransfer::answer(const Message& head, const std::byte* payload) {
  if (head.failed || head.restored) {  // nothing was pushed: it is still in the arrays, or in the sums
    if (client_.residual_before_) {
      std::byte* residual = client_.residual(head.block);
      std::memcpy(residual, client_.residual_before_.get() + (residual - client_.residual_.get()),
                  client_.center_->layout().block_bytes());
    }
    const std::lock_guard<std::mutex> lock(client_.counts_mutex_);
    if (head.restored)
      client_.restored_ = true;
    else if (client_.failure_.empty())
      client_.failure_ = concat("at the host of block ", head.block, ", ",
                                std::string(reinterpret_cast<const char*>(payload), head.payload_bytes));
    client_.progress_[head.block] = Progress::untouched;
    return;
  }
  client_.drop_sums(head.block, true);
  const Range range = client_.take(head, payload, !client_.from_snapshot_, true);
  client_.received(head.block, head.version, true, head.refused, range);
}

void Client::PullTransfer::answer(const Message& head, const std::byte* payload) {
  if (head.restored) {
    client_.restored_ = true;
    return;
  }
  const Range range = client_.take(head, payload, theta_, anchor_);
  if (anchor_) client_.received(head.block, head.version, false, false, range);
}

void Client::PushTransfer::abandon(std::size_t block) {
  // The push will count at the center, unless a function fails there, but this worker will not learn what became of it:
  // what it sent becomes its anchor, and it asks for the whole block next time.
  Client& c = client_;
  const Layout& layout = c.center_->layout();
  c.drop_sums(block, true);
  for (const Layout::Part* part = layout.begin(block); part != layout.end(block); ++part)
    std::memcpy(c.anchor(*part), c.source(*part), part->count * item_size(c.buffers_[part->segment].dtype));
  c.whole_[block] = 1;
  const std::lock_guard<std::mutex> lock(c.counts_mutex_);
  c.anchor_range_ = c.next_range_ = Range::large;  // not looked at
}

void Client::PullTransfer::abandon(std::size_t block) {
  client_.whole_[block] = 1;  // the host may remember what this worker has not received
}

}  // namespace hvd_agn
