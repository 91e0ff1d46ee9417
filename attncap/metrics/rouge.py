"""ROUGE-L."""

from collections.abc import Sequence

BETA = 1.2  # recall counts more than precision; coco-caption's value


def rouge_l(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> list[float]:
    """ROUGE-L of each image, 0 to 1 (Lin 2004, "ROUGE", equations 2 to 4). The corpus score is their mean.

    P = LCS / predicted words, R = LCS / words of the reference, F = (1 + b²) P R / (R + b² P). P and R are each the
    maximum over the references, as in coco-caption.
    """
    return [_rouge_l(words, refs) for words, refs in zip(predictions, references, strict=True)]


def _rouge_l(words: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    # coco-caption treats an empty caption as one empty word, so it matches another empty caption.
    words, references = words or [""], [ref or [""] for ref in references]
    common = [_longest_common_subsequence(words, ref) for ref in references]
    precision = max(common) / len(words)
    recall = max(c / len(ref) for c, ref in zip(common, references, strict=True))
    if precision == 0:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest sequence of words that occurs in both in the same order, with gaps allowed.

    One row of the dynamic programming table is kept as the bits of an integer: bit i is 0 where the length grows by one
    at word i of `b` (Hyyrö 2004, "Bit-parallel LCS-length computation revisited").
    """
    positions: dict[str, int] = {}
    for i, word in enumerate(b):
        positions[word] = positions.get(word, 0) | 1 << i
    row = mask = (1 << len(b)) - 1
    for word in a:
        common = row & positions.get(word, 0)
        row = (row + common | row - common) & mask
    return len(b) - row.bit_count()
