"""Rules for the words that a caption may contain. Your own rule can be any callable with the signature of
`LogitsProcessor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from attncap.data.vocabulary import Vocabulary
from attncap.errors import CallError
from attncap.search.config import SearchConfig


class LogitsProcessor(Protocol):
    """A rule. It is called before every word, for all rows (unfinished captions) at once."""

    def __call__(self, log_probs: Tensor, history: Tensor) -> Tensor:
        """log_probs float32 [N,V] of the next word, history int64 [N,t] of the words so far (t = 0 at first; <start> is
        not among them) -> log_probs [N,V], perhaps changed in place: -inf forbids a word. The other words keep their
        log-probabilities: nothing is normalised again, unless rules raise the sum of the probabilities above 1."""


@dataclass(frozen=True)
class SuppressTokens:
    """Forbids these words. (<end> cannot be suppressed; see `MinLength`.)"""

    tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", tuple(self.tokens))

    def __call__(self, log_probs: Tensor, history: Tensor) -> Tensor:
        tokens = [token for token in self.tokens if token != Vocabulary.END]
        log_probs[:, tokens] = -torch.inf
        return log_probs


@dataclass(frozen=True)
class MinLength:
    """Keeps captions from ending before they have `length` words."""

    length: int

    def __call__(self, log_probs: Tensor, history: Tensor) -> Tensor:
        if history.shape[1] < self.length:
            log_probs[:, Vocabulary.END] = -torch.inf
        return log_probs


@dataclass(frozen=True)
class NoRepeatNgram:
    """Keeps any sequence of n words from occurring twice in a caption."""

    n: int

    def __post_init__(self) -> None:
        if self.n < 1:
            raise CallError(f"n={self.n}: must be at least 1")

    def __call__(self, log_probs: Tensor, history: Tensor) -> Tensor:
        banned = self.banned(history)
        if banned is None:
            return log_probs
        penalties = torch.zeros(banned.shape, device=banned.device).masked_fill(banned >= 0, -torch.inf)
        return log_probs.scatter_add(1, banned.clamp(min=0), penalties)

    def banned(self, history: Tensor) -> Tensor | None:
        """int64 [N,M], the words that would repeat an n-gram, -1 for none; None if there are no n-grams yet."""
        if history.shape[1] < self.n:
            return None
        ngrams = history.unfold(1, self.n, 1)  # [N,M,n]
        last = history[:, history.shape[1] - self.n + 1 :].unsqueeze(1)
        return ngrams[:, :, -1].masked_fill((ngrams[:, :, :-1] != last).any(dim=2), -1)


@dataclass(frozen=True)
class ForcedPrefix:
    """Makes every caption start with these words, whatever other rules say."""

    tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", tuple(self.tokens))

    def __call__(self, log_probs: Tensor, history: Tensor) -> Tensor:
        t = history.shape[1]
        if t < len(self.tokens):
            others = torch.arange(log_probs.shape[1], device=log_probs.device) != self.tokens[t]
            log_probs = log_probs.masked_fill(others, -torch.inf)
        return log_probs


def processors_for(config: SearchConfig, vocabulary: Vocabulary) -> list[LogitsProcessor]:
    """The settings of a search that name words, as processors. Raises CallError for words that the vocabulary does not
    have, and for a prefix that is too long."""
    suppressed = SuppressTokens(tuple(vocabulary.suppress(config.suppressed)))
    prefix = ForcedPrefix(tuple(vocabulary.token_ids(config.prefix)))
    if len(prefix.tokens) >= config.max_length:
        raise CallError(f"prefix={config.prefix!r}: must be shorter than max_length={config.max_length}")
    return [suppressed, prefix] if prefix.tokens else [suppressed]
