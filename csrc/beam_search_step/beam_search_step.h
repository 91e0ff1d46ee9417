// One step of beam search: from logits to the beams that continue and the hypotheses that end.
//
// B images, V tokens. Every image has J beams before the step and K after it. (J = 1 in the first step, where all beams
// of an image would be identical.) The score of a beam is the sum of the log-probabilities of its tokens; -infinity
// means that there is no such beam. The candidates are all pairs of a beam j and a token w that is not suppressed:
//
//   candidate (j, w):  scores[b, j] + log softmax(logits[b J + j, :] / temperature)[w] - penalties
//
// Candidates are ranked by score; ties go to the lower beam, then to the lower token, on every device. Candidates with
// the token `end` that are among the best `width` candidates of the image end. They become hypotheses: their score,
// divided by `length_penalty`, is merged into `finished`, the K best of the image. As for the others:
//
//   shrink (Show, Attend and Tell): width = K minus the number of hypotheses in `finished`. The others among the best
//          `width` candidates continue, so the beam width shrinks with every hypothesis.
//   fixed: width = K. The K best candidates with other tokens continue, until the image has K hypotheses and the worst
//          of them is at least as good as the best live score divided by `last_length_penalty`. No beam can then
//          improve on them, as log-probabilities are at most 0 and length penalties do not decrease with the length.
//
// If a logit or score of an image is NaN, a logit is +infinity, or a row has no finite logit, all scores of the image
// are NaN from then on, so the caller needs to check only once, after the last step. B may be 0.
#pragma once

#include <cmath>
#include <cstdint>

#include "../common/dtype.h"
#include "../common/isa.h"

#ifdef USE_CUDA
#include <cuda_runtime_api.h>
#endif

namespace attncap {

struct BeamSearchSizes {
  int64_t B, J, K, V;
};

constexpr int64_t kMaxBeams = 32;            // of J and K; on CUDA, each lane of a warp holds one. MAX_BEAMS in Python
constexpr int64_t kMaxVocabulary = 1 << 30;  // of V; on CUDA, tokens are counted in an int

// By default no candidate, ranked after all others.
struct Candidate {
  float score = -INFINITY;
  int64_t index = INT64_MAX;  // j V + w
};

ATTNCAP_HOST_DEVICE inline bool is_better(const Candidate& a, const Candidate& b) {
  return a.score > b.score || (a.score == b.score && a.index < b.index);
}

template <typename T>
struct BeamSearchStep {
  BeamSearchSizes sizes;
  float inverse_temperature;
  float length_penalty, last_length_penalty;  // divisors of hypotheses that end in this step, and in the last step
  int64_t end;                                // the token that ends a hypothesis
  bool end_allowed, shrink;
  int64_t penalty_count;          // M
  int64_t logits_stride;          // between rows, in elements
  const T* logits;                // [B J, V]
  const float* scores;            // [B, J]
  const float* finished;          // [B, K], best first; -infinity: none
  const bool* suppressed;         // [V] or null; ignored for `end`, see end_allowed
  const int64_t* penalty_tokens;  // [B J, M] or null; negative ones are ignored
  const float* penalties;         // [B J, M], at least 0, subtracted; those of the same token add up
  int64_t* tokens;                // [B, K]; `end` where no beam continues
  int64_t* parents;               // [B, K], rows of logits
  float* next_scores;             // [B, K], best first
  float* ended;                   // [B, J], the score of beam j with `end`, if it ends in this step, else -infinity
  float* next_finished;           // [B, K]
};

// The penalty of token w in a row.
template <typename T>
ATTNCAP_HOST_DEVICE inline float penalty_of(const BeamSearchStep<T>& params, int64_t row, int64_t w) {
  float sum = 0;
  for (int64_t m = row * params.penalty_count; m < (row + 1) * params.penalty_count; ++m) {
    if (params.penalty_tokens[m] == w) sum += params.penalties[m];
  }
  return sum;
}

template <typename T>
ATTNCAP_HOST_DEVICE inline bool is_suppressed(const BeamSearchStep<T>& params, int64_t w) {
  return params.suppressed && params.suppressed[w];
}

// The step of an image concludes with end_beam, keep_hypothesis and continue_beam, in this order; the calls of one of
// them for different j, h or k are independent, and parallel on CUDA. best: the K best candidates of the image with
// tokens other than `end`, best first. ends[j]: the score of beam j's candidate with `end`. is_nan: whether the image's
// scores are to be NaN, see above.

template <typename T>
ATTNCAP_HOST_DEVICE inline int64_t width_of(const BeamSearchStep<T>& params, int64_t b) {
  const int64_t K = params.sizes.K;
  int64_t width = K;
  for (int64_t k = 0; k < K && params.shrink; ++k) width -= params.finished[b * K + k] > -INFINITY;
  return width;
}

// The h-th hypothesis of the image: first the K in `finished`, then the J that may end in this step.
template <typename T>
ATTNCAP_HOST_DEVICE inline Candidate hypothesis(const BeamSearchStep<T>& params, int64_t b, int64_t h) {
  const int64_t J = params.sizes.J, K = params.sizes.K;
  return {h < K ? params.finished[b * K + h] : params.ended[b * J + h - K] / params.length_penalty, h};
}

// For j < J: writes `ended`.
template <typename T>
ATTNCAP_HOST_DEVICE inline void end_beam(const BeamSearchStep<T>& params, int64_t b, const Candidate* best,
                                         const float* ends, bool is_nan, int64_t j) {
  const int64_t J = params.sizes.J, K = params.sizes.K, V = params.sizes.V;
  const Candidate end{ends[j], j * V + params.end};
  int64_t rank = 0;
  for (int64_t k = 0; k < K; ++k) rank += is_better(best[k], end);
  for (int64_t i = 0; i < J; ++i) rank += is_better({ends[i], i * V + params.end}, end);
  params.ended[b * J + j] = !is_nan && rank < width_of(params, b) ? end.score : -INFINITY;
}

// For h < K + J: writes the hypothesis to next_finished if it is among the K best.
template <typename T>
ATTNCAP_HOST_DEVICE inline void keep_hypothesis(const BeamSearchStep<T>& params, int64_t b, int64_t h) {
  const int64_t J = params.sizes.J, K = params.sizes.K;
  const Candidate kept = hypothesis(params, b, h);
  int64_t rank = 0;
  for (int64_t i = 0; i < K + J; ++i) rank += is_better(hypothesis(params, b, i), kept);
  if (rank < K) params.next_finished[b * K + rank] = kept.score;
}

// For k < K: writes the k-th beam after the step.
template <typename T>
ATTNCAP_HOST_DEVICE inline void continue_beam(const BeamSearchStep<T>& params, int64_t b, const Candidate* best,
                                              const float* ends, bool is_nan, int64_t k) {
  const int64_t J = params.sizes.J, K = params.sizes.K, V = params.sizes.V;
  bool continues = !is_nan && best[k].score > -INFINITY;
  if (params.shrink) {
    int64_t rank = k;
    for (int64_t j = 0; j < J; ++j) rank += is_better({ends[j], j * V + params.end}, best[k]);
    continues = continues && rank < width_of(params, b);
  } else {
    const float attainable = best[0].score / params.last_length_penalty;
    int64_t as_good = 0;
    for (int64_t h = 0; h < K + J; ++h) {
      const float score = hypothesis(params, b, h).score;
      as_good += score > -INFINITY && score >= attainable;
    }
    continues = continues && as_good < K;
  }
  params.next_scores[b * K + k] = continues ? best[k].score : is_nan ? NAN : -INFINITY;
  params.tokens[b * K + k] = continues ? best[k].index % V : params.end;
  params.parents[b * K + k] = b * J + (continues ? best[k].index / V : 0);
}

#define DECLARE(isa)                                                           \
  namespace isa {                                                              \
  template <typename T>                                                        \
  void beam_search_step_cpu(const BeamSearchStep<T>& params, Threads threads); \
  }
ATTNCAP_FOR_EACH_ISA(DECLARE)
#undef DECLARE

#ifdef USE_CUDA
// Returns the error of its launch.
template <typename T>
cudaError_t beam_search_step_cuda(const BeamSearchStep<T>& params, cudaStream_t stream);
#endif

}  // namespace attncap
