// The center as one rank has it: the shards that it shares memory with, and the mailbox to the others.
#pragma once

#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "mailbox/mailbox.hpp"
#include "mpi/comm.hpp"
#include "shard/groups.hpp"
#include "shard/layout.hpp"
#include "shard/shard.hpp"

namespace hvd_agn {

class Center {
 public:
  /// Bytes of memory that the hosts on this rank's node take together; 0 if `shared` and no other process maps them.
  static std::size_t memory_bytes(const Comm& comm, const Plan& plan, const Layout& layout, int slots, bool shared);

  /// Collective: memory for the shards. The values are zero until write().
  Center(Comm& comm, Plan plan, Layout layout, Groups groups);
  Center(const Center&) = delete;
  Center& operator=(const Center&) = delete;
  ~Center();

  /// Collective, once, when all ranks have constructed their center, before anything else: the way to shards on other
  /// nodes. `ring`: blocks under way between a worker and a host that share no memory.
  void connect(Comm& comm, std::size_t ring);
  /// Local, instead of free(), when the center cannot be used after all.
  void disconnect() { mailbox_.reset(); }

  const Layout& layout() const { return layout_; }
  const Groups& groups() const { return groups_; }
  /// For what is the same in all groups.
  const Rule& rule() const { return groups_.common(); }
  /// In MPI_COMM_WORLD, for messages.
  int rank() const { return rank_; }
  /// Shards that this rank works on itself.
  const std::vector<std::unique_ptr<Shard>>& shards() const { return shards_; }
  /// This rank's place among those that share its node, and how many they are.
  int node_rank() const { return node_rank_; }
  int node_size() const { return node_size_; }
  /// The way to the other shards; null if there are none.
  Mailbox* mailbox() const { return remote_.empty() ? nullptr : mailbox_.get(); }
  /// First block and end of each shard that is reached by mailbox.
  const std::vector<std::pair<std::size_t, std::size_t>>& remote() const { return remote_; }
  /// Whether this is a child that was forked from the process which made the center.
  bool forked() const { return getpid() != process_; }
  /// UsageError in such a child.
  void check_process() const { hvd_agn::check_process(process_, rank_); }
  /// The least number that no client of this process has, for its messages: a host remembers things by it.
  std::uint32_t enter_client();
  void leave_client(std::uint32_t id);
  /// Waits until the mailbox's thread is not stuck in MPI, as the stall limits allow. See Mailbox::await_thread().
  void await_thread() {
    if (mailbox_) mailbox_->await_thread();
  }
  /// Bytes of this rank's mailbox.
  std::size_t mailbox_bytes() const { return mailbox_ ? mailbox_->bytes() : 0; }

  /// Copies the center (plane 0) and the rule's slots (planes 1...) to, or from, one array per segment in the center's
  /// dtype. Each block is consistent in itself: all planes from the same version. read returns the largest version,
  /// write stores `version` in every block; slots begin as the rule has it if there are no planes for them. It begins
  /// an epoch at every block; read waits until every block has come to this one.
  std::uint64_t read(const std::vector<std::vector<void*>>& planes, std::uint32_t epoch);
  void write(const std::vector<std::vector<void*>>& planes, std::uint64_t version, std::uint32_t epoch);
  /// An epoch begins at every block, which stays as it is.
  void begin_epoch(std::uint32_t epoch);

  /// Pushes that every block has had. Asks the other hosts.
  std::uint64_t version();
  /// Blocks of the node's shards whose lock was recovered from a process that died, by any rank.
  std::uint64_t recoveries() const;

  /// This process has no more use for the center. Local; a host goes on serving others. When it was the last, the pages
  /// go back to the system.
  void detach();
  /// Collective, after detach(). Waits, asleep, until all ranks have come, however long they go on pushing; then
  /// releases the windows.
  void free(Comm& comm);

 private:
  void allocate(const Comm& comm);
  void* memory_of(std::size_t shard) const;

  Plan plan_;
  Layout layout_;
  Groups groups_;
  pid_t process_ = getpid();
  int rank_, node_rank_, node_size_;
  MPI_Win window_ = MPI_WIN_NULL;  // of the node's shards
  void* private_ = nullptr;        // or this process's own
  std::size_t private_bytes_ = 0;
  std::vector<std::unique_ptr<Shard>> shards_;
  std::vector<std::pair<std::size_t, std::size_t>> remote_;
  std::unique_ptr<Responder> service_;  // until connect()
  std::unique_ptr<Mailbox> mailbox_;
  std::mutex clients_mutex_;
  std::vector<bool> clients_;  // by number: taken
};

}  // namespace hvd_agn
