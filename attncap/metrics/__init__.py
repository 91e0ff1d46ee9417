"""The standard caption metrics, with the same results as pycocoevalcap. Only METEOR and SPICE need Java."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy import ndarray

from attncap.data.tokenizer import characters, lacks_spaces, tokenize
from attncap.errors import UserError
from attncap.metrics import java
from attncap.metrics.bleu import bleu, bleu_statistics
from attncap.metrics.cider import cider
from attncap.metrics.rouge import rouge_l

log = logging.getLogger("attncap")

BLEU = [f"BLEU-{n}" for n in range(1, 5)]


@dataclass
class Scores:
    """The scores of I images with one caption each, kept by image so that corpora can be resampled."""

    images: list[str]
    statistics: ndarray
    """The counts from which BLEU is computed, [I,4,4], see `bleu_statistics`."""
    by_image: dict[str, ndarray]
    """The metrics whose score for the corpus is the mean over the images, [I] each."""
    meteor: ndarray | None = None
    """The counts from which METEOR is computed, [I,23], see `meteor_statistics`; None without METEOR."""
    skipped: dict[str, str] = field(default_factory=dict)
    """The reason for each metric that was requested and failed."""
    by_characters: bool = False
    """Whether the words that are compared are characters, see `score`."""

    def corpus(self) -> dict[str, float]:
        """The metrics of the whole corpus. BLEU and METEOR are computed from the sums of their counts; the others are
        means over the images."""
        return {name: float(value) for name, [value] in self.resampled(np.ones((1, len(self.images)))).items()}

    def resampled(self, counts: ndarray) -> dict[str, ndarray]:
        """The metrics, [S] each, of S corpora, where corpus s contains image i counts[s,i] times. CIDEr keeps the
        document frequencies of the original corpus."""
        means = {name: counts @ values / counts.sum(1) for name, values in self.by_image.items()}
        return {**self._from_statistics(lambda statistics: np.tensordot(counts, statistics.astype(float), 1)), **means}

    def rows(self) -> list[dict[str, float]]:
        """The metrics of each image on its own."""
        columns = {**self._from_statistics(lambda statistics: statistics), **self.by_image}
        return [{name: float(v[i]) for name, v in columns.items()} for i in range(len(self.images))]

    def _from_statistics(self, aggregate: Callable[[ndarray], ndarray]) -> dict[str, ndarray]:
        metrics = dict(zip(BLEU, bleu(aggregate(self.statistics)).T, strict=True))
        return metrics if self.meteor is None else {**metrics, "METEOR": java.meteor(aggregate(self.meteor))}


def score(
    predictions: Mapping[str, str], references: Mapping[str, Sequence[str]], java_metrics: Collection[str] = ()
) -> Scores:
    """Score one caption per image against the image's references.

    The metrics are BLEU-1 to BLEU-4 and ROUGE-L (0 to 1) and CIDEr (0 to 10), which is CIDEr-D as in coco-caption.
    `java_metrics` adds "METEOR" or "SPICE" (0 to 1); one that fails is skipped with a warning.

    The words are those of `tokenize`. Where the references are in a script without spaces between words, such as
    Chinese or Thai, and have none, its characters are compared instead: otherwise a whole clause would be one word.

    Both mappings are keyed by image and must have the same images. Raises UserError if there are no captions, or if an
    image has a caption but no references, or references but no caption.
    """
    if not predictions:
        raise UserError("no captions to score")
    for name in predictions:
        if not references.get(name):
            raise UserError(f"image {name} has a caption but no references to score it against")
    if without_caption := references.keys() - predictions.keys():
        count, first = len(without_caption), min(without_caption, key=str)
        raise UserError(f"{count} images with references have no caption, e.g. image {first}")
    words = [tokenize(caption) for caption in predictions.values()]
    refs = [[tokenize(caption) for caption in references[name]] for name in predictions]
    by_characters = lacks_spaces(caption for name in predictions for caption in references[name])
    if by_characters:
        words, refs = list(map(characters, words)), [list(map(characters, captions)) for captions in refs]
    by_image = {"ROUGE-L": np.array(rouge_l(words, refs)), "CIDEr": cider(words, refs)}
    scores = Scores(list(predictions), bleu_statistics(words, refs), by_image, by_characters=by_characters)
    for name in java_metrics:
        try:
            if name == "METEOR":
                scores.meteor = java.meteor_statistics(words, refs)
            else:
                scores.by_image[name] = java.spice(words, refs)
        except UserError as error:  # the other metrics are still useful
            scores.skipped[name] = str(error)
            log.warning("%s skipped: %s", name, error)
    return scores
