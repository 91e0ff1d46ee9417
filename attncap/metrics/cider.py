"""CIDEr, computed by the C++ scorer in csrc/cider."""

import os
from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate, chain

import numpy as np
from numpy import ndarray

from attncap.errors import UserError

try:
    from attncap.lib import cider as native
except ImportError as error:  # not built, or built for another Python
    native, missing = None, f"{error}; run `pip install .` in the package's source folder"
else:
    missing = None


class CiderD:
    """CIDEr-D of captions against the references of I images (Vedantam et al. 2015, section "CIDEr-D", without
    stemming). coco-caption reports this under the name CIDEr. The formula is in csrc/cider/cider.h.

    Args:
        references: one or more references per image, as word ids (any integers). Their n-grams are counted here, once.
            Each image is one document.
        threads: the default is OMP_NUM_THREADS or, if that is not set, the number of CPUs that the process may use. The
            scores do not depend on it.

    Raises:
        ValueError: there are no images, or an image has no references.
        UserError: the scorer is not built.
    """

    def __init__(self, references: Sequence[Sequence[Sequence[int]]], threads: int | None = None):
        if missing:
            raise UserError(f"attncap's CIDEr scorer is missing: {missing}")
        self.threads = threads or _default_threads()
        captions = [reference for of_image in references for reference in of_image]
        self.scorer = native.Cider(*_flat(captions), _offsets(references), self.threads)

    def score(self, captions: Sequence[Sequence[int]], images: Sequence[int]) -> ndarray:
        """CIDEr-D, 0 to 10, float64 [C], of C captions as word ids. `images` has the index of each caption's image, 0
        to I - 1. Raises ValueError for any other index."""
        return self.scorer.score(*_flat(captions), np.asarray(images, dtype=np.int64), self.threads)


def cider(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> ndarray:
    """CIDEr of each image, 0 to 10, [I], for one tokenized prediction per image. The corpus score is their mean."""
    numbers: defaultdict[str, int] = defaultdict()
    numbers.default_factory = numbers.__len__  # a new word gets the next number

    def ids(words: Sequence[str]) -> list[int]:
        return list(map(numbers.__getitem__, words))

    scorer = CiderD([[ids(reference) for reference in of_image] for of_image in references])
    return scorer.score([ids(words) for words in predictions], range(len(predictions)))


def _default_threads() -> int:
    setting = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]  # OpenMP allows a list, one number per nesting level
    return int(setting) if setting.isdecimal() and int(setting) else len(os.sched_getaffinity(0))


def _flat(captions: Sequence[Sequence[int]]) -> tuple[ndarray, ndarray]:
    """All words concatenated, and the offset of each caption followed by the total length."""
    return np.fromiter(chain.from_iterable(captions), dtype=np.int64), _offsets(captions)


def _offsets(parts: Sequence[Sequence]) -> ndarray:
    return np.fromiter(accumulate(map(len, parts), initial=0), dtype=np.int64)
