#include "mailbox/service.hpp"

#include <algorithm>
#include <cstring>
#include <new>

#include "kernels/staged.hpp"

namespace hvd_agn {

std::size_t encoded_bytes(const Layout& layout, std::size_t block, Wire wire) {
  if (wire == Wire::center) return layout.used_bytes(block);
  std::size_t bytes = 0;
  for (const Layout::Part* part = layout.begin(block); part != layout.end(block); ++part)
    bytes += wire_bytes(layout.dtype(*part), wire, part->count);
  return bytes;
}

void keep_part(const Layout& layout, const Layout::Part& part, int slots, std::size_t slot_stride, const std::byte* in,
               std::byte* out) {
  for (int plane = 0; plane <= slots; ++plane) {
    const std::size_t at = plane * slot_stride + part.block_offset;
    std::memcpy(out + at, in + at, layout.bytes(part));
  }
}

void encode_block(const Layout& layout, std::size_t block, Wire wire, std::byte* values, std::byte* out) {
  for (const Layout::Part* part = layout.begin(block); part != layout.end(block); ++part) {
    kernels().encode(layout.dtype(*part), wire, values + part->block_offset, out, part->count);
    out += wire_bytes(layout.dtype(*part), wire, part->count);
  }
}

void decode_block(const Layout& layout, std::size_t block, Wire wire, const std::byte* in, bool add,
                  std::byte* values) {
  for (const Layout::Part* part = layout.begin(block); part != layout.end(block); ++part) {
    kernels().decode(layout.dtype(*part), wire, in, add, values + part->block_offset, part->count);
    in += wire_bytes(layout.dtype(*part), wire, part->count);
  }
}

namespace {

/// Of a client whose parameters in this block are all of one half type; so is its mirror then.
DType half_type(const Message& head) {
  return head.answer_wire == Wire::fp16 ? DType::f16 : DType::bf16;
}

}  // namespace

Service::Service(std::unique_ptr<Shard> shard, const Layout& layout, const Groups& groups)
    : shard_(std::move(shard)),
      layout_(layout),
      groups_(groups),
      rates_(groups.rates()),
      values_(layout.block_bytes()) {}

bool Service::respond(int worker, Message& head, std::byte* payload) {
  using Kind = Message::Kind;
  if (head.kind == Kind::version) {
    head.version = shard_->version();
    return true;
  }
  // Values of the center's own type are worked on in the message itself.
  const bool in_place = head.wire == Wire::center && head.answer_wire == Wire::center && !head.mirrored;
  std::byte* values = in_place ? payload : values_.data();
  try {
    auto block = shard_->try_lock(head.block);
    if (!block) return false;
    const bool begins = head.kind == Kind::write || head.kind == Kind::epoch;
    if (!begins && block->epoch() < head.epoch) return false;
    if (!begins && block->epoch() > head.epoch && !head.looks) {
      head.restored = true;
      head.payload_bytes = 0;
      return true;
    }
    switch (head.kind) {
      case Kind::push:
        if (const std::size_t bytes = rates_.size() * sizeof(double); bytes > 0)
          std::memcpy(rates_.data(), payload + head.payload_bytes - bytes, bytes);
        if (head.wire != Wire::center)
          decode_block(layout_, head.block, head.wire, payload, false, values);
        else if (!in_place)
          std::memcpy(values, payload, layout_.used_bytes(head.block));
        push(worker, *block, head, values,
             head.masked ? payload + encoded_bytes(layout_, head.block, head.wire) : nullptr);
        break;
      case Kind::pull:
        std::memcpy(values, block->data(), layout_.used_bytes(head.block));
        head.version = block->version();
        break;
      case Kind::read:
        std::memcpy(payload, block->data(), shard_->stride());
        head.version = block->version();
        head.payload_bytes = shard_->stride();
        return true;
      case Kind::write:
        std::memcpy(block->spare(), payload, shard_->stride());
        block->restore(head.version, head.epoch);
        head.payload_bytes = 0;
        return true;
      case Kind::epoch:
        block->begin_epoch(head.epoch);
        return true;
      case Kind::version:
        break;
    }
  } catch (const std::exception& error) {  // the rule's function, or no memory: the worker is to hear of it
    const std::string text = error.what();
    head.failed = true;
    head.payload_bytes = std::min(text.size(), layout_.block_bytes());
    while (head.payload_bytes < text.size() && (text[head.payload_bytes] & 0xc0) == 0x80)
      --head.payload_bytes;  // UTF-8
    std::memcpy(payload, text.data(), head.payload_bytes);
    return true;
  }
  encode(worker, head, values, payload);
  return true;
}

std::string Service::blocked(const Message& head) const {
  if (shard_->epoch(head.block) < head.epoch) return concat("it ", shard_->awaits_restore());
  return concat("block ", head.block, " is locked by rank ", shard_->holder(head.block),
                ", which is stopped or starved");
}

void Service::push(int worker, Shard::Block& block, Message& head, std::byte* values, const std::byte* mask) {
  const std::uint64_t version = block.version();
  const Rule& common = groups_.common();
  const double weight = common.weight(version > head.version ? version - head.version : 0);
  const Push push = {1, weight, version, 0, head.power};
  std::byte* had = nullptr;
  if (common.gap_aware) {
    had = mirror(worker, head);
    HVD_AGN_EXPECTS(had, std::runtime_error, "no memory for a copy of the shard, which gap_aware needs of each worker");
  }
  Range range = Range::normal;
  for (const Layout::Part* part = layout_.begin(head.block); part != layout_.end(head.block); ++part) {
    if (part != layout_.begin(head.block)) reach(Stage::half_written, head.block);
    const std::size_t at = part->block_offset;
    if (mask && !in_mask(mask, part - layout_.begin(head.block))) {
      keep_part(layout_, *part, common.slots(), shard_->slot_stride(), block.data(), block.spare());
      std::memcpy(values + at, block.data() + at, layout_.bytes(*part));
      continue;
    }
    Piece piece = {values + at, nullptr, block.data() + at, block.spare() + at, shard_->slot_stride(), part->count};
    const DType dtype = layout_.dtype(*part);
    const Rule& rule = groups_.rule(*part);
    const Push own = groups_.push(push, *part, rates_);
    if (!rule.staged()) {
      range = std::max(range, kernels().apply(dtype, rule, own, piece));
      continue;
    }
    if (had) piece.anchor = had + at;
    range = std::max(range, apply_staged(dtype, rule, own, piece, head.half_values ? half_type(head) : dtype));
  }
  head.refused = range == Range::nonfinite;
  if (head.refused) {
    std::memcpy(values, block.data(), layout_.used_bytes(head.block));
    head.version = version;
  } else {
    block.commit(version + 1);
    head.version = version + 1;
  }
}

void Service::encode(int worker, Message& head, std::byte* values, std::byte* payload) {
  if (head.half_values) {
    std::byte* had = head.mirrored ? mirror(worker, head) : nullptr;
    head.payload_bytes = 0;
    for (const Layout::Part* part = layout_.begin(head.block); part != layout_.end(head.block); ++part) {
      std::byte* half = payload + head.payload_bytes;
      kernels().pull(half_type(head), {half, nullptr, values + part->block_offset, nullptr, 0, part->count}, false);
      if (had) std::memcpy(had + part->block_offset, half, part->count * item_size(half_type(head)));
      head.payload_bytes += wire_bytes(layout_.dtype(*part), head.answer_wire, part->count);
    }
    return;
  }
  head.payload_bytes = encoded_bytes(layout_, head.block, head.answer_wire);
  if (!head.difference) {
    if (values != payload) std::memcpy(payload, values, head.payload_bytes);
    if (!head.mirrored) return;
    std::byte* had = mirror(worker, head);
    head.mirrored = had != nullptr;
    if (had) std::memcpy(had, values, head.payload_bytes);
    return;
  }
  // The client adds what it is sent to what it has, and so does the mirror; what was rounded away comes with a later
  // answer.
  std::byte* had = mirror(worker, head);
  for (const Layout::Part* part = layout_.begin(head.block); part != layout_.end(head.block); ++part) {
    std::byte* at = values + part->block_offset;
    kernels().subtract(layout_.dtype(*part), at, had + part->block_offset, at, part->count);
  }
  encode_block(layout_, head.block, head.answer_wire, values, payload);
  decode_block(layout_, head.block, head.answer_wire, payload, true, had);
}

std::byte* Service::mirror(int worker, const Message& head) {
  const std::size_t block_bytes = layout_.block_bytes();
  Mirror& found = mirrors_[{worker, head.client}];
  if (!found) found.reset(new (std::nothrow) std::byte[(shard_->end() - shard_->begin()) * block_bytes]());
  return !found ? nullptr : found.get() + (head.block - shard_->begin()) * block_bytes;
}

}  // namespace hvd_agn
