"""linear against torch's own, and finite differences."""

import pytest
import torch
import torch.nn.functional as F

from attncap.ops import linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5), (0, 5)], ids=str)
def test_equals_torch(device, dtype, shape):
    random = torch.Generator().manual_seed(0)
    inputs = [torch.randn(*s, generator=random).to(device, dtype).requires_grad_() for s in (shape, (4, 5), (4,))]
    found, expected = linear(*inputs), F.linear(*inputs)
    torch.testing.assert_close(found, expected)
    to_output = torch.randn(*shape[:-1], 4, generator=random).to(device, dtype)
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, to_output), torch.autograd.grad(expected, inputs, to_output), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_gradcheck(device):
    inputs = [torch.randn(*s, dtype=torch.double, device=device, requires_grad=True) for s in ((2, 3, 5), (4, 5), (4,))]
    torch.autograd.gradcheck(linear, inputs)
