// The op on tensors that are there already: for the ops of this room, and for loops over its steps.
#pragma once

#include "../common/torch.h"
#include "soft_attention.h"

namespace attncap {

Activation parse_activation(const std::string& name);

// [B, rows, columns] as it is when each image's part is contiguous, else a copy.
Tensor contiguous_images(const Tensor& tensor);

// Writes context [N, D] and weights [N, P], both contiguous.
void soft_attention(Tensor features, Tensor keys, Tensor query, Tensor score_weight, std::optional<Tensor> mask,
                    std::optional<Tensor> gate, Activation activation, const Tensor& context, const Tensor& weights);

// What a backward writes, contiguous but for the rows of gate, which may lie apart. Sums, marked +, are of the type
// that sums are kept in, the others of the features'.
struct SoftAttentionGradients {
  std::optional<Tensor> features;      // [B, P, D]
  std::optional<Tensor> keys;          // [B, P, A]
  std::optional<Tensor> score_weight;  // [B, A] +, each image's part; with keys only
  std::optional<Tensor> gate;          // [N, D], where there is a gate
  Tensor query;                        // [N, A] +
  Tensor gated_context;                // [N, D] +, on the way to the others
  Tensor score;                        // [N, P] +, likewise
};

void soft_attention_backward(Tensor context_grad, Tensor weights_grad, Tensor features, Tensor keys, Tensor query,
                             Tensor score_weight, std::optional<Tensor> gate, Tensor context, Tensor weights,
                             Activation activation, const SoftAttentionGradients& grad);

}  // namespace attncap
