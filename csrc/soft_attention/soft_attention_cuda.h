// The CUDA kernel launchers. Each dtype is instantiated in a .cu of its own, so that they compile in parallel.
#pragma once

#include "../common/cuda_device.h"
#include "soft_attention_launch.h"

namespace attncap {
namespace {

// Launches kernels on a stream, none after the first error.
struct Launcher {
  cudaStream_t stream;
  cudaError_t error = cudaSuccess;

  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes,
                  const Arguments&... arguments) {
    if (error != cudaSuccess) return;
    kernel<<<blocks, threads, shared_bytes, stream>>>(arguments...);
    error = cudaGetLastError();
  }
};

}  // namespace

template <typename T>
int soft_attention_parts_cuda(const SoftAttentionSizes& sizes) {
  return context_grid<T>(sizes, processor_count()).parts;
}

template <typename T>
cudaError_t soft_attention_forward_cuda(const SoftAttentionForward<T>& params, cudaStream_t stream) {
  if constexpr (!std::is_same_v<T, double>) {
    cudaError_t error;
    if (soft_attention_cluster_cuda(params, stream, error)) return error;
  }
  Launcher launch{stream};
  launch_forward(params, processor_count(), launch);
  return launch.error;
}

template <typename T>
cudaError_t soft_attention_backward_cuda(const SoftAttentionBackward<T>& params, cudaStream_t stream) {
  Launcher launch{stream};
  launch_backward(params, processor_count(), launch);
  return launch.error;
}

template <typename T>
cudaError_t soft_attention_keys_backward_cuda(const SoftAttentionKeysBackward<T>& params, cudaStream_t stream) {
  Launcher launch{stream};
  launch_keys_backward(params, processor_count(), launch);
  return launch.error;
}

}  // namespace attncap

#define ATTNCAP_INSTANTIATE_SOFT_ATTENTION(T)                                                       \
  template int soft_attention_parts_cuda<T>(const SoftAttentionSizes&);                             \
  template cudaError_t soft_attention_forward_cuda(const SoftAttentionForward<T>&, cudaStream_t);   \
  template cudaError_t soft_attention_backward_cuda(const SoftAttentionBackward<T>&, cudaStream_t); \
  template cudaError_t soft_attention_keys_backward_cuda(const SoftAttentionKeysBackward<T>&, cudaStream_t);
