// Checks, allocates, calls the kernel of this library's device.
#include "../common/torch.h"
#include "lstm_step.h"

namespace attncap {
namespace {

std::tuple<Tensor, Tensor, Tensor> lstm_step(Tensor recurrent, Tensor context_part, Tensor word_table, Tensor c,
                                             Tensor parents, Tensor tokens) {
  check(recurrent.dim() == 2 && context_part.dim() == 2 && word_table.dim() == 2 && c.dim() == 2 && parents.dim() == 1,
        "lstm_step takes recurrent [R, 4H], context_part [R, 4H + E], word_table [V, 4H + E], c [R, H], parents [N] "
        "and tokens [N]");
  const int64_t R = c.size(0), H = c.size(1), N = parents.size(0), E = word_table.size(1) - 4 * H;
  check(H > 0 && E >= 0, "lstm_step needs at least one hidden unit, and a word_table of at least 4H columns");
  check_tensor("lstm_step: recurrent", recurrent, c, {R, 4 * H});
  check_tensor("lstm_step: context_part", context_part, c, {R, 4 * H + E});
  check_tensor("lstm_step: word_table", word_table, c, {word_table.size(0), 4 * H + E});
  check_tensor("lstm_step: parents", parents, c, {N}, ScalarType::Long);
  check_tensor("lstm_step: tokens", tokens, c, {N}, ScalarType::Long);
  recurrent = contiguous_rows(recurrent);
  context_part = contiguous_rows(context_part);
  word_table = torch::stable::contiguous(word_table);
  c = torch::stable::contiguous(c);
  parents = torch::stable::contiguous(parents);
  tokens = torch::stable::contiguous(tokens);
  const Tensor next_h = torch::stable::new_empty(c, {N, H});
  const Tensor next_c = torch::stable::new_empty(c, {N, H});
  const Tensor output = torch::stable::new_empty(c, {N, E});

  dispatch_dtype(c, [&](auto type) {
    using T = decltype(type);
    const LstmStep<T> params{
        .N = N,
        .H = H,
        .E = E,
        .recurrent_stride = recurrent.stride(0),
        .context_stride = context_part.stride(0),
        .recurrent = data<T>(recurrent),
        .context_part = data<T>(context_part),
        .word_table = data<T>(word_table),
        .c = data<T>(c),
        .parents = data<int64_t>(parents),
        .tokens = data<int64_t>(tokens),
        .next_h = mutable_data<T>(next_h),
        .next_c = mutable_data<T>(next_c),
        .output = mutable_data<T>(output),
    };
#ifdef USE_CUDA
    launch_on_device(c, [&](cudaStream_t stream) { return lstm_step_cuda(params, stream); });
#else
    ATTNCAP_CALL_BEST_ISA(lstm_step_cpu, params, threads);
#endif
  });
  return {next_h, next_c, output};
}

std::tuple<Tensor, Tensor> lstm_step_backward(Tensor recurrent, Tensor context_part, Tensor words, Tensor c,
                                              Tensor h_grad, Tensor c_grad) {
  check(c.dim() == 2 && c.size(1) > 0, "lstm_step_backward takes c [N, H] of at least one hidden unit");
  const int64_t N = c.size(0), H = c.size(1);
  check_tensor("lstm_step_backward: recurrent", recurrent, c, {N, 4 * H});
  check_tensor("lstm_step_backward: context_part", context_part, c, {N, 4 * H});
  check_tensor("lstm_step_backward: words", words, c, {N, 4 * H});
  check_tensor("lstm_step_backward: h_grad", h_grad, c, {N, H});
  check_tensor("lstm_step_backward: c_grad", c_grad, c, {N, H});
  recurrent = contiguous_rows(recurrent);
  context_part = contiguous_rows(context_part);
  words = torch::stable::contiguous(words);
  c = torch::stable::contiguous(c);
  h_grad = torch::stable::contiguous(h_grad);
  c_grad = torch::stable::contiguous(c_grad);
  const Tensor gates_grad = torch::stable::new_empty(c, {N, 4 * H});
  const Tensor before_grad = torch::stable::new_empty(c, {N, H});

  dispatch_dtype(c, [&](auto type) {
    using T = decltype(type);
    const LstmStepBackward<T> params{
        .N = N,
        .H = H,
        .recurrent_stride = recurrent.stride(0),
        .context_stride = context_part.stride(0),
        .recurrent = data<T>(recurrent),
        .context_part = data<T>(context_part),
        .words = data<T>(words),
        .c = data<T>(c),
        .next_h_grad = data<T>(h_grad),
        .next_c_grad = data<T>(c_grad),
        .gates_grad = mutable_data<T>(gates_grad),
        .c_grad = mutable_data<T>(before_grad),
    };
#ifdef USE_CUDA
    launch_on_device(c, [&](cudaStream_t stream) { return lstm_step_backward_cuda(params, stream); });
#else
    ATTNCAP_CALL_BEST_ISA(lstm_step_backward_cpu, params, threads);
#endif
  });
  return {gates_grad, before_grad};
}

}  // namespace
}  // namespace attncap

STABLE_TORCH_LIBRARY_IMPL(attncap, ATTNCAP_DISPATCH_KEY, library) {
  library.impl("lstm_step", TORCH_BOX(&attncap::lstm_step));
  library.impl("lstm_step_backward", TORCH_BOX(&attncap::lstm_step_backward));
}
