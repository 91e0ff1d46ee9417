// Device code. Forward: a thread for each element of next_h and next_c, or each 16 bytes of elements, and the same for
// output. Backward: one thread for each element of c_grad. The functions *_blocks give the number of blocks.
#pragma once

#include <cmath>

#include "../common/device.cuh"
#include "../common/pack.cuh"
#include "lstm_step.h"

namespace attncap {

constexpr int kLstmThreads = 256;

// Whether everything can be read and written 16 bytes at a time.
template <typename T>
bool lstm_step_is_aligned(const LstmStep<T>& params) {
  const int64_t H = params.H, E = params.E;
  return is_aligned(params.recurrent, params.recurrent_stride, H) &&
         is_aligned(params.context_part, params.context_stride, E) && is_aligned(params.word_table, H, E) &&
         is_aligned(params.c, H, H) && is_aligned(params.next_h, H, H) && is_aligned(params.next_c, H, H) &&
         is_aligned(params.output, E, E);
}

template <typename T, bool aligned>
int64_t lstm_step_blocks(const LstmStep<T>& params) {
  const int64_t threads = params.N * (params.H + params.E) / (aligned ? kWidth<T> : 1);
  return (threads + kLstmThreads - 1) / kLstmThreads;
}

template <typename T, bool aligned>
__global__ void __launch_bounds__(kLstmThreads) lstm_step_kernel(LstmStep<T> params) {
  using acc_t = accumulate_t<T>;
  constexpr int width = aligned ? kWidth<T> : 1;
  const int64_t H = params.H, E = params.E, columns = (H + E) / width;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t n = index / columns, j = index % columns * width;
  if (n >= params.N) return;
  const int64_t r = params.parents ? params.parents[n] : n;
  const T* recurrent = params.recurrent + r * params.recurrent_stride;
  const T* context_part = params.context_part + r * params.context_stride;
  const T* word_row = params.word_table + (params.tokens ? params.tokens[n] : n) * (4 * H + E);
  const auto get = [](const T* from) { return load<width, true>(from, width); };
  Pack<acc_t, width> part[4], word[4], next_h, next_c;
  if (j >= H) {
    const int64_t i = 3 * H + j;  // 4H + (j - H)
    part[0] = get(context_part + i), word[0] = get(word_row + i);
#pragma unroll
    for (int k = 0; k < width; ++k) part[0].values[k] += word[0].values[k];
    store<true>(params.output + n * E + j - H, part[0], width);
    return;
  }
  Pack<acc_t, width> gates[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    gates[i] = get(recurrent + i * H + j), part[i] = get(context_part + i * H + j), word[i] = get(word_row + i * H + j);
  }
  const auto c = get(params.c + r * H + j);
#pragma unroll
  for (int k = 0; k < width; ++k) {
    const auto gate = [&](int i) { return gates[i].values[k] + (part[i].values[k] + word[i].values[k]); };
    next_c.values[k] = fast_sigmoid<T>(gate(1)) * c.values[k] + fast_sigmoid<T>(gate(0)) * fast_tanh<T>(gate(2));
    next_h.values[k] = fast_sigmoid<T>(gate(3)) * fast_tanh<T>(next_c.values[k]);
  }
  store<true>(params.next_c + n * H + j, next_c, width);
  store<true>(params.next_h + n * H + j, next_h, width);
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
