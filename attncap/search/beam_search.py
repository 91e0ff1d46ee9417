"""Beam search, diverse beam search and sampling over images x beams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from attncap.data.vocabulary import Vocabulary
from attncap.errors import CallError, UserError
from attncap.models.decoder import Decoder, Memory
from attncap.ops.beam_search_step import MOST_BEAMS, BeamSearchStep
from attncap.search.decoder_step import DecoderStep


@dataclass(frozen=True)
class SearchConfig:
    """How captions are searched for."""

    beam_size: int = 5
    """K, hypotheses an image followed at once; 1 is greedy. At most 32."""
    method: Literal["shrink", "fixed", "sample"] = "shrink"
    """shrink: a beam that ends is taken out and the width shrinks (Show, Attend and Tell). fixed: the width stays, until
    no beam can better the captions that ended. sample: every beam draws its words at random."""
    max_length: int = 50
    """Steps of the search, a word or the end each."""
    min_length: int = 0
    """Words that a caption has at least."""
    length_penalty: Literal["none", "average"] | float = "none"
    """What a finished caption's score is divided by before captions are compared: none, its length (average), or, for a
    number alpha, ((5 + length) / 6) ** alpha (Wu et al. 2016, equation 14). The end counts in the length."""
    no_repeat_ngram: int = 0
    """No sequence of so many words comes twice in a caption; 0: any may."""
    temperature: float = 1.0
    """What the logits are divided by."""
    n_best: int = 1
    """Captions returned for an image, best first."""
    groups: int = 1
    """Groups of beams, each of which is kept from the words that those before it chose (diverse beam search,
    Vijayakumar et al. 2016); divides the beam size."""
    diversity: float = 0.5
    """What is subtracted from a score for each beam of an earlier group that chose the same word in the same step. It
    stays in the score."""
    top_k: int = 0
    """sample: only so many of the likeliest words can be drawn; 0: all."""
    top_p: float = 1.0
    """sample: only the likeliest words that together have this probability can be drawn."""
    seed: int = 0
    """sample: the seed. What is drawn for an image depends on it and on the image alone."""

    def check(self) -> None:
        """Raises CallError for settings that do not go together."""
        if not 1 <= self.beam_size <= MOST_BEAMS:
            raise CallError(f"--beam-size {self.beam_size}: must be from 1 to {MOST_BEAMS}")
        if not 0 <= self.min_length < self.max_length:
            raise CallError(f"--min-length {self.min_length}: must be below --max-length {self.max_length}")
        if not 1 <= self.n_best <= self.beam_size:
            raise CallError(f"--n-best {self.n_best}: must be from 1 to --beam-size {self.beam_size}")
        if self.groups < 1 or self.beam_size % self.groups:
            raise CallError(f"--groups {self.groups}: must divide --beam-size {self.beam_size}")
        if self.groups > 1 and self.method == "sample":
            raise CallError("--groups: samples are not searched in groups; leave it out, or --method sample")
        if isinstance(self.length_penalty, float | int) and self.length_penalty < 0:
            raise CallError(f"--length-penalty {self.length_penalty}: must be at least 0")
        if not self.temperature > 0:
            raise CallError(f"--temperature {self.temperature}: must be above 0")
        if not 0 < self.top_p <= 1:
            raise CallError(f"--top-p {self.top_p}: must be above 0 and at most 1")
        for name in ("diversity", "no_repeat_ngram", "top_k"):
            if getattr(self, name) < 0:
                raise CallError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 0")

    def divisor(self, length: int) -> float:
        """The length penalty of a caption of so many words, the end included."""
        if self.length_penalty == "none":
            return 1.0
        return float(length) if self.length_penalty == "average" else ((5 + length) / 6) ** self.length_penalty


@dataclass
class Hypothesis:
    """A caption as the search found it."""

    tokens: list[int]  # without <start> and <end>
    score: float  # sum of the log-probabilities of its words, <end>'s included where it was reached
    attention: Tensor  # float32 [len(tokens),P], on the CPU


class Beams(NamedTuple):
    """Where the search stands. The J beams of an image are neighbours among the R = B * J rows; the N = B * K that go on
    from them are known by their parents and tokens, and become rows in the next step."""

    memories: tuple[Memory, ...]  # of every decoder
    h: tuple[Tensor, ...]  # [R,H]
    c: tuple[Tensor, ...]  # [R,H]
    parents: Tensor  # int64 [B,K], rows
    tokens: Tensor  # int64 [B,K]
    scores: Tensor  # float32 [B,K], -inf: no beam
    finished: Tensor  # float32 [B,groups,K/groups], see beam_search_step
    words: Tensor  # int64 [N,t], all words of every beam; [N,0] where no option needs them
    images: Tensor  # int64 [B], which of the images they are


class Step(NamedTuple):
    """What is kept of a step, to trace captions back: of B images, J beams that came in, K that went on."""

    images: Tensor  # int64 [B]
    tokens: Tensor  # int64 [B,K]
    parents: Tensor  # int64 [B,K], rows of B * J
    ended: Tensor  # float32 [B,J]
    weights: Tensor  # float [rows of the step before,P]


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
        features: [B,P,D] for each decoder. Captions depend neither on an image's batch nor on its place in it, but for
            the rounding of matrix products of other sizes.
        suppressed: words that are never written, beside <pad> and <start>.
        seeds: of every image, for sampling; 0, 1, 2, ... by default.

    Returns:
        For every image its `n_best` hypotheses (fewer where there are no more), best first.

    Raises:
        CallError: settings that do not go together.
        UserError: a decoder's output is not a number.
    """
    config.check()
    decoders = [decoders] if isinstance(decoders, Decoder) else decoders
    features = [features] if isinstance(features, Tensor) else features
    search = _Search(decoders, config, suppressed)
    beams = search.start(features, range(len(features[0])) if seeds is None else seeds)
    trail = []
    for t in range(config.max_length):
        beams, step = search.advance(beams, t)
        trail.append(step)
        is_live = (beams.scores != -torch.inf).any(dim=1)  # NaN lives on, to be found at the end
        live = int(is_live.sum())
        if live == 0:
            break
        if 2 * live <= len(is_live):  # copying the features of the others costs less than going on with all
            beams = search.keep(beams, is_live.nonzero().squeeze(1))
    return _trace_back(trail, beams, config, len(features[0]))


class _Search:
    def __init__(self, decoders: Sequence[Decoder], config: SearchConfig, suppressed: Sequence[int]):
        self.steps = [DecoderStep.of(decoder) for decoder in decoders]
        self.config = config
        self.ops = decoders[0].ops
        device = decoders[0].score_weight.device
        self.suppressed = torch.zeros(len(self.steps[0].word_table), dtype=torch.bool, device=device)
        self.suppressed[[Vocabulary.PAD, Vocabulary.START, *suppressed]] = True

    def start(self, features: Sequence[Tensor], seeds: Sequence[int]) -> Beams:
        """All beams of an image begin alike, so those that are compared with each other begin as one."""
        config, B, device = self.config, len(features[0]), features[0].device
        rows = config.beam_size if config.method == "sample" else config.groups
        started = [step.decoder.start(values, rows=1) for step, values in zip(self.steps, features, strict=True)]
        memories, states = zip(*started, strict=True)
        if config.method == "sample":  # a number in [0, 1) for every word that will be drawn
            draws = [torch.Generator().manual_seed(config.seed + seed) for seed in seeds]
            shape = (config.max_length, config.beam_size)
            self.draws = torch.stack([torch.rand(shape, generator=g, dtype=torch.double) for g in draws]).to(device)
        images = torch.arange(B, device=device)
        return Beams(
            memories,
            tuple(state.h for state in states),
            tuple(state.c for state in states),
            parents=images.unsqueeze(1).expand(B, rows),
            tokens=torch.full((B, rows), Vocabulary.START, device=device),
            scores=torch.zeros(B, rows, device=device),
            finished=torch.full((B, config.groups, config.beam_size // config.groups), -torch.inf, device=device),
            words=torch.empty(B * rows, 0, dtype=torch.int64, device=device),
            images=images,
        )

    def advance(self, beams: Beams, t: int) -> tuple[Beams, Step]:
        """One word further."""
        parents, tokens = beams.parents.flatten(), beams.tokens.flatten()
        looks = [step.look(*of) for step, *of in zip(self.steps, beams.memories, beams.h, strict=True)]
        h, c, logits = zip(
            *(step.write(*of, parents, tokens) for step, *of in zip(self.steps, looks, beams.c, strict=True)), strict=True
        )
        logits = logits[0] if len(logits) == 1 else mean_probability(logits)
        if logits.dtype == torch.float64:
            logits = logits.float()
        choose = self.sample if self.config.method == "sample" else self.choose
        chosen = choose(logits, beams, t, *self.repeated(beams.words))
        words = beams.words
        if self.config.no_repeat_ngram:
            words = torch.cat([words[chosen.parents.flatten()], chosen.tokens.view(-1, 1)], dim=1)
        weights = sum(look.weights for look in looks) / len(looks)
        trail = Step(beams.images, chosen.tokens, chosen.parents, chosen.ended, weights[parents])
        chosen = dict(parents=chosen.parents, tokens=chosen.tokens, scores=chosen.scores, finished=chosen.finished)
        return beams._replace(h=h, c=c, words=words, **chosen), trail

    def choose(
        self, logits: Tensor, beams: Beams, t: int, banned: Tensor | None, amounts: Tensor | None
    ) -> BeamSearchStep:
        """The best candidates, group by group."""
        config, (B, J), G = self.config, beams.scores.shape, self.config.groups
        options = dict(
            end=Vocabulary.END,
            end_allowed=t >= config.min_length,
            shrink=config.method == "shrink",
            suppressed=self.suppressed,
            temperature=config.temperature,
            length_penalty=config.divisor(t + 1),
            last_length_penalty=config.divisor(config.max_length),
        )
        if G == 1:
            penalties = dict(penalty_words=banned, penalties=amounts)
            chosen = self.ops.beam_search_step(logits, beams.scores, beams.finished[:, 0], **penalties, **options)
            return chosen._replace(finished=chosen.finished.unsqueeze(1))
        j = J // G  # beams of a group
        of_group = [x if x is None else x.view(B, G, j, -1) for x in (logits, banned, amounts)]
        first_row = J * torch.arange(B, device=logits.device).unsqueeze(1)
        chosen = []
        for g in range(G):
            values, words, penalties = (x if x is None else x[:, g].flatten(0, 1) for x in of_group)
            if g > 0:  # keep away from what the groups before chose
                taken = torch.cat([c.tokens.masked_fill(c.scores == -torch.inf, -1) for c in chosen], dim=1)
                taken = taken.repeat_interleave(j, dim=0)
                away = torch.full(taken.shape, config.diversity, device=logits.device)
                words, penalties = (
                    (taken, away)
                    if words is None
                    else (torch.cat([words, taken], dim=1), torch.cat([penalties, away], dim=1))
                )
            step = self.ops.beam_search_step(
                values,
                beams.scores[:, g * j : (g + 1) * j],
                beams.finished[:, g],
                penalty_words=words,
                penalties=penalties,
                **options,
            )
            chosen.append(step._replace(parents=first_row + g * j + step.parents % j))
        joined = BeamSearchStep(*(torch.cat(values, dim=1) for values in zip(*chosen, strict=True)))
        return joined._replace(finished=joined.finished.view(B, G, -1))

    def sample(
        self, logits: Tensor, beams: Beams, t: int, banned: Tensor | None, amounts: Tensor | None
    ) -> BeamSearchStep:
        """A word at random for every beam."""
        config, (B, K), V = self.config, beams.scores.shape, logits.shape[1]
        log_probs = (logits.float() / config.temperature).log_softmax(dim=1)
        allowed = log_probs.masked_fill(self.suppressed, -torch.inf)
        if t < config.min_length:
            allowed[:, Vocabulary.END] = -torch.inf
        if banned is not None:
            amounts = amounts.masked_fill(banned < 0, 0)
            allowed = allowed.scatter_add(1, banned.clamp(min=0), -amounts)
        ranked, words = allowed.sort(dim=1, descending=True, stable=True)
        if config.top_k:
            ranked[:, config.top_k :] = -torch.inf
        below = ranked.double().softmax(dim=1).cumsum(dim=1)  # the probability of this word and those before it
        total = below[:, -1:]
        if config.top_p < 1:  # of these the first to reach top_p is the last that can be drawn
            total = below.gather(1, (below < config.top_p).sum(dim=1, keepdim=True).clamp(max=V - 1))
        drawn = self.draws[beams.images, t].view(-1, 1) * total
        tokens = words.gather(1, (below <= drawn).sum(dim=1, keepdim=True).clamp(max=V - 1)).view(B, K)
        scores = beams.scores + log_probs.gather(1, tokens.view(-1, 1)).view(B, K)
        is_live = beams.scores != -torch.inf
        ends = (tokens == Vocabulary.END) & is_live
        goes_on = is_live & ~ends
        return BeamSearchStep(
            tokens=tokens.masked_fill(~goes_on, Vocabulary.END),
            parents=torch.arange(B * K, device=logits.device).view(B, K),
            scores=scores.masked_fill(~goes_on, -torch.inf),
            ended=scores.masked_fill(~ends, -torch.inf),
            finished=beams.finished,
        )

    def repeated(self, words: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """The words that would repeat an n-gram: [N,M], -1 where there is none, and infinite penalties."""
        n = self.config.no_repeat_ngram
        if not n or words.shape[1] < n:
            return None, None
        ngrams = words.unfold(1, n, 1)  # [N,M,n]
        last = words[:, words.shape[1] - n + 1 :].unsqueeze(1)
        banned = ngrams[:, :, -1].masked_fill((ngrams[:, :, :-1] != last).any(dim=2), -1)
        return banned, torch.full(banned.shape, torch.inf, device=words.device)

    def keep(self, beams: Beams, kept: Tensor) -> Beams:
        """The beams of some of the images."""
        B = len(beams.images)
        J = len(beams.h[0]) // B

        def rows(x: Tensor) -> Tensor:
            return x.view(B, len(x) // B, x.shape[1])[kept].flatten(0, 1)

        moved = J * (torch.arange(len(kept), device=kept.device) - kept).unsqueeze(1)
        return beams._replace(
            memories=tuple(Memory(*(x[kept] for x in memory)) for memory in beams.memories),
            h=tuple(map(rows, beams.h)),
            c=tuple(map(rows, beams.c)),
            parents=beams.parents[kept] + moved,
            tokens=beams.tokens[kept],
            scores=beams.scores[kept],
            finished=beams.finished[kept],
            words=rows(beams.words),
            images=beams.images[kept],
        )


def mean_probability(logits: Sequence[Tensor]) -> Tensor:
    """The logits of the mean of the probabilities."""
    return torch.stack([x.float().log_softmax(dim=1) for x in logits]).logsumexp(dim=0)


def _trace_back(trail: list[Step], beams: Beams, config: SearchConfig, B: int) -> list[list[Hypothesis]]:
    """Choose each image's best and follow them through their parents to the first word."""
    T, K = len(trail), config.beam_size
    tokens, parents = np.zeros((T, B, K), dtype=np.int64), np.zeros((T, B, K), dtype=np.int64)  # parents by beam
    scores = np.full((B, (T + 1) * K), -np.inf, dtype=np.float32)  # of what ended in each step, then of live beams
    rows = np.zeros((T, B), dtype=np.int64)  # an image's first row in each step
    for t, step in enumerate(trail):
        images, J = step.images.cpu().numpy(), step.ended.shape[1]
        rows[t, images] = J * np.arange(len(images))
        tokens[t, images] = step.tokens.cpu().numpy()
        parents[t, images] = step.parents.cpu().numpy() % J
        scores[images, t * K : t * K + J] = step.ended.cpu().numpy()
    live = beams.images.cpu().numpy()
    scores[live, T * K :] = beams.scores.cpu().numpy()
    if np.isnan(scores).any():
        images = np.isnan(scores).any(axis=1).nonzero()[0].tolist()
        raise UserError(
            f"the decoder's output for {len(images)} of {B} images, the first at place {images[0]} of its batch, is not "
            "a number; the model's weights or the image's features are not finite"
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
    length[~np.isfinite(scores[image, place])] = 0

    words = np.zeros((len(image), T), dtype=np.int64)
    attention = beams.h[0].new_zeros(len(image), T, trail[0].weights.shape[1])
    for t in range(T - 1, -1, -1):
        [written] = (t < length).nonzero()
        words[written, t] = tokens[t, image[written], beam[written]]
        beam[written] = parents[t, image[written], beam[written]]
        row = torch.from_numpy(rows[t, image[written]] + beam[written])
        attention[torch.from_numpy(written), t] = trail[t].weights[row.to(attention.device)]
    attention = attention.float().cpu()
    hypotheses = [[] for _ in range(B)]
    for i, (b, n) in enumerate(zip(image, length, strict=True)):
        hypotheses[b].append(Hypothesis(words[i, :n].tolist(), float(scores[b, place[i]]), attention[i, :n]))
    return hypotheses
