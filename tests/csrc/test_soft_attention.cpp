// The device code of soft_attention in the emulator, and the short number types, on the host.
//
// Truth is the CPU kernel in float64 (which tests/ops compares with plain PyTorch and with finite
// differences) on the same rounded inputs.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "cuda_emulator.h"  // first: it defines what device code needs

#include "soft_attention/soft_attention.cuh"

using namespace attncap;
using cuda_emulator::launch;
using cuda_emulator::Schedule;

namespace {

constexpr unsigned kThreads = 64;  // two warps: enough to disagree
int failures = 0;

void serial(int64_t count, const std::function<void(int64_t, int64_t)>& work) { work(0, count); }

// All arrays of one forward and backward pass. Outputs start as NaN, so that what is never written
// shows.
template <typename T>
struct Problem {
  SoftAttentionSizes sizes;
  Activation activation;
  bool masked, gated;
  std::vector<T> features, keys, query, score_weight, gate, context_grad, weights_grad;
  std::unique_ptr<bool[]> mask;
  std::vector<T> context, weights, features_grad, keys_grad, query_grad, gate_grad;
  std::vector<accumulate_t<T>> score_weight_grad, gated_grad, score_grad;

  void allocate() {
    const auto [B, K, P, D, A] = sizes;
    const T nan = static_cast<T>(NAN);
    context.assign(B * K * D, nan), weights.assign(B * K * P, nan);
    features_grad.assign(B * P * D, nan), keys_grad.assign(B * P * A, nan);
    query_grad.assign(B * K * A, nan), gate_grad.assign(gated ? B * K * D : 0, nan);
    score_weight_grad.assign(B * A, NAN), gated_grad.assign(B * K * D, NAN),
        score_grad.assign(B * K * P, NAN);
  }

  SoftAttentionForward<T> forward() {
    return {sizes,          activation,          features.data(), keys.data(),
            query.data(),   score_weight.data(), mask.get(),      gated ? gate.data() : nullptr,
            context.data(), weights.data()};
  }

  SoftAttentionBackward<T> backward() {
    return {sizes,
            activation,
            context_grad.data(),
            weights_grad.data(),
            features.data(),
            keys.data(),
            query.data(),
            score_weight.data(),
            gated ? gate.data() : nullptr,
            weights.data(),
            features_grad.data(),
            keys_grad.data(),
            query_grad.data(),
            gated ? gate_grad.data() : nullptr,
            score_weight_grad.data(),
            gated_grad.data(),
            score_grad.data()};
  }

  void run_on_cpu() {
    soft_attention_forward_cpu(forward(), serial);
    soft_attention_backward_cpu(backward(), serial);
  }

  // The same launches as soft_attention.cu.
  void run_emulated(Schedule schedule) {
    const auto [B, K, P, D, A] = sizes;
    const size_t shared_bytes = P * sizeof(accumulate_t<T>);
    launch(schedule, B * K, kThreads, shared_bytes, soft_attention_forward_kernel<T>, forward());
    launch(schedule, B * K, kThreads, 0, soft_attention_score_grad_kernel<T>, backward());
    launch(schedule, B, kThreads, 0, soft_attention_keys_grad_kernel<T>, backward());
    launch(schedule, B * P, kThreads, 0, soft_attention_features_grad_kernel<T>, backward());
  }
};

template <typename T>
std::vector<T> normal(int64_t count, double scale, std::mt19937& random) {
  std::normal_distribution<double> distribution(0, scale);
  std::vector<T> values(count);
  for (T& value : values) value = static_cast<T>(static_cast<float>(distribution(random)));
  return values;
}

template <typename T>
Problem<T> make_problem(SoftAttentionSizes sizes, Activation activation, bool masked, bool gated,
                        double scale) {
  const auto [B, K, P, D, A] = sizes;
  const int64_t N = B * K;
  std::mt19937 random(P * 1000 + D);
  Problem<T> problem{.sizes = sizes, .activation = activation, .masked = masked, .gated = gated};
  problem.features = normal<T>(B * P * D, 1, random);
  problem.keys = normal<T>(B * P * A, 1, random);
  problem.query = normal<T>(N * A, 1, random);
  problem.score_weight = normal<T>(A, scale / std::sqrt(A), random);
  problem.gate = normal<T>(gated ? N * D : 0, 1, random);
  problem.context_grad = normal<T>(N * D, 1 / std::sqrt(D), random);
  problem.weights_grad = normal<T>(N * P, 1, random);
  if (masked) {  // the last image has no cell that counts
    problem.mask.reset(new bool[B * P]);
    for (int64_t i = 0; i < B * P; ++i) problem.mask[i] = random() % 3 != 0 && i / P != B - 1;
  }
  problem.allocate();
  return problem;
}

template <typename T>
std::vector<double> widen(const std::vector<T>& values) {
  return std::vector<double>(values.begin(), values.end());
}

// The same numbers in float64.
template <typename T>
Problem<double> widen(const Problem<T>& problem) {
  Problem<double> wide{.sizes = problem.sizes,
                       .activation = problem.activation,
                       .masked = problem.masked,
                       .gated = problem.gated};
  wide.features = widen(problem.features), wide.keys = widen(problem.keys),
  wide.query = widen(problem.query);
  wide.score_weight = widen(problem.score_weight), wide.gate = widen(problem.gate);
  wide.context_grad = widen(problem.context_grad), wide.weights_grad = widen(problem.weights_grad);
  if (problem.masked) {
    const int64_t count = problem.sizes.B * problem.sizes.P;
    wide.mask.reset(new bool[count]);
    std::copy_n(problem.mask.get(), count, wide.mask.get());
  }
  wide.allocate();
  return wide;
}

// The largest error, as a share of the largest true value, is at most `tolerance`.
template <typename T>
void compare(const std::string& name, const std::vector<T>& actual,
             const std::vector<double>& truth, double tolerance) {
  double largest = 1e-30, error = 0;
  for (size_t i = 0; i < truth.size(); ++i) {
    largest = std::max(largest, std::fabs(truth[i]));
    const double difference = std::fabs(static_cast<double>(actual[i]) - truth[i]);
    if (!(difference <= error)) error = difference;  // a NaN is taken and kept
  }
  if (truth.size() == actual.size() && error <= tolerance * largest + 1e-30) return;
  std::printf("FAILED: %s: error %g of %g\n", name.c_str(), error, largest);
  ++failures;
}

// Every activation, with and without mask and gate.
template <typename T>
void test_sizes(const char* dtype, double tolerance,
                std::initializer_list<SoftAttentionSizes> table) {
  for (const SoftAttentionSizes& sizes : table) {
    for (const int variant : {0, 1, 2, 3}) {
      const Activation activation = variant % 2 ? Activation::relu : Activation::tanh;
      const bool masked = variant >= 2, gated = variant == 1 || variant == 2;
      Problem<T> problem = make_problem<T>(sizes, activation, masked, gated, 1);
      Problem<double> truth = widen(problem);
      truth.run_on_cpu();
      for (const Schedule schedule : cuda_emulator::kSchedules) {
        problem.allocate();
        problem.run_emulated(schedule);
        char name[200];
        std::snprintf(name, sizeof(name),
                      "%s B=%d K=%d P=%d D=%d A=%d variant %d schedule %d: ", dtype, int(sizes.B),
                      int(sizes.K), int(sizes.P), int(sizes.D), int(sizes.A), variant,
                      int(schedule));
        const std::string prefix = name;
        compare(prefix + "context", problem.context, truth.context, tolerance);
        compare(prefix + "weights", problem.weights, truth.weights, tolerance);
        compare(prefix + "features_grad", problem.features_grad, truth.features_grad, tolerance);
        compare(prefix + "keys_grad", problem.keys_grad, truth.keys_grad, tolerance);
        compare(prefix + "query_grad", problem.query_grad, truth.query_grad, tolerance);
        compare(prefix + "gate_grad", problem.gate_grad, truth.gate_grad, tolerance);
        compare(prefix + "score_weight_grad", problem.score_weight_grad, truth.score_weight_grad,
                tolerance);
      }
    }
  }
}

void test_large_scores() {
  Problem<float> problem =
      make_problem<float>({1, 2, 65, 4, 64}, Activation::relu, false, false, 1e4);
  Problem<double> truth = widen(problem);
  truth.run_on_cpu();
  for (const Schedule schedule : cuda_emulator::kSchedules) {
    problem.allocate();
    problem.run_emulated(schedule);
    compare("scores of 1e4: weights", problem.weights, truth.weights, 0.01);
    compare("scores of 1e4: context", problem.context, truth.context, 0.01);
  }
}

void expect(bool condition, const char* what) {
  if (condition) return;
  std::printf("FAILED: %s\n", what);
  ++failures;
}

void test_short_types() {
  for (uint32_t bits = 0; bits < 0x10000;
       ++bits) {  // every value survives the way to float and back
    float16 half;
    bfloat16 brain;
    half.bits = brain.bits = static_cast<uint16_t>(bits);
    if ((bits & 0x7fff) <= 0x7c00) expect(float16(float(half)).bits == bits, "float16 round trip");
    if ((bits & 0x7fff) <= 0x7f80)
      expect(bfloat16(float(brain)).bits == bits, "bfloat16 round trip");
  }
  expect(float(float16(65519.0f)) == 65504 && std::isinf(float(float16(65520.0f))),
         "float16 overflow");
  expect(float16(std::ldexp(1.0f, -24)).bits == 1 && float16(std::ldexp(1.0f, -25)).bits == 0,
         "float16 subnormals");
  expect(float(float16(2049.0f)) == 2048 && float(float16(2051.0f)) == 2052,
         "float16 ties to even");
  expect(float(bfloat16(257.0f)) == 256 && float(bfloat16(259.0f)) == 260, "bfloat16 ties to even");
  expect(std::isnan(float(float16(NAN))) && std::isnan(float(bfloat16(NAN))), "NaN stays NaN");
  expect(std::isinf(float(float16(-INFINITY))) && float(bfloat16(-INFINITY)) == -INFINITY,
         "infinity stays");
}

}  // namespace

int main() {
  test_short_types();
  // B, K, P, D, A; 64 threads: sizes below, at and above a warp and a block
  test_sizes<float>("float32", 1e-5,
                    {{1, 1, 1, 1, 1},
                     {2, 3, 7, 8, 5},
                     {1, 1, 49, 33, 100},
                     {3, 2, 8, 64, 64},
                     {2, 10, 5, 3, 8},
                     {1, 1, 197, 65, 33}});
  test_sizes<double>("float64", 1e-12, {{2, 3, 7, 8, 5}, {1, 2, 33, 65, 100}});
  test_sizes<bfloat16>("bfloat16", 0.02, {{2, 3, 7, 8, 5}, {1, 2, 33, 65, 100}});
  test_sizes<float16>("float16", 0.002, {{2, 3, 7, 8, 5}, {1, 2, 33, 65, 100}});
  test_large_scores();
  if (failures == 0) std::printf("ok\n");
  return failures != 0;
}
