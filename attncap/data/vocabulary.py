"""Words and their ids."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from attncap.config import short
from attncap.data import subwords
from attncap.data.tokenizer import tokenize
from attncap.errors import CallError, UserError
from attncap.files import read_json, write_atomically

MAX_VOCABULARY = 16 * 2**20  # bytes of a vocabulary: about a million words

# Punctuation of Chinese and Japanese, and the dot between Tibetan syllables; spaces around it are removed.
UNSPACED_PUNCTUATION = re.compile(" ?([\u0f0b\u3001-\u3003\u3008-\u301f\uff01-\uff0f\uff1a-\uff20]) ?")


class Vocabulary:
    """Words by id: `words[id]`. Ids 0 to 3 are `<pad>`, `<start>`, `<end>` and `<unk>`.

    In a vocabulary of subwords (see `data/subwords.py`), the words are pieces of words.
    """

    PAD, START, END, UNK = range(4)
    SPECIALS = ("<pad>", "<start>", "<end>", "<unk>")

    def __init__(self, words: Iterable[str], merges: Sequence[str] | None = None):
        """`words` starts with the four special ones. `merges` are the pairs of pieces to merge, "▁d og", in order; None
        for a vocabulary of whole words."""
        self.words = list(words)
        self.merges = merges
        self._ids = {word: i for i, word in enumerate(self.words)}
        self._bpe: subwords.BpeEncoder | None = None  # made when it is needed, because it needs the tokenizers library

    @classmethod
    def build(cls, captions: Iterable[str], min_count: int, pieces: int = 0) -> Vocabulary:
        """The words seen at least `min_count` times, by decreasing count; words with equal counts are in alphabetical
        order.

        With `pieces` above 0, at most `pieces` subwords instead: the characters, and merges of pairs of pieces seen at
        least `min_count` times. Raises CallError if the `tokenizers` library is missing.
        """
        counts = Counter(word for caption in captions for word in tokenize(caption))
        for word in cls.SPECIALS:  # captions may contain them: mark-up is a word
            counts.pop(word, None)
        if pieces:
            learned, merges = subwords.learn(counts, pieces, min_count)
            return cls([*cls.SPECIALS, *learned], merges)
        kept = (word for word, count in counts.items() if count >= min_count)
        return cls([*cls.SPECIALS, *sorted(kept, key=lambda word: (-counts[word], word))])

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, caption: str, max_length: int) -> list[int]:
        """`<start>`, the ids of the first `max_length` words or pieces, `<end>`. Raises CallError for a vocabulary of
        subwords if the `tokenizers` library is missing."""
        return [self.START, *self._encode(tokenize(caption))[:max_length], self.END]

    def token_ids(self, text: str) -> list[int]:
        """Ids of the words or pieces of a text, without `<start>` and `<end>`. Raises CallError for a word that is not
        in the vocabulary, and in the same case as `encode`."""
        tokens = []
        for word in tokenize(text):
            ids = self._encode([word])
            if self.UNK in ids:
                raise CallError(f"{word!r} is not in the vocabulary")
            tokens += ids
        return tokens

    def _encode(self, words: list[str]) -> list[int]:
        if self.merges is not None:
            self._bpe = self._bpe or subwords.BpeEncoder(self._ids, self.merges)
            words = self._bpe.split(words)
        # A caption's own "<end>" is not the special word.
        return [self.UNK if word in self.SPECIALS else self._ids.get(word, self.UNK) for word in words]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the words before `<end>`, without special words."""
        words = []
        for i in map(int, ids):
            if i == self.END:
                break
            if i >= len(self.SPECIALS):
                words.append(self.words[i])
        return self.text(words)

    def text(self, words: Sequence[str]) -> str:
        """The words, or the words that the pieces spell, separated by spaces, except at punctuation of scripts that are
        written without them: 狗，猫。"""
        return UNSPACED_PUNCTUATION.sub(r"\1", " ".join(self.spell(words)))

    def spell(self, words: Sequence[str]) -> list[str]:
        """The words, or the words that the pieces spell."""
        return list(words) if self.merges is None else subwords.spell(words)

    def suppress(self, words: Iterable[str]) -> list[int]:
        """Ids of words, or pieces, that captions must not contain. Raises CallError for `<end>`, which captions need,
        and for words that are not in the vocabulary."""
        ids = []
        for word in words:
            if word == self.words[self.END]:
                raise CallError(f"{word!r} cannot be suppressed: captions need it to end")
            if word not in self._ids:
                piece = subwords.MARK + word
                hint = f"; {piece!r} is" if piece in self._ids else ""
                raise CallError(f"{word!r} cannot be suppressed: it is not in the vocabulary{hint}")
            ids.append(self._ids[word])
        return ids

    def save(self, path: str | Path) -> None:
        """Write `{"words": [...]}`, one word per line in the order of ids, and for subwords also "merges". Raises
        UserError when the file cannot be written."""
        content = {"words": self.words}
        if self.merges is not None:
            content["merges"] = list(self.merges)
        text = json.dumps(content, ensure_ascii=False, indent=0) + "\n"
        write_atomically(path, text.encode("utf-8", "backslashreplace"))  # unpaired surrogates become JSON escapes

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """Read what `save` writes, or the WORDMAP of sgrvinod's tutorial, {"word": id, ..., "<unk>": 9, "<start>": 10,
        "<end>": 11, "<pad>": 0}, whose words come in the order of their ids, after the four special ones.

        Raises UserError when the file is missing, cut short, or neither of the two.
        """
        fix = "copy vocabulary.json again from the trained model, or train again"
        try:
            content = read_json(path, MAX_VOCABULARY)
        except UserError as error:
            raise UserError(f"{error}; {fix}") from error
        if isinstance(content, dict) and cls.SPECIALS[cls.START] in content:
            return cls(cls._words_of_map(path, content))
        words = content.get("words") if isinstance(content, dict) else None
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise UserError(f'{path}: field "words" should be a list of words; {fix}')
        if tuple(words[:4]) != cls.SPECIALS:
            raise UserError(f'{path}: "words" should begin with {", ".join(cls.SPECIALS)}; {fix}')
        if len(set(words)) != len(words):
            [(word, count)] = Counter(words).most_common(1)
            raise UserError(f'{path}: "words" has {short(word)} {count} times; {fix}')
        merges, known = content.get("merges"), set(words)
        if merges is not None:
            is_list = isinstance(merges, list) and all(isinstance(merge, str) for merge in merges)
            pairs = [merge.split(" ") for merge in merges] if is_list else []
            if not is_list or not all(len(pair) == 2 and known.issuperset([*pair, "".join(pair)]) for pair in pairs):
                raise UserError(f'{path}: field "merges" should be a list of pairs of "words", "▁d og"; {fix}')
            if any("\ud800" <= letter <= "\udfff" for word in words for letter in word):
                raise UserError(f'{path}: "words" has an unpaired surrogate, which subwords cannot have; {fix}')
        return cls(words, merges)

    @classmethod
    def _words_of_map(cls, path: str | Path, ids: dict[str, int]) -> list[str]:
        for word, number in ids.items():
            if type(number) is not int:
                raise UserError(
                    f"{path}: the id of {word[:60]!r} should be a whole number, as in the tutorial's WORDMAP"
                )
        if len(set(ids.values())) != len(ids):
            [(number, count)] = Counter(ids.values()).most_common(1)
            raise UserError(f"{path}: {count} words have the id {short(number)}; make the WORDMAP again")
        return [*cls.SPECIALS, *sorted(ids.keys() - set(cls.SPECIALS), key=lambda word: ids[word])]
