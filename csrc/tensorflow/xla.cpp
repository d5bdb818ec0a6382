// The exchange inside a step that XLA has compiled: a custom call, which has the variables' memory itself. What it
// answers are results of the computation. With an error that is kept it does not fail, for XLA would drop the new
// values: Python looks for that error when the compiled function has ended.
#include <cstring>
#include <string>
#include <vector>

#include "tensorflow/calls.hpp"
#include "tensorflow/xla_ffi.hpp"

namespace hvd_agn {
namespace {

const CoreCalls* core = nullptr;

std::size_t item_bytes(int dtype) {
  constexpr int kF16 = 10, kF32 = 11, kF64 = 12, kBf16 = 16;
  return dtype == kF32 ? 4 : dtype == kF64 ? 8 : dtype == kF16 || dtype == kBf16 ? 2 : 0;
}

std::size_t bytes_of(const xla::Buffer& buffer) {
  std::size_t bytes = item_bytes(buffer.dtype);
  for (std::int64_t d = 0; d < buffer.rank; ++d) bytes *= static_cast<std::size_t>(buffer.dims[d]);
  return bytes;
}

/// The value of an attribute, null if there is none of that name.
const void* attribute(const xla::Attributes& attributes, const char* name) {
  for (std::int64_t i = 0; i < attributes.size; ++i) {
    const xla::Span& own = *attributes.names[i];
    if (std::string(own.data, own.size) == name) return attributes.values[i];
  }
  return nullptr;
}

xla::Error* failure(const xla::Frame& frame, const char* text) {
  xla::CreateError arguments = {sizeof(xla::CreateError), nullptr, text, xla::kInternal};
  return frame.api->create_error(&arguments);
}

/// Arguments: the variables, the updates since the last exchange, the learning rates. Results: the variables, those
/// updates after it.
xla::Error* exchange(xla::Frame* frame) {
  for (xla::Extension* e = frame->extensions; e; e = e->next) {
    if (e->type != xla::kMetadata) continue;
    xla::Metadata* metadata = reinterpret_cast<xla::MetadataExtension*>(e)->metadata;
    metadata->version.major = xla::kMajor;
    metadata->version.minor = xla::kMinor;
    return nullptr;
  }
  const auto* worker = static_cast<const xla::Scalar*>(attribute(frame->attributes, "worker"));
  const auto* what = static_cast<const xla::Span*>(attribute(frame->attributes, "call"));
  const std::int64_t count = frame->arguments.size - 2;
  if (!core || !worker || !what || count < 0 || frame->results.size != count + 1)
    return failure(*frame, "hvd_agn_exchange: the call is not the one that hvd_agn makes.");
  const auto argument = [&](std::int64_t i) { return static_cast<const xla::Buffer*>(frame->arguments.buffers[i]); };
  const auto result = [&](std::int64_t i) { return static_cast<const xla::Buffer*>(frame->results.buffers[i]); };
  std::vector<OpArray> arrays;
  for (std::int64_t i = 0; i < count; ++i)
    arrays.push_back({argument(i)->data, result(i)->data, bytes_of(*argument(i))});
  std::int64_t since;
  std::memcpy(&since, argument(count)->data, sizeof since);
  const xla::Buffer& last = *argument(count + 1);
  const Rates rates = {static_cast<const double*>(last.data), bytes_of(last) / sizeof(double)};
  const std::int64_t number = *static_cast<const std::int64_t*>(worker->value);
  if (core->call(number, std::string(what->data, what->size).c_str(), rates, arrays.data(), arrays.size(), &since) ==
      Outcome::gone) {
    char text[1024];
    core->raise(number, text, sizeof text);
    return failure(*frame, text);
  }
  std::memcpy(result(count)->data, &since, sizeof since);
  return nullptr;
}

}  // namespace
}  // namespace hvd_agn

/// `api`: what xla::ffi::GetXlaFfiApi() gives. Null, or why the handler cannot be registered.
extern "C" __attribute__((visibility("default"))) const char* hvd_agn_connect_xla(const void* calls, const void* api) {
  using namespace hvd_agn;
  core = static_cast<const CoreCalls*>(calls);
  const auto* xla_api = static_cast<const xla::Api*>(api);
  if (xla_api->version.major != xla::kMajor || xla_api->version.minor < xla::kMinor)
    return "its foreign function interface is of another version";
  static const char name[] = "hvd_agn_exchange", platform[] = "Host";
  xla::Register arguments = {sizeof(xla::Register),
                             nullptr,
                             {name, sizeof name - 1},
                             {platform, sizeof platform - 1},
                             nullptr,
                             nullptr,
                             nullptr,
                             &exchange,
                             0};
  xla::Error* error = xla_api->register_handler(&arguments);
  if (!error) return nullptr;
  xla::GetMessage message = {sizeof(xla::GetMessage), nullptr, error, nullptr};
  xla_api->get_message(&message);
  static std::string text;
  text = message.message;
  xla::DestroyError destroy = {sizeof(xla::DestroyError), nullptr, error};
  xla_api->destroy_error(&destroy);
  return text.c_str();
}
