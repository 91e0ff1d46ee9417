"""The official caption metrics, equal to pycocoevalcap's figures; only METEOR and SPICE need Java."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy import ndarray

from attncap.data.tokenizer import tokenize
from attncap.errors import UserError
from attncap.metrics import java
from attncap.metrics.bleu import bleu, bleu_statistics
from attncap.metrics.cider import cider
from attncap.metrics.ngrams import Corpus
from attncap.metrics.rouge import rouge_l

log = logging.getLogger("attncap")

BLEU = [f"BLEU-{n}" for n in range(1, 5)]


@dataclass
class Scores:
    """The figures of I captions, one an image, kept by image."""

    images: list[str]
    statistics: ndarray
    """What BLEU is computed from, [I,4,4], see `bleu_statistics`."""
    by_image: dict[str, ndarray]
    """The figures that a corpus has the mean of, [I] each."""
    meteor: ndarray | None = None
    """What METEOR is computed from, [I,23], see `meteor_statistics`; None: without METEOR."""
    left_out: dict[str, str] = field(default_factory=dict)
    """The figures that were asked for and failed, with the reason."""

    def figures(self) -> dict[str, float]:
        """The corpus's figures: BLEU and METEOR from the sums of their statistics, the others the mean over the
        images."""
        return {name: float(value) for name, [value] in self.drawn(np.ones((1, len(self.images)))).items()}

    def drawn(self, times: ndarray) -> dict[str, ndarray]:
        """The figures of S corpora that have each image so many `times`, [S,I] -> [S] each. In CIDEr the document
        frequencies stay those of all images."""
        means = {name: times @ values / times.sum(1) for name, values in self.by_image.items()}
        return {**self._from_statistics(lambda statistics: np.tensordot(times, statistics.astype(float), 1)), **means}

    def rows(self) -> list[dict[str, float]]:
        """The figures of each image by itself."""
        columns = {**self._from_statistics(lambda statistics: statistics), **self.by_image}
        return [{name: float(v[i]) for name, v in columns.items()} for i in range(len(self.images))]

    def _from_statistics(self, summed: Callable[[ndarray], ndarray]) -> dict[str, ndarray]:
        figures = dict(zip(BLEU, bleu(summed(self.statistics)).T, strict=True))
        return figures if self.meteor is None else {**figures, "METEOR": java.meteor(summed(self.meteor))}


def score(
    predictions: Mapping[str, str], references: Mapping[str, Sequence[str]], with_java: Collection[str] = ()
) -> Scores:
    """BLEU-1 to BLEU-4, ROUGE-L (0 to 1) and CIDEr (0 to 10) of a caption an image, and those `with_java`, of METEOR
    and SPICE (0 to 1); one of these that fails is reported and left out. CIDEr is CIDEr-D, as in coco-caption.

    Both arguments go by image and must have the same images. Raises UserError when there are no
    captions, or when one lacks its other side.
    """
    if not predictions:
        raise UserError("no captions to score")
    for name in predictions:
        if not references.get(name):
            raise UserError(f"image {name} has a caption but no references to score it against")
    if unanswered := references.keys() - predictions.keys():
        count, first = len(unanswered), min(unanswered, key=str)
        raise UserError(f"{count} images with references have no caption, e.g. image {first}")
    words = [tokenize(caption) for caption in predictions.values()]
    refs = [[tokenize(caption) for caption in references[name]] for name in predictions]
    corpus = Corpus(words, refs)
    by_image = {"ROUGE-L": np.array(rouge_l(words, refs)), "CIDEr": cider(words, refs)}
    scores = Scores(list(predictions), bleu_statistics(corpus), by_image)
    for name in with_java:
        try:
            if name == "METEOR":
                scores.meteor = java.meteor_statistics(words, refs)
            else:
                scores.by_image[name] = java.spice(words, refs)
        except UserError as error:  # the other figures, and the captions, are worth having
            scores.left_out[name] = str(error)
            log.warning("%s left out: %s", name, error)
    return scores
