// Checks the arguments, allocates the outputs and calls the kernel of the device that this library is built for.
#include "soft_attention_torch.h"

namespace attncap {

Activation parse_activation(const std::string& name) {
  if (name == "tanh") return Activation::tanh;
  check(name == "relu", "soft_attention: activation must be \"tanh\" or \"relu\", not \"" + name + "\"");
  return Activation::relu;
}

Tensor contiguous_images(const Tensor& tensor) {
  const bool is_contiguous = tensor.stride(2) == 1 && tensor.stride(1) == tensor.size(2);
  return is_contiguous ? tensor : torch::stable::contiguous(tensor);
}

namespace {

SoftAttentionSizes check_inputs(const Tensor& features, const Tensor& keys, const Tensor& query,
                                const Tensor& score_weight, const std::optional<Tensor>& gate) {
  check(features.dim() == 3 && keys.dim() == 3 && query.dim() == 2,
        "soft_attention takes features [B, P, D], keys [B, P, A] and query [N, A]");
  const int64_t B = features.size(0), P = features.size(1), D = features.size(2), A = keys.size(2);
  const int64_t N = query.size(0), K = B == 0 ? 0 : N / B;
  check(N == B * K, "soft_attention: query needs the same number of rows for every image");
  check(P > 0 && D > 0 && A > 0, "soft_attention needs at least one cell, channel and attention unit");
  check_tensor("soft_attention: keys", keys, features, {B, P, A});
  check_tensor("soft_attention: query", query, features, {N, A});
  check_tensor("soft_attention: score_weight", score_weight, features, {A});
  if (gate) check_tensor("soft_attention: gate", *gate, features, {N, D});
  return {B, K, P, D, A};
}

}  // namespace

void soft_attention(Tensor features, Tensor keys, Tensor query, Tensor score_weight, std::optional<Tensor> mask,
                    std::optional<Tensor> gate, Activation activation, const Tensor& context, const Tensor& weights) {
  const SoftAttentionSizes sizes = check_inputs(features, keys, query, score_weight, gate);
  const auto [B, K, P, D, A] = sizes;
  if (mask) check_tensor("soft_attention: mask", *mask, features, {B, P}, ScalarType::Bool);
  features = contiguous_images(features);
  keys = contiguous_images(keys);
  query = contiguous_rows(query);
  score_weight = as_contiguous(score_weight);
  mask = contiguous(mask);
  if (gate) gate = contiguous_rows(*gate);
  const Tensor scores = empty(features, B * K, P, accumulate_dtype(features));

  dispatch_dtype(features, [&](auto type) {
    using T = decltype(type);
    SoftAttentionForward<T> params{
        .sizes = sizes,
        .activation = activation,
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
      const int64_t parts = soft_attention_parts_cuda<T>(sizes), numbers = parts > 1 ? parts * B * K : 0;
      const Tensor context_parts = empty(features, numbers, D, accumulate_dtype(features));
      params.context_parts = mutable_data<accumulate_t<T>>(context_parts);
      return soft_attention_forward_cuda(params, stream);
    });
#else
    ATTNCAP_CALL_BEST_ISA(soft_attention_forward_cpu, params, threads);
#endif
  });
}

void soft_attention_backward(Tensor context_grad, Tensor weights_grad, Tensor features, Tensor keys, Tensor query,
                             Tensor score_weight, std::optional<Tensor> gate, Tensor context, Tensor weights,
                             Activation activation, const SoftAttentionGradients& grad) {
  const SoftAttentionSizes sizes = check_inputs(features, keys, query, score_weight, gate);
  const auto [B, K, P, D, A] = sizes;
  const int64_t N = B * K;
  check_tensor("soft_attention_backward: context_grad", context_grad, features, {N, D});
  check_tensor("soft_attention_backward: weights_grad", weights_grad, features, {N, P});
  check_tensor("soft_attention_backward: context", context, features, {N, D});
  check_tensor("soft_attention_backward: weights", weights, features, {N, P});
  context_grad = as_contiguous(context_grad);
  weights_grad = as_contiguous(weights_grad);
  features = contiguous_images(features);
  keys = contiguous_images(keys);
  query = contiguous_rows(query);
  score_weight = as_contiguous(score_weight);
  if (gate) gate = contiguous_rows(*gate);
  context = as_contiguous(context);
  weights = as_contiguous(weights);

  dispatch_dtype(features, [&](auto type) {
    using T = decltype(type);
    using acc_t = accumulate_t<T>;
    const SoftAttentionBackward<T> params{
        .sizes = sizes,
        .activation = activation,
        .features_stride = features.stride(0),
        .keys_stride = keys.stride(0),
        .query_stride = query.stride(0),
        .gate_stride = gate ? gate->stride(0) : 0,
        .gate_grad_stride = gate ? grad.gate->stride(0) : 0,
        .context_grad = data<T>(context_grad),
        .weights_grad = data<T>(weights_grad),
        .features = data<T>(features),
        .keys = data<T>(keys),
        .query = data<T>(query),
        .score_weight = data<T>(score_weight),
        .gate = gate ? data<T>(*gate) : nullptr,
        .context = data<T>(context),
        .weights = data<T>(weights),
        .features_grad = grad.features ? mutable_data<T>(*grad.features) : nullptr,
        .keys_grad = grad.keys ? mutable_data<T>(*grad.keys) : nullptr,
        .gate_grad = gate ? mutable_data<T>(*grad.gate) : nullptr,
        .query_grad = mutable_data<acc_t>(grad.query),
        .score_weight_grad = grad.keys ? mutable_data<acc_t>(*grad.score_weight) : nullptr,
        .gated_grad = mutable_data<acc_t>(grad.gated_context),
        .score_grad = mutable_data<acc_t>(grad.score),
    };
#ifdef USE_CUDA
    launch_on_device(features, [&](cudaStream_t stream) { return soft_attention_backward_cuda(params, stream); });
#else
    ATTNCAP_CALL_BEST_ISA(soft_attention_backward_cpu, params, threads);
#endif
  });
}

namespace {

std::tuple<Tensor, Tensor> forward(Tensor features, Tensor keys, Tensor query, Tensor score_weight,
                                   std::optional<Tensor> mask, std::optional<Tensor> gate, std::string activation) {
  check(features.dim() == 3 && query.dim() == 2, "soft_attention takes features [B, P, D] and query [N, A]");
  const Tensor context = empty(features, query.size(0), features.size(2));
  const Tensor weights = empty(features, query.size(0), features.size(1));
  soft_attention(features, keys, query, score_weight, mask, gate, parse_activation(activation), context, weights);
  return {context, weights};
}

// [B, A] -> [A]
Tensor sum_over_images(const Tensor& score_weight_grad, ScalarType dtype) {
  const std::array<int64_t, 1> images = {0};
  return torch::stable::to(torch::stable::sum(score_weight_grad, images), dtype);
}

// features_grad is empty if it is not needed, gate_grad if there is no gate.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(Tensor context_grad, Tensor weights_grad, Tensor features,
                                                            Tensor keys, Tensor query, Tensor score_weight,
                                                            std::optional<Tensor> gate, Tensor context, Tensor weights,
                                                            std::string activation, bool features_need_grad) {
  check(features.dim() == 3 && keys.dim() == 3 && query.dim() == 2,
        "soft_attention_backward takes features [B, P, D], keys [B, P, A] and query [N, A]");
  const int64_t B = features.size(0), P = features.size(1), D = features.size(2), N = query.size(0), A = keys.size(2);
  const ScalarType dtype = features.scalar_type(), accumulate = accumulate_dtype(features);
  const Tensor features_grad =
      torch::stable::new_empty(features, features_need_grad ? std::vector<int64_t>{B, P, D} : std::vector<int64_t>{0});
  const SoftAttentionGradients grad{
      .features = features_need_grad ? std::optional(features_grad) : std::nullopt,
      .keys = torch::stable::new_empty(keys, {B, P, A}),
      .score_weight = empty(features, B, A, accumulate),
      .gate = empty(features, gate ? N : 0, D),
      .query = empty(features, N, A, accumulate),
      .gated_context = empty(features, N, D, accumulate),
      .score = empty(features, N, P, accumulate),
  };
  soft_attention_backward(context_grad, weights_grad, features, keys, query, score_weight, gate, context, weights,
                          parse_activation(activation), grad);
  return {features_grad, *grad.keys, torch::stable::to(grad.query, dtype), sum_over_images(*grad.score_weight, dtype),
          *grad.gate};
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
  query = contiguous_rows(query);
  score_weight = as_contiguous(score_weight);
  score_grad = as_contiguous(score_grad);
  row_starts = as_contiguous(row_starts);
  const Tensor keys_grad = torch::stable::new_empty(keys, {B, P, A});
  const Tensor score_weight_grad = empty(keys, B, A, accumulate);

  dispatch_dtype(keys, [&](auto type) {
    using T = decltype(type);
    const SoftAttentionKeysBackward<T> params{
        .sizes = {.B = B, .K = 0, .P = P, .D = 0, .A = A},
        .activation = parse_activation(activation),
        .keys_stride = keys.stride(0),
        .query_stride = query.stride(0),
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
  library.impl("soft_attention_keys_backward", TORCH_BOX(&attncap::keys_backward));
}
