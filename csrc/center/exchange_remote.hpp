// The worker's exchange with shards on other nodes: what it asks of each block, and what it does with the answers.
#pragma once

#include "center/exchange.hpp"

namespace hvd_agn {

class Client::PushTransfer : public Transfer {
 public:
  PushTransfer(Client& client, const Push& push, bool exact) : client_(client), push_(push), exact_(exact) {}
  bool wants(std::size_t block) const override;
  void request(Message& head, std::byte* payload) override;
  void answer(const Message& head, const std::byte* payload) override;
  void abandon(std::size_t block) override;

 private:
  Client& client_;
  Push push_;
  bool exact_;
};

class Client::PullTransfer : public Transfer {
 public:
  PullTransfer(Client& client, bool theta, bool anchor) : client_(client), theta_(theta), anchor_(anchor) {}
  void request(Message& head, std::byte* payload) override;
  void answer(const Message& head, const std::byte* payload) override;
  void abandon(std::size_t block) override;

 private:
  Client& client_;
  bool theta_, anchor_;
};

}  // namespace hvd_agn
