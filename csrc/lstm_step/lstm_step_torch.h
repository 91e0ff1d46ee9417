// The op on outputs that are already allocated, for this directory's op and for loops over steps.
#pragma once

#include "../common/torch.h"

namespace attncap {

// Writes next_h [N, H], next_c [N, H] and output [N, E], all contiguous. Without parents and tokens, parents[n] = n and
// tokens[n] = n. `output` may be omitted if E = 0.
void lstm_step(Tensor recurrent, Tensor context_part, Tensor word_table, Tensor c, std::optional<Tensor> parents,
               std::optional<Tensor> tokens, const Tensor& next_h, const Tensor& next_c, std::optional<Tensor> output);

// Writes gates_grad [N, 4H], whose rows may have any stride, and c_grad [N, H], contiguous, which may be next_c_grad.
void lstm_step_backward(Tensor recurrent, Tensor context_part, Tensor word_inputs, Tensor c, Tensor next_h_grad,
                        Tensor next_c_grad, const Tensor& gates_grad, const Tensor& c_grad);

}  // namespace attncap
