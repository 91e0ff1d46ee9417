"""What teacher forcing minimises."""

import torch
import torch.nn.functional as F
from torch import Tensor

from attncap.data.vocabulary import Vocabulary
from attncap.models.decoder import Decoder


def caption_losses(
    decoder: Decoder,
    features: Tensor,
    tokens: Tensor,
    label_smoothing: float = 0.0,
    row_weights: Tensor | None = None,
    inputs: Tensor | None = None,
) -> dict[str, Tensor]:
    """The terms of the loss, Xu et al. 2015, equation 14, as sums: the caller knows by how many to divide.

    Args:
        features: [B,P,D].
        tokens: int64 [N,T], <pad> after the end.
        label_smoothing: share of a word's target spread over the whole vocabulary.
        row_weights: [N], of each row's words.
        inputs: int64 [N,T-1], the words that the decoder is fed, where they are not tokens[:, :-1].

    Returns:
        `words`: the cross entropy, summed over all words that are not <pad>; `attention`: the doubly stochastic penalty
        (1 - sum over the caption's words of a cell's weight) squared, the mean over cells, summed over rows.
    """
    targets = tokens[:, 1:]
    if inputs is not None:
        tokens = torch.cat([inputs, tokens[:, -1:]], dim=1)
    logits, weights = decoder(features, tokens)
    words = F.cross_entropy(
        logits.flatten(0, 1).float(),
        targets.flatten(),
        ignore_index=Vocabulary.PAD,
        label_smoothing=label_smoothing,
        reduction="none",
    ).view_as(targets)
    if row_weights is not None:
        words = words * row_weights.unsqueeze(1)
    written = (targets != Vocabulary.PAD).unsqueeze(2)
    attention = (1 - (weights * written).sum(dim=1)).square().mean(dim=1)
    return {"words": words.sum(), "attention": attention.sum()}
