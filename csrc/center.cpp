#include "center.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <csignal>
#include <cstring>
#include <ctime>
#include <new>

namespace hvd_agn {

namespace {

constexpr std::size_t kPage = 4096;
constexpr int kIndexBits = 24;  // of a block's state; the other 40 are its version
constexpr std::uint64_t kIndexMask = (std::uint64_t{1} << kIndexBits) - 1;

std::size_t round_up(std::size_t value, std::size_t to) {
  return (value + to - 1) / to * to;
}

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
  if (signal_stage.load(std::memory_order_relaxed) == stage && signal_block.load() == block)
    std::raise(signal_number.load());
}

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
}

struct Center::Header {
  std::atomic<std::int64_t> attached;  // processes that use the center
  std::atomic<std::uint64_t> recoveries;
};

struct alignas(64) Center::BlockHeader {
  pthread_mutex_t mutex;
  std::atomic<std::uint64_t> state;  // version << kIndexBits | physical block
  std::atomic<int> holder;           // rank, for messages
};

std::byte* Center::physical(std::uint64_t index) const {
  return physical_ + index * stride_;
}

// ---- a block

Center::Block::Block(Center* center, std::size_t index)
    : spare_lock_(center->spare_mutex_), center_(center), index_(index) {}

Center::Block::~Block() {
  if (!spare_lock_.owns_lock()) return;  // moved from
  spare_lock_.unlock();
  pthread_mutex_unlock(&center_->headers_[index_].mutex);
}

const std::byte* Center::Block::data() const {
  return center_->physical(center_->headers_[index_].state.load(std::memory_order_relaxed) & kIndexMask);
}

std::byte* Center::Block::spare() const {
  return center_->physical(center_->spare_);
}

std::uint64_t Center::Block::version() const {
  return center_->headers_[index_].state.load(std::memory_order_relaxed) >> kIndexBits;
}

void Center::Block::commit(std::uint64_t version) {
  std::atomic<std::uint64_t>& state = center_->headers_[index_].state;
  const std::uint64_t old = state.load(std::memory_order_relaxed) & kIndexMask;
  reach(Stage::written, index_);
  // The one store that makes the update happen. Whoever dies before it has changed nothing but its own spare.
  state.store(version << kIndexBits | center_->spare_, std::memory_order_release);
  reach(Stage::committed, index_);
  center_->spare_ = old;
}

// ---- locks

void Center::recover(std::size_t block) {
  // The dead owner either committed or did not: nothing to repair, only the lock to take over. Its spare is lost.
  const int code = pthread_mutex_consistent(&headers_[block].mutex);
  if (code) lock_failed(block, code);
  header_->recoveries.fetch_add(1, std::memory_order_relaxed);
}

void Center::lock_failed(std::size_t block, int code) const {
  throw std::runtime_error(concat("[rank ", rank_, "] lock of block ", block, " failed: ", std::strerror(code),
                                  ". The center's memory is damaged; restart from the last saved center."));
}

void Center::check_process() const {
  HVD_AGN_EXPECTS(getpid() == process_, UsageError, "[rank ", rank_,
                  "] the center was created in another process, which this one was forked from. Use it there only.");
}

std::optional<Center::Block> Center::try_lock(std::size_t block) {
  check_process();
  const int code = pthread_mutex_trylock(&headers_[block].mutex);
  if (code == EBUSY) return std::nullopt;
  if (code == EOWNERDEAD)
    recover(block);
  else if (code)
    lock_failed(block, code);
  headers_[block].holder.store(rank_, std::memory_order_relaxed);
  return Block(this, block);
}

Center::Block Center::lock(std::size_t block) {
  check_process();
  StallWatch watch(limits_, rank_);
  for (;;) {
    timespec deadline{};
    clock_gettime(CLOCK_REALTIME, &deadline);
    deadline.tv_sec += static_cast<time_t>(watch.next()) + 1;
    const int code = pthread_mutex_timedlock(&headers_[block].mutex, &deadline);
    if (code == ETIMEDOUT) {
      watch.poll([&] {
        return concat("waits for block ", block, ", locked by rank ", headers_[block].holder.load(),
                      "; that rank is stopped or starved");
      });
      continue;
    }
    if (code == EOWNERDEAD)
      recover(block);
    else if (code)
      lock_failed(block, code);
    headers_[block].holder.store(rank_, std::memory_order_relaxed);
    return Block(this, block);
  }
}

// ---- memory

std::size_t Center::memory_bytes(const Layout& layout, int slots, int ranks) {
  const std::size_t stride = round_up(layout.block_bytes() * (1 + slots), Layout::kAlignment);
  return round_up(sizeof(Header), kPage) + round_up(layout.blocks() * sizeof(BlockHeader), kPage) +
         (layout.blocks() + ranks) * stride;
}

Center::Center(Comm& comm, Layout layout, Rule rule)
    : layout_(std::move(layout)),
      rule_(rule),
      rank_(comm.rank()),
      ranks_(comm.size()),
      limits_(comm.limits()),
      process_(getpid()) {
  HVD_AGN_EXPECTS(comm.node_size() == comm.size(), std::invalid_argument, "some ranks are on another node");
  HVD_AGN_EXPECTS(layout_.blocks() + ranks_ <= kIndexMask, std::invalid_argument, "a center of ", layout_.blocks(),
                  " blocks is too large: raise HVD_AGN_BLOCK_BYTES (now ", layout_.block_bytes(), ")");
  bytes_ = memory_bytes(layout_, rule_.slots(), ranks_);
  stride_ = round_up(layout_.block_bytes() * (1 + rule_.slots()), Layout::kAlignment);

  if (ranks_ == 1) {
    base_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base_ == MAP_FAILED) throw std::bad_alloc();
    use_huge_pages(base_, bytes_);
  } else {
    const MPI_Aint own = comm.node_rank() == 0 ? static_cast<MPI_Aint>(bytes_) : 0;
    check(MPI_Win_allocate_shared(own, 1, MPI_INFO_NULL, comm.node(), &base_, &window_), rank_,
          concat("MPI_Win_allocate_shared of ", bytes_, " bytes"));
    check(MPI_Win_set_errhandler(window_, MPI_ERRORS_RETURN), rank_, "MPI_Win_set_errhandler");
    MPI_Aint size = 0;
    int unit = 0;
    check(MPI_Win_shared_query(window_, 0, &size, &unit, &base_), rank_, "MPI_Win_shared_query of node rank 0");
    check(MPI_Win_lock_all(MPI_MODE_NOCHECK, window_), rank_, "MPI_Win_lock_all");
  }
  auto* at = static_cast<std::byte*>(base_);
  header_ = reinterpret_cast<Header*>(at);
  headers_ = reinterpret_cast<BlockHeader*>(at + round_up(sizeof(Header), kPage));
  physical_ = at + round_up(sizeof(Header), kPage) + round_up(layout_.blocks() * sizeof(BlockHeader), kPage);
  spare_ = layout_.blocks() + static_cast<std::size_t>(comm.node_rank());

  if (comm.node_rank() == 0) {
    std::memset(base_, 0, bytes_);
    header_ = new (header_) Header{};
    header_->attached.store(comm.node_size());
    pthread_mutexattr_t shared;
    pthread_mutexattr_init(&shared);
    pthread_mutexattr_setpshared(&shared, PTHREAD_PROCESS_SHARED);
    pthread_mutexattr_setrobust(&shared, PTHREAD_MUTEX_ROBUST);
    for (std::size_t b = 0; b < layout_.blocks(); ++b) {
      auto* block = new (&headers_[b]) BlockHeader{};
      const int code = pthread_mutex_init(&block->mutex, &shared);
      HVD_AGN_EXPECTS(code == 0, std::runtime_error, "robust shared mutexes are missing: ", std::strerror(code));
      block->state.store(b);
      block->holder.store(-1);
    }
    pthread_mutexattr_destroy(&shared);
  }
  attached_ = true;
  comm.barrier("waits for the host to set up the center");
}

Center::~Center() {
  if (ranks_ == 1 && base_) munmap(base_, bytes_);
}

std::uint64_t Center::read(const std::vector<std::vector<void*>>& planes) {
  std::uint64_t largest = 0;
  for (std::size_t b = 0; b < layout_.blocks(); ++b) {
    const Block block = lock(b);
    largest = std::max(largest, block.version());
    for (std::size_t plane = 0; plane < planes.size(); ++plane) {
      const std::byte* from = block.data() + plane * slot_stride();
      for (const Layout::Part* part = layout_.begin(b); part != layout_.end(b); ++part) {
        const std::size_t size = item_size(layout_.segments()[part->segment].dtype);
        std::memcpy(static_cast<std::byte*>(planes[plane][part->segment]) + part->first * size,
                    from + part->block_offset, part->count * size);
      }
    }
  }
  return largest;
}

void Center::write(const std::vector<std::vector<void*>>& planes, std::uint64_t version) {
  for (std::size_t b = 0; b < layout_.blocks(); ++b) {
    Block block = lock(b);
    std::memcpy(block.spare(), block.data(), stride_);
    for (std::size_t plane = 0; plane < planes.size(); ++plane) {
      std::byte* to = block.spare() + plane * slot_stride();
      for (const Layout::Part* part = layout_.begin(b); part != layout_.end(b); ++part) {
        const std::size_t size = item_size(layout_.segments()[part->segment].dtype);
        std::memcpy(to + part->block_offset,
                    static_cast<const std::byte*>(planes[plane][part->segment]) + part->first * size,
                    part->count * size);
      }
    }
    block.commit(version);
  }
}

std::uint64_t Center::version() const {
  std::uint64_t smallest = UINT64_MAX;
  for (std::size_t b = 0; b < layout_.blocks(); ++b)
    smallest = std::min(smallest, headers_[b].state.load(std::memory_order_acquire) >> kIndexBits);
  return smallest;
}

std::uint64_t Center::recoveries() const {
  return header_->recoveries.load(std::memory_order_relaxed);
}

void Center::detach() {
  if (!attached_ || getpid() != process_) return;
  attached_ = false;
  if (header_->attached.fetch_sub(1) > 1 || ranks_ == 1) return;
  // The window can only go collectively, at exit; its pages need not wait for that. Where the window is not in a
  // shared-memory file system the call fails, and they do.
  auto* blocks = reinterpret_cast<std::byte*>(round_up(reinterpret_cast<std::uintptr_t>(physical_), kPage));
  const auto* end = static_cast<std::byte*>(base_) + bytes_;
  if (blocks < end) madvise(blocks, static_cast<std::size_t>(end - blocks) / kPage * kPage, MADV_REMOVE);
}

void Center::free(Comm& comm) {
  const auto pushes = [this] {
    std::uint64_t sum = 0;
    for (std::size_t b = 0; b < layout_.blocks(); ++b) sum += headers_[b].state.load(std::memory_order_relaxed);
    return sum;
  };
  comm.barrier("has ended and waits for the other ranks to end", pushes);
  if (window_ == MPI_WIN_NULL) return;
  check(MPI_Win_unlock_all(window_), rank_, "MPI_Win_unlock_all");
  check(MPI_Win_free(&window_), rank_, "MPI_Win_free");
  base_ = nullptr;
}

}  // namespace hvd_agn
