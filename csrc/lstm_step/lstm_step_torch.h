// The op on tensors that are there already: for the ops of this room, and for loops over its steps.
#pragma once

#include "../common/torch.h"

namespace attncap {

// Writes next_h [N, H], next_c [N, H] and output [N, E], all contiguous. Without parents and tokens row n goes on from
// row n with word n. Where E = 0 there is no output.
void lstm_step(Tensor recurrent, Tensor context_part, Tensor word_table, Tensor c, std::optional<Tensor> parents,
               std::optional<Tensor> tokens, const Tensor& next_h, const Tensor& next_c, std::optional<Tensor> output);

// Writes gates_grad [N, 4H], whose rows may lie apart, and c_grad [N, H], contiguous, which may be next_c_grad.
void lstm_step_backward(Tensor recurrent, Tensor context_part, Tensor words, Tensor c, Tensor next_h_grad,
                        Tensor next_c_grad, const Tensor& gates_grad, const Tensor& c_grad);

}  // namespace attncap
