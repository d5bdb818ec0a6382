// The worker's end: its arrays, its anchor, and the exchange with the center.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <future>
#include <memory>
#include <mutex>
#include <vector>

#include "center/center.hpp"

namespace hvd_agn {

/// A contiguous array of the worker: one registered tensor.
struct Buffer {
  void* data;
  std::size_t count;  // elements
  DType dtype;
};

/// What a client has done so far.
struct Stats {
  static constexpr std::size_t kStalenessBins = 65;  // 0 ... 63, and all above

  std::uint64_t exchanges = 0;       // pushes accepted
  std::uint64_t pushes_refused = 0;  // deltas with NaN or Inf, or of too large a norm
  std::uint64_t blocks_refused = 0;  // blocks on which the rule overflowed, of accepted pushes
  std::uint64_t pulls = 0;
  std::uint64_t bytes = 0;       // of parameters, pushed and pulled
  std::uint64_t wire_bytes = 0;  // of payload, to and from other nodes
  double seconds = 0;            // in exchange() and pull()
  std::uint64_t staleness_max = 0;
  std::uint64_t staleness_sum = 0;                                  // over the pushes of all blocks
  std::array<std::uint64_t, kStalenessBins> staleness_histogram{};  // pushes of blocks, by staleness
  std::uint64_t center_version = 0;  // pushes that every block had; of other nodes' blocks, as last received
};

/// One worker of one center. Calls from several threads follow one another. No call is collective, and none allocates
/// in proportion to the arrays. Blocks that share memory with this process are exchanged by the calling thread; those
/// of other nodes meanwhile by the mailbox's, which calls the Transfers of exchange_remote.cpp.
class Client {
 public:
  static constexpr std::size_t kAccepted = static_cast<std::size_t>(-1);
  static constexpr std::size_t kTooFar = static_cast<std::size_t>(-2);

  struct Options {
    Wire wire = Wire::center;  // to and from other nodes
    bool overlap = false;      // allows start() and finish(), at the price of one more copy of the arrays
    bool gradients = false;    // pushes the mean of accumulated gradients, and not how far the buffers have come
    double max_norm = 0;       // of a push, the rule's clip_norm not yet applied; 0: any
  };

  /// Sets the buffers, one per segment of the center's layout, to the center. `epoch`: see set_epoch().
  Client(std::shared_ptr<Center> center, std::vector<Buffer> buffers, Options options, std::uint32_t epoch);
  Client(const Client&) = delete;
  Client& operator=(const Client&) = delete;
  ~Client();

  /// The segment's storage has moved. invalid_argument unless count and dtype are as they were.
  void bind(std::size_t segment, const Buffer& buffer);
  /// For arrays that move between calls: all of them are at `data` until unbind(), and what the first call that changes
  /// them makes of them goes to `results`, where they are from then on. Without `results` they are changed in place.
  void bind_all(const std::vector<const void*>& data, std::vector<void*> results);
  /// The arrays are nowhere; until the next bind_all() no call that needs them is possible. `results` that no call has
  /// filled get the arrays as they are.
  void unbind();

  /// With Options::gradients: adds a gradient of each segment, null where there is none. A segment that has had none
  /// since its last push takes no part in the next exchange. invalid_argument if one does not match its buffer.
  void accumulate(const std::vector<const Buffer*>& gradients);
  /// Segments that have had a gradient since their last push.
  std::vector<bool> touched() const { return {touched_.begin(), touched_.end()}; }
  /// What is accumulated for a segment, in the center's dtype; to be read, or added to and then told by touch().
  Buffer accumulator(std::size_t segment) const;
  void touch(const std::vector<bool>& segments);

  /// One exchange after `steps` local steps. Returns kAccepted, or a segment whose delta has a NaN or Inf, or
  /// kTooFar if its norm is above Options::max_norm, or more than a double holds where the rule needs it: then neither
  /// the center nor the buffers were touched. `exact`: in the center's type whatever the wire, with all that was
  /// rounded away before.
  /// `rates`: the worker's learning rates, as many as Groups::rates(), for rules that follow them.
  std::size_t exchange(double steps, bool exact, std::vector<double> rates);
  /// Something was rounded away and is still to be pushed.
  bool owes() const;

  /// Takes a snapshot of the buffers and exchanges that in the background.
  void start(double steps, std::vector<double> rates);
  /// Whether start() was called without finish(); whether finish() would not wait.
  bool started() const { return started_; }
  bool ready() const { return started_ && landed_; }
  /// Waits for the exchange that start() began; then buffers += center - snapshot. Returns as exchange() does: when
  /// the snapshot was refused, the buffers are not touched. Throws what went wrong in the background; then the steps
  /// of blocks that were not pushed are still in the buffers.
  std::size_t finish();

  /// Buffers and anchor become the center; what was accumulated is dropped.
  void pull();
  /// What was rounded away is not owed any more, what was accumulated is dropped.
  void forget();
  /// Buffers become the center; the anchor stays.
  void peek();

  /// Copies the anchor of a segment, in the buffer's dtype, to or from `values`. Reading waits for start()'s exchange
  /// to end.
  void read_anchor(std::size_t segment, void* values) const;
  void write_anchor(std::size_t segment, const void* values);
  /// With overlap, between start() and finish(): waits for the exchange to end; then what finish() will take from the
  /// anchor, and add the rest to the buffer.
  void read_snapshot(std::size_t segment, void* values) const;

  /// Waits for a call that is under way; every later one throws UsageError. The buffers may then go. In a forked child,
  /// nothing.
  void close();

  Stats stats() const;
  std::uint64_t blocks_refused() const;
  /// Of the last push that was refused for it.
  double refused_norm() const;
  /// Pushes that the block with the most has had, as last received.
  std::uint64_t latest_version() const;
  /// Steps and pushes so far, for a rule that counts by worker.
  double power() const { return power_; }
  void set_power(double power) { power_ = power; }
  /// The epoch of the center that the anchor belongs to. A call that finds a block in an earlier one waits for it, in a
  /// later one it throws RestoredError.
  std::uint32_t epoch() const { return epoch_; }
  void set_epoch(std::uint32_t epoch) { epoch_ = epoch; }
  /// Versions of the blocks as last pulled. Setting fewer or more sets them all to the largest.
  std::vector<std::uint64_t> versions() const;
  void set_versions(const std::vector<std::uint64_t>& versions);
  const std::vector<Buffer>& buffers() const { return buffers_; }
  /// Memory beyond the buffers, in bytes: the anchor, what overlap and wire need, and bookkeeping.
  std::size_t extra_bytes() const;

 private:
  class PushTransfer;
  class PullTransfer;
  /// Of a block, in the exchange under way.
  enum class Progress : std::uint8_t { untouched, sent, done };

  std::unique_lock<std::mutex> enter() const;
  std::unique_lock<std::mutex> enter_grounded(const char* call) const;
  void check_bound(const char* call) const;
  void set_rates(std::vector<double> rates);
  std::byte* target(const Layout::Part& part) const;
  void settle_results();
  void copy_to_results();
  void check_restored() const;
  std::size_t first_block(std::size_t begin, std::size_t end) const;
  bool finite_block(std::size_t block, std::size_t* segment) const;
  std::size_t find_nonfinite() const;
  double norm() const;
  std::size_t refuse(std::size_t why, double norm = 0);
  std::size_t exchange_all(double steps, bool exact);
  void exchange_shard(Shard& shard, const Push& push);
  void exchange_block(Shard& shard, Shard::Block block, std::size_t index, Push push);
  Range push_fused(Shard& shard, const Shard::Block& block, std::size_t index, const Push& push);
  Range push_staged(Shard& shard, const Shard::Block& block, std::size_t index, Push push);
  void copy_all(bool theta, bool anchor);
  Range copy_block(std::size_t block, const std::byte* from, std::size_t slot_stride, bool theta, bool anchor,
                   bool past_cache);
  void received(std::size_t block, std::uint64_t version, bool pushed, bool refused, Range range);

  // exchange_overlap.cpp
  std::size_t fly(double steps);
  void settle_untouched();

  // exchange_gradients.cpp
  void make_sums();
  void choose_active(bool exact);
  void set_sums_aside();
  void exchange_gradient(Shard& shard, const Shard::Block& block, const Layout::Part& part, Push push, Range* range);
  /// Whether it takes part in the exchange under way. On other nodes, what was rounded away is a reason too.
  bool active(std::size_t block, bool remote) const;
  bool active(const Layout::Part& part, bool remote) const {
    return !options_.gradients || (active_[part.segment] & (remote ? kTouched | kOwing : kTouched));
  }
  std::byte* accumulator(const Layout::Part& part) const;
  void drop_gradients();
  void drop_sums(std::size_t block, bool remote);
  void settle_gradients();
  Piece piece(const Layout::Part& part, const std::byte* in, std::byte* out) const;
  std::byte* source(const Layout::Part& part) const;
  std::byte* anchor(const Layout::Part& part) const;

  // exchange_remote.cpp
  void ask(Message& head) const;
  void take_delta(const Layout::Part& part, double steps, std::byte* values, const std::byte* residual) const;
  Range take(const Message& head, const std::byte* payload, bool theta, bool anchor);
  std::byte* residual(std::size_t block) const;

  mutable std::mutex mutex_;  // one call at a time
  bool closed_ = false;
  std::shared_ptr<Center> center_;
  std::atomic<std::uint32_t> epoch_;
  std::vector<Buffer> buffers_;
  bool bound_ = true;
  std::vector<void*> results_;  // by segment: where new values go, until they are there; empty: to the buffers
  Options options_;
  struct Leave {
    Center* center;
    std::uint32_t id;
    ~Leave() { center->leave_client(id); }
  } leave_;
  std::unique_ptr<std::byte[]> anchor_;
  std::size_t anchor_bytes_ = 0;
  std::vector<std::size_t> offset_;  // of each segment in anchor and snapshot
  std::size_t push_bytes_ = 0;
  bool past_cache_ = false;        // the arrays are more than a cache holds
  std::vector<double> rates_;      // learning rates of the exchange under way
  std::vector<std::size_t> busy_;  // blocks put off because another held them
  double power_ = 0;               // steps and pushes so far
  std::vector<std::byte> staged_;  // one block's delta, for a rule that takes several passes over it
  std::string failure_;            // what the rule's function first failed with, in the exchange under way

  std::unique_ptr<std::byte[]> snapshot_;  // with overlap
  bool from_snapshot_ = false;             // the exchange under way is start()'s
  std::future<std::size_t> flight_;
  std::atomic<bool> started_{false}, landed_{false};  // for looks from other threads

  // With gradients, all of the center's types, segments where `sum_offset_` says.
  std::unique_ptr<std::byte[]> sums_;         // accumulated since the last push
  std::unique_ptr<std::byte[]> flying_sums_;  // with overlap: of the snapshot
  std::vector<std::size_t> sum_offset_;
  std::size_t sum_bytes_ = 0;
  static constexpr std::uint8_t kTouched = 1, kOwing = 2;
  std::vector<std::uint8_t> touched_;      // by segment: has had a gradient since its last push
  std::vector<std::uint8_t> active_;       // by segment: takes part in the exchange under way
  std::vector<std::uint8_t> rounded_off_;  // by segment: has a residual
  std::vector<std::uint8_t> pushed_;       // by block: by an exchange that was cut short, and no gradient since

  // Of blocks on other nodes, with a wire that rounds.
  std::unique_ptr<std::byte[]> residual_;  // what was rounded away, as images of blocks
  std::size_t residual_bytes_ = 0;
  std::unique_ptr<std::byte[]> residual_before_;  // the same before the push under way, whose function may fail
  std::vector<std::byte> rounded_;                // one block, on its way to the wire
  std::atomic<bool> owes_{false};                 // set in the background too
  std::atomic<bool> restored_{false};             // a host has answered that the center was set to a checkpoint
  std::vector<std::uint8_t> whole_;               // the host cannot send this block as a difference

  mutable std::mutex counts_mutex_;     // of all below: this thread's and the mailbox's
  std::vector<std::uint64_t> seen_;     // version of each block as last pulled
  std::vector<Progress> progress_;      // of each block
  Range anchor_range_ = Range::normal;  // at least that of every element
  Range next_range_ = Range::normal;    // of the exchange under way
  double refused_norm_ = 0;
  Stats stats_;
};

}  // namespace hvd_agn
