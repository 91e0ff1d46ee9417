"""The LSTM decoder on the project's own kernels: the same results as the plain loop of decoder.py, faster.

Three ideas. All that the hidden state is multiplied with (recurrent weights, query, gate) is one matrix product. The
LSTM's input weights are split, so that the words' part can be computed for all words at once: for a whole sequence in
training, as a table over the vocabulary in a search. And what a step computes from the last state alone is computed
before the rows that continue it are gathered, so states are never copied to reorder them, and beams that share their
past share the work.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attncap import ops
from attncap.models.decoder import LSTMDecoder, LSTMState, check_features, select_images
from attncap.ops import library
from attncap.ops.linear import fixed_linear, linear


def hidden_projection(decoder: LSTMDecoder) -> tuple[Tensor, Tensor]:
    """Weight [4H+A+D,H] and bias of all that the hidden state is multiplied with: the LSTM's recurrent part, the query
    and the gate. (The LSTM's biases belong to the words' part.)"""
    attention, lstm = decoder.attention, decoder.lstm
    weight = torch.cat([lstm.weight_hh, attention.query.weight, attention.gate.weight])
    return weight, torch.cat([torch.zeros_like(lstm.bias_hh), attention.query.bias, attention.gate.bias])


def input_weights(decoder: LSTMDecoder) -> tuple[Tensor, Tensor, Tensor]:
    """The LSTM's input weights for the word [4H,E] and for the context [4H,D], and its biases [4H]."""
    lstm = decoder.lstm
    word_weight, context_weight = lstm.weight_ih.split([decoder.embedding.embedding_dim, decoder.feature_size], dim=1)
    return word_weight, context_weight, lstm.bias_ih + lstm.bias_hh


class DecoderOutput(NamedTuple):
    """The M words that teacher forcing predicts, packed: first those of all rows' first step, then the second, ..."""

    outputs: Tensor  # [M,O], what `word_output` turns into logits; O = E for the deep output layer, else H
    attention: Tensor  # [M,P]
    rows: Tensor  # int64 [M], the row that each word belongs to,
    steps: Tensor  # int64 [M], and its position: it follows tokens[rows, steps]


def teacher_forcing(decoder: LSTMDecoder, features: Tensor, tokens: Tensor, lengths: Tensor) -> DecoderOutput:
    """Predict the words that follow the first lengths[n] words of each row n.

    features [B,P,D]; tokens int64 [N,T]; lengths int64 [N] on the CPU, at least one above 0. The work is that of the
    longest row of each image. Where images do not come sorted by it, longest first, their features are copied."""
    device, N, B = features.device, len(tokens), len(features)
    K = N // B
    if not torch.is_autocast_enabled(device.type):
        features = features.to(decoder.word_output.weight.dtype)
    # For example lengths [1, 2] and [3, 1] of B = 2 images with K = 2 rows: the second image is sorted to the front,
    # batch_sizes is [2, 2, 1], and the M = 10 words are those of rows 2, 3, 0, 1, then of 2, 3, 0, 1, then of 2, 3. The
    # `predicted` ones are those within their row's length: 7 of the 10.
    longest, order = lengths.view(B, K).amax(dim=1).sort(descending=True, stable=True)
    batch_sizes = (longest > torch.arange(longest[0], device="cpu").unsqueeze(1)).sum(dim=1)  # images in each step
    is_sorted = order.equal(torch.arange(B, device="cpu"))
    rows = (order.unsqueeze(1) * K + torch.arange(K, device="cpu")).flatten()  # of tokens, in the sorted order
    steps = torch.arange(len(batch_sizes), device="cpu").repeat_interleave(K * batch_sizes)
    batch_sizes = batch_sizes.tolist()
    rows_of_steps = torch.cat([rows[: K * b] for b in batch_sizes])
    [predicted] = (lengths[rows_of_steps] > steps).nonzero(as_tuple=True)
    moved = [order, predicted, rows_of_steps, steps]
    if tokens.device.type == "cpu":
        moved.append(tokens[rows_of_steps, steps])
    order, predicted, rows_of_steps, steps, *words = library.to_device(device, *moved)
    if not is_sorted:
        features = features[order]
    embedded = decoder.embedding(words[0] if words else tokens[rows_of_steps, steps])  # [M,E]

    word_weight, context_weight, bias = input_weights(decoder)
    mean = features.mean(dim=1)
    h, context, weights = ops.attention_lstm(
        features,
        linear(features, decoder.attention.key.weight, decoder.attention.key.bias),
        F.linear(embedded, word_weight, bias),
        decoder.initial_h(mean).repeat_interleave(K, dim=0),
        decoder.initial_c(mean).repeat_interleave(K, dim=0),
        *hidden_projection(decoder),
        context_weight,
        decoder.attention.score_weight,
        batch_sizes=batch_sizes,
        activation=decoder.attention.activation,
    )
    if K > 1:  # shorter rows of an image went along with its longest
        of_all = (rows_of_steps, steps, embedded, h, context, weights)
        rows_of_steps, steps, embedded, h, context, weights = (x[predicted] for x in of_all)
    return DecoderOutput(decoder.dropout(decoder.output(embedded, h, context)), weights, rows_of_steps, steps)


def forward(decoder: LSTMDecoder, features: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """`LSTMDecoder.forward` by `teacher_forcing`: logits [N,T,V], attention [N,T,P]."""
    check_features(features, decoder.feature_size)
    N, T = tokens.shape
    output = teacher_forcing(decoder, features, tokens, torch.full((N,), T, device="cpu"))
    return unpack(decoder.word_output(output.outputs), output, N, T), unpack(output.attention, output, N, T)


def unpack(values: Tensor, output: DecoderOutput, N: int, T: int) -> Tensor:
    """Packed values [M,X] -> [N,T,X], 0 where nothing was predicted."""
    return values.new_zeros(N, T, values.shape[1]).index_put((output.rows, output.steps), values)


class InferenceDecoder:
    """An `LSTMDecoder` with its weights laid out for `step`, see `LSTMDecoder.for_inference`. No gradients."""

    def __init__(self, decoder: LSTMDecoder, table: bool = True):
        # What is kept must not depend on where it is made.
        with torch.no_grad(), torch.autocast(decoder.word_output.weight.device.type, enabled=False):
            self._lay_out(decoder, table)

    def _lay_out(self, decoder: LSTMDecoder, table: bool) -> None:
        attention = decoder.attention
        self.feature_size, self.vocabulary_size = decoder.feature_size, decoder.vocabulary_size
        self.activation = attention.activation
        self.score_weight = attention.score_weight.detach()
        self.sizes = [4 * decoder.lstm.hidden_size, attention.query.out_features, attention.gate.out_features]
        word_weight, context_weight, bias = input_weights(decoder)
        self.key = fixed_linear(attention.key.weight, attention.key.bias)
        self.initial = fixed_linear(
            torch.cat([decoder.initial_h.weight, decoder.initial_c.weight]),
            torch.cat([decoder.initial_h.bias, decoder.initial_c.bias]),
        )
        self.hidden = fixed_linear(*hidden_projection(decoder))
        self.deep, self.for_cuda = decoder.deep, decoder.word_output.weight.is_cuda
        if self.deep:
            context_weight = torch.cat([context_weight, decoder.context_output.weight])
            self.hidden_output = fixed_linear(decoder.hidden_output.weight, decoder.hidden_output.bias)
            self.hidden_output_weight = decoder.hidden_output.weight.detach()
            self.hidden_output_bias = decoder.hidden_output.bias.detach()
        self.context = fixed_linear(context_weight.contiguous(), None)
        self.embedding = decoder.embedding.weight.detach()
        self.word = fixed_linear(word_weight, bias)
        self.table = self._word_part(self.embedding) if table else None
        weight, bias = decoder.word_output.weight, decoder.word_output.bias
        if self.for_cuda:  # cuBLAS's fast kernels need rows of a multiple of 16 bytes; `step` leaves the padding out
            padding = -self.vocabulary_size % 64
            weight, bias = F.pad(weight, (0, 0, 0, padding)), F.pad(bias, (0, padding))
        self.word_output = fixed_linear(weight, bias)

    def start(self, features: Tensor) -> LSTMState:
        check_features(features, self.feature_size)
        features = features.to(self.score_weight.dtype)
        h, c = self.initial(features.mean(dim=1)).chunk(2, dim=1)
        return LSTMState(features, self.key(features), h, c)

    def step(self, state: LSTMState, parents: Tensor, tokens: Tensor) -> tuple[LSTMState, Tensor, Tensor]:
        recurrent, query, gate = self.hidden(state.h).split(self.sizes, dim=1)
        context, weights = ops.soft_attention(
            state.features, state.keys, query, self.score_weight, activation=self.activation, gate=gate
        )
        table, entries = self.table, tokens
        if table is None:
            table = self._word_part(self.embedding[tokens])
            entries = torch.arange(len(tokens), device=tokens.device)
        h, c, output = ops.lstm_step(recurrent, self.context(context), table, state.c, parents, entries)
        if not self.deep:
            output = h
        elif self.for_cuda:
            output.addmm_(h, self.hidden_output_weight.t())  # in one launch; the bias is in the table
        else:
            output += self.hidden_output(h)
        return state._replace(h=h, c=c), self.word_output(output)[:, : self.vocabulary_size], weights[parents]

    def select(self, state: LSTMState, images: Tensor) -> LSTMState:
        return select_images(state, images)

    def _word_part(self, embedded: Tensor) -> Tensor:
        """embedded [M,E] -> [M,4H+E]: a word's part of the LSTM's gates and of the deep output layer (else [M,4H])."""
        part = self.word(embedded)
        if not self.deep:
            return part
        return torch.cat([part, embedded + self.hidden_output_bias if self.for_cuda else embedded], dim=1)
