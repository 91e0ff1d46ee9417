"""The official caption metrics, equal to pycocoevalcap's figures; only METEOR and SPICE need Java."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

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
    """The other figures, [I] each."""
    totals: dict[str, float]
    """The corpus's figure of those in `by_image` that are not simply averaged."""

    def figures(self) -> dict[str, float]:
        """The corpus's figures: BLEU from the sums of its statistics, the others the mean over the images."""
        drawn = self.drawn(np.ones((1, len(self.images))))
        return {**{name: float(value) for name, [value] in drawn.items()}, **self.totals}

    def drawn(self, times: ndarray) -> dict[str, ndarray]:
        """The figures of S corpora that have each image so many `times`, [S,I] -> [S] each, but for those of `totals`.
        In CIDEr the document frequencies stay those of all images."""
        sums = np.tensordot(times, self.statistics.astype(float), 1)
        means = {name: times @ v / times.sum(1) for name, v in self.by_image.items() if name not in self.totals}
        return {**dict(zip(BLEU, bleu(sums).T, strict=True)), **means}

    def rows(self) -> list[dict[str, float]]:
        """The figures of each image by itself."""
        columns = {**dict(zip(BLEU, bleu(self.statistics).T, strict=True)), **self.by_image}
        return [{name: float(v[i]) for name, v in columns.items()} for i in range(len(self.images))]


def score(
    predictions: Mapping[str, str], references: Mapping[str, Sequence[str]], with_java: Collection[str] = ()
) -> Scores:
    """BLEU-1 to BLEU-4, ROUGE-L (0 to 1) and CIDEr (0 to 10) of a caption an image, and those `with_java`, of METEOR
    and SPICE; one of these that fails is reported and left out.

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
    scores = Scores(list(predictions), bleu_statistics(corpus), by_image, {})
    for name in with_java:
        try:
            scores.totals[name], scores.by_image[name] = java.score(name, words, refs)
        except UserError as error:  # the other figures, and the captions, are worth having
            log.warning("%s", error)
    return scores
