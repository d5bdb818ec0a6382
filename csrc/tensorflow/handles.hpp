// What the C API gives as pointers that are to be deleted.
#pragma once

#include <utility>

#include "tensorflow/c_api.hpp"

namespace hvd_agn {

struct Status {
  TF_Status* const status = TF_NewStatus();
  Status() = default;
  Status(const Status&) = delete;
  Status& operator=(const Status&) = delete;
  ~Status() { TF_DeleteStatus(status); }
  operator TF_Status*() const { return status; }
  bool ok() const { return TF_GetCode(status) == TF_OK; }
};

struct Tensor {
  TF_Tensor* tensor = nullptr;
  Tensor() = default;
  explicit Tensor(TF_Tensor* tensor) : tensor(tensor) {}
  Tensor(Tensor&& other) noexcept : tensor(std::exchange(other.tensor, nullptr)) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(tensor, other.tensor);
    return *this;
  }
  ~Tensor() {
    if (tensor) TF_DeleteTensor(tensor);
  }
  void* data() const { return TF_TensorData(tensor); }
  std::size_t bytes() const { return TF_TensorByteSize(tensor); }
};

}  // namespace hvd_agn
