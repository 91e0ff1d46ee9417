"""Tables with one caption per line: Flickr8k, Flickr30k and your own.

CSV, TSV      image,caption[,split]          with this header; separated by commas, tabs, semicolons, or | (Flickr30k)
token         NAME.jpg#0<TAB>caption         as Flickr8k and Flickr30k were first published
JSON Lines    {"image": "NAME.jpg", "caption": "...", "split": "train"}

Image names are relative to the table's folder, or to a folder such as Images/ beside it.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

from attncap.data.dataset import Dataset, Example, Skipped, Splits
from attncap.data.image_folders import find_image_folder, image_roots
from attncap.data.readers.splits import SPLITS, draw_splits, given_splits, keep_existing
from attncap.errors import UserError
from attncap.files import read_text

FLICKR = {
    "captions.txt": "Flickr8k or Flickr30k, as on Kaggle",
    "Flickr8k.token.txt": "Flickr8k",
    "results.csv": "Flickr30k, as on Kaggle",
    "results_20130124.token": "Flickr30k",
}
# Lists of the image names in each split, which may lie beside one of these files. Other tables have no such lists.
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
COLUMNS = {"image_name": "image", "comment": "caption"}  # Flickr30k's names -> the names used here

Rows = Iterator[tuple[int, str, str, str | None]]
"""Line, image, caption, split."""


def find_flickr(path: Path) -> list[Path]:
    """The tables with the file names of Flickr8k and Flickr30k."""
    if path.is_file():
        return [path] if path.name in FLICKR or path.suffix in (".txt", ".token") else []
    return [path / name for name in FLICKR if (path / name).is_file()]


def find(path: Path) -> list[Path]:
    """The table itself; in a folder, the tables with any other name."""
    files = [path] if path.is_file() else sorted(path.iterdir())
    return [f for f in files if f.suffix.lower() in SUFFIXES and f.name not in FLICKR and f.is_file()]


def read(path: Path, files: list[Path], seed: int, images: bool = True) -> Dataset:
    """The examples by split; `name` is the image's name in the table. `images` as in `read_dataset`.

    The splits are those of the lists or of the table, or else drawn from the seed. Raises UserError for a broken file.
    """
    source = files[0]
    if len(files) > 1 and source.name not in FLICKR:
        names = ", ".join(file.name for file in files)
        raise UserError(f"{path}: expected one table of captions, found {names}; give the path of one")
    captions, split_of, skipped = read_table(source)
    roots = image_roots(path, source) if source.name in FLICKR else [source.parent]
    folder = find_image_folder(captions, roots)
    examples = [Example(name, tuple(texts), folder / name) for name, texts in captions.items()]
    lists = {split: _first_file(source.parent, names) for split, names in LISTS.items()}
    has_lists = source.name in FLICKR and any(lists.values())
    examples, missing = keep_existing(examples, source, images, drawn=not has_lists and not split_of)
    if has_lists:
        splits, without_captions = _listed_splits(source.parent, lists, captions, examples)
        skipped += without_captions
    elif split_of:
        splits = given_splits(examples, split_of)
    else:
        splits = draw_splits(examples, seed)
    layout = FLICKR.get(source.name, "a table of captions")
    return Dataset(f"{layout} ({source.name})", splits, missing, skipped)


def read_table(path: Path) -> tuple[dict[str, list[str]], dict[str, str], list[Skipped]]:
    """Captions by image, in the file's order; the split by image, {} where the table has none; and the lines without a
    caption.

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
    skipped = []
    for line, image, caption, split in rows:
        if not caption:
            skipped.append(Skipped(None, f"line {line} of {path}", "the caption is empty"))
            continue
        if split and split.lower() not in SPLITS:
            raise UserError(f"{path}: line {line}: split {split[:60]!r} should be train, val or test")
        split = SPLITS[split.lower()] if split else None
        if splits.setdefault(image, split) != split:
            raise UserError(f"{path}: line {line}: {image[:60]!r} is in split {splits[image]} and in {split}; keep one")
        captions.setdefault(image, []).append(caption)
    if not captions:
        raise UserError(f"{path}: no captions in it")
    without = [image for image, split in splits.items() if split is None]
    if without and len(without) < len(splits):
        raise UserError(f"{path}: {without[0][:60]!r} has no split, others have; give every image one, or none")
    given = {image: split for image, split in splits.items() if split is not None}
    return captions, given, skipped


def _csv_rows(path: Path, text: str) -> Rows:
    header = re.split(r"[\r\n]", text, maxsplit=1)[0]
    delimiter = next((mark for mark in "|\t;" if mark in header), ",")
    # In Flickr30k's file quotation marks are part of the captions.
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
            # A caption with a comma should be in quotes. Where it is not, its pieces are joined.
            if columns[last] == "caption" and len(row) > last:
                row[last:] = [delimiter.join(row[last:])]
            fields = dict(zip(columns, map(str.strip, row), strict=False))
            if len(row) != len(columns) or not fields["image"]:
                hint = "; put a caption with commas in quotation marks" if len(row) > len(columns) else ""
                raise UserError(
                    f"{path}: line {reader.line_num} is not {','.join(columns)[:60]}: "
                    f"{delimiter.join(row)[:60]!r}{hint}"
                )
            if "\n" in fields["caption"] or "\r" in fields["caption"]:
                raise UserError(
                    f"{path}: the caption that ends on line {reader.line_num} spans several "
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
            raise UserError(f"{path}: line {number} is not complete JSON: {error}") from error
        fields = row if isinstance(row, dict) else {}
        image, caption, split = fields.get("image"), fields.get("caption"), fields.get("split")
        if not (isinstance(image, str) and image and isinstance(caption, str) and isinstance(split, str | None)):
            raise UserError(f'{path}: line {number} is not {{"image": "NAME", "caption": "..."}}: {line[:60]!r}')
        yield number, image, caption.strip(), split


def _listed_splits(
    path: Path, lists: dict[str, Path | None], captions: dict[str, list[str]], examples: list[Example]
) -> tuple[Splits, list[Skipped]]:
    """The splits of the lists, and the names in them that have no captions."""
    by_name = {example.name: example for example in examples}
    splits: dict[str, list[Example]] = {}
    skipped = []
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
        reason = f"listed in {source}, but without captions"
        skipped += [Skipped(None, name, reason) for name in names if name not in captions]
        splits[split] = [by_name[name] for name in names if name in by_name]
        if not splits[split]:
            raise UserError(f"{source}: none of its {len(names)} names has captions and an image")
    return splits, skipped


def _first_file(path: Path, names: tuple[str, ...]) -> Path | None:
    return next((path / name for name in names if (path / name).is_file()), None)
