"""`F.linear` where laying out the weights anew pays: for one large product, or many with the same weights."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def packed(weight: Tensor) -> Tensor:
    """Weights [O,I] as oneDNN lays them out, for float32 on the CPU (torch's own compiler does so with frozen weights);
    any others as they are."""
    packs = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None) if torch.backends.mkldnn.is_available() else None
    if packs is None or weight.device.type != "cpu" or weight.dtype != torch.float32:
        return weight
    return packs(weight.detach())


def fixed_linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """`F.linear` with these, laid out once; without gradients."""
    laid_out = packed(weight)
    if not laid_out.is_mkldnn:
        return functools.partial(F.linear, weight=weight, bias=bias)
    bias = bias if bias is None else bias.contiguous()  # oneDNN is not told its strides
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, laid_out, bias, "none", [], "")


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`F.linear` for a large product: x [...,I], weight [O,I], bias [O] -> [...,O], differentiable once."""
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return fixed_linear(weight, bias)(x)

    @staticmethod
    @once_differentiable  # a second derivative is an error, not zeros
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        x_grad = grad @ weight if ctx.needs_input_grad[0] else None
        return x_grad, rows.t() @ x.flatten(0, -2), rows.sum(dim=0)
