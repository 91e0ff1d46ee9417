// The CPU kernel. Compiled once for each instruction set, with ATTNCAP_ISA as its name.
#include "lstm_step.h"

#include "../common/parallel.h"
#include "../common/simd.h"

namespace attncap::ATTNCAP_ISA {
namespace {

template <typename T>
void step_row(const LstmStep<T>& params, int64_t n) {
  using acc_t = accumulate_t<T>;
  const int64_t H = params.H, E = params.E, r = params.parents ? params.parents[n] : n;
  const T* recurrent = params.recurrent + r * params.recurrent_stride;
  const T* context_part = params.context_part + r * params.context_stride;
  const T* word_row = params.word_table + (params.tokens ? params.tokens[n] : n) * (4 * H + E);
  for_each_vector<acc_t>(H, [&](int64_t j, auto... rest) {
    const auto gate = [&](int64_t at) {
      return load(recurrent + at, rest...) + load(context_part + at, rest...) + load(word_row + at, rest...);
    };
    const Vector<acc_t> i = sigmoid<acc_t>(gate(j)), f = sigmoid<acc_t>(gate(H + j));
    const Vector<acc_t> g = tanh(gate(2 * H + j)), o = sigmoid<acc_t>(gate(3 * H + j));
    const Vector<acc_t> next_c = f * load(params.c + r * H + j, rest...) + i * g;
    store(params.next_c + n * H + j, next_c, rest...);
    store(params.next_h + n * H + j, o * tanh(next_c), rest...);
  });
  for_each_vector<acc_t>(E, [&](int64_t e, auto... rest) {
    const Vector<acc_t> sum = load(context_part + 4 * H + e, rest...) + load(word_row + 4 * H + e, rest...);
    store(params.output + n * E + e, sum, rest...);
  });
}

template <typename T>
void step_row_backward(const LstmStepBackward<T>& params, int64_t n) {
  using acc_t = accumulate_t<T>;
  const int64_t H = params.H;
  for_each_vector<acc_t>(H, [&](int64_t j, auto... rest) {
    const auto gate = [&](int64_t at) {
      return load(params.recurrent + n * params.recurrent_stride + at, rest...) +
             load(params.context_part + n * params.context_stride + at, rest...) +
             load(params.word_inputs + n * 4 * H + at, rest...);
    };
    const Vector<acc_t> i = sigmoid<acc_t>(gate(j)), f = sigmoid<acc_t>(gate(H + j));
    const Vector<acc_t> g = tanh(gate(2 * H + j)), o = sigmoid<acc_t>(gate(3 * H + j));
    const Vector<acc_t> c = load(params.c + n * H + j, rest...);
    const Vector<acc_t> activated = tanh(f * c + i * g);
    const Vector<acc_t> h_grad = load(params.next_h_grad + n * H + j, rest...);
    const Vector<acc_t> c_grad =
        load(params.next_c_grad + n * H + j, rest...) + h_grad * o * (acc_t(1) - activated * activated);
    T* gates_grad = params.gates_grad + n * params.gates_grad_stride + j;
    store(gates_grad, c_grad * g * i * (acc_t(1) - i), rest...);
    store(gates_grad + H, c_grad * c * f * (acc_t(1) - f), rest...);
    store(gates_grad + 2 * H, c_grad * i * (acc_t(1) - g * g), rest...);
    store(gates_grad + 3 * H, h_grad * activated * o * (acc_t(1) - o), rest...);
    store(params.c_grad + n * H + j, c_grad * f, rest...);
  });
}

}  // namespace

template <typename T>
void lstm_step_cpu(const LstmStep<T>& params, Threads threads) {
  parallel_for(threads, params.N, [&](int64_t n) { step_row(params, n); });
}

template <typename T>
void lstm_step_backward_cpu(const LstmStepBackward<T>& params, Threads threads) {
  parallel_for(threads, params.N, [&](int64_t n) { step_row_backward(params, n); });
}

#define INSTANTIATE(T)                                      \
  template void lstm_step_cpu(const LstmStep<T>&, Threads); \
  template void lstm_step_backward_cpu(const LstmStepBackward<T>&, Threads);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(bfloat16)
INSTANTIATE(float16)
#undef INSTANTIATE

}  // namespace attncap::ATTNCAP_ISA
