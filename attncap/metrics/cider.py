"""CIDEr, by the scorer of csrc/cider."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate, chain

import numpy as np
import torch
from numpy import ndarray

from attncap.errors import UserError
from attncap.metrics.ngrams import Words

try:
    from attncap.lib import cider as native
except ImportError as error:  # not built, or built for another Python
    native, missing = None, f"{error}; run `pip install .` in the package's source folder"
else:
    missing = None


class CiderD:
    """CIDEr-D of captions, against the references of I images (Vedantam et al. 2015, section "CIDEr-D", without
    stemming). What coco-caption calls CIDEr is this; csrc/cider/cider.h has the formula.

    Args:
        references: for each image its references, one or more, as ids of words (any integers). Their n-grams are
            counted here, once: an image is a document.
        threads: by default as many as torch takes. No score depends on them.

    Raises:
        ValueError: no image, or an image without references.
        UserError: the scorer is not built.
    """

    def __init__(self, references: Sequence[Sequence[Sequence[int]]], threads: int | None = None):
        if missing:
            raise UserError(f"attncap's CIDEr scorer is missing: {missing}")
        self.threads = threads or torch.get_num_threads()
        captions = [reference for of_image in references for reference in of_image]
        self.scorer = native.Cider(*_flat(captions), _offsets(references), self.threads)

    def score(self, captions: Sequence[Sequence[int]], images: Sequence[int]) -> ndarray:
        """CIDEr-D, 0 to 10, float64 [C], of C captions as ids of words, each against the references of its image, 0 to
        I - 1. Raises ValueError for an image that is none of the I."""
        return self.scorer.score(*_flat(captions), np.asarray(images, dtype=np.int64), self.threads)


def cider(predictions: Sequence[Words], references: Sequence[Sequence[Words]]) -> ndarray:
    """CIDEr of each image, 0 to 10, [I]: of one prediction an image, in words; their mean is the corpus's."""
    numbers: defaultdict[str, int] = defaultdict()
    numbers.default_factory = numbers.__len__  # a word not seen before gets the next number

    def ids(words: Words) -> list[int]:
        return list(map(numbers.__getitem__, words))

    scorer = CiderD([[ids(reference) for reference in of_image] for of_image in references])
    return scorer.score([ids(words) for words in predictions], range(len(predictions)))


def _flat(captions: Sequence[Sequence[int]]) -> tuple[ndarray, ndarray]:
    """All words one after the other, and where each caption begins and the last one ends."""
    return np.fromiter(chain.from_iterable(captions), dtype=np.int64), _offsets(captions)


def _offsets(parts: Sequence[Sequence]) -> ndarray:
    return np.fromiter(accumulate(map(len, parts), initial=0), dtype=np.int64)
