"""Tables with one caption per line: Flickr8k, Flickr30k, Hugging Face's ImageFolder and your own.

CSV, TSV      image,caption[,split]          with this header; separated by commas, tabs, semicolons, or | (Flickr30k)
token         NAME.jpg#0<TAB>caption         as Flickr8k and Flickr30k were first published, and NAME.jpg#zhc#0 caption
JSON Lines    {"image": "NAME.jpg", "caption": "...", "split": "train"}         or a list of captions

Image names are relative to the table's folder, or to a folder such as Images/ beside it.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from attncap.data.dataset import Skipped, one_line
from attncap.data.image_folders import SUFFIXES as IMAGE_SUFFIXES
from attncap.data.image_folders import Folders
from attncap.data.readers.caption_file import CaptionFile
from attncap.data.readers.splits import SPLITS
from attncap.errors import UserError
from attncap.files import open_regular, read_text

FLICKR = {
    "captions.txt": "Flickr8k or Flickr30k, as on Kaggle",
    "Flickr8k.token.txt": "Flickr8k",
    "results.csv": "Flickr30k, as on Kaggle",
    "results_20130124.token": "Flickr30k",
}
METADATA = ("metadata.csv", "metadata.jsonl")  # Hugging Face's ImageFolder
SUFFIXES = (".csv", ".tsv", ".jsonl")
TEXT_SUFFIXES = (".txt", ".token")
EXPECTED = (
    "captions.txt or Flickr8k.token.txt beside the images' folder (Flickr8k)",
    "results.csv or results_20130124.token beside the images' folder (Flickr30k)",
    "one .csv, .tsv or .jsonl file of image, caption and perhaps split (your own)",
)
# Flickr30k's and Hugging Face's names -> the names used here.
COLUMNS = {
    "image_name": "image", "file_name": "image", "comment": "caption", "text": "caption", "captions": "caption"
}  # fmt: skip
MAX_FILES = 100  # of a folder, whose first lines are read to see whether they are tables of captions
_IMAGE = "|".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
# NAME.jpg#0, NAME.jpg#zhc#0, or, before a tab, any NAME#0. A name may have # in it.
_TOKEN = re.compile(rf"(?:([^\t\n]+?\.(?i:{_IMAGE}))#(?:[A-Za-z][\w-]*#)?\d+[\t ]|([^\t\n]+)#\d+\t)(.*)")

Rows = Iterator[tuple[int, str, str, str | None]]
"""Line, image, caption, split."""


def find_flickr(path: Path, folders: Folders) -> list[Path]:
    """The tables with the file names of Flickr8k and Flickr30k; the file itself, if its suffix is one of theirs."""
    if path.is_file():
        return [path] if path.name in FLICKR or path.suffix.lower() in TEXT_SUFFIXES else []
    return [path / name for name in FLICKR if name in folders.names(path).exact and not (path / name).is_dir()]


def find_image_folder(path: Path, folders: Folders) -> list[Path]:
    """The metadata file itself; that in the folder, or those in its subfolders train/, validation/ and test/."""
    if path.is_file():
        return [path] if path.name in METADATA else []
    for places in ([path], [folder for folder in folders.subfolders(path) if folder.name in SPLITS]):
        files = [folder / name for folder in places for name in METADATA if name in folders.names(folder).exact]
        if files := list(filter(_is_table, files)):
            return files
    return []


def find(path: Path, folders: Folders) -> list[Path]:
    """The table itself; in a folder, the tables with any other name."""
    if path.is_file():
        return [path] if path.suffix.lower() in SUFFIXES else []
    return [file for file in _files(path, SUFFIXES, folders) if file.name not in FLICKR]


def find_by_content(path: Path, folders: Folders) -> list[Path]:
    """The tables in a folder by their first line, such as translations of Flickr8k's captions. For a file, none."""
    return list(filter(_is_table, islice(_files(path, (*SUFFIXES, *TEXT_SUFFIXES), folders), MAX_FILES)))


def _files(path: Path, suffixes: tuple[str, ...], folders: Folders) -> Iterator[Path]:
    names = sorted(name for name in folders.names(path).exact if name.lower().endswith(suffixes))
    return (path / name for name in names if not (path / name).is_dir())


def _is_table(path: Path) -> bool:
    """Whether the first line of the file is one of a table of captions."""
    try:
        with open_regular(path) as file:
            first = file.readline(2**16).decode("utf-8-sig").strip()
        if path.suffix.lower() == ".jsonl":
            fields = json.loads(first)
            return isinstance(fields, dict) and {"image", "caption"} <= set(_columns(fields))
    except (OSError, ValueError, RecursionError):
        return False
    return bool(_TOKEN.match(first)) or {"image", "caption"} <= set(_columns(first.split(_delimiter(first))))


def read(path: Path, files: list[Path]) -> tuple[str, list[CaptionFile]]:
    """The layout, and the captions; the name of an image is that in the table. Raises UserError for a broken file."""
    source = files[0]
    if len(files) > 1 and source.name not in FLICKR:
        names = ", ".join(one_line(file.name) for file in files)
        raise UserError(f"{path}: expected one table of captions, found {names}; give the path of one")
    return f"{FLICKR.get(source.name, 'a table of captions')} ({source.name})", [read_table(source)]


def read_image_folder(path: Path, files: list[Path]) -> tuple[str, list[CaptionFile]]:
    """As `read`, for Hugging Face's ImageFolder: images in folders named after splits are in these splits.

    https://huggingface.co/docs/datasets/image_dataset
    """
    parts = [read_table(file) for file in files]
    if len(files) > 1:
        parts = [part.inside(part.source.parent.name) for part in parts]
    folder_of = {image: image.replace("\\", "/").partition("/")[0] for part in parts for image in part.files}
    names_of_splits = len(set(folder_of.values())) > 1 and SPLITS.keys() >= set(folder_of.values())
    if names_of_splits and not any(part.splits for part in parts):
        for part in parts:
            part.splits = {image: SPLITS[folder_of[image]] for image in part.files}
    names = ", ".join(str(file.relative_to(path)) if path.is_dir() else file.name for file in files)
    return f"Hugging Face's ImageFolder ({names})", parts


def read_table(path: Path) -> CaptionFile:
    """The captions in a table, in the file's order, with the lines that have none as `skipped`.

    Raises UserError naming the line that is wrong.
    """
    text = read_text(path)
    if path.suffix.lower() == ".jsonl":
        rows = _json_rows(path, text)
    elif _TOKEN.match(text.lstrip()):
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
    return CaptionFile(path, captions, {image: image for image in captions}, given, skipped)


def _delimiter(header: str) -> str:
    return next((mark for mark in "|\t;" if mark in header), ",")


def _columns(header: Iterable[str]) -> list[str]:
    """The names of the columns, with those of other data sets replaced by ours, unless ours is there, too."""
    names = [" ".join(name.lower().split()) for name in header]
    return [name if COLUMNS.get(name, name) in names else COLUMNS[name] for name in names]


def _csv_rows(path: Path, text: str) -> Rows:
    header = re.split(r"[\r\n]", text, maxsplit=1)[0]
    delimiter = _delimiter(header)
    # In Flickr30k's file quotation marks are part of the captions.
    quoting = csv.QUOTE_NONE if delimiter == "|" else csv.QUOTE_MINIMAL
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting)
    try:
        columns = _columns(next(reader, []))
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
        row = _TOKEN.fullmatch(line.strip("\r"))
        if row is None:
            raise UserError(f"{path}: line {number} is not NAME#NUMBER, a tab, caption: {line[:60]!r}")
        yield number, (row[1] or row[2]).strip(), row[3].strip(), None


def _json_rows(path: Path, text: str) -> Rows:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: line {number} is not complete JSON: {error}") from error
        fields = dict(zip(_columns(row), row.values(), strict=True)) if isinstance(row, dict) else {}
        image, captions, split = fields.get("image"), fields.get("caption"), fields.get("split")
        if isinstance(captions, str):
            captions = [captions]
        are_texts = isinstance(captions, list) and all(isinstance(caption, str) for caption in captions)
        if not (isinstance(image, str) and image and are_texts and isinstance(split, str | None)):
            raise UserError(f'{path}: line {number} is not {{"image": "NAME", "caption": "..."}}: {line[:60]!r}')
        for caption in captions or [""]:
            yield number, image, caption.strip(), split
