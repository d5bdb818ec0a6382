// A shard: blocks of the center in memory that several processes of one node map. A block is read and replaced under
// its lock, and replaced by one atomic store, so that whoever dies while holding it leaves it whole.
//
// Memory, all of it the host's:
//   BlockHeader[blocks]            lock; which physical block holds the values; version; epoch
//   physical block[blocks + users] center values, then one array of the same size per slot of the rule
// Every user owns one spare physical block. An update writes the new values there and commits by storing the spare's
// number and the next version in the header; the block that held the old values, still in cache, is the next spare.
//
// An epoch begins when the center is set to a checkpoint, block by block. Whoever works in another epoch than a block
// must not push to it: his delta belongs to a past that is no more, or the block does.
#pragma once

#include <pthread.h>
#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "mpi/comm.hpp"
#include "shard/layout.hpp"

namespace hvd_agn {

/// A place in the pass where tests stop or end the process (see signal_at).
enum class Stage : int { none, half_written, written, committed };

/// One user's view of a shard, with a spare of its own. Block numbers are the center's.
class Shard {
 public:
  /// One block under its lock. Holds the lock, and the user's spare, until it is destroyed.
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
    /// Times that the block was set to a checkpoint.
    std::uint32_t epoch() const;
    /// A new epoch begins, the block stays as it is.
    void begin_epoch(std::uint32_t epoch);
    /// commit(), and a new epoch begins.
    void restore(std::uint64_t version, std::uint32_t epoch);

   private:
    friend class Shard;
    Block(Shard* shard, std::size_t index);
    std::unique_lock<std::mutex> spare_lock_;  // empty in a block that was moved from
    Shard* shard_;
    std::size_t index_;
  };

  /// Bytes of memory of a shard of so many blocks.
  static std::size_t memory_bytes(const Layout& layout, std::size_t blocks, int slots, int users);

  /// A view for user number `user` of the shard at `base`, with the center's blocks from `begin` to `end`. Touches
  /// nothing. `base` is aligned to a page and outlives the view.
  Shard(void* base, const Layout& layout, std::size_t begin, std::size_t end, int slots, int user, const Comm& comm);
  Shard(const Shard&) = delete;
  Shard& operator=(const Shard&) = delete;
  ~Shard() = default;

  /// The host, once, before anybody uses the shard: all values and versions are 0.
  void format(int users);

  std::size_t begin() const { return begin_; }
  std::size_t end() const { return end_; }
  std::size_t slot_stride() const { return slot_stride_; }
  /// Bytes of a physical block: values and slots.
  std::size_t stride() const { return stride_; }

  /// Waits for the lock, asleep, as the stall limits allow. UsageError in a forked child.
  Block lock(std::size_t block);
  /// For who works in this epoch: waits also, asleep, until the block has come to it. In a later one RestoredError, or,
  /// for who only looks, the block.
  Block lock(std::size_t block, std::uint32_t epoch, bool looks = false);
  /// Empty if another holds the lock.
  std::optional<Block> try_lock(std::size_t block);
  /// Rank that holds the block's lock, or held it last; for messages.
  int holder(std::size_t block) const;

  std::uint32_t epoch(std::size_t block) const;
  /// What who works in a later epoch than a block waits for.
  std::string awaits_restore() const;

  /// Pushes that every block has had; UINT64_MAX if there is no block.
  std::uint64_t version() const;
  /// A number that changes with every push.
  std::uint64_t activity() const;
  /// Blocks whose lock was recovered from a process that died, by any user.
  std::uint64_t recoveries() const;

  /// This user has no more use for the shard. When it was the last, the pages go back to the system, if they can.
  void detach();

 private:
  struct BlockHeader;
  struct Header;
  BlockHeader& header(std::size_t block) const;
  void lock_failed(std::size_t block, int code) const;
  /// What an attempt to lock has given; takes the lock over from an owner that died.
  Block locked(std::size_t block, int code);
  std::byte* physical(std::uint64_t index) const;

  std::size_t begin_, end_;
  std::size_t slot_stride_;
  std::size_t stride_;
  int rank_;
  int root_;  // that sets the center to checkpoints
  StallLimits limits_;
  pid_t process_;  // that owns the spare
  Header* header_;
  BlockHeader* headers_;
  std::byte* physical_;
  std::uint64_t spare_;
  std::mutex spare_mutex_;  // several clients of one process share its spare
  bool attached_ = true;
};

/// RestoredError: the center is in a later epoch than what worked in an earlier one.
[[noreturn]] void restored(int rank);

/// Asks for large pages, before the first write: fewer misses of the address cache in a pass. It is only a wish.
void use_huge_pages(void* data, std::size_t bytes);

/// For tests of crashes and stalls: raise a signal, once, when this process reaches this stage of a pass over this
/// block.
void signal_at(Stage stage, std::size_t block, int signal);
/// Called by the pass.
void reach(Stage stage, std::size_t block);

}  // namespace hvd_agn
