"""CIDEr."""

import numpy as np
from numpy import ndarray

from attncap.metrics.ngrams import Corpus

SIGMA = 6.0  # words by which lengths may differ before it costs much


def cider(corpus: Corpus) -> ndarray:
    """CIDEr of each image, 0 to 10, [I]; their mean is the corpus's.

    Vedantam et al. 2015, section 4, as coco-caption has it under this name: it is the paper's
    CIDEr-D (section "CIDEr-D") without stemming. With g the vector of an n-gram length's tf-idf
    weights, c the prediction and s a reference,

        CIDEr_n = 10 / |refs| Σ_s exp(-(l_c - l_s)² / 2σ²) min(g_c, g_s) · g_s / (|g_c| |g_s|)

    and CIDEr is their mean over n. tf is the plain count; idf is the logarithm of images / images
    with the n-gram in a reference, all taken from the references. l is counted in pairs of words,
    as coco-caption does.
    """
    captions = len(corpus.lengths)
    similarity = np.zeros(captions)
    for n in corpus.ngrams:
        entries = slice(n.predicted, None)  # the references'
        owner, size = n.caption[entries], n.ngram.max(initial=0) + 1
        # Without counts np.unique would take six times as long.
        seen, _ = np.unique(corpus.image[owner] * size + n.ngram[entries], return_counts=True)
        images_with = np.bincount(seen % size, minlength=size)
        idf = np.log(corpus.images) - np.log(np.maximum(1, images_with))
        weight = n.count * idf[n.ngram]
        norm = np.sqrt(np.bincount(n.caption, weight**2, captions))
        common = n.partner >= 0
        ours, theirs = weight[n.partner[common]], weight[entries][common]
        dot = np.bincount(owner[common], np.minimum(ours, theirs) * theirs, captions)
        norms = norm[corpus.image] * norm
        similarity += np.divide(dot, norms, out=np.zeros(captions), where=norms > 0)
    pairs = np.maximum(0, corpus.lengths - 1)
    similarity *= np.exp(-((pairs[corpus.image] - pairs) ** 2) / (2 * SIGMA**2))
    sums = np.bincount(corpus.image[corpus.images :], similarity[corpus.images :], corpus.images)
    return 10 * sums / len(corpus.ngrams) / corpus.references
