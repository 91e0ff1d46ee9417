"""Scheduled sampling: feeding the model its own words in training, as it will be fed when it captions.

Bengio et al., "Scheduled Sampling for Sequence Prediction with Recurrent Neural Networks", 2015.
"""

import torch
from torch import Tensor

from attncap.data.vocabulary import Vocabulary
from attncap.models.decoder import Decoder
from attncap.search.decoder_step import DecoderStep


@torch.no_grad()
def mix_tokens(
    decoder: Decoder, features: Tensor, tokens: Tensor, probability: float, generator: torch.Generator
) -> Tensor:
    """Captions in which words are replaced by the model's own, to be fed in their place; what is to be predicted stays
    `tokens` (`caption_losses(..., inputs=mixed[:, :-1])`).

    Each word is replaced with `probability`, independently, by one drawn from the model's distribution after the words
    before it, replaced ones included. <start>, <end> and <pad> stay where they are and are never drawn: captions keep
    their lengths, and the model is fed nothing that it will not meet. It draws without dropout and, under autocast, in
    the precision of the weights.

    Args:
        features: [B,P,D].
        tokens: int64 [N,T], <start>, words, <end>, then <pad>; the K captions of an image neighbours, N = B K.
        probability: from 0 (nothing is replaced) to 1 (every word is).
        generator: on any device; the same state gives the same captions.

    Returns:
        int64 [N,T].
    """
    # All random numbers are drawn first, so that how many a call takes depends on the shape alone.
    uniform = torch.rand(2, *tokens.shape, generator=generator, dtype=torch.float32, device=generator.device)
    coins, draws = uniform.to(tokens.device)
    chosen = (coins < probability) & (tokens > Vocabulary.END)
    mixed = tokens.clone()
    with torch.autocast(features.device.type, enabled=False):
        step = DecoderStep(decoder, table=False)  # not `of`: the next step of the optimizer makes it old
        memory, h, c = step.start(features.to(step.score_weight.dtype))
        rows = torch.arange(len(tokens), device=tokens.device)
        parents = rows // (len(tokens) // len(features))  # an image's captions go on from one beginning
        for t in range(1, tokens.shape[1] - 1):  # nothing is fed after the last word
            h, c, logits = step.write(step.look(memory, h), c, parents, mixed[:, t - 1])
            words = draw_words(logits, draws[:, t], Vocabulary.END + 1)
            mixed[:, t] = torch.where(chosen[:, t], words, tokens[:, t])
            parents = rows
    return mixed


def draw_words(logits: Tensor, draws: Tensor, first: int) -> Tensor:
    """logits [R,V], draws [R] uniform in [0, 1) -> words int64 [R], none before `first`: the first word at which the
    summed probabilities of all words up to it pass the draw. (Below 1 in float32, a draw stays below the last sum
    however it is rounded. Where logits are no numbers it is the last word: that the loss is none is told later.)"""
    sums = logits[:, first:].softmax(dim=1).cumsum(dim=1)
    words = torch.searchsorted(sums, draws.to(sums.dtype).unsqueeze(1) * sums[:, -1:], right=True).squeeze(1)
    return first + words.clamp(max=sums.shape[1] - 1)
