// The CUDA kernel launcher.
#include "../common/cuda_device.h"
#include "beam_search_step.cuh"

namespace attncap {

template <typename T>
cudaError_t beam_search_step_cuda(const BeamSearchStep<T>& params, cudaStream_t stream) {
  const BeamSearchSizes& sizes = params.sizes;
  if (sizes.B == 0) return cudaSuccess;
  const int threads = beam_search_step_threads(sizes, processor_count());
  const size_t shared_bytes = beam_search_step_shared_bytes(sizes, threads);
  beam_search_step_kernel<<<sizes.B, threads, shared_bytes, stream>>>(params);
  return cudaGetLastError();
}

#define INSTANTIATE(T) template cudaError_t beam_search_step_cuda(const BeamSearchStep<T>&, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(bfloat16)
INSTANTIATE(float16)
#undef INSTANTIATE

}  // namespace attncap
