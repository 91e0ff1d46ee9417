// Checks, allocates, calls the kernel of this library's device.
#include "../common/torch.h"
#include "soft_attention.h"

namespace attncap {
namespace {

Activation parse_activation(const std::string& name) {
  if (name == "tanh") return Activation::tanh;
  check(name == "relu", "soft_attention's activation is \"tanh\" or \"relu\", not \"" + name + "\"");
  return Activation::relu;
}

SoftAttentionSizes check_inputs(const Tensor& features, const Tensor& keys, const Tensor& query,
                                const Tensor& score_weight, const std::optional<Tensor>& gate) {
  check(features.dim() == 3 && keys.dim() == 3 && query.dim() == 2,
        "soft_attention takes features [B, P, D], keys [B, P, A] and query [N, A]");
  const int64_t B = features.size(0), P = features.size(1), D = features.size(2), A = keys.size(2);
  const int64_t N = query.size(0), K = B == 0 ? 0 : N / B;
  check(N == B * K, "soft_attention's query needs the same number of rows for every image");
  check(P > 0 && D > 0 && A > 0, "soft_attention needs at least one cell, channel and attention unit");
  check_tensor("soft_attention: keys", keys, features, {B, P, A});
  check_tensor("soft_attention: query", query, features, {N, A});
  check_tensor("soft_attention: score_weight", score_weight, features, {A});
  if (gate) check_tensor("soft_attention: gate", *gate, features, {N, D});
  return {B, K, P, D, A};
}

// [B, rows, columns] as it is when each image's part is contiguous, else a copy.
Tensor contiguous_images(const Tensor& tensor) {
  const bool fits = tensor.stride(2) == 1 && tensor.stride(1) == tensor.size(2);
  return fits ? tensor : torch::stable::contiguous(tensor);
}

std::tuple<Tensor, Tensor> forward(Tensor features, Tensor keys, Tensor query, Tensor score_weight,
                                   std::optional<Tensor> mask, std::optional<Tensor> gate, std::string activation) {
  const SoftAttentionSizes sizes = check_inputs(features, keys, query, score_weight, gate);
  const auto [B, K, P, D, A] = sizes;
  if (mask) check_tensor("soft_attention: mask", *mask, features, {B, P}, ScalarType::Bool);
  features = contiguous_images(features);
  keys = contiguous_images(keys);
  query = contiguous_rows(query);
  score_weight = torch::stable::contiguous(score_weight);
  mask = contiguous(mask);
  if (gate) gate = contiguous_rows(*gate);
  const Tensor context = torch::stable::new_empty(features, {B * K, D});
  const Tensor weights = torch::stable::new_empty(features, {B * K, P});
  const Tensor scores = torch::stable::new_empty(features, {B * K, P}, accumulate_dtype(features));

  dispatch_dtype(features, [&](auto type) {
    using T = decltype(type);
    SoftAttentionForward<T> params{
        .sizes = sizes,
        .activation = parse_activation(activation),
        .features_stride = features.stride(0),
        .keys_stride = keys.stride(0),
        .query_stride = query.stride(0),
        .gate_stride = gate ? gate->stride(0) : 0,
        .features = data<T>(features),
        .keys = data<T>(keys),
        .query = data<T>(query),
        .score_weight = data<T>(score_weight),
        .mask = mask ? data<bool>(*mask) : nullptr,
        .gate = gate ? data<T>(*gate) : nullptr,
        .context = mutable_data<T>(context),
        .weights = mutable_data<T>(weights),
        .scores = mutable_data<accumulate_t<T>>(scores),
    };
#ifdef USE_CUDA
    check(params.sizes.P <= kMaxCellsCuda<T>,
          "soft_attention on CUDA takes at most " + std::to_string(kMaxCellsCuda<T>) + " cells of this dtype");
    launch_on_device(features, [&](cudaStream_t stream) {
      const int parts = soft_attention_parts_cuda<T>(sizes);
      const Tensor context_parts = torch::stable::new_empty(
          features, {parts > 1 ? parts : 0, sizes.B * sizes.K, sizes.D}, accumulate_dtype(features));
      params.context_parts = mutable_data<accumulate_t<T>>(context_parts);
      return soft_attention_forward_cuda(params, stream);
    });
#else
    ATTNCAP_CALL_BEST_ISA(soft_attention_forward_cpu, params, threads);
#endif
  });
  return {context, weights};
}

struct Gradients {
  Tensor features, keys, query, score_weight, gate;  // empty where not wanted, or without a gate
  Tensor gated_context, score;                       // on the way to the others
};

Gradients compute_gradients(Tensor context_grad, Tensor weights_grad, Tensor features, Tensor keys, Tensor query,
                            Tensor score_weight, std::optional<Tensor> gate, Tensor context, Tensor weights,
                            const std::string& activation, bool features_need_grad, bool keys_need_grad) {
  const SoftAttentionSizes sizes = check_inputs(features, keys, query, score_weight, gate);
  const auto [B, K, P, D, A] = sizes;
  const int64_t N = B * K;
  check_tensor("soft_attention_backward: context_grad", context_grad, features, {N, D});
  check_tensor("soft_attention_backward: weights_grad", weights_grad, features, {N, P});
  check_tensor("soft_attention_backward: context", context, features, {N, D});
  check_tensor("soft_attention_backward: weights", weights, features, {N, P});
  context_grad = torch::stable::contiguous(context_grad);
  weights_grad = torch::stable::contiguous(weights_grad);
  features = contiguous_images(features);
  keys = contiguous_images(keys);
  query = torch::stable::contiguous(query);
  score_weight = torch::stable::contiguous(score_weight);
  gate = contiguous(gate);
  context = torch::stable::contiguous(context);
  weights = torch::stable::contiguous(weights);
  const ScalarType dtype = features.scalar_type(), accumulate = accumulate_dtype(features);
  const auto empty = [&](bool wanted, std::vector<int64_t> sizes, ScalarType dtype) {
    return torch::stable::new_empty(features, wanted ? sizes : std::vector<int64_t>{0}, dtype);
  };
  Gradients grad{
      .features = empty(features_need_grad, {B, P, D}, dtype),
      .keys = empty(keys_need_grad, {B, P, A}, dtype),
      .query = empty(true, {N, A}, accumulate),
      .score_weight = empty(keys_need_grad, {B, A}, accumulate),
      .gate = empty(gate.has_value(), {N, D}, dtype),
      .gated_context = empty(true, {N, D}, accumulate),
      .score = empty(true, {N, P}, accumulate),
  };

  dispatch_dtype(features, [&](auto type) {
    using T = decltype(type);
    using acc_t = accumulate_t<T>;
    const SoftAttentionBackward<T> params{
        .sizes = sizes,
        .activation = parse_activation(activation),
        .features_stride = features.stride(0),
        .keys_stride = keys.stride(0),
        .context_grad = data<T>(context_grad),
        .weights_grad = data<T>(weights_grad),
        .features = data<T>(features),
        .keys = data<T>(keys),
        .query = data<T>(query),
        .score_weight = data<T>(score_weight),
        .gate = gate ? data<T>(*gate) : nullptr,
        .context = data<T>(context),
        .weights = data<T>(weights),
        .features_grad = features_need_grad ? mutable_data<T>(grad.features) : nullptr,
        .keys_grad = keys_need_grad ? mutable_data<T>(grad.keys) : nullptr,
        .gate_grad = gate ? mutable_data<T>(grad.gate) : nullptr,
        .query_grad = mutable_data<acc_t>(grad.query),
        .score_weight_grad = keys_need_grad ? mutable_data<acc_t>(grad.score_weight) : nullptr,
        .gated_grad = mutable_data<acc_t>(grad.gated_context),
        .score_grad = mutable_data<acc_t>(grad.score),
    };
#ifdef USE_CUDA
    launch_on_device(features, [&](cudaStream_t stream) { return soft_attention_backward_cuda(params, stream); });
#else
    ATTNCAP_CALL_BEST_ISA(soft_attention_backward_cpu, params, threads);
#endif
  });
  grad.query = torch::stable::to(grad.query, dtype);
  return grad;
}

// [B, A] -> [A]
Tensor sum_over_images(const Tensor& score_weight_grad, ScalarType dtype) {
  const std::array<int64_t, 1> images = {0};
  return torch::stable::to(torch::stable::sum(score_weight_grad, images), dtype);
}

// features_grad is empty when not wanted, gate_grad without a gate.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(Tensor context_grad, Tensor weights_grad, Tensor features,
                                                            Tensor keys, Tensor query, Tensor score_weight,
                                                            std::optional<Tensor> gate, Tensor context, Tensor weights,
                                                            std::string activation, bool features_need_grad) {
  const Gradients grad = compute_gradients(context_grad, weights_grad, features, keys, query, score_weight, gate,
                                           context, weights, activation, features_need_grad, true);
  const Tensor score_weight_grad = sum_over_images(grad.score_weight, features.scalar_type());
  return {grad.features, grad.keys, grad.query, score_weight_grad, grad.gate};
}

// What belongs to the rows alone, and the gradients of the gated context and the scores, from which the others follow.
std::tuple<Tensor, Tensor, Tensor, Tensor> rows_backward(Tensor context_grad, Tensor weights_grad, Tensor features,
                                                         Tensor keys, Tensor query, Tensor score_weight, Tensor gate,
                                                         Tensor context, Tensor weights, std::string activation) {
  const Gradients grad = compute_gradients(context_grad, weights_grad, features, keys, query, score_weight, gate,
                                           context, weights, activation, false, false);
  return {grad.query, grad.gate, grad.gated_context, grad.score};
}

std::tuple<Tensor, Tensor> keys_backward(Tensor keys, Tensor query, Tensor score_weight, Tensor score_grad,
                                         Tensor row_starts, std::string activation) {
  check(keys.dim() == 3 && query.dim() == 2, "soft_attention_keys_backward takes keys [B, P, A] and query [rows, A]");
  const int64_t B = keys.size(0), P = keys.size(1), A = keys.size(2), rows = query.size(0);
  const ScalarType accumulate = accumulate_dtype(keys);
  check_tensor("soft_attention_keys_backward: query", query, keys, {rows, A});
  check_tensor("soft_attention_keys_backward: score_weight", score_weight, keys, {A});
  check_tensor("soft_attention_keys_backward: score_grad", score_grad, keys, {rows, P}, accumulate);
  check_tensor("soft_attention_keys_backward: row_starts", row_starts, keys, {B + 1}, ScalarType::Long);
  keys = contiguous_images(keys);
  query = torch::stable::contiguous(query);
  score_weight = torch::stable::contiguous(score_weight);
  score_grad = torch::stable::contiguous(score_grad);
  row_starts = torch::stable::contiguous(row_starts);
  const Tensor keys_grad = torch::stable::new_empty(keys, {B, P, A});
  const Tensor score_weight_grad = torch::stable::new_empty(keys, {B, A}, accumulate);

  dispatch_dtype(keys, [&](auto type) {
    using T = decltype(type);
    const SoftAttentionKeysBackward<T> params{
        .sizes = {.B = B, .K = 0, .P = P, .D = 0, .A = A},
        .activation = parse_activation(activation),
        .keys_stride = keys.stride(0),
        .keys = data<T>(keys),
        .query = data<T>(query),
        .score_weight = data<T>(score_weight),
        .score_grad = data<accumulate_t<T>>(score_grad),
        .row_starts = data<int64_t>(row_starts),
        .keys_grad = mutable_data<T>(keys_grad),
        .score_weight_grad = mutable_data<accumulate_t<T>>(score_weight_grad),
    };
#ifdef USE_CUDA
    launch_on_device(keys, [&](cudaStream_t stream) { return soft_attention_keys_backward_cuda(params, stream); });
#else
    ATTNCAP_CALL_BEST_ISA(soft_attention_keys_backward_cpu, params, threads);
#endif
  });
  return {keys_grad, sum_over_images(score_weight_grad, keys.scalar_type())};
}

}  // namespace
}  // namespace attncap

STABLE_TORCH_LIBRARY_IMPL(attncap, ATTNCAP_DISPATCH_KEY, library) {
  library.impl("soft_attention", TORCH_BOX(&attncap::forward));
  library.impl("soft_attention_backward", TORCH_BOX(&attncap::backward));
  library.impl("soft_attention_rows_backward", TORCH_BOX(&attncap::rows_backward));
  library.impl("soft_attention_keys_backward", TORCH_BOX(&attncap::keys_backward));
}
