"""Matrix products with the same weights many times over."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """`F.linear` with these, without gradients. On the CPU, float32 weights are laid out once for oneDNN, as torch's
    own compiler does it with frozen weights."""
    packs = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None) if torch.backends.mkldnn.is_available() else None
    if packs is None or weight.device.type != "cpu" or weight.dtype != torch.float32:
        return functools.partial(F.linear, weight=weight, bias=bias)
    packed = packs(weight.detach())
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
