"""Flickr8k (Hodosh, Young and Hockenmaier 2013) in the layout Kaggle gives it.

captions.txt        image,caption        a header, then a line a caption; five captions an image
Images/             NAME.jpg             also images/
trainImages.txt     NAME.jpg             optional lists of names for the splits, with
valImages.txt, testImages.txt            the original names accepted too
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

from attncap.data import Example, Splits, draw_splits, keep_existing, report
from attncap.errors import UserError

EXPECTED = "captions.txt beside a folder Images/ (Flickr8k)"
LISTS = {
    "train": ("trainImages.txt", "Flickr_8k.trainImages.txt"),
    "val": ("valImages.txt", "devImages.txt", "Flickr_8k.devImages.txt", "Flickr_8k.valImages.txt"),
    "test": ("testImages.txt", "Flickr_8k.testImages.txt"),
}


def recognises(path: Path) -> bool:
    return (path / "captions.txt").is_file()


def read(path: Path, seed: int) -> Splits:
    """The examples by split; `name` is the image's file name. Raises UserError on a wrong layout."""
    source = path / "captions.txt"
    captions = read_captions(source)
    folder = next((path / name for name in ("Images", "images") if (path / name).is_dir()), None)
    if folder is None:
        raise UserError(f"{path}: no folder Images/ beside captions.txt; put the photographs there")
    examples = [Example(name, tuple(texts), folder / name) for name, texts in captions.items()]
    examples = keep_existing(examples, source)
    lists = {split: _first_file(path, names) for split, names in LISTS.items()}
    if not any(lists.values()):
        return draw_splits(examples, seed)
    return _listed_splits(path, lists, captions, examples)


def read_captions(path: Path) -> dict[str, list[str]]:
    """Captions by image, in the file's order. Raises UserError naming the line that is wrong."""
    reader = csv.reader(io.StringIO(_read_text(path), newline=""))
    captions: dict[str, list[str]] = {}
    empty = []
    try:
        header = next(reader, [])
        if [field.strip().lower() for field in header] != ["image", "caption"]:
            found = ",".join(header)[:60]
            raise UserError(f'{path}: line 1 should be "image,caption", found "{found}"')
        for row in reader:
            if not row:
                continue
            # A caption with a comma should stand in quotes; without them, the pieces are joined.
            name, caption = row[0].strip(), ",".join(row[1:]).strip()
            if len(row) < 2 or not name:
                raise UserError(f"{path}: line {reader.line_num} is not image,caption: {row[0][:60]!r}")
            if "\n" in caption or "\r" in caption:
                raise UserError(
                    f"{path}: the caption that ends on line {reader.line_num} runs over several "
                    "lines; close its quotation mark"
                )
            if caption:
                captions.setdefault(name, []).append(caption)
            else:
                empty.append(f"line {reader.line_num}")
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num}: {error}") from error
    report(empty, f"{path}: left out %d empty captions")
    if not captions:
        raise UserError(f"{path}: no captions in it, only the header")
    return captions


def _listed_splits(path: Path, lists: dict, captions: dict, examples: list[Example]) -> Splits:
    by_name = {example.name: example for example in examples}
    splits: dict[str, list[Example]] = {}
    owner: dict[str, Path] = {}
    for split, source in lists.items():
        if source is None:
            raise UserError(
                f"{path}: {LISTS[split][0]} is missing beside the other lists; add it, or remove "
                "the lists to have the splits drawn"
            )
        names = list(dict.fromkeys(line.strip() for line in _read_text(source).splitlines() if line.strip()))
        for name in names:
            if owner.setdefault(name, source) != source:
                raise UserError(f"{source}: {name} is in {owner[name].name} too; remove it from one")
        report([n for n in names if n not in captions], f"{source}: left out %d names without captions")
        splits[split] = [by_name[name] for name in names if name in by_name]
        if not splits[split]:
            raise UserError(f"{source}: none of its {len(names)} names has captions and an image")
    return splits


def _first_file(path: Path, names: tuple[str, ...]) -> Path | None:
    return next((path / name for name in names if (path / name).is_file()), None)


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
