"""Teacher forcing: the attention LSTM over all words of its captions, as one op with a backward of its own.

Letters: B images, K rows an image, N = B*K rows, P cells, D channels, A attention size, H hidden size; M, the rows of
all steps together.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from attncap.ops import library
from attncap.ops.linear import packed
from attncap.ops.soft_attention import ACTIVATIONS, check_cells, soft_attention_reference


def attention_lstm(
    features: Tensor,
    keys: Tensor,
    words: Tensor,
    h: Tensor,
    c: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    context_weight: Tensor,
    score_weight: Tensor,
    *,
    images: Sequence[int],
    activation: str = "tanh",
) -> tuple[Tensor, Tensor, Tensor]:
    """The loop of Show, Attend and Tell (Xu et al. 2015, equations 1 to 6 and 13) by the native kernels.

        recurrent, query, gate = hidden_weight h + hidden_bias
        context, weights = soft_attention(features, keys, query, score_weight, activation=activation, gate=gate)
        h, c = LSTM cell of (recurrent + context_weight context + words, c)

    Step t takes the rows of the first images[t] images one word further, K rows an image. The rows of all steps lie one
    behind the other in `words` and in what is returned: M = K * sum(images). So where images are sorted by the number
    of their words, captions that have ended cost nothing.

    Backward computes activations again, and keeps of a step only what its rows have: nothing of [N,P,A] or [N,P,D].
    Gradients of weights, keys and features are computed after the loop, each in one go.

    Args:
        features: [B, P, D].
        keys: [B, P, A], the features projected to the attention size.
        words: [M, 4H], each step's words times the LSTM's weights for them, with the LSTM's biases.
        h, c: [N, H], where the LSTM begins.
        hidden_weight: [4H + A + D, H], of the LSTM's recurrent part, the query and the gate.
        hidden_bias: [4H + A + D].
        context_weight: [4H, D], the LSTM's weights for the context.
        score_weight: [A].
        images: how many images each step has; it never rises.
        activation: "tanh" or "relu".

    All tensors have one dtype: float32, bfloat16, float16 or float64; under autocast they are cast to its dtype.

    Returns:
        h [M, H], context [M, D] and attention weights [M, P] of every row of every step, differentiable once.

    Raises:
        ValueError: shapes, dtypes, devices, the activation or the images do not fit; on CUDA also more than 10,240
            cells (5,120 in float64).
        attncap.errors.UserError: there is no kernel for the device; says how to get it.
    """
    tensors = library.autocast(features, keys, words, h, c, hidden_weight, hidden_bias, context_weight, score_weight)
    _check(*tensors, images, activation)
    check_cells(tensors[0])
    library.require(features.device)
    return _AttentionLstm.apply(*tensors, tuple(images), activation)


def attention_lstm_reference(
    features: Tensor,
    keys: Tensor,
    words: Tensor,
    h: Tensor,
    c: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    context_weight: Tensor,
    score_weight: Tensor,
    *,
    images: Sequence[int],
    activation: str = "tanh",
) -> tuple[Tensor, Tensor, Tensor]:
    """`attention_lstm` in plain PyTorch: same arguments, results and errors, on any device."""
    tensors = library.autocast(features, keys, words, h, c, hidden_weight, hidden_bias, context_weight, score_weight)
    _check(*tensors, images, activation)
    features, keys, words, h, c, hidden_weight, hidden_bias, context_weight, score_weight = tensors
    K = _rows_of_an_image(h, features)
    steps = []
    for B, of_words in zip(images, words.split([K * B for B in images]), strict=True):
        h, c = h[: K * B], c[: K * B]
        recurrent, query, gate = F.linear(h, hidden_weight, hidden_bias).split(_sizes(h, keys, features), dim=1)
        context, weights = soft_attention_reference(
            features[:B], keys[:B], query, score_weight, activation=activation, gate=gate
        )
        i, f, g, o = (recurrent + F.linear(context, context_weight) + of_words).chunk(4, dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        steps.append((h, context, weights))
    h, context, weights = (torch.cat(values) for values in zip(*steps, strict=True))
    return h, context, weights


class _AttentionLstm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, features, keys, words, h, c, hidden_weight, hidden_bias, context_weight, score_weight, images, activation
    ):
        next_h, context, weights, *of_steps = torch.ops.attncap.attention_lstm(
            features, keys, words, h, c, packed(hidden_weight), hidden_bias, packed(context_weight), score_weight,
            images, activation,
        )  # fmt: skip
        inputs = (features, keys, words, h, c, hidden_weight, context_weight, score_weight)
        ctx.save_for_backward(*inputs, next_h, context, weights, *of_steps)
        ctx.images, ctx.activation = images, activation
        return next_h, context, weights

    @staticmethod
    @once_differentiable  # a second derivative is an error, not zeros
    def backward(ctx, h_grad, context_grad, weights_grad):
        features, keys, words, h, c, hidden_weight, context_weight, score_weight, next_h, *of_steps = ctx.saved_tensors
        context, weights, _, projections, _ = of_steps
        # Where the rows lie. (It goes to the device now: after the loop a GPU would be waited for.)
        B, K, T = len(features), _rows_of_an_image(h, features), len(ctx.images)
        rows_of_steps = K * torch.tensor(ctx.images)
        starts = rows_of_steps.cumsum(0) - rows_of_steps
        step = torch.arange(T).repeat_interleave(rows_of_steps)
        row = torch.arange(len(step)) - starts[step]
        came_from = torch.where(step == 0, row, len(h) + starts[step - 1] + row)  # in h, or the last step's next_h
        image = row // max(K, 1)
        place = image * T * K + step * K + row % max(K, 1)  # by image; one with fewer steps than others has gaps
        row_starts = image.bincount(minlength=B).cumsum(0)
        came_from, place, by_image = torch.stack([came_from, place, place.argsort()]).to(h.device)
        row_starts = F.pad(row_starts, (1, 0)).to(h.device)

        projection_grad, gated_grad, score_grad, first_h_grad, c_grad = torch.ops.attncap.attention_lstm_backward(
            h_grad, context_grad, weights_grad, features, keys, words, c, packed(hidden_weight.t()),
            packed(context_weight.t()), score_weight, *of_steps, ctx.images, ctx.activation, ctx.needs_input_grad[0],
        )  # fmt: skip

        # What all steps share, after the loop: each in one go.
        gates_size, query_size, _ = _sizes(h, keys, features)
        gates_grad = projection_grad[:, :gates_size]
        features_grad = None
        if ctx.needs_input_grad[0]:
            of_images = [x.new_zeros(B * T * K, x.shape[1]) for x in (weights, context)]
            of_images[0][place], of_images[1][place] = weights, gated_grad.to(context.dtype)
            weights_of_images, grad_of_images = (x.view(B, T * K, x.shape[1]) for x in of_images)
            features_grad = weights_of_images.mT @ grad_of_images
        keys_grad, score_weight_grad = torch.ops.attncap.soft_attention_keys_backward(
            keys,
            projections[:, gates_size : gates_size + query_size][by_image],
            score_weight,
            score_grad[by_image],
            row_starts,
            ctx.activation,
        )
        return (
            features_grad,
            keys_grad,
            gates_grad,  # of words
            first_h_grad,
            c_grad,
            projection_grad.t() @ torch.cat([h, next_h])[came_from],  # hidden_weight
            projection_grad.sum(dim=0),  # hidden_bias
            gates_grad.t() @ context,  # context_weight
            score_weight_grad,
            None,  # images
            None,  # activation
        )


def _rows_of_an_image(h: Tensor, features: Tensor) -> int:
    return len(h) // len(features) if len(features) else 0


def _sizes(h: Tensor, keys: Tensor, features: Tensor) -> list[int]:
    """Of what the hidden state is projected to: recurrent part 4H, query A, gate D."""
    return [4 * h.shape[1], keys.shape[2], features.shape[2]]


def _fake(features, keys, words, h, c, hidden_weight, hidden_bias, context_weight, score_weight, images, activation):
    (_, P, D), H, M = features.shape, h.shape[1], len(words)
    return tuple(words.new_empty(M, columns) for columns in (H, D, P, H, len(hidden_weight), 4 * H))


def _fake_backward(
    h_grad, context_grad, weights_grad, features, keys, words, c, hidden_weight, context_weight, score_weight, context,
    weights, cells, projections, of_contexts, images, activation, features_need_grad,
):  # fmt: skip
    dtype = library.sum_dtype(features)
    return (
        projections.new_empty(projections.shape),
        context.new_empty(len(words) if features_need_grad else 0, context.shape[1], dtype=dtype),
        weights.new_empty(weights.shape, dtype=dtype),
        c.new_empty(c.shape),
        c.new_empty(c.shape),
    )


if library.is_loaded("cpu"):
    torch.library.register_fake("attncap::attention_lstm", _fake)
    torch.library.register_fake("attncap::attention_lstm_backward", _fake_backward)


def _check(
    features: Tensor,
    keys: Tensor,
    words: Tensor,
    h: Tensor,
    c: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    context_weight: Tensor,
    score_weight: Tensor,
    images: Sequence[int],
    activation: str,
) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f'activation is "tanh" or "relu", not {activation!r}')
    if (
        features.dim() != 3
        or keys.dim() != 3
        or h.dim() != 2
        or 0 in features.shape[1:]
        or 0 in (*keys.shape[2:], h.shape[1])
    ):
        raise ValueError(
            "attention_lstm takes features [B, P, D], keys [B, P, A] and h [N, H], with at least one cell, channel, "
            f"attention and hidden unit, not {list(features.shape)}, {list(keys.shape)} and {list(h.shape)}"
        )
    (B, P, D), (N, H), A = features.shape, h.shape, keys.shape[2]
    if N != 0 and (B == 0 or N % B != 0):
        raise ValueError(f"h has {N} rows, which is no multiple of the {B} images")
    if not images or list(images) != sorted(images, reverse=True) or not 0 <= images[-1] <= images[0] <= B:
        raise ValueError(f"images are at least one number from {B} to 0 that never rise, not {list(images)}")
    if features.dtype not in library.DTYPES:
        raise ValueError(
            f"features has dtype {features.dtype}; attention_lstm takes float32, bfloat16, float16 and float64"
        )
    projected = 4 * H + A + D
    library.check_tensors(
        {
            "keys": (keys, (B, P, A), features.dtype),
            "words": (words, (_rows_of_an_image(h, features) * sum(images), 4 * H), features.dtype),
            "h": (h, (N, H), features.dtype),
            "c": (c, (N, H), features.dtype),
            "hidden_weight": (hidden_weight, (projected, H), features.dtype),
            "hidden_bias": (hidden_bias, (projected,), features.dtype),
            "context_weight": (context_weight, (4 * H, D), features.dtype),
            "score_weight": (score_weight, (A,), features.dtype),
        },
        features.device,
        lambda: (
            f"features {list(features.shape)}, keys {list(keys.shape)}, h {list(h.shape)} and images {list(images)}"
        ),
    )
