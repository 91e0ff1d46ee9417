// Vectors as wide as the instruction set that this file is compiled for, using the compiler's vector extensions (GCC,
// or Clang 16 or newer).
//
// The source of a CPU kernel is compiled once for each instruction set of isa.h. Code compiled for a newer processor
// must never run on an older one, but the linker keeps only one copy of an inline function or template. So everything
// here is in an unnamed namespace (each object file keeps its own copy) or always inlined, and the sources of CPU
// kernels use no standard library templates. tests/csrc checks that the object files have no such function in common.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __AVX2__  // also defined with AVX-512
#include <immintrin.h>
#endif

#include "dtype.h"

namespace attncap {
namespace {

#if defined(__AVX512F__)
constexpr int64_t kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int64_t kVectorBytes = 32;
#else
constexpr int64_t kVectorBytes = 16;
#endif

template <typename Element>
struct VectorOf {
  typedef Element type __attribute__((vector_size(kVectorBytes)));
};
template <typename Element>
using Vector = typename VectorOf<Element>::type;
template <typename Element>
constexpr int64_t kLanes = kVectorBytes / sizeof(Element);

// Loads a vector of numbers, converted to the accumulation type.
template <typename T>
inline Vector<accumulate_t<T>> load(const T* from) {
  accumulate_t<T> lanes[kLanes<accumulate_t<T>>];
  for (int64_t lane = 0; lane < kLanes<accumulate_t<T>>; ++lane) lanes[lane] = static_cast<accumulate_t<T>>(from[lane]);
  Vector<accumulate_t<T>> vector;
  memcpy(&vector, lanes, sizeof(vector));
  return vector;
}

// Loads `count` numbers; the other lanes are taken from `others`. This and the store of `count` numbers are only for
// what remains after whole vectors: inlined everywhere, they would be most of the code and of the compiler's time.
template <typename T>
[[gnu::noinline]] Vector<accumulate_t<T>> load_or(Vector<accumulate_t<T>> others, const T* from, int64_t count) {
  for (int64_t lane = 0; lane < count; ++lane) others[lane] = static_cast<accumulate_t<T>>(from[lane]);
  return others;
}

template <typename T>
inline Vector<accumulate_t<T>> load_or(Vector<accumulate_t<T>>, const T* from) {
  return load(from);
}

// The same, with 0 in the other lanes.
template <typename T>
inline Vector<accumulate_t<T>> load(const T* from, int64_t count) {
  return load_or(Vector<accumulate_t<T>>{}, from, count);
}

template <typename T>
inline void store(T* to, Vector<accumulate_t<T>> vector) {
  for (int64_t lane = 0; lane < kLanes<accumulate_t<T>>; ++lane) to[lane] = static_cast<T>(vector[lane]);
}

template <typename T>
[[gnu::noinline]] void store(T* to, Vector<accumulate_t<T>> vector, int64_t count) {
  for (int64_t lane = 0; lane < count; ++lane) to[lane] = static_cast<T>(vector[lane]);
}

// A whole vector of bfloat16, rounded as in dtype.h. Compilers do not vectorise the generic version.
inline void store(bfloat16* to, Vector<float> vector) {
  typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
  Vector<uint32_t> x;
  memcpy(&x, &vector, sizeof(x));
  x = vector == vector ? (x + 0x7fff + ((x >> 16) & 1)) >> 16 : Vector<uint32_t>{} + 0x7fc0;
  const Halves halves = __builtin_convertvector(x, Halves);
  memcpy(to, &halves, sizeof(halves));
}

// Whole vectors of float16, which the hardware converts with the results of dtype.h.
#if defined(__AVX512F__)
inline Vector<float> load(const float16* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline void store(float16* to, Vector<float> vector) {
  const __m256i halves = _mm512_cvtps_ph(vector, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves);
}
#elif defined(__F16C__)
inline Vector<float> load(const float16* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline void store(float16* to, Vector<float> vector) {
  const __m128i halves = _mm256_cvtps_ph(vector, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), halves);
}
#endif

template <typename Element>
inline Element sum_of_lanes(Vector<Element> vector) {
  Element lanes[kLanes<Element>];
  memcpy(lanes, &vector, sizeof(vector));
  for (int64_t half = kLanes<Element> / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

// Calls body(i) for every whole vector of `count` numbers, then body(i, rest) for the `rest` numbers that remain.
template <typename Element, typename Body>
inline void for_each_vector(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes<Element> <= count; i += kLanes<Element>) body(i);
  if (i < count) body(i, count - i);
}

inline Vector<float> broadcast(float value) { return Vector<float>{} + value; }

// Whether any lane is greater than the bound. NaN is not.
inline bool any_above(Vector<float> x, float bound) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(x, broadcast(bound), _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps(x, broadcast(bound), _CMP_GT_OQ)) != 0;
#else
  bool any = false;
  for (int64_t lane = 0; lane < kLanes<float>; ++lane) any |= x[lane] > bound;
  return any;
#endif
}

// 2^t = power + power * rest, where power is a power of two and rest = 2^f - 1 with |f| <= 1/2. t = x * log2_e must be
// in [-126, 126].
struct PowerAndRest {
  Vector<float> power, rest;
};

inline PowerAndRest split_exp(Vector<float> x, float log2_e) {
  // Adding this constant rounds t to an integer and leaves the biased exponent of the power in the lowest bits.
  const float to_exponent = 0x1.8p23f + 127;
  const Vector<float> shifted = x * log2_e + to_exponent;
  const Vector<float> f = x * log2_e - (shifted - to_exponent);
  // The minimax polynomial of (2^f - 1) / f, fitted for this file; its relative error is at most 1.1e-8.
  Vector<float> series = f * 0.000154034977f + 0.00133907353f;
  series = series * f + 0.00961823761f;
  series = series * f + 0.0555035733f;
  series = series * f + 0.240226492f;
  series = series * f + 0.693147182f;
  Vector<int32_t> exponent;
  memcpy(&exponent, &shifted, sizeof(exponent));
  exponent <<= 23;
  Vector<float> power;
  memcpy(&power, &exponent, sizeof(power));
  return {power, series * f};
}

// The larger or the smaller of each lane; x where x is NaN. Written with intrinsics since GCC does not emit the single
// instruction otherwise.
inline Vector<float> larger(Vector<float> bound, Vector<float> x) {
#if defined(__AVX512F__)
  return _mm512_max_ps(bound, x);
#elif defined(__AVX2__)
  return _mm256_max_ps(bound, x);
#else
  return bound > x ? bound : x;
#endif
}

inline Vector<float> smaller(Vector<float> bound, Vector<float> x) {
#if defined(__AVX512F__)
  return _mm512_min_ps(bound, x);
#elif defined(__AVX2__)
  return _mm256_min_ps(bound, x);
#else
  return bound < x ? bound : x;
#endif
}

inline Vector<float> clamp(Vector<float> x, float low, float high) {  // NaN stays NaN
  return smaller(broadcast(high), larger(broadcast(low), x));
}

// For the terms of a softmax, whose largest term is 1: exp(x) for -87 <= x <= 0, exp(-87) below. NaN stays NaN.
inline Vector<float> exp_of_negative(Vector<float> x) {
  const PowerAndRest parts = split_exp(larger(broadcast(-87.0f), x), 1.44269504f);
  return parts.power * parts.rest + parts.power;
}

// The same for 2^x: -126 <= x <= 0, 2^-126 below. It saves the multiplications by log2(e).
inline Vector<float> exp2_of_negative(Vector<float> x) {
  const PowerAndRest parts = split_exp(larger(broadcast(-126.0f), x), 1.0f);
  return parts.power * parts.rest + parts.power;
}

// exp(x) for |x| <= 87, exp(87) above, 0 below. NaN stays NaN.
inline Vector<float> exp(Vector<float> x) {
  const PowerAndRest parts = split_exp(clamp(x, -87.0f, 87.0f), 1.44269504f);
  const Vector<float> result = parts.power * parts.rest + parts.power;
  return x < -87.0f ? Vector<float>{} : result;
}

// NaN stays NaN.
inline Vector<float> tanh(Vector<float> x) {  // from exp(2 x) - 1
  const PowerAndRest parts = split_exp(clamp(x, -9.1f, 9.1f), 2.88539008f);
  const Vector<float> exp_minus_1 = parts.power * parts.rest + (parts.power - 1.0f);
  return exp_minus_1 / (exp_minus_1 + 2.0f);
}

// tanh for bfloat16 and float16, whose own rounding error is larger: half the work, relative error 1e-4 for all x. NaN
// stays NaN.
inline Vector<float> short_tanh(Vector<float> x) {
  x = clamp(x, -5.0f, 5.0f);
  const Vector<float> square = x * x;
  const Vector<float> numerator = (square * 0.000670586945f + 0.102418646f) * square + 0.999948263f;
  const Vector<float> denominator = (square * 0.0128201358f + 0.435433775f) * square + 1.0f;
  return x * numerator / denominator;
}

// float64 serves only as the reference in tests, so it may be slow: one lane at a time.
inline Vector<double> exp(Vector<double> x) {
  for (int64_t lane = 0; lane < kLanes<double>; ++lane) x[lane] = std::exp(x[lane]);
  return x;
}

inline Vector<double> tanh(Vector<double> x) {
  for (int64_t lane = 0; lane < kLanes<double>; ++lane) x[lane] = std::tanh(x[lane]);
  return x;
}

template <typename Element>
inline Vector<Element> sigmoid(Vector<Element> x) {
  return Element(1) / (Element(1) + exp(-x));
}

inline Vector<float> relu(Vector<float> x) { return larger(Vector<float>{}, x); }

inline Vector<double> relu(Vector<double> x) { return 0 > x ? Vector<double>{} : x; }

}  // namespace
}  // namespace attncap
