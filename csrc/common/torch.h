// What every *_torch.cpp needs: checks with one clear sentence, dispatch on dtype, and where the
// kernel runs. Each *_torch.cpp is compiled twice: for the CPU library, and with USE_CUDA for the
// CUDA library.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "dtype.h"
#include "isa.h"

#ifdef USE_CUDA
#include <cuda_runtime_api.h>
#define ATTNCAP_DISPATCH_KEY CUDA
#else
#define ATTNCAP_DISPATCH_KEY CPU
#endif

namespace attncap {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check(bool condition, const std::string& sentence) {
  if (!condition) throw std::runtime_error(sentence);
}

// Every tensor of an op has the sizes named and the device of `like`; dtype too, unless another is
// named.
inline void check_tensor(const std::string& name, const Tensor& tensor, const Tensor& like,
                         std::initializer_list<int64_t> sizes, std::optional<ScalarType> dtype = std::nullopt) {
  check(tensor.scalar_type() == dtype.value_or(like.scalar_type()), name + " has another dtype than the op takes");
  check(tensor.is_cuda() == like.is_cuda() && tensor.get_device_index() == like.get_device_index(),
        name + " is on another device than the op's first tensor");
  const auto actual = tensor.sizes();
  check(std::vector<int64_t>(actual.begin(), actual.end()) == std::vector<int64_t>(sizes),
        name + " has sizes that do not fit the other tensors");
}

inline ScalarType accumulate_dtype(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  if (!tensor) return std::nullopt;
  return torch::stable::contiguous(*tensor);
}

// [rows, columns] as it lies where each row is contiguous, else a copy.
inline Tensor contiguous_rows(const Tensor& tensor) {
  return tensor.stride(1) == 1 ? tensor : torch::stable::contiguous(tensor);
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Calls body(T()) with the kernels' type for the tensor's dtype.
template <typename Body>
void dispatch_dtype(const Tensor& tensor, const Body& body) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return body(float());
    case ScalarType::Double:
      return body(double());
    case ScalarType::BFloat16:
      return body(bfloat16());
    case ScalarType::Half:
      return body(float16());
    default:
      check(false, "attncap's kernels take float32, bfloat16, float16 and float64");
  }
}

#ifdef USE_CUDA
// Calls launch(stream) with torch's current stream, on the tensor's device.
template <typename Launch>
void launch_on_device(const Tensor& tensor, const Launch& launch) {
  const int32_t index = tensor.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  const cudaError_t error = launch(static_cast<cudaStream_t>(stream));
  check(error == cudaSuccess, std::string("CUDA refused a kernel of attncap: ") + cudaGetErrorString(error));
}
#else
// torch's threads, for the CPU kernels.
inline void threads(int64_t count, void (*work)(int64_t, int64_t, void*), void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, 1, work, context));
}

// Calls a CPU kernel, function<T>(...), in the widest instruction set that the processor has.
#define ATTNCAP_CALL_BEST_ISA(function, ...) ATTNCAP_CALL_ISA(best_isa(), function, __VA_ARGS__)
#endif

}  // namespace attncap
