// The CUDA launchers: how many rows a block takes, how its threads are shared out.
#include <cstdint>
#include <type_traits>

#include "soft_attention.cuh"

namespace attncap {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks that keep the whole chip busy.
int64_t enough_blocks() {
  int device = 0, processors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  return 2 * processors;
}

// Columns of a block in a kernel over channels: a warp's worth, or fewer (which spreads an image over more blocks, each
// of which still reads 128 neighbouring bytes) where there would be too few blocks or channels.
int columns_for(int64_t images_and_rows, int64_t channels, int width) {
  int columns = kWarpSize;
  while (columns > 8 &&
         (images_and_rows * ceil_div(channels, columns * width) < enough_blocks() || columns / 2 * width >= channels)) {
    columns /= 2;
  }
  return columns;
}

// Threads of a block in a kernel over cells.
int threads_for(int64_t images_and_rows, int64_t cells) {
  const int64_t blocks = images_and_rows * ceil_div(cells, kThreads / kWarpSize * kCells);
  return blocks < enough_blocks() ? 2 * kWarpSize : kThreads;
}

int64_t cell_blocks(int64_t cells, int threads) { return ceil_div(cells, threads / kWarpSize * kCells); }

// Whether rows of `length` numbers of type T from this address on can be read 16 bytes at a time.
template <typename T>
bool is_aligned(const T* address, int64_t length) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0 && length * sizeof(T) % 16 == 0;
}

// Calls launch(rows), a constant: the least of 1, 5, 10 that has room for K, or 10 and several blocks.
template <typename Launch>
void with_rows(int64_t K, const Launch& launch) {
  if (K <= 1) {
    launch(std::integral_constant<int, 1>());
  } else if (K <= 5) {
    launch(std::integral_constant<int, 5>());
  } else {
    launch(std::integral_constant<int, 10>());
  }
}

}  // namespace

template <typename T>
cudaError_t soft_attention_forward_cuda(const SoftAttentionForward<T>& params, cudaStream_t stream) {
  const int64_t B = params.sizes.B, K = params.sizes.K, P = params.sizes.P, D = params.sizes.D, A = params.sizes.A;
  if (B * K == 0) return cudaSuccess;
  const bool keys_aligned = is_aligned(params.keys, A) && is_aligned(params.keys, params.keys_stride) &&
                            is_aligned(params.query, A) && is_aligned(params.score_weight, A);
  with_rows(K, [&](auto rows) {
    const int64_t images_and_rows = B * ceil_div(K, rows);
    const int threads = threads_for(images_and_rows, P);
    const int64_t blocks = images_and_rows * cell_blocks(P, threads);
    soft_attention_score_kernel<T, rows><<<blocks, threads, 0, stream>>>(params, keys_aligned);
  });
  if (const cudaError_t error = cudaGetLastError()) return error;

  const bool features_aligned = is_aligned(params.features, D) && is_aligned(params.features, params.features_stride);
  const int64_t room = kMaxCellsCuda<T> / P;  // rows whose weights shared memory has room for
  with_rows(room >= 10           ? K
            : room >= 5 && K > 1 ? 5
                                 : 1,
            [&](auto rows) {
              const int64_t images_and_rows = B * ceil_div(K, rows);
              const int columns = columns_for(images_and_rows, D, kWidth<T>);
              const int64_t blocks = images_and_rows * ceil_div(D, columns * kWidth<T>);
              const size_t shared_bytes = (rows * P + kThreads * kWidth<T>)*sizeof(accumulate_t<T>);
              soft_attention_context_kernel<T, rows>
                  <<<blocks, kThreads, shared_bytes, stream>>>(params, features_aligned, columns);
            });
  return cudaGetLastError();
}

template <typename T>
cudaError_t soft_attention_backward_cuda(const SoftAttentionBackward<T>& params, cudaStream_t stream) {
  const int64_t B = params.sizes.B, K = params.sizes.K, P = params.sizes.P, D = params.sizes.D, A = params.sizes.A;
  if (B == 0) return cudaSuccess;
  const bool features_aligned = is_aligned(params.features, D) && is_aligned(params.features, params.features_stride);
  const bool keys_aligned = is_aligned(params.keys, A) && is_aligned(params.keys, params.keys_stride) &&
                            is_aligned(params.query, A) && is_aligned(params.score_weight, A);
  if (K > 0) {
    soft_attention_gate_grad_kernel<<<ceil_div(B * K * D, kThreads), kThreads, 0, stream>>>(params);
    if (const cudaError_t error = cudaGetLastError()) return error;
    with_rows(K, [&](auto rows) {
      const int64_t images_and_rows = B * ceil_div(K, rows);
      const int threads = threads_for(images_and_rows, P);
      const int64_t blocks = images_and_rows * cell_blocks(P, threads);
      soft_attention_weights_grad_kernel<T, rows><<<blocks, threads, 0, stream>>>(params, features_aligned);
    });
    if (const cudaError_t error = cudaGetLastError()) return error;
    soft_attention_softmax_grad_kernel<<<ceil_div(B * K, kThreads / kWarpSize), kThreads, 0, stream>>>(params);
    if (const cudaError_t error = cudaGetLastError()) return error;
  }
  with_rows(K, [&](auto rows) {
    const int columns = columns_for(B, A, kWidth<T>);
    const int64_t blocks = B * ceil_div(A, columns * kWidth<T>);
    const size_t shared_bytes = kThreads * kWidth<T> * sizeof(accumulate_t<T>);
    soft_attention_keys_grad_kernel<T, rows><<<blocks, kThreads, shared_bytes, stream>>>(params, keys_aligned, columns);
  });
  if (const cudaError_t error = cudaGetLastError()) return error;
  if (params.features_grad) {
    with_rows(K, [&](auto rows) {
      const int columns = columns_for(B, D, kWidth<T>);
      const int64_t blocks = B * ceil_div(D, columns * kWidth<T>);
      soft_attention_features_grad_kernel<T, rows><<<blocks, kThreads, 0, stream>>>(params, features_aligned, columns);
    });
  }
  return cudaGetLastError();
}

#define INSTANTIATE(T)                                                                            \
  template cudaError_t soft_attention_forward_cuda(const SoftAttentionForward<T>&, cudaStream_t); \
  template cudaError_t soft_attention_backward_cuda(const SoftAttentionBackward<T>&, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(bfloat16)
INSTANTIATE(float16)
#undef INSTANTIATE

}  // namespace attncap
