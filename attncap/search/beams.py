"""How beams begin and go on: a step of the search, for all images at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from attncap.data.vocabulary import Vocabulary
from attncap.models.decoder import Memory
from attncap.ops.beam_search_step import BeamSearchStep, subtract_penalties
from attncap.search.decoder_step import DecoderStep
from attncap.search.search_config import SearchConfig


class Beams(NamedTuple):
    """Where the search stands. The J beams of an image are neighbours among the R = B * J rows; the N = B * K that go
    on from them are known by their parents and tokens, and become rows in the next step."""

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
    weights: Tensor  # [R,P], attention of the rows of the step before


class Search:
    """How beams begin, and how they go on: all on the device, without a look at any value."""

    def __init__(self, steps: Sequence[DecoderStep], config: SearchConfig, suppressed: Sequence[int]):
        self.steps = steps
        self.config = config
        self.ops = steps[0].ops
        table = steps[0].word_table
        self.suppressed = torch.zeros(len(table), dtype=torch.bool, device=table.device)
        self.suppressed[[Vocabulary.PAD, Vocabulary.START, *suppressed]] = True
        self.suppressed[Vocabulary.END] = False

    def start(self, features: Sequence[Tensor], seeds: Sequence[int]) -> Beams:
        """All beams of an image begin alike, so those that are compared with each other begin as one."""
        config, B, device = self.config, len(features[0]), features[0].device
        rows = config.beam_size if config.method == "sample" else config.groups
        started = [step.start(values) for step, values in zip(self.steps, features, strict=True)]
        memories, h, c = zip(*started, strict=True)
        if config.method == "sample":  # a number in [0, 1) for every word that will be drawn
            draws = np.empty((B, config.max_length, config.beam_size))
            for of_image, seed in zip(draws, seeds, strict=True):
                np.random.default_rng((config.sample_seed, seed)).random(out=of_image)
            self.draws = torch.from_numpy(draws).to(device)
        images = torch.arange(B, device=device)
        return Beams(
            memories,
            h,
            c,
            parents=images.unsqueeze(1).expand(B, rows),
            tokens=torch.full((B, rows), Vocabulary.START, device=device),
            scores=torch.zeros(B, rows, dtype=torch.float32, device=device),
            finished=torch.full(
                (B, config.groups, config.beam_size // config.groups), -torch.inf, dtype=torch.float32, device=device
            ),
            words=torch.empty(B * rows, 0, dtype=torch.int64, device=device),
            images=images,
        )

    def advance(self, beams: Beams, t: int) -> tuple[Beams, Step]:
        """One word further."""
        parents, tokens = beams.parents.flatten(), beams.tokens.flatten()
        looks = [step.look(*of) for step, *of in zip(self.steps, beams.memories, beams.h, strict=True)]
        h, c, logits = zip(
            *(step.write(*of, parents, tokens) for step, *of in zip(self.steps, looks, beams.c, strict=True)),
            strict=True,
        )
        logits = logits[0] if len(logits) == 1 else mean_probability(logits)
        if logits.dtype == torch.float64:
            logits = logits.float()
        choose = self.sample if self.config.method == "sample" else self.choose
        chosen = choose(logits, beams, t, *self.repeated(beams.words))
        words = beams.words
        if self.config.no_repeat_ngram:
            words = torch.cat([words[chosen.parents.flatten()], chosen.tokens.view(-1, 1)], dim=1)
        weights = looks[0].weights if len(looks) == 1 else torch.stack([look.weights for look in looks]).mean(dim=0)
        trail = Step(beams.images, chosen.tokens, chosen.parents, chosen.ended, weights)
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
            penalties = dict(penalty_tokens=banned, penalties=amounts)
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
                away = torch.full(taken.shape, config.diversity, dtype=torch.float32, device=logits.device)
                words = taken if words is None else torch.cat([words, taken], dim=1)
                penalties = away if penalties is None else torch.cat([penalties, away], dim=1)
            step = self.ops.beam_search_step(
                values,
                beams.scores[:, g * j : (g + 1) * j],
                beams.finished[:, g],
                penalty_tokens=words,
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
            allowed = subtract_penalties(allowed, banned, amounts)
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
        is_live = (beams.scores != -torch.inf) & (ranked[:, 0] != -torch.inf).view(B, K)  # some word is allowed
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
        return banned, torch.full(banned.shape, torch.inf, dtype=torch.float32, device=words.device)

    def is_live(self, beams: Beams) -> Tensor:
        """bool [B]: the images that have beams left. NaN lives on, to be found at the end."""
        return (beams.scores != -torch.inf).any(dim=1)

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
