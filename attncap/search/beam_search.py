"""Beam search, diverse beam search and sampling: from features to hypotheses."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attncap.data.vocabulary import Vocabulary
from attncap.errors import UserError
from attncap.models.decoder import Decoder
from attncap.search.beams import Beams, Search, Step, to_host
from attncap.search.config import SearchConfig
from attncap.search.graphs import SEGMENT, GraphCache
from attncap.search.processors import ForcedPrefix, LogitsProcessor, SuppressTokens


@dataclass
class Hypothesis:
    """A caption as the search found it."""

    tokens: list[int]  # without <start> and <end>
    score: float  # sum of the log-probabilities of its words, and of <end> if it was reached, minus diversity penalties
    attention: Tensor | None  # float32 [len(tokens),P], on the CPU


@torch.inference_mode()
def beam_search(
    decoders: Decoder | Sequence[Decoder],
    features: Tensor | Sequence[Tensor],
    config: SearchConfig,
    processors: Sequence[LogitsProcessor] = (SuppressTokens((Vocabulary.UNK,)),),
    *,
    seeds: Sequence[int] | None = None,
    backend: str = "native",
    graphs: GraphCache | None = None,
    attention: bool = True,
) -> list[list[Hypothesis]]:
    """The best captions of each image.

    A step takes every beam one word further. Its candidates are all words of all beams, ranked by the sum of their
    log-probabilities. <pad> and <start> are never written. Among equal scores, the lower beam comes first, then the
    lower word.

    "shrink" is Show, Attend and Tell's own search: a candidate with <end> that is among the best becomes a hypothesis,
    and the width shrinks by one; an image is finished when no beam is left. "fixed" keeps K beams going alongside the K
    best hypotheses, until no beam can improve on the worst of these. Either way, hypotheses are compared by their score
    divided by the length penalty. Only if fewer than `n_best` have ended do live beams follow, in the order of their
    scores. "sample" draws K captions independently, each word from the distribution that temperature, then top_k, then
    top_p leave; a score is the sum of the log-probabilities before top_k and top_p are applied.

    Args:
        decoders: one decoder, or several with the same vocabulary, whose probabilities are averaged (an ensemble). A
            decoder made by `for_inference` is faster than the model itself.
        features: [B,P,D] for each decoder. The search runs in the decoder's dtype, even under autocast. Captions depend
            neither on an image's batch nor on its position in it, apart from the rounding of matrix products, whose
            sizes differ.
        processors: rules for the words, in addition to those that `config` contains.
        seeds: for sampling, the seed of each image, at least 0; by default 0, 1, 2, ...
        backend: of beam_search_step, "native" or "torch".
        graphs: keeps what is captured on CUDA for the next search with the same decoder. Without it, and for ensembles,
            sampling, and searches with processors other than `SuppressTokens` and `ForcedPrefix`, no CUDA graphs are
            used.
        attention: whether hypotheses include their attention.

    Returns:
        For each image its `n_best` hypotheses (fewer where there are no more), best first. If no word was allowed, an
        empty one with score -inf.

    Raises:
        ValueError: features, suppressed words or seeds that do not fit, or ensemble members that differ in their
            images, grids or vocabularies.
        UserError: a decoder's output is NaN.
    """
    decoders = list(decoders) if isinstance(decoders, Sequence) else [decoders]
    features = [features] if isinstance(features, Tensor) else features
    _check(decoders, features, processors)
    device, B = features[0].device, len(features[0])
    if B == 0:
        return []
    with torch.autocast(device.type, enabled=False), contextlib.ExitStack() as held:
        if graphs is not None and device.type == "cuda" and len(decoders) == 1 and _can_be_captured(config, processors):
            held.enter_context(torch.cuda.device(device))
            held.enter_context(graphs.lock)
            steps, beams = graphs.run(decoders[0], config, processors, features[0], backend)
        else:
            search = Search(decoders, config, processors, device, backend, attention)
            steps, beams = _run(search, search.start(features, range(B) if seeds is None else seeds))
        return _trace_back(steps, beams, config, B, attention)


def _check(decoders: Sequence[Decoder], features: Sequence[Tensor], processors: Sequence[LogitsProcessor]) -> None:
    sizes = {decoder.vocabulary_size for decoder in decoders}
    if len({x.shape[:2] for x in features}) > 1 or len(sizes) > 1 or len(features) != len(decoders):
        raise ValueError("an ensemble needs features of the same images and grid, and decoders of the same vocabulary")
    tokens = [t for rule in processors if isinstance(rule, SuppressTokens | ForcedPrefix) for t in rule.tokens]
    if wrong := [token for token in tokens if not 0 <= token < min(sizes)]:
        raise ValueError(f"token {wrong[0]} of a processor is not among the {min(sizes)} words of the vocabulary")


def _can_be_captured(config: SearchConfig, processors: Sequence[LogitsProcessor]) -> bool:
    return config.method != "sample" and all(isinstance(rule, SuppressTokens | ForcedPrefix) for rule in processors)


def _run(search: Search, beams: Beams) -> tuple[list[Step], Beams]:
    """All steps, and the beams after the last one."""
    steps = []
    for t in range(search.config.max_length):
        beams, step = search.advance(beams, t)
        steps.append(step)
        if beams.scores.is_cuda and (t + 1) % SEGMENT:
            continue  # looking at the scores would make the device wait for the host
        is_live = search.is_live(beams)
        live = int(is_live.sum())
        if live == 0:
            break
        if 2 * live <= len(is_live):  # copying the features of the others costs less than continuing with all
            beams = search.select(beams, is_live.nonzero().squeeze(1))
    return steps, beams


def _trace_back(
    steps: list[Step], beams: Beams, config: SearchConfig, B: int, with_attention: bool = True
) -> list[list[Hypothesis]]:
    """Choose each image's best hypotheses and follow them through their parents to the first word."""
    if beams.scores.is_cuda:
        steps, beams = to_host(steps, beams)
    T, K = len(steps), config.beam_size
    tokens, parents = np.zeros((T, B, K), dtype=np.int64), np.zeros((T, B, K), dtype=np.int64)  # parents by beam
    scores = np.full((B, (T + 1) * K), -np.inf, dtype=np.float32)  # of what ended in each step, then of live beams
    first_rows = np.zeros((T, B), dtype=np.int64)  # of an image, among the rows of all steps
    begin = 0
    for t, step in enumerate(steps):
        count, J = step.ended.shape
        images = step.images.numpy() if count < B else slice(None)  # faster
        tokens[t, images] = step.tokens.numpy()
        parents[t, images] = step.parents.numpy() % J
        scores[images, t * K : t * K + J] = step.ended.numpy()
        first_rows[t, images] = begin + J * np.arange(count)
        begin += J * count
    scores[beams.images.numpy(), T * K :] = beams.scores.numpy()
    if np.isnan(scores).any():
        wrong = np.unique(np.isnan(scores).nonzero()[0])
        raise UserError(
            f"the decoder's output for {len(wrong)} of {B} images is NaN, first at index {wrong[0]} of the batch; "
            "the model's weights or the image's features are not finite"
        )

    divisors = np.array([config.divisor(t + 1) for t in range(T)])
    ranks = scores / np.append(divisors, divisors[-1]).repeat(K)
    ended, live = ranks[:, : T * K], ranks[:, T * K :]  # live beams come after what ended
    order, exists = np.empty((B, config.n_best), dtype=np.int64), np.empty((B, config.n_best), dtype=bool)
    of_all = np.arange(B)
    for n in range(config.n_best):  # sorting everything would take longer
        best, best_live = ended.argmax(axis=1), live.argmax(axis=1)  # of equal ones the earlier, then the lower beam
        is_live = (ended[of_all, best] == -np.inf) & (live[of_all, best_live] > -np.inf)
        order[:, n] = np.where(is_live, T * K + best_live, best)
        exists[:, n] = ranks[of_all, order[:, n]] > -np.inf
        ranks[of_all, order[:, n]] = -np.inf
    exists[:, 0] = True  # where no word was allowed, an empty caption
    image, _ = exists.nonzero()
    chosen = order[exists]
    length, beam = chosen // K, chosen % K

    words, attended = np.zeros((2, len(image), T), dtype=np.int64)  # tokens; rows of all steps' attention
    for t in range(T - 1, -1, -1):
        [written] = (t < length).nonzero()
        of = image[written]
        words[written, t] = tokens[t, of, beam[written]]
        beam[written] = parents[t, of, beam[written]]
        attended[written, t] = first_rows[t, of] + beam[written]
    maps: Sequence[Tensor | None] = [None] * len(image)
    if with_attention:
        maps = _gather_attention([step.attention for step in steps if step.attention is not None], attended, length)
    hypotheses: list[list[Hypothesis]] = [[] for _ in range(B)]
    for i, (b, n) in enumerate(zip(image, length, strict=True)):
        hypotheses[b].append(Hypothesis(words[i, :n].tolist(), float(scores[b, chosen[i]]), maps[i]))
    return hypotheses


def _gather_attention(steps: list[Tensor], rows: np.ndarray, lengths: np.ndarray) -> Sequence[Tensor]:
    """The attention of C captions of these lengths, float32 [length,P] on the CPU, from rows [C,T] of all steps."""
    is_word = np.arange(len(steps)) < lengths[:, None]  # [C,T]
    chosen = torch.from_numpy(rows[is_word])
    if steps[0].is_cuda:
        chosen = chosen.pin_memory().to(steps[0].device, non_blocking=True)
    chosen = torch.cat(steps).index_select(0, chosen)
    with torch.inference_mode(False):  # plain tensors for the caller
        weights = torch.empty(chosen.shape, dtype=torch.float32, device="cpu")
    if chosen.is_cuda:  # in its own dtype, and through pinned memory: the device writes to any other far more slowly
        chosen = torch.empty_like(chosen, device="cpu", pin_memory=True).copy_(chosen)
    weights.copy_(chosen)
    with torch.inference_mode(False):
        return weights.split(lengths.tolist())
