"""BLEU."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy import ndarray

MAX_N = 4

# coco-caption's guards against division by zero. They are part of its definition of BLEU because they change the
# result: without any match it is about 1e-8 instead of 0.
TINY, SMALL = 1e-15, 1e-9


def bleu_statistics(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> ndarray:
    """The counts from which BLEU is computed, for I images with one prediction each.

    An n-gram matches at most as many times as it occurs in any single reference. The closest reference is the one
    whose length is closest to the prediction's; the shorter one wins a tie.

    Returns:
        float64 [I,4,4]: for each image and n = 1 to 4, the matching n-grams, the predicted n-grams, the predicted words
        and the words of the closest reference.
    """
    statistics = np.empty((len(predictions), MAX_N, 4))
    for i, (words, refs) in enumerate(zip(predictions, references, strict=True)):
        _, closest = min((abs(len(ref) - len(words)), len(ref)) for ref in refs)
        for n in range(1, MAX_N + 1):
            predicted, in_refs = _ngrams(words, n), [_ngrams(ref, n) for ref in refs]
            matches = sum(min(count, max(ref[ngram] for ref in in_refs)) for ngram, count in predicted.items())
            statistics[i, n - 1] = matches, predicted.total(), len(words), closest
    return statistics


def _ngrams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[start:] for start in range(n)), strict=False))


def bleu(statistics: ndarray) -> ndarray:
    """BLEU-1 to BLEU-4, 0 to 1, [...,4], from statistics [...,4,4] summed over the images of a corpus (Papineni et al.
    2002, section 2.3).

    p_n = matches / predicted n-grams, over the corpus. BLEU-N = BP (p_1 ... p_N)^(1/N), with
    BP = min(1, exp(1 - r/c)), where c is the number of predicted words and r that of the closest references.
    """
    matches, ngrams, predicted, closest = np.moveaxis(statistics, -1, 0)
    ratio = (predicted + TINY) / (closest + SMALL)
    penalty = np.exp(np.minimum(0, 1 - 1 / ratio))
    precisions = (matches + TINY) / (ngrams + SMALL)
    return penalty * np.cumprod(precisions, axis=-1) ** (1 / np.arange(1, MAX_N + 1))
