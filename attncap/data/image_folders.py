"""Where the images of a data set are: files and folders, found by their names. Nothing here opens an image."""

from __future__ import annotations

import errno
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import chain, filterfalse, islice, product
from pathlib import Path
from typing import NamedTuple

from attncap.errors import CallError, UserError

# Of the formats in attncap.data.images.
SUFFIXES = frozenset(".jpg .jpeg .jpe .jfif .png .gif .bmp .webp .tif .tiff .ppm .pgm .pbm .pnm".split())
# Of other common formats, which are not read.
UNSUPPORTED = frozenset(
    ".heic .heif .avif .jxl .jp2 .svg .psd .raw .dng .cr2 .cr3 .nef .arw .orf .rw2 .raf .srw".split()
)
MAX_FOLDERS = 1000  # searched below one folder for images that are not in a folder named after images
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)

log = logging.getLogger("attncap")


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """The given files, and for each folder the images in it and in its subfolders, sorted.

    In folders, images are recognised by their suffix, in upper or lower case; those in other formats are counted and
    reported. Raises CallError for a path that does not exist and UserError for a folder that cannot be read.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            images: list[Path] = []
            unread: Counter[str] = Counter()
            for top, _, names in os.walk(path, onerror=_refuse):
                for name in filterfalse(is_apple_double, names):
                    suffix = os.path.splitext(name)[1].lower()
                    if suffix in SUFFIXES:
                        images.append(Path(top, name))
                    elif suffix in UNSUPPORTED:
                        unread[suffix] += 1
            found += sorted(images)
            if unread:
                kinds = ", ".join(sorted(unread))
                log.warning("%s: %d images left out (%s); convert them to JPEG", path, unread.total(), kinds)
        elif path.exists():
            found.append(path)
        else:
            raise CallError(f"{path}: no such file or folder")
    return found


def _refuse(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from error


def is_apple_double(name: str) -> bool:
    """Whether this is the name of an AppleDouble file, in which macOS keeps attributes of another: ._1.jpg of 1.jpg."""
    return name.startswith("._")


def fold(name: str) -> str:
    """The same for names that differ only in case or in Unicode normalization (macOS decomposes accents)."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


class Names:
    """File names, also found if their case or Unicode normalization differs, as long as only one name matches."""

    def __init__(self, names: Iterable[str]):
        self.exact = set(names)

    @cached_property
    def folded(self) -> dict[str, list[str]]:
        folded: dict[str, list[str]] = {}
        for name in self.exact:
            folded.setdefault(fold(name), []).append(name)
        return folded

    def similar(self, name: str) -> list[str]:
        return sorted(self.folded.get(fold(name), ()))

    def find(self, name: str) -> str | None:
        if name in self.exact:
            return name
        similar = self.similar(name)
        return similar[0] if len(similar) == 1 else None

    def count(self, names: Names) -> int:
        """How many of `names` are here, regardless of case and Unicode form only where none is here exactly."""
        return len(self.exact & names.exact) or len(self.folded.keys() & names.folded.keys())


class Folders:
    """The contents of folders, each listed only once: checking every single file takes minutes on a network drive."""

    def __init__(self) -> None:
        self._listed: dict[str, tuple[Names, list[Path]]] = {}
        self.unreadable: OSError | None = None  # the first error of a folder that exists but cannot be read

    def names(self, folder: str | Path) -> Names:
        """The names in a folder; none if there is no such folder, or it cannot be read."""
        return self._list(folder)[0]

    def subfolders(self, folder: str | Path) -> list[Path]:
        """The folders in a folder, sorted, without hidden ones."""
        return self._list(folder)[1]

    def find(self, folder: str | Path, name: str) -> str | None:
        """The path of a file or folder in a folder, or None. `name` may contain folders; each of its parts is found as
        in `Names`."""
        path = "/" if name.startswith("/") else str(folder)
        for part in name.split("/"):
            if part not in ("", "."):
                names = self.names(path)
                # A folder that cannot be listed may still lead to others.
                as_given = part == ".." or (not names.exact and os.path.isdir(os.path.join(path, part)))
                actual = part if as_given else names.find(part)
                if actual is None:
                    return None
                path = os.path.join(path, actual)
        return path

    def _list(self, folder: str | Path) -> tuple[Names, list[Path]]:
        if (key := str(folder)) not in self._listed:
            names, inner = [], []
            try:
                with os.scandir(key) as entries:
                    for entry in entries:
                        if not is_apple_double(entry.name):
                            names.append(entry.name)
                            if _is_folder(entry) and not entry.name.startswith("."):
                                inner.append(Path(folder, entry.name))
            except ValueError:  # a path with a NUL character
                pass
            except OSError as error:
                if error.errno not in ABSENT:
                    self.unreadable = self.unreadable or error
            self._listed[key] = Names(names), sorted(inner)
        return self._listed[key]


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        # Links with the name of an image are not followed, because that would take a system call for each of them.
        follow = entry.is_symlink() and os.path.splitext(entry.name)[1].lower() not in SUFFIXES
        return entry.is_dir(follow_symlinks=follow)
    except OSError:  # a symbolic link to itself
        return False


class ImagePlaces(NamedTuple):
    """Where the images of a file of captions may be."""

    roots: list[Path]
    above: Path | None = None  # may also contain other data sets

    @classmethod
    def of(cls, path: Path, source: Path) -> ImagePlaces:
        """Those of the caption file `source` of the data set at `path`: its folder, then that of the data set, and
        nothing outside it. If `path` is the caption file itself, the data set may begin one level up."""
        if path.is_dir():
            roots = list(dict.fromkeys([source.parent, path]))
            return cls(roots[::-1] if source.parent.name == "annotations" else roots)
        if source.parent.name == "annotations":
            return cls([source.parent.parent, source.parent])
        return cls([source.parent], source.parent.parent)


def find_files(files: Mapping[str, str], where: ImagePlaces, folders: Folders) -> tuple[Path, dict[str, str]]:
    """Where the images are: the folder with the most of them, or the best guess, and the paths of those that exist.

    `files` has the name of each image's file, perhaps with folders. In each root, the files are looked for in the
    folders that are named after images (Images, Flicker8k_Dataset, flickr30k-images, ...), in such folders in those and
    in the root itself; then in any folder at most two levels below. The search ends with the first of these steps that
    finds half of the files; if none does, the one with the most counts. Above the roots only folders that are named
    after images count, with at least half of the files: other data sets may have images with the same names. Names that
    are not found are read with / for \\, and if few are found, all names without their folders, unless several files
    would have the same name.
    """
    slashes = {image: name.replace("\\", "/") for image, name in files.items()}
    bare = {image: os.path.basename(name) for image, name in slashes.items()}
    spellings = [dict(files)]
    if slashes != spellings[-1]:
        spellings.append(slashes)
    if bare != spellings[-1] and len(set(bare.values())) == len(set(slashes.values())):
        spellings.append(bare)
    steps = [(root, places) for root in where.roots for places in (image_folders, folders_below)]
    if where.above is not None:
        steps.append((where.above, image_folders))
    folder, found = image_folders(where.roots[0], folders)[0], {}
    for spelling, (root, places) in product(spellings, steps):
        here, new = _find_files(spelling, places(root, folders), folders)
        enough = len(new) >= len(files) / 2
        if enough or (len(new) > len(found) and root != where.above):
            folder, found = here, new
        if enough:
            break
    if rest := {image: name for image, name in slashes.items() if image not in found and name != files[image]}:
        found = found | find_files(rest, where, folders)[1]
    return folder, found


def _find_files(names: Mapping[str, str], candidates: Sequence[Path], folders: Folders) -> tuple[Path, dict[str, str]]:
    """The candidate with most of the files, and the paths of the files in it and in candidates with only new ones."""
    split = {image: os.path.split(name) for image, name in names.items()}
    tails: dict[str, list[str]] = {}
    for head, tail in split.values():
        tails.setdefault(head, []).append(tail)
    wanted = {head: Names(group) for head, group in tails.items()}

    def count(folder: Path) -> int:
        places = [(folders.find(folder, head), group) for head, group in wanted.items()]
        return sum(folders.names(place).count(group) for place, group in places if place is not None)

    counts = {folder: count(folder) for folder in candidates}
    ranked = sorted(counts, key=counts.__getitem__, reverse=True)
    found: dict[str, str] = {}
    for folder in filter(counts.get, ranked):
        inside = {head: folders.find(folder, head) for head in wanted}
        new: dict[str, str] = {}
        for image, (head, tail) in split.items():
            place = None if image in found else inside[head]
            if place is not None and (actual := folders.names(place).find(tail)) is not None:
                new[image] = os.path.join(place, actual)
        if folder is ranked[0] or len(new) >= counts[folder]:
            found |= new
    return ranked[0], found


def image_folders(root: Path, folders: Folders) -> list[Path]:
    """The folders in a folder that are named after images, such folders in those, and the folder itself."""
    inside = _named_after_images(folders.subfolders(root))
    nested = [inner for folder in inside for inner in _named_after_images(folders.subfolders(folder))]
    return [*inside, *nested, root]


def _named_after_images(folders: Iterable[Path]) -> list[Path]:
    return [folder for folder in folders if re.search("image|dataset", folder.name, re.IGNORECASE)]


def folders_below(root: Path, folders: Folders) -> list[Path]:
    """A folder and its subfolders, two levels deep; at most MAX_FOLDERS of them."""
    inside = folders.subfolders(root)
    nested = (inner for folder in inside for inner in folders.subfolders(folder))
    return list(islice(chain([root], inside, nested), MAX_FOLDERS))
