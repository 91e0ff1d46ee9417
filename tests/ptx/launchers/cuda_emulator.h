// As kernels/cuda_emulator.h, but the tests of tests/csrc go through the launchers of csrc/*/*.cu, compiled by nvcc.
#pragma once

// CUDA's headers for the host define some of what the emulator does.
#define USE_CUDA
#include <cuda_runtime_api.h>
#undef __global__
#undef __device__
#undef __host__
#undef __noinline__
#undef __launch_bounds__
#undef __shared__
#define launch launch_host_code
#include CUDA_EMULATOR_H
#undef launch

#include "../fake_cudart.h"
#include "../report_totals.h"

namespace attncap {

template <typename T>
struct LstmStep;
template <typename T>
struct LstmStepBackward;
template <typename T>
struct BeamSearchStep;
template <typename T>
cudaError_t lstm_step_cuda(const LstmStep<T>& params, cudaStream_t stream);
template <typename T>
cudaError_t lstm_step_backward_cuda(const LstmStepBackward<T>& params, cudaStream_t stream);
template <typename T>
cudaError_t beam_search_step_cuda(const BeamSearchStep<T>& params, cudaStream_t stream);

template <typename T>
cudaError_t call_op(const LstmStep<T>& params) {
  return lstm_step_cuda(params, nullptr);
}
template <typename T>
cudaError_t call_op(const LstmStepBackward<T>& params) {
  return lstm_step_backward_cuda(params, nullptr);
}
template <typename T>
cudaError_t call_op(const BeamSearchStep<T>& params) {
  return beam_search_step_cuda(params, nullptr);
}

// As on a GPU with this many multiprocessors.
template <typename Call>
void call_launcher(cuda_emulator::Schedule schedule, int processors, const Call& call) {
  fake_cudart::order = static_cast<ptx::Order>(schedule), fake_cudart::processors = processors;
  if (call() != cudaSuccess) throw std::runtime_error(fake_cudart::error);
}

}  // namespace attncap

namespace cuda_emulator {

template <typename Kernel, typename Params>
void launch(Schedule schedule, unsigned, unsigned, size_t, Kernel, const Params& params) {
  attncap::call_launcher(schedule, 100, [&] { return attncap::call_op(params); });
}

}  // namespace cuda_emulator
