// The host's end of the mailbox: what a request does to the shard, under the same block locks as the direct path.
#pragma once

#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "mailbox/mailbox.hpp"
#include "shard/groups.hpp"
#include "shard/shard.hpp"

namespace hvd_agn {

class Service : public Responder {
 public:
  /// `shard`: a view with a spare of its own.
  Service(std::unique_ptr<Shard> shard, const Layout& layout, const Groups& groups);

  bool respond(int worker, Message& head, std::byte* payload) override;
  std::string blocked(const Message& head) const override;

 private:
  /// The shard's values as a client has them; answers with `difference` tell it what has changed since.
  using Mirror = std::unique_ptr<std::byte[]>;

  /// `mask`: null if all parts are pushed. `rates_` are the push's.
  void push(int worker, Shard::Block& block, Message& head, std::byte* values, const std::byte* mask);
  void encode(int worker, Message& head, std::byte* values, std::byte* payload);
  /// Null if there is no memory for it.
  std::byte* mirror(int worker, const Message& head);

  std::unique_ptr<Shard> shard_;
  const Layout& layout_;
  const Groups& groups_;
  std::vector<double> rates_;
  std::vector<std::byte> values_;                            // of one block, in the center's types
  std::map<std::pair<int, std::uint32_t>, Mirror> mirrors_;  // by worker and client
};

/// A part with its slots stays as it was.
void keep_part(const Layout& layout, const Layout::Part& part, int slots, std::size_t slot_stride, const std::byte* in,
               std::byte* out);

/// Bits of a block's parts.
inline bool in_mask(const std::byte* mask, std::size_t part) {
  return (mask[part / 8] >> (part % 8) & std::byte{1}) != std::byte{0};
}

/// Bytes of an encoded block.
std::size_t encoded_bytes(const Layout& layout, std::size_t block, Wire wire);
/// A block's image in the center's types, to `wire`; the image becomes what was rounded away.
void encode_block(const Layout& layout, std::size_t block, Wire wire, std::byte* values, std::byte* out);
/// The other way; `add`: to the image.
void decode_block(const Layout& layout, std::size_t block, Wire wire, const std::byte* in, bool add, std::byte* values);

}  // namespace hvd_agn
