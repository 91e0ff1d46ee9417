// A kernel that does nothing. It is compiled for the same architectures as all others.
#include "cuda_probe.h"

namespace attncap {

__global__ void probe_kernel() {}

cudaError_t cuda_probe() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe_kernel);
  cudaGetLastError();  // or else the next launch would report it
  return error;
}

}  // namespace attncap
