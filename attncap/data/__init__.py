"""Data sets: photographs and what people said about them, split into train, val and test."""

from __future__ import annotations

import contextlib
import logging
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from attncap.data.images import file_names, load_image, subfolders
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

# What data sets call a split -> what it is here. Karpathy's restval is the part of COCO's val that nobody validates on.
SPLITS = {"train": "train", "restval": "train", "val": "val", "dev": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True)
class Dataset:
    """A data set as it was found: the name of its layout, its examples, and the images it names that are not there."""

    layout: str
    splits: Splits
    missing: Sequence[Path] = ()


def open_dataset(path: str | Path, seed: int, images: bool = True) -> Splits:
    """Read the data set at `path` to train on it or to score on it, and report the images that are missing. `images`
    as in `read_dataset`.

    Raises what `read_dataset` raises, and UserError for a data set without captions.
    """
    dataset = read_dataset(path, seed, images)
    report(path, dataset.missing, "images, whose files are missing")
    if not any(example.captions for examples in dataset.splits.values() for example in examples):
        raise UserError(f"{path}: has no captions; its images can be captioned: python -m attncap.caption {path}")
    return dataset.splits


def read_dataset(path: str | Path, seed: int, images: bool = True) -> Dataset:
    """Read the data set at `path`, whose layout is recognised, or draw the built-in `shapes`.

    `seed` draws what a data set leaves open: its splits, always by image. No image is opened. Of several layouts in a
    folder the first in the order below is read, and the others are reported. Examples whose images are missing are left
    out; without `images`, to score captions that are written already, they stay, unless splits are to be drawn and some
    of the images are there: then it is as in training, so that the splits are the same.
    Raises CallError when there is nothing at `path`, UserError when it is no data set or a broken one.
    """
    # The readers need Example from above.
    from attncap.data import coco, karpathy, tables

    if str(path) == "shapes":
        from attncap.data.shapes import open_shapes

        return Dataset("shapes, which draws itself", open_shapes(seed))
    path = Path(path).absolute()
    try:
        if not path.exists():
            raise CallError(f'{path}: no such file or folder; give "shapes" or the path of a data set')
        named = [(tables.find_flickr, tables.read), (coco.find, coco.read), (karpathy.find, karpathy.read)]
        found = [(files, read) for find, read in (*named, (tables.find, tables.read)) if (files := find(path))]
        for folder in subfolders(path):
            with contextlib.suppress(OSError):  # one that may not be read
                found = found or [(files, read) for find, read in named if (files := find(folder))]
        if not found:
            expected = "; ".join((*tables.EXPECTED, coco.EXPECTED, karpathy.EXPECTED))
            raise UserError(f"{path}: not a data set; found {_contents(path)}; expected one of: {expected}")
        (files, read), *others = found
        beside = f"data sets beside {files[0].name}; give the path of one to read it"
        tables_beside = files[1:] if read is tables.read and files[0].name in tables.FLICKR else []
        report(path, [*tables_beside, *(files[0] for files, _ in others)], beside)
        return read(path, files, seed, images)
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


def told_splits(examples: Sequence[Example], told: Mapping[str, str]) -> Splits:
    """The split that `told` has for each example's name."""
    splits: dict[str, list[Example]] = {"train": [], "val": [], "test": []}
    for example in examples:
        splits[told[example.name]].append(example)
    return splits


def keep_existing(
    examples: Sequence[Example], source: Path, images: bool = True, drawn: bool = True
) -> tuple[Sequence[Example], list[Path]]:
    """The examples whose file is there, and the paths of the other files. Raises UserError when none is there.

    Without `images`, see `read_dataset`, all the examples where splits are not `drawn`, or no file is there.

    `source` is the file that names them. Each folder is listed once: a look at every single file
    takes minutes on a network's disk.
    """
    if not (images or drawn):
        return examples, []
    present = {folder: file_names(folder) for folder in {example.path.parent for example in examples}}
    kept: list[Example] = []
    missing: list[Path] = []
    for example in examples:
        if example.path.name in present[example.path.parent]:
            kept.append(example)
        else:
            missing.append(example.path)
    if not kept and not images:
        log.warning("%s: none of its images is there; what splits it leaves open are drawn from all of them", source)
        return examples, []
    if not kept:
        raise UserError(
            f"{source}: none of the {len(missing)} images it names is there, e.g. {_short(missing[0])}; "
            "put the images in that folder"
        )
    return kept, missing


def report(source: Path | str, names: Sequence[object], what: str) -> None:
    """One line of warning that `source` had what is left out, with the count and the first names; none, no line."""
    if names:
        log.warning("%s: left out %d %s: %s", source, len(names), what, first_of(names))


def first_of(names: Sequence[object]) -> str:
    """The first three, on one line."""
    return ", ".join(map(_short, names[:3])) + ", ..." * (len(names) > 3)


def _short(name: object) -> str:
    """A name out of a file as a part of one line, whatever it holds."""
    return " ".join(str(name).split())[:300]
