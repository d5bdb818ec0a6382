// The worker's exchange with shards on other nodes: what it asks of each block, and what it does with the answers.
#pragma once

#include "exchange.hpp"

namespace hvd_agn {

class Client::Push : public Transfer {
 public:
  Push(Client& client, double steps, bool exact) : client_(client), steps_(steps), exact_(exact) {}
  void request(Message& head, std::byte* payload) override;
  void answer(const Message& head, const std::byte* payload) override;
  void abandon(std::size_t block) override;

 private:
  Client& client_;
  double steps_;
  bool exact_;
};

class Client::Pull : public Transfer {
 public:
  Pull(Client& client, bool theta, bool anchor) : client_(client), theta_(theta), anchor_(anchor) {}
  void request(Message& head, std::byte* payload) override;
  void answer(const Message& head, const std::byte* payload) override;
  void abandon(std::size_t block) override;

 private:
  Client& client_;
  bool theta_, anchor_;
};

}  // namespace hvd_agn
