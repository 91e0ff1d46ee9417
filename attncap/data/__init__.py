"""Data sets: photographs and what people said about them, split into train, val and test."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from attncap.data.images import load_image
from attncap.errors import CallError, UserError

log = logging.getLogger("attncap")


@dataclass(frozen=True)
class Example:
    """A photograph in a file, and its captions. `name` is its own within the data set."""

    name: str
    captions: tuple[str, ...]
    path: Path

    def image(self) -> Image.Image:
        """RGB, upright. Raises UserError when the file cannot be read, see `load_image`."""
        return load_image(self.path)


Splits = dict[str, Sequence[Example]]
"""Examples under "train", "val" and "test". Those of `shapes` are scenes with the same face: name,
captions, image()."""


def open_dataset(path: str | Path, seed: int) -> Splits:
    """Read the data set at `path`, whose layout is recognised, or draw the built-in `shapes`.

    `seed` draws what a data set leaves open: its splits, always by image. No image is opened.
    Raises CallError when there is nothing at `path`, UserError when it is no data set or a broken one.
    """
    # The readers need Example from above.
    from attncap.data import coco, flickr8k

    if str(path) == "shapes":
        from attncap.data.shapes import open_shapes

        return open_shapes(seed)
    path = Path(path)
    if not path.exists():
        raise CallError(f'{path}: no such file or folder; give "shapes" or the path of a data set')
    try:
        for layout in (flickr8k, coco):
            if layout.recognises(path):
                return layout.read(path, seed)
        expected = f"expected {flickr8k.EXPECTED}, or {coco.EXPECTED}"
        raise UserError(f"{path}: not a data set: {expected}; found {_contents(path)}")
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from error


def _contents(path: Path) -> str:
    if not path.is_dir():
        return "a file"
    names = sorted(entry.name + "/" * entry.is_dir() for entry in os.scandir(path))
    return ", ".join(names[:5]) + f" and {len(names) - 5} more" * (len(names) > 5) or "an empty folder"


def draw_splits(examples: Sequence[Example], seed: int) -> Splits:
    """80/10/10 by image, drawn from the seed; three images are enough for each split to have one."""
    held = max(1, round(len(examples) / 10)) if len(examples) >= 3 else 0
    val, test, train = draw_parts(examples, [held, held], seed)
    return {"train": train, "val": val, "test": test}


def draw_parts(examples: Sequence[Example], sizes: Sequence[int], seed: int) -> list[list[Example]]:
    """Parts of the given sizes drawn from the seed, and one of all that is left over."""
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    ends = [sum(sizes[:i]) for i in range(len(sizes) + 1)] + [len(order)]
    drawn = (sorted(order[a:b]) for a, b in zip(ends, ends[1:], strict=False))
    return [[examples[i] for i in part] for part in drawn]


def keep_existing(examples: Sequence[Example], source: Path) -> list[Example]:
    """The examples whose file is there; the others are reported. UserError when none is.

    `source` is the file that names them. Each folder is listed once: a look at every single file
    takes minutes on a network's disk.
    """
    folders = {example.path.parent for example in examples}
    present = {folder: _file_names(folder) for folder in folders}
    kept: list[Example] = []
    missing: list[str] = []
    for example in examples:
        if example.path.name in present[example.path.parent]:
            kept.append(example)
        else:
            missing.append(str(example.path))
    if not kept:
        raise UserError(
            f"{source}: none of the {len(missing)} images it names is there, e.g. {missing[0]}; "
            "put the images in that folder"
        )
    report(missing, f"{source}: left out %d of {len(examples)} images, whose files are missing")
    return kept


def _file_names(folder: Path) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries}
    except (FileNotFoundError, NotADirectoryError):
        return set()


def report(names: Sequence[str], message: str) -> None:
    """One line of warning with the count (in place of %d) and the first names; none, no line."""
    if names:
        first = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
        log.warning("%s: %s", message % len(names), first)
