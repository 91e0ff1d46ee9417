"""Image files, read by Pillow alone: torchvision's own decoder can crash the process on a bad PNG."""

from __future__ import annotations

import errno
import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from attncap.errors import CallError, UserError

# An allow-list: some of Pillow's other readers start programs or are hardly ever tested.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
SUFFIXES = frozenset(".jpg .jpeg .jpe .jfif .png .gif .bmp .webp .tif .tiff .ppm .pgm .pbm .pnm".split())


def load_image(path: str | Path) -> Image.Image:
    """Read an image file as RGB, 8 bits a channel, turned upright as its EXIF orientation tells.

    Of an animation the first frame. Raises UserError, one line with the file and the reason, when
    the file is missing, empty, cut short, no image, or larger than Pillow's MAX_IMAGE_PIXELS.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                return upright_rgb(image)
    except UnidentifiedImageError as error:
        empty = os.path.getsize(path) == 0
        reason = "the file is empty" if empty else f"not an image ({', '.join(FORMATS)})"
        raise UserError(f"{path}: {reason}") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        limit = f"{Image.MAX_IMAGE_PIXELS:,}"
        raise UserError(f"{path}: more than {limit} pixels; make the image smaller") from error
    except Exception as error:  # on a broken file Pillow's readers raise nearly anything
        message = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"{path}: cannot be read: {' '.join(message.split())}") from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """An image as it should be seen: turned as its EXIF orientation tells, in RGB."""
    return to_rgb(ImageOps.exif_transpose(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn an image of any of Pillow's modes into RGB.

    16-bit values are divided by 257 (65535 becomes 255), where Pillow would clip them. 32-bit
    integers and floats have no agreed white, so their own range becomes 0 to 255. What is
    transparent becomes white: drawings with a transparent ground are made for white pages, and the
    colour hidden under it is arbitrary, mostly black.
    """
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.float32)
        return Image.fromarray((values / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        values = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0, neginf=0)
        low, high = values.min(), values.max()
        values = (values - low) * 255 / ((high - low) or 1)
        return Image.fromarray(values.round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """Files as they are given; for a folder, the images in it and its subfolders, sorted.

    In folders, images are known by their suffix, in upper or lower case. Raises CallError for a
    path that does not exist and UserError for a folder that may not be read.
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


def find_image_folder(names: Iterable[str], tops: Iterable[Path]) -> Path:
    """The folder that holds most of the files `names` (which may name subfolders), in the first of `tops` where there
    are any.

    In a top are looked at: it, the folders in it that are named after images (Images, Flicker8k_Dataset,
    flickr30k-images, ...), and such folders in those. With no file anywhere it is the first folder looked at.
    """
    tails: dict[str, set[str]] = {}
    for name in names:
        head, tail = os.path.split(name)
        tails.setdefault(head, set()).add(tail)

    def count(folder: Path) -> int:
        return sum(len(files & file_names(folder / head)) for head, files in tails.items())

    bests = []
    for top in tops:
        inside = _image_folders(top)
        nested = [inner for folder in inside for inner in _image_folders(folder)]
        bests.append(max([*inside, *nested, top], key=count))
        if count(bests[-1]):
            return bests[-1]
    return bests[0]


def tops_of(path: Path, source: Path) -> list[Path]:
    """Where to look for the images of a file in the data set `path`: beside it, then in the data set's folder (never
    outside of it), which for a path that is the file itself may be the folder above."""
    return [source.parent, path if path.is_dir() else source.parent.parent]


def _image_folders(top: Path) -> list[Path]:
    return [folder for folder in subfolders(top) if re.search("image|dataset", folder.name, re.IGNORECASE)]


def subfolders(folder: Path) -> list[Path]:
    """Sorted; none in a folder that may not be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted(folder / entry.name for entry in entries if _is_folder(entry))
    except OSError:
        return []


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def file_names(folder: Path) -> set[str]:
    """All that stands in a folder, {} when there can be no such folder. Raises OSError when it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries}
    except ValueError:  # no name of a file has a NUL in it
        return set()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP):
            return set()
        raise
