#include "mpi/comm.hpp"

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <numeric>
#include <thread>

namespace hvd_agn {

namespace {
constexpr double kNever = 3600.0;
constexpr int kBarrierTag = 1;
}  // namespace

void check(int code, int rank, const std::string& operation) {
  if (code == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING] = {};
  int length = 0;
  if (MPI_Error_string(code, text, &length) != MPI_SUCCESS) length = 0;
  throw MpiError(concat("[rank ", rank, "] ", operation, " failed: ", std::string(text, length), " (MPI error ", code,
                        "). `python -m hvd_agn check` shows what this MPI offers."));
}

void check_process(pid_t process, int rank) {
  HVD_AGN_EXPECTS(getpid() == process, UsageError, "[rank ", rank,
                  "] the center was created in another process, which this one was forked from. Use it there only.");
}

double StallWatch::next_event() const {
  double due = limits_.warn > 0 ? limits_.warn * (warnings_ + 1) : 1e300;
  if (limits_.abort > 0) due = std::min(due, limits_.abort);
  return due;
}

double StallWatch::next() const {
  return std::clamp(next_event() - seconds(), 0.0, kNever);
}

void StallWatch::report(const std::string& what) {
  const double waited = seconds();
  const bool over = limits_.abort > 0 && waited >= limits_.abort;
  const std::string text = concat("[rank ", rank_, "] hvd_agn: ", what, " (", static_cast<long>(waited), " s so far)");
  HVD_AGN_EXPECTS(!over, StallError, text, "; given up: HVD_AGN_STALL_ABORT_SECONDS=", limits_.abort);
  ++warnings_;
  std::fprintf(stderr, "%s\n", text.c_str());
  std::fflush(stderr);
}

Comm::Comm(MPI_Comm parent, StallLimits limits) : limits_(limits), process_(getpid()) {
  check(MPI_Comm_rank(MPI_COMM_WORLD, &rank_), -1, "MPI_Comm_rank");
  check(MPI_Comm_rank(parent, &index_), rank_, "MPI_Comm_rank");
  std::vector<MPI_Request> request = {MPI_REQUEST_NULL};
  check(MPI_Comm_idup(parent, &comm_, request.data()), rank_, "MPI_Comm_idup");
  wait(request, "waits for every rank to create its center; a rank that never does holds up the others", limits_,
       nullptr);
  check(MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN), rank_, "MPI_Comm_set_errhandler");
  check(MPI_Comm_size(comm_, &size_), rank_, "MPI_Comm_size");
  check(MPI_Comm_split_type(comm_, MPI_COMM_TYPE_SHARED, index_, MPI_INFO_NULL, &node_), rank_, "MPI_Comm_split_type");
  check(MPI_Comm_set_errhandler(node_, MPI_ERRORS_RETURN), rank_, "MPI_Comm_set_errhandler");
  check(MPI_Comm_rank(node_, &node_rank_), rank_, "MPI_Comm_rank");
  check(MPI_Comm_size(node_, &node_size_), rank_, "MPI_Comm_size");
  int first = index_;
  check(MPI_Bcast(&first, 1, MPI_INT, 0, node_), rank_, "MPI_Bcast");
  nodes_.resize(size_);
  check(MPI_Allgather(&first, 1, MPI_INT, nodes_.data(), 1, MPI_INT, comm_), rank_, "MPI_Allgather");
  find_world_ranks();
}

void Comm::find_world_ranks() {
  MPI_Group world = MPI_GROUP_NULL, group = MPI_GROUP_NULL;
  check(MPI_Comm_group(MPI_COMM_WORLD, &world), rank_, "MPI_Comm_group");
  check(MPI_Comm_group(comm_, &group), rank_, "MPI_Comm_group");
  std::vector<int> here(size_);
  std::iota(here.begin(), here.end(), 0);
  world_ranks_.resize(size_);
  check(MPI_Group_translate_ranks(group, size_, here.data(), world, world_ranks_.data()), rank_,
        "MPI_Group_translate_ranks");
  for (int rank = 0; rank < size_; ++rank)
    if (world_ranks_[rank] == MPI_UNDEFINED) world_ranks_[rank] = rank;  // of another MPI_COMM_WORLD: it was spawned
  check(MPI_Group_free(&group), rank_, "MPI_Group_free");
  check(MPI_Group_free(&world), rank_, "MPI_Group_free");
}

void Comm::wait(std::vector<MPI_Request>& requests, const std::string& what, StallLimits limits,
                const std::function<std::uint64_t()>& progress) {
  StallWatch watch(limits, rank_);
  std::uint64_t seen = progress ? progress() : 0;
  auto nap = std::chrono::microseconds(20);
  for (int done = 0;;) {
    check(MPI_Testall(static_cast<int>(requests.size()), requests.data(), &done, MPI_STATUSES_IGNORE), rank_,
          "MPI_Testall");
    if (done) return;
    if (progress && progress() != seen) {
      seen = progress();
      watch.restart();
    }
    watch.poll([&] { return what; });
    std::this_thread::sleep_for(nap);
    nap = std::min(nap * 2, std::chrono::microseconds(10000));
  }
}

void Comm::barrier(const std::string& what, StallLimits limits, const std::function<std::uint64_t()>& progress) {
  check_process(process_, rank_);
  HVD_AGN_EXPECTS(
      !given_up_, StallError, "[rank ", rank_, "] hvd_agn: ", what,
      ", which cannot be: this rank gave up an earlier wait for all ranks. End the job and start it again.");
  given_up_ = true;  // should a wait throw: the others still count this barrier, and the next would answer it
  // To rank 0 and back, so that nobody sends to a rank that does not come: MPICH 5.0.2 crashes in a send to one on
  // another node that has died, also within MPI_Ibarrier.
  std::vector<MPI_Request> requests(index_ == 0 ? size_ - 1 : 2, MPI_REQUEST_NULL);
  const auto receive = [&](int from, MPI_Request& request) {
    check(MPI_Irecv(nullptr, 0, MPI_BYTE, from, kBarrierTag, comm_, &request), rank_, "MPI_Irecv");
  };
  const auto send = [&](int to, MPI_Request& request) {
    check(MPI_Isend(nullptr, 0, MPI_BYTE, to, kBarrierTag, comm_, &request), rank_, "MPI_Isend");
  };
  if (index_ == 0) {
    for (int rank = 1; rank < size_; ++rank) receive(rank, requests[rank - 1]);
    wait(requests, what, limits, progress);
    for (int rank = 1; rank < size_; ++rank) send(rank, requests[rank - 1]);
  } else {
    receive(0, requests[0]);
    send(0, requests[1]);
  }
  wait(requests, what, limits, progress);
  given_up_ = false;
}

void Comm::free() {
  if (node_ != MPI_COMM_NULL) check(MPI_Comm_free(&node_), rank_, "MPI_Comm_free");
  if (comm_ != MPI_COMM_NULL) check(MPI_Comm_free(&comm_), rank_, "MPI_Comm_free");
}

std::string mpi_library_version() {
  char text[MPI_MAX_LIBRARY_VERSION_STRING] = {};
  int length = 0;
  check(MPI_Get_library_version(text, &length), -1, "MPI_Get_library_version");
  std::string version(text, length);
  while (!version.empty() && (version.back() == '\0' || version.back() == '\n')) version.pop_back();
  return version;
}

std::string mpi_thread_level() {
  int on = 0, off = 0, level = 0;
  check(MPI_Initialized(&on), -1, "MPI_Initialized");
  check(MPI_Finalized(&off), -1, "MPI_Finalized");
  if (!on || off) return "";
  check(MPI_Query_thread(&level), -1, "MPI_Query_thread");
  if (level == MPI_THREAD_MULTIPLE) return "multiple";
  if (level == MPI_THREAD_SERIALIZED) return "serialized";
  return level == MPI_THREAD_FUNNELED ? "funneled" : "single";
}

std::string path_of(std::uintptr_t address) {
  Dl_info info{};
  if (!dladdr(reinterpret_cast<void*>(address), &info) || !info.dli_fname) return "";
  return info.dli_fname;
}

std::uintptr_t mpi_init_address() {
  return reinterpret_cast<std::uintptr_t>(&MPI_Init);
}

}  // namespace hvd_agn
