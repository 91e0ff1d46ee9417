// The CPU kernel: rows in parallel forward, images in parallel backward (an image's rows add to the
// same gradients).
#include <algorithm>
#include <limits>
#include <vector>

#include "soft_attention.h"

namespace attncap {
namespace {

// The sum of term(0) .. term(count - 1) in 16 partial sums: the compiler turns them into vectors,
// and rounding errors stay small.
template <typename acc_t, typename Term>
acc_t sum_of(int64_t count, const Term& term) {
  constexpr int64_t lanes = 16;
  acc_t partial[lanes] = {};
  const int64_t whole = count - count % lanes;
  for (int64_t i = 0; i < whole; i += lanes) {
    for (int64_t lane = 0; lane < lanes; ++lane) partial[lane] += term(i + lane);
  }
  for (int64_t i = whole; i < count; ++i) partial[i - whole] += term(i);
  for (int64_t half = lanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) partial[lane] += partial[lane + half];
  }
  return partial[0];
}

// context[d] = sum_p weights[p] * features[p,d]
template <typename T, typename W, typename acc_t>
void weighted_sum(const W* weights, const T* features, int64_t P, int64_t D, acc_t* context) {
  std::fill_n(context, D, acc_t(0));
  for (int64_t p = 0; p < P; ++p) {
    const acc_t weight = weights[p];
    const T* cell = features + p * D;
    for (int64_t d = 0; d < D; ++d) context[d] += weight * static_cast<acc_t>(cell[d]);
  }
}

template <typename T>
void forward_row(const SoftAttentionForward<T>& params, int64_t n, accumulate_t<T>* scores,
                 accumulate_t<T>* context) {
  using acc_t = accumulate_t<T>;
  const auto [B, K, P, D, A] = params.sizes;
  const int64_t b = n / K;
  const T* query = params.query + n * A;
  constexpr acc_t masked = -std::numeric_limits<acc_t>::infinity();

  acc_t largest = masked;
  for (int64_t p = 0; p < P; ++p) {
    scores[p] = masked;
    if (params.mask && !params.mask[b * P + p]) continue;
    const T* key = params.keys + (b * P + p) * A;
    scores[p] = sum_of<acc_t>(A, [&](int64_t a) {
      const acc_t x = static_cast<acc_t>(key[a]) + static_cast<acc_t>(query[a]);
      return static_cast<acc_t>(params.score_weight[a]) * activate(x, params.activation);
    });
    largest = std::max(largest, scores[p]);
  }

  acc_t total = 0;
  for (int64_t p = 0; p < P; ++p) {
    const bool counts = !params.mask || params.mask[b * P + p];
    scores[p] = counts ? std::exp(scores[p] - largest) : 0;
    total += scores[p];
  }
  for (int64_t p = 0; p < P; ++p) {
    scores[p] = total == 0 ? 0 : scores[p] / total;
    params.weights[n * P + p] = static_cast<T>(scores[p]);
  }

  weighted_sum(scores, params.features + b * P * D, P, D, context);
  for (int64_t d = 0; d < D; ++d) {
    const acc_t gate = params.gate ? sigmoid(static_cast<acc_t>(params.gate[n * D + d])) : acc_t(1);
    params.context[n * D + d] = static_cast<T>(gate * context[d]);
  }
}

// gated_grad, gate_grad and score_grad of row n; scratch is [D].
template <typename T>
void backward_row(const SoftAttentionBackward<T>& params, int64_t n, accumulate_t<T>* scratch) {
  using acc_t = accumulate_t<T>;
  const auto [B, K, P, D, A] = params.sizes;
  const T* features = params.features + n / K * P * D;
  const T* weights = params.weights + n * P;
  const T* context_grad = params.context_grad + n * D;
  acc_t* gated_grad = params.gated_grad + n * D;
  acc_t* score_grad = params.score_grad + n * P;

  if (params.gate) {
    acc_t* context = scratch;  // before the gate
    weighted_sum(weights, features, P, D, context);
    for (int64_t d = 0; d < D; ++d) {
      const acc_t gate = sigmoid(static_cast<acc_t>(params.gate[n * D + d]));
      gated_grad[d] = static_cast<acc_t>(context_grad[d]) * gate;
      params.gate_grad[n * D + d] = static_cast<T>(gated_grad[d] * (1 - gate) * context[d]);
    }
  } else {
    std::copy_n(context_grad, D, gated_grad);
  }

  acc_t mean = 0;  // of the weights' gradient, by weight
  for (int64_t p = 0; p < P; ++p) {
    const T* cell = features + p * D;
    const acc_t weight_grad =
        static_cast<acc_t>(params.weights_grad[n * P + p]) +
        sum_of<acc_t>(D, [&](int64_t d) { return gated_grad[d] * static_cast<acc_t>(cell[d]); });
    score_grad[p] = weight_grad;
    mean += static_cast<acc_t>(weights[p]) * weight_grad;
  }
  for (int64_t p = 0; p < P; ++p) {
    score_grad[p] = static_cast<acc_t>(weights[p]) * (score_grad[p] - mean);
  }
}

// What one cell gives row n: its parts of the gradients of score_weight, query and key, each [A].
// No two arrays overlap; saying so lets the compiler turn the loop into vectors.
template <typename T, typename acc_t>
void add_cell_grads(acc_t score_grad, Activation activation, int64_t A, const T* __restrict key,
                    const T* __restrict query, const T* __restrict score_weight,
                    acc_t* __restrict score_weight_grad, acc_t* __restrict query_grad,
                    acc_t* __restrict key_grad) {
  for (int64_t a = 0; a < A; ++a) {
    const acc_t y = activate(static_cast<acc_t>(key[a]) + static_cast<acc_t>(query[a]), activation);
    const acc_t grad =
        score_grad * static_cast<acc_t>(score_weight[a]) * activate_grad(y, activation);
    score_weight_grad[a] += score_grad * y;
    query_grad[a] += grad;
    key_grad[a] += grad;
  }
}

template <typename T>
void backward_image(const SoftAttentionBackward<T>& params, int64_t b) {
  using acc_t = accumulate_t<T>;
  const auto [B, K, P, D, A] = params.sizes;
  std::vector<acc_t> cell_grad(std::max(A, D));
  std::vector<acc_t> query_grad(K * A, 0);
  acc_t* score_weight_grad = params.score_weight_grad + b * A;
  std::fill_n(score_weight_grad, A, acc_t(0));

  for (int64_t k = 0; k < K; ++k) backward_row(params, b * K + k, cell_grad.data());

  for (int64_t p = 0; p < P; ++p) {
    const T* key = params.keys + (b * P + p) * A;
    std::fill_n(cell_grad.begin(), A, acc_t(0));
    for (int64_t k = 0; k < K; ++k) {
      const int64_t n = b * K + k;
      add_cell_grads(params.score_grad[n * P + p], params.activation, A, key, params.query + n * A,
                     params.score_weight, score_weight_grad, query_grad.data() + k * A,
                     cell_grad.data());
    }
    std::copy_n(cell_grad.begin(), A, params.keys_grad + (b * P + p) * A);

    if (!params.features_grad) continue;
    std::fill_n(cell_grad.begin(), D, acc_t(0));
    for (int64_t n = b * K; n < b * K + K; ++n) {
      const acc_t weight = params.weights[n * P + p];
      for (int64_t d = 0; d < D; ++d) cell_grad[d] += weight * params.gated_grad[n * D + d];
    }
    std::copy_n(cell_grad.begin(), D, params.features_grad + (b * P + p) * D);
  }
  std::copy_n(query_grad.begin(), K * A, params.query_grad + b * K * A);
}

}  // namespace

template <typename T>
void soft_attention_forward_cpu(const SoftAttentionForward<T>& params,
                                const ParallelFor& parallel_for) {
  const SoftAttentionSizes& sizes = params.sizes;
  parallel_for(sizes.B * sizes.K, [&](int64_t begin, int64_t end) {
    std::vector<accumulate_t<T>> scores(sizes.P), context(sizes.D);
    for (int64_t n = begin; n < end; ++n) forward_row(params, n, scores.data(), context.data());
  });
}

template <typename T>
void soft_attention_backward_cpu(const SoftAttentionBackward<T>& params,
                                 const ParallelFor& parallel_for) {
  parallel_for(params.sizes.B, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) backward_image(params, b);
  });
}

#define INSTANTIATE(T)                                                                          \
  template void soft_attention_forward_cpu(const SoftAttentionForward<T>&, const ParallelFor&); \
  template void soft_attention_backward_cpu(const SoftAttentionBackward<T>&, const ParallelFor&);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(bfloat16)
INSTANTIATE(float16)
#undef INSTANTIATE

}  // namespace attncap
