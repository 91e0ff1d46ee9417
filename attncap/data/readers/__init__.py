"""Reading data sets: a file per family of layouts, each with `find` (its files in a folder), `read` and EXPECTED."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from attncap.data import shapes
from attncap.data.dataset import Dataset, Skipped, Splits, report_skipped
from attncap.data.image_folders import subfolders
from attncap.data.readers import coco, karpathy, tables
from attncap.errors import CallError, UserError

# Layouts with file names of their own, in the order in which they are looked for. Tables of any name come last.
NAMED = [(tables.find_flickr, tables.read), (coco.find, coco.read), (karpathy.find, karpathy.read)]
LAYOUTS = [*NAMED, (tables.find, tables.read)]


def open_dataset(path: str | Path, seed: int, images: bool = True) -> Splits:
    """Read the data set at `path` for training or scoring, and report what was left out. Arguments as in
    `read_dataset`.

    Raises what `read_dataset` raises, and UserError for a data set without captions.
    """
    dataset = read_dataset(path, seed, images)
    report_skipped([*dataset.skipped, *dataset.missing])
    if not any(example.captions for examples in dataset.splits.values() for example in examples):
        raise UserError(f"{path}: has no captions; its images can be captioned: python -m attncap.caption {path}")
    return dataset.splits


def read_dataset(path: str | Path, seed: int, images: bool = True) -> Dataset:
    """Read the data set at `path`, whose layout is recognised, or generate the synthetic data set "shapes".

    `seed` generates `shapes`, and draws the splits of a data set that has none, by image. No image is opened. Of
    several layouts in a folder the first in the order of LAYOUTS is read. Examples whose image files do not exist are
    left out. `images=False` is for scoring captions written earlier: these examples stay, unless splits must be drawn
    and some of the images exist; then they are left out as in training, so that the splits are the same.

    Raises CallError when nothing exists at `path`, UserError when it is not a data set or a broken one.
    """
    if str(path) == "shapes":
        return Dataset("shapes (synthetic)", shapes.open_shapes(seed))
    path = Path(path).absolute()
    try:
        if not path.exists():
            raise CallError(f'{path}: no such file or folder; give "shapes" or the path of a data set')
        found = _find(path)
        if not found:
            expected = "; ".join((*tables.EXPECTED, coco.EXPECTED, karpathy.EXPECTED))
            raise UserError(f"{path}: not a data set; found {_contents(path)}; expected one of: {expected}")
        (files, read), *others = found
        dataset = read(path, files, seed, images)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from error
    ignored = [other_files[0] for other_files, _ in others]
    if files[0].name in tables.FLICKR:
        ignored = [*files[1:], *ignored]
    reason = f"another data set beside {files[0].name}; give its path to read it"
    skipped = [Skipped(None, str(file), reason) for file in ignored]
    return replace(dataset, skipped=[*skipped, *dataset.skipped])


def _find(path: Path) -> list[tuple[list[Path], Callable]]:
    """The data sets in the folder, each as its files and their reader; where it has none, those of its first subfolder
    that has any."""
    found = [(files, read) for find, read in LAYOUTS if (files := find(path))]
    for folder in subfolders(path):
        if found:
            break
        with contextlib.suppress(OSError):  # no permission to read it
            found = [(files, read) for find, read in NAMED if (files := find(folder))]
    return found


def _contents(path: Path) -> str:
    if not path.is_dir():
        return "a file"
    names = sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in os.scandir(path))
    if not names:
        return "an empty folder"
    first = ", ".join(names[:5])
    return first if len(names) <= 5 else f"{first} and {len(names) - 5} more"
