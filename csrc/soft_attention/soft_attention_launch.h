// Which kernels a call launches, with how many blocks of how many threads. launch(kernel, blocks, threads, bytes of
// shared memory, arguments...) is CUDA's own in soft_attention.cu, and the emulator's in tests/csrc.
#pragma once

#include "soft_attention.cuh"

namespace attncap {

// Whether rows of `length` numbers, from this address on and `stride` numbers from image to image (or row to row), can
// be read 16 bytes at a time.
template <typename T>
bool is_aligned(const T* address, int64_t stride, int64_t length) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0 && stride * sizeof(T) % 16 == 0 && length * sizeof(T) % 16 == 0;
}

// Which of a call's inputs can be read so, the forward's or the backward's.
struct Aligned {
  bool keys, features;

  template <typename Params>
  explicit Aligned(const Params& params)
      : keys(keys_aligned(params)), features(is_aligned(params.features, params.features_stride, params.sizes.D)) {}

  template <typename Params>
  static bool keys_aligned(const Params& params) {
    const int64_t A = params.sizes.A;
    return is_aligned(params.keys, params.keys_stride, A) && is_aligned(params.query, params.query_stride, A) &&
           is_aligned(params.score_weight, A, A);
  }
};

// Blocks that a chip of so many multiprocessors should have at least.
inline int64_t enough_blocks(int processors) { return 2 * processors; }

// Threads and blocks of a kernel over cells.
struct CellsGrid {
  int threads;
  int64_t blocks;

  CellsGrid(int64_t images_and_rows, int64_t cells, int processors) {
    threads = images_and_rows * ceil_div(cells, kThreads / kWarpSize * kCells) < enough_blocks(processors) ? kWarpSize
                                                                                                           : kThreads;
    blocks = images_and_rows * ceil_div(cells, threads / kWarpSize * kCells);
  }
};

// Columns of a block, parts of the cells and blocks of a kernel over channels; `outer`: images, or tiles of rows.
struct ChannelsGrid {
  int columns = kWarpSize, parts = 1;
  int64_t blocks;

  // Columns: a warp's worth, or fewer (which spreads an image over more blocks, each of which still reads 128
  // neighbouring bytes) where there would be too few channels or blocks.
  ChannelsGrid(int64_t outer, int64_t channels, int width, int processors) {
    while (columns > 8 && (outer * ceil_div(channels, columns * width) < enough_blocks(processors) ||
                           columns / 2 * width >= channels)) {
      columns /= 2;
    }
    blocks = outer * ceil_div(channels, columns * width);
  }

  // Parts: one, or more where there are too few blocks even so, as long as each thread keeps a cell.
  void split(int64_t cells, int processors) {
    const int64_t most_parts = cells / (kThreads / columns), blocks_a_part = blocks;
    while (parts < most_parts && blocks < enough_blocks(processors)) {
      ++parts;
      blocks += blocks_a_part;
    }
  }
};

// Rows that a block of the context kernel does, of 1, 5 and 10: as many as K needs, and shared memory has room for.
template <typename T>
int64_t context_rows(const SoftAttentionSizes& sizes) {
  const int64_t room = kMaxCellsCuda<T> / sizes.P;
  return sizes.K <= 1 || room < 5 ? 1 : sizes.K <= 5 || room < 10 ? 5 : 10;
}

template <typename T>
ChannelsGrid context_grid(const SoftAttentionSizes& sizes, int processors) {
  ChannelsGrid grid(sizes.B * ceil_div(sizes.K, context_rows<T>(sizes)), sizes.D, kWidth<T>, processors);
  grid.split(sizes.P, processors);
  return grid;
}

// Calls body(rows), a constant: the least of 1, 5 and `most` that has room for K, or `most` and K in several goes.
template <int most, typename Body>
void with_rows(int64_t K, const Body& body) {
  if (K <= 1) {
    body(std::integral_constant<int, 1>());
  } else if (K <= 5) {
    body(std::integral_constant<int, 5>());
  } else {
    body(std::integral_constant<int, most>());
  }
}

template <typename T, typename Launch>
void launch_forward(const SoftAttentionForward<T>& params, int processors, Launch&& launch) {
  const int64_t B = params.sizes.B, K = params.sizes.K, P = params.sizes.P, D = params.sizes.D;
  if (B * K == 0) return;
  const Aligned aligned(params);
  // A row a warp where the cells alone make too few warps, although every row's warp then reads the keys.
  const bool few = B * ceil_div(P, kCells) < enough_blocks(processors);
  with_rows<10>(few ? 1 : K, [&](auto rows) {
    const CellsGrid grid(B * ceil_div(K, rows), P, processors);
    launch(soft_attention_score_kernel<T, rows>, grid.blocks, grid.threads, 0, params, aligned.keys);
  });
  const ChannelsGrid grid = context_grid<T>(params.sizes, processors);
  with_rows<10>(context_rows<T>(params.sizes), [&](auto rows) {
    const int64_t numbers = rows * ceil_div(P, grid.parts) + kThreads * kWidth<T>;
    launch(soft_attention_context_kernel<T, rows>, grid.blocks, kThreads, numbers * sizeof(accumulate_t<T>), params,
           aligned.features, grid.columns, grid.parts);
  });
  if (grid.parts == 1) return;
  launch(soft_attention_sum_parts_kernel<T>, ceil_div(B * K * D, kThreads), kThreads, 0, params, grid.parts);
}

template <typename T, typename Launch>
void launch_backward(const SoftAttentionBackward<T>& params, int processors, Launch&& launch) {
  const int64_t B = params.sizes.B, K = params.sizes.K, P = params.sizes.P, D = params.sizes.D, A = params.sizes.A;
  if (B == 0) return;
  const Aligned aligned(params);
  if (K > 0) {
    launch(soft_attention_gate_grad_kernel<T>, ceil_div(B * K * D, kThreads), kThreads, 0, params);
    with_rows<5>(K, [&](auto rows) {
      const CellsGrid grid(B * ceil_div(K, rows), P, processors);
      launch(soft_attention_weights_grad_kernel<T, rows>, grid.blocks, grid.threads, 0, params, aligned.features);
    });
    launch(soft_attention_softmax_grad_kernel<T>, ceil_div(B * K, kThreads / kWarpSize), kThreads, 0, params);
  }
  with_rows<5>(K, [&](auto rows) {
    const ChannelsGrid grid(B, A, kWidth<T>, processors);
    launch(soft_attention_keys_grad_kernel<T, rows>, grid.blocks, kThreads,
           kThreads * kWidth<T> * sizeof(accumulate_t<T>), params, aligned.keys, grid.columns);
  });
  if (!params.features_grad) return;
  with_rows<5>(K, [&](auto rows) {
    ChannelsGrid grid(B, D, kWidth<T>, processors);
    grid.split(P, processors);
    launch(soft_attention_features_grad_kernel<T, rows>, grid.blocks, kThreads, 0, params, aligned.features,
           grid.columns, grid.parts);
  });
}

template <typename T, typename Launch>
void launch_keys_backward(const SoftAttentionKeysBackward<T>& params, int processors, Launch&& launch) {
  if (params.sizes.B == 0) return;
  const ChannelsGrid grid(params.sizes.B, params.sizes.A, kWidth<T>, processors);
  launch(soft_attention_keys_backward_kernel<T>, grid.blocks, kThreads, kThreads * kWidth<T> * sizeof(accumulate_t<T>),
         params, Aligned::keys_aligned(params), grid.columns);
}

}  // namespace attncap
