// Device code, one block per image. It has no launch syntax and includes no torch, so that tests/csrc can run it on the
// host.
//
// Each beam's row of logits is divided among `parts` warps, which read it twice: first for its log-sum-exp, then for
// the K best candidates, which each warp keeps in its lanes. The first warp merges the lists of all warps and completes
// the step. The second read is served by the caches, and nothing of the size of the logits is written.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "../common/device.cuh"
#include "beam_search_step.h"

namespace attncap {

extern __shared__ double dynamic_shared[];

constexpr int kMaxWarps = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kTokensPerLane = 16;  // at a time, so that several loads are in flight

// 16 bytes of adjacent logits.
template <typename T>
struct alignas(16) Logits {
  static constexpr int kCount = 16 / sizeof(T);
  T values[kCount];
};

// Part number `part` of the `parts` parts of a row. A run is what a warp processes at a time; a part is every parts-th
// run.
template <typename T>
struct RowPart {
  const T* logits;
  int V, part, parts;

  // Calls body(first, x) for every run, in all lanes together; x[n] is the logit of token_of(first, n). Runs are
  // aligned to 16 bytes, so the first one may begin before the row. Tokens outside the row are not read; their x is
  // -infinity.
  template <typename Body>
  __device__ void for_each(const Body& body) const {
    constexpr int count = Logits<T>::kCount, run = kWarpSize * kTokensPerLane;
    const int lane = threadIdx.x % kWarpSize, before = reinterpret_cast<uintptr_t>(logits) % 16 / sizeof(T);
    for (int start = part * run - before; start < V; start += parts * run) {
      const int first = start + lane * count;
      float x[kTokensPerLane];
      if (first >= 0 && token_of(first, kTokensPerLane - 1) < V) {
        Logits<T> loaded[kTokensPerLane / count];
#pragma unroll
        for (int n = 0; n < kTokensPerLane; n += count) {
          loaded[n / count] = *reinterpret_cast<const Logits<T>*>(logits + token_of(first, n));
        }
#pragma unroll
        for (int n = 0; n < kTokensPerLane; ++n) x[n] = static_cast<float>(loaded[n / count].values[n % count]);
      } else {
#pragma unroll
        for (int n = 0; n < kTokensPerLane; ++n) {
          const int w = token_of(first, n);
          x[n] = w >= 0 && w < V ? static_cast<float>(logits[w]) : -INFINITY;
        }
      }
      body(first, x);
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

template <typename T>
__device__ ExpSum exp_sum(const RowPart<T>& row, float factor) {
  ExpSum lane_sum = empty_sum();
  row.for_each([&](int, const float (&x)[kTokensPerLane]) {
    float largest = lane_sum.largest;
#pragma unroll
    for (int n = 0; n < kTokensPerLane; ++n) largest = Max()(largest, x[n]);
    lane_sum.rescale(largest, factor);
#pragma unroll
    for (int n = 0; n < kTokensPerLane; ++n) lane_sum.sum += std::exp((x[n] - largest) * factor);
  });
  return warp_sum(lane_sum, factor);
}

__device__ inline Candidate shuffle(const Candidate& candidate, int lane) {
  return {__shfl_sync(kAllLanes, candidate.score, lane), __shfl_sync(kAllLanes, candidate.index, lane)};
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

// Dynamic shared memory: see beam_search_step_shared_bytes.
template <typename T>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize) beam_search_step_kernel(BeamSearchStep<T> params) {
  __shared__ ExpSum sums[kMaxWarps];
  __shared__ float ends[kMaxBeams];
  const int64_t b = blockIdx.x, V = params.sizes.V;
  const int J = params.sizes.J, K = params.sizes.K, warps = blockDim.x / kWarpSize, parts = warps / J;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, j = warp / parts;
  Candidate* lists = reinterpret_cast<Candidate*>(dynamic_shared);  // [K, warps]
  Candidate* best = lists + K * warps;                              // [K]

  const int64_t row = b * J + j;
  const RowPart<T> row_part{params.logits + row * params.logits_stride, static_cast<int>(V), warp % parts, parts};
  const float factor = params.inverse_temperature, score = params.scores[row];
  if (score != -INFINITY) {
    const ExpSum sum = exp_sum(row_part, factor);
    if (lane == 0) sums[warp] = sum;
  }
  __syncthreads();
  float base = -INFINITY, largest = 0;
  if (score != -INFINITY) {
    const ExpSum sum = warp_sum(lane < parts ? sums[j * parts + lane] : empty_sum(), factor);
    base = sum.sum > 0 ? score - std::log(sum.sum) : NAN;
    largest = sum.largest;
  }
  // An explicit fma, so that tokens with equal logits have equal scores however the compiler optimises. The largest
  // logit is subtracted first, so that large logits lose no precision.
  const auto score_of = [&](float x) { return std::fma(x - largest, factor, base); };

  WarpBest warp_best{K};
  if (base > -INFINITY) {  // false for NaN too
    row_part.for_each([&](int first, const float (&x)[kTokensPerLane]) {
      for (unsigned tried = 0;;) {
        const float bound = Max()(warp_best.worst, -FLT_MAX);
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
  if (lane == 0 && warp % parts == 0) {
    const bool may_end = base > -INFINITY && params.end_allowed;
    ends[j] = may_end ? score_of(row_part.logits[params.end]) - penalty_of(params, row, params.end) : -INFINITY;
  }
  const bool is_nan = __syncthreads_or(base != base);
  if (warp > 0) return;

  WarpBest image_best{K};
  for (int first = 0; first < K * warps; first += kWarpSize) {  // best ones first, so later rounds insert few
    image_best.take(first + lane < K * warps ? lists[first + lane] : Candidate());
  }
  if (lane < K) best[lane] = image_best.kept;
  __syncwarp();
  if (lane < J) end_beam(params, b, best, ends, is_nan, lane);
  __syncwarp();
  for (int h = lane; h < K + J; h += kWarpSize) keep_hypothesis(params, b, h);
  if (lane < K) continue_beam(params, b, best, ends, is_nan, lane);
}

// As many warps per beam as have work to do and fit into a block.
inline int beam_search_step_threads(const BeamSearchSizes& sizes) {
  const int64_t useful = (sizes.V + kWarpSize * kTokensPerLane - 1) / (kWarpSize * kTokensPerLane);
  const int64_t available = kMaxWarps / sizes.J;
  return static_cast<int>(sizes.J * (useful < available ? useful : available)) * kWarpSize;
}

inline size_t beam_search_step_shared_bytes(const BeamSearchSizes& sizes, int threads) {
  return sizes.K * (threads / kWarpSize + 1) * sizeof(Candidate);
}

}  // namespace attncap
