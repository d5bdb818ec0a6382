// What both files of loops share: words of floating point, and the half types. Included inside no namespace, compiled
// once per instruction set; see kernels.cpp.
#pragma once

#include "kernels/kernels.hpp"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

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

// ---- stores past the cache: for more than it holds

constexpr std::size_t kLine = 64;

/// Whole lines, `to` at the start of one. With SSE2 the cache stays as it is, and what is overwritten is not read.
inline void stream_lines(const void* from, void* to, std::size_t bytes) {
#if defined(__SSE2__)
  constexpr std::size_t kAtOnce = sizeof(__m128) / sizeof(float);
  const float* in = static_cast<const float*>(from);
  float* out = static_cast<float*>(to);
  for (std::size_t i = 0; i < bytes / sizeof(float); i += kAtOnce) _mm_stream_ps(out + i, _mm_loadu_ps(in + i));
#else
  __builtin_memcpy(to, from, bytes);
#endif
}

/// Such stores are in no order with others, not with an unlock either: after the last one.
inline void end_stream() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

/// As memcpy(), with stream_lines().
inline void copy_past_cache(const void* from, void* to, std::size_t bytes) {
#if defined(__SSE2__)
  constexpr std::size_t kReaders = 4, kStretch = 16384;
  const char* in = static_cast<const char*>(from);
  char* out = static_cast<char*>(to);
  const std::size_t misaligned = -reinterpret_cast<std::uintptr_t>(out) % kLine;
  std::size_t done = misaligned < bytes ? misaligned : bytes;
  __builtin_memcpy(out, in, done);
  // Several readers, as in largest_of().
  for (; done + kReaders * kStretch <= bytes; done += kReaders * kStretch)
    for (std::size_t line = 0; line < kStretch; line += kLine)
      for (std::size_t reader = 0; reader < kReaders; ++reader)
        stream_lines(in + done + reader * kStretch + line, out + done + reader * kStretch + line, kLine);
  const std::size_t rest = (bytes - done) / kLine * kLine;
  stream_lines(in + done, out + done, rest);
  __builtin_memcpy(out + done + rest, in + done + rest, bytes - done - rest);
  end_stream();
#else
  __builtin_memcpy(to, from, bytes);
#endif
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

inline void narrow(float value, float* out) {
  *out = value;
}
inline void narrow(double value, double* out) {
  *out = value;
}
inline void narrow(float value, Half* out) {
  from_float(value, out);
}
inline void narrow(float value, Bfloat* out) {
  from_float(value, out);
}

}  // namespace

// kernels_wire.cpp
void delta(DType dtype, double steps, const Piece& p, const std::byte* residual);
void merge(DType dtype, const Piece& p, const void* snapshot);
void subtract(DType center, const std::byte* a, const std::byte* b, std::byte* out, std::size_t count);
void encode(DType center, Wire wire, std::byte* values, std::byte* out, std::size_t count);
void decode(DType center, Wire wire, const std::byte* in, bool add, std::byte* values, std::size_t count);

}  // namespace HVD_AGN_ISA
}  // namespace hvd_agn
