// TensorFlow ops that call the core, on TensorFlow's C API alone. Values go in as tensors; new values come out in
// others, and the graph assigns them: what is written through a value that was read would be lost where a variable
// copies on reading, as it does after a sparse update.
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "tensorflow/c_api.hpp"
#include "tensorflow/calls.hpp"
#include "tensorflow/handles.hpp"
#include "tensorflow/vacated.hpp"

namespace hvd_agn {
namespace {

constexpr std::size_t kTextBytes = 4096;
const CoreCalls* core = nullptr;

void fail(TF_OpKernelContext* context, const char* text) {
  const Status status;
  TF_SetStatus(status, TF_INTERNAL, text);
  TF_OpKernelContext_Failure(context, status);
}

void fail_with_kept(TF_OpKernelContext* context, std::int64_t worker) {
  char text[kTextBytes];
  core->raise(worker, text, sizeof text);
  fail(context, text);
}

// ---- by worker

std::mutex vacated_mutex;
std::map<std::int64_t, std::shared_ptr<Vacated>> all_vacated;

std::shared_ptr<Vacated> vacated_of(std::int64_t worker) {
  const std::lock_guard<std::mutex> lock(vacated_mutex);
  auto& vacated = all_vacated[worker];
  if (!vacated) vacated = std::make_shared<Vacated>();
  return vacated;
}

void leave(std::int64_t worker) {
  const std::lock_guard<std::mutex> lock(vacated_mutex);
  all_vacated.erase(worker);
}

// ---- attributes, inputs, outputs

struct Attributes {
  std::int64_t worker = 0;
  std::string call;
  std::vector<std::int64_t> places;  // of gradients among the arrays
  std::int64_t arrays = 0;
};

std::string text_attribute(TF_OpKernelConstruction* construction, const char* name, TF_Status* status) {
  std::int32_t list = 0, size = 0;
  TF_OpKernelConstruction_GetAttrSize(construction, name, &list, &size, status);
  if (TF_GetCode(status) != TF_OK) return {};
  std::string text(static_cast<std::size_t>(size), '\0');
  TF_OpKernelConstruction_GetAttrString(construction, name, text.data(), text.size(), status);
  return text;
}

template <bool kCall, bool kPlaces>
void* create(TF_OpKernelConstruction* construction) {
  const Status status;
  auto made = std::make_unique<Attributes>();
  TF_OpKernelConstruction_GetAttrInt64(construction, "worker", &made->worker, status);
  if (kCall && status.ok()) made->call = text_attribute(construction, "call", status);
  if (kPlaces && status.ok()) {
    std::int32_t list = 0, size = 0;
    TF_OpKernelConstruction_GetAttrInt64(construction, "arrays", &made->arrays, status);
    if (status.ok()) TF_OpKernelConstruction_GetAttrSize(construction, "places", &list, &size, status);
    made->places.resize(static_cast<std::size_t>(list));
    if (status.ok())
      TF_OpKernelConstruction_GetAttrInt64List(construction, "places", made->places.data(), list, status);
  }
  if (!status.ok()) TF_OpKernelConstruction_Failure(construction, status);
  return made.release();
}

void remove(void* kernel) {
  delete static_cast<Attributes*>(kernel);
}

Tensor input(TF_OpKernelContext* context, int index, TF_Status* status) {
  Tensor tensor;
  TF_GetInput(context, index, &tensor.tensor, status);
  return tensor;
}

template <class T>
T scalar(TF_OpKernelContext* context, int index, TF_Status* status) {
  const Tensor tensor = input(context, index, status);
  return TF_GetCode(status) == TF_OK ? *static_cast<const T*>(TF_TensorData(tensor.tensor)) : T{};
}

template <class T>
void set_scalar(TF_OpKernelContext* context, int index, TF_DataType type, T value, TF_Status* status) {
  const Tensor tensor(TF_AllocateOutput(context, index, type, nullptr, 0, sizeof value, status));
  if (TF_GetCode(status) == TF_OK) *static_cast<T*>(TF_TensorData(tensor.tensor)) = value;
}

/// An input of double, of any shape.
Rates rates_of(const Tensor& tensor) {
  return {static_cast<const double*>(tensor.data()), tensor.bytes() / sizeof(double)};
}

/// The first `count` inputs.
std::vector<Tensor> inputs(TF_OpKernelContext* context, int count, TF_Status* status) {
  std::vector<Tensor> values;
  for (int i = 0; i < count && TF_GetCode(status) == TF_OK; ++i) values.push_back(input(context, i, status));
  return values;
}

// ---- the ops

/// HvdAgnExchange: the last inputs are the updates since the last exchange and the learning rates, the last outputs
/// those updates after it and whether an error is kept; HvdAgnRaise raises it when the new values have been assigned,
/// so that none is lost.
void exchange(void* kernel, TF_OpKernelContext* context) try {
  const auto& attributes = *static_cast<const Attributes*>(kernel);
  const Status status;
  const int count = TF_NumInputs(context) - 2;
  std::vector<Tensor> values = inputs(context, count, status);
  auto since = status.ok() ? scalar<std::int64_t>(context, count, status) : 0;
  const Tensor rates = status.ok() ? input(context, count + 1, status) : Tensor();
  if (!status.ok()) return TF_OpKernelContext_Failure(context, status);
  const auto vacated = vacated_of(attributes.worker);
  const std::vector<Tensor> results = vacated->take(values);
  std::vector<OpArray> arrays;
  for (int i = 0; i < count; ++i) arrays.push_back({values[i].data(), results[i].data(), values[i].bytes()});
  const Outcome outcome =
      core->call(attributes.worker, attributes.call.c_str(), rates_of(rates), arrays.data(), arrays.size(), &since);
  for (int i = 0; i < count && status.ok(); ++i) TF_SetOutput(context, i, results[i].tensor, status);
  if (outcome == Outcome::gone)
    leave(attributes.worker);
  else
    vacated->keep(std::move(values));
  if (status.ok()) set_scalar(context, count, TF_INT64, since, status);
  if (status.ok())
    set_scalar(context, count + 1, TF_BOOL, static_cast<unsigned char>(outcome != Outcome::done), status);
  if (!status.ok()) TF_OpKernelContext_Failure(context, status);
} catch (const std::exception& error) {
  fail(context, error.what());
}

/// HvdAgnStart: as HvdAgnExchange, for a call that changes no values.
void start(void* kernel, TF_OpKernelContext* context) try {
  const auto& attributes = *static_cast<const Attributes*>(kernel);
  const Status status;
  const int count = TF_NumInputs(context) - 2;
  const std::vector<Tensor> values = inputs(context, count, status);
  auto since = status.ok() ? scalar<std::int64_t>(context, count, status) : 0;
  const Tensor rates = status.ok() ? input(context, count + 1, status) : Tensor();
  if (!status.ok()) return TF_OpKernelContext_Failure(context, status);
  std::vector<OpArray> arrays;
  for (const Tensor& value : values) arrays.push_back({value.data(), nullptr, value.bytes()});
  if (core->call(attributes.worker, attributes.call.c_str(), rates_of(rates), arrays.data(), arrays.size(), &since) !=
      Outcome::done)
    return fail_with_kept(context, attributes.worker);
  set_scalar(context, 0, TF_INT64, since, status);
  if (!status.ok()) TF_OpKernelContext_Failure(context, status);
} catch (const std::exception& error) {
  fail(context, error.what());
}

/// HvdAgnAccumulate: gradients of the arrays in `places`, of `arrays` arrays in all.
void accumulate(void* kernel, TF_OpKernelContext* context) try {
  const auto& attributes = *static_cast<const Attributes*>(kernel);
  const Status status;
  const std::vector<Tensor> gradients = inputs(context, TF_NumInputs(context), status);
  if (!status.ok()) return TF_OpKernelContext_Failure(context, status);
  std::vector<OpArray> arrays(static_cast<std::size_t>(attributes.arrays));
  for (std::size_t i = 0; i < gradients.size(); ++i)
    arrays.at(static_cast<std::size_t>(attributes.places.at(i))) = {gradients[i].data(), nullptr, gradients[i].bytes()};
  if (core->accumulate(attributes.worker, arrays.data(), arrays.size()) != Outcome::done)
    fail_with_kept(context, attributes.worker);
} catch (const std::exception& error) {
  fail(context, error.what());
}

/// HvdAgnReady: whether there is something to merge.
void ready(void* kernel, TF_OpKernelContext* context) {
  const auto& attributes = *static_cast<const Attributes*>(kernel);
  const Status status;
  const bool due = scalar<unsigned char>(context, 0, status) != 0;
  if (status.ok())
    set_scalar(context, 0, TF_BOOL, static_cast<unsigned char>(core->ready(attributes.worker, due)), status);
  if (!status.ok()) TF_OpKernelContext_Failure(context, status);
}

/// HvdAgnRaise: the error that was kept, if there is one.
void raise(void* kernel, TF_OpKernelContext* context) {
  const Status status;
  const bool failed = scalar<unsigned char>(context, 0, status) != 0;
  if (!status.ok()) return TF_OpKernelContext_Failure(context, status);
  if (failed) fail_with_kept(context, static_cast<const Attributes*>(kernel)->worker);
}

// ---- shapes

void scalar_shape(TF_ShapeInferenceContext* context, int index, TF_Status* status) {
  TF_ShapeHandle* shape = TF_ShapeInferenceContextScalar(context);
  TF_ShapeInferenceContextSetOutput(context, index, shape, status);
  TF_DeleteShapeHandle(shape);
}

void exchange_shapes(TF_ShapeInferenceContext* context, TF_Status* status) {
  const int count = static_cast<int>(TF_ShapeInferenceContextNumInputs(context)) - 2;
  for (int i = 0; i < count && TF_GetCode(status) == TF_OK; ++i) {
    TF_ShapeHandle* shape = TF_NewShapeHandle();
    TF_ShapeInferenceContextGetInput(context, i, shape, status);
    if (TF_GetCode(status) == TF_OK) TF_ShapeInferenceContextSetOutput(context, i, shape, status);
    TF_DeleteShapeHandle(shape);
  }
  for (int i = count; i < count + 2 && TF_GetCode(status) == TF_OK; ++i) scalar_shape(context, i, status);
}

void one_scalar(TF_ShapeInferenceContext* context, TF_Status* status) {
  scalar_shape(context, 0, status);
}

void no_shapes(TF_ShapeInferenceContext*, TF_Status*) {}

// ---- registration, when the library is loaded

void define(const char* name, const std::vector<const char*>& attributes, const std::vector<const char*>& inputs,
            const std::vector<const char*>& outputs, void (*shapes)(TF_ShapeInferenceContext*, TF_Status*),
            void* (*create)(TF_OpKernelConstruction*), void (*compute)(void*, TF_OpKernelContext*)) {
  const Status status;
  TF_OpDefinitionBuilder* op = TF_NewOpDefinitionBuilder(name);
  for (const char* spec : attributes) TF_OpDefinitionBuilderAddAttr(op, spec);
  for (const char* spec : inputs) TF_OpDefinitionBuilderAddInput(op, spec);
  for (const char* spec : outputs) TF_OpDefinitionBuilderAddOutput(op, spec);
  TF_OpDefinitionBuilderSetIsStateful(op, true);
  TF_OpDefinitionBuilderSetShapeInferenceFunction(op, shapes);
  TF_RegisterOpDefinition(op, status);
  TF_RegisterKernelBuilder(name, TF_NewKernelBuilder(name, "CPU", create, compute, &remove), status);
}

#define HVD_AGN_FLOATS "T: list({float, double, half, bfloat16}) >= "

const bool defined = [] {
  define("HvdAgnExchange", {HVD_AGN_FLOATS "1", "worker: int", "call: string"},
         {"values: T", "since: int64", "rates: double"}, {"results: T", "left: int64", "failed: bool"},
         &exchange_shapes, &create<true, false>, &exchange);
  define("HvdAgnStart", {HVD_AGN_FLOATS "1", "worker: int", "call: string"},
         {"values: T", "since: int64", "rates: double"}, {"left: int64"}, &one_scalar, &create<true, false>, &start);
  define("HvdAgnAccumulate", {HVD_AGN_FLOATS "1", "worker: int", "places: list(int)", "arrays: int"}, {"gradients: T"},
         {}, &no_shapes, &create<false, true>, &accumulate);
  define("HvdAgnReady", {"worker: int"}, {"due: bool"}, {"ready: bool"}, &one_scalar, &create<false, false>, &ready);
  define("HvdAgnRaise", {"worker: int"}, {"failed: bool"}, {}, &no_shapes, &create<false, false>, &raise);
  return true;
}();

}  // namespace
}  // namespace hvd_agn

// ---- what Python calls, through ctypes

/// The address of a CoreCalls, before any op runs.
extern "C" __attribute__((visibility("default"))) void hvd_agn_connect(const void* calls) {
  hvd_agn::core = static_cast<const hvd_agn::CoreCalls*>(calls);
}

/// The worker has gone: so do the buffers that its variables have vacated.
extern "C" __attribute__((visibility("default"))) void hvd_agn_leave(std::int64_t worker) {
  hvd_agn::leave(worker);
}
