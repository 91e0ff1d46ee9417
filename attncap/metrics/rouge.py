"""ROUGE-L."""

from collections.abc import Sequence

from attncap.metrics.ngrams import Words

BETA = 1.2  # recall counts more than precision; coco-caption's value


def rouge_l(predictions: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """ROUGE-L of each image, 0 to 1 (Lin 2004, "ROUGE", equations 2 to 4); their mean is the corpus's.

    P = LCS / words predicted, R = LCS / words of the reference, F = (1 + b²) P R / (R + b² P), with
    P and R each the best over the references, as in coco-caption.
    """
    return [_rouge_l(words, refs) for words, refs in zip(predictions, references, strict=True)]


def _rouge_l(words: Words, references: Sequence[Words]) -> float:
    # In coco-caption an empty caption is one empty word, so it equals another empty one.
    words, references = words or [""], [ref or [""] for ref in references]
    common = [_longest_common_subsequence(words, ref) for ref in references]
    precision = max(common) / len(words)
    recall = max(c / len(ref) for c, ref in zip(common, references, strict=True))
    if precision == 0:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _longest_common_subsequence(a: Words, b: Words) -> int:
    """Length of the longest sequence of words that both hold in this order, gaps allowed: a row of the usual table in
    the bits of a number, 0 where the row grows by one (Hyyrö 2004, "Bit-parallel LCS-length computation revisited")."""
    places: dict[str, int] = {}
    for i, word in enumerate(b):
        places[word] = places.get(word, 0) | 1 << i
    row = every = (1 << len(b)) - 1
    for word in a:
        common = row & places.get(word, 0)
        row = (row + common | row - common) & every
    return len(b) - row.bit_count()
