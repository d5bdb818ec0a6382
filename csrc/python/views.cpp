#include "python/views.hpp"

#include <algorithm>

using namespace nanobind::literals;

namespace hvd_agn {
namespace {

/// As DLPack 1.3 lays it out.
struct ExchangeTable {
  std::uint32_t major, minor;
  const ExchangeTable* previous;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*from_object)(void* object, nb::dlpack::dltensor* out);
  void* work_stream;
};

/// Of a type; null where it has none. Types are few: the last one is remembered, and kept.
const ExchangeTable* table_of(PyTypeObject* type) {
  static PyTypeObject* last = nullptr;
  static const ExchangeTable* table = nullptr;
  if (type == last) return table;
  const ExchangeTable* found = nullptr;
  if (PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__")) {
    found = static_cast<const ExchangeTable*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    Py_DECREF(capsule);
  }
  PyErr_Clear();
  if (found && found->major != 1) found = nullptr;
  Py_INCREF(type);
  Py_XDECREF(last);
  last = type;
  table = found;
  return found;
}

bool look(PyObject* tensor, nb::dlpack::dltensor* out) {
  const ExchangeTable* table = table_of(Py_TYPE(tensor));
  if (table && table->from_object(tensor, out) == 0 && (out->strides || out->ndim == 0)) return true;
  PyErr_Clear();
  return false;
}

const void* address(const nb::dlpack::dltensor& tensor) {
  return static_cast<const std::byte*>(tensor.data) + tensor.byte_offset;
}

}  // namespace

void Views::remember(const nb::list& tensors) {
  std::vector<View> views;
  for (const nb::handle tensor : tensors) {
    View view;
    view.tensor = nb::borrow(tensor);
    nb::dlpack::dltensor now{};
    if (look(tensor.ptr(), &now)) {
      view.known = true;
      view.data = address(now);
      view.dtype = now.dtype;
      view.device_type = now.device.device_type;
      view.device_id = now.device.device_id;
      view.shape.assign(now.shape, now.shape + now.ndim);
      view.strides.assign(now.strides, now.strides + now.ndim);
    }
    views.push_back(std::move(view));
  }
  views_ = std::move(views);
}

bool Views::changed(const nb::list& tensors) const {
  if (tensors.size() != views_.size()) return true;
  for (std::size_t i = 0; i < views_.size(); ++i) {
    const View& view = views_[i];
    PyObject* tensor = PyList_GET_ITEM(tensors.ptr(), static_cast<Py_ssize_t>(i));
    nb::dlpack::dltensor now{};
    if (!view.known || tensor != view.tensor.ptr() || !look(tensor, &now)) return true;
    if (address(now) != view.data || now.dtype.code != view.dtype.code || now.dtype.bits != view.dtype.bits ||
        now.dtype.lanes != view.dtype.lanes || now.device.device_type != view.device_type ||
        now.device.device_id != view.device_id || now.ndim != static_cast<std::int32_t>(view.shape.size()) ||
        !std::equal(view.shape.begin(), view.shape.end(), now.shape) ||
        !std::equal(view.strides.begin(), view.strides.end(), now.strides))
      return true;
  }
  return false;
}

void register_views(nb::module_& m) {
  nb::class_<Views>(m, "Views", "Tensors as they were: the objects, their addresses, types, shapes and strides.")
      .def(nb::init<const nb::list&>(), "tensors"_a)
      .def("remember", &Views::remember, "tensors"_a, "They are to be as they are now.")
      .def("changed", &Views::changed, "tensors"_a, "Whether one is another than it was, or does not tell by DLPack.");
}

}  // namespace hvd_agn
