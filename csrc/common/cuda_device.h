// What the host asks of the current GPU.
#pragma once

#include <cuda_runtime_api.h>

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

}  // namespace attncap
