"""How varied captions are, whatever the references say."""

from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise

from attncap.metrics.ngrams import Words


def diversity(
    captions: Sequence[Words], vocabulary: Collection[str] | None = None, training: Iterable[Words] | None = None
) -> dict[str, float]:
    """Of one caption an image:

    - distinct-1 and distinct-2: different words, and different pairs of words, per word and pair written (Li et al.
      2016, "A Diversity-Promoting Objective Function for Neural Conversation Models", section 5.2);
    - words: how many different ones; vocabulary: their share of a model's vocabulary;
    - new: the share of captions that no training caption equals, word for word;
    - length: the mean number of words.

    vocabulary and new come only with what they are measured by.
    """
    words = [word for caption in captions for word in caption]
    pairs = [pair for caption in captions for pair in pairwise(caption)]
    found: dict[str, float] = {
        "distinct-1": len(set(words)) / max(1, len(words)),
        "distinct-2": len(set(pairs)) / max(1, len(pairs)),
        "words": len(set(words)),
    }
    if vocabulary is not None:
        found["vocabulary"] = len(set(words) & set(vocabulary)) / max(1, len(vocabulary))
    if training is not None:
        seen = {tuple(caption) for caption in training}
        found["new"] = sum(tuple(caption) not in seen for caption in captions) / len(captions)
    found["length"] = len(words) / len(captions)
    return found
