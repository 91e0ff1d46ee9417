"""One step of beam search, from logits to the beams that continue: native op and reference in plain PyTorch.

Letters: B images, J beams per image before the step, K after it, V tokens, M penalties per beam.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from attncap.config import MAX_BEAMS
from attncap.ops import library

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class BeamSearchStep(NamedTuple):
    """The result of a step."""

    tokens: Tensor  # int64 [B,K], the token of every beam; `end` where no beam continues
    parents: Tensor  # int64 [B,K], the row of logits that the beam continues
    scores: Tensor  # float32 [B,K], best first; -inf: no beam; NaN: the logits are not finite, now or in a step before
    ended: Tensor  # float32 [B,J], the score of the beam with `end`, if it ends in this step, else -inf
    finished: Tensor  # float32 [B,K], like the argument


def beam_search_step(
    logits: Tensor,
    scores: Tensor,
    finished: Tensor,
    *,
    end: int,
    end_allowed: bool = True,
    shrink: bool = True,
    suppressed: Tensor | None = None,
    penalty_tokens: Tensor | None = None,
    penalties: Tensor | None = None,
    temperature: float = 1.0,
    length_penalty: float = 1.0,
    last_length_penalty: float = 1.0,
) -> BeamSearchStep:
    """Extends the beams of every image by one token, by the native kernels.

    The candidates are all tokens w of all beams j of an image b:

        scores[b, j] + log_softmax(logits[b * J + j] / temperature)[w] - penalties

    They are ranked by score; ties go to the lower beam, then to the lower token. Candidates with the token `end` that
    are among the best `width` end and become hypotheses. With `shrink`, the width is K minus the number of hypotheses
    that the image has, and the others among the best `width` continue (Xu et al. 2015). Otherwise the width is K, the K
    best candidates with other tokens continue, and the image is done once it has K hypotheses that no beam can improve
    on.

    Args:
        logits: [B * J, V], float32, bfloat16 or float16 (the last two are computed in float32). The J rows of an image
            are adjacent. J = 1 in the first step.
        scores: float32 [B, J], sums of log-probabilities; -inf: no beam.
        finished: float32 [B, K], the scores of the image's best hypotheses, each divided by its length penalty, best
            first; -inf: none.
        end: the token that ends a hypothesis.
        end_allowed: whether a hypothesis may end in this step.
        suppressed: bool [V], tokens that are never chosen (ignored for `end`, see end_allowed).
        penalty_tokens, penalties: int64 and float32 [B * J, M], amounts of at least 0 that are subtracted from the
            scores of tokens, for each beam; +inf suppresses the token. Negative tokens are ignored; the penalties of
            the same token add up.
        length_penalty: the divisor for the scores of hypotheses that end in this step.
        last_length_penalty: the divisor in the last step of the search, at least as large.

    There may be up to 32 beams. Rows of logits may have any stride. Not differentiable.

    Raises:
        ValueError: shapes, dtypes or devices do not match, or a number is out of range.
        attncap.errors.UserError: there is no kernel for the device. The message says how to get it.
    """
    numbers = {"temperature": temperature, "length_penalty": length_penalty, "last_length_penalty": last_length_penalty}
    _check(logits, scores, finished, end, suppressed, penalty_tokens, penalties, numbers)
    library.require(logits.device)
    return BeamSearchStep(
        *torch.ops.attncap.beam_search_step.default(
            logits, scores, finished, suppressed, penalty_tokens, penalties, end, end_allowed, shrink, temperature,
            length_penalty, last_length_penalty,
        )
    )  # fmt: skip


def beam_search_step_reference(
    logits: Tensor,
    scores: Tensor,
    finished: Tensor,
    *,
    end: int,
    end_allowed: bool = True,
    shrink: bool = True,
    suppressed: Tensor | None = None,
    penalty_tokens: Tensor | None = None,
    penalties: Tensor | None = None,
    temperature: float = 1.0,
    length_penalty: float = 1.0,
    last_length_penalty: float = 1.0,
) -> BeamSearchStep:
    """`beam_search_step` in plain PyTorch: same arguments, results and errors, on any device."""
    numbers = {"temperature": temperature, "length_penalty": length_penalty, "last_length_penalty": last_length_penalty}
    _check(logits, scores, finished, end, suppressed, penalty_tokens, penalties, numbers)
    (B, J), K, V = scores.shape, finished.shape[1], logits.shape[1]
    log_probs = (logits.float() / temperature).log_softmax(dim=1).view(B, J, V)
    is_live = scores > -torch.inf
    is_nan = scores.isnan().any(1) | (log_probs.isnan().any(2) & is_live).any(1)  # [B]
    candidates = (scores.unsqueeze(2) + log_probs).masked_fill(~is_live.unsqueeze(2), -torch.inf)
    if penalty_tokens is not None:
        candidates = subtract_penalties(candidates.view(B * J, V), penalty_tokens, penalties).view(B, J, V)
    ends = candidates[:, :, end] if end_allowed else torch.full_like(scores, -torch.inf)
    is_candidate = torch.arange(V, device=logits.device) != end
    if suppressed is not None:
        is_candidate &= ~suppressed
    candidates = candidates.masked_fill(~is_candidate, -torch.inf)

    best = _ranks(candidates.view(B, J * V), torch.arange(J * V, device=logits.device))
    best = best.topk(min(K, J * V), dim=1).values
    indices = _indices(best)
    best_scores = candidates.view(B, J * V).gather(1, indices)
    end_ranks = _ranks(ends, V * torch.arange(J, device=logits.device) + end)
    width = K - (finished > -torch.inf).sum(1, keepdim=True) * shrink
    better_than_end = (best.unsqueeze(1) > end_ranks.unsqueeze(2)).sum(2)
    better_than_end += (end_ranks.unsqueeze(1) > end_ranks.unsqueeze(2)).sum(2)
    ended = ends.masked_fill((better_than_end >= width) | is_nan.unsqueeze(1), -torch.inf)
    finished = torch.cat([finished, ended / length_penalty], dim=1).sort(dim=1, descending=True).values[:, :K]

    if shrink:
        ends_before = (end_ranks.unsqueeze(1) > best.unsqueeze(2)).sum(2)
        stops = torch.arange(best.shape[1], device=logits.device) + ends_before >= width
    else:
        cannot_improve = best_scores[:, :1] / last_length_penalty <= finished[:, -1:]
        stops = cannot_improve & (finished[:, -1:] > -torch.inf)
    continues = (best_scores > -torch.inf) & ~stops & ~is_nan.unsqueeze(1)
    first_row = J * torch.arange(B, device=logits.device).unsqueeze(1)
    next_scores = best_scores.masked_fill(~continues, -torch.inf).masked_fill(is_nan.unsqueeze(1), torch.nan)
    missing = (0, K - best.shape[1])  # fewer candidates than beams
    pad = torch.nn.functional.pad
    return BeamSearchStep(
        pad((indices % V).masked_fill(~continues, end), missing, value=end),
        first_row + pad((indices // V).masked_fill(~continues, 0), missing),
        torch.where(is_nan.unsqueeze(1), torch.nan, pad(next_scores, missing, value=-torch.inf)),
        ended,
        finished,
    )


def subtract_penalties(candidates: Tensor, tokens: Tensor, penalties: Tensor) -> Tensor:
    """Subtracts penalties [N,M] of tokens [N,M] from candidates [N,V], as `beam_search_step` does."""
    return candidates.scatter_add(1, tokens.clamp(min=0), -penalties.masked_fill(tokens < 0, 0))


# The rank of a candidate as one integer, larger for better ones. The upper bits are those of its score, mapped so that
# integers have the same order as the scores. The lower bits are its index among the image's candidates, negated so that
# ties go to the lower index.
_INDEX_RANGE = 2**32


def _ranks(scores: Tensor, indices: Tensor) -> Tensor:
    bits = (scores + 0.0).contiguous().view(torch.int32)  # + 0.0: -0.0 and 0.0 are equal
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    return ordered * _INDEX_RANGE + (_INDEX_RANGE - 1 - indices)


def _indices(ranks: Tensor) -> Tensor:
    return _INDEX_RANGE - 1 - ranks % _INDEX_RANGE


def _check(
    logits: Tensor,
    scores: Tensor,
    finished: Tensor,
    end: int,
    suppressed: Tensor | None,
    penalty_tokens: Tensor | None,
    penalties: Tensor | None,
    numbers: dict[str, float],
) -> None:
    if logits.dim() != 2 or scores.dim() != 2 or finished.dim() != 2:
        raise ValueError(
            "beam_search_step takes logits [B * J, V], scores [B, J] and finished [B, K], not "
            f"{list(logits.shape)}, {list(scores.shape)} and {list(finished.shape)}"
        )
    (B, J), K, (N, V) = scores.shape, finished.shape[1], logits.shape
    if not 1 <= J <= MAX_BEAMS or not 1 <= K <= MAX_BEAMS:
        raise ValueError(f"beam_search_step takes 1 to {MAX_BEAMS} beams per image, not {J} and {K}")
    if logits.dtype not in DTYPES:
        raise ValueError(f"logits has dtype {logits.dtype}; beam_search_step takes float32, bfloat16 and float16")
    if not 0 <= end < V:
        raise ValueError(f"end is {end}, but must be a token from 0 to {V - 1}")
    for name, number in numbers.items():
        if not number > 0:
            raise ValueError(f"{name} is {number}, but must be above 0")
    if (penalty_tokens is None) != (penalties is None):
        raise ValueError("penalty_tokens and penalties must be given together")
    M = 0 if penalty_tokens is None else penalty_tokens.shape[-1]
    library.check_tensors(
        {
            "logits": (logits, (B * J, V), logits.dtype),
            "scores": (scores, (B, J), torch.float32),
            "finished": (finished, (B, K), torch.float32),
            "suppressed": (suppressed, (V,), torch.bool),
            "penalty_tokens": (penalty_tokens, (N, M), torch.int64),
            "penalties": (penalties, (N, M), torch.float32),
        },
        logits.device,
        lambda: f"logits {list(logits.shape)}, scores {list(scores.shape)} and finished {list(finished.shape)}",
    )


def _fake(
    logits, scores, finished, suppressed, penalty_tokens, penalties, end, end_allowed, shrink, temperature,
    length_penalty, last_length_penalty,
):  # fmt: skip
    tokens = finished.new_empty(finished.shape, dtype=torch.int64)
    parents = torch.empty_like(tokens)
    return tokens, parents, torch.empty_like(finished), torch.empty_like(scores), torch.empty_like(finished)


if library.is_loaded("cpu"):
    torch.library.register_fake("attncap::beam_search_step", _fake)
