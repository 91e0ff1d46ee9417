"""Runs of words, counted for all captions at once: what BLEU and CIDEr compare."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy import ndarray

Words = Sequence[str]


@dataclass
class Ngrams:
    """Runs of n words: an entry for each that a caption has, [M], in the order of the captions."""

    caption: ndarray
    """The caption that has it."""
    ngram: ndarray
    """A number for the words, the same wherever they stand."""
    count: ndarray
    """How often the caption has it."""
    predicted: int
    """So many entries, the first ones, are the predictions'; the others are the references'."""
    partner: ndarray
    """For each entry of a reference, the entry of its image's prediction with the same words, or -1."""


class Corpus:
    """I images, each with a predicted caption and references. Captions are numbered: first the I predictions, then the
    references, image by image."""

    def __init__(self, predictions: Sequence[Words], references: Sequence[Sequence[Words]], max_n: int = 4):
        self.images = len(predictions)
        self.references = np.array([len(refs) for refs in references])
        """References of each image, [I]."""
        self.image = np.concatenate([np.arange(self.images), np.repeat(np.arange(self.images), self.references)])
        """The image of each caption, [C]."""
        captions = [*predictions, *(ref for refs in references for ref in refs)]
        self.lengths = np.array([len(words) for words in captions])
        """Words of each caption, [C]."""
        self.ngrams = list(self._count(captions, max_n))
        """For n = 1 to `max_n`."""

    def _count(self, captions: Sequence[Words], max_n: int) -> Iterator[Ngrams]:
        numbers: dict[str, int] = {}
        words = np.array([numbers.setdefault(w, len(numbers)) for c in captions for w in c], dtype=np.int64)
        owner = np.repeat(np.arange(len(captions)), self.lengths)
        ngram = words
        for n in range(1, max_n + 1):
            if n > 1:  # n words are n - 1 words and one more; numbered anew, so that the numbers stay small
                _, ngram = np.unique(ngram[:-1] * len(numbers) + words[n - 1 :], return_inverse=True)
            within = owner[: len(ngram)] == owner[n - 1 :]  # not over the end of a caption
            size = ngram.max(initial=0) + 1
            entries, count = np.unique(owner[: len(ngram)][within] * size + ngram[within], return_counts=True)
            caption, number = np.divmod(entries, size)
            predicted = int(np.searchsorted(caption, self.images))
            wanted = self.image[caption[predicted:]] * size + number[predicted:]
            place = np.searchsorted(entries[:predicted], wanted)
            found = entries[np.minimum(place, len(entries) - 1)] == wanted
            yield Ngrams(caption, number, count, predicted, np.where(found & (place < predicted), place, -1))
