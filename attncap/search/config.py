"""Settings of a search."""

from dataclasses import dataclass
from typing import Literal

from attncap.config import MAX_BEAMS, check_at_least, check_types
from attncap.errors import CallError


@dataclass(frozen=True)
class SearchConfig:
    """The search: how captions are found."""

    beam_size: int = 5
    """Beams per image: partial captions followed at the same time. 1 is greedy search; at most 32."""
    method: Literal["shrink", "fixed", "sample"] = "shrink"
    """shrink: a finished beam is removed and the width shrinks by one (Show, Attend and Tell).
    fixed: the width stays the same until no beam can beat the finished captions.
    sample: every beam draws its words at random."""
    max_length: int = 50
    """Maximum number of steps. Each step adds a word or ends the caption."""
    min_length: int = 0
    """Minimum number of words in a caption."""
    length_penalty: Literal["none", "average"] | float = "none"
    """What a finished caption's score is divided by before captions are compared.
    none: it is not divided. average: its length.
    A number alpha: ((5 + length) / 6) ** alpha (Wu et al. 2016, equation 14). The length includes <end>."""
    no_repeat_ngram: int = 0
    """No sequence of this many words occurs twice in a caption. 0: no limit."""
    temperature: float = 1.0
    """The logits are divided by this; in an ensemble, the logarithms of the mean probabilities are."""
    n_best: int = 1
    """Captions per image, best first. At most the beam size."""
    groups: int = 1
    """Diverse beam search: groups of beams, each discouraged from the words that earlier groups chose.
    Must divide the beam size (Vijayakumar et al. 2016)."""
    diversity: float = 0.5
    """Diverse beam search: amount subtracted from a score for each beam of an earlier group that chose the same word in
    that step; above 0. It stays in the score. <end> does not count as a word, so groups may find the same caption."""
    top_k: int = 0
    """sample: draw only from this many of the most likely words. 0: from all words."""
    top_p: float = 1.0
    """sample: draw only from the most likely words that together have this probability."""
    sample_seed: int = 0
    """sample: random seed. What is drawn for an image depends on the seed and the image alone."""
    suppressed: tuple[str, ...] = ("<unk>",)
    """Words that never occur in a caption. "" suppresses none.
    For a model with subwords, entries as they are written in its vocabulary.json."""
    prefix: str = ""
    """Words that every caption starts with."""

    def __post_init__(self) -> None:
        """Split `suppressed` into words. Raises CallError for values that are out of range or contradict each other."""
        parts = (self.suppressed,) if isinstance(self.suppressed, str) else self.suppressed
        if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
            raise CallError("suppressed: must be a tuple of words")
        object.__setattr__(self, "suppressed", tuple(word for part in parts for word in part.split()))
        check_types(self)
        if isinstance(self.length_penalty, str):
            if self.length_penalty not in ("none", "average"):
                raise CallError(f"length_penalty={self.length_penalty!r}: choose none, average or a number")
        elif type(self.length_penalty) not in (float, int) or not 0 <= self.length_penalty <= 10:
            raise CallError(f"length_penalty={str(self.length_penalty)[:20]}: must be a number from 0 to 10")
        check_at_least(self, 1, "max_length")
        if not 1 <= self.beam_size <= MAX_BEAMS:
            raise CallError(f"beam_size={self.beam_size}: must be from 1 to {MAX_BEAMS}")
        if not 0 <= self.min_length < self.max_length:
            raise CallError(f"min_length={self.min_length}: must be below max_length={self.max_length}, and at least 0")
        if not 1 <= self.n_best <= self.beam_size:
            raise CallError(f"n_best={self.n_best}: must be from 1 to beam_size={self.beam_size}")
        if self.groups < 1 or self.beam_size % self.groups:
            raise CallError(f"groups={self.groups}: must divide beam_size={self.beam_size}")
        if self.groups > 1 and self.method == "sample":
            raise CallError(f"groups={self.groups}: method='sample' has no groups; leave out one of the two")
        if self.groups > 1 and self.diversity == 0:
            raise CallError(f"diversity=0: all {self.groups} groups would find the same captions; leave out groups")
        if not 1e-3 <= self.temperature <= 1e3:
            raise CallError(f"temperature={self.temperature}: must be from 0.001 to 1000")
        if not 0 < self.top_p <= 1:
            raise CallError(f"top_p={self.top_p}: must be above 0 and at most 1")
        check_at_least(self, 0, "no_repeat_ngram", "diversity", "top_k", "sample_seed")

    def divisor(self, length: int) -> float:
        """What the score of a caption of `length` words, including the end, is divided by."""
        if self.length_penalty == "none":
            return 1.0
        return float(length) if self.length_penalty == "average" else ((5 + length) / 6) ** self.length_penalty
