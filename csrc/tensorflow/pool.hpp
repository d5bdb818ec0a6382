// Memory for a worker's new values. A buffer goes to TensorFlow as a tensor, becomes the variable's own, and comes back
// when TensorFlow lets go of it: after the first exchanges nothing is allocated any more. Buffers are cut from large
// pieces, which ask the system for large pages: a pass over many variables misses the address cache less.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

namespace hvd_agn {

class Pool : public std::enable_shared_from_this<Pool> {
 public:
  Pool() = default;
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;
  ~Pool() {
    for (void* piece : pieces_) std::free(piece);
  }

  /// `bytes` of memory at a multiple of kAlignment, to be handed to give_back() by whoever has it last, on any thread.
  void* take(std::size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto idle = idle_.find(bytes);
    std::byte* head = idle == idle_.end() ? cut(bytes) : idle->second;
    if (idle != idle_.end()) idle_.erase(idle);
    new (head) Head{shared_from_this()};  // the pool lives as long as its buffers
    return head + kAlignment;
  }

  /// The signature is that of a tensor's deallocator.
  static void give_back(void* data, std::size_t bytes, void* = nullptr) {
    std::byte* head = static_cast<std::byte*>(data) - kAlignment;
    Head* held = reinterpret_cast<Head*>(head);
    const std::shared_ptr<Pool> pool = std::move(held->pool);
    held->~Head();
    const std::lock_guard<std::mutex> lock(pool->mutex_);
    pool->idle_.emplace(bytes, head);
    if (pool->closed_) forget(head, bytes);
  }

  /// What is idle, and what comes back from now on, takes no memory any more.
  void close() {
    const std::lock_guard<std::mutex> lock(mutex_);
    closed_ = true;
    for (const auto& [bytes, head] : idle_) forget(head, bytes);
  }

 private:
  static constexpr std::size_t kAlignment = 64;  // TensorFlow copies a tensor that begins elsewhere
  static constexpr std::size_t kPage = 4096, kLargePage = std::size_t{2} << 20;
  static constexpr std::size_t kFirstPiece = std::size_t{64} << 10, kLargestPiece = std::size_t{32} << 20;
  struct Head {
    std::shared_ptr<Pool> pool;
  };
  static_assert(sizeof(Head) <= kAlignment);

  std::byte* cut(std::size_t bytes) {
    const std::size_t needed = kAlignment + (bytes + kAlignment - 1) / kAlignment * kAlignment;
    if (needed > left_) {
      const std::size_t size = std::max(needed, piece_bytes_);
      const std::size_t page = size < kLargePage ? kPage : kLargePage;
      const std::size_t rounded = (size + page - 1) / page * page;
      void* piece = std::aligned_alloc(page, rounded);
      if (!piece) throw std::bad_alloc();
      pieces_.push_back(piece);
      if (page == kLargePage) madvise(piece, rounded, MADV_HUGEPAGE);  // or not: the same but for the time
      next_ = static_cast<std::byte*>(piece);
      left_ = rounded;
      piece_bytes_ = std::min(2 * piece_bytes_, kLargestPiece);
    }
    left_ -= needed;
    return std::exchange(next_, next_ + needed);
  }

  static void forget(std::byte* head, std::size_t bytes) {
    const std::size_t first = (reinterpret_cast<std::uintptr_t>(head) + kPage - 1) / kPage * kPage;
    const std::size_t end = (reinterpret_cast<std::uintptr_t>(head) + kAlignment + bytes) / kPage * kPage;
    if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_DONTNEED);
  }

  std::mutex mutex_;
  bool closed_ = false;
  std::multimap<std::size_t, std::byte*> idle_;  // heads of buffers, by their bytes
  std::vector<void*> pieces_;
  std::byte* next_ = nullptr;  // of the last piece
  std::size_t left_ = 0, piece_bytes_ = kFirstPiece;
};

}  // namespace hvd_agn
