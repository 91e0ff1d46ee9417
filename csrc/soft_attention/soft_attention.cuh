// Device code: no launch syntax and no torch, so that tests/csrc can run it on the host.
#pragma once

#include "../common/reduce.cuh"
#include "soft_attention.h"

namespace attncap {

extern __shared__ double dynamic_shared[];

// A block a row; shared memory: accumulate_t<T>[P].
template <typename T>
__global__ void soft_attention_forward_kernel(SoftAttentionForward<T> params) {
  using acc_t = accumulate_t<T>;
  acc_t* weights = reinterpret_cast<acc_t*>(dynamic_shared);  // [P], scores at first
  const auto [B, K, P, D, A] = params.sizes;
  const int64_t n = blockIdx.x, b = n / K;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int warps = blockDim.x / kWarpSize;
  const T* query = params.query + n * A;
  const acc_t masked = -INFINITY;

  for (int64_t p = warp; p < P;
       p += warps) {  // a warp a cell, so that neighbouring lanes read neighbouring keys
    acc_t score = masked;
    if (!params.mask || params.mask[b * P + p]) {
      const T* key = params.keys + (b * P + p) * A;
      score = 0;
      for (int64_t a = lane; a < A; a += kWarpSize) {
        const acc_t x = static_cast<acc_t>(key[a]) + static_cast<acc_t>(query[a]);
        score += static_cast<acc_t>(params.score_weight[a]) * activate(x, params.activation);
      }
      score = warp_reduce(score, Sum());
    }
    if (lane == 0) weights[p] = score;
  }
  __syncthreads();

  acc_t largest = masked;
  for (int64_t p = threadIdx.x; p < P; p += blockDim.x) largest = Max()(largest, weights[p]);
  largest = block_reduce(largest, Max());
  acc_t total = 0;
  for (int64_t p = threadIdx.x; p < P; p += blockDim.x) {
    const bool counts = !params.mask || params.mask[b * P + p];
    weights[p] = counts ? std::exp(weights[p] - largest) : 0;
    total += weights[p];
  }
  total = block_reduce(total, Sum());
  for (int64_t p = threadIdx.x; p < P; p += blockDim.x) {
    weights[p] = total == 0 ? 0 : weights[p] / total;
    params.weights[n * P + p] = static_cast<T>(weights[p]);
  }
  __syncthreads();

  for (int64_t d = threadIdx.x; d < D; d += blockDim.x) {
    const T* features = params.features + b * P * D + d;
    acc_t context = 0;
    for (int64_t p = 0; p < P; ++p) context += weights[p] * static_cast<acc_t>(features[p * D]);
    if (params.gate) context *= sigmoid(static_cast<acc_t>(params.gate[n * D + d]));
    params.context[n * D + d] = static_cast<T>(context);
  }
}

// A block a row: gated_grad, gate_grad and score_grad.
template <typename T>
__global__ void soft_attention_score_grad_kernel(SoftAttentionBackward<T> params) {
  using acc_t = accumulate_t<T>;
  const auto [B, K, P, D, A] = params.sizes;
  const int64_t n = blockIdx.x, b = n / K;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int warps = blockDim.x / kWarpSize;
  const T* features = params.features + b * P * D;
  const T* weights = params.weights + n * P;
  acc_t* gated_grad = params.gated_grad + n * D;
  acc_t* score_grad = params.score_grad + n * P;

  for (int64_t d = threadIdx.x; d < D; d += blockDim.x) {
    acc_t grad = params.context_grad[n * D + d];
    if (params.gate) {
      acc_t context = 0;  // before the gate
      for (int64_t p = 0; p < P; ++p) {
        context += static_cast<acc_t>(weights[p]) * static_cast<acc_t>(features[p * D + d]);
      }
      const acc_t gate = sigmoid(static_cast<acc_t>(params.gate[n * D + d]));
      grad *= gate;
      params.gate_grad[n * D + d] = static_cast<T>(grad * (1 - gate) * context);
    }
    gated_grad[d] = grad;
  }
  __syncthreads();

  for (int64_t p = warp; p < P; p += warps) {
    acc_t weight_grad = 0;
    for (int64_t d = lane; d < D; d += kWarpSize) {
      weight_grad += gated_grad[d] * static_cast<acc_t>(features[p * D + d]);
    }
    weight_grad = warp_reduce(weight_grad, Sum());
    if (lane == 0) score_grad[p] = weight_grad + static_cast<acc_t>(params.weights_grad[n * P + p]);
  }
  __syncthreads();

  acc_t mean = 0;  // of the weights' gradient, by weight
  for (int64_t p = threadIdx.x; p < P; p += blockDim.x)
    mean += static_cast<acc_t>(weights[p]) * score_grad[p];
  mean = block_reduce(mean, Sum());
  for (int64_t p = threadIdx.x; p < P; p += blockDim.x) {
    score_grad[p] = static_cast<acc_t>(weights[p]) * (score_grad[p] - mean);
  }
}

// A block an image, a thread a column of A: query_grad, the image's part of score_weight_grad,
// keys_grad.
template <typename T>
__global__ void soft_attention_keys_grad_kernel(SoftAttentionBackward<T> params) {
  using acc_t = accumulate_t<T>;
  const auto [B, K, P, D, A] = params.sizes;
  const int64_t b = blockIdx.x;

  for (int64_t a = threadIdx.x; a < A; a += blockDim.x) {
    const T* key = params.keys + b * P * A + a;
    const acc_t score_weight = params.score_weight[a];
    acc_t score_weight_grad = 0;
    for (int64_t n = b * K; n < b * K + K; ++n) {
      const acc_t query = params.query[n * A + a];
      acc_t query_grad = 0;
      for (int64_t p = 0; p < P; ++p) {
        const acc_t score_grad = params.score_grad[n * P + p];
        const acc_t y = activate(static_cast<acc_t>(key[p * A]) + query, params.activation);
        query_grad += score_grad * activate_grad(y, params.activation);
        score_weight_grad += score_grad * y;
      }
      params.query_grad[n * A + a] = static_cast<T>(score_weight * query_grad);
    }
    params.score_weight_grad[b * A + a] = score_weight_grad;

    for (int64_t p = 0; p < P; ++p) {
      acc_t key_grad = 0;
      for (int64_t n = b * K; n < b * K + K; ++n) {
        const acc_t x =
            static_cast<acc_t>(key[p * A]) + static_cast<acc_t>(params.query[n * A + a]);
        key_grad += params.score_grad[n * P + p] *
                    activate_grad(activate(x, params.activation), params.activation);
      }
      params.keys_grad[(b * P + p) * A + a] = static_cast<T>(score_weight * key_grad);
    }
  }
}

// A block a cell of an image: features_grad.
template <typename T>
__global__ void soft_attention_features_grad_kernel(SoftAttentionBackward<T> params) {
  using acc_t = accumulate_t<T>;
  const auto [B, K, P, D, A] = params.sizes;
  const int64_t b = blockIdx.x / P, p = blockIdx.x % P;

  for (int64_t d = threadIdx.x; d < D; d += blockDim.x) {
    acc_t grad = 0;
    for (int64_t n = b * K; n < b * K + K; ++n) {
      grad += static_cast<acc_t>(params.weights[n * P + p]) * params.gated_grad[n * D + d];
    }
    params.features_grad[(b * P + p) * D + d] = static_cast<T>(grad);
  }
}

}  // namespace attncap
