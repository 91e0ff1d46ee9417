"""How varied captions are, independent of any references."""

from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise


def diversity(
    captions: Sequence[Sequence[str]],
    vocabulary: Collection[str] | None = None,
    training: Iterable[Sequence[str]] | None = None,
) -> dict[str, float]:
    """The variety of tokenized captions, one per image:

    - distinct-1 and distinct-2: distinct words / words, and distinct pairs of adjacent words / pairs (Li et al. 2016,
      "A Diversity-Promoting Objective Function for Neural Conversation Models", section 5.2);
    - words: the number of distinct words;
    - vocabulary: the share of `vocabulary` that is used, if given;
    - new: the share of captions that are equal to none of the `training` captions, if given;
    - length: the mean number of words.
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
