// Device code: numbers that are next to each other in memory, up to 16 bytes at a time.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "dtype.h"

namespace attncap {

// How many numbers of type T are 16 bytes.
template <typename T>
constexpr int kWidth = 16 / sizeof(T);

template <typename Element, int width>
struct alignas(sizeof(Element) * width) Pack {
  Element values[width];
};

template <typename T, int width>
__device__ Pack<accumulate_t<T>, width> widen(const Pack<T, width>& pack) {
  Pack<accumulate_t<T>, width> wide;
  if constexpr (std::is_same_v<T, bfloat16> && width % 2 == 0) {  // in pairs: half the instructions of one by one
    uint32_t words[width / 2];
    memcpy(words, &pack, sizeof(words));
#pragma unroll
    for (int i = 0; i < width / 2; ++i) {
      wide.values[2 * i] = bit_cast<float>(words[i] << 16);
      wide.values[2 * i + 1] = bit_cast<float>(words[i] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int j = 0; j < width; ++j) wide.values[j] = static_cast<accumulate_t<T>>(pack.values[j]);
  }
  return wide;
}

// Loads `width` numbers. If not aligned, only the first `count` exist, and the others are 0.
template <int width, bool aligned, typename T>
__device__ Pack<T, width> load_narrow(const T* from, int count) {
  Pack<T, width> pack{};
  if constexpr (aligned) {
    pack = *reinterpret_cast<const Pack<T, width>*>(from);
  } else {
#pragma unroll
    for (int j = 0; j < width; ++j) {
      if (j < count) pack.values[j] = from[j];
    }
  }
  return pack;
}

template <int width, bool aligned, typename T>
__device__ Pack<accumulate_t<T>, width> load(const T* from, int count) {
  return widen(load_narrow<width, aligned>(from, count));
}

// Stores to global memory, `width` numbers if aligned, otherwise the first `count`.
template <bool aligned, typename T, typename acc_t, int width>
__device__ void store(T* to, const Pack<acc_t, width>& wide, int count) {
  Pack<T, width> pack;
#pragma unroll
  for (int j = 0; j < width; ++j) pack.values[j] = static_cast<T>(wide.values[j]);
  if constexpr (aligned) {
#ifdef __CUDA_ARCH__  // nvcc would store the numbers of some packs one by one
    if constexpr (sizeof(pack) == 16) {
      uint32_t words[4];
      memcpy(words, &pack, sizeof(words));
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(words[0]),
                   "r"(words[1]), "r"(words[2]), "r"(words[3])
                   : "memory");
      return;
    }
#endif
    *reinterpret_cast<Pack<T, width>*>(to) = pack;
  } else {
#pragma unroll
    for (int j = 0; j < width; ++j) {
      if (j < count) to[j] = pack.values[j];
    }
  }
}

// Whether rows of `length` numbers, with `stride` numbers between images (or between rows), can be read 16 bytes at a
// time.
template <typename T>
bool is_aligned(const T* address, int64_t stride, int64_t length) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0 && stride * sizeof(T) % 16 == 0 && length * sizeof(T) % 16 == 0;
}

}  // namespace attncap
