// The CPU kernel. Compiled once for each instruction set, with ATTNCAP_ISA as its name.
//
// A row of logits is read once, block by block: for the maximum of the block and, while it is in the cache, for its sum
// of exponentials. Only the few blocks whose maximum is better than the K-th best candidate so far are then searched.
// Threads process different images, and different rows of an image if there is only one.
#include <cfloat>

#include "beam_search_step.h"

#include "../common/parallel.h"
#include "../common/simd.h"

namespace attncap::ATTNCAP_ISA {
namespace {

// Statistics of a row of logits.
struct Row {
  static constexpr int64_t kMaxBlocks = 64, kMinVectors = 16;
  Vector<float> block_max[kMaxBlocks];  // lane by lane
  float largest;                        // logit of the row
  float log_sum;  // log sum_w exp(factor * (logits[w] - largest)); NaN if any logit is NaN or +infinity, or all are
                  // -infinity
};

// Calls body(i, first, count) for every block of a row: its number, its first token and how many it has.
template <typename Body>
void for_each_block(int64_t V, const Body& body) {
  const int64_t vectors = (V / kLanes<float> + Row::kMaxBlocks) / Row::kMaxBlocks;
  const int64_t size = (vectors < Row::kMinVectors ? Row::kMinVectors : vectors) * kLanes<float>;
  for (int64_t i = 0; i * size < V; ++i) body(i, i * size, V - i * size < size ? V - i * size : size);
}

template <typename T>
void read(Row& row, const T* logits, int64_t V, float factor) {
  const Vector<float> lowest = broadcast(-INFINITY), least = broadcast(-FLT_MAX);
  const float to_log2 = factor * 1.44269504f;
  // Per lane. total is the sum of exponentials relative to that of `reference`.
  Vector<float> largest = lowest, reference = least, total{};
  for_each_block(V, [&](int64_t i, int64_t first, int64_t count) {
    Vector<float> largest_here = lowest, sum{};
    for_each_vector<float>(count, [&](int64_t w, auto... rest) {
      largest_here = larger(largest_here, load_or(lowest, logits + first + w, rest...));
    });
    row.block_max[i] = largest_here;
    largest = larger(largest, largest_here);
    const Vector<float> before = reference;
    reference = larger(least, largest);  // finite, since -infinity minus -infinity would be NaN
    for_each_vector<float>(count, [&](int64_t w, auto... rest) {
      sum += exp2_of_negative((load_or(lowest, logits + first + w, rest...) - reference) * to_log2);
    });
    total = total * exp2_of_negative((before - reference) * to_log2) + sum;
  });
  row.largest = largest[0];
  for (int64_t lane = 1; lane < kLanes<float>; ++lane) {
    row.largest = largest[lane] > row.largest ? largest[lane] : row.largest;
  }
  total *= exp2_of_negative((reference - row.largest) * to_log2);
  row.log_sum = row.largest == -INFINITY ? NAN : std::log(sum_of_lanes<float>(total));
}

template <typename T>
void search_image(const BeamSearchStep<T>& params, int64_t b, Threads threads) {
  const auto [B, J, K, V] = params.sizes;
  const float factor = params.inverse_temperature;
  Row rows[kMaxBeams];
  parallel_for(threads, J, [&](int64_t j) {
    const int64_t row = b * J + j;
    if (params.scores[row] != -INFINITY) read(rows[j], params.logits + row * params.logits_stride, V, factor);
  });

  Candidate best[kMaxBeams];
  float ends[kMaxBeams];
  bool is_nan = false;
  for (int64_t j = 0; j < J; ++j) {
    const int64_t row = b * J + j;
    ends[j] = -INFINITY;
    if (params.scores[row] == -INFINITY) continue;
    const T* logits = params.logits + row * params.logits_stride;
    const float base = params.scores[row] - rows[j].log_sum;
    if (base != base) {
      is_nan = true;
      continue;
    }
    // The largest logit is subtracted first, so that large logits lose no precision.
    const auto scores_of = [&](Vector<float> x) { return (x - rows[j].largest) * factor + base; };
    if (params.end_allowed) {
      ends[j] = scores_of(load(logits + params.end, 1))[0] - penalty_of(params, row, params.end);
    }
    for_each_block(V, [&](int64_t i, int64_t first, int64_t count) {
      if (!any_above(scores_of(rows[j].block_max[i]), best[K - 1].score)) return;
      for_each_vector<float>(count, [&](int64_t from, auto... rest) {
        const Vector<float> scores = scores_of(load_or(broadcast(-INFINITY), logits + first + from, rest...));
        if (!any_above(scores, best[K - 1].score)) return;
        for (int64_t lane = 0; lane < kLanes<float>; ++lane) {
          const int64_t w = first + from + lane;
          if (!(scores[lane] > best[K - 1].score) || w == params.end || is_suppressed(params, w)) continue;
          Candidate candidate{scores[lane] - penalty_of(params, row, w), j * V + w};
          for (int64_t k = 0; k < K; ++k) {  // insert; the worst drops out
            if (!is_better(candidate, best[k])) continue;
            const Candidate lower = best[k];
            best[k] = candidate;
            candidate = lower;
          }
        }
      });
    });
  }
  for (int64_t j = 0; j < J; ++j) end_beam(params, b, best, ends, is_nan, j);
  for (int64_t h = 0; h < K + J; ++h) keep_hypothesis(params, b, h);
  for (int64_t k = 0; k < K; ++k) continue_beam(params, b, best, ends, is_nan, k);
}

}  // namespace

template <typename T>
void beam_search_step_cpu(const BeamSearchStep<T>& params, Threads threads) {
  parallel_for(threads, params.sizes.B, [&](int64_t b) { search_image(params, b, threads); });
}

#define INSTANTIATE(T) template void beam_search_step_cpu(const BeamSearchStep<T>&, Threads);
INSTANTIATE(float)
INSTANTIATE(bfloat16)
INSTANTIATE(float16)
#undef INSTANTIATE

}  // namespace attncap::ATTNCAP_ISA
