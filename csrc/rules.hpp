// What the center does with a pushed delta. Each rule is a pure function of one element; kernels.cpp makes a loop of
// it.
#pragma once

#include <cstdint>

namespace hvd_agn {

/// A rule with its hyper-parameters, as hvd_agn/rules.py describes them.
struct Rule {
  enum class Kind : std::uint8_t { add, sgd, momentum };
  Kind kind = Kind::add;
  double scale = 1;                                              // add
  double lr = 0, momentum = 0, dampening = 0, weight_decay = 0;  // sgd, momentum
  bool nesterov = false;

  /// Arrays of the center's size that the rule keeps at the center.
  int slots() const { return kind == Kind::momentum ? 1 : 0; }
};

/// center + scale * delta (Hermans et al. 2017, section 3, with scale 1).
template <class T>
struct Add {
  static constexpr int kSlots = 0;
  T scale;
  Add(const Rule& rule, bool /*first*/) : scale(static_cast<T>(rule.scale)) {}
  T operator()(T center, T delta, const T*, T*) const { return center + scale * delta; }
};

/// SGD at the center with -delta as the gradient (Douillard et al. 2023, algorithm 1), in the order of operations of
/// torch.optim.SGD.
template <class T>
struct Sgd {
  static constexpr int kSlots = 0;
  T lr, weight_decay;
  Sgd(const Rule& rule, bool /*first*/)
      : lr(static_cast<T>(rule.lr)), weight_decay(static_cast<T>(rule.weight_decay)) {}
  T operator()(T center, T delta, const T*, T*) const {
    const T gradient = -delta + weight_decay * center;
    return center - lr * gradient;
  }
};

/// As Sgd, with a momentum slot. As in torch the first push sets it to the gradient, without dampening.
template <class T>
struct Momentum {
  static constexpr int kSlots = 1;
  T lr, weight_decay, momentum, keep, from_gradient, from_slot;
  Momentum(const Rule& rule, bool first)
      : lr(static_cast<T>(rule.lr)),
        weight_decay(static_cast<T>(rule.weight_decay)),
        momentum(static_cast<T>(rule.momentum)),
        keep(first ? T(1) : static_cast<T>(1 - rule.dampening)),
        from_gradient(rule.nesterov ? T(1) : T(0)),
        from_slot(rule.nesterov ? static_cast<T>(rule.momentum) : T(1)) {}
  T operator()(T center, T delta, const T* slot_in, T* slot_out) const {
    const T gradient = -delta + weight_decay * center;
    const T slot = momentum * *slot_in + keep * gradient;
    *slot_out = slot;
    return center - lr * (from_gradient * gradient + from_slot * slot);
  }
};

}  // namespace hvd_agn
