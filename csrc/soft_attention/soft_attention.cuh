// The CUDA kernels. They have no launch syntax and include no torch, so that tests/csrc can run them on the host.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "soft_attention_tiles.cuh"

namespace attncap {

extern __shared__ double dynamic_shared[];

constexpr int kAhead = 4;      // cells that a thread loads before it uses the first
constexpr int kThreads = 256;  // per block, at most

// The float64 version is long and serves only as the reference in tests, so it is not inlined.
template <typename T>
__device__ __noinline__ T noinline_tanh(T x) {
  return std::tanh(x);
}

template <typename T, Activation activation>
struct Activate {
  using acc_t = accumulate_t<T>;

  __device__ acc_t operator()(acc_t x) const {
    if constexpr (activation == Activation::relu) return x < 0 ? acc_t(0) : x;  // in this order, NaN stays NaN
    return std::is_same_v<T, double> ? noinline_tanh(x) : fast_tanh<T>(x);
  }

  // For scores only. The relative error of 2^-11 would be too large for the derivative, 1 - y * y.
  __device__ acc_t fast(acc_t x) const {
#ifdef __CUDA_ARCH__
    if constexpr (std::is_same_v<T, bfloat16> && activation == Activation::tanh) {
      float y;
      asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
      return y;
    }
#endif
    return (*this)(x);
  }

  // The derivative, given y = activate(x).
  __device__ acc_t grad(acc_t y) const {
    if (activation == Activation::tanh) return 1 - y * y;
    return y > 0 ? acc_t(1) : acc_t(0);
  }
};

template <typename T, Activation activation, bool aligned>
struct ScoreTerm {
  using acc_t = accumulate_t<T>;
  const T* score_weight;
  Activate<T, activation> activate = {};
  Pack<acc_t, kWidth<T>> factors = {};

  __device__ void move_to(int64_t a, int count) { factors = load<kWidth<T>, aligned>(score_weight + a, count); }
  __device__ acc_t operator()(int j, acc_t key, acc_t query) const {
    return factors.values[j] * activate.fast(key + query);
  }
};

struct ProductTerm {
  __device__ void move_to(int64_t, int) {}
  template <typename acc_t>
  __device__ acc_t operator()(int, acc_t a, acc_t b) const {
    return a * b;
  }
};

// Kernel over cells: the scores; -infinity if masked.
template <typename T, Activation activation, int rows, bool aligned>
__global__ void __launch_bounds__(kThreads, 1) soft_attention_score_kernel(SoftAttentionForward<T> params) {
  const int64_t P = params.sizes.P;
  const CellsBlock block(params.sizes, rows);
  if (block.first_cell >= P) return;
  sum_over_channels<rows, aligned>(block, params.sizes.A, params.keys + block.tile.b * params.keys_stride, params.query,
                                   params.query_stride, ScoreTerm<T, activation, aligned>{params.score_weight},
                                   [&](int64_t n, int64_t p, accumulate_t<T> score) {
                                     const bool counts = !params.mask || params.mask[block.tile.b * P + p];
                                     params.scores[n * P + p] = counts ? score : -INFINITY;
                                   });
}

// Writes channel d of row n's context, given the weighted sum over all cells.
template <typename T>
__device__ void store_context(const SoftAttentionForward<T>& params, int64_t n, int64_t d, accumulate_t<T> sum) {
  if (params.gate) sum *= sigmoid(static_cast<accumulate_t<T>>(params.gate[n * params.gate_stride + d]));
  params.context[n * params.sizes.D + d] = static_cast<T>(sum);
}

// Kernel over channels: weights and context, or context_parts if there are several parts. Shared memory, in numbers:
// the larger of ceil_div(P, parts) * kRowStride and kRowsSummed * blockDim.x * width.
template <typename T, int rows, bool aligned>
__global__ void __launch_bounds__(kThreads, 1)
    soft_attention_context_kernel(SoftAttentionForward<T> params, int columns, int parts) {
  using acc_t = accumulate_t<T>;
  constexpr int width = kWidth<T>, stride = kRowStride<rows>, at_once = stride < 4 ? stride : 4;
  const int64_t P = params.sizes.P, D = params.sizes.D;
  const ChannelsBlock block(P, D, width, columns, parts);
  const RowsTile tile = rows_tile(params.sizes.K, rows, block.outer);
  acc_t* weights = reinterpret_cast<acc_t*>(dynamic_shared);  // [cells of the part, stride]
  const int lane = threadIdx.x % kWarpSize, warps = blockDim.x / kWarpSize;

  // Softmax, one warp per row. Rows that do not exist, up to the stride, have weights of 0.
  for (int row = threadIdx.x / kWarpSize; row < stride; row += warps) {
    if (row >= tile.row_count) {
      for (int64_t p = block.part_begin + lane; p < block.part_end; p += kWarpSize) {
        weights[(p - block.part_begin) * stride + row] = 0;
      }
      continue;
    }
    const acc_t* scores = params.scores + (tile.first_row + row) * P;
    acc_t largest = -INFINITY, total = 0;
    for (int64_t p = lane; p < P; p += kWarpSize) largest = Max()(largest, scores[p]);
    largest = warp_reduce(largest, Max());
    for (int64_t p = lane; p < P; p += kWarpSize) total += std::exp(scores[p] - largest);
    total = warp_reduce(total, Sum());
    for (int64_t p = block.part_begin + lane; p < block.part_end; p += kWarpSize) {
      const bool counts = !params.mask || params.mask[tile.b * P + p];
      const acc_t weight = counts ? std::exp(scores[p] - largest) / total : 0;
      weights[(p - block.part_begin) * stride + row] = weight;
      if (block.first_channel == 0) params.weights[(tile.first_row + row) * P + p] = static_cast<T>(weight);
    }
  }
  __syncthreads();

  // Of this part, counted from its first cell.
  const int end = block.channel_count > 0 ? block.part_end - block.part_begin : 0, step = block.cell_step;
  const T* features = params.features + tile.b * params.features_stride + block.part_begin * D + block.channel;
  Pack<acc_t, width> sums[rows] = {};
  // A thread's next cells are on their way while it adds up the last ones. They stay as they are in memory until then,
  // which takes fewer registers.
  Pack<T, width> next[kAhead];
  const auto load_next = [&](int first) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int p = first + i * step;
      if (p < end) next[i] = load_narrow<width, aligned>(features + p * D, block.channel_count);
    }
  };
  load_next(threadIdx.x / columns);
  for (int first = threadIdx.x / columns; first < end; first += kAhead * step) {
    Pack<T, width> cells[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) cells[i] = next[i];
    load_next(first + kAhead * step);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int p = first + i * step;
      if (p >= end) break;
      const Pack<acc_t, width> cell = widen(cells[i]);
#pragma unroll
      for (int row = 0; row < rows; row += at_once) {
        const auto of_rows = *reinterpret_cast<const Pack<acc_t, at_once>*>(weights + p * stride + row);
#pragma unroll
        for (int k = 0; k < at_once; ++k) {
          if (row + k >= rows) break;
#pragma unroll
          for (int j = 0; j < width; ++j) sums[row + k].values[j] += of_rows.values[k] * cell.values[j];
        }
      }
    }
  }
  sum_over_groups(sums, columns, reinterpret_cast<acc_t*>(dynamic_shared), block, D,
                  [&](int row, int64_t d, acc_t sum) {
                    if (row >= tile.row_count) return;
                    const int64_t n = tile.first_row + row;
                    if (parts == 1) {
                      store_context(params, n, d, sum);
                    } else {
                      params.context_parts[(block.part * params.sizes.B * params.sizes.K + n) * D + d] = sum;
                    }
                  });
}

// One thread per row and channel: the context, if the cells are split into several parts.
template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    soft_attention_sum_parts_kernel(SoftAttentionForward<T> params, int parts) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t count = params.sizes.B * params.sizes.K * params.sizes.D;
  if (i >= count) return;
  accumulate_t<T> sum = 0;
  for (int part = 0; part < parts; ++part) sum += params.context_parts[part * count + i];
  store_context(params, i / params.sizes.D, i % params.sizes.D, sum);
}

// One thread per row and channel: gated_grad and gate_grad.
template <typename T>
__global__ void __launch_bounds__(kThreads, 1) soft_attention_gate_grad_kernel(SoftAttentionBackward<T> params) {
  using acc_t = accumulate_t<T>;
  const int64_t D = params.sizes.D, i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= params.sizes.B * params.sizes.K * D) return;
  acc_t grad = params.context_grad[i];
  if (params.gate) {
    const acc_t gate = sigmoid(static_cast<acc_t>(params.gate[i / D * params.gate_stride + i % D]));
    const acc_t context = params.context[i];  // includes the factor of the gate
    params.gate_grad[i / D * params.gate_grad_stride + i % D] = static_cast<T>(grad * context * (1 - gate));
    grad *= gate;
  }
  params.gated_grad[i] = grad;
}

// Kernel over cells: the gradient of the weights, stored in score_grad.
template <typename T, int rows, bool aligned>
__global__ void __launch_bounds__(kThreads, 1) soft_attention_weights_grad_kernel(SoftAttentionBackward<T> params) {
  const int64_t P = params.sizes.P;
  const CellsBlock block(params.sizes, rows);
  if (block.first_cell >= P) return;
  sum_over_channels<rows, aligned>(block, params.sizes.D, params.features + block.tile.b * params.features_stride,
                                   params.gated_grad, params.sizes.D, ProductTerm(),
                                   [&](int64_t n, int64_t p, accumulate_t<T> sum) {
                                     const int64_t i = n * P + p;
                                     params.score_grad[i] = sum + static_cast<accumulate_t<T>>(params.weights_grad[i]);
                                   });
}

// One warp per row: converts the gradient of the weights into that of the scores.
template <typename T>
__global__ void __launch_bounds__(kThreads, 1) soft_attention_softmax_grad_kernel(SoftAttentionBackward<T> params) {
  using acc_t = accumulate_t<T>;
  const int64_t P = params.sizes.P, lane = threadIdx.x % kWarpSize;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarpSize) + threadIdx.x / kWarpSize;
  if (n >= params.sizes.B * params.sizes.K) return;
  const T* weights = params.weights + n * P;
  acc_t* grad = params.score_grad + n * P;
  acc_t mean = 0;  // weighted
  for (int64_t p = lane; p < P; p += kWarpSize) mean += static_cast<acc_t>(weights[p]) * grad[p];
  mean = warp_reduce(mean, Sum());
  for (int64_t p = lane; p < P; p += kWarpSize) grad[p] = static_cast<acc_t>(weights[p]) * (grad[p] - mean);
}

// Kernel over channels (here the A attention units): query_grad and, if needed, keys_grad and the image's summand of
// score_weight_grad. A block computes all rows of its image, `rows` at a time; in between keys_grad is rounded to T.
// Shared memory: blockDim.x * width numbers.
template <typename T, Activation activation, int rows, bool aligned>
__global__ void __launch_bounds__(kThreads, 1)
    soft_attention_keys_grad_kernel(SoftAttentionBackward<T> params, int columns) {
  using acc_t = accumulate_t<T>;
  constexpr int width = kWidth<T>;
  const int64_t K = params.sizes.K, P = params.sizes.P, A = params.sizes.A;
  const ChannelsBlock block(P, A, width, columns, 1);
  const int64_t b = block.outer;
  const bool has_channel = block.channel_count > 0;
  acc_t* scratch = reinterpret_cast<acc_t*>(dynamic_shared);
  const Activate<T, activation> activate;
  Pack<acc_t, width> score_weight{}, score_weight_grads[1] = {};
  if (has_channel) score_weight = load<width, aligned>(params.score_weight + block.channel, block.channel_count);

  int64_t k = 0;
  do {  // runs once even without rows, to set keys_grad to 0
    const int64_t first_row = b * K + k, row_count = K - k < rows ? K - k : rows;
    Pack<acc_t, width> query_grads[rows] = {};
    for (int64_t p = block.first_cell; has_channel && p < P; p += block.cell_step) {
      const T* from = params.keys + b * params.keys_stride + p * A + block.channel;
      const auto key = load<width, aligned>(from, block.channel_count);
      T* to = params.keys_grad + (b * P + p) * A + block.channel;
      Pack<acc_t, width> key_grad{};
      if (k > 0 && params.keys_grad) key_grad = load<width, aligned>(to, block.channel_count);  // of the previous rows
#pragma unroll
      for (int row = 0; row < rows; ++row) {
        if (row >= row_count) break;
        // Loaded again for every cell: in registers, they would displace a second block per multiprocessor.
        const T* query_row = params.query + (first_row + row) * params.query_stride + block.channel;
        const auto query = load<width, aligned>(query_row, block.channel_count);
        const acc_t score_grad = params.score_grad[(first_row + row) * P + p];
#pragma unroll
        for (int j = 0; j < width; ++j) {
          const acc_t y = activate(key.values[j] + query.values[j]);
          const acc_t grad = score_grad * score_weight.values[j] * activate.grad(y);
          score_weight_grads[0].values[j] += score_grad * y;
          query_grads[row].values[j] += grad;
          key_grad.values[j] += grad;
        }
      }
      if (params.keys_grad) store<aligned>(to, key_grad, block.channel_count);
    }
    sum_over_groups(query_grads, columns, scratch, block, A, [&](int row, int64_t a, acc_t sum) {
      if (row < row_count) params.query_grad[(first_row + row) * A + a] = sum;
    });
  } while ((k += rows) < K);
  if (!params.keys_grad) return;
  sum_over_groups(score_weight_grads, columns, scratch, block, A,
                  [&](int, int64_t a, acc_t sum) { params.score_weight_grad[b * A + a] = sum; });
}

// Kernel over channels: keys_grad and the image's summand of score_weight_grad, from any number of rows. Shared memory
// as above.
template <typename T, Activation activation, bool aligned>
__global__ void __launch_bounds__(kThreads, 1)
    soft_attention_keys_backward_kernel(SoftAttentionKeysBackward<T> params, int columns) {
  using acc_t = accumulate_t<T>;
  constexpr int width = kWidth<T>;
  const int64_t P = params.sizes.P, A = params.sizes.A;
  const ChannelsBlock block(P, A, width, columns, 1);
  const int64_t b = block.outer;
  const Activate<T, activation> activate;
  Pack<acc_t, width> score_weight{}, score_weight_grads[1] = {};
  const int64_t cells_end = block.channel_count > 0 ? P : 0;
  if (cells_end > 0) score_weight = load<width, aligned>(params.score_weight + block.channel, block.channel_count);
  for (int64_t p = block.first_cell; p < cells_end; p += block.cell_step) {
    const T* from = params.keys + b * params.keys_stride + p * A + block.channel;
    const auto key = load<width, aligned>(from, block.channel_count);
    Pack<acc_t, width> key_grad{};
    for (int64_t n = params.row_starts[b]; n < params.row_starts[b + 1]; ++n) {
      const auto query =
          load<width, aligned>(params.query + n * params.query_stride + block.channel, block.channel_count);
      const acc_t score_grad = params.score_grad[n * P + p];
#pragma unroll
      for (int j = 0; j < width; ++j) {
        const acc_t y = activate(key.values[j] + query.values[j]);
        score_weight_grads[0].values[j] += score_grad * y;
        key_grad.values[j] += score_grad * score_weight.values[j] * activate.grad(y);
      }
    }
    store<aligned>(params.keys_grad + (b * P + p) * A + block.channel, key_grad, block.channel_count);
  }
  sum_over_groups(score_weight_grads, columns, reinterpret_cast<acc_t*>(dynamic_shared), block, A,
                  [&](int, int64_t a, acc_t sum) { params.score_weight_grad[b * A + a] = sum; });
}

// Kernel over channels: features_grad. The gradients of the image's first `rows` rows are kept in registers.
template <typename T, int rows, bool aligned>
__global__ void __launch_bounds__(kThreads, 1)
    soft_attention_features_grad_kernel(SoftAttentionBackward<T> params, int columns, int parts) {
  using acc_t = accumulate_t<T>;
  constexpr int width = kWidth<T>;
  const int64_t K = params.sizes.K, P = params.sizes.P, D = params.sizes.D;
  const ChannelsBlock block(P, D, width, columns, parts);
  const int64_t b = block.outer;
  if (block.channel_count <= 0) return;
  const auto load_grad = [&](int64_t row) {
    const acc_t* from = params.gated_grad + (b * K + row) * D + block.channel;
    return load<width, aligned>(from, block.channel_count);
  };
  const T* weights = params.weights + b * K * P;
  Pack<acc_t, width> grads[rows] = {};
#pragma unroll
  for (int row = 0; row < rows; ++row) {
    if (row < K) grads[row] = load_grad(row);
  }
  for (int64_t p = block.first_cell; p < block.part_end; p += block.cell_step) {
    Pack<acc_t, width> sum{};
    const auto add = [&](int64_t row, const Pack<acc_t, width>& grad) {
      const acc_t weight = weights[row * P + p];
#pragma unroll
      for (int j = 0; j < width; ++j) sum.values[j] += weight * grad.values[j];
    };
#pragma unroll
    for (int row = 0; row < rows; ++row) {
      if (row < K) add(row, grads[row]);
    }
    for (int64_t row = rows; row < K; ++row) add(row, load_grad(row));
    store<aligned>(params.features_grad + (b * P + p) * D + block.channel, sum, block.channel_count);
  }
}

}  // namespace attncap
