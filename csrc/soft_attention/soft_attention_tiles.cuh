// How the CUDA kernels divide cells, rows and channels among threads.
//
// All large computations use one of two kinds of kernel. Kernels over CELLS: a warp computes four cells, its lanes run
// along the channels, and the result is a number per cell and row. Kernels over CHANNELS: a thread computes a "column",
// 16 bytes of adjacent channels; the cells are divided among groups of the block's threads; the result is a number per
// channel and row. In both, a cell is read once for up to `rows` rows of its image, and 16 bytes at a time if addresses
// and sizes are multiples of 16 bytes (`aligned`).
#pragma once

#include <cstdint>

#include "../common/device.cuh"
#include "../common/pack.cuh"
#include "soft_attention.h"

namespace attncap {

constexpr int kCells = 4;       // per warp
constexpr int kRowsSummed = 2;  // at a time, by sum_over_groups

// The weights of a cell in shared memory, padded so that a thread loads those of several rows at once.
template <int rows>
constexpr int kRowStride = rows == 1 ? 1 : (rows + 3) / 4 * 4;

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Up to max_rows rows of one image.
struct RowsTile {
  int64_t b, first_row, row_count;
};

__device__ inline RowsTile rows_tile(int64_t K, int max_rows, int64_t index) {
  const int64_t tiles = ceil_div(K, max_rows), b = index / tiles, k = index % tiles * max_rows;
  return {b, b * K + k, K - k < max_rows ? K - k : max_rows};
}

// The rows and cells of a warp, in a kernel over cells. Block indices: rows are the slower dimension, cells the faster.
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

// For each cell p and row n of this warp: calls out(n, p, sum), in a lane for each cell, where sum is the sum over the
// channels of term(j, value of the cell, value of the row). Before that, term.move_to(channel, count) is called, so that
// j = 0 is this channel and the first `count` values of j exist. cells is [P, channels] of the image, row_values [N,
// channels] with `stride` elements between rows.
template <int rows, bool aligned, typename T, typename R, typename Term, typename Out>
__device__ void sum_over_channels(const CellsBlock& block, int64_t channels, const T* cells, const R* row_values,
                                  int64_t stride, Term term, const Out& out) {
  using acc_t = accumulate_t<T>;
  constexpr int width = kWidth<T>;
  const int lane = threadIdx.x % kWarpSize;
  acc_t sums[rows][kCells] = {};
  for (int64_t channel = lane * width; channel < channels; channel += kWarpSize * width) {
    const int count = channels - channel < width ? channels - channel : width;
    term.move_to(channel, count);
    Pack<acc_t, width> cell[kCells];
#pragma unroll
    for (int i = 0; i < kCells; ++i) {
      const int64_t p = block.first_cell + i < block.end_cell ? block.first_cell + i : block.end_cell - 1;
      cell[i] = load<width, aligned>(cells + p * channels + channel, count);
    }
#pragma unroll
    for (int row = 0; row < rows; ++row) {
      if (row >= block.tile.row_count) break;
      const auto values = load<width, aligned>(row_values + (block.tile.first_row + row) * stride + channel, count);
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
    acc_t of_lane = 0;  // lane i has the sum of cell i, so that all are stored at once
#pragma unroll
    for (int i = 0; i < kCells; ++i) {
      const acc_t sum = warp_reduce(sums[row][i], Sum());
      if (lane == i) of_lane = sum;
    }
    const int64_t p = block.first_cell + lane;
    if (lane < kCells && p < block.end_cell) out(block.tile.first_row + row, p, of_lane);
  }
}

// The column of a thread, in a kernel over channels, and its cells: every cell_step-th cell of the block's part, from
// first_cell on. Block indices, slowest dimension first: images or tiles of rows (`outer`), parts of the cells,
// columns. Thread indices: cells, columns.
struct ChannelsBlock {
  int64_t outer, part, first_channel, channel, part_begin, part_end, first_cell;
  int channel_count, cell_step;

  __device__ ChannelsBlock(int64_t cells, int64_t channels, int width, int columns, int parts) {
    const int64_t column_blocks = ceil_div(channels, columns * width), outer_and_part = blockIdx.x / column_blocks;
    outer = outer_and_part / parts;
    part = outer_and_part % parts;
    first_channel = blockIdx.x % column_blocks * columns * width;
    channel = first_channel + threadIdx.x % columns * width;
    channel_count = channels - channel < width ? channels - channel : width;  // that exist; none if negative
    part_begin = cells * part / parts;
    part_end = cells * (part + 1) / parts;
    first_cell = part_begin + threadIdx.x / columns;
    cell_step = blockDim.x / columns;
  }
};

// Adds up the values that the block's groups of threads have for the same column, and calls out(row, channel, sum) for
// every row and channel. scratch: kRowsSummed * blockDim.x * width numbers, which may have been in use before.
template <int rows, typename acc_t, int width, typename Out>
__device__ void sum_over_groups(const Pack<acc_t, width> (&parts)[rows], int columns, acc_t* scratch,
                                const ChannelsBlock& block, int64_t channels, const Out& out) {
  const int numbers = blockDim.x * width, groups = block.cell_step;
#pragma unroll
  for (int first = 0; first < rows; first += kRowsSummed) {
    __syncthreads();
#pragma unroll
    for (int row = first; row < rows && row < first + kRowsSummed; ++row) {
      reinterpret_cast<Pack<acc_t, width>*>(scratch + (row - first) * numbers)[threadIdx.x] = parts[row];
    }
    __syncthreads();
    for (int row = first; row < rows && row < first + kRowsSummed; ++row) {
      const acc_t* of_row = scratch + (row - first) * numbers;
      for (int i = threadIdx.x; i < columns * width && block.first_channel + i < channels; i += blockDim.x) {
        acc_t sum = 0;
        for (int group = 0; group < groups; ++group) sum += of_row[group * columns * width + i];
        out(row, block.first_channel + i, sum);
      }
    }
  }
}

}  // namespace attncap
