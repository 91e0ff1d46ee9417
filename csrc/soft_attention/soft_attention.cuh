// Device code, and which kernels a call launches: no launch syntax and no torch, so that tests/csrc can run it on the
// host.
//
// Two shapes of kernel do all that is large. Over CELLS: a warp takes four cells, its lanes go along the channels, and
// the result is a number for each cell and row. Over CHANNELS: a thread takes 16 bytes of neighbouring channels (a
// "column"), the block shares out the cells among groups of threads, and the result is a number for each channel and
// row. Either way a cell is read once for up to `rows` rows of its image, and 16 bytes at a time where addresses and
// sizes are multiples of 16 bytes (`aligned`).
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../common/reduce.cuh"
#include "soft_attention.h"

namespace attncap {

extern __shared__ double dynamic_shared[];

constexpr int kCells = 4;      // of a warp at a time
constexpr int kAhead = 4;      // cells that a thread loads before it uses the first
constexpr int kThreads = 256;  // of a block, at most

// Called, not inlined: float64 is for checking, and this is long.
template <typename T>
__device__ __noinline__ T called_tanh(T x) {
  return std::tanh(x);
}

template <typename T>
struct Activate {
  using Number = accumulate_t<T>;
  Activation activation;

  __device__ Number operator()(Number x) const {
    if (activation == Activation::relu) return x < 0 ? Number(0) : x;  // this way round a NaN stays one
#ifdef __CUDA_ARCH__  // absolute error some 2^-22, far below what the short types can hold
    if constexpr (sizeof(T) == 2) return 1 - __fdividef(2, 1 + __expf(2 * x));
#endif
    return std::is_same_v<T, double> ? called_tanh(x) : std::tanh(x);
  }

  // For scores alone: the derivative, 1 - y * y, would show the error, a relative one of 2^-11.
  __device__ Number fast(Number x) const {
#ifdef __CUDA_ARCH__
    if constexpr (std::is_same_v<T, bfloat16>) {
      if (activation == Activation::tanh) {
        float y;
        asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
        return y;
      }
    }
#endif
    return (*this)(x);
  }

  // The derivative, from y = activate(x).
  __device__ Number grad(Number y) const {
    if (activation == Activation::tanh) return 1 - y * y;
    return y > 0 ? Number(1) : Number(0);
  }
};

template <typename Number>
__device__ Number sigmoid(Number x) {
  return 1 / (1 + std::exp(-x));
}

// 16 bytes of neighbouring numbers of type T, each as a Number.
template <typename T>
constexpr int kWidth = 16 / sizeof(T);

template <typename Number, int width>
struct alignas(sizeof(Number) * width) Pack {
  Number values[width];
};

// The numbers from this address on, of which `count` exist; the others are 0.
template <int width, typename T>
__device__ Pack<accumulate_t<T>, width> load(const T* from, int64_t count, bool aligned) {
  Pack<T, width> pack{};
  if (aligned) {
    pack = *reinterpret_cast<const Pack<T, width>*>(from);
  } else {
#pragma unroll
    for (int j = 0; j < width; ++j) {
      if (j < count) pack.values[j] = from[j];
    }
  }
  Pack<accumulate_t<T>, width> wide;
#pragma unroll
  for (int j = 0; j < width; ++j) wide.values[j] = static_cast<accumulate_t<T>>(pack.values[j]);
  return wide;
}

template <typename T, typename Number, int width>
__device__ void store(T* to, const Pack<Number, width>& wide, int64_t count, bool aligned) {
  Pack<T, width> pack;
#pragma unroll
  for (int j = 0; j < width; ++j) pack.values[j] = static_cast<T>(wide.values[j]);
  if (aligned) {
    *reinterpret_cast<Pack<T, width>*>(to) = pack;
  } else {
#pragma unroll
    for (int j = 0; j < width; ++j) {
      if (j < count) to[j] = pack.values[j];
    }
  }
}

// Which image, rows and cells a block of a kernel over cells has. Blocks: image, then rows, then cells.
struct CellsBlock {
  int64_t b, first_row, row_count, first_cell, end_cell;

  __device__ CellsBlock(const SoftAttentionSizes& sizes, int rows) {
    const int64_t cells = blockDim.x / kWarpSize * kCells, cell_blocks = (sizes.P + cells - 1) / cells;
    const int64_t row_blocks = (sizes.K + rows - 1) / rows, image_and_rows = blockIdx.x / cell_blocks;
    b = image_and_rows / row_blocks;
    const int64_t k = image_and_rows % row_blocks * rows;
    first_row = b * sizes.K + k;
    row_count = sizes.K - k < rows ? sizes.K - k : rows;
    first_cell = blockIdx.x % cell_blocks * cells + threadIdx.x / kWarpSize * kCells;
    end_cell = first_cell + kCells < sizes.P ? first_cell + kCells : sizes.P;
  }
};

// For this warp's cells and rows: the sum over channels of term(j, cell's number, row's number), handed to
// out(row, cell, sum) in one lane; term.move_to(channel, count) says which channel j = 0 is, and how many there are.
// cells is [P, channels] of the image, row_values [N, channels].
template <int rows, typename T, typename R, typename Term, typename Out>
__device__ void sum_over_channels(const CellsBlock& block, int64_t channels, const T* cells, const R* row_values,
                                  bool aligned, Term term, const Out& out) {
  using Number = accumulate_t<T>;
  constexpr int width = kWidth<T>;
  const int lane = threadIdx.x % kWarpSize;
  Number sums[rows][kCells] = {};
  for (int64_t channel = lane * width; channel < channels; channel += kWarpSize * width) {
    const int64_t count = channels - channel;
    term.move_to(channel, count);
    Pack<Number, width> cell[kCells];
#pragma unroll
    for (int i = 0; i < kCells; ++i) {
      const int64_t p = block.first_cell + i < block.end_cell ? block.first_cell + i : block.end_cell - 1;
      cell[i] = load<width>(cells + p * channels + channel, count, aligned);
    }
#pragma unroll
    for (int row = 0; row < rows; ++row) {
      if (row >= block.row_count) break;
      const auto values = load<width>(row_values + (block.first_row + row) * channels + channel, count, aligned);
#pragma unroll
      for (int i = 0; i < kCells; ++i) {
#pragma unroll
        for (int j = 0; j < width; ++j) sums[row][i] += term(j, cell[i].values[j], values.values[j]);
      }
    }
  }
#pragma unroll
  for (int row = 0; row < rows; ++row) {
    if (row >= block.row_count) break;
#pragma unroll
    for (int i = 0; i < kCells; ++i) {
      const Number sum = warp_reduce(sums[row][i], Sum());
      if (lane == i && block.first_cell + i < block.end_cell) {
        out(block.first_row + row, block.first_cell + i, sum);
      }
    }
  }
}

template <typename T>
struct ScoreTerm {
  using Number = accumulate_t<T>;
  Activate<T> activate;
  const T* score_weight;
  bool aligned;
  Pack<Number, kWidth<T>> factors;

  __device__ void move_to(int64_t a, int64_t count) { factors = load<kWidth<T>>(score_weight + a, count, aligned); }
  __device__ Number operator()(int j, Number key, Number query) const {
    return factors.values[j] * activate.fast(key + query);
  }
};

struct ProductTerm {
  __device__ void move_to(int64_t, int64_t) {}
  template <typename Number>
  __device__ Number operator()(int, Number a, Number b) const {
    return a * b;
  }
};

// Over cells: the scores; -infinity where masked.
template <typename T, int rows>
__global__ void __launch_bounds__(kThreads) soft_attention_score_kernel(SoftAttentionForward<T> params, bool aligned) {
  const int64_t P = params.sizes.P;
  const CellsBlock block(params.sizes, rows);
  if (block.first_cell >= P) return;
  sum_over_channels<rows>(block, params.sizes.A, params.keys + block.b * params.keys_stride, params.query, aligned,
                          ScoreTerm<T>{{params.activation}, params.score_weight, aligned, {}},
                          [&](int64_t n, int64_t p, accumulate_t<T> score) {
                            const bool counts = !params.mask || params.mask[block.b * P + p];
                            params.scores[n * P + p] = counts ? score : -INFINITY;
                          });
}

// Which image, rows and column a thread of a kernel over channels has, and every how many-th cell is its. Blocks:
// image, then rows, then columns; the block's threads: cells, then columns.
struct ChannelsBlock {
  int64_t b, first_row, row_count, first_channel, channel, channel_count, first_cell, cell_step;

  __device__ ChannelsBlock(const SoftAttentionSizes& sizes, int rows, int64_t channels, int width, int columns) {
    const int64_t column_blocks = (channels + columns * width - 1) / (columns * width);
    const int64_t row_blocks = (sizes.K + rows - 1) / rows, image_and_rows = blockIdx.x / column_blocks;
    b = image_and_rows / row_blocks;
    const int64_t k = image_and_rows % row_blocks * rows;
    first_row = b * sizes.K + k;
    row_count = sizes.K - k < rows ? sizes.K - k : rows;
    first_channel = blockIdx.x % column_blocks * columns * width;
    channel = first_channel + threadIdx.x % columns * width;
    channel_count = channels - channel;  // from its own on; none where negative
    first_cell = threadIdx.x / columns;
    cell_step = blockDim.x / columns;
  }
};

// Adds up what the block's groups of threads have for the same column, and hands each channel's sum to
// out(channel, sum). scratch: blockDim.x * width numbers.
template <typename Number, int width, typename Out>
__device__ void sum_over_groups(const Pack<Number, width>& part, int columns, Number* scratch,
                                const ChannelsBlock& block, int64_t channels, const Out& out) {
  __syncthreads();  // scratch may still be read
#pragma unroll
  for (int i = 0; i < width; ++i) scratch[threadIdx.x * width + i] = part.values[i];
  __syncthreads();
  for (int i = threadIdx.x; i < columns * width && block.first_channel + i < channels; i += blockDim.x) {
    Number sum = 0;
    for (int group = 0; group < block.cell_step; ++group) sum += scratch[group * columns * width + i];
    out(block.first_channel + i, sum);
  }
}

// Over channels: weights and context. Shared memory: rows * P + blockDim.x * width numbers.
template <typename T, int rows>
__global__ void __launch_bounds__(kThreads)
    soft_attention_context_kernel(SoftAttentionForward<T> params, bool aligned, int columns) {
  using Number = accumulate_t<T>;
  constexpr int width = kWidth<T>;
  const int64_t P = params.sizes.P, D = params.sizes.D;
  const ChannelsBlock block(params.sizes, rows, D, width, columns);
  Number* weights = reinterpret_cast<Number*>(dynamic_shared);  // [rows, P]
  Number* scratch = weights + rows * P;
  const int lane = threadIdx.x % kWarpSize, warps = blockDim.x / kWarpSize;

  for (int64_t row = threadIdx.x / kWarpSize; row < block.row_count; row += warps) {  // softmax, a warp a row
    const Number* scores = params.scores + (block.first_row + row) * P;
    Number largest = -INFINITY, total = 0;
    for (int64_t p = lane; p < P; p += kWarpSize) largest = Max()(largest, scores[p]);
    largest = warp_reduce(largest, Max());
    for (int64_t p = lane; p < P; p += kWarpSize) {
      weights[row * P + p] = std::exp(scores[p] - largest);
      total += weights[row * P + p];
    }
    total = warp_reduce(total, Sum());
    for (int64_t p = lane; p < P; p += kWarpSize) {
      const bool counts = !params.mask || params.mask[block.b * P + p];
      const Number weight = counts ? weights[row * P + p] / total : 0;
      weights[row * P + p] = weight;
      if (block.first_channel == 0) params.weights[(block.first_row + row) * P + p] = static_cast<T>(weight);
    }
  }
  __syncthreads();

  Pack<Number, width> sums[rows] = {};
  const T* features = params.features + block.b * params.features_stride + block.channel;
  for (int64_t first = block.first_cell; block.channel_count > 0 && first < P; first += kAhead * block.cell_step) {
    Pack<Number, width> cells[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t p = first + i * block.cell_step;
      cells[i] = load<width>(features + (p < P ? p : first) * D, block.channel_count, aligned);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t p = first + i * block.cell_step;
      if (p >= P) break;
#pragma unroll
      for (int row = 0; row < rows; ++row) {
        if (row >= block.row_count) break;
        const Number weight = weights[row * P + p];
#pragma unroll
        for (int j = 0; j < width; ++j) sums[row].values[j] += weight * cells[i].values[j];
      }
    }
  }
#pragma unroll
  for (int row = 0; row < rows; ++row) {
    if (row >= block.row_count) break;
    sum_over_groups(sums[row], columns, scratch, block, D, [&](int64_t d, Number sum) {
      const int64_t at = (block.first_row + row) * D + d;
      if (params.gate) sum *= sigmoid(static_cast<Number>(params.gate[at]));
      params.context[at] = static_cast<T>(sum);
    });
  }
}

// A thread a channel of a row: gated_grad and gate_grad.
template <typename T>
__global__ void __launch_bounds__(kThreads) soft_attention_gate_grad_kernel(SoftAttentionBackward<T> params) {
  using Number = accumulate_t<T>;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= params.sizes.B * params.sizes.K * params.sizes.D) return;
  Number grad = params.context_grad[i];
  if (params.gate) {
    const Number gate = sigmoid(static_cast<Number>(params.gate[i]));
    const Number context = params.context[i];  // the gate is in it
    params.gate_grad[i] = static_cast<T>(grad * context * (1 - gate));
    grad *= gate;
  }
  params.gated_grad[i] = grad;
}

// Over cells: the gradient of the weights, into score_grad.
template <typename T, int rows>
__global__ void __launch_bounds__(kThreads)
    soft_attention_weights_grad_kernel(SoftAttentionBackward<T> params, bool aligned) {
  const int64_t P = params.sizes.P;
  const CellsBlock block(params.sizes, rows);
  if (block.first_cell >= P) return;
  sum_over_channels<rows>(block, params.sizes.D, params.features + block.b * params.features_stride, params.gated_grad,
                          aligned, ProductTerm(), [&](int64_t n, int64_t p, accumulate_t<T> sum) {
                            const int64_t at = n * P + p;
                            params.score_grad[at] = sum + static_cast<accumulate_t<T>>(params.weights_grad[at]);
                          });
}

// A warp a row: from the gradient of the weights to that of the scores.
template <typename T>
__global__ void __launch_bounds__(kThreads) soft_attention_softmax_grad_kernel(SoftAttentionBackward<T> params) {
  using Number = accumulate_t<T>;
  const int64_t P = params.sizes.P, lane = threadIdx.x % kWarpSize;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarpSize) + threadIdx.x / kWarpSize;
  if (n >= params.sizes.B * params.sizes.K) return;
  const T* weights = params.weights + n * P;
  Number* grad = params.score_grad + n * P;
  Number mean = 0;  // by weight
  for (int64_t p = lane; p < P; p += kWarpSize) mean += static_cast<Number>(weights[p]) * grad[p];
  mean = warp_reduce(mean, Sum());
  for (int64_t p = lane; p < P; p += kWarpSize) grad[p] = static_cast<Number>(weights[p]) * (grad[p] - mean);
}

// Over channels (of the attention): keys_grad, query_grad and the image's part of score_weight_grad. A block does all
// rows of its image, `rows` at a time; between them keys_grad is rounded to T. Shared memory: blockDim.x * width
// numbers.
template <typename T, int rows>
__global__ void __launch_bounds__(kThreads)
    soft_attention_keys_grad_kernel(SoftAttentionBackward<T> params, bool aligned, int columns) {
  using Number = accumulate_t<T>;
  constexpr int width = kWidth<T>;
  const int64_t K = params.sizes.K, P = params.sizes.P, A = params.sizes.A;
  const ChannelsBlock block({params.sizes.B, 1, P, params.sizes.D, A}, 1, A, width, columns);
  const bool has_channel = block.channel_count > 0;
  Number* scratch = reinterpret_cast<Number*>(dynamic_shared);
  const Activate<T> activate{params.activation};
  Pack<Number, width> score_weight{}, score_weight_grad{};
  if (has_channel) score_weight = load<width>(params.score_weight + block.channel, block.channel_count, aligned);

  for (int64_t k = 0; k < K; k += rows) {
    const int64_t first_row = block.b * K + k, row_count = K - k < rows ? K - k : rows;
    Pack<Number, width> query[rows], query_grad[rows] = {};
#pragma unroll
    for (int row = 0; row < rows; ++row) {
      if (has_channel && row < row_count) {
        query[row] = load<width>(params.query + (first_row + row) * A + block.channel, block.channel_count, aligned);
      }
    }
    for (int64_t p = block.first_cell; has_channel && p < P; p += block.cell_step) {
      const T* from = params.keys + block.b * params.keys_stride + p * A + block.channel;
      const auto key = load<width>(from, block.channel_count, aligned);
      T* to = params.keys_grad + (block.b * P + p) * A + block.channel;
      Pack<Number, width> key_grad{};
      if (k > 0) key_grad = load<width>(to, block.channel_count, aligned);  // of the rows before
#pragma unroll
      for (int row = 0; row < rows; ++row) {
        if (row >= row_count) break;
        const Number score_grad = params.score_grad[(first_row + row) * P + p];
#pragma unroll
        for (int j = 0; j < width; ++j) {
          const Number y = activate(key.values[j] + query[row].values[j]);
          const Number grad = score_grad * score_weight.values[j] * activate.grad(y);
          score_weight_grad.values[j] += score_grad * y;
          query_grad[row].values[j] += grad;
          key_grad.values[j] += grad;
        }
      }
      store(to, key_grad, block.channel_count, aligned);
    }
#pragma unroll
    for (int row = 0; row < rows; ++row) {
      if (row >= row_count) break;
      sum_over_groups(query_grad[row], columns, scratch, block, A,
                      [&](int64_t a, Number sum) { params.query_grad[(first_row + row) * A + a] = sum; });
    }
  }
  sum_over_groups(score_weight_grad, columns, scratch, block, A,
                  [&](int64_t a, Number sum) { params.score_weight_grad[block.b * A + a] = sum; });
}

// Over channels: features_grad. The gradients of the image's first `rows` rows stay in registers.
template <typename T, int rows>
__global__ void __launch_bounds__(kThreads)
    soft_attention_features_grad_kernel(SoftAttentionBackward<T> params, bool aligned, int columns) {
  using Number = accumulate_t<T>;
  constexpr int width = kWidth<T>;
  const int64_t K = params.sizes.K, P = params.sizes.P, D = params.sizes.D;
  const ChannelsBlock block({params.sizes.B, 1, P, D, params.sizes.A}, 1, D, width, columns);
  if (block.channel_count <= 0) return;
  const auto load_grad = [&](int64_t row) {
    const Number* from = params.gated_grad + (block.b * K + row) * D + block.channel;
    return load<width>(from, block.channel_count, aligned);
  };
  const T* weights = params.weights + block.b * K * P;
  Pack<Number, width> grads[rows] = {};
#pragma unroll
  for (int row = 0; row < rows; ++row) {
    if (row < K) grads[row] = load_grad(row);
  }
  for (int64_t p = block.first_cell; p < P; p += block.cell_step) {
    Pack<Number, width> sum{};
    const auto add = [&](int64_t row, const Pack<Number, width>& grad) {
      const Number weight = weights[row * P + p];
#pragma unroll
      for (int j = 0; j < width; ++j) sum.values[j] += weight * grad.values[j];
    };
#pragma unroll
    for (int row = 0; row < rows; ++row) {
      if (row < K) add(row, grads[row]);
    }
    for (int64_t row = rows; row < K; ++row) add(row, load_grad(row));
    store(params.features_grad + (block.b * P + p) * D + block.channel, sum, block.channel_count, aligned);
  }
}

// What follows runs on the host: which kernels, with how many blocks of how many threads. launch(kernel, blocks,
// threads, bytes of shared memory, arguments...) is CUDA's own in soft_attention.cu, and the emulator's in tests/csrc.

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether rows of `length` numbers, from this address on and `stride` numbers from image to image, can be read 16 bytes
// at a time.
template <typename T>
bool is_aligned(const T* address, int64_t stride, int64_t length) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0 && stride * sizeof(T) % 16 == 0 && length * sizeof(T) % 16 == 0;
}

// Columns of a block in a kernel over channels: a warp's worth, or fewer (which spreads an image over more blocks, each
// of which still reads 128 neighbouring bytes) where there would be too few channels, or blocks for the chip's
// `processors`.
inline int columns_for(int64_t images_and_rows, int64_t channels, int width, int processors) {
  int columns = kWarpSize;
  while (columns > 8 &&
         (images_and_rows * ceil_div(channels, columns * width) < 2 * processors || columns / 2 * width >= channels)) {
    columns /= 2;
  }
  return columns;
}

// Threads and blocks of a kernel over cells.
struct CellsGrid {
  int threads;
  int64_t blocks;

  CellsGrid(int64_t images_and_rows, int64_t cells, int processors) {
    threads = images_and_rows * ceil_div(cells, kThreads / kWarpSize * kCells) < 2 * processors ? kWarpSize : kThreads;
    blocks = images_and_rows * ceil_div(cells, threads / kWarpSize * kCells);
  }
};

// Calls body(rows), a constant: the least of 1, 5, 10 that has room for K, or 10 and several blocks.
template <typename Body>
void with_rows(int64_t K, const Body& body) {
  if (K <= 1) {
    body(std::integral_constant<int, 1>());
  } else if (K <= 5) {
    body(std::integral_constant<int, 5>());
  } else {
    body(std::integral_constant<int, 10>());
  }
}

template <typename T, typename Launch>
void launch_forward(const SoftAttentionForward<T>& params, int processors, Launch&& launch) {
  const int64_t B = params.sizes.B, K = params.sizes.K, P = params.sizes.P, D = params.sizes.D, A = params.sizes.A;
  if (B * K == 0) return;
  const bool keys_aligned = is_aligned(params.keys, params.keys_stride, A) && is_aligned(params.query, A, A) &&
                            is_aligned(params.score_weight, A, A);
  const bool features_aligned = is_aligned(params.features, params.features_stride, D);
  with_rows(K, [&](auto rows) {
    const CellsGrid grid(B * ceil_div(K, rows), P, processors);
    launch(soft_attention_score_kernel<T, rows>, grid.blocks, grid.threads, 0, params, keys_aligned);
  });
  const int64_t rows_with_room = kMaxCellsCuda<T> / P;  // in shared memory
  const int64_t most_rows = rows_with_room >= 10 ? 10 : rows_with_room >= 5 ? 5 : 1;
  with_rows(K < most_rows ? K : most_rows, [&](auto rows) {
    const int64_t images_and_rows = B * ceil_div(K, rows);
    const int columns = columns_for(images_and_rows, D, kWidth<T>, processors);
    const int64_t blocks = images_and_rows * ceil_div(D, columns * kWidth<T>);
    const int64_t numbers = rows * P + kThreads * kWidth<T>;
    launch(soft_attention_context_kernel<T, rows>, blocks, kThreads, numbers * sizeof(accumulate_t<T>), params,
           features_aligned, columns);
  });
}

template <typename T, typename Launch>
void launch_backward(const SoftAttentionBackward<T>& params, int processors, Launch&& launch) {
  const int64_t B = params.sizes.B, K = params.sizes.K, P = params.sizes.P, D = params.sizes.D, A = params.sizes.A;
  if (B == 0) return;
  const bool keys_aligned = is_aligned(params.keys, params.keys_stride, A) && is_aligned(params.query, A, A) &&
                            is_aligned(params.score_weight, A, A);
  const bool features_aligned = is_aligned(params.features, params.features_stride, D);
  if (K > 0) {
    launch(soft_attention_gate_grad_kernel<T>, ceil_div(B * K * D, kThreads), kThreads, 0, params);
    with_rows(K, [&](auto rows) {
      const CellsGrid grid(B * ceil_div(K, rows), P, processors);
      launch(soft_attention_weights_grad_kernel<T, rows>, grid.blocks, grid.threads, 0, params, features_aligned);
    });
    launch(soft_attention_softmax_grad_kernel<T>, ceil_div(B * K, kThreads / kWarpSize), kThreads, 0, params);
  }
  with_rows(K, [&](auto rows) {
    const int columns = columns_for(B, A, kWidth<T>, processors);
    launch(soft_attention_keys_grad_kernel<T, rows>, B * ceil_div(A, columns * kWidth<T>), kThreads,
           kThreads * kWidth<T> * sizeof(accumulate_t<T>), params, keys_aligned, columns);
  });
  if (!params.features_grad) return;
  with_rows(K, [&](auto rows) {
    const int columns = columns_for(B, D, kWidth<T>, processors);
    launch(soft_attention_features_grad_kernel<T, rows>, B * ceil_div(D, columns * kWidth<T>), kThreads, 0, params,
           features_aligned, columns);
  });
}

}  // namespace attncap
