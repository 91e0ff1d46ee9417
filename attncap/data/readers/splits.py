"""Splits: those of lists of image names beside the captions, or drawn from a seed."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from attncap.data.dataset import Example, Skipped, Splits, first_of, one_line
from attncap.data.image_folders import SUFFIXES, Folders, fold, is_apple_double
from attncap.errors import UserError
from attncap.files import read_text

# Names that data sets use -> names used here. Karpathy's restval is the part of COCO's val that is used for training.
SPLITS = {"train": "train", "restval": "train", "val": "val", "dev": "val", "validation": "val", "test": "test"}

PUBLISHED = re.compile("(train|val|dev|test)_?images", re.IGNORECASE)  # as Flickr_8k.trainImages.txt, Flickr8k's own
MAX_LIST = 64 * 2**20  # bytes; a list of the names of COCO's images has 4 MiB
MAX_LISTS = 20  # read in one folder
_SUFFIX = re.compile(rf"(?i:{'|'.join(map(re.escape, SUFFIXES))})\b")


def draw_splits(examples: Sequence[Example], seed: int) -> Splits:
    """80/10/10 by image, drawn from the seed. With three images or more, no split is empty."""
    held_out = max(1, round(len(examples) / 10)) if len(examples) >= 3 else 0
    val, test, train = draw_parts(examples, [held_out, held_out], seed)
    return {"train": train, "val": val, "test": test}


def draw_parts(examples: Sequence[Example], sizes: Sequence[int], seed: int) -> list[list[Example]]:
    """Parts of the given sizes, drawn from the seed, and a last part with the remaining examples."""
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    ends = [sum(sizes[:i]) for i in range(len(sizes) + 1)] + [len(order)]
    drawn = (sorted(order[a:b]) for a, b in zip(ends, ends[1:], strict=False))
    return [[examples[i] for i in part] for part in drawn]


def split_examples(examples: Sequence[Example], split_of: Mapping[str, str], seed: int | None) -> Splits:
    """The splits that `split_of` has by image. Images without one are drawn from the seed: into val and test, in
    halves, if others have a split, as in COCO, whose test set is not public; else 80/10/10. Without a seed they are all
    in test."""
    if seed is None:
        split_of = {example.name: split_of.get(example.name, "test") for example in examples}
    if not split_of:
        return draw_splits(examples, seed)
    splits: dict[str, list[Example]] = {"train": [], "val": [], "test": []}
    drawn = []
    for example in examples:
        group = splits[split_of[example.name]] if example.name in split_of else drawn
        group.append(example)
    val, test = draw_parts(drawn, [len(drawn) // 2], seed)
    return {"train": splits["train"], "val": splits["val"] + val, "test": splits["test"] + test}


# Lists


class ImageIndex:
    """Images by their names in a list: the name in the data set or that of the file, with its folders or without, with
    its suffix or without, in any case."""

    def __init__(self, files: Mapping[str, str]):
        self._files = files
        self._exact = {**{file: image for image, file in files.items()}, **{image: image for image in files}}

    @cached_property
    def _similar(self) -> dict[str, str | None]:
        similar: dict[str, str | None] = {}
        for image, file in self._files.items():
            for spelling in _spellings(file):
                similar[spelling] = image if similar.get(spelling, image) == image else None
        return similar

    def find(self, name: str) -> str | None:
        if name in self._exact:
            return self._exact[name]
        return next((image for s in _spellings(name) if (image := self._similar.get(s)) is not None), None)


def _spellings(name: str) -> tuple[str, str, str]:
    whole = fold(name.replace("\\", "/"))
    bare = os.path.basename(whole)
    stem, suffix = os.path.splitext(bare)
    return whole, bare, stem if suffix in SUFFIXES else bare


Lists = dict[str, list[tuple[Path, dict[str, str | None]]]]
"""By split: the files of the lists, and for each name in them the image, or None if it has no captions."""


def find_lists(
    files: Mapping[str, str], source: Path, places: Iterable[Path], folders: Folders
) -> tuple[Lists, list[Skipped]]:
    """The lists in the first of `places` where any name images of `files`, and the lists beside the captions that name
    none of them, as skipped items.

    A list is a text file named after a split, with an image's name on each line. Lists that are not beside the caption
    file, `source`, may be those of another data set: they count only if there are three of them and they name at least
    half of the images. Raises UserError for a list that cannot be read.
    """
    index: ImageIndex | None = None
    others: list[Skipped] = []
    for folder in dict.fromkeys(places):
        naming: Lists = {}
        naming_none: Lists = {}  # those that are surely lists
        for split, path in _candidates(folder, folders):
            if path == source or (names := _names(path, folder == source.parent)) is None:
                continue
            index = index or ImageIndex(files)
            images = {name: index.find(name) for name in names}
            count = sum(image is not None for image in images.values())
            if count and (count >= len(names) / 2 or _is_list(path, names)):
                naming.setdefault(split, []).append((path, images))
            elif not count and _is_list(path, names):
                naming_none.setdefault(split, []).append((path, images))
        if folder == source.parent:
            reason = f"names none of the images of {source.name}; not used as a list of a split"
            others = [Skipped(None, str(path), reason) for lists in naming_none.values() for path, _ in lists]
            # Beside other lists, one that names none of the images is likely to have wrong names: see use_lists.
            naming = naming and {**naming_none, **naming}
        listed = {image for lists in naming.values() for _, images in lists for image in images.values()} - {None}
        if naming and (folder == source.parent or (len(naming) == 3 and len(listed) >= len(files) / 2)):
            return {split: naming[split] for split in ("train", "val", "test") if split in naming}, []
    return {}, others


def _candidates(folder: Path, folders: Folders) -> list[tuple[str, Path]]:
    """The text files in a folder that are named after one split, with this split."""
    found = []
    for name in folders.names(folder).exact:
        if name.lower().endswith(".txt"):
            splits = {SPLITS[word] for word in re.findall("train|val|dev|test", name.lower())}
            if len(splits) == 1:
                found.append((splits.pop(), folder / name))
    return sorted(found, key=lambda item: (not PUBLISHED.search(item[1].name), item[1]))[:MAX_LISTS]


def _is_list(path: Path, names: Iterable[str]) -> bool:
    """Whether a text file is surely a list, although its names may be those of other images: notes and logs have lines
    with spaces and without the suffix of an image."""
    return bool(PUBLISHED.search(path.name)) or not any(re.search(r"\s", n) and not _SUFFIX.search(n) for n in names)


def _names(path: Path, is_beside: bool) -> list[str] | None:
    """The names in a list, each once. For a file that cannot be read, None; but a UserError if it `is_beside` the
    captions and named as published lists are."""
    try:
        lines = read_text(path, MAX_LIST).splitlines()
    except UserError:
        if is_beside and PUBLISHED.search(path.name):
            raise
        return None
    names = dict.fromkeys(re.sub(r"#\d+$", "", line.strip()) for line in lines)
    return [name for name in names if name and not is_apple_double(name)]


def use_lists(lists: Lists, examples: Sequence[Example]) -> tuple[Splits, list[Skipped]]:
    """The splits of the lists, in their order; the names that have no captions, and the images that are in no list.

    Raises UserError for a split without a list or without images, and for an image in the lists of two splits.
    """
    by_image = {example.name: example for example in examples}
    splits: dict[str, list[Example]] = {}
    skipped: list[Skipped] = []
    owner: dict[str, tuple[str, Path]] = {}
    paths = [path for group in lists.values() for path, _ in group]
    names = [path.name for path in paths]
    for split in ("train", "val", "test"):
        if split not in lists:
            raise UserError(
                f"{paths[0].parent}: {split}Images.txt is missing beside the other lists ({first_of(names)}); add it, "
                "or remove the lists to have the splits drawn"
            )
        for path, images in lists[split]:
            for name, image in images.items():
                other_split, other = owner.setdefault(image or name, (split, path))
                if other_split != split:
                    raise UserError(f"{path}: {one_line(name)} is in {other.name} too; remove it from one")
            unknown = [name for name, image in images.items() if image is None]
            skipped += [Skipped(None, name, f"listed in {path}, but without captions") for name in unknown]
        listed = dict.fromkeys(image for _, images in lists[split] for image in images.values() if image in by_image)
        splits[split] = [by_image[image] for image in listed]
        if not listed:
            path, images = lists[split][0]
            raise UserError(f"{path}: none of its {len(images)} names has captions and an image")
    reason = f"in none of the lists ({first_of(names)})"
    skipped += [Skipped(None, example.name, reason) for example in examples if example.name not in owner]
    return splits, skipped
