"""What a run is given: its vocabulary, and its images with their captions. It keeps the vocabulary and a record of the
others, with which it compares what it is given when it is resumed."""

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

log = logging.getLogger("attncap")


@dataclass(frozen=True)
class Inputs:
    """What a run began with. Either is None in a run of an older version, which kept no record of its images, and no
    vocabulary before it had a best model."""

    vocabulary: Vocabulary | None
    images: (
        dict[str, dict[str, str]] | None
    )  # for each split its images' names, in order, and digests of their captions


def save(folder: Path, vocabulary: Vocabulary, splits: Splits) -> None:
    """Write vocabulary.json and inputs.json. Raises UserError when they cannot be written."""
    vocabulary.save(folder / VOCABULARY)
    images = {split: {example.name: _digest_captions(example) for example in splits[split]} for split in splits}
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
    if not isinstance(images, dict) or not all(
        isinstance(images.get(split), dict) for split in ("train", "val", "test")
    ):
        raise UserError(f'{folder / NAME}: field "images" should have the images of each split; restore this file')
    vocabulary = Vocabulary.load(path)
    if content.get("vocabulary") != _digest_vocabulary(vocabulary):
        raise UserError(f"{path}: is not the vocabulary that the run began with; restore this file")
    return Inputs(vocabulary, images)


def compare(began: Inputs, splits: Splits, source: str) -> tuple[Splits, bool]:
    """Compare the splits of the data in `source` with those that a run began with. Warns about captions that have
    changed, and about images for validation and the test.

    Returns the splits, with the training images in the order of the run, because its place in an epoch is a place in
    this order; and whether captions for training have, or may have, changed. Raises UserError when the training images
    are not the same ones.
    """
    if began.images is None:
        return splits, True
    edited: dict[str, list[str]] = {}
    for split, before in began.images.items():
        now = {example.name: example for example in splits[split]}
        new, missing = [name for name in now if name not in before], [name for name in before if name not in now]
        if new or missing:
            changes = ((new, "new"), (missing, "missing"))
            counts = ", ".join(f"{len(names):,} {what} ({first_of(names)})" for names, what in changes if names)
            message = f"{source}: the {split} images are not those that the run began with: {counts}"
            if split == "train":
                raise UserError(f"cannot resume: {message}; restore them, or begin a new run")
            log.warning(message)
        edited[split] = [name for name in before if name in now and before[name] != _digest_captions(now[name])]
        if edited[split]:
            counts = f"{len(edited[split]):,} of {len(before):,} {split} images"
            names = first_of(edited[split])
            log.warning("%s: the captions of %s have changed since the run began (%s)", source, counts, names)
    by_name = {example.name: example for example in splits["train"]}
    return {**splits, "train": [by_name[name] for name in began.images["train"]]}, bool(edited["train"])


def _digest_captions(example: CaptionedImage) -> str:
    return _digest(list(example.captions))


def _digest_vocabulary(vocabulary: Vocabulary) -> str:
    return _digest([vocabulary.words, vocabulary.merges])


def _digest(value: Sequence) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
