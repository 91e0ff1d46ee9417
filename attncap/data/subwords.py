"""Pieces of words, for languages with too many words for a vocabulary: byte-pair encoding (Sennrich et al. 2016,
"Neural Machine Translation of Rare Words with Subword Units", section 3.2) by the `tokenizers` library.

The first piece of a word starts with ▁, as in SentencePiece: "hunderennen" may be ▁hunde + rennen.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from attncap.errors import CallError

MARK = "▁"


def learn(counts: Mapping[str, int], pieces: int, min_count: int) -> tuple[list[str], list[str]]:
    """At most `pieces` pieces, and the merges that made them, "▁hun de", in their order.

    `counts` has the number of times that each word was seen. The pieces are the characters (the most frequent ones,
    where there are too many) and the merges of pairs seen at least `min_count` times. Raises CallError without
    `tokenizers`.
    """
    library = _library()
    letters: Counter[str] = Counter()
    for word, count in counts.items():
        for letter in _utf8(MARK + word):
            letters[letter] += count
    alphabet = sorted(letters, key=lambda letter: (-letters[letter], letter))[:pieces]
    trainer = library.trainers.BpeTrainer(
        vocab_size=pieces,
        min_frequency=min_count,
        initial_alphabet=alphabet,  # the library's own choice among equally frequent ones is random
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    model = _tokenizer(library.models.BPE())
    model.train_from_iterator((" ".join([_utf8(MARK + word)] * count) for word, count in counts.items()), trainer)
    learned = json.loads(model.to_str())["model"]
    return sorted(learned["vocab"], key=learned["vocab"].get), [f"{a} {b}" for a, b in learned["merges"]]


class BpeEncoder:
    """Splits words into pieces: starts from characters and applies `merges` in their order. Raises CallError without
    `tokenizers`."""

    def __init__(self, pieces: Mapping[str, int], merges: Sequence[str]):
        pairs = [tuple(merge.split(" ")) for merge in merges]
        self._model = _tokenizer(_library().models.BPE(dict(pieces), pairs, unk_token="<unk>", fuse_unk=True))

    def split(self, words: Iterable[str]) -> list[str]:
        """The pieces of the words. Unknown characters become `<unk>`, one for each run of them."""
        return self._model.encode(" ".join(_utf8(MARK + word) for word in words)).tokens


def spell(pieces: Sequence[str]) -> list[str]:
    """The words that the pieces spell."""
    return "".join(pieces).replace(MARK, " ").split()


def first_pieces(pieces: Sequence[str]) -> list[int]:
    """For each word that the pieces spell, the position of the first piece with a letter of it."""
    positions, in_word = [], False
    for position, piece in enumerate(pieces):
        in_word = in_word and not piece.startswith(MARK)
        if not in_word and piece.strip(MARK):
            positions.append(position)
            in_word = True
    return positions


def _tokenizer(model):
    library = _library()
    tokenizer = library.Tokenizer(model)
    tokenizer.pre_tokenizer = library.pre_tokenizers.CharDelimiterSplit(" ")
    return tokenizer


def _utf8(text: str) -> str:
    """Lone surrogates, which JSON can contain and the library refuses, become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _library():
    # Otherwise the library warns when a process that has used its threads forks, as data loaders do.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import tokenizers
    except ImportError as error:
        message = "a vocabulary of subwords needs the tokenizers library; pip install 'attncap[subwords]'"
        raise CallError(message) from error
    return tokenizers
