// The CUDA launchers.
#include "soft_attention.cuh"

namespace attncap {
namespace {
constexpr int kThreads = 256;
}

template <typename T>
cudaError_t soft_attention_forward_cuda(const SoftAttentionForward<T>& params,
                                        cudaStream_t stream) {
  const int64_t rows = params.sizes.B * params.sizes.K;
  if (rows == 0) return cudaSuccess;
  const size_t shared_bytes = params.sizes.P * sizeof(accumulate_t<T>);
  soft_attention_forward_kernel<<<rows, kThreads, shared_bytes, stream>>>(params);
  return cudaGetLastError();
}

template <typename T>
cudaError_t soft_attention_backward_cuda(const SoftAttentionBackward<T>& params,
                                         cudaStream_t stream) {
  const SoftAttentionSizes& sizes = params.sizes;
  const int64_t rows = sizes.B * sizes.K;
  if (rows > 0) {
    soft_attention_score_grad_kernel<<<rows, kThreads, 0, stream>>>(params);
    if (const cudaError_t error = cudaGetLastError()) return error;
  }
  if (sizes.B > 0) {
    soft_attention_keys_grad_kernel<<<sizes.B, kThreads, 0, stream>>>(params);
    if (const cudaError_t error = cudaGetLastError()) return error;
  }
  if (sizes.B > 0 && params.features_grad) {
    soft_attention_features_grad_kernel<<<sizes.B * sizes.P, kThreads, 0, stream>>>(params);
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
