// The kernels of beam_search_step, without torch: the device code in the emulator, the CPU code in every instruction
// set of this processor.
//
// The truth is the description in beam_search_step.h, implemented naively in float64: all candidates in one list,
// sorted. Logits lie on a grid, and problems in which different scores are too close to each other are skipped. So
// ranks must agree exactly, while candidates with equal logits do tie.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda_emulator.h"  // first: it defines what device code needs

#include "beam_search_step/beam_search_step.cuh"
#include "testing.h"

using namespace attncap;
using cuda_emulator::launch;
using cuda_emulator::Schedule;

namespace {

constexpr double kTolerance = 1e-5;

struct Results {
  std::vector<int64_t> tokens, parents;
  std::vector<double> next_scores, ended, next_finished;
};

// The kinds of logits that an image may have.
enum class Kind { fine, coarse, large, equal, one_token, none_finite, with_nan, with_infinity, kinds };

template <typename T>
struct Problem {
  BeamSearchStep<T> step;  // points into these vectors:
  std::vector<T> logits;
  std::vector<float> scores, finished, penalties, next_scores, ended, next_finished;
  std::unique_ptr<bool[]> suppressed;
  std::vector<int64_t> penalty_tokens, tokens, parents;

  Problem(const BeamSearchSizes& sizes, unsigned seed) : step{} {
    const auto [B, J, K, V] = step.sizes = sizes;
    const int64_t N = B * J;
    std::mt19937 random(seed);
    const auto below = [&](int64_t count) { return static_cast<int64_t>(random() % count); };
    const auto one_of = [&](std::initializer_list<float> values) { return values.begin()[below(values.size())]; };

    step.inverse_temperature = 1 / one_of({1, 1, 0.5, 0.7, 2});
    step.length_penalty = one_of({1, 2.5});
    step.last_length_penalty = step.length_penalty * one_of({1, 1.5, 4});
    step.end = below(V);
    step.end_allowed = below(4) > 0;
    step.shrink = below(2);

    const int64_t offset = below(4);  // of the first row from an aligned address, in elements
    step.logits_stride = V + below(2) * below(20);
    logits.assign(offset + (N > 0 ? (N - 1) * step.logits_stride + V : 0), static_cast<T>(INFINITY));
    for (int64_t b = 0; b < B; ++b) {
      const int64_t draw = below(2 * int64_t(Kind::kinds));
      const Kind kind = draw < int64_t(Kind::kinds) ? Kind(draw) : Kind::fine;
      const std::vector<float> values = normal<float>(J * V, 2, random);
      for (int64_t j = 0; j < J; ++j) {
        T* row = &logits[offset + (b * J + j) * step.logits_stride];
        const double grid = kind == Kind::coarse ? 8 : 1024;
        for (int64_t w = 0; w < V; ++w) row[w] = static_cast<T>(float(std::round(values[j * V + w] * grid) / grid));
        for (int64_t w = 0; w < V && kind == Kind::large && sizeof(T) == 4; ++w) row[w] = float(row[w]) + 8192;
        if (below(2)) row[step.end] = *std::max_element(row, row + V);
        if (kind == Kind::equal) std::fill(row, row + V, static_cast<T>(0.5f));
        if (kind == Kind::one_token || kind == Kind::none_finite) std::fill(row, row + V, static_cast<T>(-INFINITY));
        if (kind == Kind::one_token) row[below(V)] = static_cast<T>(1.5f);
        if (kind == Kind::with_nan && below(J) == 0) row[below(V)] = static_cast<T>(NAN);
        if (kind == Kind::with_infinity && below(J) == 0) row[below(V)] = static_cast<T>(INFINITY);
        const bool is_none = below(5) == 0;
        scores.push_back(is_none ? -INFINITY : kind == Kind::equal ? -2.5f : -float(below(1 << 12)) / (1 << 10));
      }
      const int64_t count = one_of({0, 0, float(below(K + 1)), float(K)});
      std::vector<float> image_finished(K, -INFINITY);
      for (int64_t k = 0; k < count; ++k) image_finished[k] = -float(below(1 << 13)) / (1 << 10);
      std::sort(image_finished.rbegin(), image_finished.rend());
      finished.insert(finished.end(), image_finished.begin(), image_finished.end());
    }
    step.logits = logits.data() + offset;
    step.scores = scores.data();
    step.finished = finished.data();

    const auto likely = [&](int64_t n) {  // a token, often the row's best
      const T* row = step.logits + n * step.logits_stride;
      return below(2) ? std::max_element(row, row + V) - row : below(V);
    };
    if (below(2)) {
      suppressed.reset(new bool[V]);
      for (int64_t w = 0; w < V; ++w) suppressed[w] = below(5) == 0;
      for (int64_t n = 0; n < N; ++n) suppressed[likely(n)] = true;
      step.suppressed = suppressed.get();
    }
    if (below(2)) {
      step.penalty_count = below(5);
      for (int64_t n = 0; n < N; ++n) {
        for (int64_t m = 0; m < step.penalty_count; ++m) {
          const bool again = m > 0 && below(2);
          penalty_tokens.push_back(again ? penalty_tokens.back() : below(4) ? likely(n) : -1);
          penalties.push_back(below(4) ? below(32) / 8.0f + 1 / 32.0f : INFINITY);
        }
      }
      step.penalty_tokens = penalty_tokens.data();
      step.penalties = penalties.data();
    }
    allocate();
  }

  // Outputs are initialised to values that no kernel writes, so that missing writes are detected.
  void allocate() {
    const auto [B, J, K, V] = step.sizes;
    tokens.assign(B * K, -7), parents.assign(B * K, -7);
    next_scores.assign(B * K, 7), ended.assign(B * J, 7), next_finished.assign(B * K, 7);
    step.tokens = tokens.data(), step.parents = parents.data(), step.next_scores = next_scores.data();
    step.ended = ended.data(), step.next_finished = next_finished.data();
  }

  // Follows the description in the header. Returns false if different scores are too close for float32.
  bool run_reference(Results& results) const {
    const auto [B, J, K, V] = step.sizes;
    struct Candidate {
      double score;
      int64_t j, w;
    };
    bool is_clear = true;
    const auto compare = [&](double x, double y) { is_clear &= x == y || !(std::fabs(x - y) < 4 * kTolerance); };
    for (int64_t b = 0; b < B; ++b) {
      std::vector<Candidate> candidates;
      bool is_nan = false;
      for (int64_t j = 0; j < J; ++j) {
        const int64_t row = b * J + j;
        if (scores[row] == -INFINITY) continue;
        std::vector<double> x(step.logits + row * step.logits_stride, step.logits + row * step.logits_stride + V);
        double largest = -INFINITY, total = 0;
        for (double& logit : x) {
          is_nan |= std::isnan(logit) || logit == INFINITY;
          logit *= step.inverse_temperature;
          largest = std::max(largest, logit);
        }
        is_nan |= largest == -INFINITY;
        for (const double logit : x) total += std::exp(logit - largest);
        for (int64_t w = 0; w < V; ++w) {
          double score = scores[row] + x[w] - largest - std::log(total);
          for (int64_t m = 0; m < step.penalty_count; ++m) {
            if (penalty_tokens[row * step.penalty_count + m] == w) score -= penalties[row * step.penalty_count + m];
          }
          if (suppressed && suppressed[w] && w != step.end) continue;  // ignored for `end`
          if (w == step.end && !step.end_allowed) continue;
          if (score > -INFINITY) candidates.push_back({score, j, w});
        }
      }
      if (is_nan) candidates.clear();
      std::stable_sort(candidates.begin(), candidates.end(),
                       [](const Candidate& a, const Candidate& b) { return a.score > b.score; });
      for (size_t i = 0; i + 1 < candidates.size() && int64_t(i) < J + K; ++i) {
        compare(candidates[i].score, candidates[i + 1].score);
      }

      std::vector<double> hypotheses, ended_now(J, -INFINITY);
      for (int64_t k = 0; k < K; ++k) {
        if (finished[b * K + k] > -INFINITY) hypotheses.push_back(finished[b * K + k]);
      }
      const size_t width = step.shrink ? K - hypotheses.size() : K;
      std::vector<Candidate> live;
      for (size_t i = 0; i < candidates.size(); ++i) {
        const Candidate& candidate = candidates[i];
        if (candidate.w == step.end && i < width) {
          ended_now[candidate.j] = candidate.score;
          hypotheses.push_back(candidate.score / step.length_penalty);
        }
        if (candidate.w != step.end && (step.shrink ? i < width : live.size() < size_t(K))) live.push_back(candidate);
      }
      std::sort(hypotheses.rbegin(), hypotheses.rend());
      hypotheses.resize(K, -INFINITY);
      if (!step.shrink && !live.empty() && hypotheses[K - 1] > -INFINITY) {
        const double attainable = live[0].score / step.last_length_penalty;
        compare(hypotheses[K - 1], attainable);
        if (hypotheses[K - 1] >= attainable) live.clear();
      }
      for (int64_t k = 0; k < K; ++k) {
        const bool continues = k < int64_t(live.size());
        results.tokens.push_back(continues ? live[k].w : step.end);
        results.parents.push_back(b * J + (continues ? live[k].j : 0));
        results.next_scores.push_back(continues ? live[k].score : is_nan ? NAN : -INFINITY);
      }
      results.ended.insert(results.ended.end(), ended_now.begin(), ended_now.end());
      results.next_finished.insert(results.next_finished.end(), hypotheses.begin(), hypotheses.end());
    }
    return is_clear;
  }

  // The numbers of `logits` from the first row on.
  size_t used() const { return (step.sizes.B * step.sizes.J - 1) * step.logits_stride + step.sizes.V; }

  void run_on_cpu(Isa isa, Threads threads) const { ATTNCAP_CALL_ISA(isa, beam_search_step_cpu, step, threads); }

  void run_emulated(Schedule schedule) const {
    // With fewer multiprocessors than images, a block has half the warps.
    const int processors = schedule == Schedule::random ? 1 : 1000;
    const int threads = beam_search_step_threads(step.sizes, processors);
    launch(schedule, step.sizes.B, threads, beam_search_step_shared_bytes(step.sizes, threads),
           beam_search_step_kernel<T>, step);
  }

  void check(const std::string& name, const Results& truth) const {
    expect(tokens == truth.tokens, name + ": tokens");
    expect(parents == truth.parents, name + ": parents");
    expect(is_close(next_scores, truth.next_scores), name + ": next_scores");
    expect(is_close(ended, truth.ended), name + ": ended");
    expect(is_close(next_finished, truth.next_finished), name + ": next_finished");
  }

  static bool is_close(const std::vector<float>& actual, const std::vector<double>& truth) {
    return std::equal(actual.begin(), actual.end(), truth.begin(), truth.end(), [](double x, double y) {
      return x == y || (std::isnan(x) && std::isnan(y)) || std::fabs(x - y) <= kTolerance;
    });
  }
};

unsigned seed = 0;  // of the last problem

template <typename T>
void test(const char* dtype, const BeamSearchSizes& sizes, int problems) {
  while (problems > 0) {
    Problem<T> problem(sizes, ++seed);
    Results truth;
    if (!problem.run_reference(truth)) continue;
    --problems;
    char buffer[200];
    std::snprintf(buffer, sizeof(buffer), "%s B=%d J=%d K=%d V=%d seed %u ", dtype, int(sizes.B), int(sizes.J),
                  int(sizes.K), int(sizes.V), seed);
    for_each_isa([&](const std::string& how, Isa isa, Threads threads) {
      problem.allocate();
      problem.run_on_cpu(isa, threads);
      problem.check(buffer + how, truth);
    });
    for_each_schedule([&](const std::string& how, Schedule schedule) {
      problem.allocate();
      problem.run_emulated(schedule);
      problem.check(buffer + how, truth);
    });
  }
}

// Which warps and lanes get which tokens must not depend on where a row begins, or else equal beams differ.
template <typename T>
void test_any_alignment(const char* dtype) {
  for (int problems = 0; problems < 8; ++problems) {
    Problem<T> problem({2, 3, 4, 700}, ++seed);
    std::vector<float> scores[2];
    for (auto& next_scores : scores) {
      problem.allocate();
      problem.run_emulated(Schedule::lowest_first);
      next_scores = problem.next_scores;
      problem.logits.insert(problem.logits.begin(), T(0.0f));
      problem.step.logits = problem.logits.data() + (problem.logits.size() - problem.used());
    }
    const bool same = std::memcmp(scores[0].data(), scores[1].data(), scores[0].size() * sizeof(float)) == 0;
    expect(same, std::string(dtype) + " rows at another address: next_scores");
  }
}

}  // namespace

int main() {
  test_any_alignment<float>("float32");
  test_any_alignment<bfloat16>("bfloat16");
  const auto test_dtypes = [](const BeamSearchSizes& sizes, int problems) {
    test<float>("float32", sizes, problems);
    test<bfloat16>("bfloat16", sizes, problems);
    test<float16>("float16", sizes, problems);
  };
  for (const BeamSearchSizes& sizes : std::initializer_list<BeamSearchSizes>{{0, 2, 2, 7},
                                                                             {2, 1, 1, 1},
                                                                             {3, 1, 2, 2},
                                                                             {3, 2, 5, 3},
                                                                             {2, 2, 2, 2},
                                                                             {2, 5, 7, 7},
                                                                             {2, 1, 32, 33},
                                                                             {3, 5, 5, 33},
                                                                             {2, 3, 4, 512},
                                                                             {2, 2, 1, 1000}}) {
    test_dtypes(sizes, 4);
  }
  for (const BeamSearchSizes& sizes : std::initializer_list<BeamSearchSizes>{
           {1, 32, 2, 600}, {1, 32, 32, 33}, {1, 2, 32, 1000}, {2, 1, 5, 4099}, {1, 5, 5, 4099}}) {
    test_dtypes(sizes, 1);
  }
  return report();
}
