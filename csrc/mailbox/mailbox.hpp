// Requests to hosts that share no memory with this rank, and their answers: both by MPI_Put, into rings of slots in one
// window over all ranks. One thread per process makes all MPI calls of the mailbox.
//
// A pair (worker, host) has a ring at either end, of the same number of slots:
//   at the host   [requests sent: 8 bytes, padded] [slot] ...           written by the worker
//   at the worker [answers sent: 8 bytes, padded]  [slot] ... [slot] ...  written by the host; staging for requests
// Request n lies in slot n modulo the ring. The host turns it into its answer in place and puts that into the same slot
// at the worker. The worker sends request n + ring only after it has read answer n, so both slots are free by then: the
// two counters are all the flow control there is. A counter is put after a flush of what it counts.
#pragma once

#include <mpi.h>

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "mpi/comm.hpp"
#include "shard/layout.hpp"

namespace hvd_agn {

/// Of what messages hold. All ranks need the same: another if a line below changes, or what payloads are made of.
constexpr int kMessageFormat = 2;

/// Head of a request and of its answer.
struct Message {
  enum class Kind : std::uint8_t {
    push,     // payload: delta, mask if there is one, learning rates of the groups if a rule follows; answer: the block
    pull,     // no payload; answer: the block
    read,     // no payload; answer: the block and its slots
    write,    // payload: the block and its slots; answer: none
    epoch,    // no payload; answer: none; `epoch` begins at the block, which stays as it is
    version,  // no payload; answer: none, but the shard's version in `version`
  };
  std::uint64_t block = 0;
  std::uint64_t version = 0;        // answer: the block's; push: as the worker last saw it; write: what to store
  std::uint64_t payload_bytes = 0;  // behind this head
  double power = 0;                 // push: as in Push
  std::uint32_t client = 0;         // of the worker's process
  std::uint32_t epoch = 0;          // that the worker works in; write: to begin
  Kind kind = Kind::pull;
  Wire wire = Wire::center;         // of the payload
  Wire answer_wire = Wire::center;  // of the answer; with `difference`, of the block less what the client has of it
  bool half_values = false;         // answer: the block itself in the half type `answer_wire`
  bool difference = false;
  bool mirrored = false;           // the host is to remember what this client has of the block
  bool refused = false;            // answer: the rule overflowed, the block stayed as it was
  bool failed = false;             // answer: the rule's function failed, the block stayed; payload: why
  bool masked = false;             // push: a bit for each part comes next; only parts whose bit is set are pushed
  bool looks = false;              // pull, read: a later epoch will do
  bool restored = false;           // answer: the block is in a later epoch, nothing was done
  std::uint8_t reserved[13] = {};  // a window's base is aligned to 8 bytes only
};
static_assert(sizeof(Message) == 64);

/// What a worker wants of the blocks of the remote shards. Called by the mailbox's thread, never after cancel().
class Transfer {
 public:
  virtual ~Transfer() = default;
  /// Whether there is anything to ask about this block.
  virtual bool wants(std::size_t /*block*/) const { return true; }
  /// Fills the head, which names the block, and the payload of its request.
  virtual void request(Message& head, std::byte* payload) = 0;
  virtual void answer(const Message& head, const std::byte* payload) = 0;
  /// The request was sent and its answer will be thrown away: the transfer was cancelled.
  virtual void abandon(std::size_t /*block*/) {}
  /// One request per shard, not per block.
  virtual bool once_per_shard() const { return false; }
};

/// Turns requests into answers, at a host. Called by the mailbox's thread.
class Responder {
 public:
  virtual ~Responder() = default;
  /// In place. False: the block is locked by another; ask again.
  virtual bool respond(int worker, Message& head, std::byte* payload) = 0;
  /// Why not, for messages.
  virtual std::string blocked(const Message& head) const = 0;
};

class Mailbox {
 public:
  /// Collective. `blocks`: of the center. `payload_bytes`: of the largest message. `responder`: if this rank hosts a
  /// shard. MpiError if the MPI has no one-sided communication between these ranks.
  Mailbox(const Comm& comm, const Plan& plan, std::size_t blocks, std::size_t payload_bytes, std::size_t ring,
          std::unique_ptr<Responder> responder);
  Mailbox(const Mailbox&) = delete;
  Mailbox& operator=(const Mailbox&) = delete;
  /// Stops the thread. Frees nothing else: see free().
  ~Mailbox();

  /// Starts a transfer, when the one before it has ended. UsageError in a forked child, which has no such thread.
  void begin(Transfer& transfer);
  /// Waits for the transfer to end, as the stall limits allow; throws what went wrong.
  void wait(Transfer& transfer);
  /// The transfer is not touched any more.
  void cancel(Transfer& transfer);
  /// begin() and wait(), and cancel() should that fail.
  void run(Transfer& transfer);

  /// Bytes of this rank's rings.
  std::size_t bytes() const { return bytes_; }

  /// Waits, as the stall limits allow, until the thread is not in an MPI call that may not return: a flush to a rank
  /// that is stopped can hold a lock of the MPI library, and then the caller's own MPI calls would hang without a word.
  void await_thread();

  /// Collective: all ranks have come, no request is under way. Stops the thread and frees the window.
  void free();

 private:
  struct Peer;  // a host that this rank asks, or a worker that it answers
  void loop();
  bool serve();
  bool serve_one(Peer& worker);
  bool advance();
  bool take_answers(Peer& host);
  bool send_requests(Peer& host);
  void finish_transfer();
  void put(const void* from, std::size_t bytes, Peer& to, std::size_t offset, std::uint64_t block);
  void publish(std::vector<Peer>& peers);
  void poll_mpi();
  void stop();
  void fail(std::exception_ptr why);
  std::string what_it_does() const;
  Message* slot(const Peer& peer, std::uint64_t number) const;
  Message* staging(const Peer& host, std::uint64_t number) const;

  int world_rank(int rank) const { return rank < 0 ? rank : world_ranks_[rank]; }  // of a peer, for messages

  int rank_;  // of this process in MPI_COMM_WORLD, for messages
  std::vector<int> world_ranks_;
  pid_t process_;  // that the thread runs in
  StallLimits limits_;
  MPI_Comm comm_;
  std::size_t slot_bytes_, ring_;
  std::unique_ptr<Responder> responder_;
  std::vector<Peer> hosts_, workers_;
  MPI_Win window_ = MPI_WIN_NULL;
  std::byte* base_ = nullptr;
  std::size_t bytes_ = 0;

  mutable std::mutex mutex_;  // of all below; held while a transfer is called, never during an MPI call
  std::condition_variable changed_;
  Transfer* transfer_ = nullptr;
  std::uint64_t answered_ = 0;  // of all transfers: progress
  std::exception_ptr failure_;
  bool stopping_ = false;
  bool stopped_ = false;

  // What the thread is at, for messages; it may hang there.
  enum class Phase : int { idle, put, flush, flush_all, answer, wait };
  class InMpi;
  void at(Phase phase, int peer, std::uint64_t block);
  std::atomic<Phase> phase_{Phase::idle};
  std::atomic<int> peer_{-1};
  std::atomic<std::uint64_t> block_{0};
  std::atomic<std::uint64_t> mpi_calls_{0};  // begun and ended: odd in a call
  std::thread thread_;
};

}  // namespace hvd_agn
