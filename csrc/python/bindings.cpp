// Python's view of the core: arguments, the GIL, exceptions; no logic. hvd_agn/_core.pyi is made from this file.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <map>

#include "center/center.hpp"
#include "center/exchange.hpp"
#include "kernels/limit.hpp"
#include "mpi/comm.hpp"
#include "python/op_calls.hpp"
#include "python/python_function.hpp"
#include "python/views.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace hvd_agn {
namespace {

using Array = nb::ndarray<nb::device::cpu>;
using Release = nb::call_guard<nb::gil_scoped_release>;

DType dtype_of(const nb::dlpack::dtype& type) {
  using Code = nb::dlpack::dtype_code;
  const auto is = [&](Code code, int bits) {
    return type.code == static_cast<std::uint8_t>(code) && type.bits == bits && type.lanes == 1;
  };
  if (is(Code::Float, 32)) return DType::f32;
  if (is(Code::Float, 64)) return DType::f64;
  if (is(Code::Float, 16)) return DType::f16;
  if (is(Code::Bfloat, 16)) return DType::bf16;
  throw nb::type_error("its type is none of float32, float64, float16, bfloat16");
}

bool contiguous(const Array& array) {
  std::int64_t expected = 1;
  if (array.size() == 0) return true;
  for (std::size_t i = array.ndim(); i-- > 0;) {
    if (array.shape(i) != 1 && array.stride(i) != expected) return false;
    expected *= static_cast<std::int64_t>(array.shape(i));
  }
  return true;
}

Buffer buffer_of(const Array& array) {
  const DType dtype = dtype_of(array.dtype());
  if (!contiguous(array)) throw nb::value_error("it is not contiguous (C order)");
  return {array.data(), array.size(), dtype};
}

/// Addresses of arrays that match the center's segments one by one.
std::vector<void*> plane(const Center& center, const std::vector<Array>& arrays) {
  const auto& segments = center.layout().segments();
  HVD_AGN_EXPECTS(arrays.size() == segments.size(), std::invalid_argument, "the center has ", segments.size(),
                  " arrays, not ", arrays.size());
  std::vector<void*> addresses;
  for (std::size_t s = 0; s < arrays.size(); ++s) {
    const Buffer buffer = buffer_of(arrays[s]);
    HVD_AGN_EXPECTS(buffer.count == segments[s].count && buffer.dtype == segments[s].dtype, std::invalid_argument,
                    "array ", s, " does not match the center's in size or type");
    addresses.push_back(buffer.data);
  }
  return addresses;
}

std::vector<std::vector<void*>> planes(const Center& center, const std::vector<std::vector<Array>>& arrays) {
  HVD_AGN_EXPECTS(arrays.size() <= 1u + center.rule().slots(), std::invalid_argument, "the rule has ",
                  center.rule().slots(), " slots, not ", arrays.size() - 1);
  std::vector<std::vector<void*>> result;
  for (const auto& of_plane : arrays) result.push_back(plane(center, of_plane));
  return result;
}

void* anchor_values(const Client& client, std::size_t segment, const Buffer& given) {
  const Buffer& own = client.buffers().at(segment);
  HVD_AGN_EXPECTS(given.count == own.count && given.dtype == own.dtype, std::invalid_argument, "array ", segment,
                  " does not match the registered one in size or type");
  return given.data;
}

Wire wire_of(const std::string& name) {
  if (name == "bf16") return Wire::bf16;
  if (name == "fp16") return Wire::fp16;
  if (name == "int8") return Wire::int8;
  HVD_AGN_EXPECTS(name == "none", std::invalid_argument, "no wire is called ", name);
  return Wire::center;
}

std::int64_t refusal(std::size_t segment) {
  static_assert(static_cast<std::int64_t>(Client::kAccepted) == -1 && static_cast<std::int64_t>(Client::kTooFar) == -2);
  return static_cast<std::int64_t>(segment);
}

nb::dict stats_dict(const Client& client) {
  Stats s;
  {
    const nb::gil_scoped_release release;
    s = client.stats();
  }
  std::uint64_t pushes = 0;
  nb::list histogram;
  for (const std::uint64_t n : s.staleness_histogram) pushes += n;
  std::size_t bins = Stats::kStalenessBins;
  while (bins > 0 && s.staleness_histogram[bins - 1] == 0) --bins;
  for (std::size_t i = 0; i < bins; ++i) histogram.append(s.staleness_histogram[i]);
  nb::dict d;
  d["exchanges"] = s.exchanges;
  d["pushes_refused"] = s.pushes_refused;
  d["blocks_refused"] = s.blocks_refused;
  d["pulls"] = s.pulls;
  d["staleness_mean"] = pushes ? static_cast<double>(s.staleness_sum) / static_cast<double>(pushes) : 0.0;
  d["staleness_max"] = s.staleness_max;
  d["staleness_histogram"] = histogram;
  d["exchange_seconds"] = s.seconds;
  d["bytes"] = s.bytes;
  d["wire_bytes"] = s.wire_bytes;
  d["center_version"] = s.center_version;
  return d;
}

/// The core's exceptions become those of hvd_agn/errors.py.
void use_python_errors() {
  // Translators live as long as the process.
  static PyObject *mpi_error, *stall_error, *usage_error, *rule_error, *restored_error;
  const nb::module_ errors = nb::module_::import_("hvd_agn.errors");
  mpi_error = errors.attr("MPIError").inc_ref().ptr();
  stall_error = errors.attr("StallError").inc_ref().ptr();
  usage_error = errors.attr("UsageError").inc_ref().ptr();
  rule_error = errors.attr("RuleError").inc_ref().ptr();
  restored_error = errors.attr("RestoredError").inc_ref().ptr();
  nb::register_exception_translator([](const std::exception_ptr& thrown, void*) {
    try {
      std::rethrow_exception(thrown);
    } catch (const MpiError& error) {
      PyErr_SetString(mpi_error, error.what());
    } catch (const StallError& error) {
      PyErr_SetString(stall_error, error.what());
    } catch (const UsageError& error) {
      PyErr_SetString(usage_error, error.what());
    } catch (const RuleError& error) {
      PyErr_SetString(rule_error, error.what());
    } catch (const RestoredError& error) {
      PyErr_SetString(restored_error, error.what());
    }
  });
}

/// Converts buffers to arrays in the center's dtypes.
void widen(const std::vector<Buffer>& buffers, const std::vector<Array>& arrays) {
  HVD_AGN_EXPECTS(buffers.size() == arrays.size(), std::invalid_argument, "buffers and arrays differ in length");
  for (std::size_t i = 0; i < buffers.size(); ++i) {
    const Buffer to = buffer_of(arrays[i]);
    HVD_AGN_EXPECTS(to.count == buffers[i].count && to.dtype == center_dtype(buffers[i].dtype), std::invalid_argument,
                    "array ", i, " does not match in size or type");
    kernels().widen(buffers[i].dtype, buffers[i].data, static_cast<std::byte*>(to.data), to.count);
  }
}

Rule rule_of(const std::string& kind, const nb::dict& hyper) {
  static const char* const kinds[] = {"add",     "sgd",  "momentum",         "adam",    "adagrad",
                                      "rmsprop", "lion", "delayed_nesterov", "elastic", "custom"};
  static const char* const by_staleness[] = {"none", "inverse", "sqrt"};
  static const std::map<std::string, bool Rule::*> flags = {
      {"nesterov", &Rule::nesterov}, {"decoupled", &Rule::decoupled}, {"own_count", &Rule::own_count},
      {"eps_hat", &Rule::eps_hat},   {"centered", &Rule::centered},   {"eps_inside", &Rule::eps_inside},
      {"follow", &Rule::follow},     {"gap_aware", &Rule::gap_aware}, {"buffered", &Rule::buffered}};
  static const std::map<std::string, double Rule::*> numbers = {
      {"scale", &Rule::scale},         {"lr", &Rule::lr},          {"weight_decay", &Rule::weight_decay},
      {"momentum", &Rule::momentum},   {"beta1", &Rule::beta1},    {"dampening", &Rule::dampening},
      {"beta2", &Rule::beta2},         {"eps", &Rule::eps},        {"lr_decay", &Rule::lr_decay},
      {"clip_norm", &Rule::clip_norm}, {"initial", &Rule::initial}};
  const auto index = [](const auto& names, const std::string& name) {
    const auto found = std::find(std::begin(names), std::end(names), name) - std::begin(names);
    HVD_AGN_EXPECTS(found < std::end(names) - std::begin(names), std::invalid_argument, "no ", name);
    return found;
  };
  Rule rule;
  rule.kind = static_cast<Rule::Kind>(index(kinds, kind));
  for (const auto& [key, value] : hyper) {
    const auto name = nb::cast<std::string>(key);
    if (const auto flag = flags.find(name); flag != flags.end())
      rule.*flag->second = nb::cast<bool>(value);
    else if (const auto number = numbers.find(name); number != numbers.end())
      rule.*number->second = nb::cast<double>(value);
    else if (name == "staleness")
      rule.staleness = static_cast<Rule::Staleness>(index(by_staleness, nb::cast<std::string>(value)));
    else if (name == "every")
      rule.every = nb::cast<std::uint64_t>(value);
    else if (name == "function")
      rule.function = nb::cast<const PythonFunction*>(value);
    else
      throw nb::key_error(name.c_str());
  }
  if (rule.function) rule.function_slots = rule.function->slots();
  return rule;
}

void bind_comm(nb::module_& m) {
  nb::class_<Comm>(m, "Comm", "The plugin's duplicate of a communicator.")
      .def(
          "__init__",
          [](Comm* self, std::uintptr_t handle, double warn, double abort) {
            // MPI_Comm is an int in MPICH and a pointer in Open MPI; mpi4py gives both as an integer.
            new (self) Comm((MPI_Comm)handle, StallLimits{warn, abort});
          },
          "handle"_a, "stall_seconds"_a, "stall_abort_seconds"_a, Release())
      .def_prop_ro("handle", [](const Comm& self) { return (std::uintptr_t)self.handle(); })
      .def_prop_ro("rank", &Comm::rank)
      .def_prop_ro("size", &Comm::size)
      .def_prop_ro("world_ranks", &Comm::world_ranks)
      .def_prop_ro("node_rank", &Comm::node_rank)
      .def_prop_ro("given_up", &Comm::given_up)
      .def_prop_ro("node_size", &Comm::node_size)
      .def_prop_ro("nodes", &Comm::nodes)
      .def(
          "barrier", [](Comm& self, const std::string& what) { self.barrier(what); }, "what"_a, Release())
      .def("free", &Comm::free, Release());
}

void bind_center(nb::module_& m) {
  nb::class_<PythonFunction>(m, "Function", "What a custom rule does to a piece of a block.")
      .def(nb::init<nb::callable, std::string, std::vector<std::string>>(), "function"_a, "name"_a, "slots"_a);
  nb::class_<Rule>(m, "Rule", "A rule's kind and hyper-parameters, by name.")
      .def(
          "__init__",
          [](Rule* self, const std::string& kind, const nb::dict& hyper) { new (self) Rule(rule_of(kind, hyper)); },
          "kind"_a, "hyper"_a, nb::keep_alive<1, 3>())
      .def_prop_ro("kind", [](const Rule& self) { return static_cast<int>(self.kind); })
      .def_prop_ro("slots", &Rule::slots)
      .def_prop_ro("pushes_values", &Rule::pushes_values);

  nb::class_<Layout>(m, "Layout", "Where the arrays lie in the center's blocks.")
      .def(
          "__init__",
          [](Layout* self, const std::vector<std::size_t>& counts, const std::vector<std::string>& dtypes,
             std::size_t block_bytes) {
            HVD_AGN_EXPECTS(counts.size() == dtypes.size(), std::invalid_argument,
                            "counts and dtypes differ in length");
            std::vector<Layout::Segment> segments;
            for (std::size_t i = 0; i < counts.size(); ++i)
              segments.push_back({counts[i], dtypes[i] == "float64" ? DType::f64 : DType::f32});
            new (self) Layout(std::move(segments), block_bytes);
          },
          "counts"_a, "dtypes"_a, "block_bytes"_a)
      .def_prop_ro("blocks", &Layout::blocks);

  nb::class_<Plan>(m, "Plan", "Which rank hosts what, and who reaches it how.")
      .def(nb::init<const Comm&, std::vector<int>, bool>(), "comm"_a, "hosts"_a, "mailbox_only"_a)
      .def("direct", &Plan::direct, "rank"_a, "shard"_a)
      .def(
          "memory_bytes",
          [](const Plan& self, const Comm& comm, const Layout& layout, const Rule& rule, bool shared) {
            return Center::memory_bytes(comm, self, layout, rule.slots(), shared);
          },
          "comm"_a, "layout"_a, "rule"_a, "shared"_a);

  nb::class_<Center>(m, "Center", "Shared parameters in the host's memory.")
      .def(
          "__init__",
          [](Center* self, Comm& comm, Plan plan, Layout layout, std::vector<Rule> rules,
             std::vector<std::uint32_t> of) {
            new (self) Center(comm, std::move(plan), std::move(layout), Groups(std::move(rules), std::move(of)));
          },
          "comm"_a, "plan"_a, "layout"_a, "rules"_a, "groups"_a, nb::keep_alive<1, 5>(), Release(),
          "`rules`: one per group; `groups`: of each array, its group.")
      .def("connect", &Center::connect, "comm"_a, "ring"_a, Release())
      .def("disconnect", &Center::disconnect, Release())
      .def(
          "read",
          [](Center& self, const std::vector<std::vector<Array>>& arrays, std::uint32_t epoch) {
            const auto to = planes(self, arrays);
            const nb::gil_scoped_release release;
            return self.read(to, epoch);
          },
          "planes"_a, "epoch"_a)
      .def(
          "write",
          [](Center& self, const std::vector<std::vector<Array>>& arrays, std::uint64_t version, std::uint32_t epoch) {
            const auto from = planes(self, arrays);
            const nb::gil_scoped_release release;
            self.write(from, version, epoch);
          },
          "planes"_a, "version"_a, "epoch"_a)
      .def("begin_epoch", &Center::begin_epoch, "epoch"_a, Release())
      .def("version", &Center::version, Release())
      .def_prop_ro("recoveries", &Center::recoveries)
      .def("detach", &Center::detach, Release())
      .def("await_thread", &Center::await_thread, Release())
      .def("free", &Center::free, "comm"_a, Release());
}

void bind_client(nb::module_& m) {
  nb::class_<Buffer>(m, "Buffer", "Address, size and type of a contiguous array.")
      .def(
          "__init__", [](Buffer* self, const Array& array) { new (self) Buffer(buffer_of(array)); }, "array"_a)
      .def_static(
          "of_bfloat16",
          [](const nb::ndarray<std::uint16_t, nb::c_contig, nb::device::cpu>& bits) {
            return Buffer{bits.data(), bits.size(), DType::bf16};
          },
          "bits"_a, "For an array library that has the type and does not pass it on.")
      .def_prop_ro("address", [](const Buffer& self) { return reinterpret_cast<std::uintptr_t>(self.data); })
      .def_ro("count", &Buffer::count)
      .def_prop_ro("nbytes", [](const Buffer& self) { return self.count * item_size(self.dtype); })
      .def_prop_ro("dtype", [](const Buffer& self) {
        static const char* const names[] = {"float32", "float64", "float16", "bfloat16"};
        return std::string(names[static_cast<int>(self.dtype)]);
      });

  nb::class_<Client>(m, "Client", "One worker's arrays and anchor.")
      .def(
          "__init__",
          [](Client* self, std::shared_ptr<Center> center, std::vector<Buffer> buffers, const std::string& wire,
             bool overlap, bool gradients, double max_norm, std::uint32_t epoch) {
            new (self)
                Client(std::move(center), std::move(buffers), {wire_of(wire), overlap, gradients, max_norm}, epoch);
          },
          "center"_a, "buffers"_a, "wire"_a, "overlap"_a, "gradients"_a, "max_norm"_a, "epoch"_a, Release())
      .def(
          "accumulate",
          [](Client& self, const std::vector<const Buffer*>& gradients) {
            const nb::gil_scoped_release release;
            self.accumulate(gradients);
          },
          "gradients"_a, nb::sig("def accumulate(self, gradients: collections.abc.Sequence[Buffer | None]) -> None"))
      .def_prop_ro("touched", &Client::touched)
      .def(
          "accumulator",
          [](nb::pointer_and_handle<Client> self, std::size_t index) {
            const Buffer sum = self.p->accumulator(index);
            const auto dtype = sum.dtype == DType::f64 ? nb::dtype<double>() : nb::dtype<float>();
            return nb::ndarray<nb::numpy>(sum.data, {sum.count}, self.h, {}, dtype);
          },
          "index"_a, "What is accumulated for an array, flat; the memory itself.")
      .def("touch", &Client::touch, "segments"_a, Release())
      .def("bind", &Client::bind, "index"_a, "buffer"_a, Release())
      .def("unbind", &Client::unbind, Release())
      .def(
          "exchange",
          [](Client& self, double steps, bool exact, std::vector<double> rates) {
            return refusal(self.exchange(steps, exact, std::move(rates)));
          },
          "steps"_a, "exact"_a, "rates"_a, Release(),
          "Index of the array whose delta was refused, -1 if none was, -2 if its norm was too large. `rates`: a "
          "learning rate per group, if a rule follows.")
      .def("start", &Client::start, "steps"_a, "rates"_a, Release())
      .def_prop_ro("started", &Client::started)
      .def_prop_ro("ready", &Client::ready)
      .def(
          "finish", [](Client& self) { return refusal(self.finish()); }, Release(), "As exchange().")
      .def_prop_ro("owes", &Client::owes, Release())
      .def("pull", &Client::pull, Release())
      .def("forget", &Client::forget, Release())
      .def("peek", &Client::peek, Release())
      .def(
          "read_anchor",
          [](const Client& self, std::size_t index, const Buffer& values) {
            self.read_anchor(index, anchor_values(self, index, values));
          },
          "index"_a, "values"_a, Release())
      .def(
          "read_snapshot",
          [](const Client& self, std::size_t index, const Buffer& values) {
            self.read_snapshot(index, anchor_values(self, index, values));
          },
          "index"_a, "values"_a, Release())
      .def(
          "write_anchor",
          [](Client& self, std::size_t index, const Buffer& values) {
            self.write_anchor(index, anchor_values(self, index, values));
          },
          "index"_a, "values"_a, Release())
      .def("close", &Client::close, Release())
      .def("stats", &stats_dict)
      .def_prop_ro("blocks_refused", &Client::blocks_refused)
      .def_prop_ro("refused_norm", &Client::refused_norm)
      .def_prop_ro("latest_version", &Client::latest_version)
      .def_prop_rw("epoch", &Client::epoch, &Client::set_epoch)
      .def_prop_rw("versions", &Client::versions, &Client::set_versions)
      .def_prop_rw("power", &Client::power, &Client::set_power)
      .def_prop_ro("extra_bytes", &Client::extra_bytes);
}

}  // namespace

NB_MODULE(_core, m) {
  m.doc() = "Native core of hvd_agn. Private: use hvd_agn.Center or hvd_agn.torch.AGNOptimizer.";
  use_python_errors();
  bind_comm(m);
  bind_center(m);
  bind_client(m);
  register_op_calls(m);
  register_views(m);

  m.def("widen", &widen, "buffers"_a, "arrays"_a, "Copies buffers to arrays in the center's dtypes.");
  nb::enum_<Stage>(m, "Stage", "Places of a pass at which a test can stop the process.")
      .value("none", Stage::none)
      .value("half_written", Stage::half_written)
      .value("written", Stage::written)
      .value("committed", Stage::committed);
  m.def("signal_at", &signal_at, "stage"_a, "block"_a, "signal"_a,
        "For tests: raise a signal, once, when this process reaches a stage of a pass over a block.");
  m.def("time_private_pass", &time_private_pass, "count"_a, "block_bytes"_a, "repeats"_a, "rule"_a, Release(),
        "Seconds of each run of the fused pass over private memory.");
  m.def("kernels", [] { return std::string(kernels().name); }, "Instruction set of the loops in use.");
  m.def("set_leak_warnings", &nb::set_leak_warnings, "on"_a, "Whether nanobind reports what is left at exit.");
  m.def("use_kernels", &use_kernels, "name"_a, "For tests: use another instruction set; false if it is not here.");
  m.def("compiler", [] { return std::string(HVD_AGN_COMPILER); }, "Compiler and flags of this build.");
  m.def("mpi_library_version", &mpi_library_version);
  m.def("mpi_thread_level", &mpi_thread_level);
  m.def("mpi_init_address", &mpi_init_address);
  m.def("path_of", &path_of, "address"_a);
  m.attr("message_format") = kMessageFormat;
  m.attr("cuda") = false;
}

}  // namespace hvd_agn
