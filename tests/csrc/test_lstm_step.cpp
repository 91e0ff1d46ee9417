// The kernels of lstm_step, without torch: the device code in the emulator, the CPU code in every instruction set of
// this processor.
//
// The truth is the formula in lstm_step.h, computed in long double. Over all sizes, a kernel's largest error is at most
// twice that of a reference: the formula in the accumulation type, rounded like the kernel's results.
#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cuda_emulator.h"  // first: it defines what device code needs

#include "lstm_step/lstm_step.cuh"
#include "testing.h"

using namespace attncap;
using cuda_emulator::launch;
using cuda_emulator::Schedule;

namespace {

struct Sizes {
  int64_t R, N, H, E, V;
  int64_t gap;  // between rows
};

template <typename T>
struct Problem {
  LstmStep<T> step;  // points into these vectors:
  std::vector<T> recurrent, context_part, word_table, c;
  std::vector<int64_t> parents, tokens;
  std::vector<T> next_h, next_c, output;

  explicit Problem(const Sizes& sizes) {
    const auto [R, N, H, E, V, gap] = sizes;
    std::mt19937 random(N * 1000 + H);
    const auto rows = [&, R = R, gap = gap](int64_t width) {
      std::vector<T> values = normal<T>(R * (width + gap), 2, random);
      for (size_t i = 0; i < values.size(); ++i) {
        if (int64_t(i) % (width + gap) >= width) values[i] = static_cast<T>(NAN);
      }
      return values;
    };
    recurrent = rows(4 * H), context_part = rows(4 * H + E);
    word_table = normal<T>(V * (4 * H + E), 1, random), c = normal<T>(R * H, 1, random);
    const bool identity = N <= std::min(R, V);  // parents[n] = tokens[n] = n
    for (int64_t n = 0; n < N; ++n) {
      parents.push_back(identity ? n : random() % R), tokens.push_back(identity ? n : random() % V);
    }
    const T nan = static_cast<T>(NAN);
    next_h.assign(N * H, nan), next_c.assign(N * H, nan), output.assign(N * E, nan);
    step = {.N = N,
            .H = H,
            .E = E,
            .recurrent_stride = 4 * H + gap,
            .context_stride = 4 * H + E + gap,
            .recurrent = recurrent.data(),
            .context_part = context_part.data(),
            .word_table = word_table.data(),
            .c = c.data(),
            .parents = identity ? nullptr : parents.data(),
            .tokens = identity ? nullptr : tokens.data(),
            .next_h = next_h.data(),
            .next_c = next_c.data(),
            .output = output.data()};
  }

  // The formula, computed in type Real, with results of type Result.
  template <typename Real, typename Result>
  std::map<std::string, std::vector<Result>> run_reference() const {
    const int64_t H = step.H, E = step.E;
    std::map<std::string, std::vector<Result>> results;
    for (int64_t n = 0; n < step.N; ++n) {
      const T* word_row = &word_table[tokens[n] * (4 * H + E)];
      const T* context_row = &context_part[parents[n] * step.context_stride];
      const T* recurrent_row = &recurrent[parents[n] * step.recurrent_stride];
      const auto gate = [&](int64_t i) { return Real(recurrent_row[i]) + Real(context_row[i]) + Real(word_row[i]); };
      const auto sigmoid = [](Real x) { return 1 / (1 + std::exp(-x)); };
      for (int64_t j = 0; j < H; ++j) {
        const Real i = sigmoid(gate(j)), f = sigmoid(gate(H + j)), g = std::tanh(gate(2 * H + j));
        const Real next_c = f * Real(c[parents[n] * H + j]) + i * g;
        results["next_c"].push_back(Result(next_c));
        results["next_h"].push_back(Result(sigmoid(gate(3 * H + j)) * std::tanh(next_c)));
      }
      for (int64_t e = 4 * H; e < 4 * H + E; ++e) {
        results["output"].push_back(Result(Real(context_row[e]) + Real(word_row[e])));
      }
    }
    return results;
  }

  void run_on_cpu(Isa isa, Threads threads) const { ATTNCAP_CALL_ISA(isa, lstm_step_cpu, step, threads); }

  void run_emulated(Schedule schedule) const {
    if (lstm_step_is_aligned(step)) {
      launch(schedule, lstm_step_blocks<T, true>(step), kLstmThreads, 0, lstm_step_kernel<T, true>, step);
    } else {
      launch(schedule, lstm_step_blocks<T, false>(step), kLstmThreads, 0, lstm_step_kernel<T, false>, step);
    }
  }
};

// Backward. If there is a gap between rows, c_grad and next_c_grad are the same array.
template <typename T>
struct BackwardProblem {
  LstmStepBackward<T> step;  // points into these vectors:
  std::vector<T> recurrent, context_part, word_inputs, c, next_h_grad, next_c_grad, gates_grad, c_grad;

  BackwardProblem(int64_t N, int64_t H, int64_t gap) {
    std::mt19937 random(N * 1000 + H);
    recurrent = normal<T>(N * (4 * H + gap), 1, random), context_part = normal<T>(N * (4 * H + gap), 1, random);
    word_inputs = normal<T>(N * 4 * H, 1, random), c = normal<T>(N * H, 1, random);
    next_h_grad = normal<T>(N * H, 1, random), next_c_grad = normal<T>(N * H, 1, random);
    gates_grad.assign(N * (4 * H + gap), static_cast<T>(NAN)), c_grad.assign(N * H, static_cast<T>(NAN));
    if (gap > 0) c_grad = next_c_grad;
    step = {.N = N,
            .H = H,
            .recurrent_stride = 4 * H + gap,
            .context_stride = 4 * H + gap,
            .gates_grad_stride = 4 * H + gap,
            .recurrent = recurrent.data(),
            .context_part = context_part.data(),
            .word_inputs = word_inputs.data(),
            .c = c.data(),
            .next_h_grad = next_h_grad.data(),
            .next_c_grad = gap > 0 ? c_grad.data() : next_c_grad.data(),
            .gates_grad = gates_grad.data(),
            .c_grad = c_grad.data()};
  }

  // gates_grad [N, 4H] without the gaps, which must not be written.
  std::vector<T> gathered_gates_grad() const {
    std::vector<T> gathered;
    for (size_t i = 0; i < gates_grad.size(); ++i) {
      if (int64_t(i) % step.gates_grad_stride < 4 * step.H) {
        gathered.push_back(gates_grad[i]);
      } else {
        expect(std::isnan(double(accumulate_t<T>(gates_grad[i]))), "gates_grad: written between its rows");
      }
    }
    return gathered;
  }

  // gates_grad and c_grad by the chain rule, computed in type Real, with results of type Result.
  template <typename Real, typename Result>
  std::pair<std::vector<Result>, std::vector<Result>> run_reference() const {
    const int64_t N = step.N, H = step.H;
    std::vector<Result> gates(N * 4 * H), c_grads(N * H);
    for (int64_t n = 0; n < N; ++n) {
      for (int64_t j = 0; j < H; ++j) {
        const auto gate = [&](int64_t k) {
          return Real(recurrent[n * step.recurrent_stride + k * H + j]) +
                 Real(context_part[n * step.context_stride + k * H + j]) + Real(word_inputs[(4 * n + k) * H + j]);
        };
        const auto sigmoid = [](Real x) { return 1 / (1 + std::exp(-x)); };
        const Real i = sigmoid(gate(0)), f = sigmoid(gate(1)), g = std::tanh(gate(2)), o = sigmoid(gate(3));
        const Real before = Real(c[n * H + j]), y = std::tanh(f * before + i * g);
        const Real h_grad = Real(next_h_grad[n * H + j]);
        const Real c_grad = Real(next_c_grad[n * H + j]) + h_grad * o * (1 - y * y);
        Result* to = &gates[4 * n * H + j];
        to[0] = Result(c_grad * g * i * (1 - i)), to[H] = Result(c_grad * before * f * (1 - f));
        to[2 * H] = Result(c_grad * i * (1 - g * g)), to[3 * H] = Result(h_grad * y * o * (1 - o));
        c_grads[n * H + j] = Result(c_grad * f);
      }
    }
    return {gates, c_grads};
  }
};

template <typename T>
double largest_error(const std::vector<T>& actual, const std::vector<long double>& truth) {
  if (actual.size() != truth.size()) return NAN;
  double largest = 0;
  for (size_t i = 0; i < truth.size(); ++i) {
    const double error = std::fabs(double(static_cast<long double>(actual[i]) - truth[i]));
    if (!(error <= largest)) largest = error;  // once NaN, stays NaN
  }
  return largest;
}

template <typename T>
void test(const std::string& dtype, std::initializer_list<Sizes> table) {
  std::map<std::string, double> errors, reference_errors;  // by result and kernel, and by result
  for (const Sizes& sizes : table) {
    const Problem<T> first(sizes);
    auto truth = first.template run_reference<long double, long double>();
    auto reference = first.template run_reference<accumulate_t<T>, T>();
    for (const char* name : {"next_h", "next_c", "output"}) {
      reference_errors[name] = std::max(reference_errors[name], largest_error(reference[name], truth[name]));
    }
    const auto compare_with_truth = [&](const std::string& how, const Problem<T>& problem) {
      const auto compare = [&](const std::string& name, const std::vector<T>& actual) {
        double& largest = errors[name + ", " + how];
        const double error = largest_error(actual, truth[name]);
        if (!(error <= largest)) largest = error;
      };
      compare("next_h", problem.next_h), compare("next_c", problem.next_c), compare("output", problem.output);
    };
    for_each_isa([&](const std::string& how, Isa isa, Threads threads) {
      const Problem<T> problem(sizes);
      problem.run_on_cpu(isa, threads);
      compare_with_truth(how, problem);
    });
    for_each_schedule([&](const std::string& how, Schedule schedule) {
      const Problem<T> problem(sizes);
      problem.run_emulated(schedule);
      compare_with_truth(how, problem);
    });
  }
  for (const auto& [name, error] : errors) {
    const double reference = reference_errors[name.substr(0, name.find(','))];
    expect(error <= 2 * reference,
           dtype + ", " + name + ": " + std::to_string(error / reference) + " times the error of the reference");
  }
}

template <typename T>
void test_backward(const std::string& dtype) {
  std::map<std::string, double> errors;
  double reference_error = 0;
  for (const auto& [N, H, gap] : std::initializer_list<std::array<int64_t, 3>>{
           {0, 3, 0}, {1, 1, 0}, {5, 7, 1}, {6, 8, 0}, {3, 16, 8}, {4, 33, 3}, {10, 100, 0}, {7, 257, 5}}) {
    const BackwardProblem<T> first(N, H, gap);
    const auto truth = first.template run_reference<long double, long double>();
    const auto reference = first.template run_reference<accumulate_t<T>, T>();
    reference_error = std::max(
        {reference_error, largest_error(reference.first, truth.first), largest_error(reference.second, truth.second)});
    const auto compare_with_truth = [&](const std::string& how, const BackwardProblem<T>& problem) {
      for (const double error :
           {largest_error(problem.gathered_gates_grad(), truth.first), largest_error(problem.c_grad, truth.second)}) {
        if (!(error <= errors[how])) errors[how] = error;
      }
    };
    for_each_isa([&](const std::string& how, Isa isa, Threads threads) {
      const BackwardProblem<T> problem(N, H, gap);
      ATTNCAP_CALL_ISA(isa, lstm_step_backward_cpu, problem.step, threads);
      compare_with_truth(how, problem);
    });
    for_each_schedule([&](const std::string& how, Schedule schedule) {
      const BackwardProblem<T> problem(N, H, gap);
      const int64_t blocks = lstm_step_backward_blocks(problem.step);
      launch(schedule, blocks, kLstmThreads, 0, lstm_step_backward_kernel<T>, problem.step);
      compare_with_truth(how, problem);
    });
  }
  for (const auto& [how, error] : errors) {
    expect(error <= 2 * reference_error, dtype + ", backward, " + how + ": " + std::to_string(error / reference_error));
  }
}

}  // namespace

int main() {
  const std::initializer_list<Sizes> table = {{1, 0, 3, 2, 1, 0},      {1, 1, 1, 0, 1, 0},   {3, 5, 7, 0, 4, 1},
                                              {4, 6, 8, 5, 9, 0},      {2, 3, 16, 16, 3, 8}, {5, 4, 33, 17, 7, 3},
                                              {9, 10, 100, 65, 20, 0}, {6, 7, 257, 1, 5, 5}, {5, 5, 19, 6, 6, 2}};
  test<float>("float32", table);
  test<double>("float64", table);
  test<bfloat16>("bfloat16", table);
  test<float16>("float16", table);
  test_backward<float>("float32");
  test_backward<double>("float64");
  test_backward<bfloat16>("bfloat16");
  test_backward<float16>("float16");
  return report();
}
