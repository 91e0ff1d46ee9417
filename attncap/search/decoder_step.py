"""One step of the decoder, rearranged for a search.

What a step computes from the last state alone (query, gate, recurrent part, attention, the context's part of the LSTM)
is the same for all words that may follow. So it is computed for the rows of the last step (`look`), and the rows that
go on pick their part of it (`write`): states are never copied to reorder them, and in the first steps, where beams
share their past, the work is done once.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from attncap.models.decoder import Decoder, Memory
from attncap.ops.linear import fixed_linear


class Look(NamedTuple):
    """What a step computes from the last state alone."""

    recurrent: Tensor  # [R,4H], the hidden state times the LSTM's weights
    context_part: Tensor  # [R,4H+E], the context times the LSTM's and, for the deep output layer, the output's weights
    weights: Tensor  # [R,P], attention


class DecoderStep:
    """A decoder's weights, laid out for `look` and `write`. `of` notices when the decoder's own have changed.

    Args:
        decoder: it is not kept, so that it can go.
        table: compute what words have to do with the LSTM once for all V of them. Without, it is computed for the words
            that are written, which costs less where these are fewer than V in all.
    """

    def __init__(self, decoder: Decoder, table: bool = True):
        lstm, query, gate = decoder.lstm, decoder.query, decoder.gate
        E = decoder.embedding.embedding_dim
        self.ops = decoder.ops
        self.activation = decoder.activation
        self.score_weight = decoder.score_weight.detach()
        self.sizes = [4 * lstm.hidden_size, query.out_features, gate.out_features]
        self.key = fixed_linear(decoder.key.weight, decoder.key.bias)
        self.initial = fixed_linear(
            torch.cat([decoder.initial_h.weight, decoder.initial_c.weight]),
            torch.cat([decoder.initial_h.bias, decoder.initial_c.bias]),
        )
        self.hidden_part = fixed_linear(
            torch.cat([lstm.weight_hh, query.weight, gate.weight]),
            torch.cat([torch.zeros_like(lstm.bias_hh), query.bias, gate.bias]),
        )
        context_weights = [lstm.weight_ih[:, E:]]
        self.hidden_output = None
        if decoder.deep:
            context_weights.append(decoder.context_output.weight)
            self.hidden_output = fixed_linear(decoder.hidden_output.weight, decoder.hidden_output.bias)
        self.context_part = fixed_linear(torch.cat(context_weights), None)
        self.embedding = decoder.embedding.weight.detach()
        self.word_input = fixed_linear(lstm.weight_ih[:, :E], lstm.bias_ih + lstm.bias_hh)
        self.word_table = self.word_part(self.embedding) if table else None
        self.word_output = fixed_linear(decoder.word_output.weight, decoder.word_output.bias)
        self.graphs = {}  # beam_search's, which hold these weights' addresses

    @classmethod
    def of(cls, decoder: Decoder) -> DecoderStep:
        """The step of a decoder, made once, and anew when its weights have changed, moved or been cast. (A decoder made
        in inference mode, whose changes torch does not count, gets a new step every time.)"""
        parameters = list(decoder.parameters())
        if any(p.is_inference() for p in parameters):
            return cls(decoder)
        # Torch does not count the changes by `parameter.data` and by fused optimizers, so a number of each parameter is
        # looked at too.
        numbers = torch.stack([p.detach().flatten()[-1].float() for p in parameters]).view(torch.int32).tolist()
        made_from = [(p.data_ptr(), p._version, number) for p, number in zip(parameters, numbers, strict=True)]
        known = _steps.get(decoder)
        if known is None or known.made_from != made_from:
            if known is not None:
                known.graphs.clear()  # they and the old step hold each other, and much memory
            known = _steps[decoder] = cls(decoder)
            known.made_from = made_from
            # While these are kept, no others can have their place in memory.
            known.weights = [p.detach() for p in parameters]
        return known

    def start(self, features: Tensor) -> tuple[Memory, Tensor, Tensor]:
        """features [B,P,D] -> what every step looks at, and the initial state, h and c [B,H]."""
        h, c = self.initial(features.mean(dim=1)).chunk(2, dim=1)
        return Memory(features, self.key(features)), h, c

    def look(self, memory: Memory, h: Tensor) -> Look:
        """h [R,H], the rows of an image neighbours."""
        recurrent, query, gate = self.hidden_part(h).split(self.sizes, dim=1)
        context, weights = self.ops.soft_attention(
            memory.features, memory.keys, query, self.score_weight, activation=self.activation, gate=gate
        )
        return Look(recurrent, self.context_part(context), weights)

    def word_part(self, embedded: Tensor) -> Tensor:
        """embedded [M,E] -> [M,4H+E], the words' part of the LSTM and, for the deep output layer, of the output; [M,4H]
        for the plain one."""
        part = self.word_input(embedded)
        return part if self.hidden_output is None else torch.cat([part, embedded], dim=1)

    def write(self, look: Look, c: Tensor, parents: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows that go on from rows parents [N] of `look` and c [R,H] with the words tokens [N] -> h, c [N,H] and
        logits [N,V]."""
        table, words = self.word_table, tokens
        if table is None:
            table = self.word_part(self.embedding[tokens])
            words = torch.arange(len(tokens), device=tokens.device)
        h, c, output = self.ops.lstm_step(look.recurrent, look.context_part, table, c, parents, words)
        if self.hidden_output is None:
            output = h
        else:
            output += self.hidden_output(h)
        return h, c, self.word_output(output)


# Keyed by identity; a decoder that is gone takes its step along.
_steps: weakref.WeakKeyDictionary[Decoder, DecoderStep] = weakref.WeakKeyDictionary()
