"""Splits: drawn from a seed, or as the data set gives them; and the examples whose image files exist."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from attncap.data.dataset import Example, Skipped, Splits, one_line
from attncap.data.image_folders import file_names
from attncap.errors import UserError

# Names that data sets use -> names used here. Karpathy's restval is the part of COCO's val that is used for training.
SPLITS = {"train": "train", "restval": "train", "val": "val", "dev": "val", "validation": "val", "test": "test"}

log = logging.getLogger("attncap")


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


def given_splits(examples: Sequence[Example], split_of: Mapping[str, str]) -> Splits:
    """`split_of` has the split for each example's name."""
    splits: dict[str, list[Example]] = {"train": [], "val": [], "test": []}
    for example in examples:
        splits[split_of[example.name]].append(example)
    return splits


def keep_existing(
    examples: Sequence[Example], source: Path, images: bool, drawn: bool = True
) -> tuple[list[Example], list[Skipped]]:
    """The examples whose files exist, and the others. Raises UserError when no file exists.

    Without `images` (see `read_dataset`) all examples are kept where splits are not `drawn`, or no file exists.

    `source` is the file that names the images. Each folder is listed once: asking for every single file takes minutes
    on a network drive.
    """
    if not images and not drawn:
        return list(examples), []
    present = {folder: file_names(folder) for folder in {example.path.parent for example in examples}}
    kept: list[Example] = []
    missing: list[Skipped] = []
    for example in examples:
        if example.path.name in present[example.path.parent]:
            kept.append(example)
        else:
            missing.append(Skipped(None, str(example.path), "the file does not exist"))
    if not kept and not images:
        log.warning("%s: none of its images exist; splits are drawn from all of them", source)
        return list(examples), []
    if not kept:
        raise UserError(
            f"{source}: none of the {len(missing)} images it names exist, e.g. {one_line(missing[0].name)}; "
            "put the images in that folder"
        )
    return kept, missing
