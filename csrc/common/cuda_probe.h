// Whether the kernels of this library can run on the current device, without running one.
#pragma once

#include <cuda_runtime_api.h>

namespace attncap {

cudaError_t cuda_probe();

}  // namespace attncap
