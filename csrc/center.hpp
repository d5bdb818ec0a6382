// The center: shared parameters in memory that every rank of the host's node maps, cut into blocks. A block is read and
// replaced under its lock, and replaced by one atomic store, so that whoever dies while holding it leaves it whole.
//
// Memory, all of it the host's:
//   BlockHeader[blocks]            lock; which physical block holds the values; version
//   physical block[blocks + ranks] center values, then one array of the same size per slot of the rule
// Every rank owns one spare physical block. An update writes the new values there and commits by storing the spare's
// number and the next version in the header; the block that held the old values, still in cache, is the next spare.
#pragma once

#include <pthread.h>
#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <vector>

#include "comm.hpp"
#include "kernels.hpp"

namespace hvd_agn {

/// Where the elements of the registered tensors lie in the blocks. The same on every rank.
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

 private:
  std::vector<Segment> segments_;
  std::size_t block_bytes_;
  std::vector<Part> parts_;
  std::vector<std::size_t> first_part_;  // of each block, and the end
};

/// A place in the pass where tests stop or end the process (see signal_at).
enum class Stage : int { none, half_written, written, committed };

class Center {
 public:
  /// One block under its lock. Holds the lock, and this process's spare, until it is destroyed.
  class Block {
   public:
    Block(Block&&) = default;
    Block& operator=(Block&&) = delete;
    ~Block();
    const std::byte* data() const;
    std::byte* spare() const;
    std::uint64_t version() const;
    /// The spare's content becomes the block's, as this version. At most once; nothing else of the block may be read
    /// after it.
    void commit(std::uint64_t version);

   private:
    friend class Center;
    Block(Center* center, std::size_t index);
    std::unique_lock<std::mutex> spare_lock_;  // empty in a block that was moved from
    Center* center_;
    std::size_t index_;
  };

  /// Bytes of shared memory that a center takes.
  static std::size_t memory_bytes(const Layout& layout, int slots, int ranks);

  /// Collective over the node. All ranks of comm are on one node. The values are zero until write().
  Center(Comm& comm, Layout layout, Rule rule);
  Center(const Center&) = delete;
  Center& operator=(const Center&) = delete;
  ~Center();

  const Layout& layout() const { return layout_; }
  const Rule& rule() const { return rule_; }
  int rank() const { return rank_; }
  int ranks() const { return ranks_; }
  std::size_t slot_stride() const { return layout_.block_bytes(); }

  /// Waits for the lock, asleep, as the stall limits allow. UsageError in a forked child.
  Block lock(std::size_t block);
  /// Empty if another holds the lock.
  std::optional<Block> try_lock(std::size_t block);

  /// Copies the center (plane 0) and the rule's slots (planes 1...) to, or from, one array per segment in the center's
  /// dtype. Each block is consistent in itself: all planes from the same version. read returns the largest version,
  /// write stores `version` in every block.
  std::uint64_t read(const std::vector<std::vector<void*>>& planes);
  void write(const std::vector<std::vector<void*>>& planes, std::uint64_t version);

  /// Pushes that every block has had.
  std::uint64_t version() const;
  /// Blocks whose lock was recovered from a process that died, by any rank.
  std::uint64_t recoveries() const;

  /// This process has no more use for the center. Local; when it was the last, the pages go back to the system.
  void detach();
  /// Collective, after detach(). Waits, asleep, until all ranks have come, however long they go on pushing; then
  /// releases the window.
  void free(Comm& comm);

 private:
  struct BlockHeader;
  struct Header;
  void check_process() const;
  void lock_failed(std::size_t block, int code) const;
  void recover(std::size_t block);
  std::byte* physical(std::uint64_t index) const;

  Layout layout_;
  Rule rule_;
  int rank_, ranks_;
  StallLimits limits_;
  pid_t process_;  // that owns the spare
  MPI_Win window_ = MPI_WIN_NULL;
  void* base_ = nullptr;
  std::size_t bytes_ = 0;
  std::size_t stride_ = 0;  // bytes of a physical block
  Header* header_ = nullptr;
  BlockHeader* headers_ = nullptr;
  std::byte* physical_ = nullptr;
  std::uint64_t spare_ = 0;
  std::mutex spare_mutex_;  // several clients of one process share its spare
  bool attached_ = false;
};

/// Asks for large pages, before the first write: fewer misses of the address cache in a pass. It is only a wish.
void use_huge_pages(void* data, std::size_t bytes);

/// For tests of crashes and stalls: raise a signal when this process reaches this stage of a pass over this block.
void signal_at(Stage stage, std::size_t block, int signal);
/// Called by the pass.
void reach(Stage stage, std::size_t block);

}  // namespace hvd_agn
