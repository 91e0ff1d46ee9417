"""The decoder: soft attention over the feature grid and an LSTM that writes a caption word by word.

Xu et al., "Show, Attend and Tell", 2015, sections 3.1.2 and 4.2.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attncap.config import ModelConfig
from attncap.data.vocabulary import Vocabulary
from attncap.ops import BACKENDS


class Memory(NamedTuple):
    """What the decoder looks at in every step; the K rows of an image share it."""

    features: Tensor  # [B,P,D]
    keys: Tensor  # [B,P,A]


class Written(NamedTuple):
    """The M words that teacher forcing has the decoder write, those of all rows' first step first."""

    outputs: Tensor  # [M,O], what `word_output` makes logits of; O = E for the deep output layer, else H
    weights: Tensor  # [M,P], attention
    rows: Tensor  # int64 [M], which row wrote the word,
    places: Tensor  # int64 [M], and where: tokens[rows, places] is what it should be


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
        self.ops = BACKENDS[implementation]
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

    def forward(self, features: Tensor, tokens: Tensor, inputs: Tensor | None = None) -> Written:
        """Teacher forcing: word t is written after words 0..t-1 of `inputs`, for every t > 0 up to a row's last word.

        features [B,P,D]; tokens int64 [N,T], <pad> after a caption's end, perhaps on the CPU, where their lengths are
        needed; inputs int64 [N,T-1], tokens[:, :-1] by default. The work is that of the longest caption of each image;
        where images do not come sorted by it, longest first, their features are copied to sort them.

        Raises ValueError where N is no multiple of B, or no row has a word."""
        device, N, B = features.device, len(tokens), len(features)
        lengths = (tokens[:, 1:] != Vocabulary.PAD).sum(dim=1).cpu()
        if B == 0 or N % B or not lengths.any():
            raise ValueError(f"{N} rows of tokens for {B} images; all need as many, and one a word to write")
        K = N // B
        longest, order = lengths.view(B, K).amax(dim=1).sort(descending=True, stable=True)
        images = [int((longest > t).sum()) for t in range(longest[0])]  # in each step
        if not order.equal(torch.arange(B)):
            features = features[order.to(device)]
        rows = (order.unsqueeze(1) * K + torch.arange(K)).flatten()  # of tokens, as they are sorted now
        rows_of_steps = torch.cat([rows[: K * b] for b in images])
        steps = torch.arange(len(images)).repeat_interleave(K * torch.tensor(images))
        [written] = (lengths[rows_of_steps] > steps).nonzero(as_tuple=True)
        rows_of_steps, steps = torch.stack([rows_of_steps, steps]).to(device)
        written = written.to(device)
        inputs = (tokens[:, :-1] if inputs is None else inputs).to(device)
        embedded = self.embedding(inputs[rows_of_steps, steps])  # [M,E]

        lstm = self.lstm
        word_weight, context_weight = lstm.weight_ih.split([embedded.shape[1], features.shape[2]], dim=1)
        mean = features.mean(dim=1)
        h, context, weights = self.ops.attention_lstm(
            features,
            self.ops.linear(features, self.key.weight, self.key.bias),
            F.linear(embedded, word_weight, lstm.bias_ih + lstm.bias_hh),
            self.initial_h(mean).repeat_interleave(K, dim=0),  # section 3.1.2
            self.initial_c(mean).repeat_interleave(K, dim=0),
            torch.cat([lstm.weight_hh, self.query.weight, self.gate.weight]),
            torch.cat([torch.zeros_like(lstm.bias_hh), self.query.bias, self.gate.bias]),
            context_weight,
            self.score_weight,
            batch_sizes=images,
            activation=self.activation,
        )
        if K > 1:  # captions of an image that are shorter than its longest went along
            of_all = (rows_of_steps, steps, embedded, h, context, weights)
            rows_of_steps, steps, embedded, h, context, weights = (x[written] for x in of_all)
        if self.deep:  # equation 7
            h = embedded + self.hidden_output(h) + self.context_output(context)
        return Written(self.dropout(h), weights, rows_of_steps, steps + 1)
