#include "shard/layout.hpp"

#include <algorithm>

namespace hvd_agn {

Layout::Layout(std::vector<Segment> segments, std::size_t block_bytes) : segments_(std::move(segments)) {
  HVD_AGN_EXPECTS(block_bytes >= kAlignment && block_bytes % kAlignment == 0 && block_bytes < UINT32_MAX,
                  std::invalid_argument, "block size of ", block_bytes, " bytes: give a multiple of ", kAlignment);
  std::size_t total = 0;
  for (const Segment& s : segments_) total += round_up(s.count * item_size(s.dtype), kAlignment);
  block_bytes_ = std::min(block_bytes, std::max(total, kAlignment));

  std::size_t at = 0;  // bytes from the start of the center
  first_part_.push_back(0);
  for (std::size_t s = 0; s < segments_.size(); ++s) {
    const std::size_t size = item_size(segments_[s].dtype);
    for (std::size_t done = 0; done < segments_[s].count;) {
      while (at / block_bytes_ >= first_part_.size()) first_part_.push_back(parts_.size());
      const std::size_t offset = at % block_bytes_;
      const std::size_t count = std::min(segments_[s].count - done, (block_bytes_ - offset) / size);
      parts_.push_back({static_cast<std::uint32_t>(s), static_cast<std::uint32_t>(offset), done, count});
      done += count;
      at += count * size;
    }
    at = round_up(at, kAlignment);
  }
  first_part_.push_back(parts_.size());
  for (std::size_t b = 0; b < blocks(); ++b) mask_bytes_ = std::max(mask_bytes_, (parts(b) + 7) / 8);
}

Plan::Plan(const Comm& comm, std::vector<int> hosts, bool mailbox_only)
    : hosts_(std::move(hosts)), nodes_(comm.nodes()), mailbox_only_(mailbox_only) {
  HVD_AGN_EXPECTS(!hosts_.empty(), std::invalid_argument, "no rank hosts the center");
  for (const int host : hosts_)
    HVD_AGN_EXPECTS(host >= 0 && host < ranks() && std::count(hosts_.begin(), hosts_.end(), host) == 1,
                    std::invalid_argument, "rank ", host, " cannot host a shard, or two of them");
}

std::vector<int> Plan::direct_ranks(std::size_t shard) const {
  std::vector<int> found;
  for (int rank = 0; rank < ranks(); ++rank)
    if (direct(rank, shard)) found.push_back(rank);
  return found;
}

std::vector<int> Plan::mailbox_ranks(std::size_t shard) const {
  std::vector<int> found;
  for (int rank = 0; rank < ranks(); ++rank)
    if (!direct(rank, shard)) found.push_back(rank);
  return found;
}

std::vector<std::size_t> Plan::mailbox_shards(int rank) const {
  std::vector<std::size_t> found;
  for (std::size_t shard = 0; shard < shards(); ++shard)
    if (!direct(rank, shard)) found.push_back(shard);
  return found;
}

bool Plan::mailboxes() const {
  for (std::size_t shard = 0; shard < shards(); ++shard)
    if (!mailbox_ranks(shard).empty()) return true;
  return false;
}

}  // namespace hvd_agn
