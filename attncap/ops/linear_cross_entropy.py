"""The output layer and its cross entropy as one op, which never holds the logits of all tokens at once.

`torch.nn.functional.linear_cross_entropy` (torch 2.13) does not replace it: with label smoothing it computes all logits
at once (compared with this op, for O=512, V=9490, float32 and one CPU thread, that takes 0.9 times as long for M=480,
but 1.2 times as long and 1.9 times the peak memory for M=1920), and with token weights it does that too or else
computes the logits twice (1.3 times as long for either M).

Letters: M tokens, O inputs of the output layer, V vocabulary size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from attncap.ops import library
from attncap.ops.linear import fixed_linear

CHUNK = 2**22  # the most logits to hold at a time, but at least those of one token
CUDA_CHUNK = 2**25  # the same on CUDA, where no cache holds them anyway


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    token_weights: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The sum of the cross entropies of logits = x @ weight.T + bias, computed for some of the tokens at a time.

        loss = sum_m token_weights[m] * ((1 - label_smoothing) * -log_p[m, targets[m]]
                                        + label_smoothing * mean_v -log_p[m, v])       log_p = log_softmax(logits)

    Forward computes the gradients together with the loss, so the logits are computed only once, and keeps the gradients
    of x, weight and bias for backward.

    Args:
        x: [M, O].
        weight, bias: [V, O] and [V].
        targets: int64 [M], in [0, V), which is not checked.
        token_weights: [M], by default all 1. It gets no gradient.
        label_smoothing: the probability that is taken from the target and spread evenly over the vocabulary.

    x, weight and bias have one dtype: float32, bfloat16, float16 or float64. Under autocast they are cast to autocast's
    dtype. Exponentials and sums are computed in float32 (float64 for float64).

    Returns:
        A scalar of dtype float32 (float64 for float64), differentiable once.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    x, weight, bias = library.autocast(x, weight, bias)
    _check(x, weight, bias, targets, token_weights)
    return _LinearCrossEntropy.apply(x, weight, bias, targets, token_weights, label_smoothing)


def linear_cross_entropy_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    token_weights: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    """`linear_cross_entropy` in plain PyTorch: same arguments, results and errors."""
    x, weight, bias = library.autocast(x, weight, bias)
    _check(x, weight, bias, targets, token_weights)
    logits = F.linear(x, weight, bias)
    logits = logits.to(library.accumulate_dtype(x))
    if token_weights is None:
        return F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="sum")
    losses = F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="none")
    return (losses * token_weights).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, targets, token_weights, label_smoothing):
        (M, _), V, dtype = x.shape, len(weight), library.accumulate_dtype(x)
        needs_grad = any(ctx.needs_input_grad[:3])
        loss = x.new_zeros((), dtype=dtype)
        chunk = max(1, (CUDA_CHUNK if x.is_cuda else CHUNK) // V)
        output_layer, logits_buffer = fixed_linear(weight, bias), None
        if x.is_cuda and x.element_size() == 2:  # cuBLAS's fast kernels need rows of a multiple of 16 bytes
            logits_buffer = x.new_empty(min(chunk, M), V + -V % 64)[:, :V]
            wide_bias = bias.to(dtype)
        x_grad, weight_grad, bias_grad = torch.empty_like(x), None, x.new_zeros(V, dtype=dtype)
        for begin in range(0, M, chunk):
            rows = slice(begin, begin + chunk)
            target = targets[rows].unsqueeze(1)
            factor = 1 if token_weights is None else token_weights[rows].to(dtype).unsqueeze(1)
            if logits_buffer is None:
                logits = output_layer(x[rows]).to(dtype)
            else:
                logits = torch.mm(x[rows], weight.t(), out=logits_buffer[: len(target)]) + wide_bias
            log_p = logits.log_softmax(dim=1)
            expected = (1 - label_smoothing) * log_p.gather(1, target)
            if label_smoothing:
                expected += label_smoothing * log_p.mean(dim=1, keepdim=True)
            loss -= (expected * factor).sum()
            if not needs_grad:
                continue
            grad = log_p.exp_()  # the gradient of the logits is softmax minus the (smoothed) one-hot target
            if label_smoothing:
                grad -= label_smoothing / V
            grad.scatter_add_(1, target, torch.full_like(expected, label_smoothing - 1))
            if token_weights is not None:
                grad *= factor
            bias_grad += grad.sum(dim=0)
            grad = grad.to(x.dtype) if logits_buffer is None else logits_buffer[: len(target)].copy_(grad)
            torch.mm(grad, weight, out=x_grad[rows])
            chunk_grad = grad.t() @ x[rows]
            weight_grad = chunk_grad if weight_grad is None else weight_grad.to(dtype).add_(chunk_grad)
        if needs_grad:
            weight_grad = torch.zeros_like(weight) if weight_grad is None else weight_grad.to(weight.dtype)
            ctx.save_for_backward(x_grad, weight_grad, bias_grad.to(bias.dtype))
        return loss

    @staticmethod
    @once_differentiable  # a second derivative raises an error; otherwise it would silently be 0
    def backward(ctx, loss_grad):
        # The product is computed in float32, since loss_grad may be a loss scale too large for float16, such as 65,536.
        grads = ((grad.to(loss_grad.dtype) * loss_grad).to(grad.dtype) for grad in ctx.saved_tensors)
        return *grads, None, None, None


def _check(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, token_weights: Tensor | None) -> None:
    if x.dim() != 2 or weight.dim() != 2 or len(weight) == 0:
        raise ValueError(
            "linear_cross_entropy takes x [M, O] and weight [V, O] with V of at least 1, not "
            f"{list(x.shape)} and {list(weight.shape)}"
        )
    if x.dtype not in library.DTYPES:
        raise ValueError(f"x has dtype {x.dtype}; linear_cross_entropy takes float32, bfloat16, float16 and float64")
    M, V = len(x), len(weight)
    library.check_tensors(
        {
            "weight": (weight, (V, x.shape[1]), x.dtype),
            "bias": (bias, (V,), x.dtype),
            "targets": (targets, (M,), torch.int64),
            "token_weights": (token_weights, (M,), None if token_weights is None else token_weights.dtype),
        },
        x.device,
        lambda: f"x {list(x.shape)} and weight {list(weight.shape)}",
    )
