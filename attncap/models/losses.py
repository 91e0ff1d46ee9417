"""What teacher forcing minimises."""

from torch import Tensor

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
    written = decoder(features, tokens, inputs)
    tokens = tokens.to(features.device)
    words = decoder.ops.linear_cross_entropy(
        written.outputs,
        decoder.word_output.weight,
        decoder.word_output.bias,
        tokens[written.rows, written.places],
        None if row_weights is None else row_weights[written.rows],
        label_smoothing=label_smoothing,
    )
    looked = written.weights.new_zeros(len(tokens), written.weights.shape[1], dtype=words.dtype)
    looked = looked.index_add(0, written.rows, written.weights.to(words.dtype))
    return {"words": words, "attention": (1 - looked).square().mean(dim=1).sum()}
