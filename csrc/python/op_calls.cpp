#include "python/op_calls.hpp"

#if defined(__SSE2__)
#include <immintrin.h>
#endif
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <cstdio>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "center/exchange.hpp"
#include "tensorflow/calls.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace hvd_agn {
namespace {

/// A worker whose arrays are a framework's variables, which the framework's ops bring with each call.
struct Worker {
  Client* client;     // of `owner`
  PyObject* owner;    // the Python object that holds the client
  PyObject* decides;  // called with what the op asks for, the updates and the rates; gives the updates left and a text
  std::mutex calls;   // one at a time: each brings the arrays
  std::atomic<std::thread::id> caller{};
  std::mutex mutex;  // of the text
  std::string kept;  // the error to be raised

  Worker(nb::handle client, nb::handle decides)
      : client(nb::cast<Client*>(client)), owner(client.inc_ref().ptr()), decides(decides.inc_ref().ptr()) {}
  ~Worker() {
    const nb::gil_scoped_acquire gil;
    Py_DECREF(owner);
    Py_DECREF(decides);
  }
  Outcome keep(std::string text) {
    const std::lock_guard<std::mutex> lock(mutex);
    kept = std::move(text);
    return Outcome::kept;
  }
};

/// Lives as long as the process: ops may still run while others of its objects go.
struct Registry {
  std::mutex mutex;
  std::int64_t next = 1;
  std::map<std::int64_t, std::shared_ptr<Worker>> workers;
};

Registry& registry() {
  static auto* made = new Registry;
  return *made;
}

std::shared_ptr<Worker> find(std::int64_t number) {
  const std::lock_guard<std::mutex> lock(registry().mutex);
  const auto found = registry().workers.find(number);
  return found == registry().workers.end() ? nullptr : found->second;
}

/// TensorFlow's threads take denormal numbers for zero. Within the object's life this one does as all others do: the
/// center gets the same bits from every framework. A thread that is started meanwhile inherits it.
class Denormals {
 public:
#if defined(__SSE2__)
  Denormals() : control_(_mm_getcsr()) { _mm_setcsr(control_ & ~kFlushAndZero); }
  ~Denormals() { _mm_setcsr(control_); }

 private:
  static constexpr unsigned kFlushAndZero = 0x8040;
  unsigned control_;
#elif defined(__aarch64__)
  Denormals() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(control_));
    __asm__ volatile("msr fpcr, %0" : : "r"(control_ & ~(std::uint64_t{1} << 24)));
  }
  ~Denormals() { __asm__ volatile("msr fpcr, %0" : : "r"(control_)); }

 private:
  std::uint64_t control_ = 0;
#endif
};

/// Asks Python, which calls the client; never throws what Python raised.
std::pair<std::int64_t, std::string> ask(const Worker& worker, const char* what, Rates rates, std::int64_t since) {
  const nb::gil_scoped_acquire gil;
  try {
    const std::vector<double> values(rates.values, rates.values + rates.count);
    return nb::cast<std::pair<std::int64_t, std::string>>(nb::handle(worker.decides)(what, since, values));
  } catch (nb::python_error& error) {  // a fault of ours: it keeps what it raises
    return {since, error.what()};
  }
}

/// This thread is in a call of the worker, for as long as the object lives.
class Caller {
 public:
  explicit Caller(std::atomic<std::thread::id>* caller) : caller_(caller) { *caller_ = std::this_thread::get_id(); }
  Caller(const Caller&) = delete;
  Caller& operator=(const Caller&) = delete;
  ~Caller() { *caller_ = std::thread::id(); }

 private:
  std::atomic<std::thread::id>* caller_;
};

/// Binds the variables to the client for as long as the object lives.
class Bound {
 public:
  Bound(Client& client, const OpArray* arrays, std::size_t count) : client_(client) {
    std::vector<const void*> data;
    std::vector<void*> results;
    bool apart = false;  // XLA may give the same memory for both
    for (std::size_t i = 0; i < count; ++i) {
      if (i < client.buffers().size()) {
        const Buffer& buffer = client.buffers()[i];
        HVD_AGN_EXPECTS(arrays[i].bytes == buffer.count * item_size(buffer.dtype), std::invalid_argument, "variable ",
                        i, " has ", arrays[i].bytes, " bytes, the center was made for ",
                        buffer.count * item_size(buffer.dtype));
      }
      data.push_back(arrays[i].in);
      if (arrays[i].out || arrays[i].bytes == 0) results.push_back(arrays[i].out);
      apart |= arrays[i].out != arrays[i].in;
    }
    if (results.size() < count || !apart) results.clear();
    client.bind_all(data, std::move(results));
  }
  Bound(const Bound&) = delete;
  Bound& operator=(const Bound&) = delete;
  ~Bound() { client_.unbind(); }

 private:
  Client& client_;
};

constexpr const char* kGone = "the optimizer of this function has been closed: used after close().";

/// For an error before anything was done: the variables stay as they are.
void keep_values(const OpArray* arrays, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i)
    if (arrays[i].out && arrays[i].bytes > 0) __builtin_memmove(arrays[i].out, arrays[i].in, arrays[i].bytes);
}

Outcome call(std::int64_t number, const char* what, Rates rates, const OpArray* arrays, std::size_t count,
             std::int64_t* since) {
  const auto worker = find(number);
  if (!worker) {
    keep_values(arrays, count);
    return Outcome::gone;
  }
  try {
    if (worker->caller == std::this_thread::get_id())
      return keep_values(arrays, count), worker->keep("called by what its own exchange has called.");
    const std::lock_guard<std::mutex> lock(worker->calls);
    const Caller caller(&worker->caller);
    const Denormals denormals;
    const Bound bound(*worker->client, arrays, count);
    auto [left, text] = ask(*worker, what, rates, *since);
    *since = left;
    return text.empty() ? Outcome::done : worker->keep(std::move(text));
  } catch (const std::exception& error) {
    keep_values(arrays, count);
    return worker->keep(error.what());
  }
}

Outcome accumulate(std::int64_t number, const OpArray* gradients, std::size_t count) {
  const auto worker = find(number);
  if (!worker) return Outcome::gone;
  try {
    const Denormals denormals;
    const auto& buffers = worker->client->buffers();
    std::vector<Buffer> given(count);
    std::vector<const Buffer*> places(count);
    for (std::size_t i = 0; i < count && i < buffers.size(); ++i) {
      if (!gradients[i].in) continue;
      given[i] = {const_cast<void*>(gradients[i].in), gradients[i].bytes / item_size(buffers[i].dtype),
                  buffers[i].dtype};
      places[i] = &given[i];
    }
    worker->client->accumulate(places);
    return Outcome::done;
  } catch (const std::exception& error) {
    return worker->keep(error.what());
  }
}

bool ready(std::int64_t number, bool due) {
  const auto worker = find(number);
  if (!worker) return true;  // the call that follows says so
  return worker->client->ready() || (due && worker->client->started());
}

void raise(std::int64_t number, char* text, std::size_t capacity) {
  const auto worker = find(number);
  std::string kept = kGone;
  if (worker) {
    const std::lock_guard<std::mutex> lock(worker->mutex);
    kept = std::move(worker->kept);
  }
  // The mark comes last, and has to be whole.
  const int room = static_cast<int>(capacity) - 48;
  std::snprintf(text, capacity, "%.*s [hvd_agn worker %lld]", room, kept.c_str(), static_cast<long long>(number));
}

const CoreCalls table = {&call, &accumulate, &ready, &raise};

}  // namespace

void register_op_calls(nb::module_& m) {
  m.def(
      "op_enter",
      [](nb::handle client, nb::callable decides) {
        auto worker = std::make_shared<Worker>(client, decides);
        const std::lock_guard<std::mutex> lock(registry().mutex);
        registry().workers.emplace(registry().next, std::move(worker));
        return registry().next++;
      },
      "client"_a, "decides"_a, nb::sig("def op_enter(client: Client, decides: collections.abc.Callable) -> int"),
      "A number by which ops find a worker.");
  m.def(
      "op_leave",
      [](std::int64_t number) {
        std::shared_ptr<Worker> left;  // goes without the lock
        const std::lock_guard<std::mutex> lock(registry().mutex);
        const auto found = registry().workers.find(number);
        if (found == registry().workers.end()) return;
        left = std::move(found->second);
        registry().workers.erase(found);
      },
      "number"_a, "Ops find it no more.");
  m.def("op_calls", [] { return reinterpret_cast<std::uintptr_t>(&table); }, "Address of what ops call.");
}

}  // namespace hvd_agn
