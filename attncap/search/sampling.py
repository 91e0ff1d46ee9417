"""Words drawn at random: for the search, for self-critical training and for scheduled sampling."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from attncap.data.vocabulary import Vocabulary
from attncap.models.decoder import Decoder

CHECK_EVERY = 8  # steps after which CUDA is asked whether all captions have ended: the answer makes the host wait


def uniform_numbers(seeds: Sequence[Sequence[int]], *shape: int) -> Tensor:
    """Random numbers in [0, 1), float64 [B, *shape] on the CPU, for each image from its own seed (integers of at least
    0): they depend neither on the batch nor on an image's position in it."""
    numbers = np.empty((len(seeds), *shape))
    for of_image, seed in zip(numbers, seeds, strict=True):
        np.random.default_rng(seed).random(out=of_image)
    return torch.from_numpy(numbers)


def draw(log_probs: Tensor, uniform: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Draw a word for each row by inverting the cumulative distribution: the first word at which the sum of the
    probabilities exceeds `uniform`.

    Args:
        log_probs: [N,V], up to a constant for each row; words at -inf are not drawn. (For a row of NaN the word is
            arbitrary.)
        uniform: float64 [N], in [0, 1).
        top_k: draw only from the top_k most probable words; 0: from all.
        top_p: of these, draw only from the most probable words that together reach this probability.

    Returns int64 [N].
    """
    words = None
    if top_k or top_p < 1:
        log_probs, words = log_probs.sort(dim=1, descending=True, stable=True)
        if top_k:
            log_probs[:, top_k:] = -torch.inf
    sums = log_probs.softmax(dim=1).cumsum(dim=1, dtype=torch.float64)
    total = sums[:, -1:].contiguous()
    if top_p < 1:
        total = sums.gather(1, torch.searchsorted(sums, top_p * total).clamp(max=sums.shape[1] - 1))
    drawn = torch.searchsorted(sums, uniform.unsqueeze(1) * total, right=True)
    last = torch.searchsorted(sums, total)  # uniform * total may be rounded up to the total
    drawn = torch.minimum(drawn, last).clamp(max=sums.shape[1] - 1)
    return (drawn if words is None else words.gather(1, drawn)).squeeze(1)


def sample_captions(
    decoder: Decoder, features: Tensor, seeds: Sequence[Sequence[int]], K: int, max_length: int
) -> Tensor:
    """K captions for each image, drawn word by word from the decoder's own distribution; only <pad> and <start> are
    never drawn.

    Args:
        features: [B,P,D].
        seeds: one for each image, see `uniform_numbers`.
        max_length: maximum number of words in a caption, including <end>; a caption that is cut off there has no <end>.

    Returns int64 [N,T], N = B K: <start>, the words, <end>, then <pad>.
    """
    uniform = uniform_numbers(seeds, max_length, K).to(features.device)
    N = len(features) * K
    tokens = torch.full((N, 1 + max_length), Vocabulary.PAD, device=features.device)
    tokens[:, 0] = Vocabulary.START
    has_ended = torch.zeros(N, dtype=torch.bool, device=features.device)
    rows = torch.arange(N, device=features.device)
    parents = rows // K  # all captions of an image start from one row
    with torch.autocast(features.device.type, enabled=False):
        state = decoder.start(features)
        for t in range(max_length):
            state, logits, _ = decoder.step(state, parents, tokens[:, t])
            words = Vocabulary.END + draw(logits[:, Vocabulary.END :], uniform[:, t].flatten())
            tokens[:, t + 1] = words.masked_fill(has_ended, Vocabulary.PAD)
            has_ended |= words == Vocabulary.END
            parents = rows
            if ((t + 1) % CHECK_EVERY == 0 or not features.is_cuda) and has_ended.all():
                break
    longest = int((tokens != Vocabulary.PAD).sum(dim=1).max())
    return tokens[:, :longest]
