"""The last layer and its loss in one: no logits of all words at once.

Letters: M words, O values that the last layer sees, V words of the vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from attncap.ops import library
from attncap.ops.linear import fixed_linear

CHUNK = 2**22  # logits that are held at a time, at most; at least one word's


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    word_weights: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Sum of the cross entropies of logits = x @ weight.T + bias, some words at a time.

        loss = sum_m word_weights[m] * ((1 - label_smoothing) * -log_p[m, targets[m]]
                                        + label_smoothing * mean_v -log_p[m, v])       log_p = log_softmax(logits)

    Forward computes the gradients along with the loss, so logits are made once; what is kept are gradients of the sizes
    of x, weight and bias.

    Args:
        x: [M, O].
        weight, bias: [V, O] and [V].
        targets: int64 [M], in [0, V); not checked.
        word_weights: [M], 1 if None; no gradient.
        label_smoothing: share of a word's target that is spread over all words.

    x, weight and bias have one dtype: float32, bfloat16, float16 or float64; under autocast they are cast to its dtype.
    Exponentials and sums are taken in float32 (float64 for float64).

    Returns:
        A scalar of float32 (float64 for float64), differentiable once.

    Raises ValueError where shapes, dtypes or devices do not fit.
    """
    x, weight, bias = library.autocast(x, weight, bias)
    _check(x, weight, bias, targets, word_weights)
    return _LinearCrossEntropy.apply(x, weight, bias, targets, word_weights, label_smoothing)


def linear_cross_entropy_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    word_weights: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    """`linear_cross_entropy` in plain PyTorch: same arguments, results and errors."""
    x, weight, bias = library.autocast(x, weight, bias)
    _check(x, weight, bias, targets, word_weights)
    logits = F.linear(x, weight, bias)
    logits = logits.to(library.sum_dtype(x))
    if word_weights is None:
        return F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="sum")
    losses = F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="none")
    return (losses * word_weights).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, targets, word_weights, label_smoothing):
        (M, _), V, dtype = x.shape, len(weight), library.sum_dtype(x)
        wanted = any(ctx.needs_input_grad[:3])
        loss = x.new_zeros((), dtype=dtype)
        last_layer = fixed_linear(weight, bias)
        x_grad, weight_grad, bias_grad = torch.empty_like(x), None, x.new_zeros(V, dtype=dtype)
        for begin in range(0, M, max(1, CHUNK // V)):
            words = slice(begin, begin + max(1, CHUNK // V))
            target = targets[words].unsqueeze(1)
            of_words = 1 if word_weights is None else word_weights[words].to(dtype).unsqueeze(1)
            log_p = last_layer(x[words]).to(dtype).log_softmax(dim=1)
            expected = (1 - label_smoothing) * log_p.gather(1, target)
            if label_smoothing:
                expected += label_smoothing * log_p.mean(dim=1, keepdim=True)
            loss -= (expected * of_words).sum()
            if not wanted:
                continue
            grad = log_p.exp_()  # of the logits: probabilities less what they should be
            if label_smoothing:
                grad -= label_smoothing / V
            grad.scatter_add_(1, target, torch.full_like(expected, label_smoothing - 1))
            if word_weights is not None:
                grad *= of_words
            bias_grad += grad.sum(dim=0)
            grad = grad.to(x.dtype)
            torch.mm(grad, weight, out=x_grad[words])
            of_chunk = (grad.t() @ x[words]).to(dtype)
            weight_grad = of_chunk if weight_grad is None else weight_grad.add_(of_chunk)
        if wanted:
            weight_grad = torch.zeros_like(weight) if weight_grad is None else weight_grad.to(weight.dtype)
            ctx.save_for_backward(x_grad, weight_grad, bias_grad.to(bias.dtype))
        return loss

    @staticmethod
    @once_differentiable  # a second derivative is an error, not zeros
    def backward(ctx, loss_grad):
        grads = ctx.saved_tensors  # a loss scale of 65,536 is no float16
        return *((grad.to(loss_grad.dtype) * loss_grad).to(grad.dtype) for grad in grads), None, None, None


def _check(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, word_weights: Tensor | None) -> None:
    if x.dim() != 2 or weight.dim() != 2 or len(weight) == 0:
        raise ValueError(
            "linear_cross_entropy takes x [M, O] and weight [V, O] of at least one word, not "
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
            "word_weights": (word_weights, (M,), None if word_weights is None else word_weights.dtype),
        },
        x.device,
        lambda: f"x {list(x.shape)} and weight {list(weight.shape)}",
    )
