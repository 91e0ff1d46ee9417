// The kernels' 16-bit number types, identical on the host, on the GPU and in the emulator of tests/csrc, and the type
// in which sums are accumulated.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_fp16.h>
#define ATTNCAP_HOST_DEVICE __host__ __device__
#else
#define ATTNCAP_HOST_DEVICE __attribute__((always_inline))  // see simd.h
#endif

namespace attncap {

template <typename To, typename From>
ATTNCAP_HOST_DEVICE inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// The upper half of a float32; rounds to nearest, ties to even.
struct bfloat16 {
  uint16_t bits;

  bfloat16() = default;
  ATTNCAP_HOST_DEVICE bfloat16(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#else
    const uint32_t x = bit_cast<uint32_t>(value);
    const bool is_nan = (x & 0x7fffffffu) > 0x7f800000u;
    bits = is_nan ? 0x7fc0 : static_cast<uint16_t>((x + 0x7fffu + ((x >> 16) & 1u)) >> 16);
#endif
  }
  ATTNCAP_HOST_DEVICE operator float() const { return bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
};

// IEEE binary16; rounds to nearest, ties to even.
struct float16 {
  uint16_t bits;

  float16() = default;
  ATTNCAP_HOST_DEVICE float16(float value) {
#ifdef __CUDA_ARCH__
    bits = __half_as_ushort(__float2half_rn(value));
#else
    const uint32_t x = bit_cast<uint32_t>(value);
    const uint32_t magnitude = x & 0x7fffffffu;
    uint32_t half;
    if (magnitude > 0x7f800000u) {  // NaN
      half = 0x7e00;
    } else if (magnitude >= 0x47800000u) {  // 65536 and above, infinity
      half = 0x7c00;
    } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5f rounds to the spacing of subnormal halves
      half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
    } else {  // a carry out of the mantissa correctly increments the exponent
      half = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
    }
    bits = static_cast<uint16_t>(half | ((x >> 16) & 0x8000u));
#endif
  }
  ATTNCAP_HOST_DEVICE operator float() const {
#ifdef __CUDA_ARCH__
    return __half2float(__ushort_as_half(bits));
#else
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
    const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fffu) << 13;
    if (magnitude >= 0x0f800000u) {  // infinity or NaN
      return bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x7fffffu));
    }
    // Scaling by a multiplication (instead of adding to the exponent) also normalises subnormals.
    const float value = bit_cast<float>(magnitude) * bit_cast<float>(0x77800000u);  // 2^112
    return bit_cast<float>(sign | bit_cast<uint32_t>(value));
#endif
  }
};

// The type in which sums are accumulated: double for double, float for all others.
template <typename T>
struct accumulate {
  using type = float;
};
template <>
struct accumulate<double> {
  using type = double;
};
template <typename T>
using accumulate_t = typename accumulate<T>::type;

}  // namespace attncap
