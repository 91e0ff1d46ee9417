// What the host asks of the current GPU, and launches in clusters.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <mutex>

namespace attncap {

inline int current_device() {
  int device = 0;
  cudaGetDevice(&device);
  return device;
}

inline int device_attribute(cudaDeviceAttr name) {
  int value = 0;
  cudaDeviceGetAttribute(&value, name, current_device());
  return value;
}

inline int processor_count() { return device_attribute(cudaDevAttrMultiProcessorCount); }

// The most blocks that a cluster of the kernel can have on the current GPU, at most `limit`; 0 if the library has no code
// with clusters for this GPU. The first call for a GPU prepares the kernel there.
template <auto kernel>
int most_cluster_blocks(int limit, int threads, int shared_bytes) {
  static std::map<int, int> found;  // by device
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  const auto [entry, is_new] = found.try_emplace(current_device());
  if (!is_new) return entry->second;
  cudaFuncAttributes code{};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(limit);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  int most = 0;
  if (cudaFuncGetAttributes(&code, kernel) == cudaSuccess && code.ptxVersion >= 90) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    cudaOccupancyMaxPotentialClusterSize(&most, kernel, &config);
  }
  const bool failed = cudaGetLastError() != cudaSuccess;  // which the next launch would report otherwise
  return entry->second = failed ? 0 : most < limit ? most : limit;
}

template <typename... Arguments>
void launch_clusters(void (*kernel)(Arguments...), int64_t clusters, int64_t blocks, int threads, size_t shared_bytes,
                     cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute cluster{.id = cudaLaunchAttributeClusterDimension};
  cluster.val.clusterDim.x = blocks;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(clusters * blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace attncap
