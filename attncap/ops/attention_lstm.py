"""Teacher forcing: the attention LSTM over all words of its captions, as one op with a backward of its own.

Letters: B images, K rows an image, N = B*K rows, P cells, D channels, A attention size, H hidden size; M, the rows of
all steps together.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from attncap.ops import library
from attncap.ops.linear import fixed_linear
from attncap.ops.soft_attention import ACTIVATIONS, DTYPES, _autocast, soft_attention_reference


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
        ValueError: shapes, dtypes, devices, the activation or the images do not fit.
        attncap.errors.UserError: there is no kernel for the device; says how to get it.
    """
    tensors = _autocast(features, keys, words, h, c, hidden_weight, hidden_bias, context_weight, score_weight)
    _check(*tensors, images, activation)
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
    tensors = _autocast(features, keys, words, h, c, hidden_weight, hidden_bias, context_weight, score_weight)
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
        K = _rows_of_an_image(h, features)
        hidden_part, context_part = fixed_linear(hidden_weight, hidden_bias), fixed_linear(context_weight, None)
        row = torch.arange(len(h), device=h.device)
        states, cells, outputs, projections, of_contexts = [h], [c], [], [], []
        for B, of_words in zip(images, words.split([K * B for B in images]), strict=True):
            projections.append(hidden_part(states[-1][: K * B]))
            recurrent, query, gate = projections[-1].split(_sizes(h, keys, features), dim=1)
            context, weights = torch.ops.attncap.soft_attention(
                features[:B], keys[:B], query, score_weight, None, gate, activation
            )
            of_contexts.append(context_part(context))
            rows = row[: K * B]
            next_h, next_c, _ = torch.ops.attncap.lstm_step(
                recurrent, of_contexts[-1], of_words, cells[-1][: K * B], rows, rows
            )
            states.append(next_h)
            cells.append(next_c)
            outputs.append((next_h, context, weights))
        outputs = tuple(torch.cat(values) for values in zip(*outputs, strict=True))
        ctx.save_for_backward(
            features, keys, words, h, hidden_weight, context_weight, score_weight, *outputs,
            *cells[:-1], *projections, *of_contexts,
        )  # fmt: skip
        ctx.images, ctx.activation = images, activation
        return outputs

    @staticmethod
    @once_differentiable  # a second derivative is an error, not zeros
    def backward(ctx, h_grad, context_grad, weights_grad):
        features, keys, words, h, hidden_weight, context_weight, score_weight, *rest = ctx.saved_tensors
        (next_h, context, weights), of_steps, T = rest[:3], rest[3:], len(ctx.images)
        cells, projections, of_contexts = of_steps[:T], of_steps[T : 2 * T], of_steps[2 * T :]
        K, sizes = _rows_of_an_image(h, features), _sizes(h, keys, features)
        through_hidden, through_context = fixed_linear(hidden_weight.t(), None), fixed_linear(context_weight.t(), None)
        ends = list(itertools.accumulate(K * B for B in ctx.images))  # of each step's rows among all steps'
        from_next = cell_grad = h[:0]
        projection_grad = h.new_empty(ends[-1], sum(sizes))  # of all steps
        gated_grads, score_grads = ([None] * T for _ in range(2))
        for t in reversed(range(T)):
            B = ctx.images[t]
            rows = slice(ends[t] - K * B, ends[t])
            recurrent, query, gate = projections[t].split(sizes, dim=1)
            state_grad = h_grad[rows].clone()
            state_grad[: len(from_next)] += from_next
            gates_grad, cell_grad = torch.ops.attncap.lstm_step_backward(
                recurrent, of_contexts[t], words[rows], cells[t][: K * B], state_grad, _padded(cell_grad, K * B)
            )
            query_grad, gate_grad, gated_grad, score_grads[t] = torch.ops.attncap.soft_attention_rows_backward(
                through_context(gates_grad).add_(context_grad[rows]), weights_grad[rows], features[:B], keys[:B],
                query, score_weight, gate, context[rows], weights[rows], ctx.activation,
            )  # fmt: skip
            torch.cat([gates_grad, query_grad, gate_grad], dim=1, out=projection_grad[rows])
            from_next = through_hidden(projection_grad[rows])
            if ctx.needs_input_grad[0]:
                gated_grads[t] = gated_grad

        # What all steps share, after the loop: each in one go.
        gates_grad = projection_grad[:, : sizes[0]]
        began = [h] + [next_h[end - K * B : end] for end, B in zip(ends, ctx.images, strict=True)]
        began = torch.cat([x[: K * B] for x, B in zip(began, ctx.images, strict=False)])  # each step's h, [M,H]
        B, row = len(features), torch.cat([torch.arange(K * B) for B in ctx.images])
        image = row // max(K, 1)
        features_grad = None
        if ctx.needs_input_grad[0]:  # an image with fewer steps than others has rows of zeros
            step = torch.arange(T).repeat_interleave(K * torch.tensor(ctx.images))
            place = (image * T * K + step * K + row % max(K, 1)).to(h.device)
            by_place = [x.new_zeros(B * T * K, x.shape[1]) for x in (weights, context)]
            by_place[0][place], by_place[1][place] = weights, torch.cat(gated_grads).to(context.dtype)
            of_images = [x.view(B, T * K, x.shape[1]) for x in by_place]
            features_grad = of_images[0].mT @ of_images[1]
        by_image = image.argsort(stable=True)
        row_starts = torch.searchsorted(image[by_image], torch.arange(B + 1)).to(h.device)
        by_image = by_image.to(h.device)
        query = torch.cat([x[:, sizes[0] : sizes[0] + sizes[1]] for x in projections])
        keys_grad, score_weight_grad = torch.ops.attncap.soft_attention_keys_backward(
            keys,
            query[by_image],
            score_weight,
            torch.cat(score_grads)[by_image],
            row_starts,
            ctx.activation,
        )
        return (
            features_grad,
            keys_grad,
            gates_grad,  # of words
            _padded(from_next, len(h)),
            _padded(cell_grad, len(h)),
            projection_grad.t() @ began,  # hidden_weight
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


def _padded(x: Tensor, rows: int) -> Tensor:
    """With rows of zeros behind."""
    return F.pad(x, (0, 0, 0, rows - len(x)))


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
    if features.dtype not in DTYPES:
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
