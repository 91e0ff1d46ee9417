"""attention_lstm against its plain twin in float64 and finite differences. (tests/models/test_decoder.py compares both
with the paper's equations.)"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from attncap.ops import attention_lstm, attention_lstm_reference

B, K, P, D, A, H = 4, 2, 5, 6, 3, 4
IMAGES = (3, 3, 2, 1)  # the last image is in no step
NAMES = ("features", "keys", "words", "h", "c", "hidden_weight", "hidden_bias", "context_weight", "score_weight")
both_activations = pytest.mark.parametrize("activation", ["tanh", "relu"])


def make_inputs(sizes=(B, K, P, D, A, H), images=IMAGES, *, device="cpu", dtype=torch.float64, seed=0) -> dict:
    B, K, P, D, A, H = sizes
    random = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        values = torch.randn(*shape, generator=random, dtype=torch.float64) * scale
        return values.to(device, dtype).requires_grad_()

    shapes = [
        (B, P, D), (B, P, A), (K * sum(images), 4 * H), (B * K, H), (B * K, H),
        (4 * H + A + D, H), (4 * H + A + D,), (4 * H, D), (A,),
    ]  # fmt: skip
    fan_in = {"hidden_weight": H, "context_weight": D, "score_weight": A}
    return {name: normal(*shape, scale=fan_in.get(name, 1) ** -0.5) for name, shape in zip(NAMES, shapes, strict=True)}


def outputs_and_gradients(op, inputs, **options) -> list[torch.Tensor]:
    """The three outputs and the nine gradients of a random mixture of them."""
    inputs = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    outputs = op(**inputs, **options)
    random = torch.Generator().manual_seed(1)
    to_outputs = [torch.randn(x.shape, generator=random, dtype=torch.float64).to(x) for x in outputs]
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, list(inputs.values()), to_outputs)]


@both_activations
@pytest.mark.parametrize("sizes", [(B, K, P, D, A, H), (3, 1, 1, 1, 1, 1), (3, 5, 17, 33, 9, 20)])
@pytest.mark.parametrize("images", [IMAGES[:1], (3, 3, 2, 1), (3, 0, 0)], ids=str)
def test_equals_the_plain_path(device, sizes, images, activation):
    inputs = make_inputs(sizes, images, device=device)
    options = {"images": images, "activation": activation}
    expected = outputs_and_gradients(attention_lstm_reference, inputs, **options)
    for found, true in zip(outputs_and_gradients(attention_lstm, inputs, **options), expected, strict=True):
        torch.testing.assert_close(found, true, rtol=1e-10, atol=1e-11)


@both_activations
def test_gradcheck(device, activation):
    inputs = make_inputs(device=device)
    torch.autograd.gradcheck(
        lambda *tensors: attention_lstm(*tensors, images=IMAGES, activation=activation), tuple(inputs.values())
    )


def test_without_a_gradient_of_the_features(device):
    """With a frozen encoder; the other gradients are the same."""
    inputs = make_inputs(device=device)
    expected = outputs_and_gradients(attention_lstm_reference, inputs, images=IMAGES)
    inputs = {name: tensor.detach().requires_grad_(name != "features") for name, tensor in inputs.items()}
    outputs = attention_lstm(**inputs, images=IMAGES)
    random = torch.Generator().manual_seed(1)
    to_outputs = [torch.randn(x.shape, generator=random, dtype=torch.float64).to(x) for x in outputs]
    torch.autograd.backward(outputs, to_outputs)
    assert inputs["features"].grad is None
    for name, true in list(zip(NAMES, expected[3:], strict=True))[1:]:
        torch.testing.assert_close(inputs[name].grad, true, rtol=1e-10, atol=1e-11)


@both_activations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(3, 1, 49, 100, 64, 64), (3, 3, 20, 130, 33, 40)], ids=str)
def test_error_rule(device, dtype, sizes, activation):
    """The op's error is at most twice the plain path's in the same dtype, against float64; the largest of several
    problems each."""
    images = (3, 3, 2, 2, 1)
    options = {"images": images, "activation": activation}
    names = ["next h", "context", "weights", *NAMES]
    errors = {name: [0.0, 0.0, 0.0] for name in names}
    for seed in range(3):
        inputs = make_inputs(sizes, images, device=device, dtype=dtype, seed=seed)
        wide = {name: tensor.double() for name, tensor in inputs.items()}
        truth = outputs_and_gradients(attention_lstm_reference, wide, **options)
        plain = outputs_and_gradients(attention_lstm_reference, inputs, **options)
        native = outputs_and_gradients(attention_lstm, inputs, **options)
        for name, ours, theirs, true in zip(names, native, plain, truth, strict=True):
            assert ours.dtype == dtype and ours.isfinite().all()
            found = [(ours - true).abs().max(), (theirs - true).abs().max(), true.abs().max()]
            errors[name] = [max(pair) for pair in zip(errors[name], found, strict=True)]
    floor = {torch.float32: 1e-6, torch.bfloat16: 2**-9, torch.float16: 2**-12}[dtype]
    for name, (error, plain_error, largest) in errors.items():
        assert error <= 2 * plain_error + floor * largest, f"{name}: {error:.2e}, plain {plain_error:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)  # on the CPU they have products of their own
def test_inputs_of_any_strides(device, dtype):
    inputs = make_inputs(device=device, dtype=dtype)
    expected = outputs_and_gradients(attention_lstm, inputs, images=IMAGES)
    strided = {name: torch.stack([x.detach()] * 2, dim=-1)[..., 0].requires_grad_() for name, x in inputs.items()}
    strided["context_weight"] = inputs["context_weight"].detach().t().contiguous().t().requires_grad_()
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    outputs = attention_lstm(**strided, images=IMAGES)
    random = torch.Generator().manual_seed(1)
    to_outputs = [torch.randn(x.shape, generator=random, dtype=torch.float64).to(x) for x in outputs]
    gradients = torch.autograd.grad(outputs, list(strided.values()), to_outputs)
    for found, true in zip([*outputs, *gradients], expected, strict=True):
        torch.testing.assert_close(found, true)


@pytest.mark.parametrize("op", [attention_lstm, attention_lstm_reference])
@pytest.mark.parametrize("sizes, images", [((0, 0, P, D, A, H), (0,)), ((2, 0, P, D, A, H), (2, 1))])
def test_no_rows(device, op, sizes, images):
    inputs = make_inputs(sizes, images, device=device)
    h, context, weights, *gradients = outputs_and_gradients(op, inputs, images=images)
    assert h.shape == (0, H) and context.shape == (0, D) and weights.shape == (0, P)
    for (name, tensor), gradient in zip(inputs.items(), gradients, strict=True):
        assert gradient.shape == tensor.shape and not gradient.any(), name


def test_the_same_bits_every_time(device):
    inputs = make_inputs((3, 2, 49, 64, 33, 32), device=device, dtype=torch.float32)
    first, *others = [outputs_and_gradients(attention_lstm, inputs, images=IMAGES) for _ in range(3)]
    for again in others:
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("op", [attention_lstm, attention_lstm_reference])
def test_autocast(device, op):
    inputs = make_inputs(device=device, dtype=torch.float32)
    half = {name: tensor.to(torch.bfloat16) for name, tensor in inputs.items()}
    expected = outputs_and_gradients(op, half, images=IMAGES)[:3]
    with torch.autocast(device, torch.bfloat16):
        outputs = op(**inputs, images=IMAGES)
    for found, true in zip(outputs, expected, strict=True):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found, true)
    sum(x.float().square().sum() for x in outputs).backward()
    assert all(tensor.grad.dtype == torch.float32 for tensor in inputs.values())


def test_opcheck(device):
    """The loop and its backward, which the op calls, for fake tensors."""
    inputs = [tensor.detach() for tensor in make_inputs(device=device).values()]
    features, keys, words, _, c, hidden_weight, _, context_weight, score_weight = inputs
    ops = torch.ops.attncap
    torch.library.opcheck(ops.attention_lstm, (*inputs, IMAGES, "tanh"))
    next_h, context, weights, *of_steps = ops.attention_lstm(*inputs, IMAGES, "tanh")
    weights_of_loop = (hidden_weight.t(), context_weight.t(), score_weight)
    grads = [torch.ones_like(x) for x in (next_h, context, weights)]
    for features_need_grad in (False, True):
        arguments = (*grads, features, keys, words, c, *weights_of_loop, context, weights, *of_steps, IMAGES, "tanh")
        torch.library.opcheck(ops.attention_lstm_backward, (*arguments, features_need_grad))


def test_is_differentiable_once():
    inputs = make_inputs()
    h, _, _ = attention_lstm(**inputs, images=IMAGES)
    [gradient] = torch.autograd.grad(h.square().sum(), [inputs["h"]], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("op", [attention_lstm, attention_lstm_reference])
@pytest.mark.parametrize(
    "change, message",
    [
        ({"activation": "gelu"}, 'activation is "tanh" or "relu", not \'gelu\''),
        ({"images": ()}, "never rise, not \\[\\]"),
        ({"images": (2, 3)}, "never rise, not \\[2, 3\\]"),
        ({"images": (5, 1)}, "from 4 to 0 that never rise, not \\[5, 1\\]"),
        ({"images": (3, -1)}, "never rise, not \\[3, -1\\]"),
        ({"images": (3, 3)}, "words has shape \\[18, 16\\], but \\[12, 16\\]"),
        ({"h": torch.zeros(7, H, dtype=torch.double)}, "h has 7 rows, which is no multiple of the 4 images"),
        ({"keys": torch.zeros(4, 5, 0, dtype=torch.double)}, "at least one cell, channel, attention and hidden unit"),
        ({"features": torch.zeros(4, 5, 6)}, "keys has dtype torch.float64, but torch.float32"),
        ({"features": torch.zeros(4, 5, 6).long()}, "features has dtype torch.int64"),
        ({"hidden_bias": torch.zeros(3, dtype=torch.double)}, "hidden_bias has shape \\[3\\], but \\[25\\]"),
    ],
)
def test_wrong_calls(op, change, message):
    with pytest.raises(ValueError, match=message):
        op(**{**make_inputs(), "images": IMAGES, **change})


@pytest.mark.parametrize(
    "name, change",
    [
        ("features", lambda x: x[:, :, 1:]),
        ("keys", lambda x: x[1:]),
        ("words", lambda x: x[1:]),
        ("h", lambda x: x[1:]),
        ("c", lambda x: x.float()),
        ("hidden_weight", lambda x: x[1:]),
        ("hidden_bias", lambda x: x[1:]),
        ("context_weight", lambda x: x[:, 1:]),
        ("score_weight", lambda x: x[1:]),
        ("hidden_bias", lambda x: x[:1]),
        ("images", lambda images: (*images, 1)),
        ("images", lambda images: (3, 4, 1, 1)),
        ("images", lambda images: (5, 3, 1, 0)),
        ("images", lambda images: (4, 4, 2, -1)),
    ],
)
def test_the_loop_checks_for_itself(name, change):
    inputs = {name: tensor.detach() for name, tensor in make_inputs().items()} | {"images": IMAGES}
    told = {"images": "images|words", "features": "hidden_weight"}.get(name, name)  # whose sizes follow from others
    with pytest.raises(RuntimeError, match=f"attention.*{told}"):
        torch.ops.attncap.attention_lstm(**inputs | {name: change(inputs[name])}, activation="tanh")


@pytest.mark.parametrize("place", range(15))
def test_its_backward_checks_for_itself(place):
    inputs = [tensor.detach() for tensor in make_inputs().values()]
    features, keys, words, _, c, hidden_weight, _, context_weight, score_weight = inputs
    next_h, context, weights, *of_steps = torch.ops.attncap.attention_lstm(*inputs, IMAGES, "tanh")
    weights_of_loop = (hidden_weight.t(), context_weight.t(), score_weight)
    arguments = [next_h, context, weights, features, keys, words, c, *weights_of_loop, context, weights, *of_steps]
    arguments[place] = arguments[place][1:]
    with pytest.raises(RuntimeError):
        torch.ops.attncap.attention_lstm_backward(*arguments, IMAGES, "tanh", True)


@pytest.mark.parametrize("dtype, most", [(torch.double, 5120), (torch.float32, 10240), (torch.bfloat16, 10240)])
def test_too_many_cells_for_cuda(dtype, most):
    with FakeTensorMode():  # tensors without values: no GPU is needed
        inputs = make_inputs((1, 1, most + 1, 2, 1, 1), (1,), device="cuda", dtype=dtype)
        with pytest.raises(ValueError, match=f"features has {most + 1} cells; on CUDA {most} of {dtype} is the most"):
            attention_lstm(**inputs, images=(1,))


def test_weights_laid_out_for_another_dtype():
    inputs = {name: tensor.detach().bfloat16() for name, tensor in make_inputs().items()}
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN lays out no bfloat16 here")
    inputs["hidden_weight"] = torch.ops.mkldnn._reorder_linear_weight(inputs["hidden_weight"])
    with pytest.raises(RuntimeError, match="float32 alone"):
        torch.ops.attncap.attention_lstm(**inputs, images=IMAGES, activation="tanh")
