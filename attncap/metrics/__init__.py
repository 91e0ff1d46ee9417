"""The official caption metrics, equal to pycocoevalcap's figures, without Java."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from attncap.data.tokenizer import tokenize
from attncap.errors import UserError
from attncap.metrics.bleu import bleu
from attncap.metrics.cider import cider
from attncap.metrics.rouge import rouge_l


def score(predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """BLEU-1 to BLEU-4, ROUGE-L (0 to 1) and CIDEr (0 to 10) of a caption an image.

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
    figures = {f"BLEU-{n}": value for n, value in enumerate(bleu(words, refs), 1)}
    return {**figures, "ROUGE-L": fmean(rouge_l(words, refs)), "CIDEr": fmean(cider(words, refs))}
