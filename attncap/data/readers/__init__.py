"""Reading data sets: a file per family of layouts, each with `find` (its files in a folder), `read` (what they say) and
EXPECTED. Finding the images, and the splits, is the same for all of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path

from attncap.data import shapes
from attncap.data.dataset import Dataset, Example, Skipped, Splits, one_line, report_skipped
from attncap.data.image_folders import Folders, ImagePlaces
from attncap.data.readers import coco, karpathy, tables
from attncap.data.readers.caption_file import CaptionFile, find_examples
from attncap.data.readers.splits import Lists, find_lists, split_examples, use_lists
from attncap.errors import CallError, UserError

log = logging.getLogger("attncap")

# In the order in which they are looked for. Tables of any name come last, and in subfolders only if they look like one.
NAMED = [
    (tables.find_flickr, tables.read),
    (tables.find_image_folder, tables.read_image_folder),
    (coco.find, coco.read),
    (karpathy.find, karpathy.read),
]
LAYOUTS = [*NAMED, (tables.find, tables.read), (tables.find_by_content, tables.read)]
IN_SUBFOLDERS = [*NAMED, (tables.find_by_content, tables.read)]


def open_dataset(path: str | Path, seed: int, images: str | Path | None = None, *, need_images: bool = True) -> Splits:
    """Read the data set at `path` for training or scoring, and report what was left out. Arguments as in
    `read_dataset`.

    Raises what `read_dataset` raises, and UserError for a data set without captions.
    """
    dataset = read_dataset(path, seed, images, need_images=need_images)
    check_dataset(path, dataset)
    return dataset.splits


def check_dataset(path: str | Path, dataset: Dataset) -> None:
    """Report what was left out of the data set at `path`. Raises UserError if it has no captions."""
    report_skipped([*dataset.skipped, *dataset.missing])
    if not any(example.captions for examples in dataset.splits.values() for example in examples):
        raise UserError(f"{path}: has no captions; its images can be captioned: python -m attncap.caption {path}")


def read_dataset(
    path: str | Path, seed: int | None, images: str | Path | None = None, *, need_images: bool = True
) -> Dataset:
    """Read the data set at `path`, whose layout is recognised, or generate the synthetic data set "shapes".

    `seed` generates `shapes`, and draws the splits of a data set that has none, by image; without a seed, images whose
    split would be drawn are all in test. No image is opened. Of several layouts in a folder, the first in the order of
    LAYOUTS is read. The images are looked for in the folder `images`, by default near the captions (see `find_files`).

    Examples whose image files do not exist are left out. `need_images=False` is for scoring captions written earlier:
    these examples stay, unless splits must be drawn and some of the images exist; then they are left out as in
    training, so that the splits are the same.

    Raises CallError when nothing exists at `path` or `images`, UserError when it is not a data set or a broken one.
    """
    if images is not None and not os.path.isdir(images):
        raise CallError(f"images {images}: no such folder")
    if str(path) == "shapes":
        if images is not None:
            raise CallError(f"images {images}: shapes has no image files")
        return Dataset("shapes (synthetic)", shapes.open_shapes(seed or 0))
    path = Path(path).absolute()
    folders = Folders()
    try:
        if not path.exists():
            raise CallError(f'{path}: no such file or folder; give "shapes" or the path of a data set')
        (files, read), *others = _find(path, folders)
        layout, parts = read(path, files)
        dataset = _combine(path, layout, parts, seed, images and Path(images).absolute(), need_images, folders)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from error
    ignored = [other_files[0] for other_files, _ in others]
    if files[0].name in tables.FLICKR:
        ignored = [*files[1:], *ignored]
    reason = f"another data set beside {files[0].name}; give its path to read it"
    return replace(dataset, skipped=[*(Skipped(None, str(file), reason) for file in ignored), *dataset.skipped])


def _find(path: Path, folders: Folders) -> list[tuple[list[Path], Callable]]:
    """The data sets in the folder, each as its files and their reader; where it has none, those of its subfolders.
    Raises UserError if there is none."""
    if not path.is_dir() and not path.is_file():
        raise UserError(f"{path}: not a regular file or a folder")
    found: list[tuple[list[Path], Callable]] = []
    seen: set[Path] = set()
    for places, layouts in (([path], LAYOUTS), (folders.subfolders(path), IN_SUBFOLDERS)):
        for folder, (find, read) in product(places, layouts):
            if files := [file for file in find(folder, folders) if file not in seen]:
                found.append((files, read))
                seen.update(files)
        if found:
            break
    if not found:
        expected = "; ".join((*tables.EXPECTED, coco.EXPECTED, karpathy.EXPECTED))
        raise UserError(f"{path}: not a data set; found {_contents(path)}; expected one of: {expected}")
    return found


def _contents(path: Path) -> str:
    if not path.is_dir():
        return "a file"
    names = sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in os.scandir(path))
    if not names:
        return "an empty folder"
    first = ", ".join(map(one_line, names[:5]))
    return first if len(names) <= 5 else f"{first} and {len(names) - 5} more"


def _combine(
    path: Path,
    layout: str,
    parts: list[CaptionFile],
    seed: int | None,
    images: Path | None,
    need_images: bool,
    folders: Folders,
) -> Dataset:
    """Combine the caption files with their images and with lists of splits."""
    source = parts[0].source
    files: dict[str, str] = {}
    split_of: dict[str, str] = {}
    for part in parts:
        if twice := files.keys() & part.files.keys():
            raise UserError(f"{part.source}: {one_line(min(twice))} is in {source.name} too; remove it from one")
        files |= part.files
        split_of |= part.splits
    beside = ImagePlaces([images], images.parent) if images else ImagePlaces.of(path, source)
    lists, skipped = _lists(files, source, bool(split_of), beside, folders)
    examples: list[Example] = []
    missing: list[Skipped] = []
    for part in parts:
        drawn = seed is not None and not lists and len(part.splits) < len(part.files)
        where = ImagePlaces([images]) if images else ImagePlaces.of(path, part.source)
        found, without_file, left_out = find_examples(part, where, folders, drawn, need_images)
        examples += found
        missing += without_file
        skipped += [*part.skipped, *left_out]
    if lists:
        splits, left_out = use_lists(lists, examples)
        skipped += left_out
    else:
        splits = split_examples(examples, split_of, seed)
    drawn = seed is not None and not lists and len(split_of) < len(files)
    list_files = [file for group in lists.values() for file, _ in group]
    return Dataset(layout, splits, missing, skipped, drawn, list_files)


def _lists(
    files: Mapping[str, str], source: Path, has_splits: bool, beside: ImagePlaces, folders: Folders
) -> tuple[Lists, list[Skipped]]:
    """The lists of splits to use, beside the captions in `source` or near the images, and those that are not used."""
    if has_splits:
        lists, skipped = find_lists(files, source, [source.parent], folders)
        reason = f"not used, because {source.name} has splits of its own"
        skipped += [Skipped(None, str(file), reason) for group in lists.values() for file, _ in group]
        return {}, skipped
    roots = [*beside.roots, *filter(None, [beside.above])]
    inside = [folder for root in roots for folder in folders.subfolders(root)]
    lists, skipped = find_lists(files, source, [source.parent, *roots, *inside, source.parent.parent], folders)
    a_list = next((file for group in lists.values() for file, _ in group), source)
    if a_list.parent != source.parent:
        log.warning("%s: the splits are those of the lists in %s", source, a_list.parent)
    return lists, skipped
