"""Pieces of words, for languages that have too many words: byte-pair encoding (Sennrich et al. 2016, "Neural Machine
Translation of Rare Words with Subword Units", section 3.2) by the `tokenizers` library.

A piece that begins a word begins with ▁, as SentencePiece writes it: "hunderennen" may be ▁hunde + rennen.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from attncap.errors import CallError

MARK = "▁"


def learn(counts: Mapping[str, int], pieces: int, min_count: int) -> tuple[list[str], list[str]]:
    """At most so many pieces, and the pairs whose merging gave them, "▁hun de", in their order.

    The pieces are the characters (of more than `pieces` the most frequent) and the merged pairs, which stand at least
    `min_count` times in `counts`, words with how often each is seen. Raises CallError without `tokenizers`.
    """
    library = _library()
    letters = Counter()
    for word, count in counts.items():
        for letter in _utf8(MARK + word):
            letters[letter] += count
    alphabet = sorted(letters, key=lambda letter: (-letters[letter], letter))[:pieces]
    trainer = library.trainers.BpeTrainer(
        vocab_size=pieces,
        min_frequency=min_count,
        initial_alphabet=alphabet,  # the library's own choice would be left to chance where letters are as frequent
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    model = _tokenizer(library.models.BPE())
    model.train_from_iterator((" ".join([_utf8(MARK + word)] * count) for word, count in counts.items()), trainer)
    learned = json.loads(model.to_str())["model"]
    return sorted(learned["vocab"], key=learned["vocab"].get), [f"{a} {b}" for a, b in learned["merges"]]


class Splitter:
    """Splits words into pieces by merging the pairs of `merges`, earlier ones first. Raises CallError without
    `tokenizers`."""

    def __init__(self, pieces: Mapping[str, int], merges: Sequence[str]):
        pairs = [tuple(merge.split(" ")) for merge in merges]
        self._model = _tokenizer(_library().models.BPE(dict(pieces), pairs, unk_token="<unk>", fuse_unk=True))

    def split(self, words: Iterable[str]) -> list[str]:
        """The pieces; characters that are none of them become `<unk>`, neighbours one together."""
        return self._model.encode(" ".join(_utf8(MARK + word) for word in words)).tokens


def spell(pieces: Sequence[str]) -> list[str]:
    """The words that pieces spell."""
    return "".join(pieces).replace(MARK, " ").split()


def first_pieces(pieces: Sequence[str]) -> list[int]:
    """Of each word that pieces spell, the place of the first piece with a letter of it."""
    places, within = [], False
    for place, piece in enumerate(pieces):
        within = within and not piece.startswith(MARK)
        if not within and piece.strip(MARK):
            places.append(place)
            within = True
    return places


def _tokenizer(model):
    library = _library()
    tokenizer = library.Tokenizer(model)
    tokenizer.pre_tokenizer = library.pre_tokenizers.CharDelimiterSplit(" ")
    return tokenizer


def _utf8(text: str) -> str:
    """Half a character, which JSON can spell and the library refuses, becomes a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _library():
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads and worker processes do not go together
    try:
        import tokenizers
    except ImportError as error:
        mend = "pip install 'attncap[subwords]'"
        raise CallError(f"a vocabulary of subwords needs the tokenizers library; {mend}") from error
    return tokenizers
