// Sums and maxima over a warp and over a block. Every thread gets the result; the order of the
// additions is fixed.
#pragma once

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

// blockDim.x is a multiple of kWarpSize; all threads of the block call it.
template <typename T, typename Op>
__device__ T block_reduce(T value, Op op) {
  __shared__ T of_warp[kWarpSize];
  value = warp_reduce(value, op);
  if (threadIdx.x % kWarpSize == 0) of_warp[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  value = of_warp[0];
  for (unsigned warp = 1; warp < blockDim.x / kWarpSize; ++warp) value = op(value, of_warp[warp]);
  __syncthreads();  // of_warp may be written again by the next call
  return value;
}

}  // namespace attncap
