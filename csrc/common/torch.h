// What every *_torch.cpp needs: argument checks, dispatch by dtype, and the call of the kernel. Each *_torch.cpp is
// compiled twice: for the CPU library, and with USE_CUDA for the CUDA library.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>

#include "dtype.h"
#include "isa.h"

#ifdef USE_CUDA
#include <cuda_runtime_api.h>
#define ATTNCAP_DISPATCH_KEY CUDA
#else
#define ATTNCAP_DISPATCH_KEY CPU
#endif

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // its name before torch 2.12
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace attncap {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check(bool condition, const std::string& message) {
  if (!condition) throw std::runtime_error(message);
}

// Checks that a tensor has these sizes, the device of `like`, and `dtype` or else the dtype of `like`.
inline void check_tensor(const char* name, const Tensor& tensor, const Tensor& like,
                         std::initializer_list<int64_t> sizes, std::optional<ScalarType> dtype = std::nullopt) {
  const auto check_that = [&](bool condition, const char* problem) {  // builds the string only on failure
    if (!condition) throw std::runtime_error(std::string(name) + problem);
  };
  check_that(tensor.scalar_type() == dtype.value_or(like.scalar_type()), " has the wrong dtype");
  check_that(tensor.is_cuda() == like.is_cuda() && tensor.get_device_index() == like.get_device_index(),
             " is not on the same device as the op's first tensor");
  const auto actual = tensor.sizes();
  check_that(std::equal(actual.begin(), actual.end(), sizes.begin(), sizes.end()),
             " has sizes that do not match the other tensors");
}

inline ScalarType accumulate_dtype(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The tensor itself if it is contiguous, else a copy. (torch::stable::contiguous goes through the dispatcher either
// way.)
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  if (!tensor) return std::nullopt;
  return as_contiguous(*tensor);
}

// The tensor [rows, columns] itself if each row is contiguous, else a copy.
inline Tensor contiguous_rows(const Tensor& tensor) {
  return tensor.stride(1) == 1 ? tensor : torch::stable::contiguous(tensor);
}

// A new matrix on the device of `like`, with `dtype` or else the dtype of `like`. (torch::stable::new_empty goes
// through the dispatcher, which takes longer than a small kernel.)
inline Tensor empty(const Tensor& like, int64_t rows, int64_t columns, std::optional<ScalarType> dtype = std::nullopt) {
  const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
  int32_t code, device_type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &code));
  if (dtype) code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle result;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(2, sizes, strides, code, device_type, like.get_device_index(), &result));
  return Tensor(result);
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Calls body(T()), where T is the kernels' number type for the tensor's dtype.
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
      check(false, "the kernels of attncap take float32, bfloat16, float16 and float64");
  }
}

#ifdef USE_CUDA
// Calls launch(stream) on the tensor's device, with torch's current stream.
template <typename Launch>
void launch_on_device(const Tensor& tensor, const Launch& launch) {
  const int32_t index = tensor.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  const cudaError_t error = launch(static_cast<cudaStream_t>(stream));
  check(error == cudaSuccess, std::string("launching a CUDA kernel of attncap failed: ") + cudaGetErrorString(error));
}
#else
// torch's thread pool, for the CPU kernels.
inline void threads(int64_t count, void (*work)(int64_t, int64_t, void*), void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, 1, work, context));
}

// Calls the CPU kernel function(...) compiled for the widest instruction set of this processor.
#define ATTNCAP_CALL_BEST_ISA(function, ...) ATTNCAP_CALL_ISA(best_isa(), function, __VA_ARGS__)
#endif

}  // namespace attncap
