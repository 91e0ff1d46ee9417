"""The inputs of a run: its vocabulary, and its images with their captions. A run stores the vocabulary and a record of
the rest; when it is resumed, the data set is compared with that record."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from attncap.data import CaptionedImage, Splits
from attncap.data.dataset import first_of
from attncap.data.vocabulary import Vocabulary
from attncap.errors import UserError
from attncap.files import read_json, write_atomically

NAME = "inputs.json"
VOCABULARY = "vocabulary.json"
SPLITS = ("train", "val", "test")

log = logging.getLogger("attncap")


@dataclass(frozen=True)
class Inputs:
    """What a run began with. Either may be None for a run of an older version, which kept no record of its images, and
    wrote the vocabulary only with the first best model."""

    vocabulary: Vocabulary | None
    images: dict[str, dict[str, list[str]]] | None
    """By split: the images' names, in order, each with a digest of its captions and one of its `identity()`."""


def save(folder: Path, vocabulary: Vocabulary, splits: Splits) -> None:
    """Write vocabulary.json and inputs.json. Raises UserError when they cannot be written."""
    vocabulary.save(folder / VOCABULARY)
    images = {split: {example.name: _digests(example) for example in splits[split]} for split in splits}
    content = {"vocabulary": _digest_vocabulary(vocabulary), "images": images}
    write_atomically(folder / NAME, json.dumps(content, indent=0) + "\n")


def load(folder: Path) -> Inputs:
    """What `save` wrote. Raises UserError when a file is damaged, or the vocabulary has changed."""
    path = folder / VOCABULARY
    if not (folder / NAME).exists():
        log.warning("%s: has no %s, so its images and captions are not compared with those it began with", folder, NAME)
        return Inputs(Vocabulary.load(path) if path.exists() else None, None)
    content = read_json(folder / NAME)
    images = content.get("images") if isinstance(content, dict) else None
    images = {split: images.get(split) for split in SPLITS} if isinstance(images, dict) else {}
    if not images or not all(map(_is_record, images.values())):
        raise UserError(f'{folder / NAME}: field "images" should have the images of each split; restore this file')
    vocabulary = Vocabulary.load(path)
    if content.get("vocabulary") != _digest_vocabulary(vocabulary):
        raise UserError(f"{path}: is not the vocabulary that the run began with; restore this file")
    return Inputs(vocabulary, images)


def compare(began: Inputs, splits: Splits, source: str) -> tuple[Splits, bool]:
    """The images that a run began with, in its own splits and order, because its place in an epoch is a place in that
    order; and whether captions for training have changed, or may have. Warns about captions, files and splits that have
    changed. Raises UserError when the images in `source` are not the same ones."""
    if began.images is None:
        return splits, True
    now = {example.name: example for examples in splits.values() for example in examples}
    before = {name: split for split, images in began.images.items() for name in images}
    missing, new = [name for name in before if name not in now], [name for name in now if name not in before]
    for names, what in ((missing, "missing"), (new, "new")):
        if names:
            raise UserError(
                f"cannot resume: {source}: images that are {what} since the run began: {_count(names)}; "
                "restore them as they were, or begin a new run"
            )
    edited = {}
    for split, images in began.images.items():
        found = {name: _digests(now[name]) for name in images}
        edited[split] = [name for name in images if images[name][0] != found[name][0]]
        replaced = [name for name in images if images[name][1] != found[name][1]]
        moved = [example.name for example in splits[split] if example.name not in images]
        for names, what in (
            (edited[split], f"images of the {split} split whose captions have changed since the run began"),
            (replaced, f"images of the {split} split whose files have changed or moved since the run began"),
            (moved, f"images that are new in the {split} split, where the run does not use them"),
        ):
            if names:
                log.warning("%s: %s: %s", source, what, _count(names))
    return {split: [now[name] for name in images] for split, images in began.images.items()}, bool(edited["train"])


def _is_record(images: object) -> bool:
    """Whether this can be what `save` wrote for a split."""
    return isinstance(images, dict) and all(isinstance(x, list) and len(x) == 2 for x in images.values())


def _count(names: Sequence[str]) -> str:
    return f"{len(names):,} ({first_of(names)})"


def _digests(example: CaptionedImage) -> list[str]:
    return [_digest(list(example.captions)), _digest(example.identity())]


def _digest_vocabulary(vocabulary: Vocabulary) -> str:
    return _digest([vocabulary.words, vocabulary.merges])


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
