// The pointwise part of one LSTM step in a search. Row n continues row r = parents[n] of the previous step with token
// w = tokens[n]. Everything that depends on r alone was computed before parents and tokens were known:
//
//   i, f, g, o = recurrent[r] + context_part[r, :4H] + word_table[w, :4H]       H values each, in torch's order
//   c'[n]      = sigmoid(f) * c[r] + sigmoid(i) * tanh(g)
//   h'[n]      = sigmoid(o) * tanh(c'[n])
//   output[n]  = context_part[r, 4H:] + word_table[w, 4H:]                      E values, for the deep output layer
//
// recurrent is the hidden state times the recurrent weights. context_part is the context times the LSTM's and the
// output layer's context weights. word_table is the embedding of every token times the corresponding weights, biases
// included. N rows continue R rows; N, R and E may be 0, H is at least 1.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/isa.h"

#ifdef USE_CUDA
#include <cuda_runtime_api.h>
#endif

namespace attncap {

template <typename T>
struct LstmStep {
  int64_t N, H, E;
  int64_t recurrent_stride, context_stride;  // between rows, in elements
  const T* recurrent;                        // [R, 4H]
  const T* context_part;                     // [R, 4H + E]
  const T* word_table;                       // [V, 4H + E]
  const T* c;                                // [R, H]
  const int64_t* parents;                    // [N], in [0, R); null: parents[n] = n
  const int64_t* tokens;                     // [N], in [0, V); null: tokens[n] = n
  T* next_h;                                 // [N, H]
  T* next_c;                                 // [N, H]
  T* output;                                 // [N, E]
};

// Backward for training, where parents[n] = n, every row has a row of word inputs of its own, and E = 0. The gates are
// computed again. c_grad and next_c_grad may be the same array.
template <typename T>
struct LstmStepBackward {
  int64_t N, H;
  int64_t recurrent_stride, context_stride, gates_grad_stride;
  const T* recurrent;     // [N, 4H]
  const T* context_part;  // [N, 4H]
  const T* word_inputs;   // [N, 4H], the rows of word_table
  const T* c;             // [N, H]
  const T* next_h_grad;   // [N, H]
  const T* next_c_grad;   // [N, H]
  T* gates_grad;          // [N, 4H], the gradient of each of the three summands
  T* c_grad;              // [N, H]
};

#define DECLARE(isa)                                                               \
  namespace isa {                                                                  \
  template <typename T>                                                            \
  void lstm_step_cpu(const LstmStep<T>& params, Threads threads);                  \
  template <typename T>                                                            \
  void lstm_step_backward_cpu(const LstmStepBackward<T>& params, Threads threads); \
  }
ATTNCAP_FOR_EACH_ISA(DECLARE)
#undef DECLARE

#ifdef USE_CUDA
// Both return the error of their launch.
template <typename T>
cudaError_t lstm_step_cuda(const LstmStep<T>& params, cudaStream_t stream);
template <typename T>
cudaError_t lstm_step_backward_cuda(const LstmStepBackward<T>& params, cudaStream_t stream);
#endif

}  // namespace attncap
