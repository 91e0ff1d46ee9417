// Device code: a thread for each number of next_h and next_c, and then of output. How many blocks: see ..._blocks.
#pragma once

#include <cmath>

#include "lstm_step.h"

namespace attncap {

constexpr int kLstmThreads = 256;

template <typename T>
int64_t lstm_step_blocks(const LstmStep<T>& params) {
  return (params.N * (params.H + params.E) + kLstmThreads - 1) / kLstmThreads;
}

template <typename T>
__global__ void __launch_bounds__(kLstmThreads) lstm_step_kernel(LstmStep<T> params) {
  using Number = accumulate_t<T>;
  const int64_t H = params.H, E = params.E, at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t n = at / (H + E), j = at % (H + E);
  if (n >= params.N) return;
  const int64_t r = params.parents[n];
  const T* recurrent = params.recurrent + r * params.recurrent_stride;
  const T* context_part = params.context_part + r * params.context_stride;
  const T* of_word = params.word_table + params.tokens[n] * (4 * H + E);
  const auto sum = [&](int64_t i) { return static_cast<Number>(context_part[i]) + static_cast<Number>(of_word[i]); };
  if (j >= H) {
    params.output[n * E + j - H] = static_cast<T>(sum(3 * H + j));  // 4H + (j - H)
    return;
  }
  const auto gate = [&](int64_t i) { return static_cast<Number>(recurrent[i * H + j]) + sum(i * H + j); };
  const auto sigmoid = [](Number x) { return 1 / (1 + std::exp(-x)); };
  const Number c = params.c[r * H + j];
  const Number next_c = sigmoid(gate(1)) * c + sigmoid(gate(0)) * std::tanh(gate(2));
  params.next_c[n * H + j] = static_cast<T>(next_c);
  params.next_h[n * H + j] = static_cast<T>(sigmoid(gate(3)) * std::tanh(next_c));
}

}  // namespace attncap
