"""One step of beam search, from logits to the beams that go on: native op and plain-PyTorch twin.

Letters: B images, J beams of an image that come in, K that go on, V words, M penalties of a beam.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from attncap.ops import library

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_BEAMS = 32  # kMostBeams, beam_search_step.h


class BeamSearchStep(NamedTuple):
    """What a step of the search comes to."""

    tokens: Tensor  # int64 [B,K], the word of every beam that goes on; `end` where there is none
    parents: Tensor  # int64 [B,K], the row of logits that it goes on from
    scores: Tensor  # float32 [B,K], best first; -inf: no beam; NaN: the logits were not numbers, here or before
    ended: Tensor  # float32 [B,J], the score of the hypothesis in which the beam ended; -inf: it did not
    finished: Tensor  # float32 [B,K], as the argument


def beam_search_step(
    logits: Tensor,
    scores: Tensor,
    finished: Tensor,
    *,
    end: int,
    end_allowed: bool = True,
    shrink: bool = True,
    suppressed: Tensor | None = None,
    penalty_words: Tensor | None = None,
    penalties: Tensor | None = None,
    temperature: float = 1.0,
    length_penalty: float = 1.0,
    last_length_penalty: float = 1.0,
) -> BeamSearchStep:
    """Take every image's beams one word further by the native kernels.

    Candidates are all words of all beams:

        scores[b, j] + log_softmax(logits[b * J + j] / temperature)[w] - penalties

    ranked by score; of equal ones the lower beam, then the lower word goes first. Those of `end` that are among the
    best `width` of the image end, and become hypotheses. With `shrink` the width is K less the hypotheses that the
    image has, and what is left of the best `width` goes on (Xu et al. 2015). Without it the width is K, the K best
    candidates of other words go on, and the image is done when it has K hypotheses that no beam can better.

    Args:
        logits: [B * J, V], float32, bfloat16 or float16 (both computed in float32). The J rows of an image are
            neighbours. J = 1 in the first step.
        scores: float32 [B, J], sums of log-probabilities; -inf: no beam.
        finished: float32 [B, K], scores over length penalties of the image's best hypotheses, best first; -inf: none.
        end: the word that ends a hypothesis.
        end_allowed: whether it may come in this step.
        suppressed: bool [V], words that are never written (`end` is governed by end_allowed alone).
        penalty_words, penalties: int64 and float32 [B * J, M]: what is subtracted from words' candidates, for each
            beam; at least 0; +inf forbids. A negative word is none; of a word named twice, the sum counts.
        length_penalty: the divisor of scores of hypotheses that end in this step.
        last_length_penalty: the same in the last step that there can be, at least as large.

    Up to 32 beams. Rows of logits may lie apart. Not differentiable.

    Raises:
        ValueError: shapes, dtypes, devices or numbers do not fit.
        attncap.errors.UserError: there is no kernel for the device; says how to get it.
    """
    numbers = {"temperature": temperature, "length_penalty": length_penalty, "last_length_penalty": last_length_penalty}
    _check(logits, scores, finished, end, suppressed, penalty_words, penalties, numbers)
    library.require(logits.device)
    return BeamSearchStep(
        *torch.ops.attncap.beam_search_step(
            logits, scores, finished, suppressed, penalty_words, penalties, end, end_allowed, shrink, temperature,
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
    penalty_words: Tensor | None = None,
    penalties: Tensor | None = None,
    temperature: float = 1.0,
    length_penalty: float = 1.0,
    last_length_penalty: float = 1.0,
) -> BeamSearchStep:
    """`beam_search_step` in plain PyTorch: same arguments, results and errors, on any device."""
    numbers = {"temperature": temperature, "length_penalty": length_penalty, "last_length_penalty": last_length_penalty}
    _check(logits, scores, finished, end, suppressed, penalty_words, penalties, numbers)
    (B, J), K, V = scores.shape, finished.shape[1], logits.shape[1]
    log_probs = (logits.float() / temperature).log_softmax(dim=1).view(B, J, V)
    is_live = scores > -torch.inf
    is_nan = scores.isnan().any(1) | (log_probs.isnan().any(2) & is_live).any(1)  # [B]
    candidates = (scores.unsqueeze(2) + log_probs).masked_fill(~is_live.unsqueeze(2), -torch.inf)
    if penalty_words is not None:
        candidates = subtract_penalties(candidates.view(B * J, V), penalty_words, penalties).view(B, J, V)
    ends = candidates[:, :, end] if end_allowed else torch.full_like(scores, -torch.inf)
    is_word = torch.arange(V, device=logits.device) != end
    if suppressed is not None:
        is_word &= ~suppressed
    candidates = candidates.masked_fill(~is_word, -torch.inf)

    best = _ranks(candidates.view(B, J * V), torch.arange(J * V, device=logits.device))
    best = best.topk(min(K, J * V), dim=1).values
    places = _places(best)
    best_scores = candidates.view(B, J * V).gather(1, places)
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
    goes_on = (best_scores > -torch.inf) & ~stops & ~is_nan.unsqueeze(1)
    first_row = J * torch.arange(B, device=logits.device).unsqueeze(1)
    next_scores = best_scores.masked_fill(~goes_on, -torch.inf).masked_fill(is_nan.unsqueeze(1), torch.nan)
    missing = (0, K - best.shape[1])  # fewer candidates than beams
    pad = torch.nn.functional.pad
    return BeamSearchStep(
        pad((places % V).masked_fill(~goes_on, end), missing, value=end),
        first_row + pad((places // V).masked_fill(~goes_on, 0), missing),
        torch.where(is_nan.unsqueeze(1), torch.nan, pad(next_scores, missing, value=-torch.inf)),
        ended,
        finished,
    )


def subtract_penalties(candidates: Tensor, words: Tensor, penalties: Tensor) -> Tensor:
    """`beam_search_step`'s penalties, words and penalties [N,M], off candidates [N,V]."""
    return candidates.scatter_add(1, words.clamp(min=0), -penalties.masked_fill(words < 0, 0))


# A candidate's rank as one integer: its score's bits in an order that integers have too, and below them its place among
# the image's candidates, counted backwards.
_PLACES = 2**32


def _ranks(scores: Tensor, places: Tensor) -> Tensor:
    bits = (scores + 0.0).contiguous().view(torch.int32)  # + 0.0: -0.0 and 0.0 are equal
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    return ordered * _PLACES + (_PLACES - 1 - places)


def _places(ranks: Tensor) -> Tensor:
    return _PLACES - 1 - ranks % _PLACES


def _check(
    logits: Tensor,
    scores: Tensor,
    finished: Tensor,
    end: int,
    suppressed: Tensor | None,
    penalty_words: Tensor | None,
    penalties: Tensor | None,
    numbers: dict[str, float],
) -> None:
    if logits.dim() != 2 or scores.dim() != 2 or finished.dim() != 2:
        raise ValueError(
            "beam_search_step takes logits [B * J, V], scores [B, J] and finished [B, K], not "
            f"{list(logits.shape)}, {list(scores.shape)} and {list(finished.shape)}"
        )
    (B, J), K, (N, V) = scores.shape, finished.shape[1], logits.shape
    if not 1 <= J <= MOST_BEAMS or not 1 <= K <= MOST_BEAMS:
        raise ValueError(f"beam_search_step takes 1 to {MOST_BEAMS} beams an image, not {J} and {K}")
    if logits.dtype not in DTYPES:
        raise ValueError(f"logits has dtype {logits.dtype}; beam_search_step takes float32, bfloat16 and float16")
    if not 0 <= end < V:
        raise ValueError(f"end is {end}, but there are {V} words")
    for name, number in numbers.items():
        if not number > 0:
            raise ValueError(f"{name} is {number}, but must be above 0")
    if (penalty_words is None) != (penalties is None):
        raise ValueError("penalty_words and penalties come together")
    M = 0 if penalty_words is None else penalty_words.shape[-1]
    library.check_tensors(
        {
            "logits": (logits, (B * J, V), logits.dtype),
            "scores": (scores, (B, J), torch.float32),
            "finished": (finished, (B, K), torch.float32),
            "suppressed": (suppressed, (V,), torch.bool),
            "penalty_words": (penalty_words, (N, M), torch.int64),
            "penalties": (penalties, (N, M), torch.float32),
        },
        logits.device,
        lambda: f"logits {list(logits.shape)}, scores {list(scores.shape)} and finished {list(finished.shape)}",
    )


def _fake(
    logits, scores, finished, suppressed, penalty_words, penalties, end, end_allowed, shrink, temperature,
    length_penalty, last_length_penalty,
):  # fmt: skip
    tokens = finished.new_empty(finished.shape, dtype=torch.int64)
    parents = torch.empty_like(tokens)
    return tokens, parents, torch.empty_like(finished), torch.empty_like(scores), torch.empty_like(finished)


if library.is_loaded("cpu"):
    torch.library.register_fake("attncap::beam_search_step", _fake)
