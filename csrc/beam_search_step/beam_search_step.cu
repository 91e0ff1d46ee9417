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
  const int cluster_threads = kClusterWarps / sizes.J * sizes.J * kWarpSize;  // of a block
  const int blocks = beam_search_step_blocks(sizes, cluster_threads, processors);
  constexpr auto clustered = beam_search_step_kernel<T, true>;
  if (blocks * cluster_threads > threads &&
      blocks <= most_cluster_blocks<clustered>(kMaxBlocks, kClusterWarps * kWarpSize, kMostSharedBytes)) {
    launch_clusters(clustered, sizes.B, blocks, cluster_threads,
                    beam_search_step_shared_bytes(sizes, cluster_threads), stream, params);
  } else {
    beam_search_step_kernel<T><<<sizes.B, threads, shared_bytes, stream>>>(params);
  }
  return cudaGetLastError();
}

#define INSTANTIATE(T) template cudaError_t beam_search_step_cuda(const BeamSearchStep<T>&, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(bfloat16)
INSTANTIATE(float16)
#undef INSTANTIATE

}  // namespace attncap
