// Teacher forcing: the loop over the steps of attncap/ops/attention_lstm.py, and its backward. A step is two matrix
// products and the kernels of soft_attention and lstm_step. The loop is in C++ because for small batches, and on CUDA,
// the calls from Python would take longer than the work.
//
// B images, K rows per image, N = B*K rows. Step t computes the rows of the first batch_sizes[t] images; the rows of
// all steps are concatenated, M in total. H hidden size, A attention size, D channels, P cells of the grid.
#include "../common/torch.h"
#include "../lstm_step/lstm_step_torch.h"
#include "../soft_attention/soft_attention_torch.h"

#ifdef USE_CUDA
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#define ATTNCAP_SHIM(name) aoti_torch_cuda_##name
#else
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#define ATTNCAP_SHIM(name) aoti_torch_cpu_##name
#endif

namespace attncap {
namespace {

// A view. (torch's narrow and transpose go through the dispatcher, which takes longer.)
template <size_t dims>
Tensor view(const Tensor& tensor, const std::array<int64_t, dims>& sizes, const std::array<int64_t, dims>& strides,
            int64_t offset) {
  AtenTensorHandle result;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(tensor.get(), dims, sizes.data(), strides.data(), offset, &result));
  return Tensor(result);
}

Tensor rows_of(const Tensor& matrix, int64_t begin, int64_t count) {
  const int64_t stride = matrix.stride(0);
  return view<2>(matrix, {count, matrix.size(1)}, {stride, matrix.stride(1)}, begin * stride);
}

Tensor columns_of(const Tensor& matrix, int64_t begin, int64_t count) {
  const int64_t stride = matrix.stride(1);
  return view<2>(matrix, {matrix.size(0), count}, {matrix.stride(0), stride}, begin * stride);
}

Tensor transposed(const Tensor& matrix) {
  return view<2>(matrix, {matrix.size(1), matrix.size(0)}, {matrix.stride(1), matrix.stride(0)}, 0);
}

Tensor first_images(const Tensor& tensor, int64_t count) {
  return view<3>(tensor, {count, tensor.size(1), tensor.size(2)},
                 {tensor.stride(0), tensor.stride(1), tensor.stride(2)}, 0);
}

Tensor contiguous_copy(const Tensor& matrix) {
  Tensor copy = empty(matrix, matrix.size(0), matrix.size(1));
  torch::stable::copy_(copy, matrix);
  return copy;
}

Tensor zeros(const Tensor& like, int64_t rows, int64_t columns) {
  Tensor result = empty(like, rows, columns);
  torch::stable::zero_(result);
  return result;
}

// Products with one weight [out, in]. On the CPU the weight may be packed by oneDNN (`packed` in attncap/ops/linear.py,
// which checks that the op called below exists and works).
class Product {
 public:
  explicit Product(const Tensor& weight) : weight_(weight) {
    int32_t layout;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(weight.get(), &layout));
    if (layout != aoti_torch_layout__mkldnn()) {
      transposed_ = transposed(weight);
    } else {
      check(weight.scalar_type() == ScalarType::Float, "attention_lstm takes weights packed by oneDNN in float32 only");
    }
  }

  // result = x weight^T + bias
  void write(const Tensor& x, const std::optional<Tensor>& bias, const Tensor& result) const {
    if (!transposed_) {
      Tensor to = result;
      torch::stable::copy_(to, onednn_linear(x, bias));
    } else if (bias) {
      multiply(result, *bias, x);
    } else {
      STABLE_TORCH_ERROR_CODE_CHECK(ATTNCAP_SHIM(mm_out)(result.get(), x.get(), transposed_->get()));
    }
  }

  // result += x weight^T
  void add(const Tensor& x, const Tensor& result) const {
    if (transposed_) return multiply(result, result, x);
    const Tensor product = onednn_linear(x, std::nullopt);
    const int64_t count = product.numel();
    const float* from = data<float>(product);
    float* to = mutable_data<float>(result);
    for (int64_t i = 0; i < count; ++i) to[i] += from[i];
  }

 private:
  void multiply(const Tensor& result, const Tensor& addend, const Tensor& x) const {
    STABLE_TORCH_ERROR_CODE_CHECK(
        ATTNCAP_SHIM(addmm_out)(result.get(), addend.get(), x.get(), transposed_->get(), 1, 1));
  }

  Tensor onednn_linear(const Tensor& x, const std::optional<Tensor>& bias) const {
    using torch::stable::detail::from;
    std::array<StableIValue, 6> stack = {from(x),
                                         from(weight_),
                                         from(bias),
                                         from(std::string("none")),
                                         from(std::vector<int64_t>()),
                                         from(std::optional<std::string>(""))};
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("mkldnn::_linear_pointwise", "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
  }

  Tensor weight_;
  std::optional<Tensor> transposed_;
};

struct Sizes {
  int64_t B, K, P, D, A, H, M;
};

// The loop slices these tensors at computed offsets, so their sizes are checked before it starts. Each step's
// soft_attention and lstm_step check the slices again.
Sizes check_inputs(const Tensor& features, const Tensor& keys, const Tensor& word_inputs, const Tensor& h,
                   const Tensor& c, const std::vector<int64_t>& batch_sizes) {
  check(features.dim() == 3 && keys.dim() == 3 && word_inputs.dim() == 2 && h.dim() == 2,
        "attention_lstm takes features [B, P, D], keys [B, P, A], word_inputs [M, 4H] and h [N, H]");
  const int64_t B = features.size(0), P = features.size(1), D = features.size(2), A = keys.size(2);
  const int64_t N = h.size(0), H = h.size(1), K = B == 0 ? 0 : N / B;
  check(N == B * K, "attention_lstm: h needs the same number of rows for every image");
  int64_t last = B, M = 0;
  for (const int64_t count : batch_sizes) {
    check(0 <= count && count <= last, "attention_lstm: batch_sizes must be from 0 to B and must not increase");
    last = count;
    M += K * count;
  }
  check_tensor("attention_lstm: keys", keys, features, {B, P, A});
  check_tensor("attention_lstm: word_inputs", word_inputs, features, {M, 4 * H});
  check_tensor("attention_lstm: h", h, features, {N, H});
  check_tensor("attention_lstm: c", c, features, {N, H});
  return {B, K, P, D, A, H, M};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    Tensor features, Tensor keys, Tensor word_inputs, Tensor h, Tensor c, Tensor hidden_weight, Tensor hidden_bias,
    Tensor context_weight, Tensor score_weight, std::vector<int64_t> batch_sizes, std::string activation) {
  const auto [B, K, P, D, A, H, M] = check_inputs(features, keys, word_inputs, h, c, batch_sizes);
  const Activation parsed = parse_activation(activation);
  features = contiguous_images(features);
  keys = contiguous_images(keys);
  word_inputs = as_contiguous(word_inputs);
  hidden_bias = as_contiguous(hidden_bias);  // oneDNN ignores its strides
  check_tensor("attention_lstm: hidden_weight", hidden_weight, features, {4 * H + A + D, H});
  check_tensor("attention_lstm: hidden_bias", hidden_bias, features, {4 * H + A + D});
  check_tensor("attention_lstm: context_weight", context_weight, features, {4 * H, D});
  const Product hidden_product(hidden_weight), context_product(context_weight);
  const Tensor next_h = empty(h, M, H), context = empty(h, M, D), weights = empty(h, M, P), next_c = empty(h, M, H);
  const Tensor projections = empty(h, M, 4 * H + A + D), context_gates = empty(h, M, 4 * H);

  int64_t begin = 0;
  for (const int64_t count : batch_sizes) {
    const int64_t rows = K * count;
    if (rows == 0) break;
    const auto at_step = [&](const Tensor& tensor) { return rows_of(tensor, begin, rows); };
    const Tensor projection = at_step(projections);
    hidden_product.write(rows_of(h, 0, rows), hidden_bias, projection);
    soft_attention(first_images(features, count), first_images(keys, count), columns_of(projection, 4 * H, A),
                   score_weight, std::nullopt, columns_of(projection, 4 * H + A, D), parsed, at_step(context),
                   at_step(weights));
    context_product.write(at_step(context), std::nullopt, at_step(context_gates));
    lstm_step(columns_of(projection, 0, 4 * H), at_step(context_gates), at_step(word_inputs), rows_of(c, 0, rows),
              std::nullopt, std::nullopt, at_step(next_h), at_step(next_c), std::nullopt);
    h = at_step(next_h);
    c = at_step(next_c);
    begin += rows;
  }
  return {next_h, context, weights, next_c, projections, context_gates};
}

// hidden_weight and context_weight are passed transposed. gated_grad is empty when features need no gradient.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(Tensor h_grad, Tensor context_grad, Tensor weights_grad,
                                                            Tensor features, Tensor keys, Tensor word_inputs, Tensor c,
                                                            Tensor hidden_weight, Tensor context_weight,
                                                            Tensor score_weight, Tensor context, Tensor weights,
                                                            Tensor next_c, Tensor projections, Tensor context_gates,
                                                            std::vector<int64_t> batch_sizes, std::string activation,
                                                            bool features_need_grad) {
  const auto [B, K, P, D, A, H, M] = check_inputs(features, keys, word_inputs, c, c, batch_sizes);
  const int64_t N = B * K;
  check_tensor("attention_lstm_backward: hidden_weight", hidden_weight, features, {H, 4 * H + A + D});
  check_tensor("attention_lstm_backward: context_weight", context_weight, features, {D, 4 * H});
  check_tensor("attention_lstm_backward: h_grad", h_grad, features, {M, H});
  check_tensor("attention_lstm_backward: context_grad", context_grad, features, {M, D});
  check_tensor("attention_lstm_backward: weights_grad", weights_grad, features, {M, P});
  check_tensor("attention_lstm_backward: context", context, features, {M, D});
  check_tensor("attention_lstm_backward: weights", weights, features, {M, P});
  check_tensor("attention_lstm_backward: next_c", next_c, features, {M, H});
  check_tensor("attention_lstm_backward: projections", projections, features, {M, 4 * H + A + D});
  check_tensor("attention_lstm_backward: context_gates", context_gates, features, {M, 4 * H});
  const Activation parsed = parse_activation(activation);
  const ScalarType accumulate = accumulate_dtype(features);
  features = contiguous_images(features);
  keys = contiguous_images(keys);
  word_inputs = as_contiguous(word_inputs);
  weights_grad = as_contiguous(weights_grad);
  const Product hidden_product(hidden_weight), context_product(context_weight);
  const Tensor projection_grad = empty(h_grad, M, 4 * H + A + D);
  const Tensor gated_grad = empty(features, features_need_grad ? M : N, D, accumulate);
  const Tensor score_grad = empty(features, M, P, accumulate);
  const Tensor query_grad = empty(features, N, A, accumulate);
  const Tensor first_h_grad = zeros(h_grad, N, H), c_grad = zeros(h_grad, N, H);
  // Copies, since the loop adds to them: each step adds the gradient with respect to its incoming h to the previous
  // step's h_grad, and the gradient through the LSTM gates to its own context_grad.
  h_grad = contiguous_copy(h_grad);
  context_grad = contiguous_copy(context_grad);

  int64_t begin = M;
  for (size_t t = batch_sizes.size(); t-- > 0;) {
    const int64_t count = batch_sizes[t], rows = K * count;
    if (rows == 0) continue;
    begin -= rows;
    const int64_t before = t == 0 ? 0 : begin - K * batch_sizes[t - 1];  // first row of the previous step
    const auto at_step = [&](const Tensor& tensor) { return rows_of(tensor, begin, rows); };
    const Tensor projection = at_step(projections), grad = at_step(projection_grad);
    const Tensor gates_grad = columns_of(grad, 0, 4 * H), first_c_grad = rows_of(c_grad, 0, rows);
    lstm_step_backward(columns_of(projection, 0, 4 * H), at_step(context_gates), at_step(word_inputs),
                       rows_of(t == 0 ? c : next_c, before, rows), at_step(h_grad), first_c_grad, gates_grad,
                       first_c_grad);
    context_product.add(gates_grad, at_step(context_grad));
    const Tensor step_query_grad = rows_of(query_grad, 0, rows);
    soft_attention_backward(at_step(context_grad), at_step(weights_grad), first_images(features, count),
                            first_images(keys, count), columns_of(projection, 4 * H, A), score_weight,
                            columns_of(projection, 4 * H + A, D), at_step(context), at_step(weights), parsed,
                            {.gate = columns_of(grad, 4 * H + A, D),
                             .query = step_query_grad,
                             .gated_context = rows_of(gated_grad, features_need_grad ? begin : 0, rows),
                             .score = at_step(score_grad)});
    Tensor to = columns_of(grad, 4 * H, A);
    torch::stable::copy_(to, step_query_grad);
    hidden_product.add(grad, rows_of(t == 0 ? first_h_grad : h_grad, before, rows));
  }
  return {projection_grad, features_need_grad ? gated_grad : empty(features, 0, D, accumulate), score_grad,
          first_h_grad, c_grad};
}

}  // namespace
}  // namespace attncap

STABLE_TORCH_LIBRARY_IMPL(attncap, ATTNCAP_DISPATCH_KEY, library) {
  library.impl("attention_lstm", TORCH_BOX(&attncap::forward));
  library.impl("attention_lstm_backward", TORCH_BOX(&attncap::backward));
}

#ifndef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(attncap, MkldnnCPU, library) {  // called with weights packed by oneDNN
  library.impl("attention_lstm", TORCH_BOX(&attncap::forward));
  library.impl("attention_lstm_backward", TORCH_BOX(&attncap::backward));
}
#endif
