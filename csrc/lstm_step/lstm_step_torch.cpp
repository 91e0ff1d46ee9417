// Checks the arguments, allocates the outputs and calls the kernel of the device that this library is built for.
#include "lstm_step_torch.h"

#include "lstm_step.h"

namespace attncap {

void lstm_step(Tensor recurrent, Tensor context_part, Tensor word_table, Tensor c, std::optional<Tensor> parents,
               std::optional<Tensor> tokens, const Tensor& next_h, const Tensor& next_c, std::optional<Tensor> output) {
  const int64_t R = c.size(0), H = c.size(1), N = next_h.size(0), E = word_table.size(1) - 4 * H;
  check_tensor("lstm_step: recurrent", recurrent, c, {R, 4 * H});
  check_tensor("lstm_step: context_part", context_part, c, {R, 4 * H + E});
  check_tensor("lstm_step: word_table", word_table, c, {word_table.size(0), 4 * H + E});
  if (parents) check_tensor("lstm_step: parents", *parents, c, {N}, ScalarType::Long);
  if (tokens) check_tensor("lstm_step: tokens", *tokens, c, {N}, ScalarType::Long);
  recurrent = contiguous_rows(recurrent);
  context_part = contiguous_rows(context_part);
  word_table = as_contiguous(word_table);
  c = as_contiguous(c);
  parents = contiguous(parents);
  tokens = contiguous(tokens);

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
        .parents = parents ? data<int64_t>(*parents) : nullptr,
        .tokens = tokens ? data<int64_t>(*tokens) : nullptr,
        .next_h = mutable_data<T>(next_h),
        .next_c = mutable_data<T>(next_c),
        .output = output ? mutable_data<T>(*output) : nullptr,
    };
#ifdef USE_CUDA
    launch_on_device(c, [&](cudaStream_t stream) { return lstm_step_cuda(params, stream); });
#else
    ATTNCAP_CALL_BEST_ISA(lstm_step_cpu, params, threads);
#endif
  });
}

void lstm_step_backward(Tensor recurrent, Tensor context_part, Tensor word_inputs, Tensor c, Tensor next_h_grad,
                        Tensor next_c_grad, const Tensor& gates_grad, const Tensor& c_grad) {
  const int64_t N = c.size(0), H = c.size(1);
  check_tensor("lstm_step_backward: recurrent", recurrent, c, {N, 4 * H});
  check_tensor("lstm_step_backward: context_part", context_part, c, {N, 4 * H});
  check_tensor("lstm_step_backward: word_inputs", word_inputs, c, {N, 4 * H});
  check_tensor("lstm_step_backward: next_h_grad", next_h_grad, c, {N, H});
  check_tensor("lstm_step_backward: next_c_grad", next_c_grad, c, {N, H});
  recurrent = contiguous_rows(recurrent);
  context_part = contiguous_rows(context_part);
  word_inputs = as_contiguous(word_inputs);
  c = as_contiguous(c);
  next_h_grad = as_contiguous(next_h_grad);
  next_c_grad = as_contiguous(next_c_grad);

  dispatch_dtype(c, [&](auto type) {
    using T = decltype(type);
    const LstmStepBackward<T> params{
        .N = N,
        .H = H,
        .recurrent_stride = recurrent.stride(0),
        .context_stride = context_part.stride(0),
        .gates_grad_stride = gates_grad.stride(0),
        .recurrent = data<T>(recurrent),
        .context_part = data<T>(context_part),
        .word_inputs = data<T>(word_inputs),
        .c = data<T>(c),
        .next_h_grad = data<T>(next_h_grad),
        .next_c_grad = data<T>(next_c_grad),
        .gates_grad = mutable_data<T>(gates_grad),
        .c_grad = mutable_data<T>(c_grad),
    };
#ifdef USE_CUDA
    launch_on_device(c, [&](cudaStream_t stream) { return lstm_step_backward_cuda(params, stream); });
#else
    ATTNCAP_CALL_BEST_ISA(lstm_step_backward_cpu, params, threads);
#endif
  });
}

namespace {

std::tuple<Tensor, Tensor, Tensor> step(Tensor recurrent, Tensor context_part, Tensor word_table, Tensor c,
                                        Tensor parents, Tensor tokens) {
  check(recurrent.dim() == 2 && context_part.dim() == 2 && word_table.dim() == 2 && c.dim() == 2 && parents.dim() == 1,
        "lstm_step takes recurrent [R, 4H], context_part [R, 4H + E], word_table [V, 4H + E], c [R, H], parents [N] "
        "and tokens [N]");
  const int64_t H = c.size(1), N = parents.size(0), E = word_table.size(1) - 4 * H;
  check(H > 0 && E >= 0, "lstm_step: H must be at least 1, and word_table must have at least 4H columns");
  const Tensor next_h = empty(c, N, H), next_c = empty(c, N, H), output = empty(c, N, E);
  lstm_step(recurrent, context_part, word_table, c, parents, tokens, next_h, next_c, output);
  return {next_h, next_c, output};
}

}  // namespace
}  // namespace attncap

STABLE_TORCH_LIBRARY_IMPL(attncap, ATTNCAP_DISPATCH_KEY, library) {
  library.impl("lstm_step", TORCH_BOX(&attncap::step));
}
