"""The decoder: soft attention over the feature grid and an LSTM that writes a caption word by word.

Xu et al., "Show, Attend and Tell", 2015, sections 3.1.2 and 4.2.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from attncap.config import ModelConfig
from attncap.ops import IMPLEMENTATIONS


class Memory(NamedTuple):
    """What the decoder looks at in every step; the K rows of an image share it."""

    features: Tensor  # [B,P,D]
    keys: Tensor  # [B,P,A]


class State(NamedTuple):
    """What the LSTM carries from word to word."""

    h: Tensor  # [N,H]
    c: Tensor  # [N,H]


class Decoder(nn.Module):
    """Words from features.

    Args:
        config: sizes A, E, H, the score's activation, the output layer, dropout.
        feature_size: D.
        vocabulary_size: V.
        implementation: "native" (the project's own kernels) or "torch" (plain PyTorch).
    """

    def __init__(self, config: ModelConfig, feature_size: int, vocabulary_size: int, implementation: str = "native"):
        super().__init__()
        attention, embedding, hidden = config.attention_size, config.embedding_size, config.hidden_size
        self.ops = IMPLEMENTATIONS[implementation]
        self.activation = config.activation
        self.key = nn.Linear(feature_size, attention)
        self.query = nn.Linear(hidden, attention)
        self.score_weight = nn.Parameter(torch.empty(attention).uniform_(-1, 1) / attention**0.5)
        self.gate = nn.Linear(hidden, feature_size)
        self.embedding = nn.Embedding(vocabulary_size, embedding)
        self.lstm = nn.LSTMCell(embedding + feature_size, hidden)
        self.initial_h = nn.Linear(feature_size, hidden)
        self.initial_c = nn.Linear(feature_size, hidden)
        self.deep = config.output_layer == "deep"
        if self.deep:
            self.hidden_output = nn.Linear(hidden, embedding)
            self.context_output = nn.Linear(feature_size, embedding, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.word_output = nn.Linear(embedding if self.deep else hidden, vocabulary_size)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)

    def start(self, features: Tensor, rows: int) -> tuple[Memory, State]:
        """features [B,P,D] -> what `step` needs, for `rows` = K rows an image. The initial state comes from the mean
        feature (section 3.1.2)."""
        mean = features.mean(dim=1)
        state = State(self.initial_h(mean), self.initial_c(mean))
        return Memory(features, self.key(features)), State(*(x.repeat_interleave(rows, dim=0) for x in state))

    def step(self, embedded: Tensor, state: State, memory: Memory) -> tuple[State, Tensor, Tensor]:
        """One word further: embedded [N,E] (the last word) -> new state, context [N,D], attention weights [N,P].

        The context is gated by sigmoid(gate(h)), section 4.2.1, with a gate for each channel."""
        context, weights = self.ops.soft_attention(
            memory.features,
            memory.keys,
            self.query(state.h),
            self.score_weight,
            activation=self.activation,
            gate=self.gate(state.h),
        )
        state = State(*self.lstm(torch.cat([embedded, context], dim=1), tuple(state)))
        return state, context, weights

    def logits(self, embedded: Tensor, h: Tensor, context: Tensor) -> Tensor:
        """[...,E], [...,H], [...,D] -> [...,V]; the deep output layer is equation 7."""
        if self.deep:
            h = embedded + self.hidden_output(h) + self.context_output(context)
        return self.word_output(self.dropout(h))

    def forward(self, features: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Teacher forcing: features [B,P,D], tokens int64 [N,T] -> logits [N,T-1,V] of tokens 1..T-1, and the attention
        weights [N,T-1,P] with which they were written."""
        memory, state = self.start(features, rows=len(tokens) // len(features))
        embedded = self.embedding(tokens[:, :-1])  # [N,T-1,E]
        steps = []
        for t in range(embedded.shape[1]):
            state, context, weights = self.step(embedded[:, t], state, memory)
            steps.append((state.h, context, weights))
        h, context, weights = (torch.stack(values, dim=1) for values in zip(*steps, strict=True))
        return self.logits(embedded, h, context), weights
