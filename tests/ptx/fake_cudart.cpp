// The functions of the CUDA runtime that csrc uses and that nvcc's code for kernel<<<...>>> calls, on translated PTX:
// the launchers of csrc/*/*.cu run as nvcc compiled them. Device memory is the host's, streams do not exist. A launch
// that would fail on a GPU, and one in which runtime.h found something, returns an error.
#include "fake_cudart.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <stdexcept>
#include <vector>

#ifndef FAKE_ARCHITECTURE
#define FAKE_ARCHITECTURE 75
#endif

namespace fake_cudart {

int processors = [] {
  const char* const text = std::getenv("PTX_PROCESSORS");
  return text ? std::atoi(text) : 132;
}();
ptx::Order order = ptx::Order::lowest_first;
std::string error;

namespace {

constexpr bool kHasClusters = FAKE_ARCHITECTURE >= 90;
// Shared memory of a multiprocessor; CUDA keeps 1 KiB of each block to itself, on compute capability 7.5 nothing.
constexpr int kSharedOfProcessor = (FAKE_ARCHITECTURE >= 90 ? 228 : FAKE_ARCHITECTURE >= 80 ? 100 : 64) * 1024;
constexpr int kSharedReserved = FAKE_ARCHITECTURE >= 80 ? 1024 : 0;
constexpr int kSharedLimit = kSharedOfProcessor - kSharedReserved;

struct Function {
  const char* name;
  int dynamic_shared_limit = 48 * 1024;
  bool allows_16_blocks = false;  // in a cluster; 8 is what every GPU with clusters can
};
std::map<const void*, Function>& functions() {
  static std::map<const void*, Function> table;
  return table;
}

std::vector<cudaLaunchConfig_t> pushed;  // by __cudaPushCallConfiguration
cudaError_t last_error = cudaSuccess;

cudaError_t fail(cudaError_t code, const std::string& why) {
  error = why;
  std::fprintf(stderr, "CUDA on PTX: %s\n", why.c_str());
  return last_error = code;
}

cudaError_t launch(const void* function, const cudaLaunchConfig_t& config, void** arguments) {
  const Function& called = functions().at(function);
  const auto found = ptx::kernels().find(called.name);
  if (found == ptx::kernels().end()) {
    return fail(cudaErrorInvalidDeviceFunction, std::string("no PTX of ") + called.name);
  }
  const dim3 grid = config.gridDim, block = config.blockDim;
  if (grid.y != 1 || grid.z != 1 || block.y != 1 || block.z != 1) {
    return fail(cudaErrorInvalidConfiguration, "only x is implemented");
  }
  const ptx::Kernel& kernel = *found->second;
  ptx::Launch launch{.blocks = grid.x,
                     .threads = block.x,
                     .dynamic_shared = config.dynamicSmemBytes,
                     .order = order};
  if (called.dynamic_shared_limit > 48 * 1024) {
    launch.shared_limit = kernel.static_shared + called.dynamic_shared_limit;
  }
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) launch.cluster = attribute.val.clusterDim.x;
  }
  const unsigned most_blocks = !kHasClusters ? 1 : called.allows_16_blocks ? 16 : 8;
  if (std::max(launch.cluster, kernel.cluster_size) > most_blocks) {
    return fail(cudaErrorInvalidClusterSize, "too large a cluster");
  }
  alignas(16) ptx::u8 parameters[4096];
  for (ptx::u32 i = 0; i < kernel.parameter_count; ++i) {
    std::memcpy(parameters + kernel.parameters[i].offset, arguments[i], kernel.parameters[i].bytes);
  }
  try {
    ptx::run(kernel, launch, parameters);
  } catch (const std::exception& found_out) {
    return fail(cudaErrorLaunchFailure, found_out.what());
  }
  return cudaSuccess;
}

}  // namespace
}  // namespace fake_cudart

using namespace fake_cudart;

extern "C" {

// What nvcc's host code calls. These are in no header.
void** __cudaRegisterFatBinary(void* data) { return static_cast<void**>(data); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
void __cudaRegisterFunction(void**, const char* host, char*, const char* device, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  functions()[host] = {device};
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st* stream) {
  pushed.push_back({.gridDim = grid, .blockDim = block, .dynamicSmemBytes = shared, .stream = stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const cudaLaunchConfig_t last = pushed.back();
  pushed.pop_back();
  *grid = last.gridDim, *block = last.blockDim, *shared = last.dynamicSmemBytes;
  *static_cast<cudaStream_t*>(stream) = last.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t) {
  return launch(kernel, {.gridDim = grid, .blockDim = block, .dynamicSmemBytes = shared}, arguments);
}

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t) {
  return launch(function, {.gridDim = grid, .blockDim = block, .dynamicSmemBytes = shared}, arguments);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  return launch(function, *config, arguments);
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) functions().at(function).allows_16_blocks = value;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value > kSharedLimit) return fail(cudaErrorInvalidValue, "more shared memory than a block can have");
  functions().at(function).dynamic_shared_limit = value;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  const auto found = ptx::kernels().find(functions().at(function).name);
  if (found == ptx::kernels().end()) return cudaErrorInvalidDeviceFunction;
  *attributes = {};
  attributes->sharedSizeBytes = found->second->static_shared;
  attributes->maxThreadsPerBlock = found->second->most_threads;
  attributes->ptxVersion = attributes->binaryVersion = FAKE_ARCHITECTURE;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxPotentialClusterSize(int* size, const void* function, const cudaLaunchConfig_t*) {
  *size = !kHasClusters ? 1 : functions().at(function).allows_16_blocks ? 16 : 8;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* count, const void*, int, size_t, unsigned) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  const cudaError_t code = last_error;
  last_error = cudaSuccess;
  return code;
}
cudaError_t cudaPeekAtLastError() { return last_error; }
const char* cudaGetErrorString(cudaError_t) { return error.c_str(); }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const std::map<cudaDeviceAttr, int> attributes = {
      {cudaDevAttrMultiProcessorCount, processors},
      {cudaDevAttrComputeCapabilityMajor, FAKE_ARCHITECTURE / 10},
      {cudaDevAttrComputeCapabilityMinor, FAKE_ARCHITECTURE % 10},
      {cudaDevAttrMaxSharedMemoryPerBlock, 48 * 1024},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, kSharedLimit},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, kSharedOfProcessor},
      {cudaDevAttrReservedSharedMemoryPerBlock, kSharedReserved},
      {cudaDevAttrClusterLaunch, kHasClusters},
  };
  const auto found = attributes.find(attribute);
  if (found == attributes.end()) return fail(cudaErrorInvalidValue, "a device attribute that fake_cudart.cpp lacks");
  *value = found->second;
  return cudaSuccess;
}

}  // extern "C"
