// The CUDA kernel launchers.
#include "lstm_step.cuh"

namespace attncap {

template <typename T>
cudaError_t lstm_step_cuda(const LstmStep<T>& params, cudaStream_t stream) {
  if (params.N == 0) return cudaSuccess;
  if (lstm_step_is_aligned(params)) {
    lstm_step_kernel<T, true><<<lstm_step_blocks<T, true>(params), kLstmThreads, 0, stream>>>(params);
  } else {
    lstm_step_kernel<T, false><<<lstm_step_blocks<T, false>(params), kLstmThreads, 0, stream>>>(params);
  }
  return cudaGetLastError();
}

template <typename T>
cudaError_t lstm_step_backward_cuda(const LstmStepBackward<T>& params, cudaStream_t stream) {
  if (params.N == 0) return cudaSuccess;
  lstm_step_backward_kernel<<<lstm_step_backward_blocks(params), kLstmThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

#define INSTANTIATE(T)                                                   \
  template cudaError_t lstm_step_cuda(const LstmStep<T>&, cudaStream_t); \
  template cudaError_t lstm_step_backward_cuda(const LstmStepBackward<T>&, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(bfloat16)
INSTANTIATE(float16)
#undef INSTANTIATE

}  // namespace attncap
