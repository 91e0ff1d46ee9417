"""lstm_step is compared with torch.nn.LSTMCell in float64, on every device."""

import pytest
import torch
from torch import Tensor

from attncap.ops import lstm_step, lstm_step_reference

both_ops = pytest.mark.parametrize("op", [lstm_step, lstm_step_reference])
# Relative to the largest true value: the error that is allowed in addition to twice the error of the reference.
FLOOR = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2**-9, torch.float16: 2**-12}
every_dtype = pytest.mark.parametrize("dtype", list(FLOOR), ids=str)


def make_inputs(N, H, E, R=5, V=11, *, device="cpu", dtype=torch.float64, seed=0, scale=1) -> list[Tensor]:
    """Random recurrent, context_part, word_table, c, parents and tokens."""
    random = torch.Generator().manual_seed(seed)
    shapes = [(R, 4 * H), (R, 4 * H + E), (V, 4 * H + E), (R, H)]
    values = [(scale * torch.randn(*shape, generator=random)).to(device, dtype) for shape in shapes]
    return values + [torch.randint(0, high, (N,), generator=random).to(device) for high in (R, V)]


def largest_errors(op, inputs: list[Tensor]) -> list[tuple[float, float]]:
    """For each of h', c' and output: the largest error against float64, and the largest true value."""
    numbers, (parents, tokens) = inputs[:4], inputs[4:]
    found = op(*inputs)
    truth = lstm_step_reference(*(x.double() for x in numbers), parents, tokens)
    (N, H), E = (len(parents), inputs[3].shape[1]), inputs[2].shape[1] - inputs[0].shape[1]
    assert [x.shape for x in found] == [(N, H), (N, H), (N, E)]
    assert all(x.dtype == inputs[0].dtype and x.isfinite().all() for x in found)
    pairs = [((actual - true).abs(), true.abs()) for actual, true in zip(found, truth, strict=True)]
    return [tuple(x.max().item() if x.numel() else 0 for x in pair) for pair in pairs]


def check_error_rule(*sizes, seeds=4, **options):
    """The kernel's error against float64 is at most twice that of the reference in the same dtype. Each error is the
    largest of several problems, since for a single number the error of the reference can be tiny by chance."""
    problems = [make_inputs(*sizes, seed=seed, **options) for seed in range(seeds)]
    native, reference = ([largest_errors(op, inputs) for inputs in problems] for op in (lstm_step, lstm_step_reference))
    native, reference = (zip(*errors, strict=True) for errors in (native, reference))  # by output
    for name, actual, expected in zip(["h", "c", "output"], native, reference, strict=True):
        error, reference_error = (max(error for error, _ in pairs) for pairs in (actual, expected))
        allowed = 2 * reference_error + FLOOR[problems[0][0].dtype] * max(true for _, true in actual)
        assert error <= allowed, f"{name}: {error:.2e}, allowed {allowed:.2e}"


@both_ops
@pytest.mark.parametrize("E", [0, 5])
def test_matches_lstm_cell(device, op, E):
    """The inputs are computed with the weights of an LSTMCell."""
    R, N, V, D, H, embedding_size = 4, 7, 11, 6, 9, 3
    torch.manual_seed(0)
    cell = torch.nn.LSTMCell(embedding_size + D, H).double().to(device)
    embeddings, contexts, h, c = (torch.randn(*shape).double().to(device) for shape in [(V, 3), (R, D), (R, H), (R, H)])
    context_output, word_output = (torch.randn(n, E).double().to(device) for n in (R, V))  # for the output layer
    parents, tokens = torch.randint(0, R, (N,)).to(device), torch.randint(0, V, (N,)).to(device)
    with torch.no_grad():
        expected = cell(torch.cat([embeddings[tokens], contexts[parents]], dim=1), (h[parents], c[parents]))
        recurrent = h @ cell.weight_hh.T
        context_part = contexts @ cell.weight_ih[:, embedding_size:].T
        word_table = embeddings @ cell.weight_ih[:, :embedding_size].T + cell.bias_ih + cell.bias_hh
    context_part = torch.cat([context_part, context_output], dim=1)
    word_table = torch.cat([word_table, word_output], dim=1)
    actual = op(recurrent, context_part, word_table, c, parents, tokens)
    torch.testing.assert_close(actual, (*expected, context_output[parents] + word_output[tokens]))


@both_ops
def test_hand_worked_case(device, op):
    # In unit 0, i = f = o = sigmoid(0) = 1/2; in unit 1, i = f = o = 1. In both, g = tanh(ln 2) = 3/5.
    big, log2 = 100.0, 0.6931471805599453
    recurrent = torch.tensor([[0, 1, 0, 1, 0, 1, 0, 1]], device=device) * torch.tensor(big, device=device)
    context_part = torch.tensor([[0, 0, 0, 0, log2, -big, 0, 0, 3]], device=device)
    word_table = torch.tensor([[99.0] * 9, [0, 0, 0, 0, 0, log2, 0, 0, 4]], device=device)
    c, parents, tokens = torch.tensor([[2.0, 0.4]], device=device), *torch.tensor([[0], [1]], device=device)
    found = op(recurrent, context_part, word_table, c, parents, tokens)
    next_c = torch.tensor([[0.5 * 2 + 0.5 * 0.6, 0.4 + 0.6]])
    next_h = next_c.tanh() * torch.tensor([0.5, 1])
    for actual, expected in zip(found, [next_h, next_c, torch.tensor([[7.0]])], strict=True):
        torch.testing.assert_close(actual.cpu(), expected)


@every_dtype
@pytest.mark.parametrize("H", [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 100, 512])
def test_error_rule_sizes(device, dtype, H):
    for E in (0, 1, H - 1, H + 1):
        check_error_rule(6, H, E, device=device, dtype=dtype)


@every_dtype
def test_error_rule_rows(device, dtype):
    for N, R in [(1, 1), (3, 50), (160, 32), (320, 7)]:
        check_error_rule(N, 24, 10, R, 30, device=device, dtype=dtype, seeds=2)


@every_dtype
@pytest.mark.parametrize("scale", [1e-3, 10, 100])
def test_error_rule_small_and_saturated(device, dtype, scale):
    check_error_rule(6, 33, 5, device=device, dtype=dtype, scale=scale)


@both_ops
@every_dtype
@pytest.mark.parametrize("R", [0, 5])
def test_no_rows(device, op, dtype, R):
    """No rows continue; the previous step has R."""
    recurrent, context_part, word_table, c, *none = make_inputs(0, 8, 3, device=device, dtype=dtype)
    found = op(recurrent[:R], context_part[:R], word_table, c[:R], *none)
    assert [tuple(x.shape) for x in found] == [(0, 8), (0, 8), (0, 3)] and {x.dtype for x in found} == {dtype}


@both_ops
@every_dtype
def test_strides(device, op, dtype):
    """Any stride between rows of recurrent and context_part; all other strided tensors are copied."""
    inputs = make_inputs(6, 9, 5, device=device, dtype=dtype)
    expected = op(*inputs)
    apart = [torch.cat([x, torch.full_like(x, torch.nan)], dim=1)[:, : x.shape[1]] for x in inputs[:2]]
    with_gaps = [torch.stack([x, torch.zeros_like(x)], dim=-1)[..., 0] for x in inputs]
    assert not any(x.is_contiguous() for x in (*apart, *with_gaps))
    for strided in ([*apart, *inputs[2:]], with_gaps):
        assert all(torch.equal(a, b) for a, b in zip(op(*strided), expected, strict=True))
    one = [x[:1].expand(5, -1) for x in inputs[:2]]
    expected = op(*(x.contiguous() for x in one), *inputs[2:])
    assert all(torch.equal(a, b) for a, b in zip(op(*one, *inputs[2:]), expected, strict=True))


@both_ops
@every_dtype
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_not_finite_values_affect_only_their_row(device, op, dtype, value):
    """An infinite gate is fully open or closed; NaN stays NaN."""
    inputs = make_inputs(5, 19, 2, device=device, dtype=dtype)
    inputs[4] = torch.arange(5, device=device)
    inputs[0][2, :19] = value  # the input gate
    h, c, _ = op(*inputs)
    assert h[[0, 1, 3, 4]].isfinite().all() and c[[0, 1, 3, 4]].isfinite().all()
    expected = torch.sigmoid(torch.tensor(value))
    if expected.isnan():
        assert h[2].isnan().all() and c[2].isnan().all()
    else:
        gates = (inputs[0][2] + inputs[1][2, :76] + inputs[2][inputs[5][2], :76]).double().view(4, 19)
        true = gates[1].sigmoid() * inputs[3][2].double() + expected * gates[2].tanh()
        torch.testing.assert_close(c[2].double(), true, rtol=0, atol=0.05 if dtype.itemsize == 2 else 1e-5)


def test_same_bits_with_any_number_of_threads():
    inputs, before, results = make_inputs(300, 64, 32, dtype=torch.float32), torch.get_num_threads(), []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        try:
            results.append(lstm_step(*inputs))
        finally:
            torch.set_num_threads(before)
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


@every_dtype
@pytest.mark.parametrize("E", [0, 5])
def test_opcheck(device, dtype, E):
    torch.library.opcheck(torch.ops.attncap.lstm_step.default, make_inputs(6, 9, E, device=device, dtype=dtype))


@pytest.mark.slow
@both_ops
def test_compile_fullgraph(device, op):
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=True)
    for N, R in [(6, 3), (4, 7)]:
        inputs = make_inputs(N, 9, 5, R, device=device)
        assert all(torch.equal(a, b) for a, b in zip(compiled(*inputs), op(*inputs), strict=True))


NAMES = ["recurrent", "context_part", "word_table", "c", "parents", "tokens"]


@both_ops
@pytest.mark.parametrize(
    "change, message",
    [
        ({"c": torch.zeros(5)}, r"takes word_table \[V, 4H \+ E\], c \[R, H\] .* not \[11, 37\], \[5\] and \[6\]"),
        ({"c": torch.zeros(5, 0)}, "H of at least 1"),
        ({"word_table": torch.zeros(37)}, "takes word_table"),
        ({"parents": torch.zeros(6, 1).long()}, r"parents \[N\], not .* and \[6, 1\]"),
        ({"word_table": torch.zeros(11, 31)}, "word_table has 31 columns, fewer than 4H = 32"),
        ({"recurrent": torch.zeros(5, 31)}, r"recurrent has shape \[5, 31\], but must be \[5, 32\] to match c"),
        ({"recurrent": torch.zeros(4, 32)}, r"recurrent has shape \[4, 32\], but must be \[5, 32\]"),
        ({"context_part": torch.zeros(5, 32)}, r"context_part has shape \[5, 32\], but must be \[5, 37\]"),
        ({"tokens": torch.zeros(5).long()}, r"tokens has shape \[5\], but must be \[6\]"),
        ({"recurrent": torch.zeros(5, 32).double()}, "recurrent has dtype torch.float64, but must be torch.float32"),
        (
            {"context_part": torch.zeros(5, 37).half()},
            "context_part has dtype torch.float16, but must be torch.float32",
        ),
        ({"word_table": torch.zeros(11, 37).double()}, "word_table has dtype torch.float64, but must be torch.float32"),
        ({"parents": torch.zeros(6).int()}, "parents has dtype torch.int32, but must be torch.int64"),
        ({"tokens": torch.zeros(6)}, "tokens has dtype torch.float32, but must be torch.int64"),
        ({"c": torch.zeros(5, 8).int()}, "c has dtype torch.int32; lstm_step takes float32, bfloat16, float16 and"),
        ({"word_table": torch.zeros(11, 37, device="meta")}, "word_table is on meta, but the other tensors are on cpu"),
    ],
)
def test_invalid_arguments(op, change, message):
    arguments = dict(zip(NAMES, make_inputs(6, 8, 5, dtype=torch.float32), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        op(**arguments)


def test_the_kernel_checks_its_arguments():
    inputs = make_inputs(6, 8, 5)
    for name, changed, message in [
        ("recurrent", inputs[0][:, :-1], "recurrent has sizes that do not match"),
        ("context_part", inputs[1][:4], "context_part has sizes that do not match"),
        ("word_table", inputs[2][:, :31], "at least 4H columns"),
        ("word_table", inputs[2].float(), "word_table has the wrong dtype"),
        ("c", inputs[3][0], "lstm_step takes recurrent"),
        ("parents", inputs[4].int(), "parents has the wrong dtype"),
        ("tokens", inputs[5][:5], "tokens has sizes that do not match"),
    ]:
        arguments = dict(zip(NAMES, inputs, strict=True)) | {name: changed}
        with pytest.raises(RuntimeError, match=message):
            torch.ops.attncap.lstm_step.default(**arguments)
