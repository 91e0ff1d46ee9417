// Device code, a block an image: no launch syntax and no torch, so that tests/csrc can run it on the host.
//
// Each beam's row of logits is shared out among `parts` warps, which go over it twice: for its log-sum-exp, then for
// the K best candidates, kept in a warp's lanes. The first warp makes one list of the warps' lists and ends the step.
// The second time the logits come from the caches; nothing of their size is written.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "../common/reduce.cuh"
#include "beam_search_step.h"

namespace attncap {

extern __shared__ double dynamic_shared[];

constexpr int kMostWarps = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kLaneWords = 16;  // that a lane takes at a time, so that several loads are under way

// 16 bytes of neighbouring logits.
template <typename T>
struct alignas(16) Logits {
  static constexpr int kCount = 16 / sizeof(T);
  T values[kCount];
};

// One part of `parts` of a row: every parts-th run of words that a warp takes at a time.
template <typename T>
struct RowPart {
  const T* logits;
  int V, part, parts;

  // Calls body(first, x) in all lanes together, until there are no more words; x[n] is the logit of word_of(first, n).
  // Runs begin at multiples of 16 bytes, the row's first one perhaps before the row; words outside of the row have a
  // logit of -infinity and are never read.
  template <typename Body>
  __device__ void for_each(const Body& body) const {
    constexpr int count = Logits<T>::kCount, run = kWarpSize * kLaneWords;
    const int lane = threadIdx.x % kWarpSize, before = reinterpret_cast<uintptr_t>(logits) % 16 / sizeof(T);
    for (int start = part * run - before; start < V; start += parts * run) {
      const int first = start + lane * count;
      float x[kLaneWords];
      if (first >= 0 && word_of(first, kLaneWords - 1) < V) {
        Logits<T> loaded[kLaneWords / count];
#pragma unroll
        for (int n = 0; n < kLaneWords; n += count) {
          loaded[n / count] = *reinterpret_cast<const Logits<T>*>(logits + word_of(first, n));
        }
#pragma unroll
        for (int n = 0; n < kLaneWords; ++n) x[n] = static_cast<float>(loaded[n / count].values[n % count]);
      } else {
#pragma unroll
        for (int n = 0; n < kLaneWords; ++n) {
          const int w = word_of(first, n);
          x[n] = w >= 0 && w < V ? static_cast<float>(logits[w]) : -INFINITY;
        }
      }
      body(first, x);
    }
  }

  // The lane's words come 16 bytes at a time; between them lie those of the other lanes.
  static __device__ int word_of(int first, int n) {
    constexpr int count = Logits<T>::kCount;
    return first + n / count * kWarpSize * count + n % count;
  }
};

// The sum of exp(factor * x) over some logits x, as a multiple of the largest one's.
struct ExpSum {
  float largest, sum;  // the sum is 0 where no x is finite, NaN where one is NaN or +infinity

  __device__ void rescale(float new_largest, float factor) {
    sum *= std::exp((largest - new_largest) * factor);
    largest = new_largest;
  }
};

__device__ inline ExpSum no_exps() { return {-FLT_MAX, 0}; }  // not -infinity: x - largest would be NaN

// Of all lanes' logits; every lane gets it.
__device__ inline ExpSum warp_sum(ExpSum part, float factor) {
  part.rescale(warp_reduce(part.largest, Max()), factor);
  part.sum = warp_reduce(part.sum, Sum());
  return part;
}

template <typename T>
__device__ ExpSum exp_sum(const RowPart<T>& row, float factor) {
  ExpSum of_lane = no_exps();
  row.for_each([&](int, const float (&x)[kLaneWords]) {
    float largest = of_lane.largest;
#pragma unroll
    for (int n = 0; n < kLaneWords; ++n) largest = Max()(largest, x[n]);
    of_lane.rescale(largest, factor);
#pragma unroll
    for (int n = 0; n < kLaneWords; ++n) of_lane.sum += std::exp((x[n] - largest) * factor);
  });
  return warp_sum(of_lane, factor);
}

__device__ inline Candidate from_lane(const Candidate& candidate, int lane) {
  return {__shfl_sync(kAllLanes, candidate.score, lane), __shfl_sync(kAllLanes, candidate.place, lane)};
}

// A warp's best candidates: lane k has the k-th.
struct BestOfWarp {
  int K;
  Candidate kept = {};
  float worst = -INFINITY;  // score of the K-th, in every lane

  // Takes what belongs there of one candidate from each lane, in any order.
  __device__ void take(Candidate candidate) {
    const int lane = threadIdx.x % kWarpSize;
    while (true) {
      const unsigned hits = __ballot_sync(kAllLanes, is_better(candidate, from_lane(kept, K - 1)));
      if (!hits) break;
      const int from = __ffs(hits) - 1;
      const Candidate taken = from_lane(candidate, from);
      const int place = __popc(__ballot_sync(kAllLanes, is_better(kept, taken)));
      const Candidate above{__shfl_up_sync(kAllLanes, kept.score, 1), __shfl_up_sync(kAllLanes, kept.place, 1)};
      if (lane >= place) kept = lane == place ? taken : above;
      if (lane == from) candidate = Candidate();
    }
    worst = __shfl_sync(kAllLanes, kept.score, K - 1);
  }
};

// Shared memory: see ..._shared_bytes.
template <typename T>
__global__ void __launch_bounds__(kMostWarps* kWarpSize) beam_search_step_kernel(BeamSearchStep<T> params) {
  __shared__ ExpSum sums[kMostWarps];
  __shared__ float ends[kMostBeams];
  const int64_t b = blockIdx.x, V = params.sizes.V;
  const int J = params.sizes.J, K = params.sizes.K, warps = blockDim.x / kWarpSize, parts = warps / J;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, j = warp / parts;
  Candidate* lists = reinterpret_cast<Candidate*>(dynamic_shared);  // [K, warps]
  Candidate* best = lists + K * warps;                              // [K]

  const int64_t row = b * J + j;
  const RowPart<T> words{params.logits + row * params.logits_stride, static_cast<int>(V), warp % parts, parts};
  const float factor = params.inverse_temperature, score = params.scores[row];
  if (score != -INFINITY) {
    const ExpSum sum = exp_sum(words, factor);
    if (lane == 0) sums[warp] = sum;
  }
  __syncthreads();
  float base = -INFINITY;
  if (score != -INFINITY) {
    const ExpSum sum = warp_sum(lane < parts ? sums[j * parts + lane] : no_exps(), factor);
    base = sum.sum > 0 ? score - (sum.largest * factor + std::log(sum.sum)) : NAN;
  }
  // Fused by name, not as the compiler sees fit: words with the same logit have the same score.
  const auto score_of = [&](float x) { return std::fma(x, factor, base); };

  BestOfWarp of_warp{K};
  if (base > -INFINITY) {  // not for NaN either
    words.for_each([&](int first, const float (&x)[kLaneWords]) {
      for (unsigned tried = 0;;) {
        const float bound = Max()(of_warp.worst, -FLT_MAX);
        unsigned hits = 0;  // words that may be among the best: penalties are not yet off, nor are places compared
#pragma unroll
        for (int n = 0; n < kLaneWords; ++n) hits |= static_cast<unsigned>(score_of(x[n]) >= bound) << n;
        hits &= ~tried;
        if (!__ballot_sync(kAllLanes, hits)) break;
        Candidate candidate;
        if (hits) {
          const int n = __ffs(hits) - 1;
          tried |= 1u << n;
          const int w = words.word_of(first, n);
          if (w != params.end && !is_suppressed(params, w)) {
            candidate = {score_of(words.logits[w]) - penalty_of(params, row, w), j * V + w};
          }
        }
        of_warp.take(candidate);
      }
    });
  }
  if (lane < K) lists[lane * warps + warp] = of_warp.kept;
  if (lane == 0 && warp % parts == 0) {
    const bool may_end = base > -INFINITY && params.end_allowed;
    ends[j] = may_end ? score_of(words.logits[params.end]) - penalty_of(params, row, params.end) : -INFINITY;
  }
  const bool is_nan = __syncthreads_or(base != base);
  if (warp > 0) return;

  BestOfWarp of_image{K};
  for (int first = 0; first < K * warps; first += kWarpSize) {  // the warps' best come first, so later rounds take few
    of_image.take(first + lane < K * warps ? lists[first + lane] : Candidate());
  }
  if (lane < K) best[lane] = of_image.kept;
  __syncwarp();
  if (lane < J) end_beam(params, b, best, ends, is_nan, lane);
  __syncwarp();
  for (int h = lane; h < K + J; h += kWarpSize) keep_hypothesis(params, b, h);
  if (lane < K) go_on(params, b, best, ends, is_nan, lane);
}

// As many warps for each beam as have something to do, and as a block has room for.
inline int beam_search_step_threads(const BeamSearchSizes& sizes) {
  const int64_t useful = (sizes.V + kWarpSize * kLaneWords - 1) / (kWarpSize * kLaneWords);
  const int64_t room = kMostWarps / sizes.J;
  return static_cast<int>(sizes.J * (useful < room ? useful : room)) * kWarpSize;
}

inline size_t beam_search_step_shared_bytes(const BeamSearchSizes& sizes, int threads) {
  return sizes.K * (threads / kWarpSize + 1) * sizeof(Candidate);
}

}  // namespace attncap
