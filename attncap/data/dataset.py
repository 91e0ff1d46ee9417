"""What a data set is: images with captions, split into train, val and test, and a record of the items that were left
out."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from PIL import Image

from attncap.data.images import open_image

if TYPE_CHECKING:
    from attncap.data.shapes import Scene

MAX_WARNINGS = 10  # with the same reason, in one call of `report_skipped`

log = logging.getLogger("attncap")


class CaptionedImage(Protocol):
    """An image of a data set and its captions. Anything that has these members can be used for training, captioned and
    scored."""

    @property
    def name(self) -> str:
        """Unique within the data set."""

    @property
    def captions(self) -> Sequence[str]:
        """Empty for an image that is only to be captioned."""

    @property
    def scene(self) -> Scene | None:
        """The objects in the image, if the data set knows them exactly, as `shapes` does; None for photographs."""

    def image(self) -> Image.Image:
        """The image, in RGB and upright. Raises ImageError if it cannot be read."""

    def identity(self) -> str:
        """A key for caches: two images with the same key have the same pixels."""


@dataclass(frozen=True)
class Example:
    """An image file and its captions."""

    name: str
    captions: tuple[str, ...]
    path: Path

    @property
    def scene(self) -> None:
        return None

    def image(self) -> Image.Image:
        return open_image(self.path)

    def identity(self) -> str:
        """The file's path, size and modification time; only the path if there is no such file."""
        path = os.path.abspath(self.path)
        try:
            status = os.stat(path)
        except (OSError, ValueError):
            return json.dumps([path])
        return json.dumps([path, status.st_size, status.st_mtime_ns])


@dataclass(frozen=True)
class Skipped:
    """An item that was left out."""

    index: int | None  # of an image in its data set; None for what was left out when the data set was read
    name: str  # the file, or a short description: "line 3 of captions.txt"
    reason: str


Splits = Mapping[str, Sequence[CaptionedImage]]
"""The images under "train", "val" and "test"."""


@dataclass(frozen=True)
class Dataset:
    """A data set as it was found."""

    layout: str
    splits: Splits
    missing: Sequence[Skipped] = ()  # images whose files do not exist
    skipped: Sequence[Skipped] = ()  # everything else that was left out: captions, images, other data sets
    drawn: bool = False  # whether the splits, or COCO's val and test, were drawn from the seed
    lists: Sequence[Path] = ()  # the files that list the images of each split, if splits come from such files


def report_skipped(skipped: Iterable[Skipped], seen: set[tuple[str, str]] | None = None) -> None:
    """Warn about what was left out, one line per item; more than MAX_WARNINGS items with the same reason share a line.

    A loop that meets the same items repeatedly passes a set of its own as `seen`: items in it are not reported, and
    reported items are added to it.
    """
    names: dict[str, list[str]] = {}
    for item in skipped:
        if seen is None or (item.name, item.reason) not in seen:
            names.setdefault(item.reason, []).append(item.name)
            if seen is not None:
                seen.add((item.name, item.reason))
    for reason, group in names.items():
        lines = [first_of(group)] if len(group) > MAX_WARNINGS else map(one_line, group)
        for line in lines:
            log.warning("skipped: %s: %s", line, reason)


def first_of(names: Sequence[object]) -> str:
    """The first three names and how many more there are, on one line."""
    first = ", ".join(map(one_line, names[:3]))
    return first if len(names) <= 3 else f"{first} and {len(names) - 3:,} more"


def one_line(name: object) -> str:
    """A name on one line, cut to 300 characters: names come from files and may contain anything. Unprintable
    characters, such as those that control a terminal, are shown as escapes, such as \\x1b."""
    characters = " ".join(str(name).split())[:300]
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in characters)
