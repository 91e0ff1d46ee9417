"""Words and their ids."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from attncap.data import subwords
from attncap.data.tokenizer import tokenize
from attncap.errors import CallError, UserError
from attncap.files import write_atomically


class Vocabulary:
    """Words by id: `words[id]`. Ids 0 to 3 are `<pad>`, `<start>`, `<end>` and `<unk>`.

    In a vocabulary of subwords (see `data/subwords.py`) they are pieces of words.
    """

    PAD, START, END, UNK = range(4)
    SPECIALS = ("<pad>", "<start>", "<end>", "<unk>")

    def __init__(self, words: Iterable[str], merges: Sequence[str] | None = None):
        """`words`: all of them, the four special ones first. `merges`: of a vocabulary of subwords, the pairs of pieces
        that were made one, in their order: "▁d og"; None: whole words."""
        self.words = list(words)
        self.merges = merges
        self._ids = {word: i for i, word in enumerate(self.words)}
        self._splitter = None

    @classmethod
    def build(cls, captions: Iterable[str], min_count: int, pieces: int = 0) -> Vocabulary:
        """The words seen at least `min_count` times, by falling count, equal counts by alphabet.

        With `pieces` above 0, at most so many subwords: the characters, and what came of merging pairs of pieces seen
        at least `min_count` times. Raises CallError where the `tokenizers` library is missing.
        """
        counts = Counter(word for caption in captions for word in tokenize(caption))
        for word in cls.SPECIALS:  # a caption may contain what looks like one: mark-up is a word
            counts.pop(word, None)
        if pieces:
            learned, merges = subwords.learn(counts, pieces, min_count)
            return cls([*cls.SPECIALS, *learned], merges)
        kept = (word for word, count in counts.items() if count >= min_count)
        return cls([*cls.SPECIALS, *sorted(kept, key=lambda word: (-counts[word], word))])

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, caption: str, max_length: int) -> list[int]:
        """Ids of the first `max_length` words or pieces, with `<start>` before and `<end>` after them. Raises CallError
        for a vocabulary of subwords where the `tokenizers` library is missing."""
        words = tokenize(caption)
        if self.merges is not None:
            self._splitter = self._splitter or subwords.Splitter(self._ids, self.merges)
            words = self._splitter.split(words)
        return [self.START, *(self._id(word) for word in words[:max_length]), self.END]

    def _id(self, word: str) -> int:
        return self.UNK if word in self.SPECIALS else self._ids.get(word, self.UNK)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the words up to `<end>`; special words are left out."""
        words = []
        for i in map(int, ids):
            if i == self.END:
                break
            if i >= len(self.SPECIALS):
                words.append(self.words[i])
        return self.text(words)

    def text(self, words: Sequence[str]) -> str:
        """Plain text: the words, or what the pieces spell, separated by spaces."""
        return " ".join(words if self.merges is None else subwords.spell(words))

    def forbid(self, words: Iterable[str]) -> list[int]:
        """Ids of words that no caption shall have. Raises CallError for `<end>`, which captions need, and for what is
        no word, or piece, of the vocabulary."""
        ids = []
        for word in words:
            if word not in self._ids or word == self.words[self.END]:
                hint = f"; {piece!r} is" if (piece := subwords.MARK + word) in self._ids else ""
                raise CallError(
                    f"{word!r} cannot be suppressed: captions need it, or it is no word of the vocabulary{hint}"
                )
            ids.append(self._ids[word])
        return ids

    def save(self, path: str | Path) -> None:
        """Write `{"words": [...]}`, a word a line by rising id, and of subwords also "merges". Raises UserError."""
        content = {"words": self.words} | ({} if self.merges is None else {"merges": list(self.merges)})
        text = json.dumps(content, ensure_ascii=False, indent=0) + "\n"
        write_atomically(path, text.encode("utf-8", "backslashreplace"))  # half a character, as JSON has it

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """Read what `save` writes, or the WORDMAP of sgrvinod's tutorial, {"word": id, ..., "<unk>": 9, "<start>": 10,
        "<end>": 11, "<pad>": 0}: of that the words in the order of their ids, after the four special ones.

        Raises UserError when the file is missing, cut short, or neither of the two.
        """
        mend = "copy vocabulary.json again from the trained model, or train again"
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}; {mend}") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not a whole JSON file ({error}); {mend}") from error
        if isinstance(content, dict) and cls.SPECIALS[cls.START] in content:
            return cls(cls._words_of_map(path, content))
        words = content.get("words") if isinstance(content, dict) else None
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise UserError(f'{path}: field "words" should be a list of words; {mend}')
        if tuple(words[:4]) != cls.SPECIALS:
            raise UserError(f'{path}: "words" should begin with {", ".join(cls.SPECIALS)}; {mend}')
        if len(set(words)) != len(words):
            [(word, count)] = Counter(words).most_common(1)
            raise UserError(f'{path}: "words" has {word!r} {count} times; {mend}')
        merges, known = content.get("merges"), set(words)
        if merges is not None:
            pairs = merges if isinstance(merges, list) else [None]
            pairs = [merge.split(" ") if isinstance(merge, str) else () for merge in pairs]
            if not all(len(pair) == 2 and known.issuperset([*pair, "".join(pair)]) for pair in pairs):
                raise UserError(f'{path}: field "merges" should be a list of pairs of "words", "▁d og"; {mend}')
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
            raise UserError(f"{path}: {count} words have the id {number}; make the WORDMAP again")
        return [*cls.SPECIALS, *sorted(ids.keys() - set(cls.SPECIALS), key=ids.get)]
