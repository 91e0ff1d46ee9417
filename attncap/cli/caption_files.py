"""The files that `attncap caption` writes its captions to: a file of records, and a text file beside each image."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import BinaryIO

from attncap.errors import CallError, UserError
from attncap.files import atomic_file, read_text, write_atomically

MAX_SIDECAR = 2**20  # bytes


class Records:
    """A JSON Lines file with one record an image, a context manager. Records are appended as they come, so that a run
    that was killed goes on where it stopped. Meanwhile no other run may write to the file.

    `known` has the status of each image with a record, "captioned" or "failed". Entering raises UserError when the file
    cannot be written, when another run is writing to it, or when it holds anything but such records; a last line that
    is cut short is removed.

    Args:
        path: the file.
        forget: the status of records to remove, with whose images one wants to begin again.
    """

    def __init__(self, path: Path, forget: Collection[str] = ()):
        self.path, self.forget = path, forget
        self.known: dict[str, str] = {}

    def __enter__(self) -> Records:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._open()
            whole = self._read()
            self._file.truncate(whole)
            if removed := [name for name, status in self.known.items() if status in self.forget]:
                self._remove(set(removed))
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # of a write that has failed, and has been reported
            self._file.close()

    def write(self, record: dict) -> None:
        """Append a record, with the fields `image` and `status` at least. Raises UserError when it cannot be
        written."""
        try:
            self._file.write(json.dumps(record).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}; it has the captions so far") from error
        self.known[record["image"]] = record["status"]

    def _open(self) -> BinaryIO:
        file = open(self.path, "a+b")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise UserError(f"{self.path}: another run is writing to it") from error
        except OSError:
            pass  # some network file systems have no locks
        return file

    def _read(self) -> int:
        """Fill `known`. Returns the number of bytes of the whole lines."""
        self._file.seek(0)
        whole = 0
        for number, line in enumerate(self._file, start=1):
            if line.endswith(b"\n"):
                whole += len(line)
                name, status = parse_record(self.path, number, line)
                self.known[name] = status
        return whole

    def _remove(self, names: set[str]) -> None:
        self._file.seek(0)
        with atomic_file(self.path) as kept:
            for number, line in enumerate(self._file, start=1):
                if parse_record(self.path, number, line)[0] not in names:
                    kept.write(line)
        self._file.close()
        self._file = self._open()
        for name in names:
            del self.known[name]


def parse_record(path: Path, number: int, line: bytes) -> tuple[str, str]:
    """The image and the status in a line of a file of records. Raises UserError, with the line's number."""
    try:
        record = json.loads(line)
        name, status = record["image"], record["status"]
    except (ValueError, KeyError, TypeError, RecursionError):
        name = status = None
    if not isinstance(name, str) or status not in ("captioned", "failed"):
        raise UserError(f"{path}: line {number}: not a record of attncap caption; give --output another file")
    return name, status


def count_records(path: Path) -> Counter[tuple[str, str]]:
    """How many records each image has, by its name and their status. Raises UserError when the file cannot be read or
    has other content."""
    records: Counter[tuple[str, str]] = Counter()
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.endswith(b"\n"):
                    records[parse_record(path, number, line)] += 1
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    return records


class Sidecars:
    """A text file for each image, with a line for each of its captions: photo.txt for photo.jpg.

    Args:
        folder: where they are, in subfolders as the images are; None: beside the images.
        extension: with its dot.
        existing: what happens to a file that is not empty: it stays as it is ("skip"), is replaced ("overwrite"), or
            the captions become its last or first lines ("append", "prepend") unless they already are.
    """

    def __init__(self, folder: Path | None, extension: str, existing: str):
        self.folder, self.extension, self.existing = folder, extension, existing

    def path(self, image: Path, inside: Path) -> Path:
        """The text file of an image; `inside` is the image's path within the folder that was given."""
        place = image if self.folder is None else self.folder / inside
        return place.with_name(place.stem + self.extension)

    def check(self, images: Collection[tuple[Path, Path]]) -> None:
        """Raises CallError if two of the images (as for `path`) would have the same file."""
        owners: dict[Path, Path] = {}
        for image, inside in images:
            path = self.path(image, inside)
            if (other := owners.setdefault(path, image)) != image:
                raise CallError(f"{other} and {image} would both have the captions {path}; rename one of the images")

    def write(self, path: Path, captions: Sequence[str]) -> None:
        """Raises UserError when the file cannot be written, or has to be read and cannot be."""
        lines = [" ".join(caption.splitlines()) for caption in captions]
        if exists(path) and self.existing != "overwrite":
            if self.existing == "skip":
                return
            before = read_text(path, MAX_SIDECAR).splitlines()
            has_them = before[-len(lines) :] if self.existing == "append" else before[: len(lines)]
            if has_them == lines:  # a run that was killed had come this far
                return
            lines = before + lines if self.existing == "append" else lines + before
        write_atomically(path, "".join(f"{line}\n" for line in lines))


def exists(path: Path) -> bool:
    """Whether a text file is there and not empty."""
    try:
        return os.stat(path).st_size > 0
    except OSError:
        return False
