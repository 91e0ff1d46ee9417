// The op on outputs that are already allocated, for this directory's ops and for loops over steps.
#pragma once

#include "../common/torch.h"
#include "soft_attention.h"

namespace attncap {

Activation parse_activation(const std::string& name);

// The tensor [B, rows, columns] itself if each image's matrix is contiguous, else a copy.
Tensor contiguous_images(const Tensor& tensor);

// Writes context [N, D] and weights [N, P], both contiguous.
void soft_attention(Tensor features, Tensor keys, Tensor query, Tensor score_weight, std::optional<Tensor> mask,
                    std::optional<Tensor> gate, Activation activation, const Tensor& context, const Tensor& weights);

// The outputs of a backward, contiguous, except that the rows of gate may have any stride. Those marked + have the
// accumulation type, the others the dtype of the features.
struct SoftAttentionGradients {
  std::optional<Tensor> features;      // [B, P, D], if needed
  std::optional<Tensor> keys;          // [B, P, A], if needed
  std::optional<Tensor> score_weight;  // [B, A] +, one summand per image; only with keys
  std::optional<Tensor> gate;          // [N, D], if there is a gate
  Tensor query;                        // [N, A] +
  Tensor gated_context;                // [N, D] +, intermediate result
  Tensor score;                        // [N, P] +, intermediate result
};

void soft_attention_backward(Tensor context_grad, Tensor weights_grad, Tensor features, Tensor keys, Tensor query,
                             Tensor score_weight, std::optional<Tensor> gate, Tensor context, Tensor weights,
                             Activation activation, const SoftAttentionGradients& grad);

}  // namespace attncap
