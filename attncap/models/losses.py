"""What teacher forcing minimises."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from attncap.data.vocabulary import Vocabulary
from attncap.models import fused
from attncap.models.decoder import LSTMDecoder, check_rows
from attncap.ops import linear_cross_entropy
from attncap.ops.library import accumulate_dtype, to_device


class CaptionLosses(NamedTuple):
    """The terms of the loss, Xu et al. 2015, equation 14, as sums: it is up to the caller what to divide them by."""

    words: Tensor
    """Cross entropy, summed over all words that are not <pad>."""
    attention: Tensor
    """Doubly stochastic penalty: (1 - sum over the caption's words of a cell's weight) squared, averaged over the
    cells, summed over the rows."""


def caption_losses(
    decoder: LSTMDecoder,
    features: Tensor,
    tokens: Tensor,
    targets: Tensor,
    *,
    label_smoothing: float = 0.0,
    row_weights: Tensor | None = None,
) -> CaptionLosses:
    """The losses of predicting `targets` from the words before them. With the native backend, the logits of all words
    are never computed at once.

    Args:
        features: [B,P,D].
        tokens: int64 [N,T], the words that are fed; N / B rows for each image, next to each other.
        targets: int64 [N,T], the words that follow; <pad> does not count, and only <pad> follows it. Targets on the CPU
            are fastest, since the lengths are needed there.
        label_smoothing: share of a word's target that is spread over the whole vocabulary.
        row_weights: [N], factors by which the rows' cross entropies are multiplied.

    Raises ValueError for any other shapes, or if every target is <pad>.
    """
    check_rows(tokens, features)
    lengths = target_lengths(targets, tokens)
    if decoder.backend == "torch":
        logits, attention = decoder(features, tokens.to(features.device)[:, : lengths.max()])
        return losses_from_logits(
            logits, attention, targets[:, : lengths.max()], label_smoothing=label_smoothing, row_weights=row_weights
        )
    output = fused.teacher_forcing(decoder, features, tokens, lengths)
    if targets.device.type == "cpu":
        [targets] = to_device(features.device, targets)
    words = linear_cross_entropy(
        output.outputs,
        decoder.word_output.weight,
        decoder.word_output.bias,
        targets[output.rows, output.steps],
        None if row_weights is None else row_weights.to(features.device, non_blocking=True)[output.rows],
        label_smoothing=label_smoothing,
    )
    attended = output.attention.new_zeros(len(tokens), output.attention.shape[1], dtype=words.dtype)
    attended = attended.index_add(0, output.rows, output.attention.to(words.dtype))
    return CaptionLosses(words, (1 - attended).square().mean(dim=1).sum())


def losses_from_logits(
    logits: Tensor,
    attention: Tensor,
    targets: Tensor,
    *,
    label_smoothing: float = 0.0,
    row_weights: Tensor | None = None,
) -> CaptionLosses:
    """`caption_losses` from logits [N,T,V] and attention [N,T,P]."""
    logits, targets = logits.to(accumulate_dtype(logits)), targets.to(logits.device)
    is_word = targets != Vocabulary.PAD
    words = F.cross_entropy(
        logits.transpose(1, 2), targets, ignore_index=Vocabulary.PAD, label_smoothing=label_smoothing, reduction="none"
    ).sum(dim=1)
    attended = (attention.to(words.dtype) * is_word.unsqueeze(2)).sum(dim=1)
    words = words if row_weights is None else words * row_weights.to(words)
    return CaptionLosses(words.sum(), (1 - attended).square().mean(dim=1).sum())


def target_lengths(targets: Tensor, tokens: Tensor) -> Tensor:
    """The number of targets in each row that are not <pad>, int64 [N] on the CPU. Raises ValueError unless the targets
    have the shape of the tokens, and at least one is not <pad>."""
    lengths = (targets != Vocabulary.PAD).sum(dim=-1).cpu()
    if targets.shape != tokens.shape or not lengths.any():
        raise ValueError(
            f"targets of shape {list(targets.shape)} for tokens {list(tokens.shape)}: the shapes must be the same, and "
            "at least one word must not be <pad>"
        )
    return lengths
