"""BLEU."""

import numpy as np
from numpy import ndarray

from attncap.metrics.ngrams import Corpus

# coco-caption's guards against division by zero. They show in the figures: 0 matches give 1e-8 or
# so, not 0, so they belong to the definition.
TINY, SMALL = 1e-15, 1e-9


def bleu_statistics(corpus: Corpus) -> ndarray:
    """What BLEU is computed from, [I,N,4] for n = 1 to N: of each image the n-grams that match, those predicted, the
    words predicted, and the words of the closest reference.

    An n-gram matches at most as often as it occurs in the one reference that has it most often. The closest reference
    is that with the closest number of words, the shorter where two are equally close.
    """
    words = corpus.lengths[: corpus.images]
    lengths = np.split(corpus.lengths[corpus.images :], np.cumsum(corpus.references)[:-1])
    closest = [min((abs(r - w), r) for r in refs.tolist())[1] for w, refs in zip(words.tolist(), lengths, strict=True)]
    statistics = []
    for n in corpus.ngrams:
        matched, common = np.zeros(n.predicted), n.partner >= 0
        np.maximum.at(matched, n.partner[common], n.count[n.predicted :][common])
        owner, count = n.caption[: n.predicted], n.count[: n.predicted]
        matches = np.bincount(owner, np.minimum(matched, count), corpus.images)
        statistics.append([matches, np.bincount(owner, count, corpus.images), words, closest])
    return np.array(statistics).transpose(2, 0, 1)


def bleu(statistics: ndarray) -> ndarray:
    """BLEU-1 to BLEU-N, 0 to 1, [...,N], from statistics [...,N,4] summed over the images of a corpus (Papineni et al.
    2002, section 2.3).

    p_n = matches / n-grams predicted, over the corpus. BLEU-N = BP (p_1 ... p_N)^(1/N), with
    BP = min(1, exp(1 - r/c)), c the words predicted and r those of the closest references.
    """
    matches, guesses, predicted, closest = np.moveaxis(statistics, -1, 0)
    ratio = (predicted + TINY) / (closest + SMALL)
    penalty = np.exp(np.minimum(0, 1 - 1 / ratio))
    precisions = (matches + TINY) / (guesses + SMALL)
    return penalty * np.cumprod(precisions, axis=-1) ** (1 / np.arange(1, precisions.shape[-1] + 1))
