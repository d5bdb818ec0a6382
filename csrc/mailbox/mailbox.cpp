#include "mailbox/mailbox.hpp"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace hvd_agn {

namespace {

constexpr std::size_t kCounterBytes = 64;
// Fits into one message of Open MPI's TCP, which has 128 KiB with a head. Puts of a whole block of 256 KiB took 1.3
// times as long there, and 1.15 times with MPICH's UCX.
constexpr std::size_t kPutLimit = std::size_t{127} << 10;
constexpr auto kSpin = std::chrono::microseconds(500);  // after the last message: poll, and yield to whoever works
constexpr auto kAlert = std::chrono::milliseconds(20);  // after the last message, or while an answer is awaited: nap
constexpr auto kNap = std::chrono::microseconds(50);
constexpr auto kRest = std::chrono::microseconds(1000);  // after that
constexpr auto kLook = std::chrono::milliseconds(100);   // between looks for progress, of whoever waits
constexpr auto kStopLimit = std::chrono::seconds(10);

std::byte* payload_of(Message* message) {
  return reinterpret_cast<std::byte*>(message + 1);
}

std::uint64_t read_counter(const std::byte* at) {
  return __atomic_load_n(reinterpret_cast<const std::uint64_t*>(at), __ATOMIC_ACQUIRE);
}

}  // namespace

/// The thread is in a call of MPI.
class Mailbox::InMpi {
 public:
  explicit InMpi(Mailbox& mailbox) : calls_(mailbox.mpi_calls_) { calls_.fetch_add(1); }
  ~InMpi() { calls_.fetch_add(1); }

 private:
  std::atomic<std::uint64_t>& calls_;
};

struct Mailbox::Peer {
  int rank;
  std::size_t here;             // offset of this rank's end of the pair in its window: counter, slots
  std::size_t there;            // of the peer's end in the peer's window
  std::uint64_t sent = 0;       // requests, or answers
  std::uint64_t published = 0;  // of these, what the peer's counter says
  std::uint64_t counter = 0;    // what is put there; the flush before the next has completed the put
  std::uint64_t last_put = 0;   // block, for messages

  // A host: its shard, and the transfer's requests to it.
  std::size_t begin = 0, blocks = 0, start = 0;
  std::uint64_t answered = 0;
  std::size_t next = 0, last = 0;  // of this transfer: sent, to be sent
  std::size_t block(std::size_t number) const { return begin + (start + number) % blocks; }
  std::vector<std::size_t> pending;  // block asked for in each slot
  std::vector<bool> abandoned;

  // A worker.
  int index = 0;                      // among this host's
  std::optional<StallWatch> blocked;  // since when its next block is locked by another
};

Mailbox::Mailbox(const Comm& comm, const Plan& plan, std::size_t blocks, std::size_t payload_bytes, std::size_t ring,
                 std::unique_ptr<Responder> responder)
    : rank_(comm.world_rank()),
      world_ranks_(comm.world_ranks()),
      process_(getpid()),
      limits_(comm.limits()),
      comm_(comm.handle()),
      slot_bytes_(sizeof(Message) + round_up(payload_bytes, Layout::kAlignment)),
      ring_(ring),
      responder_(std::move(responder)) {
  const std::size_t host_end = kCounterBytes + ring_ * slot_bytes_;
  const std::size_t worker_end = kCounterBytes + 2 * ring_ * slot_bytes_;
  const auto workers_of = [&](int rank) {  // of the shard that the rank hosts, if any
    for (std::size_t shard = 0; shard < plan.shards(); ++shard)
      if (plan.host(shard) == rank) return plan.mailbox_ranks(shard);
    return std::vector<int>{};
  };
  const auto index = [](const auto& list, auto value) {
    return static_cast<std::size_t>(std::find(list.begin(), list.end(), value) - list.begin());
  };
  // The answers of a shard to a rank come behind the requests to the rank's own shard.
  const auto offset_at_worker = [&](int worker, std::size_t shard) {
    return workers_of(worker).size() * host_end + index(plan.mailbox_shards(worker), shard) * worker_end;
  };
  const auto offset_at_host = [&](std::size_t shard, int worker) {
    return index(plan.mailbox_ranks(shard), worker) * host_end;
  };

  const int rank = comm.rank();
  for (const std::size_t shard : plan.mailbox_shards(rank)) {
    Peer host{};
    host.rank = plan.host(shard);
    host.here = offset_at_worker(rank, shard);
    host.there = offset_at_host(shard, rank);
    host.begin = plan.begin(shard, blocks);
    host.blocks = plan.end(shard, blocks) - host.begin;
    // Workers start apart, so that they do not queue behind each other.
    host.start = host.blocks * static_cast<std::size_t>(rank) / static_cast<std::size_t>(comm.size());
    host.pending.resize(ring_);
    host.abandoned.resize(ring_);
    hosts_.push_back(std::move(host));
  }
  const std::vector<int> workers = workers_of(rank);
  for (std::size_t w = 0; w < workers.size(); ++w) {
    Peer worker{};
    worker.rank = workers[w];
    worker.index = static_cast<int>(w);
    for (std::size_t shard = 0; shard < plan.shards(); ++shard) {
      if (plan.host(shard) != rank) continue;
      worker.here = offset_at_host(shard, worker.rank);
      worker.there = offset_at_worker(worker.rank, shard);
    }
    workers_.push_back(std::move(worker));
  }
  bytes_ = workers_.size() * host_end + hosts_.size() * worker_end;

  const int code = MPI_Win_allocate(static_cast<MPI_Aint>(bytes_), 1, MPI_INFO_NULL, comm_, &base_, &window_);
  if (code != MPI_SUCCESS) {
    char text[MPI_MAX_ERROR_STRING] = {};
    int length = 0;
    MPI_Error_string(code, text, &length);
    throw MpiError(concat("[rank ", rank_, "] MPI_Win_allocate failed: ", std::string(text, length),
                          ". This MPI has no one-sided communication between these ranks that works with threads; Open "
                          "MPI 4 has none over TCP. Use Open MPI 5, MPICH 4 or newer, or an Open MPI with UCX."));
  }
  check(MPI_Win_set_errhandler(window_, MPI_ERRORS_RETURN), rank_, "MPI_Win_set_errhandler");
  check(MPI_Win_lock_all(MPI_MODE_NOCHECK, window_), rank_, "MPI_Win_lock_all");
  if (bytes_ > 0) std::memset(base_, 0, bytes_);
  check(MPI_Win_sync(window_), rank_, "MPI_Win_sync");
  if (hosts_.empty() && workers_.empty()) return;
  thread_ = std::thread([this] { loop(); });
}

Mailbox::~Mailbox() {
  stop();
}

void Mailbox::await_thread() {
  check_process(process_, rank_);
  StallWatch watch(limits_, rank_);
  for (std::uint64_t seen = mpi_calls_; seen % 2 == 1 && mpi_calls_ == seen;) {
    std::this_thread::sleep_for(kNap);
    watch.poll([this] { return what_it_does(); });
  }
}

void Mailbox::free() {
  stop();
  if (window_ == MPI_WIN_NULL) return;
  check(MPI_Win_unlock_all(window_), rank_, "MPI_Win_unlock_all");
  check(MPI_Win_free(&window_), rank_, "MPI_Win_free");
}

void Mailbox::stop() {
  if (!thread_.joinable()) return;
  std::unique_lock<std::mutex> lock(mutex_);
  stopping_ = true;
  changed_.notify_all();
  if (!changed_.wait_for(lock, kStopLimit, [this] { return stopped_; })) {
    // It hangs in MPI, and uses what would be destroyed now.
    std::fprintf(stderr, "[rank %d] hvd_agn: %s; this process ends without MPI_Finalize\n", rank_,
                 what_it_does().c_str());
    std::fflush(stderr);
    std::_Exit(1);
  }
  lock.unlock();
  thread_.join();
}

// ---- transfers: the calling thread

void Mailbox::begin(Transfer& transfer) {
  check_process(process_, rank_);
  StallWatch watch(limits_, rank_);
  std::unique_lock<std::mutex> lock(mutex_);
  for (std::uint64_t seen = answered_; transfer_ && !failure_;) {
    changed_.wait_for(lock, kLook);
    if (answered_ != seen) watch.restart();
    seen = answered_;
    watch.poll([this] { return what_it_does(); });
  }
  if (failure_) std::rethrow_exception(failure_);
  transfer_ = &transfer;
  for (Peer& host : hosts_) {
    host.next = 0;
    host.last = transfer.once_per_shard() ? std::min<std::size_t>(1, host.blocks) : host.blocks;
  }
  changed_.notify_all();
}

void Mailbox::wait(Transfer& transfer) {
  StallWatch watch(limits_, rank_);
  std::unique_lock<std::mutex> lock(mutex_);
  for (std::uint64_t seen = answered_; transfer_ == &transfer && !failure_;) {
    changed_.wait_for(lock, kLook);
    if (answered_ != seen) watch.restart();
    seen = answered_;
    watch.poll([this] { return what_it_does(); });
  }
  if (failure_) std::rethrow_exception(failure_);
}

void Mailbox::cancel(Transfer& transfer) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (transfer_ != &transfer) return;
  for (Peer& host : hosts_) {
    for (std::uint64_t n = host.answered; n < host.sent; ++n) {
      if (host.abandoned[n % ring_]) continue;
      host.abandoned[n % ring_] = true;
      transfer.abandon(host.pending[n % ring_]);
    }
  }
  transfer_ = nullptr;
  changed_.notify_all();
}

void Mailbox::run(Transfer& transfer) {
  begin(transfer);
  try {
    wait(transfer);
  } catch (...) {
    cancel(transfer);
    throw;
  }
}

std::string Mailbox::what_it_does() const {
  const int peer = world_rank(peer_.load());
  const std::uint64_t block = block_.load();
  switch (phase_.load()) {
    case Phase::idle:
      return "waits for its mailbox thread, which is starved";
    case Phase::put:
      return concat("waits in MPI_Put of block ", block, " to rank ", peer,
                    "; that rank is stopped, or the network to it is down");
    case Phase::flush:
      return concat("waits in MPI_Win_flush of block ", block, " to rank ", peer,
                    "; that rank is stopped, or the network to it is down");
    case Phase::flush_all:
      return concat("waits in MPI_Win_flush_all, of blocks to rank ", peer,
                    " and others; a rank that this one exchanges with is stopped, or the network to it is down");
    case Phase::answer:
      return concat("works on block ", block, " for rank ", peer, ": in the rule's function, or waits for the GIL");
    case Phase::wait:
      return concat("waits for rank ", peer, " to answer block ", block, "; that rank is stopped or starved");
  }
  return "";
}

// ---- the thread

void Mailbox::loop() {
  pthread_setname_np(pthread_self(), "hvd_agn mailbox");
  try {
    auto last_message = std::chrono::steady_clock::now();
    for (;;) {
      bool waiting = false;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        if (stopping_) break;
        for (const Peer& host : hosts_) waiting |= host.sent > host.answered;
        if (workers_.empty() && !waiting && !transfer_) {  // nothing to poll for
          changed_.wait(lock, [this] { return stopping_ || transfer_; });
          last_message = std::chrono::steady_clock::now();
        }
      }
      poll_mpi();
      if (serve() | advance()) {
        last_message = std::chrono::steady_clock::now();
        continue;
      }
      const auto quiet = std::chrono::steady_clock::now() - last_message;
      if (quiet < kSpin) {
        sched_yield();
        continue;
      }
      std::unique_lock<std::mutex> lock(mutex_);
      if (!stopping_) changed_.wait_for(lock, waiting || quiet < kAlert ? kNap : kRest);
    }
  } catch (...) {
    fail(std::current_exception());
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  stopped_ = true;
  changed_.notify_all();
}

void Mailbox::fail(std::exception_ptr why) {
  try {
    std::rethrow_exception(why);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "[rank %d] hvd_agn: the mailbox has failed: %s\n", rank_, error.what());
    std::fflush(stderr);
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  failure_ = why;
  changed_.notify_all();
}

void Mailbox::at(Phase phase, int peer, std::uint64_t block) {
  phase_.store(phase, std::memory_order_relaxed);
  peer_.store(peer, std::memory_order_relaxed);
  block_.store(block, std::memory_order_relaxed);
}

void Mailbox::poll_mpi() {
  const InMpi in_mpi(*this);
  int found = 0;
  check(MPI_Iprobe(MPI_ANY_SOURCE, 0, comm_, &found, MPI_STATUS_IGNORE), rank_, "MPI_Iprobe");
  check(MPI_Win_sync(window_), rank_, "MPI_Win_sync");
}

Message* Mailbox::slot(const Peer& peer, std::uint64_t number) const {
  return reinterpret_cast<Message*>(base_ + peer.here + kCounterBytes + number % ring_ * slot_bytes_);
}

Message* Mailbox::staging(const Peer& host, std::uint64_t number) const {
  return reinterpret_cast<Message*>(base_ + host.here + kCounterBytes + (ring_ + number % ring_) * slot_bytes_);
}

void Mailbox::put(const void* from, std::size_t bytes, Peer& to, std::size_t offset, std::uint64_t block) {
  to.last_put = block;
  at(Phase::put, to.rank, block);
  const InMpi in_mpi(*this);
  for (std::size_t done = 0; done < bytes;) {
    const std::size_t n = std::min(bytes - done, kPutLimit);
    const int code = MPI_Put(static_cast<const std::byte*>(from) + done, static_cast<int>(n), MPI_BYTE, to.rank,
                             static_cast<MPI_Aint>(to.there + offset + done), static_cast<int>(n), MPI_BYTE, window_);
    if (code != MPI_SUCCESS) check(code, rank_, concat("MPI_Put of block ", block, " to rank ", world_rank(to.rank)));
    done += n;
  }
}

void Mailbox::publish(std::vector<Peer>& peers) {
  int unpublished = 0;
  for (const Peer& peer : peers) {
    if (peer.sent == peer.published) continue;
    at(Phase::flush, peer.rank, peer.last_put);
    ++unpublished;
  }
  if (unpublished == 0) return;
  const bool one = unpublished == 1;
  if (!one) at(Phase::flush_all, peer_.load(), block_.load());
  int code = MPI_SUCCESS;
  {
    // One flush for all, so that a slow link to one does not keep the others idle.
    const InMpi in_mpi(*this);
    code = one ? MPI_Win_flush(peer_.load(), window_) : MPI_Win_flush_all(window_);
  }
  if (code != MPI_SUCCESS)
    check(code, rank_,
          concat(one ? "MPI_Win_flush" : "MPI_Win_flush_all", " of block ", block_.load(), " to rank ",
                 world_rank(peer_.load())));
  for (Peer& peer : peers) {
    if (peer.sent == peer.published) continue;
    peer.counter = peer.published = peer.sent;
    put(&peer.counter, sizeof peer.counter, peer, 0, peer.last_put);
  }
}

// ---- a host's part

bool Mailbox::serve() {
  bool any = false;
  for (Peer& worker : workers_) any |= serve_one(worker);
  publish(workers_);
  return any;
}

bool Mailbox::serve_one(Peer& worker) {
  const std::uint64_t requests = read_counter(base_ + worker.here);
  if (requests == worker.sent) return false;
  const std::uint64_t before = worker.sent;
  while (worker.sent < requests) {
    Message* message = slot(worker, worker.sent);
    at(Phase::answer, worker.rank, message->block);
    if (!responder_->respond(worker.index, *message, payload_of(message))) {
      if (!worker.blocked) worker.blocked.emplace(StallLimits{limits_.warn, 0}, rank_);
      worker.blocked->poll(
          [&] { return concat("cannot answer rank ", world_rank(worker.rank), ": ", responder_->blocked(*message)); });
      break;
    }
    worker.blocked.reset();
    put(message, sizeof(Message) + message->payload_bytes, worker, kCounterBytes + worker.sent % ring_ * slot_bytes_,
        message->block);
    ++worker.sent;
  }
  return worker.sent != before;
}

// ---- a worker's part

bool Mailbox::advance() {
  if (hosts_.empty()) return false;
  bool any = false;
  for (Peer& host : hosts_) any |= take_answers(host);
  // Not at once after the put: the network has had the time of the answers' unpacking.
  publish(hosts_);
  for (Peer& host : hosts_) any |= send_requests(host);
  for (const Peer& host : hosts_)
    if (host.sent != host.answered) at(Phase::wait, host.rank, host.pending[host.answered % ring_]);
  finish_transfer();
  return any;
}

bool Mailbox::take_answers(Peer& host) {
  const std::uint64_t answers = read_counter(base_ + host.here);
  const bool any = answers != host.answered;
  while (host.answered < answers) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Message* message = slot(host, host.answered);
    if (transfer_ && !host.abandoned[host.answered % ring_]) transfer_->answer(*message, payload_of(message));
    host.abandoned[host.answered % ring_] = false;
    ++host.answered;
    ++answered_;
  }
  return any;
}

bool Mailbox::send_requests(Peer& host) {
  // A quarter of the ring at a time, so that one is on its way there, one at the host, one on its way back, and one
  // here.
  const std::size_t batch = std::max<std::size_t>(1, ring_ / 4);
  for (std::size_t i = 0; i < batch; ++i) {
    Message* message = staging(host, host.sent);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!transfer_) return i > 0;
      while (host.next != host.last && !transfer_->wants(host.block(host.next))) ++host.next;
      if (host.next == host.last || host.sent - host.answered == ring_) return i > 0;
      *message = Message{};
      message->block = host.block(host.next);
      transfer_->request(*message, payload_of(message));
      host.pending[host.sent % ring_] = message->block;
      ++host.next;
      ++host.sent;
    }
    put(message, sizeof(Message) + message->payload_bytes, host, kCounterBytes + (host.sent - 1) % ring_ * slot_bytes_,
        message->block);
  }
  return true;
}

void Mailbox::finish_transfer() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!transfer_) return;
  for (const Peer& host : hosts_)
    if (host.next != host.last || host.sent != host.answered) return;
  transfer_ = nullptr;
  phase_.store(Phase::idle);
  changed_.notify_all();
}

}  // namespace hvd_agn
