// The CPU kernel. Compiled once for each instruction set, with ATTNCAP_ISA as its name.
//
// Memory bandwidth is the limit, so the keys and features of an image are read once, in contiguous ranges, and all K
// rows of the image use them while they are in the cache. Cells are processed four at a time, so that the values of the
// rows are loaded once for four cells; meanwhile the next four cells are prefetched.
#include "soft_attention.h"

#include "../common/parallel.h"
#include "../common/simd.h"

namespace attncap::ATTNCAP_ISA {
namespace {

constexpr int64_t kTile = 4;        // cells processed together
constexpr int64_t kRows = 5;        // rows whose sums are kept together
constexpr int64_t kCells = 32;      // cells of an image per task of a thread
constexpr int64_t kChannels = 512;  // channels per task
constexpr int64_t kUnits = 256;     // attention units per task

// Calls body<count>(p) for cells [begin, end): first for tiles of kTile cells, then for single cells.
template <typename Body>
inline void for_each_tile(int64_t begin, int64_t end, const Body& body) {
  int64_t p = begin;
  for (; p + kTile <= end; p += kTile) body.template operator()<kTile>(p);
  for (; p < end; ++p) body.template operator()<1>(p);
}

template <Activation activation, typename acc_t>
inline Vector<acc_t> activate(Vector<acc_t> x) {
  return activation == Activation::tanh ? tanh(x) : relu(x);
}

// For scores only. The error of short_tanh would be too large for the derivative, 1 - y * y.
template <Activation activation, typename T>
inline Vector<accumulate_t<T>> activate_fast(Vector<accumulate_t<T>> x) {
  if constexpr (activation == Activation::tanh && sizeof(T) == 2) return short_tanh(x);
  return activate<activation, accumulate_t<T>>(x);
}

// The derivative times a factor, given y = activate(x).
template <Activation activation, typename acc_t>
inline Vector<acc_t> times_activate_grad(Vector<acc_t> factor, Vector<acc_t> y) {
  if constexpr (activation == Activation::tanh) return factor - factor * y * y;
  return y > acc_t(0) ? factor : Vector<acc_t>{};
}

// The scores of cells [begin, end) of image b; -infinity if masked.
template <Activation activation, typename T>
void score_cells(const SoftAttentionForward<T>& params, int64_t b, int64_t begin, int64_t end) {
  using acc_t = accumulate_t<T>;
  const auto [B, K, P, D, A] = params.sizes;
  const T* keys = params.keys + b * params.keys_stride;
  for_each_tile(begin, end, [&]<int64_t count>(int64_t p) {
    for (int64_t n = b * K; n < b * K + K; ++n) {
      const T* query = params.query + n * params.query_stride;
      Vector<acc_t> sums[count] = {};
      for_each_vector<acc_t>(A, [&](int64_t a, auto... rest) {
        const Vector<acc_t> q = load(query + a, rest...);
        const Vector<acc_t> score_weight = load(params.score_weight + a, rest...);
#pragma GCC unroll 4
        for (int64_t i = 0; i < count; ++i) {
          const Vector<acc_t> key = load(keys + (p + i) * A + a, rest...);
          __builtin_prefetch(keys + (p + i + kTile) * A + a);
          sums[i] += score_weight * activate_fast<activation, T>(key + q);
        }
      });
#pragma GCC unroll 4
      for (int64_t i = 0; i < count; ++i) {
        const bool counts = !params.mask || params.mask[b * P + p + i];
        params.scores[n * P + p + i] = counts ? sum_of_lanes<acc_t>(sums[i]) : -INFINITY;
      }
    }
  });
}

// Converts the scores of row n into weights.
template <typename T>
void softmax(const SoftAttentionForward<T>& params, int64_t n) {
  using acc_t = accumulate_t<T>;
  const auto [B, K, P, D, A] = params.sizes;
  acc_t* scores = params.scores + n * P;
  const bool* mask = params.mask ? params.mask + n / K * P : nullptr;

  acc_t largest = -INFINITY;
  for (int64_t p = 0; p < P; ++p) largest = scores[p] > largest ? scores[p] : largest;
  Vector<acc_t> totals{};
  for_each_vector<acc_t>(P, [&](int64_t p, auto... rest) {
    store(scores + p, exp(load(scores + p, rest...) - largest), rest...);
    totals += load(scores + p, rest...);
  });
  acc_t total = sum_of_lanes<acc_t>(totals);
  for (int64_t p = 0; p < P; ++p) {
    scores[p] = !mask || mask[p] ? scores[p] / total : 0;
    params.weights[n * P + p] = static_cast<T>(scores[p]);
  }
}

// The contexts of row_count <= rows adjacent rows of image b, for at most kChannels channels [first, end).
template <int64_t rows, typename T>
void sum_channels_of_rows(const SoftAttentionForward<T>& params, int64_t b, int64_t first_row, int64_t row_count,
                          int64_t first, int64_t end) {
  using acc_t = accumulate_t<T>;
  const auto [B, K, P, D, A] = params.sizes;
  const T* features = params.features + b * params.features_stride + first;
  const acc_t* weights = params.scores + first_row * P;
  acc_t sums[rows][kChannels] = {};
  for_each_tile(0, P, [&]<int64_t count>(int64_t p) {
    Vector<acc_t> weight[rows][count];
#pragma GCC unroll 8
    for (int64_t row = 0; row < rows; ++row) {  // those beyond row_count repeat the last row
      const acc_t* row_weights = weights + (row < row_count ? row : row_count - 1) * P + p;
#pragma GCC unroll 4
      for (int64_t i = 0; i < count; ++i) weight[row][i] = Vector<acc_t>{} + row_weights[i];
    }
    for_each_vector<acc_t>(end - first, [&](int64_t d, auto... rest) {
      Vector<acc_t> cells[count];
#pragma GCC unroll 4
      for (int64_t i = 0; i < count; ++i) {
        cells[i] = load(features + (p + i) * D + d, rest...);
        __builtin_prefetch(features + (p + i + kTile) * D + d);
      }
#pragma GCC unroll 8
      for (int64_t row = 0; row < rows; ++row) {
        Vector<acc_t> sum = weight[row][0] * cells[0];  // the tile is summed first, which rounds less
#pragma GCC unroll 4
        for (int64_t i = 1; i < count; ++i) sum += weight[row][i] * cells[i];
        store(sums[row] + d, load(sums[row] + d) + sum);
      }
    });
  });
  for (int64_t row = 0; row < row_count; ++row) {
    const int64_t n = first_row + row;
    for_each_vector<acc_t>(end - first, [&](int64_t d, auto... rest) {
      Vector<acc_t> sum = load(sums[row] + d);
      if (params.gate) sum *= sigmoid<acc_t>(load(params.gate + n * params.gate_stride + first + d, rest...));
      store(params.context + n * D + first + d, sum, rest...);
    });
  }
}

// The contexts of the rows of image b, for channels [first, end).
template <typename T>
void sum_channels(const SoftAttentionForward<T>& params, int64_t b, int64_t first, int64_t end) {
  const int64_t K = params.sizes.K;
  for (int64_t k = 0; k < K; k += kRows) {
    const int64_t row_count = K - k < kRows ? K - k : kRows;
    row_count == 1 ? sum_channels_of_rows<1>(params, b, b * K + k, 1, first, end)
                   : sum_channels_of_rows<kRows>(params, b, b * K + k, row_count, first, end);
  }
}

// gated_grad and gate_grad of row n.
template <typename T>
void gate_row(const SoftAttentionBackward<T>& params, int64_t n) {
  using acc_t = accumulate_t<T>;
  const int64_t D = params.sizes.D;
  for_each_vector<acc_t>(D, [&](int64_t d, auto... rest) {
    const int64_t at = n * D + d;
    Vector<acc_t> grad = load(params.context_grad + at, rest...);
    if (params.gate) {
      const Vector<acc_t> gate = sigmoid<acc_t>(load(params.gate + n * params.gate_stride + d, rest...));
      const Vector<acc_t> context = load(params.context + at, rest...);  // includes the factor of the gate
      store(params.gate_grad + n * params.gate_grad_stride + d, grad * context * (acc_t(1) - gate), rest...);
      grad *= gate;
    }
    store(params.gated_grad + at, grad, rest...);
  });
}

// For cells [begin, end) of image b: the gradients of the rows' weights, stored in score_grad, and features_grad.
template <typename T>
void features_backward(const SoftAttentionBackward<T>& params, int64_t b, int64_t begin, int64_t end) {
  using acc_t = accumulate_t<T>;
  const auto [B, K, P, D, A] = params.sizes;
  const T* features = params.features + b * params.features_stride;
  for_each_tile(begin, end, [&]<int64_t count>(int64_t p) {
    for (int64_t n = b * K; n < b * K + K; ++n) {
      Vector<acc_t> sums[count] = {};
      for_each_vector<acc_t>(D, [&](int64_t d, auto... rest) {
        const Vector<acc_t> grad = load(params.gated_grad + n * D + d, rest...);
#pragma GCC unroll 4
        for (int64_t i = 0; i < count; ++i) {
          sums[i] += grad * load(features + (p + i) * D + d, rest...);
          __builtin_prefetch(features + (p + i + kTile) * D + d);
        }
      });
#pragma GCC unroll 4
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = n * P + p + i;
        params.score_grad[at] = sum_of_lanes<acc_t>(sums[i]) + static_cast<acc_t>(params.weights_grad[at]);
      }
    }
    if (!params.features_grad) return;
    for_each_vector<acc_t>(D, [&](int64_t d, auto... rest) {
      Vector<acc_t> sums[count] = {};
      for (int64_t n = b * K; n < b * K + K; ++n) {
        const Vector<acc_t> grad = load(params.gated_grad + n * D + d, rest...);
#pragma GCC unroll 4
        for (int64_t i = 0; i < count; ++i) {
          sums[i] += static_cast<acc_t>(params.weights[n * P + p + i]) * grad;
        }
      }
#pragma GCC unroll 4
      for (int64_t i = 0; i < count; ++i) {
        store(params.features_grad + (b * P + p + i) * D + d, sums[i], rest...);
      }
    });
  });
}

// Converts the gradient of row n's weights into that of its scores.
template <typename T>
void softmax_grad(const SoftAttentionBackward<T>& params, int64_t n) {
  using acc_t = accumulate_t<T>;
  const int64_t P = params.sizes.P;
  const T* weights = params.weights + n * P;
  acc_t* grad = params.score_grad + n * P;
  Vector<acc_t> means{};
  for_each_vector<acc_t>(
      P, [&](int64_t p, auto... rest) { means += load(weights + p, rest...) * load(grad + p, rest...); });
  const acc_t mean = sum_of_lanes<acc_t>(means);  // weighted
  for (int64_t p = 0; p < P; ++p) grad[p] = static_cast<acc_t>(weights[p]) * (grad[p] - mean);
}

// For attention units [begin, end) of image b, from the gradients of the scores of its rows [first_row, end_row): the
// query_grad (only in SoftAttentionBackward) and, if needed, keys_grad and the image's summand of score_weight_grad.
template <Activation activation, bool keys_need_grad, template <typename> typename Params, typename T>
void score_backward(const Params<T>& params, int64_t b, int64_t first_row, int64_t end_row, int64_t begin,
                    int64_t end) {
  using acc_t = accumulate_t<T>;
  constexpr bool query_needs_grad = requires { params.query_grad; };
  const auto [B, K, P, D, A] = params.sizes;
  const T* keys = params.keys + b * params.keys_stride;
  for (int64_t a = begin; a < end; ++a) {
    if constexpr (keys_need_grad) params.score_weight_grad[b * A + a] = 0;
    if constexpr (query_needs_grad) {
      for (int64_t n = first_row; n < end_row; ++n) params.query_grad[n * A + a] = 0;
    }
  }

  for_each_tile(0, P, [&]<int64_t count>(int64_t p) {
    for_each_vector<acc_t>(end - begin, [&](int64_t offset, auto... rest) {
      const int64_t a = begin + offset;
      Vector<acc_t> key[count], key_grad[count] = {}, score_weight_grad{};
#pragma GCC unroll 4
      for (int64_t i = 0; i < count; ++i) {
        key[i] = load(keys + (p + i) * A + a, rest...);
        __builtin_prefetch(keys + (p + i + kTile) * A + a);
      }
      for (int64_t n = first_row; n < end_row; ++n) {
        const Vector<acc_t> query = load(params.query + n * params.query_stride + a, rest...);
        Vector<acc_t> query_grad{}, score_weight_part{};
#pragma GCC unroll 4
        for (int64_t i = 0; i < count; ++i) {
          const acc_t score_grad = params.score_grad[n * P + p + i];
          const Vector<acc_t> y = activate<activation, acc_t>(key[i] + query);
          const Vector<acc_t> x_grad = times_activate_grad<activation, acc_t>(Vector<acc_t>{} + score_grad, y);
          if constexpr (keys_need_grad) score_weight_part += score_grad * y;
          query_grad += x_grad;
          key_grad[i] += x_grad;
        }
        score_weight_grad += score_weight_part;
        if constexpr (query_needs_grad) {
          acc_t* to = params.query_grad + n * A + a;
          store(to, load(to, rest...) + query_grad, rest...);
        }
      }
      if constexpr (keys_need_grad) {
        acc_t* to = params.score_weight_grad + b * A + a;
        store(to, load(to, rest...) + score_weight_grad, rest...);
        const Vector<acc_t> score_weight = load(params.score_weight + a, rest...);
#pragma GCC unroll 4
        for (int64_t i = 0; i < count; ++i) {
          store(params.keys_grad + (b * P + p + i) * A + a, score_weight * key_grad[i], rest...);
        }
      }
    });
  });

  if constexpr (query_needs_grad) {
    for (int64_t n = first_row; n < end_row; ++n) {
      for_each_vector<acc_t>(end - begin, [&](int64_t offset, auto... rest) {
        const int64_t a = begin + offset;
        acc_t* grad = params.query_grad + n * A + a;
        store(grad, load(grad, rest...) * load(params.score_weight + a, rest...), rest...);
      });
    }
  }
}

// Calls body(b, begin, end) for every image b and every range of at most `length` of its `count` cells or channels.
template <typename Body>
void parallel_for_parts(Threads threads, int64_t images, int64_t count, int64_t length, Body body) {
  const int64_t parts = (count + length - 1) / length;
  parallel_for(threads, images * parts, [&](int64_t task) {
    const int64_t begin = task % parts * length, end = begin + length;
    body(task / parts, begin, end < count ? end : count);
  });
}

template <Activation activation, typename T>
void forward(const SoftAttentionForward<T>& params, Threads threads) {
  const auto [B, K, P, D, A] = params.sizes;
  parallel_for_parts(threads, B, P, kCells,
                     [&](int64_t b, int64_t begin, int64_t end) { score_cells<activation>(params, b, begin, end); });
  parallel_for(threads, B * K, [&](int64_t n) { softmax(params, n); });
  parallel_for_parts(threads, B, D, kChannels,
                     [&](int64_t b, int64_t begin, int64_t end) { sum_channels(params, b, begin, end); });
}

template <Activation activation, typename T>
void backward(const SoftAttentionBackward<T>& params, Threads threads) {
  const auto [B, K, P, D, A] = params.sizes;
  parallel_for(threads, B * K, [&](int64_t n) { gate_row(params, n); });
  parallel_for_parts(threads, B, P, kCells,
                     [&](int64_t b, int64_t begin, int64_t end) { features_backward(params, b, begin, end); });
  parallel_for(threads, B * K, [&](int64_t n) { softmax_grad(params, n); });
  parallel_for_parts(threads, B, A, kUnits, [&](int64_t b, int64_t begin, int64_t end) {
    params.keys_grad ? score_backward<activation, true>(params, b, b * K, b * K + K, begin, end)
                     : score_backward<activation, false>(params, b, b * K, b * K + K, begin, end);
  });
}

template <Activation activation, typename T>
void keys_backward(const SoftAttentionKeysBackward<T>& params, Threads threads) {
  const int64_t* starts = params.row_starts;
  parallel_for_parts(threads, params.sizes.B, params.sizes.A, kUnits, [&](int64_t b, int64_t begin, int64_t end) {
    score_backward<activation, true>(params, b, starts[b], starts[b + 1], begin, end);
  });
}

}  // namespace

template <typename T>
void soft_attention_forward_cpu(const SoftAttentionForward<T>& params, Threads threads) {
  params.activation == Activation::tanh ? forward<Activation::tanh>(params, threads)
                                        : forward<Activation::relu>(params, threads);
}

template <typename T>
void soft_attention_backward_cpu(const SoftAttentionBackward<T>& params, Threads threads) {
  params.activation == Activation::tanh ? backward<Activation::tanh>(params, threads)
                                        : backward<Activation::relu>(params, threads);
}

template <typename T>
void soft_attention_keys_backward_cpu(const SoftAttentionKeysBackward<T>& params, Threads threads) {
  params.activation == Activation::tanh ? keys_backward<Activation::tanh>(params, threads)
                                        : keys_backward<Activation::relu>(params, threads);
}

#define INSTANTIATE(T)                                                                 \
  template void soft_attention_forward_cpu(const SoftAttentionForward<T>&, Threads);   \
  template void soft_attention_backward_cpu(const SoftAttentionBackward<T>&, Threads); \
  template void soft_attention_keys_backward_cpu(const SoftAttentionKeysBackward<T>&, Threads);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(bfloat16)
INSTANTIATE(float16)
#undef INSTANTIATE

}  // namespace attncap::ATTNCAP_ISA
