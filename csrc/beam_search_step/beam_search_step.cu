// The CUDA kernel launcher.
#include "../common/cuda_device.h"
#include "beam_search_step.cuh"

namespace attncap {

template <typename T>
cudaError_t beam_search_step_cuda(const BeamSearchStep<T>& params, cudaStream_t stream) {
  const BeamSearchSizes& sizes = params.sizes;
  if (sizes.B == 0) return cudaSuccess;
  const int processors = processor_count(), threads = beam_search_step_threads(sizes, processors);
  const size_t shared_bytes = beam_search_step_shared_bytes(sizes, threads);
  const int blocks = beam_search_step_blocks(sizes, threads, processors);
  constexpr auto kernel = beam_search_step_kernel<T>;
  if (blocks > 1 && blocks <= most_cluster_blocks<kernel>(kMaxBlocks, kMaxWarps * kWarpSize, kMostSharedBytes)) {
    launch_clusters(kernel, sizes.B, blocks, threads, shared_bytes, stream, params);
  } else {
    kernel<<<sizes.B, threads, shared_bytes, stream>>>(params);
  }
  return cudaGetLastError();
}

#define INSTANTIATE(T) template cudaError_t beam_search_step_cuda(const BeamSearchStep<T>&, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(bfloat16)
INSTANTIATE(float16)
#undef INSTANTIATE

}  // namespace attncap
