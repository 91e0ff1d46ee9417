"""attention_lstm is compared with its reference in float64 and with finite differences. (tests/models/test_decoder.py
compares both with the equations of the paper.)"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from attncap.models.attention import SoftAttention
from attncap.ops import attention_lstm, attention_lstm_reference, soft_attention_reference

B, K, P, D, A, H = 4, 2, 5, 6, 3, 4
BATCH_SIZES = (3, 3, 2, 1)  # the last image has no tokens
NAMES = ("features", "keys", "word_inputs", "h", "c", "hidden_weight", "hidden_bias", "context_weight", "score_weight")
both_activations = pytest.mark.parametrize("activation", ["tanh", "relu"])


def make_inputs(
    sizes=(B, K, P, D, A, H), batch_sizes=BATCH_SIZES, *, device="cpu", dtype=torch.float64, seed=0
) -> dict:
    B, K, P, D, A, H = sizes
    random = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        values = torch.randn(*shape, generator=random, dtype=torch.float64) * scale
        return values.to(device, dtype).requires_grad_()

    shapes = [
        (B, P, D), (B, P, A), (K * sum(batch_sizes), 4 * H), (B * K, H), (B * K, H),
        (4 * H + A + D, H), (4 * H + A + D,), (4 * H, D), (A,),
    ]  # fmt: skip
    fan_in = {"hidden_weight": H, "context_weight": D, "score_weight": A}
    return {name: normal(*shape, scale=fan_in.get(name, 1) ** -0.5) for name, shape in zip(NAMES, shapes, strict=True)}


def outputs_and_gradients(op, inputs, **options) -> list[torch.Tensor]:
    """The three outputs and, for random gradients of these, the gradients of the nine inputs."""
    inputs = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    outputs = op(**inputs, **options)
    random = torch.Generator().manual_seed(1)
    output_grads = [torch.randn(x.shape, generator=random, dtype=torch.float64).to(x) for x in outputs]
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, list(inputs.values()), output_grads)]


@both_activations
@pytest.mark.parametrize("sizes", [(B, K, P, D, A, H), (3, 1, 1, 1, 1, 1), (3, 5, 17, 33, 9, 20)])
@pytest.mark.parametrize("batch_sizes", [BATCH_SIZES[:1], (3, 3, 2, 1), (3, 0, 0)], ids=str)
def test_matches_the_reference(device, sizes, batch_sizes, activation):
    inputs = make_inputs(sizes, batch_sizes, device=device)
    options = {"batch_sizes": batch_sizes, "activation": activation}
    expected = outputs_and_gradients(attention_lstm_reference, inputs, **options)
    for actual, true in zip(outputs_and_gradients(attention_lstm, inputs, **options), expected, strict=True):
        torch.testing.assert_close(actual, true, rtol=1e-10, atol=1e-11)


@both_activations
def test_gradcheck(device, activation):
    inputs = make_inputs(device=device)
    torch.autograd.gradcheck(
        lambda *tensors: attention_lstm(*tensors, batch_sizes=BATCH_SIZES, activation=activation),
        tuple(inputs.values()),
    )


def test_without_a_gradient_of_the_features(device):
    """As with a frozen encoder. The other gradients are the same."""
    inputs = make_inputs(device=device)
    expected = outputs_and_gradients(attention_lstm_reference, inputs, batch_sizes=BATCH_SIZES)
    inputs = {name: tensor.detach().requires_grad_(name != "features") for name, tensor in inputs.items()}
    outputs = attention_lstm(**inputs, batch_sizes=BATCH_SIZES)
    random = torch.Generator().manual_seed(1)
    output_grads = [torch.randn(x.shape, generator=random, dtype=torch.float64).to(x) for x in outputs]
    torch.autograd.backward(outputs, output_grads)
    assert inputs["features"].grad is None
    for name, true in list(zip(NAMES, expected[3:], strict=True))[1:]:
        torch.testing.assert_close(inputs[name].grad, true, rtol=1e-10, atol=1e-11)


@both_activations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(3, 1, 49, 100, 64, 64), (3, 3, 20, 130, 33, 40)], ids=str)
def test_error_rule(device, dtype, sizes, activation):
    """The op's error against float64 is at most twice that of the reference in the same dtype. Each error is the mean
    of several problems' largest: in a single one, chance decides which of relu's kinks a rounding crosses."""
    batch_sizes = (3, 3, 2, 2, 1)
    options = {"batch_sizes": batch_sizes, "activation": activation}
    names = ["next h", "context", "weights", *NAMES]
    errors = {name: torch.zeros(3) for name in names}  # of the op and of the reference, and the largest true value
    for seed in range(3):
        inputs = make_inputs(sizes, batch_sizes, device=device, dtype=dtype, seed=seed)
        wide = {name: tensor.double() for name, tensor in inputs.items()}
        truth = outputs_and_gradients(attention_lstm_reference, wide, **options)
        reference = outputs_and_gradients(attention_lstm_reference, inputs, **options)
        native = outputs_and_gradients(attention_lstm, inputs, **options)
        for name, actual, expected, true in zip(names, native, reference, truth, strict=True):
            assert actual.dtype == dtype and actual.isfinite().all()
            errors[name] += torch.stack([x.abs().max().cpu() for x in (actual - true, expected - true, true)]) / 3
    floor = {torch.float32: 1e-6, torch.bfloat16: 2**-9, torch.float16: 2**-12}[dtype]
    for name, (error, reference_error, largest) in errors.items():
        assert error <= 2 * reference_error + floor * largest, f"{name}: {error:.2e}, reference {reference_error:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)  # only float32 weights are packed
def test_any_strides(device, dtype):
    inputs = make_inputs(device=device, dtype=dtype)
    expected = outputs_and_gradients(attention_lstm, inputs, batch_sizes=BATCH_SIZES)
    strided = {name: torch.stack([x.detach()] * 2, dim=-1)[..., 0].requires_grad_() for name, x in inputs.items()}
    strided["context_weight"] = inputs["context_weight"].detach().t().contiguous().t().requires_grad_()
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    outputs = attention_lstm(**strided, batch_sizes=BATCH_SIZES)
    random = torch.Generator().manual_seed(1)
    output_grads = [torch.randn(x.shape, generator=random, dtype=torch.float64).to(x) for x in outputs]
    gradients = torch.autograd.grad(outputs, list(strided.values()), output_grads)
    for actual, true in zip([*outputs, *gradients], expected, strict=True):
        torch.testing.assert_close(actual, true)


@pytest.mark.parametrize("op", [attention_lstm, attention_lstm_reference])
@pytest.mark.parametrize("sizes, batch_sizes", [((0, 0, P, D, A, H), (0,)), ((2, 0, P, D, A, H), (2, 1))])
def test_no_rows(device, op, sizes, batch_sizes):
    inputs = make_inputs(sizes, batch_sizes, device=device)
    h, context, weights, *gradients = outputs_and_gradients(op, inputs, batch_sizes=batch_sizes)
    assert h.shape == (0, H) and context.shape == (0, D) and weights.shape == (0, P)
    for (name, tensor), gradient in zip(inputs.items(), gradients, strict=True):
        assert gradient.shape == tensor.shape and not gradient.any(), name


def test_deterministic(device):
    inputs = make_inputs((3, 2, 49, 64, 33, 32), device=device, dtype=torch.float32)
    first, *others = [outputs_and_gradients(attention_lstm, inputs, batch_sizes=BATCH_SIZES) for _ in range(3)]
    for again in others:
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("op", [attention_lstm, attention_lstm_reference])
def test_autocast(device, op):
    inputs = make_inputs(device=device, dtype=torch.float32)
    half = {name: tensor.to(torch.bfloat16) for name, tensor in inputs.items()}
    expected = outputs_and_gradients(op, half, batch_sizes=BATCH_SIZES)[:3]
    with torch.autocast(device, torch.bfloat16):
        outputs = op(**inputs, batch_sizes=BATCH_SIZES)
    for actual, true in zip(outputs, expected, strict=True):
        assert actual.dtype == torch.bfloat16
        torch.testing.assert_close(actual, true)
    sum(x.float().square().sum() for x in outputs).backward()
    assert all(tensor.grad.dtype == torch.float32 for tensor in inputs.values())


def test_autocast_of_cuda_without_a_gpu():
    """On meta tensors: the operations that autocast makes float32 differ between CUDA and the CPU."""
    with FakeTensorMode() as mode:
        inputs = [mode.from_tensor(x.detach()).to("cuda", torch.float32) for x in make_inputs().values()]
        features, keys, *_, score_weight = inputs
        with torch.device("cuda"):
            gate, h, module = torch.empty(B * K, D), torch.empty(B * K, H), SoftAttention(D, H, A, "tanh")
        torch.set_autocast_enabled("cuda", True)
        try:
            outputs = [
                *attention_lstm_reference(*inputs, batch_sizes=BATCH_SIZES),
                *soft_attention_reference(features, keys, gate[:, :A], score_weight, gate=gate),
                *module(features, keys, h),
            ]
        finally:
            torch.set_autocast_enabled("cuda", False)
    assert {x.dtype for x in outputs} == {torch.get_autocast_dtype("cuda")}


def test_opcheck(device):
    """The fake kernels of the C++ loop and its backward."""
    inputs = [tensor.detach() for tensor in make_inputs(device=device).values()]
    features, keys, word_inputs, _, c, hidden_weight, _, context_weight, score_weight = inputs
    forward, backward = torch.ops.attncap.attention_lstm.default, torch.ops.attncap.attention_lstm_backward.default
    torch.library.opcheck(forward, (*inputs, BATCH_SIZES, "tanh"))
    next_h, context, weights, *intermediates = forward(*inputs, BATCH_SIZES, "tanh")
    parameters = (hidden_weight.t(), context_weight.t(), score_weight)
    grads = [torch.ones_like(x) for x in (next_h, context, weights)]
    for features_need_grad in (False, True):
        saved = (features, keys, word_inputs, c, *parameters, context, weights, *intermediates)
        torch.library.opcheck(backward, (*grads, *saved, BATCH_SIZES, "tanh", features_need_grad))


def test_second_derivative_is_an_error():
    inputs = make_inputs()
    h, _, _ = attention_lstm(**inputs, batch_sizes=BATCH_SIZES)
    [gradient] = torch.autograd.grad(h.square().sum(), [inputs["h"]], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("op", [attention_lstm, attention_lstm_reference])
@pytest.mark.parametrize(
    "change, message",
    [
        ({"activation": "gelu"}, 'activation must be "tanh" or "relu", not \'gelu\''),
        ({"batch_sizes": ()}, "do not increase, not \\[\\]"),
        ({"batch_sizes": (2, 3)}, "do not increase, not \\[2, 3\\]"),
        ({"batch_sizes": (5, 1)}, "from 0 to 4 that do not increase, not \\[5, 1\\]"),
        ({"batch_sizes": (3, -1)}, "do not increase, not \\[3, -1\\]"),
        ({"batch_sizes": (3, 3)}, "word_inputs has shape \\[18, 16\\], but must be \\[12, 16\\]"),
        ({"h": torch.zeros(7, H, dtype=torch.double)}, "h has 7 rows, which is not a multiple of the 4 images"),
        ({"keys": torch.zeros(4, 5, 0, dtype=torch.double)}, "with P, D, A and H of at least 1"),
        ({"features": torch.zeros(4, 5, 6)}, "keys has dtype torch.float64, but must be torch.float32"),
        ({"features": torch.zeros(4, 5, 6).long()}, "features has dtype torch.int64"),
        ({"hidden_bias": torch.zeros(3, dtype=torch.double)}, "hidden_bias has shape \\[3\\], but must be \\[25\\]"),
    ],
)
def test_invalid_arguments(op, change, message):
    with pytest.raises(ValueError, match=message):
        op(**{**make_inputs(), "batch_sizes": BATCH_SIZES, **change})


@pytest.mark.parametrize(
    "name, change",
    [
        ("features", lambda x: x[:, :, 1:]),
        ("keys", lambda x: x[1:]),
        ("word_inputs", lambda x: x[1:]),
        ("h", lambda x: x[1:]),
        ("c", lambda x: x.float()),
        ("hidden_weight", lambda x: x[1:]),
        ("hidden_bias", lambda x: x[1:]),
        ("context_weight", lambda x: x[:, 1:]),
        ("score_weight", lambda x: x[1:]),
        ("hidden_bias", lambda x: x[:1]),
        ("batch_sizes", lambda batch_sizes: (*batch_sizes, 1)),
        ("batch_sizes", lambda batch_sizes: (3, 4, 1, 1)),
        ("batch_sizes", lambda batch_sizes: (5, 3, 1, 0)),
        ("batch_sizes", lambda batch_sizes: (4, 4, 2, -1)),
    ],
)
def test_the_kernel_checks_its_arguments(name, change):
    inputs = {name: tensor.detach() for name, tensor in make_inputs().items()} | {"batch_sizes": BATCH_SIZES}
    # A wrong size of these two shows in tensors whose sizes must match.
    reported = {"batch_sizes": "batch_sizes|word_inputs", "features": "hidden_weight"}.get(name, name)
    with pytest.raises(RuntimeError, match=f"attention.*({reported})"):
        torch.ops.attncap.attention_lstm.default(**inputs | {name: change(inputs[name])}, activation="tanh")


@pytest.mark.parametrize("index", range(15))
def test_the_backward_kernel_checks_its_arguments(index):
    inputs = [tensor.detach() for tensor in make_inputs().values()]
    features, keys, word_inputs, _, c, hidden_weight, _, context_weight, score_weight = inputs
    next_h, context, weights, *intermediates = torch.ops.attncap.attention_lstm.default(*inputs, BATCH_SIZES, "tanh")
    grads, parameters = (next_h, context, weights), (hidden_weight.t(), context_weight.t(), score_weight)
    arguments = [*grads, features, keys, word_inputs, c, *parameters, context, weights, *intermediates]
    arguments[index] = arguments[index][1:]
    with pytest.raises(RuntimeError):
        torch.ops.attncap.attention_lstm_backward.default(*arguments, BATCH_SIZES, "tanh", True)


@pytest.mark.parametrize("dtype, limit", [(torch.double, 5120), (torch.float32, 10240), (torch.bfloat16, 10240)])
def test_too_many_cells_for_cuda(monkeypatch, dtype, limit):
    inputs = make_inputs((1, 1, limit + 1, 2, 1, 1), (1,), dtype=dtype)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)  # the check needs no GPU
    with pytest.raises(
        ValueError, match=f"has {limit + 1} cells, but on CUDA at most {limit} of {dtype} are supported"
    ):
        attention_lstm(**inputs, batch_sizes=(1,))


def test_weights_packed_in_another_dtype():
    inputs = {name: tensor.detach().bfloat16() for name, tensor in make_inputs().items()}
    try:
        inputs["hidden_weight"] = inputs["hidden_weight"].to_mkldnn()
    except RuntimeError as error:
        pytest.skip(f"oneDNN has no bfloat16 here: {error}")
    with pytest.raises(RuntimeError, match="float32 only"):
        torch.ops.attncap.attention_lstm.default(**inputs, batch_sizes=BATCH_SIZES, activation="tanh")
