"""Settings of a search."""

from dataclasses import dataclass
from typing import Literal

from attncap.config import MAX_BEAMS
from attncap.errors import CallError


@dataclass(frozen=True)
class SearchConfig:
    """How captions are searched for. Raises CallError for settings that do not go together."""

    beam_size: int = 5
    """Hypotheses per image that are followed at once (K), at most 32; 1 is greedy search."""
    method: Literal["shrink", "fixed", "sample"] = "shrink"
    """shrink: a beam that ends is taken out and the width shrinks (Show, Attend and Tell). fixed: the width stays,
    until no beam can improve on the captions that have ended. sample: every beam draws its words at random."""
    max_length: int = 50
    """Maximum length of a caption in words, the end included."""
    min_length: int = 0
    """Minimum length of a caption in words."""
    length_penalty: Literal["none", "average"] | float = "none"
    """What a finished caption's score is divided by before captions are compared: none, its length (average), or, for a
    number alpha, ((5 + length) / 6) ** alpha (Wu et al. 2016, equation 14). The end counts in the length."""
    no_repeat_ngram: int = 0
    """Never write a sequence of this many words twice in a caption; 0: no such rule."""
    suppressed: tuple[str, ...] = ("<unk>",)
    """Words that no caption contains; for a model of subwords, pieces as in its vocabulary.json."""
    prefix: str = ""
    """Words that every caption starts with."""
    temperature: float = 1.0
    """What the logits are divided by; for an ensemble, those of the mean probability."""
    n_best: int = 1
    """Captions returned for each image, best first."""
    groups: int = 1
    """Groups of beams, each of which avoids the words that the groups before it chose (diverse beam search, Vijayakumar
    et al. 2016); divides the beam size."""
    diversity: float = 0.5
    """What is subtracted from a score for each beam of an earlier group that chose the same word in the same step. It
    stays in the score. The end is not a word, so groups may end in the same caption."""
    top_k: int = 0
    """sample: draw from this many most probable words only; 0: from all."""
    top_p: float = 1.0
    """sample: draw only from the most probable words that reach this probability together."""
    sample_seed: int = 0
    """sample: the seed. What is drawn for an image depends on this and on the image alone."""

    def __post_init__(self) -> None:
        suppressed = [self.suppressed] if isinstance(self.suppressed, str) else self.suppressed
        object.__setattr__(self, "suppressed", tuple(word for text in suppressed for word in text.split()))
        if self.method not in ("shrink", "fixed", "sample"):
            raise CallError(f"method={self.method!r}: choose 'shrink', 'fixed' or 'sample'")
        if isinstance(self.length_penalty, str) and self.length_penalty not in ("none", "average"):
            raise CallError(f"length_penalty={self.length_penalty!r}: choose 'none', 'average' or a number")
        if not 1 <= self.beam_size <= MAX_BEAMS:
            raise CallError(f"beam_size={self.beam_size}: must be from 1 to {MAX_BEAMS}")
        if not 0 <= self.min_length < self.max_length:
            raise CallError(f"min_length={self.min_length}: must be at least 0 and below max_length={self.max_length}")
        if not 1 <= self.n_best <= self.beam_size:
            raise CallError(f"n_best={self.n_best}: must be from 1 to beam_size={self.beam_size}")
        if self.groups < 1 or self.beam_size % self.groups:
            raise CallError(f"groups={self.groups}: must divide beam_size={self.beam_size}")
        if self.groups > 1 and self.method == "sample":
            raise CallError(f"groups={self.groups}: sampling has no groups; use groups=1 or another method")
        if not isinstance(self.length_penalty, str) and not 0 <= self.length_penalty <= 10:
            raise CallError(f"length_penalty={self.length_penalty}: must be from 0 to 10")
        if not 1e-3 <= self.temperature <= 1e3:
            raise CallError(f"temperature={self.temperature}: must be from 0.001 to 1000")
        if not 0 < self.top_p <= 1:
            raise CallError(f"top_p={self.top_p}: must be above 0 and at most 1")
        for name in ("diversity", "no_repeat_ngram", "top_k", "sample_seed"):
            if not getattr(self, name) >= 0:
                raise CallError(f"{name}={getattr(self, name)}: must be at least 0")

    def divisor(self, length: int) -> float:
        """The length penalty of a caption of so many words, the end included."""
        if self.length_penalty == "none":
            return 1.0
        return float(length) if self.length_penalty == "average" else ((5 + length) / 6) ** self.length_penalty
