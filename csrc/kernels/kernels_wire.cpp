// The loops of messages and of overlap; compiled like kernels.cpp, once per instruction set.
#include "kernels/kernels_types.hpp"

namespace hvd_agn {
namespace HVD_AGN_ISA {
namespace {

template <class V, class T>
void delta_of(const void* theta, const void* anchor, T steps, const T* __restrict residual, T* __restrict out,
              std::size_t count) {
  const V* __restrict a = static_cast<const V*>(theta);
  const V* __restrict b = static_cast<const V*>(anchor);
  if (residual) {
    for (std::size_t i = 0; i < count; ++i) out[i] = (wide(a[i]) - wide(b[i])) / steps + residual[i];
  } else {
    for (std::size_t i = 0; i < count; ++i) out[i] = (wide(a[i]) - wide(b[i])) / steps;
  }
}

template <class T>
void gradient_of(const void* sum, T steps, const T* __restrict residual, T* __restrict out, std::size_t count) {
  const T* __restrict s = static_cast<const T*>(sum);
  if (residual) {
    for (std::size_t i = 0; i < count; ++i) out[i] = -(s[i] / steps) + residual[i];
  } else {
    for (std::size_t i = 0; i < count; ++i) out[i] = -(s[i] / steps);
  }
}

template <class V>
void merge_of(void* theta, const void* anchor, const void* snapshot, std::size_t count) {
  V* __restrict t = static_cast<V*>(theta);
  const V* __restrict c = static_cast<const V*>(anchor);
  const V* __restrict s = static_cast<const V*>(snapshot);
  for (std::size_t i = 0; i < count; ++i) narrow(wide(t[i]) + (wide(c[i]) - wide(s[i])), t + i);
}

// ---- wires

/// Largest finite value of a half type, as a float.
template <class H>
constexpr float kMost = 65504.0f;
template <>
constexpr float kMost<Bfloat> = 3.3895313892515355e38f;

inline float clamped(float value, float most) {
  const float low = value < -most ? -most : value;
  return low > most ? most : low;
}
inline float clamped(double value, float most) {
  const double low = value < -most ? -static_cast<double>(most) : value;
  return static_cast<float>(low > most ? static_cast<double>(most) : low);
}

template <class H, class T>
void encode_half(T* __restrict values, H* __restrict out, std::size_t count) {
  float chunk[kChunk];
  for (std::size_t i = 0; i < count; i += kChunk) {
    const std::size_t n = count - i < kChunk ? count - i : kChunk;
    for (std::size_t j = 0; j < n; ++j) chunk[j] = clamped(values[i + j], kMost<H>);
    store(chunk, out + i, n);
    load(out + i, chunk, n);
    for (std::size_t j = 0; j < n; ++j) values[i + j] -= static_cast<T>(chunk[j]);
  }
}

template <class H, class T>
void decode_half(const H* __restrict in, bool add, T* __restrict values, std::size_t count) {
  float chunk[kChunk];
  for (std::size_t i = 0; i < count; i += kChunk) {
    const std::size_t n = count - i < kChunk ? count - i : kChunk;
    load(in + i, chunk, n);
    if (add) {
      for (std::size_t j = 0; j < n; ++j) values[i + j] += static_cast<T>(chunk[j]);
    } else {
      for (std::size_t j = 0; j < n; ++j) values[i + j] = static_cast<T>(chunk[j]);
    }
  }
}

template <class T>
void encode_int8(T* __restrict values, std::byte* out, std::size_t count) {
  word<T> largest = 0;
  for (std::size_t i = 0; i < count; ++i) largest = larger(largest, magnitude(values[i]));
  const float most = clamped(bit_cast<T>(largest), kMost<Bfloat>);
  // Below this the reciprocal overflows: all is left for later.
  const bool tiny = most < 1e-36f;
  const float scale = tiny ? 0.0f : most / 127.0f;
  const float inverse = tiny ? 0.0f : 127.0f / most;
  __builtin_memcpy(out, &scale, sizeof scale);
  signed char* __restrict to = reinterpret_cast<signed char*>(out + sizeof scale);
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the rounded integer in the low bits
  for (std::size_t i = 0; i < count; ++i) {
    const float shifted = clamped(values[i], kMost<Bfloat>) * inverse + kRound;
    const auto integer = static_cast<std::int32_t>(bit_cast<std::uint32_t>(shifted) - bit_cast<std::uint32_t>(kRound));
    to[i] = static_cast<signed char>(integer);
    values[i] -= static_cast<T>(static_cast<float>(integer)) * static_cast<T>(scale);
  }
}

template <class T>
void decode_int8(const std::byte* in, bool add, T* __restrict values, std::size_t count) {
  float scale;
  __builtin_memcpy(&scale, in, sizeof scale);
  const signed char* __restrict from = reinterpret_cast<const signed char*>(in + sizeof scale);
  if (add) {
    for (std::size_t i = 0; i < count; ++i) values[i] += static_cast<T>(from[i]) * static_cast<T>(scale);
  } else {
    for (std::size_t i = 0; i < count; ++i) values[i] = static_cast<T>(from[i]) * static_cast<T>(scale);
  }
}

template <class T>
void encode_values(Wire wire, std::byte* values, std::byte* out, std::size_t count) {
  T* v = reinterpret_cast<T*>(values);
  if (wire == Wire::int8)
    encode_int8(v, out, count);
  else if (wire == Wire::fp16)
    encode_half(v, reinterpret_cast<Half*>(out), count);
  else
    encode_half(v, reinterpret_cast<Bfloat*>(out), count);
}

template <class T>
void decode_values(Wire wire, const std::byte* in, bool add, std::byte* values, std::size_t count) {
  T* v = reinterpret_cast<T*>(values);
  if (wire == Wire::int8)
    decode_int8(in, add, v, count);
  else if (wire == Wire::fp16)
    decode_half(reinterpret_cast<const Half*>(in), add, v, count);
  else
    decode_half(reinterpret_cast<const Bfloat*>(in), add, v, count);
}

template <class T>
void subtract_values(const std::byte* a, const std::byte* b, std::byte* out, std::size_t count) {
  const T* x = reinterpret_cast<const T*>(a);
  const T* y = reinterpret_cast<const T*>(b);
  T* __restrict z = reinterpret_cast<T*>(out);
  for (std::size_t i = 0; i < count; ++i) z[i] = x[i] - y[i];
}

}  // namespace

void delta(DType dtype, double steps, const Piece& p, const std::byte* residual) {
  const float k = static_cast<float>(steps);
  const float* left = reinterpret_cast<const float*>(residual);
  float* out = reinterpret_cast<float*>(p.out);
  if (!p.anchor) {
    if (dtype == DType::f64)
      return gradient_of<double>(p.theta, steps, reinterpret_cast<const double*>(residual),
                                 reinterpret_cast<double*>(p.out), p.count);
    return gradient_of<float>(p.theta, k, left, out, p.count);
  }
  switch (dtype) {
    case DType::f32:
      return delta_of<float>(p.theta, p.anchor, k, left, out, p.count);
    case DType::f16:
      return delta_of<Half>(p.theta, p.anchor, k, left, out, p.count);
    case DType::bf16:
      return delta_of<Bfloat>(p.theta, p.anchor, k, left, out, p.count);
    case DType::f64:
      return delta_of<double>(p.theta, p.anchor, steps, reinterpret_cast<const double*>(residual),
                              reinterpret_cast<double*>(p.out), p.count);
  }
}

void merge(DType dtype, const Piece& p, const void* snapshot) {
  switch (dtype) {
    case DType::f32:
      return merge_of<float>(p.theta, p.anchor, snapshot, p.count);
    case DType::f64:
      return merge_of<double>(p.theta, p.anchor, snapshot, p.count);
    case DType::f16:
      return merge_of<Half>(p.theta, p.anchor, snapshot, p.count);
    case DType::bf16:
      return merge_of<Bfloat>(p.theta, p.anchor, snapshot, p.count);
  }
}

void subtract(DType center, const std::byte* a, const std::byte* b, std::byte* out, std::size_t count) {
  center == DType::f64 ? subtract_values<double>(a, b, out, count) : subtract_values<float>(a, b, out, count);
}

void encode(DType center, Wire wire, std::byte* values, std::byte* out, std::size_t count) {
  center == DType::f64 ? encode_values<double>(wire, values, out, count)
                       : encode_values<float>(wire, values, out, count);
}

void decode(DType center, Wire wire, const std::byte* in, bool add, std::byte* values, std::size_t count) {
  center == DType::f64 ? decode_values<double>(wire, in, add, values, count)
                       : decode_values<float>(wire, in, add, values, count);
}

}  // namespace HVD_AGN_ISA
}  // namespace hvd_agn
