// The rules' arithmetic: each a pure function of one element and its slots, of which kernels.cpp makes a loop. Included
// there only, compiled once per instruction set.
#pragma once

#include "kernels/rules.hpp"

namespace hvd_agn {
namespace HVD_AGN_ISA {
namespace {

/// center + scale * delta.
template <class T>
struct Add {
  static constexpr int kSlots = 0;
  T scale;
  Add(const Rule& rule, const Push&) : scale(static_cast<T>(rule.scale)) {}
  T operator()(T center, T delta, T*) const { return center + scale * delta; }
};

/// The others take -delta as their gradient.
template <class T>
struct Descent {
  double rate;
  T lr, weight_decay;
  Descent(const Rule& rule, const Push& push)
      : rate(rule.follow ? push.lr : rule.lr),
        lr(static_cast<T>(rate)),
        weight_decay(static_cast<T>(rule.weight_decay)) {}
  T gradient(T center, T delta) const { return -delta + weight_decay * center; }
};

/// In the order of operations of torch.optim.SGD.
template <class T>
struct Sgd : Descent<T> {
  static constexpr int kSlots = 0;
  using Descent<T>::Descent;
  T operator()(T center, T delta, T*) const { return center - this->lr * this->gradient(center, delta); }
};

/// As in torch the first push sets the slot to the gradient, without dampening.
template <class T>
struct Momentum : Descent<T> {
  static constexpr int kSlots = 1;
  T momentum, keep, from_gradient, from_slot;
  Momentum(const Rule& rule, const Push& push)
      : Descent<T>(rule, push),
        momentum(static_cast<T>(rule.momentum)),
        keep(push.version == 0 ? T(1) : static_cast<T>(1 - rule.dampening)),
        from_gradient(rule.nesterov ? T(1) : T(0)),
        from_slot(rule.nesterov ? static_cast<T>(rule.momentum) : T(1)) {}
  T operator()(T center, T delta, T* slots) const {
    const T gradient = this->gradient(center, delta);
    slots[0] = momentum * slots[0] + keep * gradient;
    return center - this->lr * (from_gradient * gradient + from_slot * slots[0]);
  }
};

inline float root(float value) {
  return __builtin_sqrtf(value);
}
inline double root(double value) {
  return __builtin_sqrt(value);
}

/// Slots: exp_avg, exp_avg_sq.
template <class T>
struct Adam : Descent<T> {
  static constexpr int kSlots = 2;
  T keep, from_gradient, from_square, step, scale, eps;
  Adam(const Rule& rule, const Push& push)
      : Descent<T>(rule, push),
        keep(T(1)),
        from_gradient(static_cast<T>(1 - rule.beta1)),
        from_square(static_cast<T>(1 - rule.beta2)),
        eps(static_cast<T>(rule.eps)) {
    const double t = rule.own_count ? push.power : static_cast<double>(push.version + 1);
    const double correction1 = 1 - __builtin_pow(rule.beta1, t);
    const double correction2 = __builtin_sqrt(1 - __builtin_pow(rule.beta2, t));
    // lr / correction1 * m / (sqrt(v) / correction2 + eps), or with epsilon hat lr * correction2 / correction1 * m /
    // (sqrt(v) + eps).
    step = static_cast<T>(this->rate * (rule.eps_hat ? correction2 : 1) / correction1);
    scale = static_cast<T>(rule.eps_hat ? 1 : 1 / correction2);
    if (rule.decoupled) {
      keep = static_cast<T>(1 - this->rate * rule.weight_decay);
      this->weight_decay = T(0);
    }
  }
  T operator()(T center, T delta, T* slots) const {
    const T gradient = this->gradient(center, delta);
    slots[0] = slots[0] + from_gradient * (gradient - slots[0]);
    slots[1] = slots[1] + from_square * (gradient * gradient - slots[1]);
    return keep * center - step * slots[0] / (root(slots[1]) * scale + eps);
  }
};

/// sqrt(square) + eps, or sqrt(square + eps).
template <class T>
struct Denominator {
  T inside, outside;
  explicit Denominator(const Rule& rule)
      : inside(static_cast<T>(rule.eps_inside ? rule.eps : 0)),
        outside(static_cast<T>(rule.eps_inside ? 0 : rule.eps)) {}
  T operator()(T square) const { return root(square + inside) + outside; }
};

/// Slot: sum of squares.
template <class T>
struct Adagrad : Descent<T> {
  static constexpr int kSlots = 1;
  Denominator<T> denominator;
  Adagrad(const Rule& rule, const Push& push) : Descent<T>(rule, push), denominator(rule) {
    this->lr = static_cast<T>(this->rate / (1 + static_cast<double>(push.version) * rule.lr_decay));
  }
  T operator()(T center, T delta, T* slots) const {
    const T gradient = this->gradient(center, delta);
    slots[0] = slots[0] + gradient * gradient;
    return center - this->lr * gradient / denominator(slots[0]);
  }
};

/// Slots: square_avg, then grad_avg if centered, then momentum_buffer if there is a momentum.
template <bool kCentered, bool kMomentum, class T>
struct Rmsprop : Descent<T> {
  static constexpr int kSlots = 1 + kCentered + kMomentum;
  T from_gradient, momentum;
  Denominator<T> denominator;
  Rmsprop(const Rule& rule, const Push& push)
      : Descent<T>(rule, push),
        from_gradient(static_cast<T>(1 - rule.beta2)),
        momentum(static_cast<T>(rule.momentum)),
        denominator(rule) {}
  T operator()(T center, T delta, T* slots) const {
    const T gradient = this->gradient(center, delta);
    slots[0] = slots[0] + from_gradient * (gradient * gradient - slots[0]);
    T square = slots[0];
    if constexpr (kCentered) {
      slots[1] = slots[1] + from_gradient * (gradient - slots[1]);
      square = square - slots[1] * slots[1];
      square = square > T(0) ? square : T(0);  // rounding may take it below
    }
    T step = gradient / denominator(square);
    if constexpr (kMomentum) step = slots[kSlots - 1] = momentum * slots[kSlots - 1] + step;
    return center - this->lr * step;
  }
};
template <class T>
using PlainRmsprop = Rmsprop<false, false, T>;
template <class T>
using CenteredRmsprop = Rmsprop<true, false, T>;
template <class T>
using MomentumRmsprop = Rmsprop<false, true, T>;
template <class T>
using CenteredMomentumRmsprop = Rmsprop<true, true, T>;

/// Slot: exp_avg.
template <class T>
struct Lion : Descent<T> {
  static constexpr int kSlots = 1;
  T keep, look, beta;
  Lion(const Rule& rule, const Push& push)
      : Descent<T>(rule, push),
        keep(static_cast<T>(1 - this->rate * rule.weight_decay)),
        look(static_cast<T>(1 - rule.beta1)),
        beta(static_cast<T>(1 - rule.beta2)) {}
  T operator()(T center, T delta, T* slots) const {
    const T towards = slots[0] + look * (-delta - slots[0]);
    slots[0] = slots[0] + beta * (-delta - slots[0]);
    const T sign = towards > T(0) ? T(1) : towards < T(0) ? T(-1) : T(0);
    return keep * center - this->lr * sign;
  }
};

/// Slots: momentum, sum of the gradients since it was last updated.
template <class T>
struct DelayedNesterov : Descent<T> {
  static constexpr int kSlots = 2;
  T momentum, share, from_slot, hold;
  DelayedNesterov(const Rule& rule, const Push& push)
      : Descent<T>(rule, push), share(static_cast<T>(1.0 / static_cast<double>(rule.every))) {
    const bool update = (push.version + 1) % rule.every == 0;
    momentum = update ? static_cast<T>(rule.momentum) : T(1);
    from_slot = update ? static_cast<T>(rule.momentum) : T(0);
    hold = update ? T(0) : T(1);
  }
  T operator()(T center, T delta, T* slots) const {
    const T gradient = this->gradient(center, delta);
    const T sum = slots[1] + gradient;
    slots[0] = momentum * slots[0] + (T(1) - hold) * (share * sum);
    slots[1] = hold * sum;
    return center - this->lr * (from_slot * slots[0] + share * gradient);
  }
};

/// Worker and center move towards each other. The value pushed is the worker's, and the worker's share of the move is
/// that of the center the other way.
template <class T>
struct Elastic {
  static constexpr int kSlots = 0;
  T alpha;
  Elastic(const Rule& rule, const Push& push) : alpha(static_cast<T>(rule.scale * push.weight)) {}
  T operator()(T center, T value, T*) const { return center + alpha * (value - center); }
  T worker(T center, T value) const { return value - alpha * (value - center); }
};

}  // namespace
}  // namespace HVD_AGN_ISA
}  // namespace hvd_agn
