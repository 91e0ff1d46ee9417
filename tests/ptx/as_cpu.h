// Included before each *_torch.cpp: the code of the CUDA library, registered for tensors of the CPU, on
// fake_cudart.cpp.
#define USE_CUDA
#include "common/torch.h"
#undef ATTNCAP_DISPATCH_KEY
#define ATTNCAP_DISPATCH_KEY CPU

namespace attncap {

template <typename Launch>
void launch_on_host(const Tensor&, const Launch& launch) {
  const cudaError_t error = launch(cudaStream_t());
  check(error == cudaSuccess, std::string("CUDA refused a kernel of attncap: ") + cudaGetErrorString(error));
}

}  // namespace attncap

#define launch_on_device launch_on_host
