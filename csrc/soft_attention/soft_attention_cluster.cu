// The launcher of the forward in one kernel.
#include "../common/cuda_device.h"
#include "soft_attention_cluster.cuh"
#include "soft_attention_launch.h"

namespace attncap {
namespace {

// The number of blocks of a cluster, a power of two, for which all blocks are estimated to be done first. Work is
// counted in cells that a block passes over; beginning and end of a block take as long as kFixedCells of them.
int64_t cluster_blocks(int64_t clusters, int64_t cells, int64_t resident_blocks, int64_t most_blocks) {
  constexpr int64_t kFixedCells = 30;  // measured on an H100
  int64_t best = 1, least = INT64_MAX;
  for (int64_t blocks = 1; blocks <= most_blocks && blocks <= cells; blocks *= 2) {
    // A cluster's blocks have to be on neighbouring multiprocessors: about a sixteenth of the places stays empty.
    const int64_t resident = blocks == 1 ? resident_blocks : resident_blocks * 15 / 16 / blocks;
    if (resident == 0) break;
    const int64_t work = ceil_div(clusters, resident) * (ceil_div(cells, blocks) + kFixedCells);
    if (work < least) best = blocks, least = work;
  }
  return best;
}

template <typename T, Activation activation, int rows>
bool launch(const SoftAttentionForward<T>& params, cudaStream_t stream, cudaError_t& error) {
  constexpr auto kernel = soft_attention_cluster_kernel<T, activation, rows>;
  constexpr int blocks_per_processor = rows > 5 ? 1 : 2;
  const int shared_bytes = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / blocks_per_processor -
                           device_attribute(cudaDevAttrReservedSharedMemoryPerBlock);
  const int most_blocks = most_cluster_blocks<kernel>(kMaxClusterBlocks, kThreads, shared_bytes);
  if (most_blocks == 0) return false;
  const int64_t clusters = params.sizes.B * ceil_div(params.sizes.K, rows);
  const int64_t resident = blocks_per_processor * processor_count();
  const int64_t blocks = cluster_blocks(clusters, params.sizes.P, resident, most_blocks);
  const ClusterPlan plan = cluster_plan<T, rows>(params.sizes, blocks, shared_bytes);
  if (plan.shared_bytes == 0) return false;

  launch_clusters(kernel, clusters, blocks, kThreads, plan.shared_bytes, stream, params, plan);
  error = cudaGetLastError();
  return true;
}

}  // namespace

template <typename T>
bool soft_attention_cluster_cuda(const SoftAttentionForward<T>& params, cudaStream_t stream, cudaError_t& error) {
  const Aligned aligned(params);
  const bool gate_aligned = !params.gate || is_aligned(params.gate, params.gate_stride, params.sizes.D);
  if (device_attribute(cudaDevAttrComputeCapabilityMajor) < 9 || params.sizes.B * params.sizes.K == 0) return false;
  if (!aligned.keys || !aligned.features || !gate_aligned) return false;
  bool launched = false;
  with_rows<10>(params.sizes.K, [&](auto rows) {
    launched = params.activation == Activation::tanh ? launch<T, Activation::tanh, rows>(params, stream, error)
                                                     : launch<T, Activation::relu, rows>(params, stream, error);
  });
  return launched;
}

#define INSTANTIATE(T) \
  template bool soft_attention_cluster_cuda(const SoftAttentionForward<T>&, cudaStream_t, cudaError_t&);
INSTANTIATE(float)
INSTANTIATE(bfloat16)
INSTANTIATE(float16)
#undef INSTANTIATE

}  // namespace attncap
