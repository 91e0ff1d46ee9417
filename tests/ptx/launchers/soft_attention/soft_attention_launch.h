// Stands before csrc/soft_attention/soft_attention_launch.h: where the test calls launch_forward and the others, the
// launchers of soft_attention_cuda.h run.
#pragma once

#include SOFT_ATTENTION_LAUNCH_H

namespace attncap {

template <typename T>
cudaError_t call_op(const SoftAttentionForward<T>& params) {
  return soft_attention_forward_cuda(params, nullptr);
}
template <typename T>
cudaError_t call_op(const SoftAttentionBackward<T>& params) {
  return soft_attention_backward_cuda(params, nullptr);
}
template <typename T>
cudaError_t call_op(const SoftAttentionKeysBackward<T>& params) {
  return soft_attention_keys_backward_cuda(params, nullptr);
}

}  // namespace attncap

#define launch_on_ptx(params, processors, emulate) \
  call_launcher(schedule, processors, [&, of = (params)] { return call_op(of); })
#define launch_forward launch_on_ptx
#define launch_backward launch_on_ptx
#define launch_keys_backward launch_on_ptx
