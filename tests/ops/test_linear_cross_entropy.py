"""linear_cross_entropy is compared with torch's cross entropy in float64, a case worked by hand and finite
differences."""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from attncap.ops import linear_cross_entropy, linear_cross_entropy_reference

M, O, V = 7, 5, 11  # noqa: E741
MODULE = importlib.import_module("attncap.ops.linear_cross_entropy")  # in the package, the name is the function's


@pytest.fixture(params=["plain", "padded"])
def layout(request, monkeypatch):
    """The logits as on the CPU, and with their rows padded as on CUDA."""
    if request.param == "padded":
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)


both = pytest.mark.parametrize("op", [linear_cross_entropy, linear_cross_entropy_reference])


def set_chunk(monkeypatch, chunk: int) -> None:
    for name in ("CHUNK", "CUDA_CHUNK"):
        monkeypatch.setattr(MODULE, name, chunk)


def make_inputs(sizes=(M, O, V), *, device="cpu", dtype=torch.float64, seed=0) -> tuple[torch.Tensor, ...]:
    M, O, V = sizes  # noqa: E741
    random = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(*shape, generator=random, dtype=torch.float64) for shape in ((M, O), (V, O), (V,))]
    targets = torch.randint(V, (M,), generator=random)
    token_weights = torch.randn(M, generator=random, dtype=torch.float64)  # may be negative, like advantages
    return *(x.to(device, dtype).requires_grad_() for x in tensors), targets.to(device), token_weights.to(device, dtype)


def loss_and_gradients(op, x, weight, bias, targets, token_weights, **options) -> list[torch.Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, weight, bias)]
    loss = op(*leaves, targets, token_weights, **options)
    return [loss.detach(), *torch.autograd.grad(3 * loss, leaves)]


@both
def test_hand_worked_case(op):
    """Probabilities 1/4 and 3/4, target 1; then with half of the target's probability spread over both tokens."""
    x, weight, bias = torch.ones(1, 1), torch.zeros(2, 1), torch.tensor([0.0, math.log(3)])
    targets = torch.tensor([1])
    torch.testing.assert_close(op(x, weight, bias, targets), torch.tensor(math.log(4 / 3)))
    smoothed = 0.5 * math.log(4 / 3) + 0.25 * (math.log(4) + math.log(4 / 3))
    torch.testing.assert_close(op(x, weight, bias, targets, label_smoothing=0.5), torch.tensor(smoothed))
    weights = torch.tensor([-2.0])
    torch.testing.assert_close(op(x, weight, bias, targets, weights), torch.tensor(-2 * math.log(4 / 3)))


@both
@pytest.mark.parametrize("tokens_at_a_time", [1, 3, 7, 100])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_matches_torch_in_float64(device, monkeypatch, op, tokens_at_a_time, label_smoothing, weighted):
    set_chunk(monkeypatch, tokens_at_a_time * V)
    x, weight, bias, targets, token_weights = make_inputs(device=device)
    actual = loss_and_gradients(
        op, x, weight, bias, targets, token_weights if weighted else None, label_smoothing=label_smoothing
    )
    losses = F.cross_entropy(x @ weight.T + bias, targets, label_smoothing=label_smoothing, reduction="none")
    loss = (losses * token_weights).sum() if weighted else losses.sum()
    expected = [loss.detach(), *torch.autograd.grad(3 * loss, [x, weight, bias])]
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_gradcheck(device):
    x, weight, bias, targets, token_weights = make_inputs(device=device)
    torch.autograd.gradcheck(
        lambda *leaves: linear_cross_entropy(*leaves, targets, token_weights, label_smoothing=0.1), (x, weight, bias)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_rule(device, layout, monkeypatch, dtype):
    """The op's error against float64 is at most twice that of the reference in the same dtype. Each error is the
    largest of several problems."""
    set_chunk(monkeypatch, 40 * 300)
    errors = [[0.0, 0.0, 0.0] for _ in range(4)]
    for seed in range(3):
        inputs = make_inputs((150, 64, 300), device=device, dtype=dtype, seed=seed)
        wide = [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs]
        truth = loss_and_gradients(linear_cross_entropy_reference, *wide, label_smoothing=0.1)
        reference = loss_and_gradients(linear_cross_entropy_reference, *inputs, label_smoothing=0.1)
        native = loss_and_gradients(linear_cross_entropy, *inputs, label_smoothing=0.1)
        for index, (actual, expected, true) in enumerate(zip(native, reference, truth, strict=True)):
            assert actual.dtype == expected.dtype and actual.isfinite().all()
            found = [(actual - true).abs().max(), (expected - true).abs().max(), true.abs().max()]
            errors[index] = [max(pair) for pair in zip(errors[index], found, strict=True)]
    floor = {torch.float32: 1e-6, torch.bfloat16: 2**-9, torch.float16: 2**-12}[dtype]
    for index, (error, reference_error, largest) in enumerate(errors):
        assert error <= 2 * reference_error + floor * largest, f"{index}: {error:.2e}, reference {reference_error:.2e}"


def test_large_logits():
    x, weight, bias = torch.full((1, 1), 1e4), torch.tensor([[1.0], [-1.0]]), torch.zeros(2)
    assert linear_cross_entropy(x, weight, bias, torch.tensor([0])) == 0
    assert linear_cross_entropy(x, weight, bias, torch.tensor([1])) == 2e4


class LargestTensor(TorchFunctionMode):
    """Records the largest number of elements of any tensor that a torch function returns."""

    numel = 0

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_holds_only_some_logits_at_a_time(monkeypatch):
    monkeypatch.setattr(MODULE, "CHUNK", 600)
    inputs = make_inputs((200, 4, 30))
    with LargestTensor() as largest:
        loss_and_gradients(linear_cross_entropy, *inputs)
    assert largest.numel == max(600, 200 * 4)
    with LargestTensor() as largest:
        loss_and_gradients(linear_cross_entropy_reference, *inputs)
    assert largest.numel == 200 * 30


@both
def test_no_tokens(op):
    loss, *gradients = loss_and_gradients(op, *make_inputs((0, O, V)))
    assert loss == 0 and not any(gradient.any() for gradient in gradients)


@both
def test_autocast(device, op):
    x, weight, bias, targets, _ = make_inputs(device=device, dtype=torch.float32)
    with torch.autocast(device, torch.bfloat16):
        loss = op(x, weight, bias, targets)
    expected = op(*(tensor.detach().bfloat16() for tensor in (x, weight, bias)), targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach(), expected)
    loss.backward()
    assert all(tensor.grad.dtype == torch.float32 for tensor in (x, weight, bias))


@both
def test_scaled_loss(op):
    """As in float16 training, with a loss scale that is too large for float16."""
    x, weight, bias, targets, _ = make_inputs(dtype=torch.float16)
    (65536 * op(x, weight, bias, targets, torch.full((M,), 1e-3))).backward()
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, weight, bias)]
    (65.536 * linear_cross_entropy_reference(*wide, targets)).backward()
    for tensor, true in zip((x, weight, bias), wide, strict=True):
        torch.testing.assert_close(tensor.grad.double(), true.grad, rtol=1e-2, atol=0.1)


def test_any_strides():
    *tensors, targets, _ = make_inputs(dtype=torch.float32)
    strided = [torch.stack([tensor.detach()] * 2, dim=-1)[..., 0].requires_grad_() for tensor in tensors]
    losses = [linear_cross_entropy(*inputs, targets) for inputs in (tensors, strided)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(torch.autograd.grad(losses[0], tensors), torch.autograd.grad(losses[1], strided))


def test_without_gradients():
    x, weight, bias, targets, token_weights = make_inputs()
    with torch.no_grad():
        loss = linear_cross_entropy(x, weight, bias, targets, token_weights)
    torch.testing.assert_close(loss, linear_cross_entropy_reference(x, weight, bias, targets, token_weights).detach())


@both
@pytest.mark.parametrize(
    "index, wrong, message",
    [
        (0, torch.zeros(M, dtype=torch.double), "x \\[M, O\\] and weight \\[V, O\\]"),
        (0, torch.zeros(M, O), "weight has dtype torch.float64, but must be torch.float32"),
        (0, torch.zeros(M, O).long(), "x has dtype torch.int64"),
        (1, torch.zeros(V, O + 1, dtype=torch.double), "weight has shape \\[11, 6\\], but must be \\[11, 5\\]"),
        (1, torch.zeros(0, O, dtype=torch.double), "V of at least 1"),
        (2, torch.zeros(V + 1, dtype=torch.double), "bias has shape"),
        (3, torch.zeros(M), "targets has dtype torch.float32, but must be torch.int64"),
        (4, torch.zeros(M + 1), "token_weights has shape"),
    ],
)
def test_invalid_arguments(op, index, wrong, message):
    inputs = list(make_inputs())
    inputs[index] = wrong
    with pytest.raises(ValueError, match=message):
        op(*inputs)
