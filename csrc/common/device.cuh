// Device code shared by the CUDA kernels: sums and maxima over a warp, and the sigmoid. Every thread of the warp gets
// the result of a reduction; the order of the additions is fixed.
#pragma once

#include <cmath>

#include "dtype.h"

namespace attncap {

constexpr int kWarpSize = 32;

struct Sum {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Max {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};

template <typename T, typename Op>
__device__ T warp_reduce(T value, Op op) {
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value = op(value, __shfl_xor_sync(0xffffffffu, value, offset));
  }
  return value;
}

template <typename acc_t>
__device__ acc_t sigmoid(acc_t x) {
  return 1 / (1 + std::exp(-x));
}

// To the precision of T.
template <typename T>
__device__ accumulate_t<T> fast_sigmoid(accumulate_t<T> x) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == 2) return __fdividef(1, 1 + __expf(-x));
#endif
  return sigmoid(x);
}

template <typename T>
__device__ accumulate_t<T> fast_tanh(accumulate_t<T> x) {
#ifdef __CUDA_ARCH__  // absolute error about 2^-22
  if constexpr (sizeof(T) == 2) return 1 - __fdividef(2, 1 + __expf(2 * x));
#endif
  return std::tanh(x);
}

}  // namespace attncap
