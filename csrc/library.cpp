// The schemas of all ops. Each directory's *_torch.cpp registers the kernels; attncap/ops registers fake kernels and
// autograd. The CPU library has the schemas; compiled with USE_CUDA, for the CUDA library, this is one op's kernel.
#include <torch/csrc/stable/library.h>

#ifdef USE_CUDA
#include <torch/csrc/stable/accelerator.h>

#include <tuple>

#include "common/cuda_probe.h"

namespace {

// Whether the kernels can run on a device: a cudaError_t, and the versions of CUDA that the driver supports and that the
// library was built with, such as 12080 for 12.8.
std::tuple<int64_t, int64_t, int64_t> cuda_probe(int64_t device) {
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
  int driver = 0;
  cudaDriverGetVersion(&driver);
  return {attncap::cuda_probe(), driver, CUDART_VERSION};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(attncap, CompositeExplicitAutograd, library) {
  library.impl("cuda_probe", TORCH_BOX(&cuda_probe));
}

#else
#include <string>

#include "common/isa.h"

STABLE_TORCH_LIBRARY(attncap, library) {
  library.def("cpu_isa() -> str");
  library.def("cuda_probe(int device) -> (int error, int driver, int runtime)");
  library.def(
      "soft_attention(Tensor features, Tensor keys, Tensor query, Tensor score_weight, Tensor? mask, Tensor? gate, "
      "str activation) -> (Tensor context, Tensor weights)");
  library.def(
      "soft_attention_backward(Tensor context_grad, Tensor weights_grad, Tensor features, Tensor keys, Tensor query, "
      "Tensor score_weight, Tensor? gate, Tensor context, Tensor weights, str activation, bool features_need_grad) -> "
      "(Tensor features_grad, Tensor keys_grad, Tensor query_grad, Tensor score_weight_grad, Tensor gate_grad)");
  library.def(
      "soft_attention_keys_backward(Tensor keys, Tensor query, Tensor score_weight, Tensor score_grad, "
      "Tensor row_starts, str activation) -> (Tensor keys_grad, Tensor score_weight_grad)");
  library.def(
      "lstm_step(Tensor recurrent, Tensor context_part, Tensor word_table, Tensor c, Tensor parents, Tensor tokens) -> "
      "(Tensor h, Tensor c, Tensor output)");
  library.def(
      "attention_lstm(Tensor features, Tensor keys, Tensor word_inputs, Tensor h, Tensor c, Tensor hidden_weight, "
      "Tensor hidden_bias, Tensor context_weight, Tensor score_weight, int[] batch_sizes, str activation) -> "
      "(Tensor h, Tensor context, Tensor weights, Tensor next_c, Tensor projections, Tensor context_gates)");
  library.def(
      "attention_lstm_backward(Tensor h_grad, Tensor context_grad, Tensor weights_grad, Tensor features, Tensor keys, "
      "Tensor word_inputs, Tensor c, Tensor hidden_weight, Tensor context_weight, Tensor score_weight, Tensor context, "
      "Tensor weights, Tensor next_c, Tensor projections, Tensor context_gates, int[] batch_sizes, str activation, "
      "bool features_need_grad) -> "
      "(Tensor projection_grad, Tensor gated_grad, Tensor score_grad, Tensor h_grad, Tensor c_grad)");
  library.def(
      "beam_search_step(Tensor logits, Tensor scores, Tensor finished, Tensor? suppressed, Tensor? penalty_tokens, "
      "Tensor? penalties, int end, bool end_allowed, bool shrink, float temperature, float length_penalty, "
      "float last_length_penalty) -> (Tensor tokens, Tensor parents, Tensor scores, Tensor ended, Tensor finished)");
}

namespace {

// The instruction set that the CPU kernels use on this processor, as a name to print.
std::string cpu_isa() {
  switch (attncap::best_isa()) {
    case attncap::Isa::avx512:
      return "AVX-512";
    case attncap::Isa::avx2:
      return "AVX2";
    default:
      return "no vector extension";
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(attncap, CompositeExplicitAutograd, library) { library.impl("cpu_isa", TORCH_BOX(&cpu_isa)); }
#endif
