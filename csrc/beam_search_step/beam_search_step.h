// One step of beam search: from logits to the beams that go on and the hypotheses that end.
//
// B images, J beams an image come in and K go on (J = 1 in the first step, where all beams of an image would be alike),
// V words. A beam's score is the sum of the log-probabilities of its words; -infinity: there is no such beam.
//
//   candidate (j, w):  scores[b, j] + log softmax(logits[b J + j, :] / temperature)[w] - penalties
//
// for every beam j and word w but the suppressed ones. Candidates are ranked by score; of equal ones the lower beam,
// then the lower word goes first, on every device. Candidates of `end` that are among the best `width` of the image
// end: they become hypotheses, whose score over `length_penalty` joins the image's K best in `finished`. Then
//
//   shrink (Show, Attend and Tell): width = K less the hypotheses the image has; what is left of the best `width` goes
//          on, so the width shrinks with every hypothesis.
//   fixed: width = K; the K best candidates of other words go on, until the image has K hypotheses of which the worst
//          is at least the best live score over `last_length_penalty`: log-probabilities are at most 0 and penalties do
//          not fall with the length, so none could improve.
//
// NaN among an image's logits or scores, or logits of which none is finite, make all its scores NaN from then on: the
// caller looks once, at the end. B may be 0.
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

constexpr int64_t kMostBeams = 32;       // K and J; CUDA keeps an image's beams in the lanes of a warp
constexpr int64_t kMostWords = 1 << 30;  // V; CUDA counts the words of a row in an int

struct Candidate {
  float score = -INFINITY;    // none, behind all others
  int64_t place = INT64_MAX;  // j V + w
};

ATTNCAP_HOST_DEVICE inline bool is_better(const Candidate& a, const Candidate& b) {
  return a.score > b.score || (a.score == b.score && a.place < b.place);
}

template <typename T>
struct BeamSearchStep {
  BeamSearchSizes sizes;
  float inverse_temperature;
  float length_penalty, last_length_penalty;  // divisors: of what ends in this step, and in the last one possible
  int64_t end;                                // the word that ends a hypothesis
  bool end_allowed, shrink;
  int64_t penalty_count;         // M
  int64_t logits_stride;         // from row to row, in elements
  const T* logits;               // [B J, V]
  const float* scores;           // [B, J]
  const float* finished;         // [B, K], best first; -infinity: none
  const bool* suppressed;        // [V] or null; of `end`, end_allowed decides
  const int64_t* penalty_words;  // [B J, M] or null; a negative one is none
  const float* penalties;        // [B J, M], at least 0, subtracted; of a word named twice, the sum
  int64_t* tokens;               // [B, K]; `end` where no beam goes on
  int64_t* parents;              // [B, K], rows of logits
  float* next_scores;            // [B, K], best first
  float* ended;                  // [B, J], the score of beam j's hypothesis that ended here; -infinity: none
  float* next_finished;          // [B, K]
};

// What is subtracted from word w of a row.
template <typename T>
ATTNCAP_HOST_DEVICE inline float penalty_of(const BeamSearchStep<T>& params, int64_t row, int64_t w) {
  float sum = 0;
  for (int64_t m = row * params.penalty_count; m < (row + 1) * params.penalty_count; ++m) {
    if (params.penalty_words[m] == w) sum += params.penalties[m];
  }
  return sum;
}

template <typename T>
ATTNCAP_HOST_DEVICE inline bool is_suppressed(const BeamSearchStep<T>& params, int64_t w) {
  return params.suppressed && params.suppressed[w];
}

// An image's step ends in the three functions below, in this order; calls of one of them for different numbers may run
// side by side, as CUDA's lanes do. best: the image's K best candidates of words other than `end`, best first. ends[j]:
// the score of beam j's candidate of `end`. is_nan: see above.

template <typename T>
ATTNCAP_HOST_DEVICE inline int64_t width_of(const BeamSearchStep<T>& params, int64_t b) {
  const int64_t K = params.sizes.K;
  int64_t width = K;
  for (int64_t k = 0; k < K && params.shrink; ++k) width -= params.finished[b * K + k] > -INFINITY;
  return width;
}

// The h-th of the image's hypotheses: the K of `finished`, then those that end here, one a beam.
template <typename T>
ATTNCAP_HOST_DEVICE inline Candidate hypothesis(const BeamSearchStep<T>& params, int64_t b, int64_t h) {
  const int64_t J = params.sizes.J, K = params.sizes.K;
  return {h < K ? params.finished[b * K + h] : params.ended[b * J + h - K] / params.length_penalty, h};
}

// For j < J: whether the beam ends here.
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

// For h < K + J: the hypothesis to its place, if that is among the K best.
template <typename T>
ATTNCAP_HOST_DEVICE inline void keep_hypothesis(const BeamSearchStep<T>& params, int64_t b, int64_t h) {
  const int64_t J = params.sizes.J, K = params.sizes.K;
  const Candidate kept = hypothesis(params, b, h);
  int64_t rank = 0;
  for (int64_t i = 0; i < K + J; ++i) rank += is_better(hypothesis(params, b, i), kept);
  if (rank < K) params.next_finished[b * K + rank] = kept.score;
}

// For k < K: whether best[k] goes on.
template <typename T>
ATTNCAP_HOST_DEVICE inline void go_on(const BeamSearchStep<T>& params, int64_t b, const Candidate* best,
                                      const float* ends, bool is_nan, int64_t k) {
  const int64_t J = params.sizes.J, K = params.sizes.K, V = params.sizes.V;
  bool goes_on = !is_nan && best[k].score > -INFINITY;
  if (params.shrink) {
    int64_t rank = k;
    for (int64_t j = 0; j < J; ++j) rank += is_better({ends[j], j * V + params.end}, best[k]);
    goes_on = goes_on && rank < width_of(params, b);
  } else {
    const float attainable = best[0].score / params.last_length_penalty;
    int64_t as_good = 0;
    for (int64_t h = 0; h < K + J; ++h) {
      const float score = hypothesis(params, b, h).score;
      as_good += score > -INFINITY && score >= attainable;
    }
    goes_on = goes_on && as_good < K;
  }
  params.next_scores[b * K + k] = goes_on ? best[k].score : is_nan ? NAN : -INFINITY;
  params.tokens[b * K + k] = goes_on ? best[k].place % V : params.end;
  params.parents[b * K + k] = b * J + (goes_on ? best[k].place / V : 0);
}

#define DECLARE(isa)                                                           \
  namespace isa {                                                              \
  template <typename T>                                                        \
  void beam_search_step_cpu(const BeamSearchStep<T>& params, Threads threads); \
  }
ATTNCAP_FOR_EACH_ISA(DECLARE)
#undef DECLARE

#ifdef USE_CUDA
// Returns the first error of its launches.
template <typename T>
cudaError_t beam_search_step_cuda(const BeamSearchStep<T>& params, cudaStream_t stream);
#endif

}  // namespace attncap
