"""Settings of a search."""

from dataclasses import dataclass
from typing import Literal

from attncap.config import MAX_BEAMS
from attncap.errors import CallError


@dataclass(frozen=True)
class SearchConfig:
    """How captions are searched for."""

    beam_size: int = 5
    """K, hypotheses an image followed at once; 1 is greedy. At most 32."""
    method: Literal["shrink", "fixed", "sample"] = "shrink"
    """shrink: a beam that ends is taken out and the width shrinks (Show, Attend and Tell). fixed: the width stays,
    until no beam can better the captions that ended. sample: every beam draws its words at random."""
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
    """What the logits, of an ensemble those of the mean probability, are divided by."""
    n_best: int = 1
    """Captions returned for an image, best first."""
    groups: int = 1
    """Groups of beams, each of which is kept from the words that those before it chose (diverse beam search,
    Vijayakumar et al. 2016); divides the beam size."""
    diversity: float = 0.5
    """What is subtracted from a score for each beam of an earlier group that chose the same word in the same step. It
    stays in the score. The end is no word, so groups may end in the same caption."""
    top_k: int = 0
    """sample: only so many of the likeliest words can be drawn; 0: all."""
    top_p: float = 1.0
    """sample: only the likeliest words that together have this probability can be drawn."""
    sample_seed: int = 0
    """sample: the seed. What is drawn for an image depends on it and on the image alone."""

    def check(self) -> None:
        """Raises CallError for settings that do not go together."""
        if self.method not in ("shrink", "fixed", "sample"):
            raise CallError(f"--method {self.method}: choose shrink, fixed or sample")
        if isinstance(self.length_penalty, str) and self.length_penalty not in ("none", "average"):
            raise CallError(f"--length-penalty {self.length_penalty}: choose none, average or a number")
        if not 1 <= self.beam_size <= MAX_BEAMS:
            raise CallError(f"--beam-size {self.beam_size}: must be from 1 to {MAX_BEAMS}")
        if not 0 <= self.min_length < self.max_length:
            raise CallError(f"--min-length {self.min_length}: must be below --max-length {self.max_length}")
        if not 1 <= self.n_best <= self.beam_size:
            raise CallError(f"--n-best {self.n_best}: must be from 1 to --beam-size {self.beam_size}")
        if self.groups < 1 or self.beam_size % self.groups:
            raise CallError(f"--groups {self.groups}: must divide --beam-size {self.beam_size}")
        if self.groups > 1 and self.method == "sample":
            raise CallError("--groups: samples are not searched in groups; leave it out, or --method sample")
        if isinstance(self.length_penalty, float | int) and not 0 <= self.length_penalty <= 10:
            raise CallError(f"--length-penalty {self.length_penalty}: must be from 0 to 10")
        if not 1e-3 <= self.temperature <= 1e3:
            raise CallError(f"--temperature {self.temperature}: must be from 0.001 to 1000")
        if not 0 < self.top_p <= 1:
            raise CallError(f"--top-p {self.top_p}: must be above 0 and at most 1")
        for name in ("diversity", "no_repeat_ngram", "top_k", "sample_seed"):
            if not getattr(self, name) >= 0:
                raise CallError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 0")

    def divisor(self, length: int) -> float:
        """The length penalty of a caption of so many words, the end included."""
        if self.length_penalty == "none":
            return 1.0
        return float(length) if self.length_penalty == "average" else ((5 + length) / 6) ** self.length_penalty
