// Teacher forcing: the loop over a caption's words and its backward, of attncap/ops/attention_lstm.py. A step is two
// products of matrices and the kernels of soft_attention and lstm_step; it stands here and not in Python because with
// small batches, or on CUDA, calling from Python takes longer than the work.
//
// B images, K rows an image, N = B*K rows; step t takes the first images[t] images, and the rows of all steps, M of
// them, lie one behind the other. H hidden size, A attention size, D channels, P cells, S = 4H + A + D.
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

// A view. (torch's own narrow and transpose ask the dispatcher.)
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

Tensor copy_of(const Tensor& matrix) {
  Tensor copy = empty(matrix, matrix.size(0), matrix.size(1));
  torch::stable::copy_(copy, matrix);
  return copy;
}

Tensor zeros(const Tensor& like, int64_t rows, int64_t columns) {
  Tensor result = empty(like, rows, columns);
  torch::stable::zero_(result);
  return result;
}

// Products with the same weight [out, in], which on the CPU may be one that oneDNN has laid out.
class Product {
 public:
  explicit Product(const Tensor& weight) : weight_(weight) {
    int32_t layout;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(weight.get(), &layout));
    if (layout != aoti_torch_layout__mkldnn()) {
      transposed_ = transposed(weight);
    } else {
      check(weight.scalar_type() == ScalarType::Float, "attention_lstm takes oneDNN's layout for float32 alone");
    }
  }

  // result = x weight^T + bias
  void write(const Tensor& x, const std::optional<Tensor>& bias, const Tensor& result) const {
    if (!transposed_) {
      Tensor to = result;
      torch::stable::copy_(to, by_onednn(x, bias));
    } else if (bias) {
      multiply(result, *bias, x);
    } else {
      STABLE_TORCH_ERROR_CODE_CHECK(ATTNCAP_SHIM(mm_out)(result.get(), x.get(), transposed_->get()));
    }
  }

  // result += x weight^T
  void add(const Tensor& x, const Tensor& result) const {
    if (transposed_) return multiply(result, result, x);
    const Tensor product = by_onednn(x, std::nullopt);
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

  Tensor by_onednn(const Tensor& x, const std::optional<Tensor>& bias) const {
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

// The matrices of all steps are sliced by these sizes, so they are checked here; their slices are once more, each by
// who takes it.
Sizes check_inputs(const Tensor& features, const Tensor& keys, const Tensor& words, const Tensor& h, const Tensor& c,
                   const std::vector<int64_t>& images) {
  check(features.dim() == 3 && keys.dim() == 3 && words.dim() == 2 && h.dim() == 2,
        "attention_lstm takes features [B, P, D], keys [B, P, A], words [M, 4H] and h [N, H]");
  const int64_t B = features.size(0), P = features.size(1), D = features.size(2), A = keys.size(2);
  const int64_t N = h.size(0), H = h.size(1), K = B == 0 ? 0 : N / B;
  check(N == B * K, "attention_lstm's h needs the same number of rows for every image");
  int64_t last = B, M = 0;
  for (const int64_t count : images) {
    check(0 <= count && count <= last, "attention_lstm's images never rise, from all of them to 0");
    last = count;
    M += K * count;
  }
  check_tensor("attention_lstm: keys", keys, features, {B, P, A});
  check_tensor("attention_lstm: words", words, features, {M, 4 * H});
  check_tensor("attention_lstm: h", h, features, {N, H});
  check_tensor("attention_lstm: c", c, features, {N, H});
  return {B, K, P, D, A, H, M};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(Tensor features, Tensor keys, Tensor words, Tensor h,
                                                                   Tensor c, Tensor hidden_weight, Tensor hidden_bias,
                                                                   Tensor context_weight, Tensor score_weight,
                                                                   std::vector<int64_t> images,
                                                                   std::string activation) {
  const auto [B, K, P, D, A, H, M] = check_inputs(features, keys, words, h, c, images);
  const Activation parsed = parse_activation(activation);
  features = contiguous_images(features);
  keys = contiguous_images(keys);
  words = as_contiguous(words);
  hidden_bias = as_contiguous(hidden_bias);  // oneDNN is not told its strides
  check_tensor("attention_lstm: hidden_weight", hidden_weight, features, {4 * H + A + D, H});
  check_tensor("attention_lstm: hidden_bias", hidden_bias, features, {4 * H + A + D});
  check_tensor("attention_lstm: context_weight", context_weight, features, {4 * H, D});
  const Product hidden_part(hidden_weight), context_part(context_weight);
  const Tensor next_h = empty(h, M, H), context = empty(h, M, D), weights = empty(h, M, P), cells = empty(h, M, H);
  const Tensor projections = empty(h, M, 4 * H + A + D), of_contexts = empty(h, M, 4 * H);

  int64_t begin = 0;
  for (const int64_t count : images) {
    const int64_t rows = K * count;
    if (rows == 0) break;
    const auto of_step = [&](const Tensor& of_all) { return rows_of(of_all, begin, rows); };
    const Tensor projection = of_step(projections);
    hidden_part.write(rows_of(h, 0, rows), hidden_bias, projection);
    soft_attention(first_images(features, count), first_images(keys, count), columns_of(projection, 4 * H, A),
                   score_weight, std::nullopt, columns_of(projection, 4 * H + A, D), parsed, of_step(context),
                   of_step(weights));
    context_part.write(of_step(context), std::nullopt, of_step(of_contexts));
    lstm_step(columns_of(projection, 0, 4 * H), of_step(of_contexts), of_step(words), rows_of(c, 0, rows), std::nullopt,
              std::nullopt, of_step(next_h), of_step(cells), std::nullopt);
    h = of_step(next_h);
    c = of_step(cells);
    begin += rows;
  }
  return {next_h, context, weights, cells, projections, of_contexts};
}

// The weights come transposed; gated_grad is empty when features need no gradient.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(Tensor h_grad, Tensor context_grad, Tensor weights_grad,
                                                            Tensor features, Tensor keys, Tensor words, Tensor c,
                                                            Tensor hidden_weight, Tensor context_weight,
                                                            Tensor score_weight, Tensor context, Tensor weights,
                                                            Tensor cells, Tensor projections, Tensor of_contexts,
                                                            std::vector<int64_t> images, std::string activation,
                                                            bool features_need_grad) {
  const auto [B, K, P, D, A, H, M] = check_inputs(features, keys, words, c, c, images);
  const int64_t N = B * K;
  check_tensor("attention_lstm_backward: hidden_weight", hidden_weight, features, {H, 4 * H + A + D});
  check_tensor("attention_lstm_backward: context_weight", context_weight, features, {D, 4 * H});
  check_tensor("attention_lstm_backward: h_grad", h_grad, features, {M, H});
  check_tensor("attention_lstm_backward: context_grad", context_grad, features, {M, D});
  check_tensor("attention_lstm_backward: weights_grad", weights_grad, features, {M, P});
  check_tensor("attention_lstm_backward: context", context, features, {M, D});
  check_tensor("attention_lstm_backward: weights", weights, features, {M, P});
  check_tensor("attention_lstm_backward: cells", cells, features, {M, H});
  check_tensor("attention_lstm_backward: projections", projections, features, {M, 4 * H + A + D});
  check_tensor("attention_lstm_backward: of_contexts", of_contexts, features, {M, 4 * H});
  const Activation parsed = parse_activation(activation);
  const ScalarType accumulate = accumulate_dtype(features);
  features = contiguous_images(features);
  keys = contiguous_images(keys);
  words = as_contiguous(words);
  weights_grad = as_contiguous(weights_grad);
  const Product through_hidden(hidden_weight), through_context(context_weight);
  const Tensor projection_grad = empty(h_grad, M, 4 * H + A + D);
  const Tensor gated_grad = empty(features, features_need_grad ? M : N, D, accumulate);
  const Tensor score_grad = empty(features, M, P, accumulate);
  const Tensor query_grad = empty(features, N, A, accumulate);
  const Tensor first_h_grad = zeros(h_grad, N, H), c_grad = zeros(h_grad, N, H);
  h_grad = copy_of(h_grad);  // to which each step adds what the step before it is due
  context_grad = copy_of(context_grad);

  int64_t begin = M;
  for (size_t t = images.size(); t-- > 0;) {
    const int64_t count = images[t], rows = K * count;
    if (rows == 0) continue;
    begin -= rows;
    const int64_t before = t == 0 ? 0 : begin - K * images[t - 1];  // where the rows of the step before begin
    const auto of_step = [&](const Tensor& of_all) { return rows_of(of_all, begin, rows); };
    const Tensor projection = of_step(projections), grad = of_step(projection_grad);
    const Tensor gates_grad = columns_of(grad, 0, 4 * H), first_c_grad = rows_of(c_grad, 0, rows);
    lstm_step_backward(columns_of(projection, 0, 4 * H), of_step(of_contexts), of_step(words),
                       rows_of(t == 0 ? c : cells, before, rows), of_step(h_grad), first_c_grad, gates_grad,
                       first_c_grad);
    through_context.add(gates_grad, of_step(context_grad));
    const Tensor of_query = rows_of(query_grad, 0, rows);
    soft_attention_backward(of_step(context_grad), of_step(weights_grad), first_images(features, count),
                            first_images(keys, count), columns_of(projection, 4 * H, A), score_weight,
                            columns_of(projection, 4 * H + A, D), of_step(context), of_step(weights), parsed,
                            {.gate = columns_of(grad, 4 * H + A, D),
                             .query = of_query,
                             .gated_context = rows_of(gated_grad, features_need_grad ? begin : 0, rows),
                             .score = of_step(score_grad)});
    Tensor to = columns_of(grad, 4 * H, A);
    torch::stable::copy_(to, of_query);
    through_hidden.add(grad, rows_of(t == 0 ? first_h_grad : h_grad, before, rows));
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
STABLE_TORCH_LIBRARY_IMPL(attncap, MkldnnCPU, library) {  // with weights that oneDNN has laid out
  library.impl("attention_lstm", TORCH_BOX(&attncap::forward));
  library.impl("attention_lstm_backward", TORCH_BOX(&attncap::backward));
}
#endif
