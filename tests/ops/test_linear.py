"""linear is compared with torch's own and with finite differences, with and without torch's private packing ops."""

import importlib
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from attncap.ops import attention_lstm, linear

MODULE = importlib.import_module("attncap.ops.linear")  # in the package, the name is the function's


@pytest.fixture(params=["packing", "no packing"])
def packing(request, monkeypatch) -> bool:
    """Whether weights are packed: as in this torch, or as in a torch without the private ops."""
    if request.param == "no packing":
        monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
        pack, packed_linear = MODULE._packing_ops()
        assert pack is None and packed_linear is None
        monkeypatch.setattr(MODULE, "_PACK", pack)
        monkeypatch.setattr(MODULE, "_PACKED_LINEAR", packed_linear)
    return MODULE._PACK is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5), (0, 5)], ids=str)
def test_matches_torch(device, packing, dtype, shape):
    random = torch.Generator().manual_seed(0)
    inputs = [torch.randn(*s, generator=random).to(device, dtype).requires_grad_() for s in (shape, (4, 5), (4,))]
    actual, expected = linear(*inputs), F.linear(*inputs)
    torch.testing.assert_close(actual, expected)
    grad = torch.randn(*shape[:-1], 4, generator=random).to(device, dtype)
    torch.testing.assert_close(torch.autograd.grad(actual, inputs, grad), torch.autograd.grad(expected, inputs, grad))


def test_gradcheck(device):
    inputs = [torch.randn(*s, dtype=torch.double, device=device, requires_grad=True) for s in ((2, 3, 5), (4, 5), (4,))]
    torch.autograd.gradcheck(linear, inputs)


def test_this_torch_can_pack():
    """If this fails with a new release of torch, the private ops have changed and nothing is packed any more."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    assert MODULE._PACK is not None


@pytest.mark.parametrize(
    "change",
    [
        {"_reorder_linear_weight": None},
        {"_linear_pointwise": SimpleNamespace(default=lambda x, weight: x)},  # other arguments
        {"_linear_pointwise": SimpleNamespace(default=lambda *arguments: torch.zeros(1, 1))},  # another result
    ],
)
def test_ops_that_have_changed_are_not_used(monkeypatch, change):
    names = ("_reorder_linear_weight", "_linear_pointwise")
    ops = {name: getattr(torch.ops.mkldnn, name, None) for name in names}
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**ops | change))
    assert MODULE._packing_ops() == (None, None)


def test_packed(packing):
    weight = torch.randn(4, 5, requires_grad=True)
    packed = MODULE.packed(weight)
    assert packed.is_mkldnn == packing and (packing or packed is weight)
    assert MODULE.packed(weight.double()).dtype == torch.float64 and not MODULE.packed(weight.double()).is_mkldnn


@pytest.mark.parametrize("with_bias", [True, False])
def test_fixed_linear(packing, with_bias):
    random = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=random) for shape in ((6, 5), (4, 5), (4, 2)))
    bias = bias[:, 0] if with_bias else None  # not contiguous
    torch.testing.assert_close(MODULE.fixed_linear(weight, bias)(x), F.linear(x, weight, bias))


def test_attention_lstm(packing):
    """The C++ loop with packed and with plain float32 weights: the results are those of float64."""
    B, P, D, A, H, batch_sizes = 3, 5, 6, 3, 4, (3, 2)
    M, S = sum(batch_sizes), 4 * H + A + D
    shapes = [(B, P, D), (B, P, A), (M, 4 * H), (B, H), (B, H), (S, H), (S,), (4 * H, D), (A,)]
    random = torch.Generator().manual_seed(0)
    inputs = [torch.randn(*shape, generator=random).requires_grad_() for shape in shapes]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    results = []
    for tensors in (inputs, wide):
        outputs = attention_lstm(*tensors, batch_sizes=batch_sizes)
        results.append([*outputs, *torch.autograd.grad(sum(x.square().sum() for x in outputs), tensors)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)
