"""Words and their ids."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from attncap.data.tokenizer import tokenize
from attncap.errors import UserError
from attncap.files import write_atomically


class Vocabulary:
    """Words by id: `words[id]`. Ids 0 to 3 are `<pad>`, `<start>`, `<end>` and `<unk>`."""

    PAD, START, END, UNK = range(4)
    SPECIALS = ("<pad>", "<start>", "<end>", "<unk>")

    def __init__(self, words: Iterable[str]):
        """`words`: all of them, the four special ones first."""
        self.words = list(words)
        self._ids = {word: i for i, word in enumerate(self.words)}

    @classmethod
    def build(cls, captions: Iterable[str], min_count: int) -> Vocabulary:
        """The words seen at least `min_count` times, by falling count, equal counts by alphabet."""
        counts = Counter(word for caption in captions for word in tokenize(caption))
        for word in cls.SPECIALS:  # a caption may contain what looks like one: mark-up is a word
            counts.pop(word, None)
        kept = (word for word, count in counts.items() if count >= min_count)
        return cls([*cls.SPECIALS, *sorted(kept, key=lambda word: (-counts[word], word))])

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, caption: str, max_length: int) -> list[int]:
        """Ids of the first `max_length` words, with `<start>` before and `<end>` after them."""
        words = tokenize(caption)[:max_length]
        return [self.START, *(self._id(word) for word in words), self.END]

    def _id(self, word: str) -> int:
        return self.UNK if word in self.SPECIALS else self._ids.get(word, self.UNK)

    def decode(self, ids: Iterable[int]) -> str:
        """The words up to `<end>`, separated by spaces; special words are left out."""
        words = []
        for i in map(int, ids):
            if i == self.END:
                break
            if i >= len(self.SPECIALS):
                words.append(self.words[i])
        return " ".join(words)

    def save(self, path: str | Path) -> None:
        """Write `{"words": [...]}`, a word a line by rising id. Raises UserError."""
        content = json.dumps({"words": self.words}, ensure_ascii=False, indent=0)
        write_atomically(path, (content + "\n").encode("utf-8", "backslashreplace"))  # half a character, as JSON has it

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """Raises UserError when the file is missing, cut short, or not what `save` writes."""
        mend = "copy vocabulary.json again from the trained model, or train again"
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}; {mend}") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not a whole JSON file ({error}); {mend}") from error
        words = content.get("words") if isinstance(content, dict) else None
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise UserError(f'{path}: field "words" should be a list of words; {mend}')
        if tuple(words[:4]) != cls.SPECIALS:
            raise UserError(f'{path}: "words" should begin with {", ".join(cls.SPECIALS)}; {mend}')
        if len(set(words)) != len(words):
            [(word, count)] = Counter(words).most_common(1)
            raise UserError(f'{path}: "words" has {word!r} {count} times; {mend}')
        return cls(words)
