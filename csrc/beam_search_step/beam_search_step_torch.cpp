// Checks the arguments, allocates the outputs and calls the kernel of the device that this library is built for.
#include "../common/torch.h"
#include "beam_search_step.h"

namespace attncap {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> beam_search_step(Tensor logits, Tensor scores, Tensor finished,
                                                                    std::optional<Tensor> suppressed,
                                                                    std::optional<Tensor> penalty_tokens,
                                                                    std::optional<Tensor> penalties, int64_t end,
                                                                    bool end_allowed, bool shrink, double temperature,
                                                                    double length_penalty, double last_length_penalty) {
  check(logits.dim() == 2 && scores.dim() == 2 && finished.dim() == 2,
        "beam_search_step takes logits [B * J, V], scores [B, J] and finished [B, K]");
  const int64_t B = scores.size(0), J = scores.size(1), K = finished.size(1), V = logits.size(1);
  check(J > 0 && J <= kMaxBeams && K > 0 && K <= kMaxBeams,
        "beam_search_step takes 1 to " + std::to_string(kMaxBeams) + " beams per image");
  check(V <= kMaxVocabulary, "beam_search_step takes at most " + std::to_string(kMaxVocabulary) + " tokens");
  check(end >= 0 && end < V, "beam_search_step: end must be a token, from 0 to V - 1");
  check(temperature > 0 && length_penalty > 0 && last_length_penalty > 0,
        "beam_search_step: temperature and length penalties must be above 0");
  check_tensor("beam_search_step: logits", logits, logits, {B * J, V});
  check_tensor("beam_search_step: scores", scores, logits, {B, J}, ScalarType::Float);
  check_tensor("beam_search_step: finished", finished, logits, {B, K}, ScalarType::Float);
  if (suppressed) check_tensor("beam_search_step: suppressed", *suppressed, logits, {V}, ScalarType::Bool);
  check(penalty_tokens.has_value() == penalties.has_value() && (!penalty_tokens || penalty_tokens->dim() == 2),
        "beam_search_step takes penalty_tokens [B * J, M] and penalties [B * J, M] together, or neither");
  const int64_t M = penalty_tokens ? penalty_tokens->size(1) : 0;
  if (penalty_tokens) {
    check_tensor("beam_search_step: penalty_tokens", *penalty_tokens, logits, {B * J, M}, ScalarType::Long);
    check_tensor("beam_search_step: penalties", *penalties, logits, {B * J, M}, ScalarType::Float);
  }
  logits = contiguous_rows(logits);
  scores = as_contiguous(scores);
  finished = as_contiguous(finished);
  suppressed = contiguous(suppressed);
  penalty_tokens = contiguous(penalty_tokens);
  penalties = contiguous(penalties);
  const Tensor tokens = empty(logits, B, K, ScalarType::Long);
  const Tensor parents = empty(logits, B, K, ScalarType::Long);
  const Tensor next_scores = empty(scores, B, K);
  const Tensor ended = empty(scores, B, J);
  const Tensor next_finished = empty(scores, B, K);

  dispatch_dtype(logits, [&](auto type) {
    using T = decltype(type);
    if constexpr (std::is_same_v<T, double>) {
      check(false, "beam_search_step takes logits in float32, bfloat16 or float16");
    } else {
      const BeamSearchStep<T> params{
          .sizes = {B, J, K, V},
          .inverse_temperature = static_cast<float>(1 / temperature),
          .length_penalty = static_cast<float>(length_penalty),
          .last_length_penalty = static_cast<float>(last_length_penalty),
          .end = end,
          .end_allowed = end_allowed,
          .shrink = shrink,
          .penalty_count = M,
          .logits_stride = logits.stride(0),
          .logits = data<T>(logits),
          .scores = data<float>(scores),
          .finished = data<float>(finished),
          .suppressed = suppressed ? data<bool>(*suppressed) : nullptr,
          .penalty_tokens = penalty_tokens ? data<int64_t>(*penalty_tokens) : nullptr,
          .penalties = penalties ? data<float>(*penalties) : nullptr,
          .tokens = mutable_data<int64_t>(tokens),
          .parents = mutable_data<int64_t>(parents),
          .next_scores = mutable_data<float>(next_scores),
          .ended = mutable_data<float>(ended),
          .next_finished = mutable_data<float>(next_finished),
      };
#ifdef USE_CUDA
      launch_on_device(logits, [&](cudaStream_t stream) { return beam_search_step_cuda(params, stream); });
#else
      ATTNCAP_CALL_BEST_ISA(beam_search_step_cpu, params, threads);
#endif
    }
  });
  return {tokens, parents, next_scores, ended, next_finished};
}

}  // namespace
}  // namespace attncap

STABLE_TORCH_LIBRARY_IMPL(attncap, ATTNCAP_DISPATCH_KEY, library) {
  library.impl("beam_search_step", TORCH_BOX(&attncap::beam_search_step));
}
