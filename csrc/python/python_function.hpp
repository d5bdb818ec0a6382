// rules.Custom: a function of Python's as the function of a rule. Called without the GIL, by any thread.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <string>
#include <utility>
#include <vector>

#include "kernels/staged.hpp"
#include "mpi/error.hpp"

namespace hvd_agn {

namespace nb = nanobind;

/// A function on NumPy arrays that are views of a block.
class PythonFunction : public Function {
 public:
  PythonFunction(nb::callable function, std::string name, std::vector<std::string> slots)
      : function_(std::move(function)), name_(std::move(name)), slots_(std::move(slots)) {}
  int slots() const override { return static_cast<int>(slots_.size()); }

  void apply(DType center, std::byte* delta, std::byte* out, std::size_t slot_stride, std::size_t count,
             std::uint64_t t) const override {
    const nb::gil_scoped_acquire gil;
    const auto type = center == DType::f64 ? nb::dtype<double>() : nb::dtype<float>();
    const auto view = [&](std::byte* data) {
      return nb::cast(nb::ndarray<nb::numpy>(data, 1, &count, nb::handle(), nullptr, type), nb::rv_policy::reference);
    };
    try {
      nb::dict slots;
      for (std::size_t s = 0; s < slots_.size(); ++s) slots[slots_[s].c_str()] = view(out + (s + 1) * slot_stride);
      function_(view(out), view(delta), slots, t);
    } catch (nb::python_error& error) {
      if (!error.matches(PyExc_Exception)) throw;  // Ctrl-C, SystemExit
      throw RuleError(
          concat(name_, " raised ", nb::cast<std::string>(error.type().attr("__name__")), text_of(error.value())));
    } catch (const std::exception& error) {
      throw RuleError(concat(name_, " failed: ", error.what()));
    }
  }

 private:
  /// An exception's own text, if it has one that can be had.
  static std::string text_of(nb::handle exception) {
    PyObject* text = PyObject_Str(exception.ptr());
    const char* bytes = text ? PyUnicode_AsUTF8(text) : nullptr;
    const std::string result = bytes ? concat(": ", bytes) : "";
    PyErr_Clear();
    Py_XDECREF(text);
    return result;
  }

  nb::callable function_;
  std::string name_;
  std::vector<std::string> slots_;
};

}  // namespace hvd_agn
