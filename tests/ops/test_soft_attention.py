"""soft_attention is compared with float64, finite differences and a case worked by hand, on every device."""

import math

import pytest
import torch

from attncap.ops import soft_attention, soft_attention_reference
from attncap.ops.soft_attention import check_cells

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]
on_every_device = pytest.mark.parametrize("device", DEVICES)
both_activations = pytest.mark.parametrize("activation", ["tanh", "relu"])
# Relative to the largest true value: the error that is allowed in addition to twice the error of the reference.
FLOOR = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2**-9, torch.float16: 2**-12}


def make_inputs(B, K, P, D, A, *, device="cpu", dtype=torch.float64, seed=0, scale=1):
    """Random features, keys, query, score_weight and gate, with scores of order 1; keys and query are scaled."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        values = torch.randn(*shape, generator=random, dtype=torch.float64)
        return values.to(device, dtype).requires_grad_()

    score_weight = normal(A).detach().div(math.sqrt(A)).requires_grad_()
    keys, query = (normal(*shape).detach().mul(scale).requires_grad_() for shape in ((B, P, A), (B * K, A)))
    return normal(B, P, D), keys, query, score_weight, normal(B * K, D)


def make_mask(B, P, device="cpu"):
    """Random, with at least one cell per image."""
    mask = torch.rand(B, P, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[:, 0] = True
    return mask.to(device)


def outputs_and_gradients(op, inputs, **options):
    """Both outputs and, for random gradients of these, the gradients of the five inputs."""
    *tensors, gate = [t.detach().clone().requires_grad_() for t in inputs]
    context, weights = op(*tensors, gate=gate, **options)
    random = torch.Generator().manual_seed(2)
    context_grad = torch.randn(context.shape, generator=random).to(context)
    weights_grad = torch.randn(weights.shape, generator=random).to(weights)
    gradients = torch.autograd.grad([context, weights], [*tensors, gate], [context_grad, weights_grad])
    return [context.detach(), weights.detach(), *gradients]


NAMES = ["context", "weights", "features", "keys", "query", "score_weight", "gate"]


def check_error_rule(*sizes, mask=None, activation="tanh", seeds=4, **options):
    """The kernel's error against float64 is at most twice that of the reference in the same dtype. Each error is the
    largest of several problems, since for a single number the error of the reference can be tiny by chance."""
    errors = {name: [0, 0, 0] for name in NAMES}  # of the kernel, of the reference, and the largest true value
    for seed in range(seeds):
        inputs = make_inputs(*sizes, seed=seed, **options)
        native = outputs_and_gradients(soft_attention, inputs, activation=activation, mask=mask)
        reference = outputs_and_gradients(soft_attention_reference, inputs, activation=activation, mask=mask)
        wide = [t.double() for t in inputs]
        truth = outputs_and_gradients(soft_attention_reference, wide, activation=activation, mask=mask)
        for name, actual, expected, true in zip(NAMES, native, reference, truth, strict=True):
            assert actual.dtype == inputs[0].dtype and actual.shape == true.shape
            found = [(actual - true).abs().max(), (expected - true).abs().max(), true.abs().max()]
            assert actual.isfinite().all()
            errors[name] = [max(pair) for pair in zip(errors[name], found, strict=True)]
    for name, (error, reference_error, largest) in errors.items():
        allowed = 2 * reference_error + FLOOR[inputs[0].dtype] * largest
        assert error <= allowed, f"{name}: {error:.2e}, allowed {allowed:.2e}"


def test_hand_worked_case():
    # The scores of the two cells differ by ln 3, so the weights are 1/4 and 3/4. The gate is sigmoid(0) = 1/2.
    features = torch.tensor([[[4.0, 0.0], [8.0, 4.0]]])
    keys = torch.tensor([[[1.0], [1.0 + math.log(3)]]])
    query, score_weight = torch.tensor([[1.0]]), torch.tensor([1.0])
    for op in soft_attention, soft_attention_reference:
        context, weights = op(features, keys, query, score_weight, activation="relu")
        torch.testing.assert_close(weights, torch.tensor([[0.25, 0.75]]))
        torch.testing.assert_close(context, torch.tensor([[7.0, 3.0]]))
        gate = torch.zeros(1, 2)
        context, _ = op(features, keys, query, score_weight, activation="relu", gate=gate)
        torch.testing.assert_close(context, torch.tensor([[3.5, 1.5]]))


@on_every_device
@both_activations
@pytest.mark.parametrize("dtype", list(FLOOR), ids=str)
@pytest.mark.parametrize("P", [1, 7, 49, 196, 197])
def test_error_rule_dtypes(device, activation, dtype, P):
    check_error_rule(2, 3, P, 100, 100, activation=activation, device=device, dtype=dtype)
    check_error_rule(2, 3, P, 100, 100, activation=activation, device=device, dtype=dtype, mask=make_mask(2, P, device))


@on_every_device
@both_activations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1e-3, 10, 100])
def test_error_rule_small_and_saturated(device, activation, dtype, scale):
    """The derivative of a saturated tanh is 0; that of an approximation may not be."""
    check_error_rule(2, 3, 49, 100, 100, activation=activation, device=device, dtype=dtype, scale=scale)


@on_every_device
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_saturated_units_have_no_gradient(device, dtype):
    keys = torch.tensor([[[8.0, 10.0, 12.0, 20.0], [9.0, 11.0, 13.0, 21.0]]], device=device, dtype=dtype)
    features = torch.tensor([[[0.0], [100.0]]], device=device, dtype=dtype)
    query, score_weight = torch.zeros(1, 4).to(keys), torch.full((4,), 100.0).to(keys)
    context, _ = soft_attention(features, keys.requires_grad_(), query, score_weight)
    context.sum().backward()
    true = 100 * 25 * (1 - torch.tensor([8.0, 10.0, 12.0, 20.0]).double().tanh() ** 2)
    torch.testing.assert_close(keys.grad[0, 1].cpu().abs().double() < 2 * true + 1e-4, torch.ones(4).bool())


@on_every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("K", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 32])
def test_error_rule_rows(device, dtype, K):
    check_error_rule(2, K, 11, 24, 16, device=device, dtype=dtype)


@on_every_device
@pytest.mark.parametrize("B", [1, 8, 20, 40, 70, 150])  # on a GPU with clusters: 16, 16, 8, 4, 2 and 1 blocks an image
def test_error_rule_images(device, B):
    check_error_rule(B, 5, 40, 64, 32, device=device, dtype=torch.bfloat16, seeds=1)


@on_every_device
@pytest.mark.parametrize("D", [1, 8, 100, 512, 2048])
@pytest.mark.parametrize("A", [1, 8, 100, 512, 2048])
def test_error_rule_sizes(device, D, A):
    check_error_rule(3, 2, 7, D, A, device=device, dtype=torch.float32)


@on_every_device
@pytest.mark.parametrize("A", [896, 1024, 1152, 1500])
def test_error_rule_little_shared_memory(device, A):
    """The fused kernel has room for the features of two times eight cells, three times four, three times two, none."""
    check_error_rule(1, 5, 200, 512, A, device=device, dtype=torch.float32, seeds=1)


@on_every_device
@both_activations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_rule_real_sizes(device, activation, dtype):
    check_error_rule(2, 5, 196, 2048, 512, activation=activation, device=device, dtype=dtype, seeds=2)


@on_every_device
def test_any_image_stride(device):
    """Features and keys of every other image, and one image expanded to several, are used without a copy."""
    inputs = make_inputs(4, 2, 7, 6, 5, device=device)
    features, keys = (t.detach()[::2] for t in inputs[:2])
    inputs = [
        features.contiguous(),
        keys.contiguous(),
        *(t.detach() for t in make_inputs(2, 2, 7, 6, 5, device=device)[2:]),
    ]
    expected = soft_attention(*inputs[:4], gate=inputs[4])
    found = soft_attention(features, keys, *inputs[2:4], gate=inputs[4])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    one = [t[:1].expand(2, -1, -1) for t in inputs[:2]]
    found = soft_attention(*one, *inputs[2:4], gate=inputs[4])
    expected = soft_attention(*(t.contiguous() for t in one), *inputs[2:4], gate=inputs[4])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@on_every_device
@both_activations
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_gradcheck(device, activation, masked, gated):
    *inputs, gate = make_inputs(2, 3, 5, 4, 3, device=device)
    if activation == "relu":  # finite differences must not step over the kink
        before = inputs[1].unsqueeze(1) + inputs[2].view(2, 3, 1, 3)
        assert before.abs().min() > 1e-4
    mask = make_mask(2, 5, device) if masked else None
    if masked:
        mask[1] = False

    def op(*tensors):
        *tensors, gate = tensors if gated else (*tensors, None)
        return soft_attention(*tensors, activation=activation, mask=mask, gate=gate)

    assert torch.autograd.gradcheck(op, (*inputs, gate) if gated else tuple(inputs))


@on_every_device
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_opcheck(device, masked, gated):
    *inputs, gate = make_inputs(2, 3, 5, 4, 3, device=device)
    mask = make_mask(2, 5, device) if masked else None
    gate = gate if gated else None
    ops = torch.ops.attncap
    torch.library.opcheck(ops.soft_attention, (*inputs, mask, gate, "tanh"))
    context, weights = soft_attention(*inputs, mask=mask, gate=gate)
    detached = [t if t is None else t.detach() for t in (context, weights, *inputs, gate, context, weights)]
    for features_need_grad in (False, True):
        arguments = (*detached, "tanh", features_need_grad)
        torch.library.opcheck(ops.soft_attention_backward, arguments)


@on_every_device
@both_activations
def test_keys_backward(device, activation):
    """Images with different numbers of rows; the second one has none."""
    _, keys, query, score_weight, _ = make_inputs(3, 4, 5, 6, 7, device=device)
    score_grad = torch.randn(12, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(device)
    image = torch.tensor([0] * 4 + [2] * 8, device=device)
    scores = getattr(torch, activation)(keys[image] + query.unsqueeze(1)) @ score_weight
    expected = torch.autograd.grad(scores, [keys, score_weight], score_grad)
    row_starts = torch.tensor([0, 4, 4, 12], device=device)
    op = torch.ops.attncap.soft_attention_keys_backward.default
    wide = torch.cat([torch.full_like(query, math.nan), query], dim=1).detach()  # for a stride between rows
    arguments = (keys.detach(), wide[:, 7:], score_weight.detach(), score_grad, row_starts, activation)
    torch.testing.assert_close(op(*arguments), expected)
    torch.library.opcheck(op, arguments)


@on_every_device
@pytest.mark.parametrize("P", [5, 200])
def test_query_and_gate_as_columns_of_one_product(device, P):
    """They are used without a copy, as in the search."""
    torch.manual_seed(0)
    B, N, D, A = 2, 6, 40, 24
    features, keys, score_weight = torch.randn(B, P, D), torch.randn(B, P, A), torch.randn(A)
    features, keys, score_weight = (x.to(device) for x in (features, keys, score_weight))
    for before in (0, 3, 16):  # rows are aligned, or not
        product = torch.randn(N, before + A + D, device=device)
        _, query, gate = product.split([before, A, D], dim=1)
        found = soft_attention(features, keys, query, score_weight, gate=gate)
        expected = soft_attention(features, keys, query.contiguous(), score_weight, gate=gate.contiguous())
        allowed = 1e-5 if device == "cuda" else 0  # on CUDA, other kernels compute what is not aligned
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=allowed, atol=allowed)


@on_every_device
def test_non_contiguous(device):
    inputs = make_inputs(2, 3, 7, 6, 5, device=device)
    strided = []
    for tensor in inputs:
        wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan).to(tensor)
        wide[..., ::2] = tensor.detach()
        strided.append(wide[..., ::2].requires_grad_())
    mask = make_mask(7, 2, device).T
    assert not any(t.is_contiguous() for t in (*strided, mask))
    expected = outputs_and_gradients(soft_attention, inputs, mask=mask.contiguous())
    *tensors, gate = strided
    context, weights = soft_attention(*tensors, gate=gate, mask=mask)
    assert torch.equal(context, expected[0]) and torch.equal(weights, expected[1])
    # The gradient of sum() has strides of 0.
    gradients = torch.autograd.grad(context.sum() + weights.square().sum(), strided)
    (tensors, gate), mask = (inputs[:4], inputs[4]), mask.contiguous()
    context, weights = soft_attention_reference(*tensors, gate=gate, mask=mask)
    expected = torch.autograd.grad(context.sum() + weights.square().sum(), inputs)
    torch.testing.assert_close(gradients, expected)


@on_every_device
@pytest.mark.parametrize("B, K", [(0, 0), (2, 0)])
def test_no_rows(device, B, K):
    inputs = make_inputs(B, K, 7, 6, 5, device=device)
    for op in soft_attention, soft_attention_reference:
        context, weights, *gradients = outputs_and_gradients(op, inputs)
        assert context.shape == (0, 6) and weights.shape == (0, 7)
        for tensor, gradient in zip(inputs, gradients, strict=True):
            assert gradient.shape == tensor.shape and not gradient.any()


@on_every_device
@pytest.mark.parametrize("op", [soft_attention, soft_attention_reference])
def test_fully_masked_rows_are_zero(device, op):
    mask = torch.tensor([[True, False, True, True], [False] * 4], device=device)
    inputs = make_inputs(2, 3, 4, 6, 5, device=device)
    context, weights, *gradients = outputs_and_gradients(op, inputs, mask=mask)
    assert weights[:3].sum(1).allclose(torch.ones(3).to(weights)) and not weights[:3, 1].any()
    assert not context[3:].any() and not weights[3:].any()
    features, keys, query, _, gate = gradients
    assert not any(t.any() for t in (features[1], keys[1], query[3:], gate[3:]))
    assert all(t.isfinite().all() for t in gradients)


@on_every_device
@pytest.mark.parametrize("op", [soft_attention, soft_attention_reference])
def test_masked_weights_are_zero_if_a_score_overflows(device, op):
    features, keys, query, score_weight, _ = (t.detach() for t in make_inputs(1, 2, 3, 4, 5, device=device))
    keys[0, 0] = torch.inf
    mask = torch.tensor([[True, True, False]], device=device)
    _, weights = op(features, keys, query, -score_weight.abs(), activation="relu", mask=mask)
    assert not weights[:, 2].any() and weights[:, 0].eq(0).all()
    keys[0, :] = torch.inf
    _, weights = op(features, keys, query, -score_weight.abs(), activation="relu", mask=mask)
    assert not weights[:, 2].any() and weights[:, :2].isnan().all()


@on_every_device
@both_activations
@pytest.mark.parametrize("dtype", list(FLOOR), ids=str)
def test_large_scores(device, activation, dtype):
    features, keys, query, score_weight, gate = make_inputs(2, 2, 9, 4, 4, device=device)
    score_weight = torch.tensor([1e4, -1e4, 5e3, 1.0])
    inputs = [t.detach().to(device, dtype) for t in (features, keys, query, score_weight, gate)]
    wide = outputs_and_gradients(soft_attention, [t.double() for t in inputs], activation=activation)
    for t in outputs_and_gradients(soft_attention, inputs, activation=activation)[:2]:
        assert t.isfinite().all()
    truth = outputs_and_gradients(soft_attention_reference, [t.double() for t in inputs], activation=activation)
    for actual, true in zip(wide, truth, strict=True):
        torch.testing.assert_close(actual, true)


@on_every_device
def test_deterministic(device):
    inputs = make_inputs(5, 3, 49, 64, 33, device=device, dtype=torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        first, *others = [outputs_and_gradients(soft_attention, inputs) for _ in range(4)]
    finally:
        torch.use_deterministic_algorithms(False)
    for again in others:
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("B", [1, 3, 8])
def test_same_bits_with_any_number_of_threads(B):
    inputs = make_inputs(B, 5, 49, 600, 33, dtype=torch.float32)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            results.append(outputs_and_gradients(soft_attention, inputs))
        finally:
            torch.set_num_threads(before)
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


@on_every_device
def test_without_a_gradient_of_the_features(device):
    features, keys, query, score_weight, gate = make_inputs(2, 3, 5, 4, 3, device=device)
    context, _ = soft_attention(features.detach(), keys, query, score_weight, gate=gate)
    context.sum().backward()
    frozen = [t.grad for t in (keys, query, score_weight, gate)]
    context, _ = soft_attention_reference(*(inputs := make_inputs(2, 3, 5, 4, 3, device=device))[:4], gate=inputs[4])
    context.sum().backward()
    for actual, expected in zip(frozen, inputs[1:], strict=True):
        torch.testing.assert_close(actual, expected.grad)


@on_every_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", [soft_attention, soft_attention_reference])
def test_autocast(device, dtype, op):
    inputs = make_inputs(2, 3, 7, 6, 5, device=device, dtype=torch.float32)
    expected = outputs_and_gradients(op, [t.to(dtype) for t in inputs])
    inputs[0].data = inputs[0].data.to(dtype)  # like the features of an encoder under autocast
    with torch.autocast(device, dtype):
        context, weights = op(*inputs[:4], gate=inputs[4])
    assert context.dtype == dtype
    torch.testing.assert_close(context, expected[0])
    torch.testing.assert_close(weights.to(dtype), expected[1])
    context.sum().backward()
    assert [t.grad.dtype for t in inputs] == [dtype] + [torch.float32] * 4


@pytest.mark.slow
@on_every_device
@both_activations
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph(device, activation, backend):
    compiled = torch.compile(soft_attention, fullgraph=True, backend=backend, dynamic=True)
    for B, K in [(2, 3), (3, 1)]:
        inputs = make_inputs(B, K, 5, 4, 3, device=device)
        options = {"activation": activation, "mask": make_mask(B, 5, device)}
        expected = outputs_and_gradients(soft_attention, inputs, **options)
        for actual, eager in zip(outputs_and_gradients(compiled, inputs, **options), expected, strict=True):
            torch.testing.assert_close(actual, eager)


class Attention(torch.nn.Module):
    def forward(self, features, keys, query, score_weight, gate):
        return soft_attention(features, keys, query, score_weight, activation="relu", gate=gate)


@on_every_device
def test_export(device):
    inputs = [t.detach() for t in make_inputs(2, 1, 5, 4, 3, device=device)]
    images, cells = torch.export.Dim("images"), torch.export.Dim("cells", max=5120)  # the most in float64 on CUDA
    shapes = ({0: images, 1: cells}, {0: images, 1: cells}, {0: images}, {}, {0: images})
    exported = torch.export.export(Attention(), tuple(inputs), dynamic_shapes=shapes)
    for B, P in [(2, 5), (4, 7)]:
        inputs = [t.detach() for t in make_inputs(B, 1, P, 4, 3, device=device)]
        for actual, eager in zip(exported.module()(*inputs), Attention()(*inputs), strict=True):
            assert torch.equal(actual, eager)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cuda_graph(dtype):
    inputs = make_inputs(4, 5, 49, 64, 32, device="cuda", dtype=dtype)
    outputs_and_gradients(soft_attention, inputs)  # warm up
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    context_grad, weights_grad = (torch.randn(20, n, device="cuda", dtype=dtype) for n in (64, 49))

    def step():
        context, weights = soft_attention(*inputs[:4], gate=inputs[4])
        return context, weights, *torch.autograd.grad([context, weights], inputs, [context_grad, weights_grad])

    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for tensor, other in zip(
            inputs, make_inputs(4, 5, 49, 64, 32, device="cuda", dtype=dtype, seed=1), strict=True
        ):
            tensor.copy_(other)
    graph.replay()
    for actual, eager in zip(captured, step(), strict=True):
        assert torch.equal(actual, eager)


@pytest.mark.parametrize("op", [soft_attention, soft_attention_reference])
@pytest.mark.parametrize(
    "change, message",
    [
        ({"activation": "gelu"}, 'activation must be "tanh" or "relu", not \'gelu\''),
        ({"features": torch.zeros(2, 4)}, "features \\[B, P, D\\]"),
        ({"features": torch.zeros(2, 0, 4), "keys": torch.zeros(2, 0, 3)}, "at least 1"),
        ({"query": torch.zeros(5, 3)}, "query has 5 rows, which is not a multiple of the 2 images"),
        ({"keys": torch.zeros(2, 6, 3)}, "keys has shape \\[2, 6, 3\\], but must be \\[2, 5, 3\\]"),
        ({"score_weight": torch.zeros(4)}, "score_weight has shape \\[4\\], but must be \\[3\\]"),
        ({"gate": torch.zeros(6, 3)}, "gate has shape \\[6, 3\\], but must be \\[6, 4\\]"),
        ({"mask": torch.zeros(2, 4, dtype=torch.bool)}, "mask has shape"),
        ({"mask": torch.zeros(2, 5)}, "mask has dtype torch.float32, but must be torch.bool"),
        ({"query": torch.zeros(6, 3).double()}, "query has dtype torch.float64"),
        ({"features": torch.zeros(2, 5, 4).long()}, "features has dtype torch.int64"),
        ({"keys": torch.zeros(2, 5, 3, device="meta")}, "keys is on meta, but the other tensors are on cpu"),
    ],
)
def test_invalid_arguments(op, change, message):
    arguments = {
        "features": torch.zeros(2, 5, 4),
        "keys": torch.zeros(2, 5, 3),
        "query": torch.zeros(6, 3),
        "score_weight": torch.zeros(3),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        op(**arguments)


@pytest.mark.parametrize("dtype, limit", [(torch.double, 5120), (torch.float32, 10240), (torch.bfloat16, 10240)])
def test_too_many_cells_for_cuda(monkeypatch, dtype, limit):
    *tensors, gate = make_inputs(1, 1, limit + 1, 2, 1, dtype=dtype)
    check_cells(tensors[0])  # on the CPU there is no limit
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)  # the check needs no GPU
    with pytest.raises(
        ValueError, match=f"has {limit + 1} cells, but on CUDA at most {limit} of {dtype} are supported"
    ):
        soft_attention(*tensors, gate=gate)
    check_cells(tensors[0][:, 1:])  # exactly the limit


def test_the_kernel_checks_its_arguments():
    features, keys, query, score_weight, _ = make_inputs(2, 3, 5, 4, 3)
    op = torch.ops.attncap.soft_attention.default
    with pytest.raises(RuntimeError, match="keys has sizes that do not match"):
        op(features, keys[:, :4], query, score_weight, None, None, "tanh")
    with pytest.raises(RuntimeError, match="query has the wrong dtype"):
        op(features, keys, query.float(), score_weight, None, None, "tanh")
    with pytest.raises(RuntimeError, match="the same number of rows for every image"):
        op(features, keys, query[:5], score_weight, None, None, "tanh")
    with pytest.raises(RuntimeError, match='"tanh" or "relu", not "gelu"'):
        op(features, keys, query, score_weight, None, None, "gelu")


@on_every_device
def test_scores_that_overflow_are_not_hidden(device):
    """Without a mask, a row whose scores are all -inf becomes NaN in both implementations, so that an overflow shows in
    the loss."""
    features, keys, query, score_weight, _ = make_inputs(1, 2, 3, 4, 5, device=device)
    keys, score_weight = torch.full_like(keys, torch.inf), -torch.ones_like(score_weight)
    for op in (soft_attention, soft_attention_reference):
        context, weights = op(features, keys, query, score_weight, activation="relu")
        assert context.isnan().all() and weights.isnan().all()


def test_second_derivative_is_an_error():
    inputs = make_inputs(2, 2, 3, 4, 5)[:4]
    context, _ = soft_attention(*inputs)
    (gradient,) = torch.autograd.grad(context.square().sum(), inputs[1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
