"""Scheduled sampling: feeding the model its own words in training, as it will be fed when it captions.

Bengio et al., "Scheduled Sampling for Sequence Prediction with Recurrent Neural Networks", 2015.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from attncap.data.vocabulary import Vocabulary
from attncap.models.decoder import Decoder
from attncap.search.sampling import draw, uniform_numbers


@torch.no_grad()
def sample_inputs(
    decoder: Decoder, features: Tensor, tokens: Tensor, probability: float, seeds: Sequence[Sequence[int]]
) -> Tensor:
    """Replace some of the words that teacher forcing feeds with the model's own. The targets are still the true words.

    Independently and with probability `probability`, each word is replaced by one that is drawn from the model's
    distribution given the words before it, including replaced ones. <start>, <end> and <pad> stay where they are and
    are never drawn: captions keep their lengths, and the model is fed nothing that it would not be fed when it
    captions. Words are drawn without dropout and, under autocast, in the precision of the weights.

    Args:
        decoder: what `LSTMDecoder.for_inference` returns, or any other.
        features: [B,P,D].
        tokens: int64 [N,T], the words to feed, <start> first; the K captions of an image next to each other, N = B K.
        probability: from 0 (nothing is replaced) to 1 (every word is).
        seeds: one for each image, see `uniform_numbers`; the same seeds give the same words.

    Returns:
        int64 [N,T].
    """
    (N, T), B = tokens.shape, len(features)
    uniform = uniform_numbers(seeds, 2, N // B, T).transpose(0, 1).reshape(2, N, T)
    coins, draws = uniform.to(tokens.device)
    is_replaced = (coins < probability) & (tokens > Vocabulary.END)
    inputs = tokens.clone()
    first = Vocabulary.END + 1  # the words before are never drawn
    rows = torch.arange(N, device=tokens.device)
    with torch.autocast(features.device.type, enabled=False):
        state, parents = decoder.start(features), rows // (N // B)  # all captions of an image start from one row
        for t in range(1, T):
            state, logits, _ = decoder.step(state, parents, inputs[:, t - 1])
            words = first + draw(logits[:, first:], draws[:, t])
            inputs[:, t] = torch.where(is_replaced[:, t], words, tokens[:, t])
            parents = rows
    return inputs
