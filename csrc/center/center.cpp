#include "center/center.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "mailbox/service.hpp"

namespace hvd_agn {

namespace {

/// Those who work on a shard's memory: the ranks of its node, and the service that answers the others.
int users(const Plan& plan, std::size_t shard) {
  return static_cast<int>(plan.direct_ranks(shard).size()) + (plan.mailbox_ranks(shard).empty() ? 0 : 1);
}

std::size_t shard_bytes(const Plan& plan, const Layout& layout, std::size_t shard, int slots) {
  return Shard::memory_bytes(layout, plan.end(shard, layout.blocks()) - plan.begin(shard, layout.blocks()), slots,
                             users(plan, shard));
}

/// Planes to and from the image of a block: values, then slots.
template <bool kRead, class Image>
void copy_planes(const Layout& layout, std::size_t block, std::size_t slot_stride,
                 const std::vector<std::vector<void*>>& planes, Image image) {
  for (std::size_t plane = 0; plane < planes.size(); ++plane) {
    for (const Layout::Part* part = layout.begin(block); part != layout.end(block); ++part) {
      auto* inside = image + plane * slot_stride + part->block_offset;
      auto* outside =
          static_cast<std::byte*>(planes[plane][part->segment]) + part->first * item_size(layout.dtype(*part));
      if constexpr (kRead)
        std::memcpy(outside, inside, layout.bytes(*part));
      else
        std::memcpy(inside, outside, layout.bytes(*part));
    }
  }
}

/// Writes planes to a block's image; slots without a plane get what the rule begins with.
void fill(const Layout& layout, const Groups& groups, std::size_t block, const std::vector<std::vector<void*>>& planes,
          std::byte* image) {
  const int slots = groups.common().slots();
  std::memset(image, 0, round_up(layout.block_bytes() * (1 + slots), Layout::kAlignment));
  copy_planes<false>(layout, block, layout.block_bytes(), planes, image);
  if (planes.size() > 1 || slots == 0) return;
  for (const Layout::Part* part = layout.begin(block); part != layout.end(block); ++part) {
    std::byte* slot = image + layout.block_bytes() + part->block_offset;
    const double initial = groups.rule(*part).initial;
    if (layout.dtype(*part) == DType::f64)
      std::fill_n(reinterpret_cast<double*>(slot), part->count, initial);
    else
      std::fill_n(reinterpret_cast<float*>(slot), part->count, static_cast<float>(initial));
  }
}

/// Reads, or writes, the blocks of the shards on other nodes.
class Copy : public Transfer {
 public:
  Copy(const Layout& layout, const Groups& groups, const std::vector<std::vector<void*>>& planes, Message::Kind kind,
       std::uint64_t version, std::uint32_t epoch)
      : layout_(layout), groups_(groups), planes_(planes), kind_(kind), version_(version), epoch_(epoch) {}

  void request(Message& head, std::byte* payload) override {
    head.kind = kind_;
    head.version = version_;
    head.epoch = epoch_;
    head.looks = kind_ == Message::Kind::read;
    if (kind_ != Message::Kind::write) return;
    head.payload_bytes = round_up(layout_.block_bytes() * (1 + groups_.common().slots()), Layout::kAlignment);
    fill(layout_, groups_, head.block, planes_, payload);
  }
  void answer(const Message& head, const std::byte* payload) override {
    if (kind_ != Message::Kind::read) return;
    copy_planes<true>(layout_, head.block, layout_.block_bytes(), planes_, payload);
    version_ = std::max(version_, head.version);
  }
  std::uint64_t version() const { return version_; }

 private:
  const Layout& layout_;
  const Groups& groups_;
  const std::vector<std::vector<void*>>& planes_;
  Message::Kind kind_;
  std::uint64_t version_;  // to store; or the largest read
  std::uint32_t epoch_;
};

class BeginEpoch : public Transfer {
 public:
  explicit BeginEpoch(std::uint32_t epoch) : epoch_(epoch) {}
  void request(Message& head, std::byte*) override {
    head.kind = Message::Kind::epoch;
    head.epoch = epoch_;
  }
  void answer(const Message&, const std::byte*) override {}

 private:
  std::uint32_t epoch_;
};

class AskVersion : public Transfer {
 public:
  void request(Message& head, std::byte*) override { head.kind = Message::Kind::version; }
  void answer(const Message& head, const std::byte*) override { version = std::min(version, head.version); }
  bool once_per_shard() const override { return true; }
  std::uint64_t version = UINT64_MAX;
};

}  // namespace

std::size_t Center::memory_bytes(const Comm& comm, const Plan& plan, const Layout& layout, int slots, bool shared) {
  std::size_t bytes = 0;
  for (std::size_t shard = 0; shard < plan.shards(); ++shard) {
    if (!plan.same_node(comm.rank(), plan.host(shard))) continue;
    if (shared && plan.direct_ranks(shard).size() == 1) continue;
    bytes += shard_bytes(plan, layout, shard, slots);
  }
  return bytes;
}

Center::Center(Comm& comm, Plan plan, Layout layout, Groups groups)
    : plan_(std::move(plan)),
      layout_(std::move(layout)),
      groups_(std::move(groups)),
      rank_(comm.world_rank()),
      node_rank_(comm.node_rank()),
      node_size_(comm.node_size()) {
  const std::size_t blocks = layout_.blocks();
  const int here = comm.rank();
  HVD_AGN_EXPECTS(groups_.segments() == layout_.segments().size(), std::invalid_argument, "the center has ",
                  layout_.segments().size(), " arrays, not ", groups_.segments());
  allocate(comm);
  for (std::size_t shard = 0; shard < plan_.shards(); ++shard) {
    const std::size_t begin = plan_.begin(shard, blocks), end = plan_.end(shard, blocks);
    if (!plan_.direct(here, shard)) {
      remote_.emplace_back(begin, end);
      continue;
    }
    const auto view = [&, memory = memory_of(shard)](std::size_t user) {
      return std::make_unique<Shard>(memory, layout_, begin, end, rule().slots(), static_cast<int>(user), comm);
    };
    const std::vector<int> ranks = plan_.direct_ranks(shard);
    shards_.push_back(view(std::find(ranks.begin(), ranks.end(), here) - ranks.begin()));
    if (plan_.host(shard) != here) continue;
    shards_.back()->format(users(plan_, shard));
    if (!plan_.mailbox_ranks(shard).empty()) service_ = std::make_unique<Service>(view(ranks.size()), layout_, groups_);
  }
}

void Center::connect(Comm& comm, std::size_t ring) {
  if (plan_.mailboxes())
    mailbox_ = std::make_unique<Mailbox>(
        comm, plan_, layout_.blocks(),
        layout_.block_bytes() * (1 + rule().slots()) + layout_.mask_bytes() + groups_.rates() * sizeof(double), ring,
        std::move(service_));
}

void Center::allocate(const Comm& comm) {
  // The shards of a node lie in one window; a shard that nobody else maps, in private memory.
  std::size_t own = 0;
  bool shared = false;
  for (std::size_t shard = 0; shard < plan_.shards(); ++shard) {
    if (plan_.host(shard) == comm.rank()) own = shard_bytes(plan_, layout_, shard, rule().slots());
    shared |= plan_.same_node(plan_.host(shard), comm.rank()) && plan_.direct_ranks(shard).size() > 1;
  }
  if (shared) {
    void* base = nullptr;
    check(MPI_Win_allocate_shared(static_cast<MPI_Aint>(own), 1, MPI_INFO_NULL, comm.node(), &base, &window_), rank_,
          concat("MPI_Win_allocate_shared of ", own, " bytes"));
    check(MPI_Win_set_errhandler(window_, MPI_ERRORS_RETURN), rank_, "MPI_Win_set_errhandler");
    check(MPI_Win_lock_all(MPI_MODE_NOCHECK, window_), rank_, "MPI_Win_lock_all");
  } else if (own > 0) {
    void* base = mmap(nullptr, own, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) throw std::bad_alloc();
    private_ = base;
    private_bytes_ = own;
    use_huge_pages(base, own);
  }
}

void* Center::memory_of(std::size_t shard) const {
  if (window_ == MPI_WIN_NULL) return private_;
  int node_rank = 0;
  for (int rank = 0; rank < plan_.host(shard); ++rank) node_rank += plan_.same_node(rank, plan_.host(shard));
  MPI_Aint size = 0;
  int unit = 0;
  void* base = nullptr;
  check(MPI_Win_shared_query(window_, node_rank, &size, &unit, &base), rank_,
        concat("MPI_Win_shared_query of node rank ", node_rank));
  return base;
}

Center::~Center() {
  if (forked()) mailbox_.release();  // its thread, and what that waits on, are not here
  mailbox_.reset();                  // its thread uses the memory
  if (private_) munmap(private_, private_bytes_);
}

// ---- values

std::uint64_t Center::read(const std::vector<std::vector<void*>>& planes, std::uint32_t epoch) {
  std::uint64_t largest = 0;
  for (const auto& shard : shards_) {
    for (std::size_t b = shard->begin(); b < shard->end(); ++b) {
      const Shard::Block block = shard->lock(b, epoch, true);
      largest = std::max(largest, block.version());
      copy_planes<true>(layout_, b, shard->slot_stride(), planes, block.data());
    }
  }
  if (mailbox() == nullptr) return largest;
  Copy copy(layout_, groups_, planes, Message::Kind::read, largest, epoch);
  mailbox()->run(copy);
  return copy.version();
}

void Center::write(const std::vector<std::vector<void*>>& planes, std::uint64_t version, std::uint32_t epoch) {
  for (const auto& shard : shards_) {
    for (std::size_t b = shard->begin(); b < shard->end(); ++b) {
      Shard::Block block = shard->lock(b);
      fill(layout_, groups_, b, planes, block.spare());
      block.restore(version, epoch);
    }
  }
  if (mailbox() == nullptr) return;
  Copy copy(layout_, groups_, planes, Message::Kind::write, version, epoch);
  mailbox()->run(copy);
}

void Center::begin_epoch(std::uint32_t epoch) {
  for (const auto& shard : shards_)
    for (std::size_t b = shard->begin(); b < shard->end(); ++b) shard->lock(b).begin_epoch(epoch);
  if (mailbox() == nullptr) return;
  BeginEpoch begin(epoch);
  mailbox()->run(begin);
}

std::uint64_t Center::version() {
  std::uint64_t smallest = UINT64_MAX;
  for (const auto& shard : shards_) smallest = std::min(smallest, shard->version());
  if (mailbox() == nullptr) return smallest;
  AskVersion ask;
  mailbox()->run(ask);
  return std::min(smallest, ask.version);
}

std::uint64_t Center::recoveries() const {
  std::uint64_t sum = 0;
  for (const auto& shard : shards_) sum += shard->recoveries();
  return sum;
}

// ---- clients

std::uint32_t Center::enter_client() {
  check_process();
  const std::lock_guard<std::mutex> lock(clients_mutex_);
  const auto id = std::find(clients_.begin(), clients_.end(), false) - clients_.begin();
  if (static_cast<std::size_t>(id) == clients_.size()) clients_.push_back(false);
  clients_[id] = true;
  return static_cast<std::uint32_t>(id);
}

void Center::leave_client(std::uint32_t id) {
  const std::lock_guard<std::mutex> lock(clients_mutex_);
  clients_[id] = false;
}

// ---- end

void Center::detach() {
  for (const auto& shard : shards_) shard->detach();
}

void Center::free(Comm& comm) {
  const auto pushes = [this] {
    std::uint64_t sum = 0;
    for (const auto& shard : shards_) sum += shard->activity();
    return sum;
  };
  await_thread();
  // A rank that works on no shard itself does not see the others' pushes: its limit runs from its own end.
  comm.barrier("has ended and waits for the other ranks to end", comm.limits(), pushes);
  if (mailbox_) mailbox_->free();
  if (window_ == MPI_WIN_NULL) return;
  check(MPI_Win_unlock_all(window_), rank_, "MPI_Win_unlock_all");
  check(MPI_Win_free(&window_), rank_, "MPI_Win_free");
}

}  // namespace hvd_agn
