// Whether tensors are where and what they were: asked before every exchange, so it may cost next to nothing.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <vector>

namespace hvd_agn {

namespace nb = nanobind;

/// Remembers Python tensors: the objects, and of each its address, device, type, shape and strides, which its type
/// tells through DLPack's table of C functions (DLPack 1.3, DLPackExchangeAPI). Of a tensor that cannot tell, nothing
/// is remembered.
class Views {
 public:
  explicit Views(const nb::list& tensors) { remember(tensors); }
  void remember(const nb::list& tensors);
  /// Whether any is another than it was, or cannot tell.
  bool changed(const nb::list& tensors) const;

 private:
  struct View {
    nb::object tensor;
    bool known = false;
    const void* data = nullptr;
    nb::dlpack::dtype dtype{};
    std::int32_t device_type = 0, device_id = 0;
    std::vector<std::int64_t> shape, strides;
  };
  std::vector<View> views_;
};

void register_views(nb::module_& m);

}  // namespace hvd_agn
