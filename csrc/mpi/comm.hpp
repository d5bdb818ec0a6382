// The plugin's own communicator, and waits that have a deadline.
#pragma once

#include <mpi.h>
#include <sys/types.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "mpi/error.hpp"

namespace hvd_agn {

/// Throws MpiError with MPI's own text when an MPI call failed.
void check(int code, int rank, const std::string& operation);

/// UsageError in a child that was forked from `process`, which alone can use what the message calls "the center".
void check_process(pid_t process, int rank);

/// How long a wait may last, in seconds: a warning every `warn`, an error after `abort`; 0 switches either off.
struct StallLimits {
  double warn = 0;
  double abort = 0;
};

/// Says on stderr that a wait is long, and gives up on it when the limits say so. One per wait.
class StallWatch {
 public:
  StallWatch(StallLimits limits, int rank) : limits_(limits), rank_(rank) {}

  /// There was progress: the limits run from now on.
  void restart() {
    start_ = std::chrono::steady_clock::now();
    warnings_ = 0;
  }

  /// Seconds until the next warning or error is due (an hour when there are none).
  double next() const;

  /// To be called while waiting. `what` names the wait ("waits for ...", with the fix); it is called only when a
  /// message is due. Throws StallError past the abort limit.
  template <class What>
  void poll(const What& what) {
    if (seconds() >= next_event()) report(what());
  }

 private:
  double seconds() const { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count(); }
  double next_event() const;
  void report(const std::string& what);

  StallLimits limits_;
  int rank_;
  int warnings_ = 0;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

/// A duplicate of the user's communicator, with errors returned instead of aborting, and the part of it on this node.
/// Not thread-safe: every call comes from the thread that built it.
class Comm {
 public:
  /// Collective over `parent`. Waits, asleep, until all ranks have come, or as the limits say.
  Comm(MPI_Comm parent, StallLimits limits);
  Comm(const Comm&) = delete;
  Comm& operator=(const Comm&) = delete;
  /// Frees nothing: that is collective, see free().
  ~Comm() = default;

  MPI_Comm handle() const { return comm_; }
  MPI_Comm node() const { return node_; }
  int rank() const { return index_; }
  int size() const { return size_; }
  /// Of this process in MPI_COMM_WORLD: what messages call it.
  int world_rank() const { return rank_; }
  /// The same of each rank; of one that is not in this process's MPI_COMM_WORLD, its rank here.
  const std::vector<int>& world_ranks() const { return world_ranks_; }
  int node_rank() const { return node_rank_; }
  int node_size() const { return node_size_; }
  /// Of each rank: the first rank on its node.
  const std::vector<int>& nodes() const { return nodes_; }
  StallLimits limits() const { return limits_; }
  /// Whether a barrier of this rank was given up, after which it can have no other.
  bool given_up() const { return given_up_; }

  /// Collective. Sleeps while it waits, so that a rank that idles does not take a core from those that train. After one
  /// that was given up, every later one throws StallError at once; in a forked child, UsageError.
  void barrier(const std::string& what) { barrier(what, limits_, nullptr); }
  /// `progress`: a count that shows that the others are at work; the stall limits run from its last change.
  void barrier(const std::string& what, StallLimits limits, const std::function<std::uint64_t()>& progress);

  /// Collective; no call may follow.
  void free();

 private:
  void find_world_ranks();
  void wait(std::vector<MPI_Request>& requests, const std::string& what, StallLimits limits,
            const std::function<std::uint64_t()>& progress);

  StallLimits limits_;
  MPI_Comm comm_ = MPI_COMM_NULL;
  MPI_Comm node_ = MPI_COMM_NULL;
  int rank_ = -1, index_ = -1, size_ = 0, node_rank_ = -1, node_size_ = 0;
  bool given_up_ = false;
  pid_t process_;
  std::vector<int> nodes_, world_ranks_;
};

/// Version text of the MPI library that this core is bound to.
std::string mpi_library_version();

/// Level that MPI runs at: "single", "funneled", "serialized" or "multiple"; "" before MPI_Init or after MPI_Finalize.
std::string mpi_thread_level();

/// Path of the shared object that holds this process's address, "" if none does.
std::string path_of(std::uintptr_t address);

/// Address of the MPI_Init that this core calls.
std::uintptr_t mpi_init_address();

}  // namespace hvd_agn
