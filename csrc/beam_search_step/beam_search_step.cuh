// Device code, a cluster of blocks per image: one block, or several where there are few images. It has no launch syntax
// and includes no torch, so that tests/csrc can run it on the host.
//
// Each beam's row of logits is divided among `parts` warps, of all blocks, which read it twice: first for its
// log-sum-exp, then for the K best candidates, which each warp keeps in its lanes. The first read also finds a bound that
// the image's K best candidates reach, so that the second has few to insert. The first warp of a block merges the lists
// of its warps, that of the first block those of the blocks, and completes the step. The second read is served by the
// caches, and nothing of the size of the logits is written.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "../common/cluster.cuh"
#include "../common/device.cuh"
#include "beam_search_step.h"

namespace attncap {

extern __shared__ double dynamic_shared[];

constexpr int kMaxWarps = 32;
constexpr int kMaxBlocks = 8;  // of an image: what every GPU with clusters can run
constexpr int kClusterWarps = 16;  // of one of several blocks: with 32, there are too few registers
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kTokensPerLane = 8;  // at a time
constexpr int kMostSharedBytes = kMaxBeams * (kMaxWarps + 1) * sizeof(Candidate);

// 16 bytes of adjacent logits.
template <typename T>
struct alignas(16) Logits {
  static constexpr int kCount = 16 / sizeof(T);
  T values[kCount];
};

// Part number `part` of the `parts` parts of a row. A run is what a warp processes at a time; a part is every parts-th
// run. Which lane gets a token does not depend on the row's address, so that equal rows have equal sums.
template <typename T>
struct RowPart {
  static constexpr int kLoads = kTokensPerLane / Logits<T>::kCount;

  const T* logits;
  int V, part, parts;
  bool aligned;  // to 16 bytes

  // Calls body(first, x) for every run, in all lanes together; x[n] is the logit of token_of(first, n). Tokens beyond
  // the row are not read; their x is -infinity. The next run is loaded before the body is called.
  template <typename Body>
  __device__ void for_each(const Body& body) const {
    constexpr int count = Logits<T>::kCount, run = kWarpSize * kTokensPerLane;
    const int of_lane = threadIdx.x % kWarpSize * count;
    Logits<T> next[kLoads];
    if (part * run < V) load(part * run + of_lane, next);
    for (int start = part * run; start < V; start += parts * run) {
      const int first = start + of_lane;
      float x[kTokensPerLane];
#pragma unroll
      for (int n = 0; n < kTokensPerLane; ++n) {
        x[n] = token_of(first, n) < V ? static_cast<float>(next[n / count].values[n % count]) : -INFINITY;
      }
      if (start + parts * run < V) load(first + parts * run, next);
      body(first, x);
    }
  }

  __device__ void load(int first, Logits<T> (&to)[kLoads]) const {
    constexpr int count = Logits<T>::kCount;
    if (aligned && token_of(first, kTokensPerLane - 1) < V) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        to[i] = *reinterpret_cast<const Logits<T>*>(logits + token_of(first, i * count));
      }
      return;
    }
#pragma unroll
    for (int n = 0; n < kTokensPerLane; ++n) {
      if (token_of(first, n) < V) to[n / count].values[n % count] = logits[token_of(first, n)];
    }
  }

  // A lane's tokens come in groups of 16 bytes of logits, interleaved with those of the other lanes.
  static __device__ int token_of(int first, int n) {
    constexpr int count = Logits<T>::kCount;
    return first + n / count * kWarpSize * count + n % count;
  }
};

// The sum of exp(factor * (x - largest)) over some logits x.
struct ExpSum {
  float largest, sum;  // the sum is 0 if all x are -infinity, NaN if any x is NaN or +infinity

  __device__ void rescale(float new_largest, float factor) {
    sum *= std::exp((largest - new_largest) * factor);
    largest = new_largest;
  }
};

__device__ inline ExpSum empty_sum() { return {-FLT_MAX, 0}; }  // not -infinity: x - largest would be NaN

// The sum over the logits of all lanes, in every lane.
__device__ inline ExpSum warp_sum(ExpSum part, float factor) {
  part.rescale(warp_reduce(part.largest, Max()), factor);
  part.sum = warp_reduce(part.sum, Sum());
  return part;
}

// Also finds the lane's token with the largest logit.
template <typename T>
__device__ ExpSum exp_sum(const RowPart<T>& row, float factor, float& largest_logit, int& largest_token) {
  ExpSum lane_sum = empty_sum();
  row.for_each([&](int first, const float (&x)[kTokensPerLane]) {
#pragma unroll
    for (int n = 0; n < kTokensPerLane; ++n) {
      if (x[n] > largest_logit) largest_logit = x[n], largest_token = row.token_of(first, n);
    }
    lane_sum.rescale(Max()(lane_sum.largest, largest_logit), factor);
#pragma unroll
    for (int n = 0; n < kTokensPerLane; ++n) lane_sum.sum += std::exp((x[n] - lane_sum.largest) * factor);
  });
  return warp_sum(lane_sum, factor);
}

__device__ inline Candidate shuffle(const Candidate& candidate, int lane) {
  return {__shfl_sync(kAllLanes, candidate.score, lane), __shfl_sync(kAllLanes, candidate.index, lane)};
}

// The k-th largest of the values of the lanes, in every lane; k from 1 to 32.
__device__ inline float kth_largest(float value, int k) {
  float largest = -INFINITY;
  for (; k > 0; --k) {
    largest = warp_reduce(value, Max());
    const unsigned holders = __ballot_sync(kAllLanes, value == largest);
    if (static_cast<int>(threadIdx.x % kWarpSize) == __ffs(holders) - 1) value = -INFINITY;
  }
  return largest;
}

// The best candidates that a warp has seen: lane k holds the k-th.
struct WarpBest {
  int K;
  Candidate kept = {};
  float worst = -INFINITY;  // score of the K-th, in every lane

  // Inserts one candidate from each lane, as far as they are among the K best.
  __device__ void take(Candidate candidate) {
    const int lane = threadIdx.x % kWarpSize;
    while (true) {
      const unsigned hits = __ballot_sync(kAllLanes, is_better(candidate, shuffle(kept, K - 1)));
      if (!hits) break;
      const int from = __ffs(hits) - 1;
      const Candidate taken = shuffle(candidate, from);
      const int rank = __popc(__ballot_sync(kAllLanes, is_better(kept, taken)));
      const Candidate above{__shfl_up_sync(kAllLanes, kept.score, 1), __shfl_up_sync(kAllLanes, kept.index, 1)};
      if (lane >= rank) kept = lane == rank ? taken : above;
      if (lane == from) candidate = Candidate();
    }
    worst = __shfl_sync(kAllLanes, kept.score, K - 1);
  }
};

// If clustered, the grid has the same number of blocks for each image. Dynamic shared memory: see beam_search_step_shared_bytes.
template <typename T, bool clustered = false>
__global__ void __launch_bounds__((clustered ? kClusterWarps : kMaxWarps) * kWarpSize, 1)
    beam_search_step_kernel(BeamSearchStep<T> params) {
  __shared__ ExpSum sums[kMaxWarps];
  __shared__ float bounds[kMaxWarps];
  __shared__ float ends[kMaxBeams];
  const int64_t V = params.sizes.V;
  const int J = params.sizes.J, K = params.sizes.K, warps = blockDim.x / kWarpSize;
  const int blocks = clustered ? gridDim.x / static_cast<unsigned>(params.sizes.B) : 1;  // of the image
  const int block = clustered ? blockIdx.x % blocks : 0;
  const int64_t b = clustered ? blockIdx.x / blocks : blockIdx.x;
  const int block_parts = warps / J, parts = blocks * block_parts;  // of a row
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, j = warp / block_parts;
  Candidate* lists = reinterpret_cast<Candidate*>(dynamic_shared);  // [K, warps]
  Candidate* best = lists + K * warps;                              // [K]

  const int64_t row = b * J + j;
  const T* logits = params.logits + row * params.logits_stride;
  const bool aligned = reinterpret_cast<uintptr_t>(logits) % sizeof(Logits<T>) == 0;
  const RowPart<T> row_part{logits, static_cast<int>(V), block * block_parts + warp % block_parts, parts, aligned};
  const float factor = params.inverse_temperature, score = params.scores[row];
  float kth_logit = -INFINITY;  // of K candidates in this part that come from different lanes
  if (score != -INFINITY) {
    float largest_logit = -INFINITY;
    int largest_token = -1;
    const ExpSum sum = exp_sum(row_part, factor, largest_logit, largest_token);
    if (lane == 0) sums[warp] = sum;
    const bool is_candidate =
        largest_token >= 0 && largest_token != params.end && !is_suppressed(params, largest_token);
    if (params.penalty_count == 0) kth_logit = kth_largest(is_candidate ? largest_logit : -INFINITY, K);
  }
  clustered ? sync_cluster() : __syncthreads();
  float base = -INFINITY, largest = 0;
  if (score != -INFINITY) {
    ExpSum part_sum = empty_sum();
    if (lane < parts) {
      part_sum = clustered ? *in_block(&sums[j * block_parts + lane % block_parts], lane / block_parts)
                           : sums[j * parts + lane];
    }
    const ExpSum sum = warp_sum(part_sum, factor);
    base = sum.sum > 0 ? score - std::log(sum.sum) : NAN;
    largest = sum.largest;
  }
  // An explicit fma, so that tokens with equal logits have equal scores however the compiler optimises. The largest
  // logit is subtracted first, so that large logits lose no precision.
  const auto score_of = [&](float x) { return std::fma(x - largest, factor, base); };

  if (lane == 0) bounds[warp] = base > -INFINITY && kth_logit > -INFINITY ? score_of(kth_logit) : -INFINITY;
  __syncthreads();
  const float block_bound = warp_reduce(lane < warps ? bounds[lane] : -INFINITY, Max());

  WarpBest warp_best{K};
  if (base > -INFINITY) {  // false for NaN too
    row_part.for_each([&](int first, const float (&x)[kTokensPerLane]) {
      for (unsigned tried = 0;;) {
        const float bound = Max()(Max()(warp_best.worst, block_bound), -FLT_MAX);
        unsigned hits = 0;  // tokens that may be among the best, before penalties and tie-breaking
#pragma unroll
        for (int n = 0; n < kTokensPerLane; ++n) hits |= static_cast<unsigned>(score_of(x[n]) >= bound) << n;
        hits &= ~tried;
        if (!__ballot_sync(kAllLanes, hits)) break;
        Candidate candidate;
        if (hits) {
          const int n = __ffs(hits) - 1;
          tried |= 1u << n;
          const int w = row_part.token_of(first, n);
          if (w != params.end && !is_suppressed(params, w)) {
            candidate = {score_of(row_part.logits[w]) - penalty_of(params, row, w), j * V + w};
          }
        }
        warp_best.take(candidate);
      }
    });
  }
  if (lane < K) lists[lane * warps + warp] = warp_best.kept;
  if (lane == 0 && warp % block_parts == 0) {
    const bool may_end = base > -INFINITY && params.end_allowed;
    ends[j] = may_end ? score_of(row_part.logits[params.end]) - penalty_of(params, row, params.end) : -INFINITY;
  }
  const bool is_nan = __syncthreads_or(base != base);
  if (warp > 0) return;

  WarpBest merged{K};
  for (int first = 0; first < K * warps; first += kWarpSize) {  // best ones first, so later rounds insert few
    merged.take(first + lane < K * warps ? lists[first + lane] : Candidate());
  }
  if (lane < K) best[lane] = merged.kept;
  __syncwarp();
  if (clustered) {
    sync_cluster();
    for (int first = K; block == 0 && first < K * blocks; first += kWarpSize) {
      const int i = first + lane;
      merged.take(i < K * blocks ? *in_block(&best[i % K], i / K) : Candidate());
    }
    leave_cluster();
    if (block > 0) return;
    if (lane < K) best[lane] = merged.kept;
    __syncwarp();
  }
  if (lane < J) end_beam(params, b, best, ends, is_nan, lane);
  __syncwarp();
  for (int h = lane; h < K + J; h += kWarpSize) keep_hypothesis(params, b, h);
  if (lane < K) continue_beam(params, b, best, ends, is_nan, lane);
}

// As many warps per beam as have work to do and fit into a block, half a block if two of them share a multiprocessor.
inline int beam_search_step_threads(const BeamSearchSizes& sizes, int processors) {
  const int64_t useful = (sizes.V + kWarpSize * kTokensPerLane - 1) / (kWarpSize * kTokensPerLane);
  const int64_t warps = sizes.B > processors && sizes.J <= kMaxWarps / 2 ? kMaxWarps / 2 : kMaxWarps;
  const int64_t available = warps / sizes.J;
  return static_cast<int>(sizes.J * (useful < available ? useful : available)) * kWarpSize;
}

// As many blocks per image, a power of two, as have work to do and run at once, with at most a warp of parts of a row. A
// cluster's blocks have to be on neighbouring multiprocessors: about a sixteenth of the places stays empty.
inline int beam_search_step_blocks(const BeamSearchSizes& sizes, int threads, int processors) {
  const int64_t block_parts = threads / kWarpSize / sizes.J;
  int64_t blocks = 1;
  while (2 * blocks <= kMaxBlocks && 2 * blocks * block_parts <= kWarpSize &&
         2 * blocks * sizes.B <= processors * 15 / 16 && blocks * block_parts * kWarpSize * kTokensPerLane < sizes.V) {
    blocks *= 2;
  }
  return static_cast<int>(blocks);
}

inline size_t beam_search_step_shared_bytes(const BeamSearchSizes& sizes, int threads) {
  return sizes.K * (threads / kWarpSize + 1) * sizeof(Candidate);
}

}  // namespace attncap
