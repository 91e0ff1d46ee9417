"""How beams start and continue: a step of the search, for all images at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attncap.data.vocabulary import Vocabulary
from attncap.models.decoder import Decoder, State
from attncap.ops import BACKENDS
from attncap.ops.beam_search_step import BeamSearchStep
from attncap.search.config import SearchConfig
from attncap.search.processors import ForcedPrefix, LogitsProcessor, MinLength, NoRepeatNgram, SuppressTokens
from attncap.search.sampling import draw, uniform_numbers


class Beams(NamedTuple):
    """Where the search stands. A decoder's state has J rows for each of the B images: the beams that the last step
    started from. The N = B * K beams that continue are known by their parents among these rows and by their tokens;
    they become rows in the next step."""

    states: tuple[State, ...]  # of each decoder, R = B * J rows
    width: int  # J
    parents: Tensor  # int64 [B,K], rows of the states
    tokens: Tensor  # int64 [B,K]
    scores: Tensor  # float32 [B,K], -inf: no beam
    finished: Tensor  # float32 [B,groups,K/groups], see beam_search_step
    history: Tensor  # int64 [N,t], all words of every beam; [N,0] where no processor reads them
    images: Tensor  # int64 [B], which of the search's images these are


class Step(NamedTuple):
    """What is kept of a step, to trace captions back. B images, J beams that came in, K that continue."""

    images: Tensor  # int64 [B]
    tokens: Tensor  # int64 [B,K]
    parents: Tensor  # int64 [B,K], rows of B * J
    ended: Tensor  # float32 [B,J], scores of the hypotheses that ended here; -inf: the beam did not end
    attention: Tensor | None  # [B*J,P]


def pack(steps: Sequence[Step], beams: Beams) -> tuple[Tensor, Tensor]:
    """All that is needed on the host to trace captions back, apart from the attention: integers int64, then scores
    float32."""
    integers = [x.flatten() for step in steps for x in step[:3]]
    scores = [step.ended.flatten() for step in steps]
    return torch.cat([*integers, beams.images]), torch.cat([*scores, beams.scores.flatten()])


def unpack(integers: Tensor, scores: Tensor, steps: Sequence[Step], beams: Beams) -> tuple[list[Step], Beams]:
    """The same steps and beams, with views of what `pack` returned, or of a copy."""

    def views(packed: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        parts = packed.split([x.numel() for x in like])
        return [part.view(x.shape) for part, x in zip(parts, like, strict=True)]

    *integers, images = views(integers, [x for step in steps for x in step[:3]] + [beams.images])
    *ended, scores = views(scores, [*(step.ended for step in steps), beams.scores])
    steps = [Step(*integers[3 * t : 3 * t + 3], ended[t], step.attention) for t, step in enumerate(steps)]
    return steps, beams._replace(images=images, scores=scores)


def to_host(steps: Sequence[Step], beams: Beams) -> tuple[list[Step], Beams]:
    """The same with all but the attention on the host, in two copies."""
    return unpack(*(x.cpu() for x in pack(steps, beams)), steps, beams)


class Search:
    """How beams start, and how they continue: all on the device, without looking at any value.

    The fused op applies the processors of the classes in processors.py itself. Others are called, which takes the
    log-probabilities of all words."""

    def __init__(
        self,
        decoders: Sequence[Decoder],
        config: SearchConfig,
        processors: Sequence[LogitsProcessor],
        device: torch.device,
        backend: str = "native",
        with_attention: bool = True,
    ):
        self.decoders, self.config, self.with_attention = decoders, config, with_attention
        self.ops = BACKENDS[backend]
        V = decoders[0].vocabulary_size
        self.suppressed = torch.zeros(V, dtype=torch.bool, device=device)
        self.suppressed[[Vocabulary.PAD, Vocabulary.START]] = True
        self.min_length = config.min_length
        self.ngrams = [NoRepeatNgram(config.no_repeat_ngram)] if config.no_repeat_ngram else []
        self.forced: dict[int, Tensor] = {}  # by step: all words but the one that is forced
        self.others: list[LogitsProcessor] = []
        for rule in processors:
            match rule:
                case SuppressTokens(tokens):
                    self.suppressed[list(tokens)] = True
                case MinLength(length):
                    self.min_length = max(length, self.min_length)
                case NoRepeatNgram():
                    self.ngrams.append(rule)
                case ForcedPrefix(tokens):
                    words = torch.arange(V, device=device)
                    self.forced |= {t: words != token for t, token in enumerate(tokens)}
                case _:
                    self.others.append(rule)
        self.suppressed[Vocabulary.END] = False  # when a caption may end is min_length's business
        self.keeps_history = bool(self.ngrams or self.others)

    def start(self, features: Sequence[Tensor], seeds: Sequence[int] = ()) -> Beams:
        """All beams of an image start alike, so those that are compared with each other start as one."""
        config, B, device = self.config, len(features[0]), features[0].device
        rows = config.beam_size if config.method == "sample" else config.groups
        if config.method == "sample":
            if len(seeds) != B:
                raise ValueError(f"{len(seeds)} seeds for {B} images")
            seeds = [(config.sample_seed, seed) for seed in seeds]
            self.uniform = uniform_numbers(seeds, config.max_length, rows).to(device)
        images = torch.arange(B, device=device)
        float32 = dict(dtype=torch.float32, device=device)
        return Beams(
            states=tuple(decoder.start(x) for decoder, x in zip(self.decoders, features, strict=True)),
            width=1,
            parents=images.unsqueeze(1).expand(B, rows),
            tokens=torch.full((B, rows), Vocabulary.START, device=device),
            scores=torch.zeros(B, rows, **float32),
            finished=torch.full((B, config.groups, config.beam_size // config.groups), -torch.inf, **float32),
            history=torch.empty(B * rows, 0, dtype=torch.int64, device=device),
            images=images,
        )

    def advance(self, beams: Beams, t: int) -> tuple[Beams, Step]:
        """Take all beams one word further; t counts the words so far."""
        parents, tokens = beams.parents.flatten(), beams.tokens.flatten()
        stepped = [
            decoder.step(state, parents, tokens) for decoder, state in zip(self.decoders, beams.states, strict=True)
        ]
        states, logits, attention = zip(*stepped, strict=True)
        logits = logits[0] if len(logits) == 1 else mean_probability(logits)
        logits = logits.float() if logits.dtype == torch.float64 else logits
        if self.config.method == "sample":
            chosen = self.sample(logits, beams, t)
        else:
            chosen = self.choose(logits, beams, t)
        history = beams.history
        if self.keeps_history:
            history = torch.cat([history[chosen.parents.flatten()], chosen.tokens.view(-1, 1)], dim=1)
        mean_attention = None
        if self.with_attention:
            mean_attention = attention[0] if len(attention) == 1 else torch.stack(attention).mean(dim=0)
        step = Step(beams.images, chosen.tokens, chosen.parents, chosen.ended, mean_attention)
        beams = beams._replace(
            states=states,
            width=beams.tokens.shape[1],
            parents=chosen.parents,
            tokens=chosen.tokens,
            scores=chosen.scores,
            finished=chosen.finished,
            history=history,
        )
        return beams, step

    def choose(self, logits: Tensor, beams: Beams, t: int) -> BeamSearchStep:
        """The best candidates, group by group."""
        config, (B, J), G = self.config, beams.scores.shape, self.config.groups
        logits, temperature = self.process(logits, beams.history)
        banned, penalties = self.repeated(beams.history) if t not in self.forced else (None, None)
        options = dict(
            end=Vocabulary.END,
            end_allowed=t >= self.min_length and t not in self.forced,
            shrink=config.method == "shrink",
            suppressed=self.forced.get(t, self.suppressed),
            temperature=temperature,
            length_penalty=config.divisor(t + 1),
            last_length_penalty=config.divisor(config.max_length),
        )
        if G == 1:
            chosen = self.ops.beam_search_step(
                logits, beams.scores, beams.finished[:, 0], penalty_tokens=banned, penalties=penalties, **options
            )
            return chosen._replace(finished=chosen.finished.unsqueeze(1))
        j = J // G  # beams of a group
        first_row = J * torch.arange(B, device=logits.device).unsqueeze(1)
        by_group = [x if x is None else x.view(B, G, j, -1) for x in (logits, banned, penalties)]
        chosen = []
        for g in range(G):
            group_logits, words, amounts = (x if x is None else x[:, g].flatten(0, 1) for x in by_group)
            if g > 0:  # keep away from the words that the groups before chose
                taken = torch.cat([c.tokens.masked_fill(c.scores == -torch.inf, -1) for c in chosen], dim=1)
                taken = taken.repeat_interleave(j, dim=0)
                away = torch.full(taken.shape, config.diversity, dtype=torch.float32, device=logits.device)
                words = taken if words is None else torch.cat([words, taken], dim=1)
                amounts = away if amounts is None else torch.cat([amounts, away], dim=1)
            step = self.ops.beam_search_step(
                group_logits,
                beams.scores[:, g * j : (g + 1) * j],
                beams.finished[:, g],
                penalty_tokens=words,
                penalties=amounts,
                **options,
            )
            chosen.append(step._replace(parents=first_row + g * j + step.parents % j))
        joined = BeamSearchStep(*(torch.cat(values, dim=1) for values in zip(*chosen, strict=True)))
        return joined._replace(finished=joined.finished.view(B, G, -1))

    def process(self, logits: Tensor, history: Tensor) -> tuple[Tensor, float]:
        """Apply the processors that the fused op does not know: logits, and the temperature that is left to apply."""
        if not self.others:
            return logits, self.config.temperature
        log_probs = (logits.float() / self.config.temperature).log_softmax(dim=1)
        for rule in self.others:
            log_probs = rule(log_probs, history).float()
        # The op takes a softmax. What the rules took away goes to <pad>, so that the other words keep their values. (If
        # rules make the sum of the probabilities larger than 1, the softmax divides by it.)
        log_probs = log_probs.clone()
        log_probs[:, Vocabulary.PAD] = -torch.inf
        missing = (1 - log_probs.double().exp().sum(dim=1)).clamp(min=0).log()
        log_probs[:, Vocabulary.PAD] = missing.float()
        return log_probs, 1.0

    def repeated(self, history: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """The words that would repeat an n-gram, int64 [N,M], and infinite penalties for them."""
        banned = [words for rule in self.ngrams if (words := rule.banned(history)) is not None]
        if not banned:
            return None, None
        banned = torch.cat(banned, dim=1)
        return banned, torch.full(banned.shape, torch.inf, dtype=torch.float32, device=history.device)

    def sample(self, logits: Tensor, beams: Beams, t: int) -> BeamSearchStep:
        """A random word for each beam."""
        config, (B, K) = self.config, beams.scores.shape
        log_probs = (logits.float() / config.temperature).log_softmax(dim=1)
        allowed = log_probs.masked_fill(self.forced.get(t, self.suppressed), -torch.inf)
        if t < self.min_length:
            allowed[:, Vocabulary.END] = -torch.inf
        for rule in (*(self.ngrams if t not in self.forced else ()), *self.others):
            allowed = rule(allowed, beams.history).float()
        uniform = self.uniform[beams.images, t].flatten()
        tokens = draw(allowed, uniform, config.top_k, config.top_p).view(B, K)
        scores = beams.scores + log_probs.gather(1, tokens.view(-1, 1)).view(B, K)
        scores = scores.masked_fill(allowed.isnan().any(dim=1).view(B, K), torch.nan)  # to be found at the end
        is_live = (beams.scores != -torch.inf) & (allowed != -torch.inf).any(dim=1).view(B, K)  # some word is allowed
        ends = (tokens == Vocabulary.END) & is_live
        continues = is_live & ~ends
        return BeamSearchStep(
            tokens=tokens.masked_fill(~continues, Vocabulary.END),
            parents=torch.arange(B * K, device=logits.device).view(B, K),
            scores=scores.masked_fill(~continues, -torch.inf),
            ended=scores.masked_fill(~ends, -torch.inf),
            finished=beams.finished,
        )

    def is_live(self, beams: Beams) -> Tensor:
        """bool [B]: the images that have beams left. NaN counts as live, so that it is found at the end."""
        return (beams.scores != -torch.inf).any(dim=1)

    def select(self, beams: Beams, images: Tensor) -> Beams:
        """The beams of some of the images, int64 [B']."""
        B = len(beams.images)
        moved = beams.width * (torch.arange(len(images), device=images.device) - images).unsqueeze(1)
        return Beams(
            states=tuple(
                decoder.select(state, images) for decoder, state in zip(self.decoders, beams.states, strict=True)
            ),
            width=beams.width,
            parents=beams.parents[images] + moved,
            tokens=beams.tokens[images],
            scores=beams.scores[images],
            finished=beams.finished[images],
            history=beams.history.unflatten(0, (B, -1))[images].flatten(0, 1),
            images=beams.images[images],
        )


def mean_probability(logits: Sequence[Tensor]) -> Tensor:
    """The logits of the mean of the probabilities."""
    return torch.stack([x.float().log_softmax(dim=1) for x in logits]).logsumexp(dim=0)
