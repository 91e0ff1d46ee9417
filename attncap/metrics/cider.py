"""CIDEr."""

import math
from collections import Counter
from collections.abc import Sequence

from attncap.metrics.ngrams import Words, count_ngrams

SIGMA = 6.0  # words by which lengths may differ before it costs much


def cider(predictions: Sequence[Words], references: Sequence[Sequence[Words]], max_n: int = 4) -> list[float]:
    """CIDEr of each image, 0 to 10; their mean is the corpus's.

    Vedantam et al. 2015, section 4, as coco-caption has it, which is the paper's CIDEr-D (section
    "CIDEr-D") without stemming: with g the vector of an n-gram length's tf-idf weights, c the
    prediction and s a reference,

        CIDEr_n = 10 / |refs| Σ_s exp(-(l_c - l_s)² / 2σ²) min(g_c, g_s) · g_s / (|g_c| |g_s|)

    and CIDEr is their mean over n = 1 to `max_n`. tf is the plain count; idf is the logarithm of
    images / images with the n-gram in a reference, all taken from `references`. l is counted in
    pairs of words, as coco-caption does.
    """
    orders = range(1, max_n + 1)
    counted = [[[count_ngrams(ref, n) for n in orders] for ref in refs] for refs in references]
    images_with = Counter(
        ngram for refs in counted for ngram in set().union(*(counts for ref in refs for counts in ref))
    )
    log_images = math.log(max(1, len(references)))
    unseen = log_images
    idf = {ngram: log_images - math.log(count) for ngram, count in images_with.items()}

    def weigh(counts: Counter) -> tuple[dict[tuple[str, ...], float], float]:
        vector = {ngram: count * idf.get(ngram, unseen) for ngram, count in counts.items()}
        return vector, math.sqrt(sum(weight * weight for weight in vector.values()))

    scores = []
    for words, refs, ref_counts in zip(predictions, references, counted, strict=True):
        vectors = [weigh(count_ngrams(words, n)) for n in orders]
        total = 0.0
        for ref, counts in zip(refs, ref_counts, strict=True):
            difference = max(0, len(words) - 1) - max(0, len(ref) - 1)
            similarity = sum(
                _clipped_cosine(vector, weigh(count)) for vector, count in zip(vectors, counts, strict=True)
            )
            total += math.exp(-(difference**2) / (2 * SIGMA**2)) * similarity
        scores.append(10 * total / max_n / len(refs))
    return scores


def _clipped_cosine(prediction: tuple[dict, float], reference: tuple[dict, float]) -> float:
    """min(p, r) · r / (|p| |r|): repeating a word does not raise it."""
    (p, p_norm), (r, r_norm) = prediction, reference
    if p_norm == 0 or r_norm == 0:
        return 0.0
    return sum(min(weight, r[ngram]) * r[ngram] for ngram, weight in p.items() if ngram in r) / (p_norm * r_norm)
