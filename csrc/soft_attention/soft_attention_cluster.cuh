// The forward in one kernel, for GPUs of compute capability 9.0 and newer.
//
// An image's cells are divided among the blocks of a cluster: one block if there are many images, up to 16 if there are
// few. A block passes over its cells once. The hardware copies keys and features into shared memory ahead of their use,
// so that the memory is busy while scores are computed. A chunk of cells at a time, the block computes the scores and
// adds the features to its sums, weighted by the exponentials of the scores relative to the largest one so far; when a
// larger one is found, the sums are scaled down (the online softmax of Milakov and Gimelshein 2018). In the end the
// blocks read each other's sums through distributed shared memory, and each completes a part of the channels.
#pragma once

#include "../common/cluster.cuh"
#include "soft_attention.cuh"

namespace attncap {

constexpr int kMaxClusterBlocks = 16;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kThreadChannels = 8;      // that a thread adds up
constexpr int kStageBytes = 16 * 1024;  // of features that are copied at a time, about
constexpr int kMaxStages = 15;          // a lane of the first warp starts the first copy into each

template <typename T>
constexpr int kWarpCells = sizeof(T) == 2 ? 2 : 1;  // that a warp scores at a time; at most 2
template <typename T>
constexpr int kChunkCells = kWarps * kWarpCells<T>;

// How the work is divided, and where everything is in a block's dynamic shared memory, in bytes.
struct ClusterPlan {
  int blocks;       // of a cluster
  int stage_cells;  // a power of two, at most kChunkCells
  int stages;       // of features: copies that can be under way
  int groups;       // of threads, which each have a thread for every kThreadChannels channels, and every groups-th cell

  int keys;               // T [2, kChunkCells, A]
  int features;           // T [stages, stage_cells, D]; in the end, from `keys` on, the sums [groups, rows, D]
  int gates;              // T [rows, D], in the end, after the sums
  int query;              // T [rows, A], then the score weights, T [A]
  int scores;             // [rows, cells]
  int weights;            // [kChunkCells, kRowStride]
  int largest_and_total;  // pairs [rows]
  int scales;             // [rows]
  int factors;            // [blocks, rows]
  int barriers;           // [2 + 2 * stages]
  int shared_bytes;       // all in all; 0 if these sizes need another kernel
};

// The plan with stages of this size and number, if its shared memory is at most `shared_bytes` bytes a block.
template <typename T, int rows>
ClusterPlan cluster_plan(const SoftAttentionSizes& sizes, int blocks, int stage_cells, int stages, int shared_bytes) {
  const int64_t D = sizes.D, A = sizes.A, cells = ceil_div(sizes.P, blocks);
  const int64_t room = kThreads / (D / kThreadChannels), groups = room < stage_cells ? room : stage_cells;
  const auto aligned = [](int64_t bytes) { return (bytes + 15) / 16 * 16; };
  const int64_t features = 2 * kChunkCells<T> * A * sizeof(T), gates = groups * rows * D * 4;
  const int64_t copied = features + stages * stage_cells * D * sizeof(T), in_the_end = gates + rows * D * sizeof(T);
  const int64_t query = aligned(copied > in_the_end ? copied : in_the_end);
  const int64_t scores = aligned(query + (rows + 1) * A * sizeof(T)), weights = aligned(scores + rows * cells * 4);
  const int64_t largest_and_total = weights + kChunkCells<T> * kRowStride<rows> * 4;
  const int64_t scales = largest_and_total + rows * 8, factors = scales + rows * 4;
  const int64_t barriers = aligned(factors + blocks * rows * 4), end = barriers + (2 + 2 * stages) * 8;
  if (end > shared_bytes) return {};
  ClusterPlan plan{.blocks = blocks, .stage_cells = stage_cells, .stages = stages};
  plan.groups = static_cast<int>(groups);
  plan.features = static_cast<int>(features);
  plan.gates = static_cast<int>(gates);
  plan.query = static_cast<int>(query);
  plan.scores = static_cast<int>(scores);
  plan.weights = static_cast<int>(weights);
  plan.largest_and_total = static_cast<int>(largest_and_total);
  plan.scales = static_cast<int>(scales);
  plan.factors = static_cast<int>(factors);
  plan.barriers = static_cast<int>(barriers);
  plan.shared_bytes = static_cast<int>(end);
  return plan;
}

// The plan with the largest stages, and as many of these as there is room for.
template <typename T, int rows>
ClusterPlan cluster_plan(const SoftAttentionSizes& sizes, int blocks, int shared_bytes) {
  const int64_t D = sizes.D, A = sizes.A, cells = ceil_div(sizes.P, blocks);
  if (D % kThreadChannels != 0 || D > kThreads * kThreadChannels || sizes.P * (D > A ? D : A) > INT32_MAX) return {};
  for (int stage_cells = kChunkCells<T>; stage_cells > 0; stage_cells /= 2) {
    if (stage_cells > 1 && stage_cells * D * sizeof(T) > kStageBytes) continue;
    const int64_t copies = ceil_div(cells, stage_cells);
    const int least = copies == 1 ? 1 : 2;  // a copy starts while the one before it is used
    for (int stages = copies < kMaxStages ? static_cast<int>(copies) : kMaxStages; stages >= least; --stages) {
      const auto plan = cluster_plan<T, rows>(sizes, blocks, stage_cells, stages, shared_bytes);
      if (plan.shared_bytes > 0) return plan;
    }
  }
  return {};
}

// Sums each of `count` values, a power of two, over the lanes of a warp. Lane l returns the sum of value number
// l / (32 / count): at every step, a lane passes on half of the values that it still has.
template <int count, int offset = kWarpSize / 2>
__device__ float sum_over_lanes(const float (&values)[count]) {
  if constexpr (offset == 0) {
    return values[0];
  } else if constexpr (count == 1) {
    return sum_over_lanes<1, offset / 2>({values[0] + __shfl_xor_sync(0xffffffffu, values[0], offset)});
  } else {
    const bool upper = threadIdx.x & offset;
    float kept[count / 2];
#pragma unroll
    for (int i = 0; i < count / 2; ++i) {
      const float passed = upper ? values[i] : values[i + count / 2];
      kept[i] = (upper ? values[i + count / 2] : values[i]) + __shfl_xor_sync(0xffffffffu, passed, offset);
    }
    return sum_over_lanes<count / 2, offset / 2>(kept);
  }
}

// 16 bytes of numbers.
template <typename T>
__device__ Pack<float, kWidth<T>> load_aligned(const T* from) {
  return load<kWidth<T>, true>(from, kWidth<T>);
}

// Each block has `blocks` parts of an image's cells, and for its context of the channels.
struct Part {
  int first, count;

  __device__ Part(int all, int index, int parts) : first(all * index / parts) {
    count = all * (index + 1) / parts - first;
  }
};

template <typename T, Activation activation, int rows>
__global__ void __launch_bounds__(kThreads, rows > 5 ? 1 : 2)
    soft_attention_cluster_kernel(SoftAttentionForward<T> params, ClusterPlan plan) {
#if __CUDA_ARCH__ >= 900  // else it is never launched
  constexpr int width = kWidth<T>, packs = kThreadChannels / width, stride = kRowStride<rows>;
  constexpr int at_once = stride < 4 ? stride : 4;  // weights that a thread loads
  const int P = params.sizes.P, D = params.sizes.D, A = params.sizes.A;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, rank = block_in_cluster();
  const RowsTile tile = rows_tile(params.sizes.K, rows, blockIdx.x / plan.blocks);
  const int row_count = tile.row_count;
  const Part cells(P, rank, plan.blocks);

  char* const shared = reinterpret_cast<char*>(dynamic_shared);
  T* const keys = reinterpret_cast<T*>(shared + plan.keys);
  T* const features = reinterpret_cast<T*>(shared + plan.features);
  T* const query = reinterpret_cast<T*>(shared + plan.query);
  float* const scores = reinterpret_cast<float*>(shared + plan.scores);
  float* const weights = reinterpret_cast<float*>(shared + plan.weights);
  float2* const largest_and_total = reinterpret_cast<float2*>(shared + plan.largest_and_total);
  float* const scales = reinterpret_cast<float*>(shared + plan.scales);
  PhaseBarrier* const keys_arrived = reinterpret_cast<PhaseBarrier*>(shared + plan.barriers);
  PhaseBarrier* const features_arrived = keys_arrived + 2;
  PhaseBarrier* const features_consumed = features_arrived + plan.stages;

  // Copies. The keys have two buffers, of a chunk each; the features a ring of stages.
  const int chunks = (cells.count + kChunkCells<T> - 1) / kChunkCells<T>;
  const int copies = (cells.count + plan.stage_cells - 1) / plan.stage_cells;
  const T* const all_keys = params.keys + tile.b * params.keys_stride + cells.first * A;
  const T* const all_features = params.features + tile.b * params.features_stride + cells.first * D;
  const auto copy_keys = [&](int chunk) {
    const int first = chunk * kChunkCells<T>, count = min(cells.count - first, kChunkCells<T>);
    const uint32_t row_bytes = A * sizeof(T);
    const int loaded = (count + kWarpCells<T> - 1) / kWarpCells<T> * kWarpCells<T>;  // by the warps
    T* const to = keys + chunk % 2 * kChunkCells<T> * A;
    PhaseBarrier& arrived = keys_arrived[chunk % 2];
    arrived.arrive_and_expect((loaded + (chunk == 0 ? rows + 1 : 0)) * row_bytes);
    arrived.copy(to, all_keys + first * A, count * row_bytes);
    if (loaded > count) arrived.copy(to + count * A, all_keys + first * A, row_bytes);  // of no cell, but read
    if (chunk > 0) return;
#pragma unroll 1
    for (int row = 0; row < rows; ++row) {  // for rows that do not exist, those of another
      const int64_t n = tile.first_row + min(row, row_count - 1);
      arrived.copy(query + row * A, params.query + n * params.query_stride, row_bytes);
    }
    arrived.copy(query + rows * A, params.score_weight, row_bytes);
  };
  const auto copy_features = [&](int i, int stage) {
    const int first = i * plan.stage_cells, count = min(cells.count - first, plan.stage_cells);
    features_arrived[stage].arrive_and_expect(count * D * sizeof(T));
    features_arrived[stage].copy(features + stage * plan.stage_cells * D, all_features + first * D,
                                 count * D * sizeof(T));
  };
  if (warp == 0) {
    if (lane < 2 + 2 * plan.stages) keys_arrived[lane].init(lane < 2 + plan.stages ? 1 : kWarps);
    fence_barriers();
    __syncwarp();
    if (lane < 2) {
      if (lane < chunks) copy_keys(lane);
    } else if (lane - 2 < plan.stages && lane - 2 < copies) {
      copy_features(lane - 2, lane - 2);
    }
  }
  for (int i = threadIdx.x; i < kChunkCells<T> * stride; i += kThreads) weights[i] = 0;  // of rows that do not exist
  __syncthreads();

  const int columns = D / kThreadChannels;
  const int group = threadIdx.x < plan.groups * columns ? threadIdx.x / columns : kChunkCells<T>;  // then no cell
  const int first_channel = threadIdx.x % columns * width;  // of the thread's packs, which are `columns` packs apart
  const Activate<T, activation> activate;
  Pack<float, width> sums[rows][packs] = {};
  int stage = 0, phase = 0, copy = 0;  // of the features that are used next
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int first = chunk * kChunkCells<T>, count = min(cells.count - first, kChunkCells<T>);

    // Scores.
    keys_arrived[chunk % 2].wait(chunk / 2);
    if (warp * kWarpCells<T> < count) {
      constexpr int values = rows * kWarpCells<T> <= 2 ? rows * kWarpCells<T> : rows * kWarpCells<T> <= 8 ? 8
                           : rows * kWarpCells<T> <= 16 ? 16 : 32;
      float score[values] = {};
      const T* const warp_keys = keys + (chunk % 2 * kChunkCells<T> + warp * kWarpCells<T>) * A;
      for (int a = lane * width; a < A; a += kWarpSize * width) {
        const auto score_weight = load_aligned(query + rows * A + a);
        Pack<float, width> key[kWarpCells<T>];
#pragma unroll
        for (int cell = 0; cell < kWarpCells<T>; ++cell) key[cell] = load_aligned(warp_keys + cell * A + a);
#pragma unroll
        for (int row = 0; row < rows; ++row) {
          const auto row_query = load_aligned(query + row * A + a);
#pragma unroll
          for (int cell = 0; cell < kWarpCells<T>; ++cell) {
#pragma unroll
            for (int j = 0; j < width; ++j) {
              score[row * kWarpCells<T> + cell] +=
                  score_weight.values[j] * activate.fast(key[cell].values[j] + row_query.values[j]);
            }
          }
        }
      }
      const float sum = sum_over_lanes(score);
      const int index = lane / (kWarpSize / values), row = index / kWarpCells<T>;
      const int cell = warp * kWarpCells<T> + index % kWarpCells<T>;
      if (lane % (kWarpSize / values) == 0 && row < row_count && cell < count) {
        const bool counts = !params.mask || params.mask[tile.b * P + cells.first + first + cell];
        scores[row * cells.count + first + cell] = counts ? sum : -INFINITY;
      }
    }
    __syncthreads();
    if (threadIdx.x == 0 && chunk + 2 < chunks) copy_keys(chunk + 2);

    // Weights, relative to the largest score so far. A warp for each row.
    for (int row = warp; row < row_count; row += kWarps) {
      const float2 before = chunk > 0 ? largest_and_total[row] : float2{-INFINITY, 0};
      const float score = lane < count ? scores[row * cells.count + first + lane] : -INFINITY;
      const float largest = Max()(before.x, warp_reduce(score, Max()));
      const float weight = score == -INFINITY ? 0 : std::exp(score - largest);
      const float scale = before.x == -INFINITY ? 0 : std::exp(before.x - largest);
      const float total = before.y * scale + warp_reduce(weight, Sum());
      if (lane < kChunkCells<T>) weights[lane * stride + row] = weight;
      if (lane == 0) {
        largest_and_total[row] = {largest, total};
        scales[row] = scale;
      }
    }
    __syncthreads();

    // Weighted sums of the features.
    if (chunk > 0) {
#pragma unroll
      for (int row = 0; row < rows; ++row) {
        const float scale = row < row_count ? scales[row] : 0;
#pragma unroll
        for (int k = 0; k < packs; ++k) {
#pragma unroll
          for (int j = 0; j < width; ++j) sums[row][k].values[j] *= scale;
        }
      }
    }
    for (int of_chunk = 0; of_chunk < count; of_chunk += plan.stage_cells, ++copy) {
      const int stage_count = min(count - of_chunk, plan.stage_cells);
      const T* const stage_features = features + stage * plan.stage_cells * D;
      features_arrived[stage].wait(phase);
#pragma unroll 2
      for (int cell = group; cell < stage_count; cell += plan.groups) {
        Pack<float, at_once> cell_weights[stride / at_once];
#pragma unroll
        for (int k = 0; k < stride / at_once; ++k) {
          const float* const from = weights + (of_chunk + cell) * stride;
          cell_weights[k] = reinterpret_cast<const Pack<float, at_once>*>(from)[k];
        }
#pragma unroll
        for (int k = 0; k < packs; ++k) {
          const auto values = load_aligned(stage_features + cell * D + first_channel + k * columns * width);
#pragma unroll
          for (int row = 0; row < rows; ++row) {
#pragma unroll
            for (int j = 0; j < width; ++j) {
              sums[row][k].values[j] += cell_weights[row / at_once].values[row % at_once] * values.values[j];
            }
          }
        }
      }
      __syncwarp();
      if (lane == 0) features_consumed[stage].arrive();
      // The first thread starts the next copy into the stage before this one, which the other warps have likely left.
      if (threadIdx.x == 0 && copy > 0 && copy - 1 + plan.stages < copies) {
        const int before = stage == 0 ? plan.stages - 1 : stage - 1;
        features_consumed[before].wait(stage == 0 ? phase - 1 : phase);
        copy_features(copy - 1 + plan.stages, before);
      }
      if (++stage == plan.stages) stage = 0, ++phase;
    }
  }

  // The sums and the gate, where the copies were. The context is divided among the blocks, and a block's part among the
  // threads: kThreadChannels channels of one row, then of another.
  __syncthreads();
  float* const block_sums = reinterpret_cast<float*>(shared);
  T* const gates = reinterpret_cast<T*>(shared + plan.gates);
  float* const factors = reinterpret_cast<float*>(shared + plan.factors);
#pragma unroll
  for (int row = 0; row < rows; ++row) {
#pragma unroll
    for (int k = 0; k < packs; ++k) {
      float* const to = block_sums + (group * rows + row) * D + first_channel + k * columns * width;
      if (group < plan.groups) *reinterpret_cast<Pack<float, width>*>(to) = sums[row][k];
    }
  }
  const Part outputs(D / kThreadChannels, rank, plan.blocks);
  const int rows_at_once = outputs.count > 0 ? kThreads / outputs.count : 0;
  const int first_row = threadIdx.x < rows_at_once * outputs.count ? threadIdx.x / outputs.count : rows;
  const int d = rows_at_once > 0 ? (outputs.first + threadIdx.x % outputs.count) * kThreadChannels : 0;
  for (int row = first_row; row < row_count && params.gate; row += rows_at_once) {
    const T* const from = params.gate + (tile.first_row + row) * params.gate_stride + d;
#pragma unroll
    for (int k = 0; k < packs; ++k) {
      reinterpret_cast<uint4*>(gates + row * D + d)[k] = reinterpret_cast<const uint4*>(from)[k];
    }
  }
  sync_cluster();

  // What a block's numbers of a row are multiplied with: exp(its largest score - the largest of all) / the total of
  // all. As many threads for each row as there can be blocks.
  if (warp * kWarpSize < rows * kMaxClusterBlocks) {
    const int block = threadIdx.x % kMaxClusterBlocks, row = threadIdx.x / kMaxClusterBlocks;
    const bool exists = block < plan.blocks && row < row_count;
    const float2 of_block = exists ? *in_block(largest_and_total + row, block) : float2{-INFINITY, 0};
    float largest = of_block.x;
#pragma unroll
    for (int offset = kMaxClusterBlocks / 2; offset > 0; offset /= 2) {
      largest = Max()(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
    }
    const float scale = of_block.x == -INFINITY ? 0 : std::exp(of_block.x - largest);
    float total = scale * of_block.y;
#pragma unroll
    for (int offset = kMaxClusterBlocks / 2; offset > 0; offset /= 2) {
      total += __shfl_xor_sync(0xffffffffu, total, offset);
    }
    if (exists) factors[block * rows + row] = largest == -INFINITY ? 0 : scale / total;
  }
  __syncthreads();
#pragma unroll 1
  for (int row = 0; row < row_count; ++row) {
    const float largest = largest_and_total[row].x, factor = factors[rank * rows + row];
    for (int i = threadIdx.x; i < cells.count; i += kThreads) {
      const float score = scores[row * cells.count + i];
      const float weight = score == -INFINITY ? 0 : std::exp(score - largest) * factor;
      params.weights[(tile.first_row + row) * P + cells.first + i] = static_cast<T>(weight);
    }
  }
#pragma unroll 1
  for (int row = first_row; row < row_count; row += rows_at_once) {
    float sum[kThreadChannels] = {};
#pragma unroll 1
    for (int g = 0; g < plan.groups; ++g) {
      const auto* const own = reinterpret_cast<const Pack<float, 4>*>(block_sums + (g * rows + row) * D + d);
#pragma unroll 4
      for (int block = 0; block < plan.blocks; ++block) {
        const Pack<float, 4>* const of_block = in_block(own, block);
        const Pack<float, 4> parts[2] = {of_block[0], of_block[1]};
        const float factor = factors[block * rows + row];
#pragma unroll
        for (int j = 0; j < kThreadChannels; ++j) sum[j] += factor * parts[j / 4].values[j % 4];
      }
    }
#pragma unroll
    for (int k = 0; k < packs; ++k) {
      Pack<float, width> gate = {};
      if (params.gate) gate = load_aligned(gates + row * D + d + k * width);
      Pack<T, width> context;
#pragma unroll
      for (int j = 0; j < width; ++j) {
        const float factor = params.gate ? fast_sigmoid<T>(gate.values[j]) : 1.0f;
        context.values[j] = static_cast<T>(sum[k * width + j] * factor);
      }
      *reinterpret_cast<Pack<T, width>*>(params.context + (tile.first_row + row) * D + d + k * width) = context;
    }
  }
  leave_cluster();
#endif
}

}  // namespace attncap
