"""`F.linear` with weights packed by oneDNN. Packing pays off for a large product, or many with the same weights.

torch offers packing only through private ops, which are used in this file and nowhere else in Python. (The C++ loop of
`attention_lstm` calls the same op if it is given packed weights.) If they are missing or do not work as expected,
nothing is packed and everything here is plain `F.linear`.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def _packing_ops() -> tuple[Callable | None, Callable | None]:
    """The ops that pack a weight and that compute a linear layer with a packed weight; None, None unless both work."""
    try:
        pack = torch.ops.mkldnn._reorder_linear_weight.default
        linear = torch.ops.mkldnn._linear_pointwise.default
        x = torch.full((1, 1), 3.0, dtype=torch.float32, device="cpu")
        weight = pack(x)
        works = weight.is_mkldnn and linear(x, weight, None, "none", [], "").item() == 9
    except (AttributeError, RuntimeError, TypeError):
        works = False
    return (pack, linear) if works else (None, None)


_PACK, _PACKED_LINEAR = _packing_ops()


def packed(weight: Tensor) -> Tensor:
    """The weight [O,I] in oneDNN's blocked layout (`is_mkldnn`, detached) if it is float32 and on the CPU; any other
    weight unchanged."""
    if _PACK is None or weight.device.type != "cpu" or weight.dtype != torch.float32:
        return weight
    return _PACK(weight.detach())


def fixed_linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """The function x -> F.linear(x, weight, bias), for a weight [O,I] that is packed once. It has no gradient."""
    packed_weight = packed(weight)
    if not packed_weight.is_mkldnn:
        return functools.partial(F.linear, weight=weight, bias=bias)
    bias = bias if bias is None else bias.contiguous()  # oneDNN ignores the stride of the bias
    return lambda x: _PACKED_LINEAR(x, packed_weight, bias, "none", [], "")


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`F.linear` for a large product: x [...,I], weight [O,I], bias [O] -> [...,O]. Differentiable once."""
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return fixed_linear(weight, bias)(x)

    @staticmethod
    @once_differentiable  # a second derivative raises an error; otherwise it would silently be 0
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        x_grad = grad @ weight if ctx.needs_input_grad[0] else None
        return x_grad, rows.t() @ x.flatten(0, -2), rows.sum(dim=0)
