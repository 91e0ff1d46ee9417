"""Runs of words, counted: what BLEU and CIDEr compare."""

from collections import Counter
from collections.abc import Sequence

Words = Sequence[str]


def count_ngrams(words: Words, n: int) -> Counter[tuple[str, ...]]:
    """How often each run of `n` words occurs."""
    return Counter(zip(*(words[i:] for i in range(n)), strict=False))
