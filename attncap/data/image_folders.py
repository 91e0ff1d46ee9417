"""Where the images of a data set are: files and folders, found by their names. Nothing here opens an image."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable
from pathlib import Path

from attncap.errors import CallError, UserError

# Of the formats in attncap.data.images.
SUFFIXES = frozenset(".jpg .jpeg .jpe .jfif .png .gif .bmp .webp .tif .tiff .ppm .pgm .pbm .pnm".split())


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """The given files, and for each folder the images in it and in its subfolders, sorted.

    In folders, images are recognised by their suffix, in upper or lower case. Raises CallError for a path that does not
    exist and UserError for a folder that cannot be read.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            names = (Path(top, name) for top, _, files in os.walk(path, onerror=_refuse) for name in files)
            found += sorted(name for name in names if name.suffix.lower() in SUFFIXES)
        elif path.exists():
            found.append(path)
        else:
            raise CallError(f"{path}: no such file or folder")
    return found


def _refuse(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from error


def find_image_folder(names: Iterable[str], roots: Iterable[Path]) -> Path:
    """The folder that has the most of the files `names` (which may include subfolders), in the first of `roots` that
    has any.

    In each root, the candidates are the root itself, the folders in it that are named after images (Images,
    Flicker8k_Dataset, flickr30k-images, ...), and such folders in those. If none of the files exist, it is the first
    root's best guess.
    """
    files_in: dict[str, set[str]] = {}
    for name in names:
        head, tail = os.path.split(name)
        files_in.setdefault(head, set()).add(tail)

    def count(folder: Path) -> int:
        return sum(len(files & file_names(folder / head)) for head, files in files_in.items())

    best_of_roots = []
    for root in roots:
        inside = _image_folders(root)
        nested = [inner for folder in inside for inner in _image_folders(folder)]
        best = max([*inside, *nested, root], key=count)
        if count(best):
            return best
        best_of_roots.append(best)
    return best_of_roots[0]


def image_roots(path: Path, source: Path) -> list[Path]:
    """Where to look for the images of the file `source` of the data set at `path`: next to the file, then in the data
    set's folder, never outside it. If `path` is the file itself, that folder may be one level up."""
    return [source.parent, path if path.is_dir() else source.parent.parent]


def _image_folders(root: Path) -> list[Path]:
    return [folder for folder in subfolders(root) if re.search("image|dataset", folder.name, re.IGNORECASE)]


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted; [] if it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted(folder / entry.name for entry in entries if _is_folder(entry))
    except OSError:
        return []


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a symbolic link to itself
        return False


def file_names(folder: Path) -> set[str]:
    """The names in a folder; empty if there is no such folder. Raises OSError when it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries}
    except ValueError:  # a path with a NUL character
        return set()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP):
            return set()
        raise
