"""The content of a caption file, and the examples that it gives together with the images that exist."""

from __future__ import annotations

import html
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from attncap.data.dataset import Example, Skipped, one_line
from attncap.data.image_folders import Folders, ImagePlaces, find_files, is_apple_double
from attncap.data.tokenizer import tokenize
from attncap.errors import UserError

_LETTER = re.compile("[A-Za-z]")
NOT_THERE = "the file does not exist"

log = logging.getLogger("attncap")


@dataclass
class CaptionFile:
    """The content of a file of captions. Everything is keyed by the image's name in the data set."""

    source: Path
    captions: dict[str, Sequence[str]]  # empty for an image that is only to be captioned
    files: dict[str, str]  # the image's file, perhaps with folders
    splits: dict[str, str] = field(default_factory=dict)  # without the images whose split is to be drawn
    skipped: list[Skipped] = field(default_factory=list)

    def inside(self, folder: str) -> CaptionFile:
        """The same with the folder's name before those of the images."""
        names = {image: f"{folder}/{image}" for image in self.files}
        captions, files, splits = (
            {names[image]: value for image, value in values.items()}
            for values in (self.captions, self.files, self.splits)
        )
        return CaptionFile(self.source, captions, files, splits, self.skipped)


def find_examples(
    file: CaptionFile, where: ImagePlaces, folders: Folders, drawn: bool, need_images: bool = True
) -> tuple[list[Example], list[Skipped], list[Skipped]]:
    """The examples whose image files exist, those whose files do not, and what else is skipped.

    `where` says where to look for the images, see `find_files`. Without `need_images` (see `read_dataset`), all
    examples are kept if splits are not `drawn` or no file exists. Raises UserError if no caption has a word, or if
    images are needed and none exists.
    """
    captions, skipped = _captions_with_words(file)
    folder, paths = find_files({image: file.files[image] for image in captions}, where, folders)
    if drawn and not need_images and not paths:
        log.warning("%s: none of its images exist; splits are drawn from all of them", file.source)
    keep_missing = not need_images and not (drawn and paths)
    owner: dict[str, str] = {}
    # If several names lead to one file, it belongs to the name that is exactly its own.
    for image in sorted(paths, key=lambda image: not paths[image].endswith(file.files[image])):
        owner.setdefault(paths[image], image)
    examples: list[Example] = []
    missing: list[Skipped] = []
    for image, texts in captions.items():
        if image in paths and owner[paths[image]] != image:
            reason = f"{file.source} has the same file as {one_line(owner[paths[image]])}"
            skipped.append(Skipped(None, image, reason))
        elif image in paths or keep_missing:
            path = paths[image] if image in paths else folder / file.files[image]
            examples.append(Example(image, tuple(texts), Path(path)))
        else:
            path = folder / file.files[image]
            missing.append(Skipped(None, str(path), _why_missing(path, folders)))
    if not examples:
        why = missing[0].reason.removeprefix(NOT_THERE)
        if folders.unreadable:
            why += f" ({folders.unreadable.filename} cannot be read: {folders.unreadable.strerror})"
        raise UserError(
            f"{file.source}: none of the {len(missing)} images it names exist, e.g. {one_line(missing[0].name)}{why}; "
            "put the images in that folder, or give theirs with --images"
        )
    return examples, missing, skipped


def _why_missing(path: Path, folders: Folders) -> str:
    if is_apple_double(path.name):
        return "a file of macOS, not an image"
    similar = folders.names(path.parent).similar(path.name)
    return NOT_THERE + (f", but {one_line(' and '.join(similar))} do" if similar else "")


def _captions_with_words(file: CaptionFile) -> tuple[dict[str, Sequence[str]], list[Skipped]]:
    """The captions that have a word, by image, and the others as skipped items."""
    kept: dict[str, Sequence[str]] = {}
    skipped: list[Skipped] = []
    for image, texts in file.captions.items():
        with_words = [text for text in texts if has_word(text)]
        if with_words or not texts:
            kept[image] = with_words
        if len(with_words) < len(texts):
            wordless = (f"{one_line(text)!r} of {image}" for text in texts if not has_word(text))
            skipped += [Skipped(None, name, "a caption without a word") for name in wordless]
    if not kept:
        raise UserError(f"{file.source}: none of its captions has a word, e.g. {skipped[0].name}")
    return kept, skipped


def has_word(caption: str) -> bool:
    """Whether a model can learn a word from the caption: ":-)", "..." and an emoji are none."""
    # For speed: a letter is a word. But an entity such as &nbsp; has letters and stands for none.
    if "&" not in caption and _LETTER.search(caption):
        return True
    return bool(tokenize(caption) and re.search(r"[^\W_]", html.unescape(caption)))
