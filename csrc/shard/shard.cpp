#include "shard/shard.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <ctime>
#include <new>
#include <thread>

namespace hvd_agn {

namespace {

constexpr std::size_t kPage = 4096;
constexpr auto kLook = std::chrono::milliseconds(1);  // at a block that is to be set to a checkpoint
constexpr int kIndexBits = 24;                        // of a block's state; the other 40 are its version
constexpr std::uint64_t kIndexMask = (std::uint64_t{1} << kIndexBits) - 1;

std::atomic<Stage> signal_stage{Stage::none};
std::atomic<std::size_t> signal_block{0};
std::atomic<int> signal_number{0};

}  // namespace

void use_huge_pages(void* data, std::size_t bytes) {
  const std::uintptr_t start = round_up(reinterpret_cast<std::uintptr_t>(data), kPage);
  const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(data) + bytes) / kPage * kPage;
  if (start < end) madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
}

void signal_at(Stage stage, std::size_t block, int signal) {
  signal_block.store(block);
  signal_number.store(signal);
  signal_stage.store(stage);
}

void reach(Stage stage, std::size_t block) {
  if (signal_stage.load(std::memory_order_relaxed) != stage || signal_block.load() != block) return;
  if (signal_stage.exchange(Stage::none) == stage) std::raise(signal_number.load());
}

struct Shard::Header {
  std::atomic<std::int64_t> attached;  // users
  std::int64_t users;                  // at first
  std::atomic<std::uint64_t> recoveries;
};

struct alignas(64) Shard::BlockHeader {
  pthread_mutex_t mutex;
  std::atomic<std::uint64_t> state;  // version << kIndexBits | physical block
  std::atomic<int> holder;           // rank in MPI_COMM_WORLD, for messages
  std::atomic<std::uint32_t> epoch;
};

// ---- memory

std::size_t Shard::memory_bytes(const Layout& layout, std::size_t blocks, int slots, int users) {
  const std::size_t stride = round_up(layout.block_bytes() * (1 + slots), Layout::kAlignment);
  return round_up(
      round_up(sizeof(Header), kPage) + round_up(blocks * sizeof(BlockHeader), kPage) + (blocks + users) * stride,
      kPage);
}

Shard::Shard(void* base, const Layout& layout, std::size_t begin, std::size_t end, int slots, int user,
             const Comm& comm)
    : begin_(begin),
      end_(end),
      slot_stride_(layout.block_bytes()),
      stride_(round_up(layout.block_bytes() * (1 + slots), Layout::kAlignment)),
      rank_(comm.world_rank()),
      root_(comm.world_ranks().front()),
      limits_(comm.limits()),
      process_(getpid()) {
  const std::size_t blocks = end - begin;
  HVD_AGN_EXPECTS(blocks + comm.size() < kIndexMask, std::invalid_argument, "a shard of ", blocks,
                  " blocks is too large: raise HVD_AGN_BLOCK_BYTES (now ", layout.block_bytes(), ")");
  auto* at = static_cast<std::byte*>(base);
  header_ = reinterpret_cast<Header*>(at);
  headers_ = reinterpret_cast<BlockHeader*>(at + round_up(sizeof(Header), kPage));
  physical_ = at + round_up(sizeof(Header), kPage) + round_up(blocks * sizeof(BlockHeader), kPage);
  spare_ = blocks + static_cast<std::size_t>(user);
}

void Shard::format(int users) {
  const std::size_t blocks = end_ - begin_;
  std::byte* base = reinterpret_cast<std::byte*>(header_);
  std::memset(base, 0, static_cast<std::size_t>(physical_ - base) + (blocks + users) * stride_);
  new (header_) Header{};
  header_->attached.store(users);
  header_->users = users;
  pthread_mutexattr_t shared;
  pthread_mutexattr_init(&shared);
  pthread_mutexattr_setpshared(&shared, PTHREAD_PROCESS_SHARED);
  pthread_mutexattr_setrobust(&shared, PTHREAD_MUTEX_ROBUST);
  for (std::size_t b = 0; b < blocks; ++b) {
    auto* block = new (&headers_[b]) BlockHeader{};
    const int code = pthread_mutex_init(&block->mutex, &shared);
    HVD_AGN_EXPECTS(code == 0, std::runtime_error, "robust shared mutexes are missing: ", std::strerror(code));
    block->state.store(b);
    block->holder.store(-1);
  }
  pthread_mutexattr_destroy(&shared);
}

void Shard::detach() {
  if (!attached_ || getpid() != process_) return;
  attached_ = false;
  if (header_->attached.fetch_sub(1) > 1) return;
  // A window can only go collectively, when the ranks next meet; its pages need not wait for that. Where the window is
  // not in a shared-memory file system the call fails, and they do.
  const std::size_t physical = end_ - begin_ + static_cast<std::size_t>(header_->users);
  auto* blocks = reinterpret_cast<std::byte*>(round_up(reinterpret_cast<std::uintptr_t>(physical_), kPage));
  const std::byte* end = physical_ + physical * stride_;
  if (blocks < end) madvise(blocks, static_cast<std::size_t>(end - blocks) / kPage * kPage, MADV_REMOVE);
}

std::byte* Shard::physical(std::uint64_t index) const {
  return physical_ + index * stride_;
}

Shard::BlockHeader& Shard::header(std::size_t block) const {
  return headers_[block - begin_];
}

// ---- a block

Shard::Block::Block(Shard* shard, std::size_t index) : spare_lock_(shard->spare_mutex_), shard_(shard), index_(index) {}

Shard::Block::~Block() {
  if (!spare_lock_.owns_lock()) return;  // moved from
  spare_lock_.unlock();
  pthread_mutex_unlock(&shard_->header(index_).mutex);
}

const std::byte* Shard::Block::data() const {
  return shard_->physical(shard_->header(index_).state.load(std::memory_order_relaxed) & kIndexMask);
}

std::byte* Shard::Block::spare() const {
  return shard_->physical(shard_->spare_);
}

std::uint64_t Shard::Block::version() const {
  return shard_->header(index_).state.load(std::memory_order_relaxed) >> kIndexBits;
}

void Shard::Block::commit(std::uint64_t version) {
  std::atomic<std::uint64_t>& state = shard_->header(index_).state;
  const std::uint64_t old = state.load(std::memory_order_relaxed) & kIndexMask;
  reach(Stage::written, index_);
  // The one store that makes the update happen. Whoever dies before it has changed nothing but its own spare.
  state.store(version << kIndexBits | shard_->spare_, std::memory_order_release);
  reach(Stage::committed, index_);
  shard_->spare_ = old;
}

std::uint32_t Shard::Block::epoch() const {
  return shard_->epoch(index_);
}

void Shard::Block::begin_epoch(std::uint32_t epoch) {
  shard_->header(index_).epoch.store(epoch, std::memory_order_relaxed);
}

void Shard::Block::restore(std::uint64_t version, std::uint32_t epoch) {
  commit(version);
  // Last: should this process die between, those of the new epoch go on waiting, and take no old value for a new one.
  begin_epoch(epoch);
}

// ---- locks

Shard::Block Shard::locked(std::size_t block, int code) {
  if (code == EOWNERDEAD) {
    // The dead owner either committed or did not: nothing to repair, only the lock to take over. Its spare is lost.
    code = pthread_mutex_consistent(&header(block).mutex);
    header_->recoveries.fetch_add(1, std::memory_order_relaxed);
  }
  if (code) lock_failed(block, code);
  header(block).holder.store(rank_, std::memory_order_relaxed);
  return Block(this, block);
}

void Shard::lock_failed(std::size_t block, int code) const {
  throw std::runtime_error(concat("[rank ", rank_, "] lock of block ", block, " failed: ", std::strerror(code),
                                  ". The center's memory is damaged; restart from the last saved center."));
}

std::optional<Shard::Block> Shard::try_lock(std::size_t block) {
  check_process(process_, rank_);
  const int code = pthread_mutex_trylock(&header(block).mutex);
  if (code == EBUSY) return std::nullopt;
  return locked(block, code);
}

Shard::Block Shard::lock(std::size_t block) {
  check_process(process_, rank_);
  StallWatch watch(limits_, rank_);
  for (;;) {
    timespec deadline{};
    clock_gettime(CLOCK_REALTIME, &deadline);
    deadline.tv_sec += static_cast<time_t>(watch.next()) + 1;
    const int code = pthread_mutex_timedlock(&header(block).mutex, &deadline);
    if (code != ETIMEDOUT) return locked(block, code);
    watch.poll([&] {
      return concat("waits for block ", block, ", locked by rank ", holder(block), "; that rank is stopped or starved");
    });
  }
}

Shard::Block Shard::lock(std::size_t block, std::uint32_t epoch, bool looks) {
  StallWatch watch(limits_, rank_);
  for (;;) {
    {
      Block found = lock(block);
      if (found.epoch() > epoch && !looks) restored(rank_);
      if (found.epoch() >= epoch) return found;
    }
    std::this_thread::sleep_for(kLook);
    watch.poll([this] { return awaits_restore(); });
  }
}

void restored(int rank) {
  throw RestoredError(
      concat("[rank ", rank,
             "] the center was set to a checkpoint that this rank has not loaded: pull() takes it over. "
             "Load it on every rank."));
}

std::string Shard::awaits_restore() const {
  return concat(
      "waits for rank ", root_,
      " to load the checkpoint that this rank has loaded: load_state_dict(), or the loading of a Keras model, "
      "is for every rank");
}

int Shard::holder(std::size_t block) const {
  return header(block).holder.load(std::memory_order_relaxed);
}

std::uint32_t Shard::epoch(std::size_t block) const {
  return header(block).epoch.load(std::memory_order_relaxed);
}

// ---- counts

std::uint64_t Shard::version() const {
  std::uint64_t smallest = UINT64_MAX;
  for (std::size_t b = begin_; b < end_; ++b)
    smallest = std::min(smallest, header(b).state.load(std::memory_order_acquire) >> kIndexBits);
  return smallest;
}

std::uint64_t Shard::activity() const {
  std::uint64_t sum = 0;
  for (std::size_t b = begin_; b < end_; ++b) sum += header(b).state.load(std::memory_order_relaxed);
  return sum;
}

std::uint64_t Shard::recoveries() const {
  return header_->recoveries.load(std::memory_order_relaxed);
}

}  // namespace hvd_agn
