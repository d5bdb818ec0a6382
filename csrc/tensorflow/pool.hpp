// Memory for a worker's new values. A buffer goes to TensorFlow as a tensor, becomes the variable's own, and comes back
// when TensorFlow lets go of it: after the first exchanges nothing is allocated any more.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <new>

namespace hvd_agn {

class Pool : public std::enable_shared_from_this<Pool> {
 public:
  Pool() = default;
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;
  ~Pool() {
    for (const auto& [bytes, head] : idle_) std::free(head);
  }

  /// `bytes` of memory at a multiple of kAlignment, to be handed to give_back() by whoever has it last, on any thread.
  void* take(std::size_t bytes) {
    Head* head = reuse(bytes);
    if (!head) {
      const std::size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
      head = static_cast<Head*>(std::aligned_alloc(kAlignment, kAlignment + rounded));
      if (!head) throw std::bad_alloc();
    }
    new (head) Head{shared_from_this()};  // the pool lives as long as its buffers
    return reinterpret_cast<std::byte*>(head) + kAlignment;
  }

  /// The signature is that of a tensor's deallocator.
  static void give_back(void* data, std::size_t bytes, void* = nullptr) {
    Head* head = reinterpret_cast<Head*>(static_cast<std::byte*>(data) - kAlignment);
    const std::shared_ptr<Pool> pool = std::move(head->pool);
    head->~Head();
    const std::lock_guard<std::mutex> lock(pool->mutex_);
    if (pool->closed_)
      std::free(head);
    else
      pool->idle_.emplace(bytes, head);
  }

  /// Frees what is idle, and from now on what comes back.
  void close() {
    const std::lock_guard<std::mutex> lock(mutex_);
    closed_ = true;
    for (const auto& [bytes, head] : idle_) std::free(head);
    idle_.clear();
  }

 private:
  static constexpr std::size_t kAlignment = 64;  // TensorFlow copies a tensor that begins elsewhere
  struct Head {
    std::shared_ptr<Pool> pool;
  };
  static_assert(sizeof(Head) <= kAlignment);

  Head* reuse(std::size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = idle_.find(bytes);
    if (found == idle_.end()) return nullptr;
    Head* head = found->second;
    idle_.erase(found);
    return head;
  }

  std::mutex mutex_;
  bool closed_ = false;
  std::multimap<std::size_t, Head*> idle_;  // by size
};

}  // namespace hvd_agn
