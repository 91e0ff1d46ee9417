// The CPU kernel; compiled once for each instruction set, ATTNCAP_ISA being its name.
//
// A row of logits is passed over three times while it is in the cache: for its maximum, its sum of exponentials, and
// what is better than the K-th best candidate so far, which is rare after the first few vectors.
#include "beam_search_step.h"

#include "../common/parallel.h"
#include "../common/simd.h"

namespace attncap::ATTNCAP_ISA {
namespace {

// log sum_w exp(factor * logits[w]); NaN where a logit is NaN or +infinity, or all are -infinity.
template <typename T>
float log_sum_exp(const T* logits, int64_t V, float factor) {
  constexpr int64_t kBlock = 32;  // vectors summed by themselves: fewer roundings in a row
  const Vector<float> lowest = broadcast(-INFINITY);
  Vector<float> largest_of_lane = lowest;
  for_each_vector<float>(V, [&](int64_t w, auto... rest) {
    largest_of_lane = larger(largest_of_lane, load_or(lowest, logits + w, rest...));
  });
  float largest = largest_of_lane[0];
  for (int64_t lane = 1; lane < kLanes<float>; ++lane) {
    largest = largest_of_lane[lane] > largest ? largest_of_lane[lane] : largest;
  }
  Vector<float> total{};
  for (int64_t first = 0; first < V; first += kBlock * kLanes<float>) {
    Vector<float> of_block{};
    const int64_t left = V - first, count = kBlock * kLanes<float>;
    for_each_vector<float>(left < count ? left : count, [&](int64_t w, auto... rest) {
      of_block += exp((load_or(lowest, logits + first + w, rest...) - largest) * factor);
    });
    total += of_block;
  }
  return largest * factor + std::log(sum_of_lanes<float>(total));
}

template <typename T>
void search_image(const BeamSearchStep<T>& params, int64_t b) {
  const auto [B, J, K, V] = params.sizes;
  Candidate best[kMostBeams];
  float ends[kMostBeams];
  bool is_nan = false;
  for (int64_t j = 0; j < J; ++j) {
    const int64_t row = b * J + j;
    ends[j] = -INFINITY;
    if (params.scores[row] == -INFINITY) continue;
    const T* logits = params.logits + row * params.logits_stride;
    const float factor = params.inverse_temperature, base = params.scores[row] - log_sum_exp(logits, V, factor);
    if (base != base) {
      is_nan = true;
      continue;
    }
    if (params.end_allowed) {
      const Vector<float> score = load(logits + params.end, 1) * factor + base;
      ends[j] = score[0] - penalty_of(params, row, params.end);
    }
    for_each_vector<float>(V, [&](int64_t first, auto... rest) {
      const Vector<float> scores = load_or(broadcast(-INFINITY), logits + first, rest...) * factor + base;
      if (!any_above(scores, best[K - 1].score)) return;
      for (int64_t lane = 0; lane < kLanes<float>; ++lane) {
        const int64_t w = first + lane;
        if (!(scores[lane] > best[K - 1].score) || w == params.end || is_suppressed(params, w)) continue;
        Candidate candidate{scores[lane] - penalty_of(params, row, w), j * V + w};
        for (int64_t k = 0; k < K; ++k) {  // into its place; the worst falls off
          if (!is_better(candidate, best[k])) continue;
          const Candidate lower = best[k];
          best[k] = candidate;
          candidate = lower;
        }
      }
    });
  }
  for (int64_t j = 0; j < J; ++j) end_beam(params, b, best, ends, is_nan, j);
  for (int64_t h = 0; h < K + J; ++h) keep_hypothesis(params, b, h);
  for (int64_t k = 0; k < K; ++k) go_on(params, b, best, ends, is_nan, k);
}

}  // namespace

template <typename T>
void beam_search_step_cpu(const BeamSearchStep<T>& params, Threads threads) {
  parallel_for(threads, params.sizes.B, [&](int64_t b) { search_image(params, b); });
}

#define INSTANTIATE(T) template void beam_search_step_cpu(const BeamSearchStep<T>&, Threads);
INSTANTIATE(float)
INSTANTIATE(bfloat16)
INSTANTIATE(float16)
#undef INSTANTIATE

}  // namespace attncap::ATTNCAP_ISA
