// The kernels of soft_attention, without torch: the device code in the emulator, the CPU code in every instruction set
// of this processor, and the 16-bit number types.
//
// The truth is the formula in soft_attention.h and its derivatives, implemented naively in float64 below, on the same
// rounded inputs. (tests/ops also compares the op with plain PyTorch and with finite differences.)
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda_emulator.h"  // first: it defines what device code needs

#include "soft_attention/soft_attention_launch.h"
#include "testing.h"

using namespace attncap;
using cuda_emulator::launch;
using cuda_emulator::Schedule;

namespace {

using attncap::compare;  // overloaded below
using attncap::widen;

// All arrays of one forward and backward pass. Outputs are initialised to NaN, so that missing writes are detected.
// `gap` is the number of unused elements between images in features and keys, and between rows in query, gate and
// gate_grad.
template <typename T>
struct Problem {
  using acc_t = accumulate_t<T>;
  SoftAttentionSizes sizes;
  Activation activation;
  bool masked, gated;
  int64_t gap;
  bool separate_keys_backward = false;  // compute keys_grad and score_weight_grad by keys_backward
  std::vector<T> features, keys, query, score_weight, gate, context_grad, weights_grad;
  std::unique_ptr<bool[]> mask;
  std::vector<T> query_with_gaps, gate_with_gaps, gate_grad_with_gaps;
  std::vector<T> context, weights, features_grad, keys_grad, gate_grad;
  std::vector<acc_t> scores, context_parts, query_grad, score_weight_grad, gated_grad, score_grad;
  std::vector<int64_t> row_starts;

  void allocate() {
    const auto [B, K, P, D, A] = sizes;
    const T nan = static_cast<T>(NAN);
    context.assign(B * K * D, nan), weights.assign(B * K * P, nan), gate_grad.assign(gated ? B * K * D : 0, nan);
    features_grad.assign(B * P * D, nan), keys_grad.assign(B * P * A, nan);
    query_grad.assign(B * K * A, NAN), score_weight_grad.assign(B * A, NAN);
    scores.assign(B * K * P, NAN), gated_grad.assign(B * K * D, NAN), score_grad.assign(B * K * P, NAN);
  }

  std::vector<T> with_gaps(const std::vector<T>& values, int64_t length) const {
    std::vector<T> result;
    for (size_t i = 0; i < values.size(); ++i) {
      result.push_back(values[i]);
      if ((i + 1) % length == 0 && i + 1 < values.size()) result.insert(result.end(), gap, static_cast<T>(NAN));
    }
    return result;
  }

  SoftAttentionForward<T> forward() {
    query_with_gaps = with_gaps(query, sizes.A), gate_with_gaps = with_gaps(gate, sizes.D);
    gate_grad_with_gaps = with_gaps(gate_grad, sizes.D);
    return {.sizes = sizes,
            .activation = activation,
            .features_stride = sizes.P * sizes.D + gap,
            .keys_stride = sizes.P * sizes.A + gap,
            .query_stride = sizes.A + gap,
            .gate_stride = sizes.D + gap,
            .features = features.data(),
            .keys = keys.data(),
            .query = query_with_gaps.data(),
            .score_weight = score_weight.data(),
            .mask = mask.get(),
            .gate = gated ? gate_with_gaps.data() : nullptr,
            .context = context.data(),
            .weights = weights.data(),
            .scores = scores.data()};
  }

  SoftAttentionBackward<T> backward() {
    return {.sizes = sizes,
            .activation = activation,
            .features_stride = sizes.P * sizes.D + gap,
            .keys_stride = sizes.P * sizes.A + gap,
            .query_stride = sizes.A + gap,
            .gate_stride = sizes.D + gap,
            .gate_grad_stride = sizes.D + gap,
            .context_grad = context_grad.data(),
            .weights_grad = weights_grad.data(),
            .features = features.data(),
            .keys = keys.data(),
            .query = query_with_gaps.data(),
            .score_weight = score_weight.data(),
            .gate = gated ? gate_with_gaps.data() : nullptr,
            .context = context.data(),
            .weights = weights.data(),
            .features_grad = features_grad.data(),
            .keys_grad = separate_keys_backward ? nullptr : keys_grad.data(),
            .gate_grad = gated ? gate_grad_with_gaps.data() : nullptr,
            .query_grad = query_grad.data(),
            .score_weight_grad = separate_keys_backward ? nullptr : score_weight_grad.data(),
            .gated_grad = gated_grad.data(),
            .score_grad = score_grad.data()};
  }

  SoftAttentionKeysBackward<T> keys_backward() {
    row_starts.clear();
    for (int64_t b = 0; b <= sizes.B; ++b) row_starts.push_back(b * sizes.K);
    return {.sizes = {.B = sizes.B, .K = 0, .P = sizes.P, .D = 0, .A = sizes.A},
            .activation = activation,
            .keys_stride = sizes.P * sizes.A + gap,
            .query_stride = sizes.A + gap,
            .keys = keys.data(),
            .query = query_with_gaps.data(),
            .score_weight = score_weight.data(),
            .score_grad = score_grad.data(),
            .row_starts = row_starts.data(),
            .keys_grad = keys_grad.data(),
            .score_weight_grad = score_weight_grad.data()};
  }

  // gate_grad without the gaps, which must not be written.
  void gather() {
    const int64_t D = sizes.D;
    for (size_t i = 0; i < gate_grad_with_gaps.size(); ++i) {
      const int64_t n = i / (D + gap), d = i % (D + gap);
      if (d < D) {
        gate_grad[n * D + d] = gate_grad_with_gaps[i];
      } else {
        expect(std::isnan(double(accumulate_t<T>(gate_grad_with_gaps[i]))), "gate_grad: written between its rows");
      }
    }
  }

  // The formula, one row at a time.
  void run_reference() {
    const auto [B, K, P, D, A] = sizes;
    for (auto* gradient : {&features_grad, &keys_grad, &query_grad, &score_weight_grad}) {
      std::fill(gradient->begin(), gradient->end(), 0);
    }
    for (int64_t n = 0; n < B * K; ++n) {
      const int64_t b = n / K;
      const T *f = &features[b * (P * D + gap)], *k = &keys[b * (P * A + gap)], *q = &query[n * A];
      const auto x = [&](int64_t p, int64_t a) { return k[p * A + a] + q[a]; };
      const auto y = [&](int64_t p, int64_t a) {
        return activation == Activation::tanh ? std::tanh(x(p, a)) : std::max(x(p, a), T(0));
      };
      const auto y_grad = [&](int64_t p, int64_t a) {
        return activation == Activation::tanh ? 1 - y(p, a) * y(p, a) : T(x(p, a) > 0);
      };
      const auto counts = [&](int64_t p) { return !masked || mask[b * P + p]; };
      const auto sigmoid = [&](int64_t d) { return gated ? 1 / (1 + std::exp(-gate[n * D + d])) : 1; };
      T largest = -INFINITY, total = 0;
      std::vector<T> score(P, 0), sum(D, 0), weight_grad(P);
      for (int64_t p = 0; p < P; ++p) {
        for (int64_t a = 0; a < A; ++a) score[p] += score_weight[a] * y(p, a);
        if (counts(p)) largest = std::max(largest, score[p]);
      }
      for (int64_t p = 0; p < P; ++p) total += counts(p) ? std::exp(score[p] - largest) : 0;
      T mean = 0;
      for (int64_t p = 0; p < P; ++p) {
        const T weight = weights[n * P + p] = counts(p) ? std::exp(score[p] - largest) / total : 0;
        weight_grad[p] = weights_grad[n * P + p];
        for (int64_t d = 0; d < D; ++d) {
          const T grad = context_grad[n * D + d] * sigmoid(d);
          sum[d] += weight * f[p * D + d];
          weight_grad[p] += grad * f[p * D + d];
          features_grad[(b * P + p) * D + d] += weight * grad;
        }
        mean += weight * weight_grad[p];
      }
      for (int64_t d = 0; d < D; ++d) {
        context[n * D + d] = sum[d] * sigmoid(d);
        if (gated) gate_grad[n * D + d] = context_grad[n * D + d] * sigmoid(d) * (1 - sigmoid(d)) * sum[d];
      }
      for (int64_t p = 0; p < P; ++p) {
        const T grad = weights[n * P + p] * (weight_grad[p] - mean);
        for (int64_t a = 0; a < A; ++a) {
          const T x_grad = grad * score_weight[a] * y_grad(p, a);
          score_weight_grad[b * A + a] += grad * y(p, a);
          query_grad[n * A + a] += x_grad;
          keys_grad[(b * P + p) * A + a] += x_grad;
        }
      }
    }
  }

  void run_on_cpu(Isa isa, Threads threads) {
    ATTNCAP_CALL_ISA(isa, soft_attention_forward_cpu, forward(), threads);
    ATTNCAP_CALL_ISA(isa, soft_attention_backward_cpu, backward(), threads);
    if (separate_keys_backward) ATTNCAP_CALL_ISA(isa, soft_attention_keys_backward_cpu, keys_backward(), threads);
    gather();
  }

  // As on a GPU with this many multiprocessors, which determines the shapes of the blocks.
  void run_emulated(Schedule schedule, int processors) {
    const auto emulate = [&](auto kernel, int64_t blocks, int threads, size_t shared_bytes, const auto&... arguments) {
      launch(schedule, blocks, threads, shared_bytes, kernel, arguments...);
    };
    SoftAttentionForward<T> params = forward();
    const int parts = context_grid<T>(sizes, processors).parts;
    context_parts.assign(parts > 1 ? parts * context.size() : 0, NAN);
    params.context_parts = context_parts.data();
    launch_forward(params, processors, emulate);
    launch_backward(backward(), processors, emulate);
    if (separate_keys_backward) launch_keys_backward(keys_backward(), processors, emulate);
    gather();
  }
};

template <typename T>
Problem<T> make_problem(SoftAttentionSizes sizes, Activation activation, bool masked, bool gated, int64_t gap,
                        double scale) {
  const auto [B, K, P, D, A] = sizes;
  const int64_t N = B * K;
  std::mt19937 random(P * 1000 + D);
  Problem<T> problem{.sizes = sizes, .activation = activation, .masked = masked, .gated = gated, .gap = gap};
  problem.features = normal<T>(B * (P * D + gap), 1, random);
  problem.keys = normal<T>(B * (P * A + gap), 1, random);
  problem.query = normal<T>(N * A, 1, random);
  problem.score_weight = normal<T>(A, scale / std::sqrt(A), random);
  problem.gate = normal<T>(gated ? N * D : 0, 1, random);
  problem.context_grad = normal<T>(N * D, 1 / std::sqrt(D), random);
  problem.weights_grad = normal<T>(N * P, 1, random);
  if (masked) {  // all cells of the last image are masked
    problem.mask.reset(new bool[B * P]);
    for (int64_t i = 0; i < B * P; ++i) problem.mask[i] = random() % 3 != 0 && i / P != B - 1;
  }
  problem.allocate();
  return problem;
}

// The same values in float64.
template <typename T>
Problem<double> widen(const Problem<T>& problem) {
  Problem<double> wide{.sizes = problem.sizes,
                       .activation = problem.activation,
                       .masked = problem.masked,
                       .gated = problem.gated,
                       .gap = problem.gap};
  wide.features = widen(problem.features), wide.keys = widen(problem.keys), wide.query = widen(problem.query);
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

template <typename T>
void compare(const std::string& name, const Problem<T>& problem, const Problem<double>& truth, double tolerance) {
  compare(name + ": context", problem.context, truth.context, tolerance);
  compare(name + ": weights", problem.weights, truth.weights, tolerance);
  compare(name + ": features_grad", problem.features_grad, truth.features_grad, tolerance);
  compare(name + ": keys_grad", problem.keys_grad, truth.keys_grad, tolerance);
  compare(name + ": query_grad", problem.query_grad, truth.query_grad, tolerance);
  compare(name + ": gate_grad", problem.gate_grad, truth.gate_grad, tolerance);
  compare(name + ": score_weight_grad", problem.score_weight_grad, truth.score_weight_grad, tolerance);
}

// Both activations, with and without mask, gate and gap.
template <typename T>
void test_sizes(const char* dtype, double tolerance, std::initializer_list<SoftAttentionSizes> table) {
  for (const SoftAttentionSizes& sizes : table) {
    for (const int variant : {0, 1, 2, 3}) {
      const Activation activation = variant % 2 ? Activation::relu : Activation::tanh;
      const bool masked = variant >= 2, gated = variant == 1 || variant == 2;
      const int64_t gap = variant == 0 ? 0 : variant == 1 ? 16 : 3;
      Problem<T> problem = make_problem<T>(sizes, activation, masked, gated, gap, 1);
      Problem<double> truth = widen(problem);
      truth.run_reference();
      char buffer[200];
      std::snprintf(buffer, sizeof(buffer), "%s B=%d K=%d P=%d D=%d A=%d variant %d ", dtype, int(sizes.B),
                    int(sizes.K), int(sizes.P), int(sizes.D), int(sizes.A), variant);
      const std::string name = buffer;

      for_each_isa([&](const std::string& how, Isa isa, Threads threads) {
        problem.allocate();
        problem.run_on_cpu(isa, threads);
        compare(name + how, problem, truth, tolerance);
      });
      for_each_schedule([&](const std::string& how, Schedule schedule) {
        problem.allocate();
        problem.run_emulated(schedule, 100);
        compare(name + how, problem, truth, tolerance);
      });
      problem.allocate();
      problem.run_emulated(Schedule::random, 1);
      compare(name + "one processor", problem, truth, tolerance);

      problem.separate_keys_backward = true;
      for_each_isa([&](const std::string& how, Isa isa, Threads threads) {
        problem.allocate();
        problem.run_on_cpu(isa, threads);
        compare(name + "separate keys_backward, " + how, problem, truth, tolerance);
      });
      problem.allocate();
      problem.run_emulated(Schedule::random, 100);
      compare(name + "separate keys_backward, emulated", problem, truth, tolerance);
    }
  }
}

// The shared memory on CUDA can hold the weights of five rows in the first case, and of one row in the second.
void test_many_cells() {
  for (const int64_t P : {2000, 3000}) {
    Problem<float> problem = make_problem<float>({1, 7, P, 4, 4}, Activation::tanh, false, false, 0, 1);
    Problem<double> truth = widen(problem);
    truth.run_reference();
    problem.run_emulated(Schedule::random, 1);
    compare("many cells", problem, truth, 1e-5);
  }
}

void test_large_scores() {
  Problem<float> problem = make_problem<float>({1, 2, 65, 4, 64}, Activation::relu, false, false, 0, 1e4);
  Problem<double> truth = widen(problem);
  truth.run_reference();
  const auto check = [&](const char* name) {
    compare(std::string(name) + ", scores of 1e4: weights", problem.weights, truth.weights, 0.01);
    compare(std::string(name) + ", scores of 1e4: context", problem.context, truth.context, 0.01);
  };
  problem.allocate();
  problem.run_on_cpu(best_isa(), serial);
  check("CPU");
  problem.allocate();
  problem.run_emulated(Schedule::random, 1);
  check("emulated");
}

// kCellsInParts is split into parts of 35 and 36 cells on a GPU that it cannot fill. One image of realistic size is
// split too; many images or few cells are not.
constexpr SoftAttentionSizes kCellsInParts{2, 3, 71, 12, 4};

template <typename T>
void test_parts() {
  expect(context_grid<T>(kCellsInParts, 100).parts == 2, "as many parts as there are cells for every thread");
  expect(context_grid<T>(kCellsInParts, 1).parts == 1, "one part on a small GPU");
  expect(context_grid<T>({1, 5, 196, 2048, 512}, 132).blocks > 132, "a block for every multiprocessor with one image");
  expect(context_grid<T>({1024, 1, 196, 2048, 512}, 132).parts == 1, "one part with 1,024 images");
  expect(context_grid<T>({1, 1, 1, 1, 1}, 132).parts == 1, "one part with one cell");
}

void test_16_bit_types() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {  // converting to float and back preserves every value
    float16 half;
    bfloat16 brain;
    half.bits = brain.bits = static_cast<uint16_t>(bits);
    if ((bits & 0x7fff) <= 0x7c00) expect(float16(float(half)).bits == bits, "float16 round trip");
    if ((bits & 0x7fff) <= 0x7f80) expect(bfloat16(float(brain)).bits == bits, "bfloat16 round trip");
  }
  expect(float(float16(65519.0f)) == 65504 && std::isinf(float(float16(65520.0f))), "float16 overflow");
  expect(float16(std::ldexp(1.0f, -24)).bits == 1 && float16(std::ldexp(1.0f, -25)).bits == 0, "float16 subnormals");
  expect(float(float16(2049.0f)) == 2048 && float(float16(2051.0f)) == 2052, "float16 ties to even");
  expect(float(bfloat16(257.0f)) == 256 && float(bfloat16(259.0f)) == 260, "bfloat16 ties to even");
  expect(std::isnan(float(float16(NAN))) && std::isnan(float(bfloat16(NAN))), "NaN stays NaN");
  expect(std::isinf(float(float16(-INFINITY))) && float(bfloat16(-INFINITY)) == -INFINITY, "infinity stays");
}

}  // namespace

int main() {
  test_16_bit_types();
  test_parts<float>();
  test_parts<double>();
  test_parts<bfloat16>();
  // {B, K, P, D, A}: below, at and above the sizes of a vector, a warp, a tile of cells, a block and a block's rows
  test_sizes<float>("float32", 1e-5,
                    {{1, 1, 1, 1, 1},
                     {2, 0, 7, 8, 5},
                     {2, 3, 7, 8, 5},
                     {1, 1, 49, 33, 100},
                     {3, 2, 8, 64, 64},
                     {2, 10, 5, 3, 8},
                     {1, 5, 4, 520, 16},
                     {1, 12, 6, 20, 12},
                     {1, 1, 197, 65, 33},
                     kCellsInParts});
  test_sizes<double>("float64", 1e-12, {{2, 3, 7, 8, 5}, {1, 2, 33, 65, 100}, {1, 11, 3, 4, 6}, kCellsInParts});
  test_sizes<bfloat16>("bfloat16", 0.02, {{3, 0, 9, 72, 16}, {2, 3, 7, 8, 5}, {1, 2, 33, 65, 100}, {2, 6, 9, 72, 16}, kCellsInParts});
  test_sizes<float16>("float16", 0.002, {{2, 3, 7, 8, 5}, {1, 2, 33, 65, 100}, {2, 6, 9, 72, 16}, kCellsInParts});
  test_many_cells();
  test_large_scores();
  return report();
}
