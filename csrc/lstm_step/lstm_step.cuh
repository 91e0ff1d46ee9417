// Device code. Forward: one thread for each element of next_h and next_c, and one for each element of output. Backward:
// one thread for each element of c_grad. The functions *_blocks give the number of blocks.
#pragma once

#include <cmath>

#include "../common/device.cuh"
#include "lstm_step.h"

namespace attncap {

constexpr int kLstmThreads = 256;

template <typename T>
int64_t lstm_step_blocks(const LstmStep<T>& params) {
  return (params.N * (params.H + params.E) + kLstmThreads - 1) / kLstmThreads;
}

template <typename T>
__global__ void __launch_bounds__(kLstmThreads) lstm_step_kernel(LstmStep<T> params) {
  using acc_t = accumulate_t<T>;
  const int64_t H = params.H, E = params.E, index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t n = index / (H + E), j = index % (H + E);
  if (n >= params.N) return;
  const int64_t r = params.parents ? params.parents[n] : n;
  const T* recurrent = params.recurrent + r * params.recurrent_stride;
  const T* context_part = params.context_part + r * params.context_stride;
  const T* word_row = params.word_table + (params.tokens ? params.tokens[n] : n) * (4 * H + E);
  const auto sum = [&](int64_t i) { return static_cast<acc_t>(context_part[i]) + static_cast<acc_t>(word_row[i]); };
  if (j >= H) {
    params.output[n * E + j - H] = static_cast<T>(sum(3 * H + j));  // 4H + (j - H)
    return;
  }
  const auto gate = [&](int64_t i) { return static_cast<acc_t>(recurrent[i * H + j]) + sum(i * H + j); };
  const acc_t c = params.c[r * H + j];
  const acc_t next_c = sigmoid(gate(1)) * c + sigmoid(gate(0)) * std::tanh(gate(2));
  params.next_c[n * H + j] = static_cast<T>(next_c);
  params.next_h[n * H + j] = static_cast<T>(sigmoid(gate(3)) * std::tanh(next_c));
}

template <typename T>
int64_t lstm_step_backward_blocks(const LstmStepBackward<T>& params) {
  return (params.N * params.H + kLstmThreads - 1) / kLstmThreads;
}

template <typename T>
__global__ void __launch_bounds__(kLstmThreads) lstm_step_backward_kernel(LstmStepBackward<T> params) {
  using acc_t = accumulate_t<T>;
  const int64_t H = params.H, index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= params.N * H) return;
  const int64_t n = index / H, j = index % H;
  const auto gate = [&](int64_t k) {
    return static_cast<acc_t>(params.recurrent[n * params.recurrent_stride + k * H + j]) +
           static_cast<acc_t>(params.context_part[n * params.context_stride + k * H + j]) +
           static_cast<acc_t>(params.word_inputs[(4 * n + k) * H + j]);
  };
  const acc_t i = sigmoid(gate(0)), f = sigmoid(gate(1)), g = std::tanh(gate(2)), o = sigmoid(gate(3));
  const acc_t c = params.c[index], activated = std::tanh(f * c + i * g), h_grad = params.next_h_grad[index];
  const acc_t c_grad = static_cast<acc_t>(params.next_c_grad[index]) + h_grad * o * (1 - activated * activated);
  T* gates_grad = params.gates_grad + n * params.gates_grad_stride + j;
  gates_grad[0] = static_cast<T>(c_grad * g * i * (1 - i));
  gates_grad[H] = static_cast<T>(c_grad * c * f * (1 - f));
  gates_grad[2 * H] = static_cast<T>(c_grad * i * (1 - g * g));
  gates_grad[3 * H] = static_cast<T>(h_grad * activated * o * (1 - o));
  params.c_grad[index] = static_cast<T>(c_grad * f);
}

}  // namespace attncap
