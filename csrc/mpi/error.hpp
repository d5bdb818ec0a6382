// Exceptions of the native core. bindings.cpp gives each one a Python type; a message says what is wrong and ends
// with the fix.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace hvd_agn {

/// An MPI call returned an error code.
struct MpiError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// A wait passed HVD_AGN_STALL_ABORT_SECONDS.
struct StallError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// A call that makes no sense in this process or now.
struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// The function of a custom rule has failed.
struct RuleError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// The center was set to a checkpoint that this rank has not loaded.
struct RestoredError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// The arguments in their text form, one after another.
template <class... Args>
std::string concat(const Args&... args) {
  std::ostringstream out;
  (out << ... << args);
  return out.str();
}

/// Throw Type with the concatenated message unless cond holds.
#define HVD_AGN_EXPECTS(cond, Type, ...)                     \
  do {                                                       \
    if (!(cond)) throw Type(::hvd_agn::concat(__VA_ARGS__)); \
  } while (false)

}  // namespace hvd_agn
