// Soft attention over the cells of an image's feature grid (Xu et al. 2015, "Show, Attend and Tell", equations 4 to 6
// and 13; the gate is beta of section 4.2.1, but with one value per channel).
//
//   score[n,p]   = sum_a score_weight[a] * activation(keys[b,p,a] + query[n,a])      b = n / K
//   weights[n,:] = softmax of score[n,:] over the cells whose mask is true; 0 elsewhere
//   context[n,d] = sigmoid(gate[n,d]) * sum_p weights[n,p] * features[b,p,d]
//
// B images, K rows per image, N = B*K rows (those of an image are adjacent), P cells, D channels, A attention size. All
// arrays have one type T (float, double, bfloat16, float16); sums are accumulated in accumulate_t<T>. The arrays are
// contiguous, except that features and keys may have any stride between images, and query, gate and gate_grad any
// stride between rows. A row whose cells are all masked has weights, context and gradients of 0. B and K may be 0;
// P, D and A are at least 1.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/isa.h"

#ifdef USE_CUDA
#include <cuda_runtime_api.h>
#endif

namespace attncap {

enum class Activation { tanh, relu };

struct SoftAttentionSizes {
  int64_t B, K, P, D, A;
};

template <typename T>
struct SoftAttentionForward {
  SoftAttentionSizes sizes;
  Activation activation;
  int64_t features_stride, keys_stride;  // between images, in elements
  int64_t query_stride, gate_stride;     // between rows
  const T* features;                     // [B, P, D]
  const T* keys;                         // [B, P, A]
  const T* query;                        // [N, A]
  const T* score_weight;                 // [A]
  const bool* mask;                      // [B, P], true = attend to this cell; null = to all
  const T* gate;                         // [N, D], before the sigmoid; null = no gate
  T* context;                            // [N, D]
  T* weights;                            // [N, P]
  accumulate_t<T>* scores;               // [N, P] scratch
  accumulate_t<T>* context_parts;        // [parts, N, D] scratch on CUDA if there are several parts, else unused
};

// The mask is not needed: the weight of a masked cell is 0, and with it every gradient of that cell. Activations are
// computed again; nothing of size [N, P, A] is stored.
template <typename T>
struct SoftAttentionBackward {
  SoftAttentionSizes sizes;
  Activation activation;
  int64_t features_stride, keys_stride;
  int64_t query_stride, gate_stride, gate_grad_stride;
  const T* context_grad;               // [N, D]
  const T* weights_grad;               // [N, P]
  const T* features;                   // [B, P, D]
  const T* keys;                       // [B, P, A]
  const T* query;                      // [N, A]
  const T* score_weight;               // [A]
  const T* gate;                       // [N, D] or null
  const T* context;                    // [N, D], the forward's output
  const T* weights;                    // [N, P], the forward's output
  T* features_grad;                    // [B, P, D], null = not needed
  T* keys_grad;                        // [B, P, A], null = not needed
  T* gate_grad;                        // [N, D], null if gate is null
  accumulate_t<T>* query_grad;         // [N, A]
  accumulate_t<T>* score_weight_grad;  // [B, A], one summand per image; the caller adds them, so that the order is
                                       // fixed. Null if keys_grad is null
  accumulate_t<T>* gated_grad;         // [N, D], intermediate result: context_grad * sigmoid(gate)
  accumulate_t<T>* score_grad;         // [N, P], intermediate result: the gradient of score
};

// Completes backward passes that did not compute keys_grad and score_weight_grad. It handles the passes of many steps
// with the same keys at once. The rows of image b are row_starts[b] to row_starts[b + 1] - 1, any number of them. The
// fields K and D of sizes are not used.
template <typename T>
struct SoftAttentionKeysBackward {
  SoftAttentionSizes sizes;
  Activation activation;
  int64_t keys_stride, query_stride;
  const T* keys;                       // [B, P, A]
  const T* query;                      // [rows, A]
  const T* score_weight;               // [A]
  const accumulate_t<T>* score_grad;   // [rows, P]
  const int64_t* row_starts;           // [B + 1]
  T* keys_grad;                        // [B, P, A]
  accumulate_t<T>* score_weight_grad;  // [B, A], as above
};

// The CPU kernels, compiled once for each instruction set.
#define DECLARE(isa)                                                                                  \
  namespace isa {                                                                                     \
  template <typename T>                                                                               \
  void soft_attention_forward_cpu(const SoftAttentionForward<T>& params, Threads threads);            \
  template <typename T>                                                                               \
  void soft_attention_backward_cpu(const SoftAttentionBackward<T>& params, Threads threads);          \
  template <typename T>                                                                               \
  void soft_attention_keys_backward_cpu(const SoftAttentionKeysBackward<T>& params, Threads threads); \
  }
ATTNCAP_FOR_EACH_ISA(DECLARE)
#undef DECLARE

// On CUDA, the context kernel keeps the weights of at least one row in 40 KiB of shared memory.
template <typename T>
constexpr int64_t kMaxCellsCuda = 40 * 1024 / sizeof(accumulate_t<T>);

#ifdef USE_CUDA
// The number of parts into which the forward splits the sum over cells, more than one if the current device would
// otherwise have too few blocks. The caller then allocates context_parts.
template <typename T>
int soft_attention_parts_cuda(const SoftAttentionSizes& sizes);

// All return the first error of their kernel launches.
template <typename T>
cudaError_t soft_attention_forward_cuda(const SoftAttentionForward<T>& params, cudaStream_t stream);
// The forward in one kernel. Returns whether it was launched, which takes compute capability 9.0 or newer, arrays that
// can be read 16 bytes at a time, and sizes that fit into shared memory; `error` is then that of the launch. Not for
// float64.
template <typename T>
bool soft_attention_cluster_cuda(const SoftAttentionForward<T>& params, cudaStream_t stream, cudaError_t& error);
template <typename T>
cudaError_t soft_attention_backward_cuda(const SoftAttentionBackward<T>& params, cudaStream_t stream);
template <typename T>
cudaError_t soft_attention_keys_backward_cuda(const SoftAttentionKeysBackward<T>& params, cudaStream_t stream);
#endif

}  // namespace attncap
