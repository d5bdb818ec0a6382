// Compiled once per instruction set, with HVD_AGN_ISA naming the namespace. Nothing here may instantiate inline
// functions of other headers: the linker could keep the copy that a lesser processor cannot run.
#include "kernels/kernels_rules.hpp"
#include "kernels/kernels_types.hpp"

#define HVD_AGN_TEXT2(x) #x
#define HVD_AGN_TEXT(x) HVD_AGN_TEXT2(x)

namespace hvd_agn {
namespace HVD_AGN_ISA {
namespace {

// ---- the fused pass

/// What a loop over the center does with a worker's values.
enum class Pass {
  exchange,  // delta = (theta - anchor) / steps; theta = anchor = next
  keep,      // as exchange, but theta stays
  apart,     // as keep, and what theta would become goes elsewhere
  apply,     // delta = theta / steps; theta = next; no anchor
};

template <class R>
constexpr bool pushes_values(const R*) {
  return false;
}
template <class T>
constexpr bool pushes_values(const Elastic<T>*) {
  return true;
}

template <Pass kPass, class R, class T>
word<T> fused(const R& rule, T steps, T weight, T* __restrict theta, T* __restrict anchor, const T* __restrict in,
              T* __restrict out, std::size_t stride, std::size_t count) {
  constexpr bool kValues = pushes_values(static_cast<const R*>(nullptr));
  word<T> largest = 0;
  for (std::size_t i = 0; i < count; ++i) {
    T slots[R::kSlots + 1];
    for (int s = 0; s < R::kSlots; ++s) slots[s] = in[(s + 1) * stride + i];
    T delta;
    if constexpr (kValues)
      delta = theta[i];
    else if constexpr (kPass == Pass::apply)
      delta = theta[i] / steps;
    else
      delta = (theta[i] - anchor[i]) / steps;
    if constexpr (!kValues) delta *= weight;
    const T next = rule(in[i], delta, slots);
    for (int s = 0; s < R::kSlots; ++s) {
      out[(s + 1) * stride + i] = slots[s];
      largest = larger(largest, magnitude(slots[s]));
    }
    out[i] = next;
    T mine = next;
    if constexpr (kValues) mine = rule.worker(in[i], delta);
    if constexpr (kPass != Pass::keep) theta[i] = mine;
    if constexpr (kPass != Pass::apply) anchor[i] = mine;
    largest = larger(largest, magnitude(next));
  }
  return largest;
}

/// Past the cache, if `result` begins a line. In bursts so short that these stores go on beside the loads: takes no
/// longer than in place, but for the reads of what was just written, from the first-level cache.
template <class R, class T>
word<T> fused_apart(const R& rule, T steps, T weight, T* theta, T* anchor, const T* in, T* out, std::size_t stride,
                    T* result, std::size_t count) {
  constexpr std::size_t kBurst = 256 / sizeof(T);
  word<T> largest = 0;
  const auto go = [&](std::size_t i, std::size_t n) {
    largest =
        larger(largest, fused<Pass::keep>(rule, steps, weight, theta + i, anchor + i, in + i, out + i, stride, n));
  };
  const bool aligned = reinterpret_cast<std::uintptr_t>(result) % kLine == 0;
  std::size_t done = 0;
  for (; aligned && done + kBurst <= count; done += kBurst) {
    go(done, kBurst);
    stream_lines(anchor + done, result + done, kBurst * sizeof(T));
  }
  go(done, count - done);
  __builtin_memcpy(result + done, anchor + done, (count - done) * sizeof(T));
  end_stream();
  return largest;
}

template <Pass kPass, class R, class H>
word<float> fused_half(const R& rule, float steps, float weight, H* theta, H* anchor, const float* in, float* out,
                       std::size_t stride, H* result, std::size_t count) {
  float wide_theta[kChunk], wide_anchor[kChunk];
  word<float> largest = 0;
  for (std::size_t i = 0; i < count; i += kChunk) {
    const std::size_t n = count - i < kChunk ? count - i : kChunk;
    load(theta + i, wide_theta, n);
    load(anchor + i, wide_anchor, n);
    largest =
        larger(largest, fused<Pass::keep>(rule, steps, weight, wide_theta, wide_anchor, in + i, out + i, stride, n));
    // The anchor is the center as this worker sees it, rounded: the rounding is not a delta.
    store(wide_anchor, anchor + i, n);
    if constexpr (kPass == Pass::exchange) __builtin_memcpy(theta + i, anchor + i, n * sizeof(H));
    if constexpr (kPass == Pass::apart) __builtin_memcpy(result + i, anchor + i, n * sizeof(H));
  }
  return largest;
}

template <Pass kPass, class R, class T>
word<T> fused_plain(const R& rule, T steps, T weight, T* theta, T* anchor, const T* in, T* out, std::size_t stride,
                    T* result, std::size_t count) {
  if constexpr (kPass == Pass::apart)
    return fused_apart(rule, steps, weight, theta, anchor, in, out, stride, result, count);
  else
    return fused<kPass>(rule, steps, weight, theta, anchor, in, out, stride, count);
}

template <Pass kPass, template <class> class R>
Range pass_rule(DType dtype, const Rule& rule, const Push& push, const Piece& p, void* result) {
  if (dtype == DType::f64) {
    return range_of<double>(fused_plain<kPass>(R<double>(rule, push), push.steps, push.weight,
                                               static_cast<double*>(p.theta), static_cast<double*>(p.anchor),
                                               reinterpret_cast<const double*>(p.in), reinterpret_cast<double*>(p.out),
                                               p.slot_stride / sizeof(double), static_cast<double*>(result), p.count));
  }
  const R<float> apply(rule, push);
  const float k = static_cast<float>(push.steps), weight = static_cast<float>(push.weight);
  const float* in = reinterpret_cast<const float*>(p.in);
  float* out = reinterpret_cast<float*>(p.out);
  const std::size_t stride = p.slot_stride / sizeof(float);
  if constexpr (kPass != Pass::apply) {  // values to apply are of the center's type
    if (dtype == DType::f16)
      return range_of<float>(fused_half<kPass>(apply, k, weight, static_cast<Half*>(p.theta),
                                               static_cast<Half*>(p.anchor), in, out, stride,
                                               static_cast<Half*>(result), p.count));
    if (dtype == DType::bf16)
      return range_of<float>(fused_half<kPass>(apply, k, weight, static_cast<Bfloat*>(p.theta),
                                               static_cast<Bfloat*>(p.anchor), in, out, stride,
                                               static_cast<Bfloat*>(result), p.count));
  }
  return range_of<float>(fused_plain<kPass>(apply, k, weight, static_cast<float*>(p.theta),
                                            static_cast<float*>(p.anchor), in, out, stride, static_cast<float*>(result),
                                            p.count));
}

template <Pass kPass>
Range pass(DType dtype, const Rule& rule, const Push& push, const Piece& p, void* result) {
  switch (rule.kind) {
    case Rule::Kind::add:
      return pass_rule<kPass, Add>(dtype, rule, push, p, result);
    case Rule::Kind::sgd:
      return pass_rule<kPass, Sgd>(dtype, rule, push, p, result);
    case Rule::Kind::momentum:
      return pass_rule<kPass, Momentum>(dtype, rule, push, p, result);
    case Rule::Kind::adam:
      return pass_rule<kPass, Adam>(dtype, rule, push, p, result);
    case Rule::Kind::adagrad:
      return pass_rule<kPass, Adagrad>(dtype, rule, push, p, result);
    case Rule::Kind::rmsprop:
      if (rule.centered && rule.buffered)
        return pass_rule<kPass, CenteredMomentumRmsprop>(dtype, rule, push, p, result);
      if (rule.centered) return pass_rule<kPass, CenteredRmsprop>(dtype, rule, push, p, result);
      if (rule.buffered) return pass_rule<kPass, MomentumRmsprop>(dtype, rule, push, p, result);
      return pass_rule<kPass, PlainRmsprop>(dtype, rule, push, p, result);
    case Rule::Kind::lion:
      return pass_rule<kPass, Lion>(dtype, rule, push, p, result);
    case Rule::Kind::delayed_nesterov:
      return pass_rule<kPass, DelayedNesterov>(dtype, rule, push, p, result);
    case Rule::Kind::elastic:
      return pass_rule<kPass, Elastic>(dtype, rule, push, p, result);
    case Rule::Kind::custom:  // not a loop of ours: staged.cpp
      break;
  }
  __builtin_unreachable();
}

Range exchange(DType dtype, const Rule& rule, const Push& push, void* result, const Piece& p) {
  if (result == p.theta) return pass<Pass::exchange>(dtype, rule, push, p, result);
  return result ? pass<Pass::apart>(dtype, rule, push, p, result) : pass<Pass::keep>(dtype, rule, push, p, result);
}

Range apply(DType dtype, const Rule& rule, const Push& push, const Piece& p) {
  return pass<Pass::apply>(dtype, rule, push, p, nullptr);
}

// ---- the gap between a worker and the center

template <class V, class T>
void damp_by_gap(const Piece& p, std::size_t moved, T sum_of_weights) {
  constexpr T kTiny = T(1e-12);  // where nothing has moved yet
  T* __restrict delta = static_cast<T*>(p.theta);
  const V* __restrict anchor = static_cast<const V*>(p.anchor);
  const T* __restrict in = reinterpret_cast<const T*>(p.in);
  const T* __restrict squares = reinterpret_cast<const T*>(p.in + moved);
  for (std::size_t i = 0; i < p.count; ++i) {
    V as_received;
    narrow(in[i], &as_received);
    const T gap = wide(as_received) - wide(anchor[i]);
    delta[i] /= T(1) + (gap < T(0) ? -gap : gap) / (root(squares[i] / sum_of_weights) + kTiny);
  }
}

void damp(DType dtype, const Piece& p, std::size_t moved, double sum_of_weights) {
  switch (dtype) {
    case DType::f32:
      return damp_by_gap<float, float>(p, moved, static_cast<float>(sum_of_weights));
    case DType::f64:
      return damp_by_gap<double, double>(p, moved, sum_of_weights);
    case DType::f16:
      return damp_by_gap<Half, float>(p, moved, static_cast<float>(sum_of_weights));
    case DType::bf16:
      return damp_by_gap<Bfloat, float>(p, moved, static_cast<float>(sum_of_weights));
  }
}

template <class T>
Range remember_move(const Piece& p, std::size_t moved, T fresh) {
  const T* __restrict in = reinterpret_cast<const T*>(p.in);
  const T* __restrict before = reinterpret_cast<const T*>(p.in + moved);
  const T* __restrict out = reinterpret_cast<const T*>(p.out);
  T* __restrict after = reinterpret_cast<T*>(p.out + moved);
  word<T> largest = 0;
  for (std::size_t i = 0; i < p.count; ++i) {
    const T move = out[i] - in[i];
    after[i] = before[i] + fresh * (move * move - before[i]);
    largest = larger(largest, magnitude(after[i]));
  }
  return range_of<T>(largest);
}

Range remember(DType center, const Piece& p, std::size_t moved, double kept) {
  return center == DType::f64 ? remember_move<double>(p, moved, 1 - kept)
                              : remember_move<float>(p, moved, static_cast<float>(1 - kept));
}

// ---- pull

// Four readers a quarter apart keep more lines in flight than one: 1.4x the bandwidth of a plain loop on one core.
template <class T>
word<T> largest_of(const T* values, std::size_t count) {
  const std::size_t quarter = count / 4;
  const T *a = values, *b = a + quarter, *c = b + quarter, *d = c + quarter;
  word<T> largest = 0;
  for (std::size_t i = 0; i < quarter; ++i) {
    const word<T> ab = larger(magnitude(a[i]), magnitude(b[i]));
    const word<T> cd = larger(magnitude(c[i]), magnitude(d[i]));
    largest = larger(largest, larger(ab, cd));
  }
  for (std::size_t i = 4 * quarter; i < count; ++i) largest = larger(largest, magnitude(values[i]));
  return largest;
}

/// Copies to one or two places, and looks at the values on the way.
template <class T>
Range pull_plain(const Piece& p, bool past_cache) {
  constexpr std::size_t kAtOnce = 16384 / sizeof(T);  // read once from memory, then from the first-level cache
  const T* in = reinterpret_cast<const T*>(p.in);
  void* const places[] = {p.theta, p.anchor};
  word<T> largest = 0;
  for (std::size_t i = 0; i < p.count; i += kAtOnce) {
    const std::size_t n = p.count - i < kAtOnce ? p.count - i : kAtOnce;
    largest = larger(largest, largest_of(in + i, n));
    for (void* to : places) {
      if (!to) continue;
      if (past_cache)
        copy_past_cache(in + i, static_cast<T*>(to) + i, n * sizeof(T));
      else
        __builtin_memcpy(static_cast<T*>(to) + i, in + i, n * sizeof(T));
    }
  }
  return range_of<T>(largest);
}

template <class H>
Range pull_half(const Piece& p) {
  const float* in = reinterpret_cast<const float*>(p.in);
  H* to = static_cast<H*>(p.theta ? p.theta : p.anchor);
  store(in, to, p.count);
  if (p.theta && p.anchor) __builtin_memcpy(p.anchor, p.theta, p.count * sizeof(H));
  return range_of<float>(largest_of(in, p.count));
}

Range pull(DType dtype, const Piece& p, bool past_cache) {
  switch (dtype) {
    case DType::f32:
      return pull_plain<float>(p, past_cache);
    case DType::f64:
      return pull_plain<double>(p, past_cache);
    case DType::f16:
      return pull_half<Half>(p);
    case DType::bf16:
      return pull_half<Bfloat>(p);
  }
  __builtin_unreachable();
}

// ---- checks

template <class H>
word<float> largest_half(const H* values, std::size_t count) {
  float wide[kChunk];
  word<float> largest = 0;
  for (std::size_t i = 0; i < count; i += kChunk) {
    const std::size_t n = count - i < kChunk ? count - i : kChunk;
    load(values + i, wide, n);
    for (std::size_t j = 0; j < n; ++j) largest = larger(largest, magnitude(wide[j]));
  }
  return largest;
}

Range scan(DType dtype, const void* values, std::size_t count) {
  switch (dtype) {
    case DType::f32:
      return range_of<float>(largest_of(static_cast<const float*>(values), count));
    case DType::f64:
      return range_of<double>(largest_of(static_cast<const double*>(values), count));
    case DType::f16:
      return range_of<float>(largest_half(static_cast<const Half*>(values), count));
    case DType::bf16:
      return range_of<float>(largest_half(static_cast<const Bfloat*>(values), count));
  }
  __builtin_unreachable();
}

template <class T>
bool finite_difference(const void* theta, const void* anchor, std::size_t count) {
  const T* a = static_cast<const T*>(theta);
  const T* b = static_cast<const T*>(anchor);
  using W = decltype(wide(*a));
  word<W> largest = 0;
  for (std::size_t i = 0; i < count; ++i) largest = larger(largest, magnitude(wide(a[i]) - wide(b[i])));
  return largest < Word<W>::kInfinite;
}

bool finite_delta(DType dtype, const void* theta, const void* anchor, std::size_t count) {
  switch (dtype) {
    case DType::f32:
      return finite_difference<float>(theta, anchor, count);
    case DType::f64:
      return finite_difference<double>(theta, anchor, count);
    case DType::f16:
      return finite_difference<Half>(theta, anchor, count);
    case DType::bf16:
      return finite_difference<Bfloat>(theta, anchor, count);
  }
  __builtin_unreachable();
}

// Sums of their own, so that all instruction sets add in the same order.
template <class T>
double sum_of_squares(const void* theta, const void* anchor, std::size_t count) {
  constexpr std::size_t kSums = 8;
  const T* a = static_cast<const T*>(theta);
  const T* b = static_cast<const T*>(anchor);
  double sums[kSums] = {}, sum = 0;
  std::size_t i = 0;
  for (; i + kSums <= count; i += kSums) {
    for (std::size_t j = 0; j < kSums; ++j) {
      const double difference = b ? wide(a[i + j]) - wide(b[i + j]) : wide(a[i + j]);
      sums[j] += difference * difference;
    }
  }
  for (; i < count; ++i) {
    const double difference = b ? wide(a[i]) - wide(b[i]) : wide(a[i]);
    sums[i % kSums] += difference * difference;
  }
  for (const double each : sums) sum += each;
  return sum;
}

double distance(DType dtype, const Piece& p) {
  switch (dtype) {
    case DType::f32:
      return sum_of_squares<float>(p.theta, p.anchor, p.count);
    case DType::f64:
      return sum_of_squares<double>(p.theta, p.anchor, p.count);
    case DType::f16:
      return sum_of_squares<Half>(p.theta, p.anchor, p.count);
    case DType::bf16:
      return sum_of_squares<Bfloat>(p.theta, p.anchor, p.count);
  }
  __builtin_unreachable();
}

template <class V, class T>
void add_values(const void* values, T* __restrict sum, std::size_t count) {
  const V* __restrict v = static_cast<const V*>(values);
  for (std::size_t i = 0; i < count; ++i) sum[i] += wide(v[i]);
}

void accumulate(DType dtype, const void* values, void* sum, std::size_t count) {
  switch (dtype) {
    case DType::f32:
      return add_values<float>(values, static_cast<float*>(sum), count);
    case DType::f64:
      return add_values<double>(values, static_cast<double*>(sum), count);
    case DType::f16:
      return add_values<Half>(values, static_cast<float*>(sum), count);
    case DType::bf16:
      return add_values<Bfloat>(values, static_cast<float*>(sum), count);
  }
}

void widen(DType dtype, const void* values, std::byte* out, std::size_t count) {
  if (dtype == DType::f16)
    load(static_cast<const Half*>(values), reinterpret_cast<float*>(out), count);
  else if (dtype == DType::bf16)
    load(static_cast<const Bfloat*>(values), reinterpret_cast<float*>(out), count);
  else
    __builtin_memcpy(out, values, count * item_size(dtype));
}

}  // namespace

extern const Kernels set;
const Kernels set = {HVD_AGN_TEXT(HVD_AGN_ISA),
                     exchange,
                     apply,
                     damp,
                     remember,
                     pull,
                     copy_past_cache,
                     scan,
                     finite_delta,
                     distance,
                     accumulate,
                     widen,
                     delta,
                     merge,
                     subtract,
                     encode,
                     decode};

}  // namespace HVD_AGN_ISA
}  // namespace hvd_agn
