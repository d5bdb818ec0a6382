// What the library of TensorFlow ops knows of the core. The two are linked to nothing of each other's: the core hands
// this table to hvd_agn_connect() when Python has loaded both.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hvd_agn {

/// One variable's value: read at `in`; what it becomes goes to `out`, which is null where nothing is to change.
struct OpArray {
  const void* in;
  void* out;
  std::size_t bytes;
};

/// Learning rates now, one per group of the worker's arrays; where none is followed, any.
struct Rates {
  const double* values;
  std::size_t count;
};

/// What became of a call: `kept`: the worker keeps an error for raise(); `gone`: there is no such worker any more.
enum class Outcome { done, kept, gone };

/// Functions throw nothing. A worker is a number that the core gave out; `text` of what failed ends with a zero.
struct CoreCalls {
  /// Calls the worker with its variables where they are now. `*since`: updates applied since its last exchange, before
  /// and after the call. `out` is complete whatever comes of it. Blocks as long as an exchange does.
  Outcome (*call)(std::int64_t worker, const char* what, Rates rates, const OpArray* arrays, std::size_t count,
                  std::int64_t* since);
  /// Adds gradients to those since the last exchange; `in` is null where there is none. Returns as call() does.
  Outcome (*accumulate)(std::int64_t worker, const OpArray* gradients, std::size_t count);
  /// Whether an exchange in the background has ended and waits to be merged. `due`: whether one is there at all.
  bool (*ready)(std::int64_t worker, bool due);
  /// The text of the error that the worker keeps.
  void (*raise)(std::int64_t worker, char* text, std::size_t capacity);
};

}  // namespace hvd_agn
