"""BLEU."""

import math
from collections.abc import Sequence

from attncap.metrics.ngrams import Words, count_ngrams

# coco-caption's guards against division by zero. They show in the figures: 0 matches give 1e-8 or
# so, not 0, so they belong to the definition.
TINY, SMALL = 1e-15, 1e-9


def bleu(predictions: Sequence[Words], references: Sequence[Sequence[Words]], max_n: int = 4) -> list[float]:
    """Corpus BLEU-1 to BLEU-`max_n`, each 0 to 1 (Papineni et al. 2002, section 2.3).

    p_n = matches / n-grams predicted, over the corpus; an n-gram matches at most as often as it
    occurs in the one reference that has it most often. BLEU-N = BP (p_1 ... p_N)^(1/N), with
    BP = min(1, exp(1 - r/c)), c the words predicted and r the sum of the closest reference lengths,
    the shorter where two are equally close.
    """
    matches, guesses = [0] * max_n, [0] * max_n
    predicted = closest = 0
    for words, refs in zip(predictions, references, strict=True):
        predicted += len(words)
        closest += min((abs(len(ref) - len(words)), len(ref)) for ref in refs)[1]
        for i in range(max_n):
            in_refs = [count_ngrams(ref, i + 1) for ref in refs]
            for ngram, count in count_ngrams(words, i + 1).items():
                matches[i] += min(count, max(counts.get(ngram, 0) for counts in in_refs))
                guesses[i] += count
    ratio = (predicted + TINY) / (closest + SMALL)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    precisions = [(m + TINY) / (g + SMALL) for m, g in zip(matches, guesses, strict=True)]
    return [penalty * math.prod(precisions[:n]) ** (1 / n) for n in range(1, max_n + 1)]
