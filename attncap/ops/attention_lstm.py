"""Teacher forcing: the attention LSTM over all tokens of its captions, as one op with its own backward.

Letters: B images, K rows per image, N = B*K rows, P cells, D channels, A attention size, H hidden size; M, the rows of
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
    word_inputs: Tensor,
    h: Tensor,
    c: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    context_weight: Tensor,
    score_weight: Tensor,
    *,
    batch_sizes: Sequence[int],
    activation: str = "tanh",
) -> tuple[Tensor, Tensor, Tensor]:
    """The loop of Show, Attend and Tell (Xu et al. 2015, equations 1 to 6 and 13) by the native kernels. A step is

        recurrent, query, gate = hidden_weight h + hidden_bias
        context, weights = soft_attention(features, keys, query, score_weight, activation=activation, gate=gate)
        h, c = LSTM cell of (recurrent + context_weight context + word_inputs, c)

    Step t computes one token of the K rows of each of the first batch_sizes[t] images. If the images are sorted by
    length, longest first, no time is spent on captions that have ended. In `word_inputs` and in the outputs, the rows
    of all steps are concatenated, as in torch's PackedSequence: M = K * sum(batch_sizes).

    Backward computes the activations again, so nothing of size [N,P,A] or [N,P,D] is kept for any step. The gradients
    of the weights, keys and features are computed after the loop, for all steps at once.

    Args:
        features: [B, P, D].
        keys: [B, P, A], the features projected to the attention size.
        word_inputs: [M, 4H], the word embeddings times the LSTM's input weights, plus the LSTM's biases.
        h, c: [N, H], the LSTM's initial state.
        hidden_weight: [4H + A + D, H], the recurrent weights of the LSTM, then those of the query and of the gate.
        hidden_bias: [4H + A + D].
        context_weight: [4H, D], the LSTM's input weights for the context.
        score_weight: [A].
        batch_sizes: the number of images in each step; it must not increase.
        activation: "tanh" or "relu".

    All tensors have one dtype: float32, bfloat16, float16 or float64. Under autocast they are cast to autocast's dtype.

    Returns:
        h [M, H], context [M, D] and attention weights [M, P] of every row of every step, differentiable once.

    Raises:
        ValueError: shapes, dtypes, devices, the activation or batch_sizes do not match; on CUDA also for more than
            10,240 cells (5,120 in float64).
        attncap.errors.UserError: there is no kernel for the device. The message says how to get it.
    """
    tensors = library.autocast(
        features, keys, word_inputs, h, c, hidden_weight, hidden_bias, context_weight, score_weight
    )
    _check(*tensors, batch_sizes, activation)
    check_cells(tensors[0])
    library.require(features.device)
    return _AttentionLstm.apply(*tensors, tuple(batch_sizes), activation)


def attention_lstm_reference(
    features: Tensor,
    keys: Tensor,
    word_inputs: Tensor,
    h: Tensor,
    c: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    context_weight: Tensor,
    score_weight: Tensor,
    *,
    batch_sizes: Sequence[int],
    activation: str = "tanh",
) -> tuple[Tensor, Tensor, Tensor]:
    """`attention_lstm` in plain PyTorch: same arguments, results and errors, on any device."""
    tensors = library.autocast(
        features, keys, word_inputs, h, c, hidden_weight, hidden_bias, context_weight, score_weight
    )
    _check(*tensors, batch_sizes, activation)
    features, keys, word_inputs, h, c, hidden_weight, hidden_bias, context_weight, score_weight = tensors
    K = _rows_per_image(h, features)
    steps = []
    for B, word_input in zip(batch_sizes, word_inputs.split([K * B for B in batch_sizes]), strict=True):
        h, c = h[: K * B], c[: K * B]
        recurrent, query, gate = F.linear(h, hidden_weight, hidden_bias).split(_sizes(h, keys, features), dim=1)
        context, weights = soft_attention_reference(
            features[:B], keys[:B], query, score_weight, activation=activation, gate=gate
        )
        i, f, g, o = (recurrent + F.linear(context, context_weight) + word_input).chunk(4, dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        steps.append((h, context, weights))
    h, context, weights = (torch.cat(values) for values in zip(*steps, strict=True))
    return h, context, weights


class _AttentionLstm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, features, keys, word_inputs, h, c, hidden_weight, hidden_bias, context_weight, score_weight, batch_sizes,
        activation,
    ):  # fmt: skip
        next_h, context, weights, *intermediates = torch.ops.attncap.attention_lstm.default(
            features, keys, word_inputs, h, c, packed(hidden_weight), hidden_bias, packed(context_weight), score_weight,
            batch_sizes, activation,
        )  # fmt: skip
        inputs = (features, keys, word_inputs, h, c, hidden_weight, context_weight, score_weight)
        indices = _backward_indices(h, features, batch_sizes) if any(ctx.needs_input_grad) else ()
        ctx.save_for_backward(*inputs, next_h, context, weights, *intermediates, *indices)
        ctx.batch_sizes, ctx.activation = batch_sizes, activation
        return next_h, context, weights

    @staticmethod
    @once_differentiable  # a second derivative raises an error; otherwise it would silently be 0
    def backward(ctx, h_grad, context_grad, weights_grad):
        features, keys, word_inputs, h, c, hidden_weight, context_weight, score_weight, *rest = ctx.saved_tensors
        next_h, context, weights, *rest = rest
        next_c, projections, context_gates, previous, padded, by_image, row_starts = rest
        (B, P, D), K, T = features.shape, _rows_per_image(h, features), len(ctx.batch_sizes)

        run_backward = torch.ops.attncap.attention_lstm_backward.default
        projection_grad, gated_grad, score_grad, first_h_grad, c_grad = run_backward(
            h_grad, context_grad, weights_grad, features, keys, word_inputs, c, packed(hidden_weight.t()),
            packed(context_weight.t()), score_weight, context, weights, next_c, projections, context_gates,
            ctx.batch_sizes, ctx.activation, ctx.needs_input_grad[0],
        )  # fmt: skip

        # The gradients of what all steps share, for all steps at once.
        gates_size, query_size, _ = _sizes(h, keys, features)
        gates_grad = projection_grad[:, :gates_size]
        features_grad = None
        if ctx.needs_input_grad[0]:
            padded_weights, padded_grad = (x.new_zeros(B * T * K, x.shape[1]) for x in (weights, context))
            padded_weights[padded], padded_grad[padded] = weights, gated_grad.to(context.dtype)
            features_grad = padded_weights.view(B, T * K, P).mT @ padded_grad.view(B, T * K, D)
        keys_grad, score_weight_grad = torch.ops.attncap.soft_attention_keys_backward.default(
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
            gates_grad,  # of word_inputs
            first_h_grad,
            c_grad,
            projection_grad.t() @ torch.cat([h, next_h])[previous],  # of hidden_weight
            projection_grad.sum(dim=0),  # of hidden_bias
            gates_grad.t() @ context,  # of context_weight
            score_weight_grad,
            None,  # batch_sizes
            None,  # activation
        )


def _backward_indices(h: Tensor, features: Tensor, batch_sizes: Sequence[int]) -> Sequence[Tensor]:
    """The indices that backward needs, on the device:

    previous: int64 [M], for each row that of its incoming h in [h, next_h].
    padded: int64 [M], its place in [B, T, K], where shorter images have padding.
    by_image: int64 [M], the rows sorted by image, then by step.
    row_starts: int64 [B+1], where those of each image start.
    """
    B, K, T = len(features), _rows_per_image(h, features), len(batch_sizes)
    rows_per_step = K * torch.tensor(batch_sizes, device="cpu")
    starts = rows_per_step.cumsum(0) - rows_per_step
    step = torch.arange(T, device="cpu").repeat_interleave(rows_per_step)
    row = torch.arange(len(step), device="cpu") - starts[step]
    previous = torch.where(step == 0, row, len(h) + starts[step - 1] + row)
    image = row // max(K, 1)
    padded = image * T * K + step * K + row % max(K, 1)
    row_starts = F.pad(image.bincount(minlength=B).cumsum(0), (1, 0))
    return library.to_device(h.device, previous, padded, padded.argsort(), row_starts)


def _rows_per_image(h: Tensor, features: Tensor) -> int:
    return len(h) // len(features) if len(features) else 0


def _sizes(h: Tensor, keys: Tensor, features: Tensor) -> list[int]:
    """The sizes of the hidden state's projections: recurrent part 4H, query A, gate D."""
    return [4 * h.shape[1], keys.shape[2], features.shape[2]]


def _fake(
    features, keys, word_inputs, h, c, hidden_weight, hidden_bias, context_weight, score_weight, batch_sizes, activation
):
    (_, P, D), H, M = features.shape, h.shape[1], len(word_inputs)
    return tuple(word_inputs.new_empty(M, columns) for columns in (H, D, P, H, len(hidden_weight), 4 * H))


def _fake_backward(
    h_grad, context_grad, weights_grad, features, keys, word_inputs, c, hidden_weight, context_weight, score_weight,
    context, weights, next_c, projections, context_gates, batch_sizes, activation, features_need_grad,
):  # fmt: skip
    dtype = library.accumulate_dtype(features)
    return (
        projections.new_empty(projections.shape),
        context.new_empty(len(word_inputs) if features_need_grad else 0, context.shape[1], dtype=dtype),
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
    word_inputs: Tensor,
    h: Tensor,
    c: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    context_weight: Tensor,
    score_weight: Tensor,
    batch_sizes: Sequence[int],
    activation: str,
) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f'activation must be "tanh" or "relu", not {activation!r}')
    if (
        features.dim() != 3
        or keys.dim() != 3
        or h.dim() != 2
        or 0 in features.shape[1:]
        or 0 in (*keys.shape[2:], h.shape[1])
    ):
        raise ValueError(
            "attention_lstm takes features [B, P, D], keys [B, P, A] and h [N, H] with P, D, A and H of at least 1, "
            f"not {list(features.shape)}, {list(keys.shape)} and {list(h.shape)}"
        )
    (B, P, D), (N, H), A = features.shape, h.shape, keys.shape[2]
    if N != 0 and (B == 0 or N % B != 0):
        raise ValueError(f"h has {N} rows, which is not a multiple of the {B} images")
    if (
        not batch_sizes
        or list(batch_sizes) != sorted(batch_sizes, reverse=True)
        or not 0 <= batch_sizes[-1] <= batch_sizes[0] <= B
    ):
        raise ValueError(
            f"batch_sizes must be one or more numbers from 0 to {B} that do not increase, not {list(batch_sizes)}"
        )
    if features.dtype not in library.DTYPES:
        raise ValueError(
            f"features has dtype {features.dtype}; attention_lstm takes float32, bfloat16, float16 and float64"
        )
    projected = 4 * H + A + D
    library.check_tensors(
        {
            "keys": (keys, (B, P, A), features.dtype),
            "word_inputs": (word_inputs, (_rows_per_image(h, features) * sum(batch_sizes), 4 * H), features.dtype),
            "h": (h, (N, H), features.dtype),
            "c": (c, (N, H), features.dtype),
            "hidden_weight": (hidden_weight, (projected, H), features.dtype),
            "hidden_bias": (hidden_bias, (projected,), features.dtype),
            "context_weight": (context_weight, (4 * H, D), features.dtype),
            "score_weight": (score_weight, (A,), features.dtype),
        },
        features.device,
        lambda: (
            f"features {list(features.shape)}, keys {list(keys.shape)}, h {list(h.shape)} and "
            f"batch_sizes {list(batch_sizes)}"
        ),
    )
