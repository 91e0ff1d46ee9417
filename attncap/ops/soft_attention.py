"""Soft attention over an image's feature grid: native op and plain-PyTorch twin.

Letters: B images, K rows per image, N = B*K rows (the rows of an image are neighbours), P cells of
the grid, D channels of a cell, A attention size.
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
        weights[n, :] = softmax of score[n, :] over the cells that count
        context[n, d] = sigmoid(gate[n, d]) * sum_p weights[n, p] * features[b, p, d]

    Args:
        features: [B, P, D], what the context is made of.
        keys: [B, P, A], the features projected to the attention size.
        query: [N, A], the hidden states projected to the attention size.
        score_weight: [A].
        activation: "tanh" (Xu et al.) or "relu".
        mask: [B, P], bool; True: the cell counts. A row without such a cell has weights, context
            and gradients 0. Masked features and keys must still be finite.
        gate: [N, D], before its sigmoid (beta of section 4.2.1, one value a channel).

    All but the mask have one dtype: float32, bfloat16, float16 (both summed in float32) or float64.
    Under autocast they are cast to its dtype. Any strides; features and keys are used where they lie when each
    image's are contiguous, everything else that is not contiguous is copied.

    Returns:
        context [N, D] and weights [N, P] (alpha), of the same dtype. Both are differentiable once;
        gradients are the same bits in every run.

    Raises:
        ValueError: shapes, dtypes, devices or the activation do not fit; on CUDA also more than 10,240 cells (5,120 in
            float64).
        attncap.errors.UserError: there is no kernel for the device; says how to get it.
    """
    features, keys, query, score_weight, gate = library.autocast(features, keys, query, score_weight, gate)
    _check(features, keys, query, score_weight, activation, mask, gate)
    check_cells(features)
    library.require(features.device)
    return torch.ops.attncap.soft_attention(features, keys, query, score_weight, mask, gate, activation)


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
        # A row without a cell: any finite score will do, its weights are cleared below.
        score = score.masked_fill(~mask.any(1)[:, None, None], 0)
    weights = score.softmax(-1)
    if mask is not None:
        weights = weights.masked_fill(~mask.unsqueeze(1), 0)
    context = (weights @ features).reshape(N, features.shape[2])
    if gate is not None:
        context = torch.sigmoid(gate) * context
    return context, weights.reshape(N, P)


def check_cells(features: Tensor) -> None:
    """Raises ValueError for features [B, P, D] of more cells than the kernels on their device take."""
    most = 40 * 1024 // library.sum_dtype(features).itemsize  # kMaxCellsCuda, soft_attention.h
    if features.is_cuda and features.shape[1] > most:
        raise ValueError(f"features has {features.shape[1]} cells; on CUDA {most} of {features.dtype} is the most")


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
        raise ValueError(f'activation is "tanh" or "relu", not {activation!r}')
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
        raise ValueError(f"query has {N} rows, which is no multiple of the {B} images")
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


@once_differentiable  # a second derivative is an error, not zeros
def _backward(ctx, context_grad: Tensor, weights_grad: Tensor):
    gate = ctx.saved_tensors[4]
    features_need_grad = ctx.needs_input_grad[0]
    features_grad, keys_grad, query_grad, score_weight_grad, gate_grad = torch.ops.attncap.soft_attention_backward(
        context_grad, weights_grad, *ctx.saved_tensors, ctx.activation, features_need_grad
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
