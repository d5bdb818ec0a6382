// Where a worker's variables get their new values: in the buffers that they had before their last exchange. TensorFlow
// allocated them, so a variable that has one is changed in place, and after the first exchanges nothing is allocated
// any more. (A tensor on memory of our own, TF_NewTensor, is copied by the first update that finds it in a variable.)
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <mutex>
#include <vector>

#include "tensorflow/handles.hpp"

namespace hvd_agn {

class Vacated {
 public:
  /// Tensors like these, on other memory. Of those vacated, what nobody else has is taken; the rest is allocated.
  std::vector<Tensor> take(const std::vector<Tensor>& like) {
    std::vector<Tensor> taken;
    bool fresh;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      taken = std::move(vacated_);
      vacated_.clear();
      fresh = times_ < kFresh;
      ++times_;
    }
    taken.resize(like.size());
    std::vector<const Tensor*> allocated;
    for (std::size_t i = 0; i < like.size(); ++i) {
      if (!fresh && usable(taken[i], like[i])) continue;
      taken[i] = allocate(like[i]);
      allocated.push_back(&taken[i]);
    }
    // Before any is touched: together they may be large enough for large pages, with which the address cache misses
    // less.
    for (const Tensor* tensor : allocated) advise(*tensor);
    return taken;
  }

  /// What the variables had until now.
  void keep(std::vector<Tensor> values) {
    const std::lock_guard<std::mutex> lock(mutex_);
    vacated_ = std::move(values);
  }

 private:
  // The variables' first buffers were not made for this, with small pages.
  static constexpr int kFresh = 2;
  static constexpr std::uintptr_t kPage = 4096;

  /// Whether it is of that type and size, and ours alone: what a variable or a reader still has is not to be written
  /// to.
  static bool usable(const Tensor& old, const Tensor& like) {
    return old.tensor && TF_TensorType(old.tensor) == TF_TensorType(like.tensor) && old.bytes() == like.bytes() &&
           TF_TensorMaybeMove(old.tensor) == old.tensor;
  }

  static Tensor allocate(const Tensor& like) {
    std::vector<std::int64_t> shape(static_cast<std::size_t>(TF_NumDims(like.tensor)));
    for (std::size_t d = 0; d < shape.size(); ++d) shape[d] = TF_Dim(like.tensor, static_cast<int>(d));
    return Tensor(
        TF_AllocateTensor(TF_TensorType(like.tensor), shape.data(), static_cast<int>(shape.size()), like.bytes()));
  }

  static void advise(const Tensor& tensor) {
    const auto begin = reinterpret_cast<std::uintptr_t>(tensor.data()) / kPage * kPage;
    const auto end = (reinterpret_cast<std::uintptr_t>(tensor.data()) + tensor.bytes() + kPage - 1) / kPage * kPage;
    if (end - begin > kPage) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // or not
  }

  std::mutex mutex_;
  int times_ = 0;
  std::vector<Tensor> vacated_;  // by variable
};

}  // namespace hvd_agn
