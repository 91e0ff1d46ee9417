"""Beam search, diverse beam search and sampling: from features to hypotheses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attncap.data.vocabulary import Vocabulary
from attncap.errors import UserError
from attncap.models.decoder import Decoder
from attncap.search.beams import Beams, Search, Step
from attncap.search.config import SearchConfig
from attncap.search.decoder_step import DecoderStep
from attncap.search.graphs import SEGMENT, SearchGraphs


@dataclass
class Hypothesis:
    """A caption as the search found it."""

    tokens: list[int]  # without <start> and <end>
    score: float  # sum of the log-probabilities of its words, <end>'s included where it was reached, less diversity's
    attention: Tensor  # float32 [len(tokens),P], on the CPU


@torch.inference_mode()
def beam_search(
    decoders: Decoder | Sequence[Decoder],
    features: Tensor | Sequence[Tensor],
    config: SearchConfig,
    suppressed: Sequence[int] = (Vocabulary.UNK,),
    seeds: Sequence[int] | None = None,
) -> list[list[Hypothesis]]:
    """The best captions of every image.

    A step takes every beam one word further; its candidates are all words of all beams, ranked by the sum of their
    log-probabilities. <pad>, <start> and the suppressed words are never written. Of equal scores the lower beam, then
    the lower word goes first.

    "shrink" is Show, Attend and Tell's own search: a candidate of <end> among the best is taken out as a hypothesis and
    the width shrinks by one; an image is done when no beam is left. "fixed" keeps K beams going beside the K best
    hypotheses, until no beam can better the worst of these. Either way hypotheses are compared by score over length
    penalty; live beams follow, in the order of their scores, only where fewer than `n_best` have ended. "sample" draws
    K captions independently, each word from the distribution that temperature, then top_k, then top_p leave; a score is
    the sum of the log-probabilities before top_k and top_p.

    Args:
        decoders: one, or several of one vocabulary, whose probabilities are averaged (an ensemble).
        features: [B,P,D] for each decoder, cast to its dtype, to which the search keeps under autocast too. Captions
            depend neither on an image's batch nor on its place in it, but for the rounding of matrix products of other
            sizes.
        suppressed: words that are never written, beside <pad> and <start>. <end> cannot be.
        seeds: of every image, at least 0, for sampling; 0, 1, 2, ... by default.

    Returns:
        For every image its `n_best` hypotheses (fewer where there are no more), best first. Where no word was allowed,
        an empty one with score -inf.

    Raises:
        ValueError: features, suppressed words or seeds that do not fit, or ensemble members that differ in their
            images, grids or vocabularies.
        CallError: settings that do not go together.
        UserError: a decoder's output is not a number.
    """
    decoders = [decoders] if isinstance(decoders, Decoder) else decoders
    features = [features] if isinstance(features, Tensor) else features
    _check(decoders, features, suppressed)
    if len(features[0]) == 0:
        return []
    with torch.autocast(features[0].device.type, enabled=False):
        steps = [DecoderStep.of(decoder) for decoder in decoders]
        features = [x.to(step.score_weight.dtype) for x, step in zip(features, steps, strict=True)]
        trail, beams = _search(steps, features, config, suppressed, seeds)
    return _trace_back(trail, beams, config, len(features[0]))


def _check(decoders: Sequence[Decoder], features: Sequence[Tensor], suppressed: Sequence[int]) -> None:
    for decoder, values in zip(decoders, features, strict=True):
        D = decoder.key.in_features
        if values.dim() != 3 or values.shape[1] == 0 or values.shape[2] != D:
            raise ValueError(f"the decoder takes features [B, P, {D}] of at least one cell, not {list(values.shape)}")
    vocabularies = {decoder.embedding.num_embeddings for decoder in decoders}
    if len({values.shape[:2] for values in features}) > 1 or len(vocabularies) > 1:
        raise ValueError("an ensemble needs features of the same images and grid, and decoders of the same vocabulary")
    if wrong := [word for word in suppressed if not 0 <= word < min(vocabularies)]:
        raise ValueError(f"suppressed word {wrong[0]} is none of the {min(vocabularies)} words")


def _search(
    steps: list[DecoderStep],
    features: list[Tensor],
    config: SearchConfig,
    suppressed: Sequence[int],
    seeds: Sequence[int] | None,
) -> tuple[list[Step], Beams]:
    """All steps, and the beams after the last one."""
    if features[0].is_cuda and len(steps) == 1 and config.method != "sample":
        with torch.cuda.device(features[0].device):
            return SearchGraphs.of(steps[0], config, suppressed, features[0]).run(features[0])
    search = Search(steps, config, suppressed)
    beams = search.start(features, range(len(features[0])) if seeds is None else seeds)
    trail = []
    for t in range(config.max_length):
        beams, step = search.advance(beams, t)
        trail.append(step)
        if features[0].is_cuda and (t + 1) % SEGMENT:
            continue  # looking at the scores would make the device wait for the host
        is_live = search.is_live(beams)
        live = int(is_live.sum())
        if live == 0:
            break
        if 2 * live <= len(is_live):  # copying the features of the others costs less than going on with all
            beams = search.keep(beams, is_live.nonzero().squeeze(1))
    return trail, beams


def _trace_back(trail: list[Step], beams: Beams, config: SearchConfig, B: int) -> list[list[Hypothesis]]:
    """Choose each image's best and follow them through their parents to the first word."""
    T, K = len(trail), config.beam_size
    tokens, parents = np.zeros((T, B, K), dtype=np.int64), np.zeros((T, B, K), dtype=np.int64)  # parents by beam
    scores = np.full((B, (T + 1) * K), -np.inf, dtype=np.float32)  # of what ended in each step, then of live beams
    rows = np.zeros((T, B), dtype=np.int64)  # an image's first row among a step's weights
    images, of_tokens, of_parents, of_ended = (_to_host([step[i] for step in trail]) for i in range(4))
    for t, step in enumerate(trail):
        J = step.ended.shape[1]
        tokens[t, images[t]] = of_tokens[t]
        parents[t, images[t]] = of_parents[t] % J
        scores[images[t], t * K : t * K + J] = of_ended[t]
        rows[t, images[t]] = len(step.weights) // len(images[t]) * np.arange(len(images[t]))
    scores[beams.images.cpu().numpy(), T * K :] = beams.scores.cpu().numpy()
    if np.isnan(scores).any():
        images = np.isnan(scores).any(axis=1).nonzero()[0].tolist()
        raise UserError(
            f"the decoder's output for {len(images)} of {B} images, the first at place {images[0]} of its batch, is "
            "not a number; the model's weights or the image's features are not finite"
        )

    divisors = np.array([config.divisor(t + 1) for t in range(T)])
    ranks = scores / np.append(divisors, divisors[-1]).repeat(K)
    last = (ranks == -np.inf) * 2 + (np.arange((T + 1) * K) >= T * K)  # live beams after what ended, nothing after them
    order = np.lexsort((-ranks, last), axis=-1)[:, : config.n_best]  # of equal ones the earlier, then the lower beam
    exists = np.take_along_axis(scores, order, axis=1) > -np.inf
    exists[:, 0] = True  # where no word was allowed, an empty caption
    image, _ = exists.nonzero()
    place = order[exists]
    length, beam = place // K, place % K

    words, looked = np.zeros((2, len(image), T), dtype=np.int64)  # tokens; rows of the steps' weights
    for t in range(T - 1, -1, -1):
        [written] = (t < length).nonzero()
        of = image[written]
        words[written, t] = tokens[t, of, beam[written]]
        beam[written] = parents[t, of, beam[written]]
        looked[written, t] = rows[t, of] + (parents[t - 1, of, beam[written]] if t > 0 else 0)
    is_word = np.arange(T)[:, None] < length  # [T, captions]
    looked = torch.from_numpy(looked.T[is_word]).to(trail[0].weights.device).split(is_word.sum(axis=1).tolist())
    weights = torch.cat([step.weights[places] for step, places in zip(trail, looked, strict=True)]).float().cpu()
    by_caption = torch.from_numpy(is_word.nonzero()[1].argsort(kind="stable"))  # not by step
    attention = weights[by_caption].split(length.tolist())
    hypotheses = [[] for _ in range(B)]
    for i, (b, n) in enumerate(zip(image, length, strict=True)):
        hypotheses[b].append(Hypothesis(words[i, :n].tolist(), float(scores[b, place[i]]), attention[i]))
    return hypotheses


def _to_host(tensors: Sequence[Tensor]) -> list[np.ndarray]:
    """All in one copy: a device is waited for once."""
    values = torch.cat([x.flatten() for x in tensors]).cpu().numpy()
    sizes = [x.numel() for x in tensors]
    return [part.reshape(x.shape) for part, x in zip(np.split(values, np.cumsum(sizes)[:-1]), tensors, strict=True)]
