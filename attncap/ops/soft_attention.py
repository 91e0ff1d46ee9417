"""Soft attention over an image's feature grid: native op and reference in plain PyTorch.

Letters: B images, K rows per image, N = B*K rows (those of an image are adjacent), P cells of the grid, D channels of a
cell, A attention size.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attncap.ops import library

ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu}


def soft_attention(
    features: Tensor,
    keys: Tensor,
    query: Tensor,
    score_weight: Tensor,
    *,
    activation: str = "tanh",
    mask: Tensor | None = None,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Soft attention by the native kernels (Xu et al. 2015, equations 4 to 6, 13; section 4.2.1).

        score[n, p]   = sum_a score_weight[a] * activation(keys[b, p, a] + query[n, a])   b = n // K
        weights[n, :] = softmax of score[n, :] over the cells that are not masked out
        context[n, d] = sigmoid(gate[n, d]) * sum_p weights[n, p] * features[b, p, d]

    Args:
        features: [B, P, D], of which the context is a weighted sum.
        keys: [B, P, A], the features projected to the attention size.
        query: [N, A], the hidden states projected to the attention size.
        score_weight: [A].
        activation: "tanh" (Xu et al.) or "relu".
        mask: bool [B, P], True for the cells to attend to. An image without such a cell has weights, context and
            gradients of 0. Features and keys of other cells must still be finite.
        gate: [N, D], before the sigmoid (beta of section 4.2.1, but with one value per channel).

    All tensors but the mask have one dtype: float32, bfloat16, float16 (the last two are summed in float32) or float64.
    Under autocast they are cast to autocast's dtype. They may have any strides. Features and keys are not copied if
    each image's matrix is contiguous, nor are query and gate if each row is; all others are copied unless contiguous.

    Returns:
        context [N, D] and weights [N, P] (alpha), of the same dtype. Both are differentiable once, and gradients are
        deterministic.

    Raises:
        ValueError: shapes, dtypes, devices or the activation do not match; on CUDA also for more than 10,240 cells
            (5,120 in float64).
        attncap.errors.UserError: there is no kernel for the device. The message says how to get it.
    """
    features, keys, query, score_weight, gate = library.autocast(features, keys, query, score_weight, gate)
    _check(features, keys, query, score_weight, activation, mask, gate)
    check_cells(features)
    library.require(features.device)
    return torch.ops.attncap.soft_attention.default(features, keys, query, score_weight, mask, gate, activation)


def soft_attention_reference(
    features: Tensor,
    keys: Tensor,
    query: Tensor,
    score_weight: Tensor,
    *,
    activation: str = "tanh",
    mask: Tensor | None = None,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`soft_attention` in plain PyTorch: same arguments, results and errors, on any device."""
    features, keys, query, score_weight, gate = library.autocast(features, keys, query, score_weight, gate)
    _check(features, keys, query, score_weight, activation, mask, gate)
    B, P, A = keys.shape
    N = query.shape[0]
    K = N // B if B else 0
    hidden = ACTIVATIONS[activation](keys.unsqueeze(1) + query.reshape(B, K, 1, A))  # [B, K, P, A]
    score = hidden @ score_weight  # [B, K, P]
    if mask is not None:
        score = score.masked_fill(~mask.unsqueeze(1), -torch.inf)
        # If all cells of an image are masked, any finite score will do: its weights are set to 0 below.
        score = score.masked_fill(~mask.any(1)[:, None, None], 0)
    weights = score.softmax(-1, dtype=score.dtype)  # on CUDA, autocast would otherwise make it float32
    if mask is not None:
        weights = weights.masked_fill(~mask.unsqueeze(1), 0)
    context = (weights @ features).reshape(N, features.shape[2])
    if gate is not None:
        context = torch.sigmoid(gate) * context
    return context, weights.reshape(N, P)


def check_cells(features: Tensor) -> None:
    """Raises ValueError if features [B, P, D] have more cells than the kernels on their device take."""
    max_cells = 40 * 1024 // library.accumulate_dtype(features).itemsize  # kMaxCellsCuda in soft_attention.h
    if features.is_cuda and features.shape[1] > max_cells:
        raise ValueError(
            f"features has {features.shape[1]} cells, but on CUDA at most {max_cells} of {features.dtype} are supported"
        )


def _check(
    features: Tensor,
    keys: Tensor,
    query: Tensor,
    score_weight: Tensor,
    activation: str,
    mask: Tensor | None,
    gate: Tensor | None,
) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f'activation must be "tanh" or "relu", not {activation!r}')
    if features.dim() != 3 or keys.dim() != 3 or query.dim() != 2:
        raise ValueError(
            "soft_attention takes features [B, P, D], keys [B, P, A] and query [N, A], not "
            f"{list(features.shape)}, {list(keys.shape)} and {list(query.shape)}"
        )
    B, P, D = features.shape
    N, A = query.shape[0], keys.shape[2]
    if P == 0 or D == 0 or A == 0:
        raise ValueError(f"soft_attention needs P, D and A of at least 1, not {P}, {D} and {A}")
    if N != 0 and (B == 0 or N % B != 0):
        raise ValueError(f"query has {N} rows, which is not a multiple of the {B} images")
    if features.dtype not in library.DTYPES:
        raise ValueError(
            f"features has dtype {features.dtype}; soft_attention takes float32, bfloat16, float16 and float64"
        )
    library.check_tensors(
        {
            "keys": (keys, (B, P, A), features.dtype),
            "query": (query, (N, A), features.dtype),
            "score_weight": (score_weight, (A,), features.dtype),
            "mask": (mask, (B, P), torch.bool),
            "gate": (gate, (N, D), features.dtype),
        },
        features.device,
        lambda: f"features {list(features.shape)}, keys {list(keys.shape)} and query {list(query.shape)}",
    )


def _fake(features, keys, query, score_weight, mask, gate, activation):
    N = query.shape[0]
    return features.new_empty(N, features.shape[2]), features.new_empty(N, features.shape[1])


def _fake_backward(
    context_grad, weights_grad, features, keys, query, score_weight, gate, context, weights, activation,
    features_need_grad,
):  # fmt: skip
    return (
        features.new_empty(features.shape if features_need_grad else (0,)),
        features.new_empty(keys.shape),
        features.new_empty(query.shape),
        features.new_empty(score_weight.shape),
        features.new_empty(gate.shape if gate is not None else (0, features.shape[2])),
    )


def _fake_keys_backward(keys, query, score_weight, score_grad, row_starts, activation):
    return keys.new_empty(keys.shape), keys.new_empty(score_weight.shape)


def _setup_context(ctx, inputs, output) -> None:
    features, keys, query, score_weight, _, gate, activation = inputs
    ctx.save_for_backward(features, keys, query, score_weight, gate, *output)
    ctx.activation = activation


@once_differentiable  # a second derivative raises an error; otherwise it would silently be 0
def _backward(ctx, context_grad: Tensor, weights_grad: Tensor):
    gate = ctx.saved_tensors[4]
    features_need_grad = ctx.needs_input_grad[0]
    features_grad, keys_grad, query_grad, score_weight_grad, gate_grad = (
        torch.ops.attncap.soft_attention_backward.default(
            context_grad, weights_grad, *ctx.saved_tensors, ctx.activation, features_need_grad
        )
    )
    return (
        features_grad if features_need_grad else None,
        keys_grad,
        query_grad,
        score_weight_grad,
        None,  # mask
        None if gate is None else gate_grad,
        None,  # activation
    )


if library.is_loaded("cpu"):
    torch.library.register_fake("attncap::soft_attention", _fake)
    torch.library.register_fake("attncap::soft_attention_backward", _fake_backward)
    torch.library.register_fake("attncap::soft_attention_keys_backward", _fake_keys_backward)
    torch.library.register_autograd("attncap::soft_attention", _backward, setup_context=_setup_context)
