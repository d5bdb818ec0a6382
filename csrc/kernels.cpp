// Compiled once per instruction set, with HVD_AGN_ISA naming the namespace. Nothing here may instantiate inline
// functions of other headers: the linker could keep the copy that a lesser processor cannot run.
#include "kernels.hpp"

#if defined(__F16C__)
#include <immintrin.h>
#endif

#define HVD_AGN_TEXT2(x) #x
#define HVD_AGN_TEXT(x) HVD_AGN_TEXT2(x)

namespace hvd_agn {
namespace HVD_AGN_ISA {
namespace {

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

template <class T>
struct Word;
template <>
struct Word<float> {
  using type = std::uint32_t;
  static constexpr type kMagnitude = 0x7fffffffu, kInfinite = 0x7f800000u, kLarge = 0x7e800000u;  // 2^126
};
template <>
struct Word<double> {
  using type = std::uint64_t;
  static constexpr type kMagnitude = 0x7fffffffffffffffu, kInfinite = 0x7ff0000000000000u,
                        kLarge = 0x7fd0000000000000u;  // 2^1022
};

template <class T>
using word = typename Word<T>::type;

// Magnitudes are compared as integers: that orders NaN above all and vectorises without relaxed floating point.
template <class T>
inline word<T> magnitude(T value) {
  return bit_cast<word<T>>(value) & Word<T>::kMagnitude;
}
template <class W>
inline W larger(W a, W b) {
  return a > b ? a : b;
}
template <class T>
inline Range range_of(word<T> largest) {
  if (largest >= Word<T>::kInfinite) return Range::nonfinite;
  return largest >= Word<T>::kLarge ? Range::large : Range::normal;
}

// ---- half types: converted in chunks that stay in the first-level cache, so that every loop below is float or double

struct Half {
  std::uint16_t bits;
};
struct Bfloat {
  std::uint16_t bits;
};
constexpr std::size_t kChunk = 512;

inline float to_float(Bfloat value) {
  return bit_cast<float>(static_cast<std::uint32_t>(value.bits) << 16);
}
inline void from_float(float value, Bfloat* out) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(value);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out->bits = static_cast<std::uint16_t>(is_nan ? (bits >> 16) | 0x40u : rounded);
}

#if defined(__aarch64__)
inline float to_float(Half value) {
  return static_cast<float>(bit_cast<__fp16>(value.bits));
}
inline void from_float(float value, Half* out) {
  out->bits = bit_cast<std::uint16_t>(static_cast<__fp16>(value));
}
#else
inline float to_float(Half value) {
  // Shift into float's fields, then scale by 2^112, which also normalises subnormals; infinities and NaN keep theirs.
  const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
  const std::uint32_t rest = static_cast<std::uint32_t>(value.bits & 0x7fffu) << 13;
  const float scaled = bit_cast<float>(rest) * 5.192296858534828e33f;  // 2^112
  const std::uint32_t special = rest >= 0x0f800000u ? 0x7f800000u : 0u;
  return bit_cast<float>(sign | special | bit_cast<std::uint32_t>(scaled));
}
inline void from_float(float value, Half* out) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t size = bits & 0x7fffffffu;
  std::uint32_t half;
  if (size > 0x7f800000u) {
    half = 0x7e00u | ((size >> 13) & 0x3ffu);
  } else if (size >= 0x477ff000u) {  // rounds to 65536 or more
    half = 0x7c00u;
  } else if (size < 0x38800000u) {  // subnormal: let the adder round at 2^-24
    half = bit_cast<std::uint32_t>(bit_cast<float>(size) + 0.5f) - 0x3f000000u;
  } else {
    half = (size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13;
  }
  out->bits = static_cast<std::uint16_t>(sign | half);
}
#endif

template <class H>
void load(const H* from, float* to, std::size_t count) {
  std::size_t i = 0;
#if defined(__F16C__)
  if constexpr (__is_same(H, Half))
    for (; i + 8 <= count; i += 8)
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
  for (; i < count; ++i) to[i] = to_float(from[i]);
}

template <class H>
void store(const float* from, H* to, std::size_t count) {
  std::size_t i = 0;
#if defined(__F16C__)
  if constexpr (__is_same(H, Half))
    for (; i + 8 <= count; i += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < count; ++i) from_float(from[i], to + i);
}

// ---- the fused pass

template <class R, class T>
word<T> fused(const R& rule, T steps, T* __restrict theta, T* __restrict anchor, const T* __restrict in,
              T* __restrict out, std::size_t stride, std::size_t count) {
  const T* __restrict slot_in = R::kSlots ? in + stride : in;
  T* __restrict slot_out = R::kSlots ? out + stride : out;
  word<T> largest = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const T delta = (theta[i] - anchor[i]) / steps;
    T slot = T(0);
    const T next = rule(in[i], delta, slot_in + i, &slot);
    if constexpr (R::kSlots > 0) {
      slot_out[i] = slot;
      largest = larger(largest, magnitude(slot));
    }
    out[i] = next;
    theta[i] = next;
    anchor[i] = next;
    largest = larger(largest, magnitude(next));
  }
  return largest;
}

template <class R, class H>
word<float> fused_half(const R& rule, float steps, H* theta, H* anchor, const float* in, float* out, std::size_t stride,
                       std::size_t count) {
  float wide_theta[kChunk], wide_anchor[kChunk];
  word<float> largest = 0;
  for (std::size_t i = 0; i < count; i += kChunk) {
    const std::size_t n = count - i < kChunk ? count - i : kChunk;
    load(theta + i, wide_theta, n);
    load(anchor + i, wide_anchor, n);
    largest = larger(largest, fused(rule, steps, wide_theta, wide_anchor, in + i, out + i, stride, n));
    // The anchor is the center as this worker sees it, rounded: the rounding is not a delta.
    store(wide_theta, theta + i, n);
    __builtin_memcpy(anchor + i, theta + i, n * sizeof(H));
  }
  return largest;
}

template <template <class> class R>
Range exchange_rule(DType dtype, const Rule& rule, bool first, double steps, const Piece& p) {
  if (dtype == DType::f64) {
    return range_of<double>(fused(R<double>(rule, first), steps, static_cast<double*>(p.theta),
                                  static_cast<double*>(p.anchor), reinterpret_cast<const double*>(p.in),
                                  reinterpret_cast<double*>(p.out), p.slot_stride / sizeof(double), p.count));
  }
  const R<float> apply(rule, first);
  const float k = static_cast<float>(steps);
  const float* in = reinterpret_cast<const float*>(p.in);
  float* out = reinterpret_cast<float*>(p.out);
  const std::size_t stride = p.slot_stride / sizeof(float);
  word<float> largest;
  if (dtype == DType::f32) {
    largest = fused(apply, k, static_cast<float*>(p.theta), static_cast<float*>(p.anchor), in, out, stride, p.count);
  } else if (dtype == DType::f16) {
    largest = fused_half(apply, k, static_cast<Half*>(p.theta), static_cast<Half*>(p.anchor), in, out, stride, p.count);
  } else {
    largest =
        fused_half(apply, k, static_cast<Bfloat*>(p.theta), static_cast<Bfloat*>(p.anchor), in, out, stride, p.count);
  }
  return range_of<float>(largest);
}

Range exchange(DType dtype, const Rule& rule, bool first, double steps, const Piece& p) {
  switch (rule.kind) {
    case Rule::Kind::add:
      return exchange_rule<Add>(dtype, rule, first, steps, p);
    case Rule::Kind::sgd:
      return exchange_rule<Sgd>(dtype, rule, first, steps, p);
    case Rule::Kind::momentum:
      return exchange_rule<Momentum>(dtype, rule, first, steps, p);
  }
  __builtin_unreachable();
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

Range pull(DType dtype, const Piece& p) {
  const std::size_t bytes = p.count * item_size(dtype);
  if (dtype == DType::f16)
    store(reinterpret_cast<const float*>(p.in), static_cast<Half*>(p.theta), p.count);
  else if (dtype == DType::bf16)
    store(reinterpret_cast<const float*>(p.in), static_cast<Bfloat*>(p.theta), p.count);
  else
    __builtin_memcpy(p.theta, p.in, bytes);
  if (p.anchor) __builtin_memcpy(p.anchor, p.theta, bytes);
  if (dtype == DType::f64) return range_of<double>(largest_of(reinterpret_cast<const double*>(p.in), p.count));
  return range_of<float>(largest_of(reinterpret_cast<const float*>(p.in), p.count));
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

inline float wide(float value) {
  return value;
}
inline double wide(double value) {
  return value;
}
inline float wide(Half value) {
  return to_float(value);
}
inline float wide(Bfloat value) {
  return to_float(value);
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
const Kernels set = {HVD_AGN_TEXT(HVD_AGN_ISA), exchange, pull, scan, finite_delta, widen};

}  // namespace HVD_AGN_ISA
}  // namespace hvd_agn
