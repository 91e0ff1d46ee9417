// Which kernels a call launches, and with how many blocks and threads. The caller passes the function
// launch(kernel, blocks, threads, bytes of shared memory, arguments...): soft_attention_cuda.h launches on the GPU,
// tests/csrc in the emulator.
#pragma once

#include "soft_attention.cuh"

namespace attncap {

// Which inputs of a forward or backward can be read 16 bytes at a time.
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

// The least number of blocks that keeps a GPU with this many multiprocessors busy.
inline int64_t enough_blocks(int processors) { return 2 * processors; }

// Threads per block, and blocks, of a kernel over cells.
struct CellsGrid {
  int threads;
  int64_t blocks;

  CellsGrid(int64_t images_and_rows, int64_t cells, int processors) {
    threads = images_and_rows * ceil_div(cells, kThreads / kWarpSize * kCells) < enough_blocks(processors) ? kWarpSize
                                                                                                           : kThreads;
    blocks = images_and_rows * ceil_div(cells, threads / kWarpSize * kCells);
  }
};

// Columns per block, parts of the cells, and blocks of a kernel over channels. `outer`: number of images or tiles of
// rows.
struct ChannelsGrid {
  int columns = kWarpSize, parts = 1;
  int64_t blocks;

  // One column per lane of a warp, or fewer if there are too few channels or blocks: that spreads an image over more
  // blocks, each of which still reads 128 adjacent bytes.
  ChannelsGrid(int64_t outer, int64_t channels, int width, int processors) {
    while (columns > 8 && (outer * ceil_div(channels, columns * width) < enough_blocks(processors) ||
                           columns / 2 * width >= channels)) {
      columns /= 2;
    }
    blocks = outer * ceil_div(channels, columns * width);
  }

  // One part, or more if there are still too few blocks, as long as every thread has a cell.
  void split(int64_t cells, int processors) {
    const int64_t max_parts = cells / (kThreads / columns), blocks_per_part = blocks;
    while (parts < max_parts && blocks < enough_blocks(processors)) {
      ++parts;
      blocks += blocks_per_part;
    }
  }
};

// Rows per block of the context kernel: 1, 5 or 10, as many as K needs and shared memory can hold.
template <typename T>
int64_t context_rows(const SoftAttentionSizes& sizes) {
  const int64_t max_rows = kMaxCellsCuda<T> / sizes.P;
  return sizes.K <= 1 || max_rows < kRowStride<5> ? 1 : sizes.K <= 5 || max_rows < kRowStride<10> ? 5 : 10;
}

template <typename T>
ChannelsGrid context_grid(const SoftAttentionSizes& sizes, int processors) {
  ChannelsGrid grid(sizes.B * ceil_div(sizes.K, context_rows<T>(sizes)), sizes.D, kWidth<T>, processors);
  grid.split(sizes.P, processors);
  return grid;
}

// Calls body(rows) with the compile-time constant 1, 5 or max_rows: the smallest that is at least K, or else max_rows;
// the kernel then processes the K rows in several tiles.
template <int max_rows, typename Body>
void with_rows(int64_t K, const Body& body) {
  if (K <= 1) {
    body(std::integral_constant<int, 1>());
  } else if (K <= 5) {
    body(std::integral_constant<int, 5>());
  } else {
    body(std::integral_constant<int, max_rows>());
  }
}

// Calls body(is_tanh, aligned) with compile-time constants. float64 is only the reference in tests: it is compiled for
// arrays that are not aligned, which are read correctly in any case.
template <typename T, typename Body>
void with_kind(Activation activation, bool aligned, const Body& body) {
  const auto with_activation = [&](auto is_aligned) {
    if (activation == Activation::tanh) {
      body(std::integral_constant<Activation, Activation::tanh>(), is_aligned);
    } else {
      body(std::integral_constant<Activation, Activation::relu>(), is_aligned);
    }
  };
  if constexpr (!std::is_same_v<T, double>) {
    if (aligned) return with_activation(std::true_type());
  }
  with_activation(std::false_type());
}

// The same for kernels without an activation.
template <typename T, typename Body>
void with_alignment(bool aligned, const Body& body) {
  if constexpr (!std::is_same_v<T, double>) {
    if (aligned) return body(std::true_type());
  }
  body(std::false_type());
}

// Numbers of shared memory for sum_over_groups.
template <typename T>
constexpr int64_t kScratch = kRowsSummed * kThreads * kWidth<T>;

template <typename T, typename Launch>
void launch_forward(const SoftAttentionForward<T>& params, int processors, Launch&& launch) {
  const int64_t B = params.sizes.B, K = params.sizes.K, P = params.sizes.P, D = params.sizes.D;
  if (B * K == 0) return;
  const Aligned aligned(params);
  // One row per warp if the cells alone make too few warps, even though the warp of every row then reads the keys.
  const bool few = B * ceil_div(P, kCells) < enough_blocks(processors);
  with_rows<10>(few ? 1 : K, [&](auto rows) {
    const CellsGrid grid(B * ceil_div(K, rows), P, processors);
    with_kind<T>(params.activation, aligned.keys, [&](auto activation, auto is_aligned) {
      launch(soft_attention_score_kernel<T, activation, rows, is_aligned>, grid.blocks, grid.threads, 0, params);
    });
  });
  const ChannelsGrid grid = context_grid<T>(params.sizes, processors);
  with_rows<10>(context_rows<T>(params.sizes), [&](auto rows) {
    const int64_t weights = ceil_div(P, grid.parts) * kRowStride<rows>;
    const size_t bytes = (weights > kScratch<T> ? weights : kScratch<T>) * sizeof(accumulate_t<T>);
    with_alignment<T>(aligned.features, [&](auto is_aligned) {
      launch(soft_attention_context_kernel<T, rows, is_aligned>, grid.blocks, kThreads, bytes, params, grid.columns,
             grid.parts);
    });
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
      with_alignment<T>(aligned.features, [&](auto is_aligned) {
        launch(soft_attention_weights_grad_kernel<T, rows, is_aligned>, grid.blocks, grid.threads, 0, params);
      });
    });
    launch(soft_attention_softmax_grad_kernel<T>, ceil_div(B * K, kThreads / kWarpSize), kThreads, 0, params);
  }
  with_rows<5>(K, [&](auto rows) {
    const ChannelsGrid grid(B, A, kWidth<T>, processors);
    with_kind<T>(params.activation, aligned.keys, [&](auto activation, auto is_aligned) {
      launch(soft_attention_keys_grad_kernel<T, activation, rows, is_aligned>, grid.blocks, kThreads,
             kScratch<T> * sizeof(accumulate_t<T>), params, grid.columns);
    });
  });
  if (!params.features_grad) return;
  with_rows<5>(K, [&](auto rows) {
    ChannelsGrid grid(B, D, kWidth<T>, processors);
    grid.split(P, processors);
    with_alignment<T>(aligned.features, [&](auto is_aligned) {
      launch(soft_attention_features_grad_kernel<T, rows, is_aligned>, grid.blocks, kThreads, 0, params, grid.columns,
             grid.parts);
    });
  });
}

template <typename T, typename Launch>
void launch_keys_backward(const SoftAttentionKeysBackward<T>& params, int processors, Launch&& launch) {
  if (params.sizes.B == 0) return;
  const ChannelsGrid grid(params.sizes.B, params.sizes.A, kWidth<T>, processors);
  with_kind<T>(params.activation, Aligned::keys_aligned(params), [&](auto activation, auto is_aligned) {
    launch(soft_attention_keys_backward_kernel<T, activation, is_aligned>, grid.blocks, kThreads,
           kScratch<T> * sizeof(accumulate_t<T>), params, grid.columns);
  });
}

}  // namespace attncap
