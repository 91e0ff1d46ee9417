"""The decoder: from features to words. Start reading here.

`Decoder` is the interface that search, sampling and training rely on. `LSTMDecoder` is Show, Attend and Tell's:

    h_0, c_0     = linear functions of the mean feature                           section 3.1.2
    context, a_t = attention(features, h_{t-1})                                   equations 4 to 6 and 13, attention.py
    h_t, c_t     = LSTM([embedding(w_{t-1}), context], h_{t-1}, c_{t-1})          equations 1 to 3
    p(w_t)       = softmax(L_o (embedding(w_{t-1}) + L_h h_t + L_z context))      equation 7

Xu et al., "Show, Attend and Tell", 2015. The letters of the shapes are explained in attncap/config.py.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from attncap.config import ModelConfig
from attncap.errors import CallError
from attncap.models.attention import SoftAttention

State = Any
"""A NamedTuple of tensors that only its decoder understands. All other code just stores it and passes it on."""


class Decoder(Protocol):
    """A model that continues captions word by word.

    A state holds B images, each with the same number of rows (unfinished captions). The rows of an image are next to
    each other. `step` returns the very same tensor objects for what it does not change, such as the features.
    """

    vocabulary_size: int

    def start(self, features: Tensor) -> State:
        """features [B,P,D] -> the state before the first word, one row for each image."""

    def step(self, state: State, parents: Tensor, tokens: Tensor) -> tuple[State, Tensor, Tensor]:
        """Continue rows `parents` (int64 [N]) of the state with the words `tokens` (int64 [N], <start> at first).

        Rows may be continued several times or not at all, but they stay in the order of the images, with the same
        number for each image. Returns the state of the N new rows, logits [N,V] of the words that follow, and attention
        [N,P]: where each row looked to predict them."""

    def select(self, state: State, images: Tensor) -> State:
        """The state of the images with indices `images` (int64, or bool [B])."""


class LSTMState(NamedTuple):
    features: Tensor  # [B,P,D]
    keys: Tensor  # [B,P,A]
    h: Tensor  # [R,H], the R / B rows of an image next to each other
    c: Tensor  # [R,H]


class LSTMDecoder(nn.Module):
    """Soft attention and an LSTM.

    This file is the plain version, and the definition of the results. With `backend="native"`, teacher forcing and
    the decoder that `for_inference` returns use the project's own kernels (fused.py).

    Args:
        config: sizes A, E, H, the activation of the scores, the output layer, dropout.
        feature_size: D.
        vocabulary_size: V.
        backend: "native" or "torch"; CallError for anything else.

    `version` counts the events that may mean new weights: `train`, `load_state_dict`, `to` and similar methods. It lets
    the owner of a prepared decoder notice that it is outdated.
    """

    def __init__(self, config: ModelConfig, feature_size: int, vocabulary_size: int, backend: str = "native"):
        super().__init__()
        check_backend(backend)
        embedding, hidden = config.embedding_size, config.hidden_size
        self.backend = backend
        self.version = 0
        self.feature_size, self.vocabulary_size = feature_size, vocabulary_size
        self.attention = SoftAttention(feature_size, hidden, config.attention_size, config.activation)
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
        self.register_load_state_dict_pre_hook(rename_old_weights)
        self.register_load_state_dict_post_hook(_count_change)

    def start(self, features: Tensor) -> LSTMState:
        """See `Decoder`. Raises ValueError for features of any other shape."""
        check_features(features, self.feature_size)
        features = features.to(self.word_output.weight.dtype)
        mean = features.mean(dim=1)
        return LSTMState(features, self.attention.key(features), self.initial_h(mean), self.initial_c(mean))

    def step(self, state: LSTMState, parents: Tensor, tokens: Tensor) -> tuple[LSTMState, Tensor, Tensor]:
        """See `Decoder`. Applies no dropout, even in training."""
        state, output, weights = self._step(state, parents, tokens)
        return state, self.word_output(output), weights

    def _step(self, state: LSTMState, parents: Tensor, tokens: Tensor) -> tuple[LSTMState, Tensor, Tensor]:
        h, c, embedded = state.h[parents], state.c[parents], self.embedding(tokens)
        context, weights = self.attention(state.features, state.keys, h)
        h, c = self.lstm(torch.cat([embedded, context], dim=1), (h, c))
        return state._replace(h=h, c=c), self.output(embedded, h, context), weights

    def output(self, embedded: Tensor, h: Tensor, context: Tensor) -> Tensor:
        """What `word_output` turns into logits: [N,E] by equation 7, or [N,H] for the plain output layer."""
        if not self.deep:
            return h
        return embedded + self.hidden_output(h) + self.context_output(context)

    def select(self, state: LSTMState, images: Tensor) -> LSTMState:
        """See `Decoder`."""
        return select_images(state, images)

    def forward(self, features: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Teacher forcing: predict each word from the true words before it.

        features [B,P,D]; tokens int64 [N,T], the words that are fed, <start> first; the N / B rows of an image are next
        to each other -> logits [N,T,V] of the words that follow, attention [N,T,P]. Raises ValueError for any other
        shapes."""
        check_rows(tokens, features)
        if self.backend == "native":
            from attncap.models import fused

            return fused.forward(self, features, tokens)
        state = self.start(features)
        rows = torch.arange(len(tokens), device=tokens.device)
        parents = rows // (len(tokens) // len(features))  # all rows of an image start from one
        logits, attention = [], []
        for t in range(tokens.shape[1]):
            state, output, weights = self._step(state, parents, tokens[:, t])
            logits.append(self.word_output(self.dropout(output)))
            attention.append(weights)
            parents = rows
        return torch.stack(logits, dim=1), torch.stack(attention, dim=1)

    def for_inference(self, table: bool = True) -> Decoder:
        """A decoder with the same results and its weights laid out for speed. It keeps the weights as they are now:
        make a new one when they have changed. (With backend "torch" it is this decoder itself.)

        `table=False` skips a table over the whole vocabulary, which does not pay for itself when fewer words are
        written than the vocabulary has.
        """
        if self.backend == "torch":
            return self
        from attncap.models import fused

        return fused.InferenceDecoder(self, table)

    def train(self, mode: bool = True) -> "LSTMDecoder":
        self.version += 1
        return super().train(mode)

    def _apply(self, *arguments, **options) -> "LSTMDecoder":
        # What `to`, `cuda`, `half` and so on call, of this module or of one that contains it.
        try:
            return super()._apply(*arguments, **options)
        finally:
            self.version += 1


def check_backend(backend: str) -> None:
    """Raises CallError for an unknown backend."""
    if backend not in ("native", "torch"):
        raise CallError(f"backend={backend!r}: choose 'native' or 'torch'")


def select_images(state: LSTMState, images: Tensor) -> LSTMState:
    """The state of some of its images."""
    rows = (x.unflatten(0, (len(state.features), -1))[images].flatten(0, 1) for x in (state.h, state.c))
    return LSTMState(state.features[images], state.keys[images], *rows)


def check_features(features: Tensor, feature_size: int) -> None:
    """Raises ValueError unless the features are [B,P,D] with D = feature_size and at least one cell."""
    if features.dim() != 3 or features.shape[1] == 0 or features.shape[2] != feature_size:
        raise ValueError(
            f"the decoder takes features [B, P, {feature_size}] of at least one cell, not {list(features.shape)}"
        )


def check_rows(tokens: Tensor, features: Tensor) -> None:
    """Raises ValueError unless tokens [N,T] have at least one word, and the same number of rows for each image."""
    B = len(features)
    if tokens.dim() != 2 or 0 in tokens.shape or B == 0 or len(tokens) % B:
        raise ValueError(f"tokens of shape {list(tokens.shape)} for {B} images; each image needs equally many rows [T]")


def rename_old_weights(decoder: LSTMDecoder, state: dict, prefix: str, *_) -> None:
    """Rename the weights of models saved before the attention became a module. `prefix` is that of the decoder."""
    for part in ("key", "query", "gate", "score_weight"):
        for name in [name for name in state if name.startswith(prefix + part)]:
            state[f"{prefix}attention.{name.removeprefix(prefix)}"] = state.pop(name)


def _count_change(decoder: LSTMDecoder, _) -> None:
    decoder.version += 1
