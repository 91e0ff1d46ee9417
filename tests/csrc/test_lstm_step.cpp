// lstm_step's kernels without torch: the device code in the emulator, the CPU code of every instruction set that this
// processor has.
//
// Truth is the formula of lstm_step.h in long double. Over all sizes, a kernel's largest error is at most twice that of
// the formula in the type sums are kept in, rounded like the kernel's results.
#include <algorithm>
#include <cmath>
#include <map>
#include <random>
#include <string>
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
  int64_t gap;  // between one row and the next
};

template <typename T>
struct Problem {
  LstmStep<T> step;  // pointers are into these:
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
    for (int64_t n = 0; n < N; ++n) parents.push_back(random() % R), tokens.push_back(random() % V);
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
            .parents = parents.data(),
            .tokens = tokens.data(),
            .next_h = next_h.data(),
            .next_c = next_c.data(),
            .output = output.data()};
  }

  // The formula, with numbers of type Number; results are those of type Result.
  template <typename Number, typename Result>
  std::map<std::string, std::vector<Result>> run_plainly() const {
    const int64_t H = step.H, E = step.E;
    std::map<std::string, std::vector<Result>> results;
    for (int64_t n = 0; n < step.N; ++n) {
      const T* of_word = &word_table[tokens[n] * (4 * H + E)];
      const T* of_context = &context_part[parents[n] * step.context_stride];
      const T* of_state = &recurrent[parents[n] * step.recurrent_stride];
      const auto gate = [&](int64_t i) { return Number(of_state[i]) + Number(of_context[i]) + Number(of_word[i]); };
      const auto sigmoid = [](Number x) { return 1 / (1 + std::exp(-x)); };
      for (int64_t j = 0; j < H; ++j) {
        const Number i = sigmoid(gate(j)), f = sigmoid(gate(H + j)), g = std::tanh(gate(2 * H + j));
        const Number next_c = f * Number(c[parents[n] * H + j]) + i * g;
        results["next_c"].push_back(Result(next_c));
        results["next_h"].push_back(Result(sigmoid(gate(3 * H + j)) * std::tanh(next_c)));
      }
      for (int64_t e = 4 * H; e < 4 * H + E; ++e) {
        results["output"].push_back(Result(Number(of_context[e]) + Number(of_word[e])));
      }
    }
    return results;
  }

  void run_on_cpu(Isa isa, Threads threads) const { ATTNCAP_CALL_ISA(isa, lstm_step_cpu, step, threads); }

  void run_emulated(Schedule schedule) const {
    launch(schedule, lstm_step_blocks(step), kLstmThreads, 0, lstm_step_kernel<T>, step);
  }
};

template <typename T>
double largest_error(const std::vector<T>& actual, const std::vector<long double>& truth) {
  if (actual.size() != truth.size()) return NAN;
  double largest = 0;
  for (size_t i = 0; i < truth.size(); ++i) {
    const double error = std::fabs(double(static_cast<long double>(actual[i]) - truth[i]));
    if (!(error <= largest)) largest = error;  // a NaN is taken and kept
  }
  return largest;
}

template <typename T>
void test(const std::string& dtype, std::initializer_list<Sizes> table) {
  std::map<std::string, double> errors, plain_errors;  // by result, and who computed it
  for (const Sizes& sizes : table) {
    const Problem<T> first(sizes);
    auto truth = first.template run_plainly<long double, long double>();
    auto plain = first.template run_plainly<accumulate_t<T>, T>();
    for (const char* name : {"next_h", "next_c", "output"}) {
      plain_errors[name] = std::max(plain_errors[name], largest_error(plain[name], truth[name]));
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
    const double plain = plain_errors[name.substr(0, name.find(','))];
    expect(error <= 2 * plain, dtype + ", " + name + ": " + std::to_string(error / plain) + " times the plain error");
  }
}

}  // namespace

int main() {
  const std::initializer_list<Sizes> table = {{1, 0, 3, 2, 1, 0},      {1, 1, 1, 0, 1, 0},   {3, 5, 7, 0, 4, 1},
                                              {4, 6, 8, 5, 9, 0},      {2, 3, 16, 16, 3, 8}, {5, 4, 33, 17, 7, 3},
                                              {9, 10, 100, 65, 20, 0}, {6, 7, 257, 1, 5, 5}};
  test<float>("float32", table);
  test<double>("float64", table);
  test<bfloat16>("bfloat16", table);
  test<float16>("float16", table);
  return report();
}
