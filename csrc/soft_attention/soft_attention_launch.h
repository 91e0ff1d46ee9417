// Which kernels a call launches, with how many blocks of how many threads. launch(kernel, blocks, threads, bytes of
// shared memory, arguments...) is CUDA's own in soft_attention.cu, and the emulator's in tests/csrc.
#pragma once

#include "soft_attention.cuh"

namespace attncap {

// Whether rows of `length` numbers, from this address on and `stride` numbers from image to image, can be read 16 bytes
// at a time.
template <typename T>
bool is_aligned(const T* address, int64_t stride, int64_t length) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0 && stride * sizeof(T) % 16 == 0 && length * sizeof(T) % 16 == 0;
}

// Which of a call's inputs can be read so, the forward's or the backward's.
struct Aligned {
  bool keys, features;

  template <typename Params>
  explicit Aligned(const Params& params) {
    const int64_t D = params.sizes.D, A = params.sizes.A;
    keys = is_aligned(params.keys, params.keys_stride, A) && is_aligned(params.query, A, A) &&
           is_aligned(params.score_weight, A, A);
    features = is_aligned(params.features, params.features_stride, D);
  }
};

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
  const int64_t B = params.sizes.B, K = params.sizes.K, P = params.sizes.P, D = params.sizes.D;
  if (B * K == 0) return;
  const Aligned aligned(params);
  with_rows(K, [&](auto rows) {
    const CellsGrid grid(B * ceil_div(K, rows), P, processors);
    launch(soft_attention_score_kernel<T, rows>, grid.blocks, grid.threads, 0, params, aligned.keys);
  });
  const int64_t rows_with_room = kMaxCellsCuda<T> / P;  // in shared memory
  const int64_t most_rows = rows_with_room >= 10 ? 10 : rows_with_room >= 5 ? 5 : 1;
  with_rows(K < most_rows ? K : most_rows, [&](auto rows) {
    const int64_t images_and_rows = B * ceil_div(K, rows);
    const int columns = columns_for(images_and_rows, D, kWidth<T>, processors);
    const int64_t blocks = images_and_rows * ceil_div(D, columns * kWidth<T>);
    const int64_t numbers = rows * P + kThreads * kWidth<T>;
    launch(soft_attention_context_kernel<T, rows>, blocks, kThreads, numbers * sizeof(accumulate_t<T>), params,
           aligned.features, columns);
  });
}

template <typename T, typename Launch>
void launch_backward(const SoftAttentionBackward<T>& params, int processors, Launch&& launch) {
  const int64_t B = params.sizes.B, K = params.sizes.K, P = params.sizes.P, D = params.sizes.D, A = params.sizes.A;
  if (B == 0) return;
  const Aligned aligned(params);
  if (K > 0) {
    launch(soft_attention_gate_grad_kernel<T>, ceil_div(B * K * D, kThreads), kThreads, 0, params);
    with_rows(K, [&](auto rows) {
      const CellsGrid grid(B * ceil_div(K, rows), P, processors);
      launch(soft_attention_weights_grad_kernel<T, rows>, grid.blocks, grid.threads, 0, params, aligned.features);
    });
    launch(soft_attention_softmax_grad_kernel<T>, ceil_div(B * K, kThreads / kWarpSize), kThreads, 0, params);
  }
  with_rows(K, [&](auto rows) {
    const int columns = columns_for(B, A, kWidth<T>, processors);
    launch(soft_attention_keys_grad_kernel<T, rows>, B * ceil_div(A, columns * kWidth<T>), kThreads,
           kThreads * kWidth<T> * sizeof(accumulate_t<T>), params, aligned.keys, columns);
  });
  if (!params.features_grad) return;
  with_rows(K, [&](auto rows) {
    const int columns = columns_for(B, D, kWidth<T>, processors);
    launch(soft_attention_features_grad_kernel<T, rows>, B * ceil_div(D, columns * kWidth<T>), kThreads, 0, params,
           aligned.features, columns);
  });
}

}  // namespace attncap
