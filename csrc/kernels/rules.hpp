// What the center does with a pushed delta. Each rule is a pure function of one element and its slots; kernels.cpp
// makes a loop of it. hvd_agn/rules/kinds.py has the equations and their sources.
#pragma once

#include <cstdint>

namespace hvd_agn {

class Function;

/// A rule with its hyper-parameters, as hvd_agn/rules/kinds.py describes them.
struct Rule {
  enum class Kind : std::uint8_t {
    add,
    sgd,
    momentum,
    adam,
    adagrad,
    rmsprop,
    lion,
    delayed_nesterov,
    elastic,
    custom
  };
  enum class Staleness : std::uint8_t { none, inverse, sqrt };

  Kind kind = Kind::add;
  Staleness staleness = Staleness::none;
  bool nesterov = false;    // momentum
  bool decoupled = false;   // adam: decay as AdamW
  bool own_count = false;   // adam: bias correction with the worker's own count
  bool eps_hat = false;     // adam: epsilon is added to sqrt(v) before its correction
  bool centered = false;    // rmsprop
  bool buffered = false;    // rmsprop: keeps a momentum, be it 0
  bool eps_inside = false;  // adagrad, rmsprop: sqrt(square + eps)
  bool follow = false;      // the learning rate comes with the push
  bool gap_aware = false;   // a delta counts less where the center has moved far since its worker pulled
  double scale = 1;         // add; elastic: alpha
  double lr = 0, weight_decay = 0;
  double momentum = 0, dampening = 0;
  double beta1 = 0, beta2 = 0;  // adam, lion; rmsprop: beta2 is its alpha
  double eps = 0, lr_decay = 0;
  double initial = 0;  // of every element of slot 0
  std::uint64_t every = 1;
  double clip_norm = 0;                // of a worker's whole delta; 0: none
  const Function* function = nullptr;  // custom; whoever makes the rule keeps it
  int function_slots = 0;

  /// Arrays of the center's size that the rule keeps at the center. With gap_aware one more, the last: the mean square
  /// of the center's moves.
  int slots() const { return own_slots() + gap_aware; }
  int own_slots() const {
    switch (kind) {
      case Kind::add:
      case Kind::sgd:
      case Kind::elastic:
        return 0;
      case Kind::momentum:
      case Kind::adagrad:
      case Kind::lion:
        return 1;
      case Kind::adam:
      case Kind::delayed_nesterov:
        return 2;
      case Kind::rmsprop:
        return 1 + centered + buffered;
      case Kind::custom:
        return function_slots;
    }
    return 0;
  }
  /// Whether it takes apply_staged(), and not one pass.
  bool staged() const { return gap_aware || kind == Kind::custom; }
  /// Whether a worker pushes its parameters, and not how far they have come.
  bool pushes_values() const { return kind == Kind::elastic; }
  /// Of a push that does not know of `missed` others.
  double weight(std::uint64_t missed) const {
    const double all = static_cast<double>(missed) + 1;
    return staleness == Staleness::none ? 1 : 1 / (staleness == Staleness::inverse ? all : __builtin_sqrt(all));
  }
};

/// What a push brings besides the delta. Times `weight` it is what the rule is given.
struct Push {
  double steps = 1;  // delta = (theta - anchor) / steps, where the delta is still to be taken
  double weight = 1;
  std::uint64_t version = 0;  // pushes that the block has had
  double lr = 0;              // of the worker, for a rule that follows it
  double power = 0;           // of the worker: its steps and its pushes, this one among them
};

}  // namespace hvd_agn
