// How the CUDA kernels share out cells, rows and channels.
//
// Two shapes of kernel do all that is large. Over CELLS: a warp takes four cells, its lanes go along the channels, and
// the result is a number for each cell and row. Over CHANNELS: a thread takes 16 bytes of neighbouring channels (a
// "column"), the block shares out the cells among groups of threads, and the result is a number for each channel and
// row. Either way a cell is read once for up to `rows` rows of its image, and 16 bytes at a time where addresses and
// sizes are multiples of 16 bytes (`aligned`).
#pragma once

#include <cstdint>

#include "../common/reduce.cuh"
#include "soft_attention.h"

namespace attncap {

constexpr int kCells = 4;  // of a warp at a time

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

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of one image: `most`, or what is left of its K.
struct RowsTile {
  int64_t b, first_row, row_count;
};

__device__ inline RowsTile rows_tile(int64_t K, int most, int64_t index) {
  const int64_t tiles = ceil_div(K, most), b = index / tiles, k = index % tiles * most;
  return {b, b * K + k, K - k < most ? K - k : most};
}

// Which rows and cells a warp of a kernel over cells has. Blocks: rows, then cells.
struct CellsBlock {
  RowsTile tile;
  int64_t first_cell, end_cell;

  __device__ CellsBlock(const SoftAttentionSizes& sizes, int rows) {
    const int64_t cells = blockDim.x / kWarpSize * kCells, cell_blocks = ceil_div(sizes.P, cells);
    tile = rows_tile(sizes.K, rows, blockIdx.x / cell_blocks);
    first_cell = blockIdx.x % cell_blocks * cells + threadIdx.x / kWarpSize * kCells;
    end_cell = first_cell + kCells < sizes.P ? first_cell + kCells : sizes.P;
  }
};

// For this warp's cells and rows: the sum over channels of term(j, cell's number, row's number), handed to
// out(row, cell, sum) in one lane; term.move_to(channel, count) says which channel j = 0 is, and how many there are.
// cells is [P, channels] of the image, row_values [N, channels], whose rows are `stride` numbers apart.
template <int rows, typename T, typename R, typename Term, typename Out>
__device__ void sum_over_channels(const CellsBlock& block, int64_t channels, const T* cells, const R* row_values,
                                  int64_t stride, bool aligned, Term term, const Out& out) {
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
      if (row >= block.tile.row_count) break;
      const auto values = load<width>(row_values + (block.tile.first_row + row) * stride + channel, count, aligned);
#pragma unroll
      for (int i = 0; i < kCells; ++i) {
#pragma unroll
        for (int j = 0; j < width; ++j) sums[row][i] += term(j, cell[i].values[j], values.values[j]);
      }
    }
  }
#pragma unroll
  for (int row = 0; row < rows; ++row) {
    if (row >= block.tile.row_count) break;
#pragma unroll
    for (int i = 0; i < kCells; ++i) {
      const Number sum = warp_reduce(sums[row][i], Sum());
      if (lane == i && block.first_cell + i < block.end_cell) {
        out(block.tile.first_row + row, block.first_cell + i, sum);
      }
    }
  }
}

// Which column a thread of a kernel over channels has, and every how many-th cell of its block's part. Blocks: images,
// or tiles of rows; then parts of the cells; then columns. The block's threads: cells, then columns.
struct ChannelsBlock {
  int64_t outer, part, first_channel, channel, channel_count, part_begin, part_end, first_cell, cell_step;

  __device__ ChannelsBlock(int64_t cells, int64_t channels, int width, int columns, int parts) {
    const int64_t column_blocks = ceil_div(channels, columns * width), outer_and_part = blockIdx.x / column_blocks;
    outer = outer_and_part / parts;
    part = outer_and_part % parts;
    first_channel = blockIdx.x % column_blocks * columns * width;
    channel = first_channel + threadIdx.x % columns * width;
    channel_count = channels - channel;  // from its own on; none where negative
    part_begin = cells * part / parts;
    part_end = cells * (part + 1) / parts;
    first_cell = part_begin + threadIdx.x / columns;
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

}  // namespace attncap
