"""Scheduled sampling: feeding the model its own words in training, as it will be fed when it captions.

Bengio et al., "Scheduled Sampling for Sequence Prediction with Recurrent Neural Networks", 2015.
"""

import torch
from torch import Tensor

from attncap.data.vocabulary import Vocabulary
from attncap.models.decoder import Decoder


@torch.no_grad()
def mix_tokens(
    decoder: Decoder, features: Tensor, tokens: Tensor, probability: float, generator: torch.Generator
) -> Tensor:
    """Captions in which words are replaced by the model's own, to be fed in their place; what is to be predicted stays
    `tokens` (`caption_losses(..., inputs=mixed[:, :-1])`).

    Each word is replaced with `probability`, independently, by one drawn from the model's distribution after the words
    before it, replaced ones included. <start>, <end> and <pad> stay where they are and are never drawn: captions keep
    their lengths, and the model is fed nothing that it will not meet. It draws without dropout.

    Args:
        features: [B,P,D].
        tokens: int64 [N,T], the K captions of an image neighbours, N = B K.
        probability: from 0 (nothing is replaced) to 1 (every word is).
        generator: on any device; the same state gives the same captions.

    Returns:
        int64 [N,T].
    """
    # All random numbers are drawn first, so that how many a call takes depends on the shape alone.
    coins, draws = torch.rand(2, *tokens.shape, generator=generator, device=generator.device).to(tokens.device)
    chosen = (coins < probability) & (tokens > Vocabulary.END)
    mixed = tokens.clone()
    training = decoder.training
    decoder.eval()
    try:
        memory, state = decoder.start(features, rows=len(tokens) // len(features))
        for t in range(1, 1 + _last(chosen)):
            embedded = decoder.embedding(mixed[:, t - 1])
            state, context, _ = decoder.step(embedded, state, memory)
            rows = chosen[:, t].nonzero().squeeze(1)
            logits = decoder.logits(embedded[rows], state.h[rows], context[rows])
            mixed[rows, t] = _draw(logits, draws[rows, t])
    finally:
        decoder.train(training)
    return mixed


def _last(chosen: Tensor) -> int:
    """bool [N,T] -> the last column that has a True; 0 if none has."""
    columns = chosen.any(dim=0).nonzero()
    return int(columns[-1]) if len(columns) else 0


def _draw(logits: Tensor, draws: Tensor) -> Tensor:
    """logits [R,V], draws [R] uniform in [0, 1) -> words int64 [R]: the first at which the summed probabilities of all
    words up to it pass the draw."""
    first = Vocabulary.END + 1
    probabilities = logits[:, first:].to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=1)
    sums = probabilities.cumsum(dim=1)
    words = torch.searchsorted(sums, draws.to(sums.dtype).unsqueeze(1) * sums[:, -1:], right=True)
    return first + words.squeeze(1).clamp(max=sums.shape[1] - 1)  # a draw just below 1 may be rounded up
