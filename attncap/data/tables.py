"""Tables of captions, a line a caption: Flickr8k, Flickr30k and one's own.

CSV, TSV      image,caption[,split]          a header; separated by commas, tabs, semicolons, or | as Flickr30k's
token         NAME.jpg#0<TAB>caption         as Flickr8k and Flickr30k were first given out
JSON Lines    {"image": "NAME.jpg", "caption": "...", "split": "train"}

Images are named from the table's own folder, or from a folder such as Images/ beside it.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

from attncap.data import SPLITS, Dataset, Example, Splits, draw_splits, keep_existing, report, told_splits
from attncap.data.images import find_image_folder, tops_of
from attncap.errors import UserError
from attncap.files import read_text

FLICKR = {
    "captions.txt": "Flickr8k or Flickr30k, as on Kaggle",
    "Flickr8k.token.txt": "Flickr8k",
    "results.csv": "Flickr30k, as on Kaggle",
    "results_20130124.token": "Flickr30k",
}
# Beside any of these, and no other table, lists of image names for the splits; the original names are accepted too.
LISTS = {
    "train": ("trainImages.txt", "Flickr_8k.trainImages.txt"),
    "val": ("valImages.txt", "devImages.txt", "Flickr_8k.devImages.txt", "Flickr_8k.valImages.txt"),
    "test": ("testImages.txt", "Flickr_8k.testImages.txt"),
}
SUFFIXES = (".csv", ".tsv", ".jsonl")
EXPECTED = (
    "captions.txt or Flickr8k.token.txt beside the images' folder (Flickr8k)",
    "results.csv or results_20130124.token beside the images' folder (Flickr30k)",
    "one .csv, .tsv or .jsonl file of image, caption and perhaps split (your own)",
)
COLUMNS = {"image_name": "image", "comment": "caption"}  # as Flickr30k calls them

Rows = Iterator[tuple[int, str, str, str | None]]
"""Line, image, caption, split."""


def find_flickr(path: Path) -> list[Path]:
    """The tables with a name of Flickr8k's or Flickr30k's."""
    if path.is_file():
        return [path] if path.name in FLICKR or path.suffix in (".txt", ".token") else []
    return [path / name for name in FLICKR if (path / name).is_file()]


def find(path: Path) -> list[Path]:
    """The table itself, or those in the folder, of any other name."""
    files = [path] if path.is_file() else sorted(path.iterdir())
    return [f for f in files if f.suffix.lower() in SUFFIXES and f.name not in FLICKR and f.is_file()]


def read(path: Path, files: list[Path], seed: int, images: bool = True) -> Dataset:
    """The examples by split; `name` is the image's name in the table. `images` as in `read_dataset`. Raises UserError
    on a wrong layout.

    The splits are the lists' or the table's own, or else drawn from the seed.
    """
    source = files[0]
    if len(files) > 1 and source.name not in FLICKR:
        names = ", ".join(file.name for file in files)
        raise UserError(f"{path}: expected one table of captions, found {names}; give the path of one")
    captions, told = read_table(source)
    folder = find_image_folder(captions, tops_of(path, source) if source.name in FLICKR else [source.parent])
    examples = [Example(name, tuple(texts), folder / name) for name, texts in captions.items()]
    lists = {split: _first_file(source.parent, names) for split, names in LISTS.items()}
    listed = source.name in FLICKR and any(lists.values())
    examples, missing = keep_existing(examples, source, images, drawn=not (listed or told))
    if listed:
        splits = _listed_splits(source.parent, lists, captions, examples)
    else:
        splits = told_splits(examples, told) if told else draw_splits(examples, seed)
    return Dataset(f"{FLICKR.get(source.name, 'a table of captions')} ({source.name})", splits, missing)


def read_table(path: Path) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Captions by image, and the split by image, {} where the table tells none; in the file's order.

    Raises UserError naming the line that is wrong.
    """
    text = read_text(path)
    if path.suffix.lower() == ".jsonl":
        rows = _json_rows(path, text)
    elif re.match(r"[^\t\n]*#\d+\t", text):
        rows = _token_rows(path, text)
    else:
        rows = _csv_rows(path, text)
    captions: dict[str, list[str]] = {}
    splits: dict[str, str | None] = {}
    empty = []
    for line, image, caption, split in rows:
        if not caption:
            empty.append(f"line {line}")
            continue
        if split and split.lower() not in SPLITS:
            raise UserError(f"{path}: line {line}: split {split[:60]!r} should be train, val or test")
        split = SPLITS[split.lower()] if split else None
        if splits.setdefault(image, split) != split:
            raise UserError(f"{path}: line {line}: {image[:60]!r} is in split {splits[image]} and in {split}; keep one")
        captions.setdefault(image, []).append(caption)
    report(path, empty, "empty captions")
    if not captions:
        raise UserError(f"{path}: no captions in it")
    without = [image for image, split in splits.items() if split is None]
    if 0 < len(without) < len(splits):
        raise UserError(f"{path}: {without[0][:60]!r} has no split, others have; give every image one, or none")
    return captions, {} if without else splits


def _csv_rows(path: Path, text: str) -> Rows:
    header = re.match(r"[^\r\n]*", text)[0]
    delimiter = next((mark for mark in "|\t;" if mark in header), ",")
    # Flickr30k's quotation marks belong to its captions.
    quoting = csv.QUOTE_NONE if delimiter == "|" else csv.QUOTE_MINIMAL
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting)
    try:
        columns = [" ".join(field.lower().split()) for field in next(reader, [])]
        columns = [COLUMNS.get(field, field) for field in columns]
        if not columns.count("image") == columns.count("caption") == 1 or columns.count("split") > 1:
            raise UserError(f'{path}: line 1 should be "image,caption" or "image,caption,split", found "{header[:60]}"')
        last = len(columns) - 1
        for row in reader:
            if not row:
                continue
            # Flickr30k has one "2199200615.jpg| 4   A dog runs ..."
            if "comment_number" in columns and len(row) == last:
                row[-1:] = row[-1].split(maxsplit=1)
            # A caption with a comma should stand in quotes; without them, the pieces are joined.
            if columns[last] == "caption" and len(row) > last:
                row[last:] = [delimiter.join(row[last:])]
            fields = dict(zip(columns, map(str.strip, row), strict=False))
            if len(row) != len(columns) or not fields["image"]:
                raise UserError(
                    f"{path}: line {reader.line_num} is not {','.join(columns)[:60]}: {delimiter.join(row)[:60]!r}"
                    + "; a caption with commas wants quotation marks" * (len(row) > len(columns))
                )
            if "\n" in fields["caption"] or "\r" in fields["caption"]:
                raise UserError(
                    f"{path}: the caption that ends on line {reader.line_num} runs over several "
                    "lines; close its quotation mark"
                )
            yield reader.line_num, fields["image"], fields["caption"], fields.get("split")
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num}: {error}") from error


def _token_rows(path: Path, text: str) -> Rows:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        row = re.fullmatch(r"([^\t]+)#\d+\t(.*)", line.strip("\r"))
        if row is None:
            raise UserError(f"{path}: line {number} is not NAME#NUMBER, a tab, caption: {line[:60]!r}")
        yield number, row[1].strip(), row[2].strip(), None


def _json_rows(path: Path, text: str) -> Rows:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: line {number} is not whole JSON: {error}") from error
        image, caption, split = map(row.get, ("image", "caption", "split")) if isinstance(row, dict) else (None,) * 3
        if not (isinstance(image, str) and image and isinstance(caption, str) and isinstance(split, str | None)):
            raise UserError(f'{path}: line {number} is not {{"image": "NAME", "caption": "..."}}: {line[:60]!r}')
        yield number, image, caption.strip(), split


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
        names = list(dict.fromkeys(line.strip() for line in read_text(source).splitlines() if line.strip()))
        for name in names:
            if owner.setdefault(name, source) != source:
                raise UserError(f"{source}: {name} is in {owner[name].name} too; remove it from one")
        report(source, [n for n in names if n not in captions], "names without captions")
        splits[split] = [by_name[name] for name in names if name in by_name]
        if not splits[split]:
            raise UserError(f"{source}: none of its {len(names)} names has captions and an image")
    return splits


def _first_file(path: Path, names: tuple[str, ...]) -> Path | None:
    return next((path / name for name in names if (path / name).is_file()), None)
