// Where every element of the registered tensors lies in the center's blocks, and where every block lies among the
// ranks. Pure arithmetic, the same on every rank.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/kernels.hpp"
#include "mpi/comm.hpp"

namespace hvd_agn {

/// Tensors (segments) one after another, cut into blocks.
class Layout {
 public:
  struct Segment {
    std::size_t count;  // elements
    DType dtype;        // the center's: f32 or f64
  };
  /// The part of one segment in one block.
  struct Part {
    std::uint32_t segment;
    std::uint32_t block_offset;  // bytes
    std::size_t first;           // element of the segment
    std::size_t count;           // elements
  };
  /// `block_bytes`: center data per block, a multiple of kAlignment; a smaller center gets one smaller block.
  Layout(std::vector<Segment> segments, std::size_t block_bytes);

  static constexpr std::size_t kAlignment = 64;

  const std::vector<Segment>& segments() const { return segments_; }
  std::size_t blocks() const { return first_part_.size() - 1; }
  std::size_t block_bytes() const { return block_bytes_; }
  const Part* begin(std::size_t block) const { return parts_.data() + first_part_[block]; }
  const Part* end(std::size_t block) const { return parts_.data() + first_part_[block + 1]; }
  DType dtype(const Part& part) const { return segments_[part.segment].dtype; }
  std::size_t bytes(const Part& part) const { return part.count * item_size(dtype(part)); }
  std::size_t parts(std::size_t block) const { return first_part_[block + 1] - first_part_[block]; }
  /// Bytes that have a bit for every part of any block.
  std::size_t mask_bytes() const { return mask_bytes_; }
  /// Bytes of a block's image up to the end of its last part.
  std::size_t used_bytes(std::size_t block) const {
    return begin(block) == end(block) ? 0 : end(block)[-1].block_offset + bytes(end(block)[-1]);
  }

 private:
  std::vector<Segment> segments_;
  std::size_t block_bytes_;
  std::vector<Part> parts_;
  std::vector<std::size_t> first_part_;  // of each block, and the end
  std::size_t mask_bytes_ = 0;
};

constexpr std::size_t round_up(std::size_t value, std::size_t to) {
  return (value + to - 1) / to * to;
}

/// Which rank hosts which blocks, and who reaches them through shared memory and who through a mailbox.
class Plan {
 public:
  /// `hosts`: rank of each shard's host, all different. `mailbox_only`: share memory with nobody.
  Plan(const Comm& comm, std::vector<int> hosts, bool mailbox_only);

  std::size_t shards() const { return hosts_.size(); }
  int host(std::size_t shard) const { return hosts_[shard]; }
  int ranks() const { return static_cast<int>(nodes_.size()); }
  /// The shard's blocks, of `blocks` in all: from begin to end.
  std::size_t begin(std::size_t shard, std::size_t blocks) const { return blocks * shard / shards(); }
  std::size_t end(std::size_t shard, std::size_t blocks) const { return blocks * (shard + 1) / shards(); }
  /// Whether the rank works on the shard's memory itself.
  bool direct(int rank, std::size_t shard) const {
    return rank == hosts_[shard] || (!mailbox_only_ && nodes_[rank] == nodes_[hosts_[shard]]);
  }
  bool same_node(int one, int other) const { return nodes_[one] == nodes_[other]; }
  /// Ranks that work on the shard's memory themselves, in order.
  std::vector<int> direct_ranks(std::size_t shard) const;
  /// Ranks that do not.
  std::vector<int> mailbox_ranks(std::size_t shard) const;
  /// Shards that the rank does not reach directly.
  std::vector<std::size_t> mailbox_shards(int rank) const;
  /// Whether anybody needs a mailbox.
  bool mailboxes() const;

 private:
  std::vector<int> hosts_;
  std::vector<int> nodes_;  // of each rank: the first rank on its node
  bool mailbox_only_;
};

}  // namespace hvd_agn
