"""beam_search_step is compared with a naive implementation in Python and float64, and with a case worked by hand, on
every device."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from attncap.ops import beam_search_step, beam_search_step_reference
from attncap.ops.beam_search_step import DTYPES, BeamSearchStep

both_ops = pytest.mark.parametrize("op", [beam_search_step, beam_search_step_reference])
both_methods = pytest.mark.parametrize("shrink", [True, False], ids=["shrink", "fixed"])
NEAR = 5e-5  # problems in which a choice depends on a smaller difference of scores are not used


def naive_step(
    logits,
    scores,
    finished,
    *,
    end,
    end_allowed=True,
    shrink=True,
    suppressed=None,
    penalty_tokens=None,
    penalties=None,
    temperature=1.0,
    length_penalty=1.0,
    last_length_penalty=1.0,
) -> tuple[BeamSearchStep, float]:
    """Follows the docstring, one candidate at a time. Also returns the smallest difference of scores on which a choice
    depends, other than ties."""
    (B, J), K, V = scores.shape, finished.shape[1], logits.shape[1]
    log_probs = (logits.double() / temperature).log_softmax(1).tolist()
    is_allowed = [True] * V if suppressed is None else (~suppressed).tolist()
    results, margin = [], math.inf
    for b in range(B):
        candidates = []  # (score, beam, token)
        for j, score in enumerate(scores[b].tolist()):
            total = {}
            if penalty_tokens is not None:
                for w, penalty in zip(penalty_tokens[b * J + j].tolist(), penalties[b * J + j].tolist(), strict=True):
                    total[w] = total.get(w, 0) + penalty
            candidates += [
                (score + log_probs[b * J + j][w] - total.get(w, 0), j, w)
                for w in range(V)
                if (end_allowed if w == end else is_allowed[w])
            ]
        candidates = sorted((c for c in candidates if c[0] > -math.inf), key=lambda c: (-c[0], c[1], c[2]))
        hypotheses = [score for score in finished[b].tolist() if score > -math.inf]
        width = K - len(hypotheses) if shrink else K
        ended = [-math.inf] * J
        for score, j, w in candidates[:width]:
            if w == end:
                ended[j] = score
                hypotheses.append(score / length_penalty)
        hypotheses = sorted(hypotheses, reverse=True)[:K]
        live = [c for c in (candidates[:width] if shrink else candidates) if c[2] != end][:K]
        if not shrink and len(hypotheses) == K and live:
            attainable = live[0][0] / last_length_penalty
            margin = min(margin, abs(attainable - hypotheses[-1]))
            if attainable <= hypotheses[-1]:
                live = []
        last = max(width, candidates.index(live[-1]) + 1 if live else 0)
        ranked = [c[0] for c in candidates[: last + 1]]
        margin = min([margin, *(a - b for a, b in zip(ranked, ranked[1:], strict=False) if a != b)])
        missing = K - len(live)
        results.append(
            (
                [w for _, _, w in live] + [end] * missing,
                [b * J + j for _, j, _ in live] + [-1] * missing,
                [score for score, _, _ in live] + [-math.inf] * missing,
                ended,
                hypotheses + [-math.inf] * (K - len(hypotheses)),
            )
        )
    if not results:
        return None, margin
    return BeamSearchStep(*map(torch.tensor, zip(*results, strict=True))), margin


def check_step(found: BeamSearchStep, expected: BeamSearchStep, J: int):
    assert [x.dtype for x in found] == [torch.int64] * 2 + [torch.float32] * 3
    assert found.tokens.tolist() == expected.tokens.tolist()
    parents = found.parents.cpu()
    assert torch.equal(parents.where(expected.parents >= 0, -1), expected.parents)
    assert torch.equal(parents // J, torch.arange(len(parents)).unsqueeze(1).expand_as(parents))  # the image's rows
    for a, b in zip(found[2:], expected[2:], strict=True):
        torch.testing.assert_close(a.cpu(), b.float(), rtol=0, atol=NEAR / 4)


def make_problem(seed, B, J, K, V, *, dtype=torch.float32, coarse=False, share_impossible=0.0, M=None, twins=False):
    """Random (logits, scores, finished) and options.

    coarse: many logits of a row are equal. share_impossible: share of logits of -inf. M: number of penalties, or none.
    twins: the last beam of an image is identical to the first."""
    random = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=random)

    def integers(high, *shape, low=0):
        return torch.randint(low, high, shape, generator=random)

    logits = 3 * torch.randn(B * J, V, generator=random)
    if coarse:
        logits = logits.round()
    possible = (uniform(B * J, V) >= share_impossible) | (integers(V, B * J, 1) == torch.arange(V))  # at least one
    logits = logits.masked_fill(~possible, -torch.inf)
    scores = (-9 * uniform(B, J)).masked_fill(uniform(B, J) < 0.2, -torch.inf)
    ended = integers(K + 1, B, 1)  # number of hypotheses
    finished = -9 * uniform(B, K).sort(dim=1).values
    finished = finished.masked_fill(torch.arange(K) >= ended, -torch.inf)
    options = dict(end=int(integers(V, 1)), suppressed=uniform(V) < 0.2)
    if M is not None:
        amounts = 3 * uniform(B * J, M)
        amounts = amounts.masked_fill(uniform(B * J, M) < 0.3, torch.inf)
        options |= dict(penalty_tokens=integers(V, B * J, M, low=-1), penalties=amounts)
    if twins and J > 1:
        scores[:, -1] = scores[:, 0]
        for rows in (logits, options.get("penalty_tokens"), options.get("penalties")):
            if rows is not None:
                rows[J - 1 :: J] = rows[::J].clone()
    return (logits.to(dtype), scores, finished), options


def to_device(device, tensors, options):
    moved = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    return [x.to(device) for x in tensors], moved


def check_problem(device, op, tensors, options):
    expected, margin = naive_step(*tensors, **options)
    assert margin > NEAR  # if not, choose another seed
    inputs, moved = to_device(device, tensors, options)
    check_step(op(*inputs, **moved), expected, tensors[1].shape[1])


@both_ops
@settings(derandomize=True, deadline=None, max_examples=300)
@given(data=st.data())
def test_matches_the_naive_step(device, op, data):
    draw = data.draw
    tensors, options = make_problem(
        draw(st.integers(0, 2**32 - 1), "seed"),
        draw(st.integers(1, 4), "B"),
        draw(st.integers(1, 6) | st.just(32), "J"),
        draw(st.integers(1, 6) | st.just(32), "K"),
        draw(st.integers(1, 10) | st.integers(11, 70), "V"),
        dtype=draw(st.sampled_from(DTYPES), "dtype"),
        coarse=draw(st.booleans(), "coarse"),
        share_impossible=draw(st.sampled_from([0, 0, 0.3, 1]), "share_impossible"),
        M=draw(st.none() | st.integers(0, 9), "M"),
        twins=draw(st.booleans(), "twins"),
    )
    if draw(st.booleans(), "nothing suppressed"):
        options["suppressed"] = None
    length_penalty = draw(st.sampled_from([1.0, 0.9, 7.0]), "length_penalty")
    options |= dict(
        end_allowed=draw(st.booleans(), "end_allowed"),
        shrink=draw(st.booleans(), "shrink"),
        temperature=draw(st.sampled_from([1.0, 0.4, 3.0]), "temperature"),
        length_penalty=length_penalty,
        last_length_penalty=length_penalty * draw(st.sampled_from([1.0, 1.3, 6.0]), "growth"),
    )
    assume(naive_step(*tensors, **options)[1] > NEAR)
    check_problem(device, op, tensors, options)


@both_ops
def test_hand_worked_case(device, op):
    # The beams have probabilities 0.6 and 0.4; continued with <end> 0.30 and 0.04, with token 1 0.15 and 0.28, with
    # token 2 0.15 and 0.08.
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.7, 0.2]], device=device).log()
    scores, finished = torch.tensor([[0.6, 0.4]], device=device).log(), torch.full((1, 3), -torch.inf, device=device)
    for shrink, tokens, chances in [(True, [1, 1, 0], [0.28, 0.15, 0]), (False, [1, 1, 2], [0.28, 0.15, 0.15])]:
        found = op(logits, scores, finished, end=0, shrink=shrink, length_penalty=2)
        assert found.tokens.tolist() == [tokens] and found.parents.tolist() == [[1, 0, 0]]
        torch.testing.assert_close(found.scores.exp().cpu(), torch.tensor([chances]))
        torch.testing.assert_close(found.ended.exp().cpu(), torch.tensor([[0.3, 0]]))
        torch.testing.assert_close(found.finished.exp().cpu(), torch.tensor([[math.sqrt(0.3), 0, 0]]))


@both_ops
@both_methods
@pytest.mark.parametrize("J, K, V", [(1, 32, 5), (4, 8, 8), (5, 7, 3), (32, 1, 40), (32, 32, 1), (3, 32, 2000)])
def test_sizes(device, op, shrink, J, K, V):
    """V < K, K = V, J != K, no token but `end`, and V of many vectors."""
    for seed in range(3):
        tensors, options = make_problem(seed, 3, J, K, V, M=2)
        check_problem(device, op, tensors, options | dict(shrink=shrink))


@both_ops
@pytest.mark.parametrize(
    "B, J, K, V", [(1, 8, 32, 100_000), (1, 5, 5, 9490), (40, 5, 3, 3000), (3, 32, 10, 300)], ids=str
)
def test_few_images_with_many_tokens(device, op, B, J, K, V):
    """On CUDA, several blocks work on an image, as many as are free."""
    tensors, options = make_problem(2, B, J, K, V, M=1)
    check_problem(device, op, tensors, options | dict(shrink=False))


@both_ops
@both_methods
def test_no_images(device, op, shrink):
    tensors, options = make_problem(0, 0, 3, 4, 9, M=2)
    inputs, moved = to_device(device, tensors, options)
    found = op(*inputs, shrink=shrink, **moved)
    assert [tuple(x.shape) for x in found] == [(0, 4)] * 3 + [(0, 3), (0, 4)]


@both_ops
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_go_to_the_lower_beam_then_to_the_lower_token(device, op, dtype):
    for V in (7, 70, 700, 7000):
        logits = torch.zeros(2 * 3, V, device=device, dtype=dtype)
        logits[:, 5] = -0.0
        scores, finished = torch.zeros(2, 3, device=device), torch.full((2, 32), -torch.inf, device=device)
        found = op(logits, scores, finished, end=2, shrink=False)
        expected = [(j, w) for j in range(3) for w in range(V) if w != 2][:32]
        expected += [(0, 2)] * (32 - len(expected))  # no more candidates
        for b in range(2):
            assert found.tokens[b].tolist() == [w for _, w in expected]
            assert found.parents[b].tolist() == [3 * b + j for j, _ in expected]
        ends = [0, 1, 2] if V == 7 else [0]  # which of the candidates 2, V + 2 and 2V + 2 are among the first 32
        assert (found.ended > -torch.inf).tolist() == [[j in ends for j in range(3)]] * 2


@both_ops
@both_methods
@pytest.mark.parametrize(
    "what, value",
    [
        ("a logit", math.nan),
        ("a logit", math.inf),
        ("all logits", math.nan),
        ("all logits", math.inf),
        ("all logits", -math.inf),
        ("a score", math.nan),
    ],
)
def test_not_finite_values_affect_only_their_image(device, op, shrink, what, value):
    tensors, options = make_problem(0, 3, 4, 5, 40, M=2)
    tensors[1][1] = torch.tensor([-1.0, -2.0, -3.0, -torch.inf])
    inputs, moved = to_device(device, tensors, options)
    expected = op(*inputs, shrink=shrink, **moved)
    logits, scores, finished = (x.clone() for x in inputs)
    broken = {"a logit": logits[6, 33:34], "all logits": logits[6], "a score": scores[1, 2:3]}[what]
    broken.fill_(value)
    found = op(logits, scores, finished, shrink=shrink, **moved)
    assert found.scores[1].isnan().all() and (found.ended[1] == -torch.inf).all()
    assert found.tokens[1].tolist() == [options["end"]] * 5  # a valid token
    assert ((found.parents[1] >= 4) & (found.parents[1] < 8)).all()
    assert all(torch.equal(a[[0, 2]], b[[0, 2]]) for a, b in zip(found, expected, strict=True))
    next_step = op(logits[:3], found.scores[[1], :3], finished[1:2], end=0, shrink=shrink)
    assert next_step.scores.isnan().all()


@both_ops
def test_large_logits_lose_no_precision(device, op):
    """Adding a constant to all logits does not change the scores."""
    torch.manual_seed(0)
    logits = (torch.randn(6, 500) * 4 * 1024).round() / 1024  # 8192 can be added to them exactly
    logits[:, 0] = -50
    scores, finished = torch.zeros(2, 3), torch.full((2, 3), -torch.inf)
    best = logits.double().log_softmax(dim=1).view(2, -1).topk(3).values
    found = op((logits + 8192).to(device), scores.to(device), finished.to(device), end=0)
    torch.testing.assert_close(found.scores.cpu().double(), best, rtol=0, atol=2e-6)


@both_ops
@pytest.mark.parametrize("order", ["random", "ascending", "descending", "peak first", "peak last"])
@pytest.mark.parametrize("V", [9490, 50_000])
def test_scores_are_as_accurate_as_torchs(device, op, order, V):
    """The error is at most twice that of torch's log-softmax in float32, wherever the maximum of a row is."""
    torch.manual_seed(0)
    logits = 4 * torch.randn(32, V)
    if order == "ascending":
        logits = logits.sort(dim=1).values
    if order == "descending":
        logits = logits.sort(dim=1, descending=True).values
    if order.startswith("peak"):  # the other logits contribute little, or nothing
        logits[:, 1 if order == "peak first" else -1] = torch.linspace(10, 200, 32)
    logits[:, 0] = -torch.inf
    scores, finished = torch.zeros(32, 1), torch.full((32, 8), -torch.inf)
    found = op(logits.to(device), scores.to(device), finished.to(device), end=0)
    truth = logits.double().log_softmax(dim=1)
    torch_error = (logits.log_softmax(dim=1) - truth).nan_to_num(0).abs().max()
    error = (found.scores.cpu() - truth.gather(1, found.tokens.cpu())).abs().max()
    assert error <= 2 * torch_error
    assert torch.equal(found.tokens.cpu(), truth.topk(8).indices)


@both_ops
def test_lowest_finite_logits_are_not_infinite(device, op):
    """Logits of finfo.min, as from a mask, with -inf before and after."""
    lowest = torch.finfo(torch.float32).min
    logits = torch.full((2, 700), -torch.inf, device=device)
    logits[0, 300:600] = lowest
    logits[1, :600] = lowest
    logits[1, 650] = 0
    scores, finished = torch.zeros(2, 1, device=device), torch.full((2, 2), -torch.inf, device=device)
    found = op(logits, scores, finished, end=699)
    assert found.tokens.tolist() == [[300, 301], [650, 0]]
    torch.testing.assert_close(found.scores[0].cpu(), torch.full((2,), -math.log(300)))
    assert found.scores[1].tolist() == [0, lowest]


@both_ops
@both_methods
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_without_a_beam_are_ignored(device, op, shrink, value):
    tensors, options = make_problem(0, 3, 4, 5, 40)
    tensors[1][1] = torch.tensor([-1.0, -2.0, -torch.inf, -3.0])
    inputs, moved = to_device(device, tensors, options)
    expected = op(*inputs, shrink=shrink, **moved)
    inputs[0][6] = value
    found = op(*inputs, shrink=shrink, **moved)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def with_gaps(x: torch.Tensor) -> torch.Tensor:
    """The same values with a stride of 2 in the last dimension."""
    wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype, device=x.device)
    wide[..., ::2] = x
    return wide[..., ::2]


@both_ops
def test_strides(device, op):
    tensors, options = make_problem(0, 3, 4, 5, 37, M=3)
    (logits, scores, finished), moved = to_device(device, tensors, options)
    expected = op(logits, scores, finished, **moved)
    apart = torch.full((12, 50), torch.nan, device=device)
    apart[:, :37] = logits
    strided = {name: with_gaps(x) if isinstance(x, torch.Tensor) else x for name, x in moved.items()}
    for found in (
        op(apart[:, :37], scores, finished, **moved),
        op(logits.T.contiguous().T, scores, finished, **moved),
        op(with_gaps(logits), with_gaps(scores), with_gaps(finished), **strided),
    ):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    one = logits[:1].expand(12, -1)
    found, expected = (op(x, scores, finished, **moved) for x in (one, one.contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_same_bits_with_any_number_of_threads():
    inputs, options = make_problem(0, 40, 5, 5, 1000, M=3)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        try:
            results.append(beam_search_step(*inputs, **options))
        finally:
            torch.set_num_threads(before)
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


@both_methods
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(device, shrink, dtype):
    inputs, options = to_device(device, *make_problem(0, 3, 4, 5, 37, dtype=dtype, M=3))
    optional = [options.pop(name) for name in ("suppressed", "penalty_tokens", "penalties")]
    rest = (options["end"], True, shrink, 1.0, 1.0, 1.0)
    for values in (optional, [None] * 3):
        torch.library.opcheck(torch.ops.attncap.beam_search_step.default, (*inputs, *values, *rest))


@pytest.mark.slow
@both_ops
def test_compile_fullgraph(device, op):
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=True)
    for B, J in [(3, 4), (5, 2)]:
        inputs, options = to_device(device, *make_problem(0, B, J, 4, 37, M=3))
        options |= dict(end=2, shrink=False, temperature=0.5)
        found, expected = compiled(*inputs, **options), op(*inputs, **options)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


LONGS, FLOATS = torch.zeros(6, 2, dtype=torch.int64), torch.zeros(6, 2)


@both_ops
@pytest.mark.parametrize(
    "change, message",
    [
        ({"logits": torch.zeros(9)}, r"takes logits \[B \* J, V\], scores \[B, J\] and finished \[B, K\], not \[9\]"),
        ({"scores": torch.zeros(6)}, r"takes logits .* not \[6, 9\], \[6\] and \[2, 4\]"),
        ({"scores": torch.zeros(2, 0)}, "takes 1 to 32 beams per image, not 0 and 4"),
        ({"scores": torch.zeros(2, 33)}, "takes 1 to 32 beams per image, not 33 and 4"),
        ({"finished": torch.zeros(2, 0)}, "takes 1 to 32 beams per image, not 3 and 0"),
        ({"finished": torch.zeros(2, 33)}, "takes 1 to 32 beams per image, not 3 and 33"),
        ({"logits": torch.zeros(6, 9).double()}, "logits has dtype torch.float64; beam_search_step takes float32"),
        ({"end": 9}, "end is 9, but must be a token from 0 to 8"),
        ({"end": -1}, "end is -1, but must be a token from 0 to 8"),
        ({"temperature": 0.0}, "temperature is 0.0, but must be above 0"),
        ({"temperature": math.nan}, "temperature is nan, but must be above 0"),
        ({"length_penalty": 0.0}, "length_penalty is 0.0, but must be above 0"),
        ({"last_length_penalty": -1.0}, "last_length_penalty is -1.0, but must be above 0"),
        ({"penalties": FLOATS}, "penalty_tokens and penalties must be given together"),
        ({"penalty_tokens": LONGS}, "penalty_tokens and penalties must be given together"),
        ({"logits": torch.zeros(5, 9)}, r"logits has shape \[5, 9\], but must be \[6, 9\] to match"),
        ({"finished": torch.zeros(3, 4)}, r"finished has shape \[3, 4\], but must be \[2, 4\]"),
        ({"scores": torch.zeros(2, 3).half()}, "scores has dtype torch.float16, but must be torch.float32"),
        ({"finished": torch.zeros(2, 4).double()}, "finished has dtype torch.float64, but must be torch.float32"),
        ({"suppressed": torch.zeros(8).bool()}, r"suppressed has shape \[8\], but must be \[9\]"),
        ({"suppressed": torch.zeros(9)}, "suppressed has dtype torch.float32, but must be torch.bool"),
        (
            {"penalty_tokens": LONGS[:5], "penalties": FLOATS},
            r"penalty_tokens has shape \[5, 2\], but must be \[6, 2\]",
        ),
        ({"penalty_tokens": LONGS, "penalties": FLOATS[:, :1]}, r"penalties has shape \[6, 1\], but must be \[6, 2\]"),
        (
            {"penalty_tokens": LONGS.int(), "penalties": FLOATS},
            "penalty_tokens has dtype torch.int32, but must be torch.int64",
        ),
        ({"penalty_tokens": LONGS, "penalties": FLOATS.double()}, "penalties has dtype torch.float64"),
        ({"scores": torch.zeros(2, 3, device="meta")}, "scores is on meta, but the other tensors are on cpu"),
    ],
)
def test_invalid_arguments(op, change, message):
    arguments = {
        "logits": torch.zeros(6, 9),
        "scores": torch.zeros(2, 3),
        "finished": torch.zeros(2, 4),
        "end": 0,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        op(**arguments)


def test_the_kernel_checks_its_arguments():
    (logits, scores, finished), options = make_problem(0, 2, 3, 4, 9, M=2)
    suppressed, tokens, penalties = (options[name] for name in ("suppressed", "penalty_tokens", "penalties"))

    def call(logits=logits, scores=scores, finished=finished, tokens=tokens, end=0, temperature=1.0):
        arguments = (logits, scores, finished, suppressed, tokens, penalties, end, True, True, temperature, 1.0, 1.0)
        torch.ops.attncap.beam_search_step.default(*arguments)

    call()
    for change, message in [
        (dict(logits=logits[0]), "takes logits"),
        (dict(logits=logits.double()), "float32, bfloat16 or float16"),
        (dict(logits=logits[:5]), "logits has sizes that do not match"),
        (dict(scores=scores.double()), "scores has the wrong dtype"),
        (dict(finished=finished[:1]), "finished has sizes that do not match"),
        (dict(finished=finished.repeat(1, 9)), "1 to 32 beams"),
        (dict(tokens=None), "or neither"),
        (dict(tokens=tokens[:, :1]), "penalties has sizes that do not match"),
        (dict(end=9), "end must be a token"),
        (dict(temperature=0.0), "must be above 0"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call(**change)
