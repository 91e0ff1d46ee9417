"""Images from files and from memory, read by Pillow alone: torchvision's own decoder can crash the process on a bad
PNG."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, PLANAR_CONFIGURATION, SAMPLEFORMAT

from attncap.data.image_limits import MAX_IMAGE_FILE, MAX_PIXELS, LimitError, check_image, limited_file
from attncap.errors import CallError, UserError
from attncap.files import open_regular

# An allow-list: some of Pillow's other readers start programs or are hardly ever tested.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")

# How an image is turned upright, by its EXIF orientation.
EXIF_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# The transparent colour of a PNG has the bit depth of the file, whereas Pillow decodes the pixels to 8 bits.
PNG_TRANSPARENCY = {
    "L;2": lambda grey: grey * 85,
    "L;4": lambda grey: grey * 17,
    "RGB;16B": lambda colour: tuple(value >> 8 for value in colour),
}

# Bits and SampleFormat of grey TIFF images that are not simply 8 bits.
TIFF_SAMPLES = {
    (8, 2): np.int8,
    (12, 1): np.uint16,
    (16, 1): np.uint16,
    (16, 2): np.int16,
    (32, 1): np.uint32,
    (32, 2): np.int32,
    (32, 3): np.float32,
}


class ImageError(UserError):
    """An image cannot be read. `name` says which one, `reason` why."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def open_image(source: str | os.PathLike | bytes | BinaryIO | Image.Image | np.ndarray) -> Image.Image:
    """A new image in RGB, 8 bits per channel, turned upright according to its EXIF orientation.

    `source` is the path of an image file, its bytes, a binary file object, a Pillow image, or an array, uint8 [H,W,3]
    (RGB), [H,W,4] (RGBA) or [H,W] (grey). For an animation, the first frame is used. Broken EXIF data, colour profiles
    and gamma are ignored. `to_rgb` describes the conversion.

    Raises ImageError, with the file and the reason on one line, when the file is missing, empty, cut short, not an
    image, not a regular file, or beyond the limits in `attncap.data.image_limits` or Pillow's MAX_IMAGE_PIXELS (Pillow
    images and arrays may have any size); raises CallError for anything else that is passed as an image.

    Several threads may call this at once, because it changes no global state. For the same reason it does not silence
    Pillow's warnings about odd metadata, or what libtiff, a C library, prints about broken TIFF files.
    """
    name = check_source(source)
    if isinstance(source, np.ndarray):
        return to_rgb(Image.fromarray(source))
    try:
        if isinstance(source, Image.Image):
            return _upright_rgb(source)
        data = _read(source)
        with Image.open(limited_file(data), formats=FORMATS) as image:
            check_image(image, data)
            return _upright_rgb(image)
    except UnidentifiedImageError as error:
        empty = isinstance(source, str | os.PathLike) and os.path.getsize(source) == 0
        raise ImageError(name, "the file is empty" if empty else f"not an image ({', '.join(FORMATS)})") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # the latter if warnings are errors
        most = min(MAX_PIXELS, Image.MAX_IMAGE_PIXELS or MAX_PIXELS)
        raise ImageError(name, f"more than {most:,} pixels; make the image smaller") from error
    except LimitError as error:
        raise ImageError(name, str(error)) from error
    except Exception as error:  # on a broken file Pillow's readers raise nearly anything
        message = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ImageError(name, f"cannot be read: {' '.join(message.split())}") from error


def _read(source: str | os.PathLike | bytes | BinaryIO) -> bytes:
    """The bytes of an image file, all at once: the file may be growing, or be cut short while Pillow maps it."""
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
    elif isinstance(source, str | os.PathLike):
        with open_regular(source) as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(min(size, MAX_IMAGE_FILE) + 1)
    else:
        with contextlib.suppress(AttributeError, OSError):  # a stream that cannot seek
            source.seek(0)
        pieces, left = [], MAX_IMAGE_FILE + 1
        while left and (piece := source.read(left)):
            pieces.append(piece)
            left -= len(piece)
        data = b"".join(pieces)
    if len(data) > MAX_IMAGE_FILE:
        raise LimitError(f"larger than {MAX_IMAGE_FILE // 2**20} MiB; make the image smaller")
    return data


def _upright_rgb(image: Image.Image) -> Image.Image:
    if 0 in image.size:
        raise ValueError("it has no pixels")
    tile = getattr(image, "tile", [])  # of a file that Pillow has not decoded yet
    encoding = tile[0][3] if tile and image.format == "PNG" else None
    try:
        image.load()
    except Exception:
        if tile:
            image.tile = tile  # otherwise Pillow could take a half-decoded image for a whole one the next time
        raise
    try:
        turn = EXIF_TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # EXIF may contain anything
        turn = None
    # Pillow's exif_transpose also writes the EXIF data again, which can fail or take long.
    upright = image.copy() if turn is None else image.transpose(turn)
    if encoding in PNG_TRANSPARENCY and "transparency" in upright.info:
        upright.info["transparency"] = PNG_TRANSPARENCY[encoding](upright.info["transparency"])
    if image.format == "PPM" and image.mode == "I":  # Pillow has scaled it to 16 bits
        upright = _grey(np.asarray(upright), 0, 65535)
    if image.format == "TIFF":
        upright = _tiff_grey(upright, image.tag_v2, image.info.get("compression") != "raw")
    return to_rgb(upright)


def _tiff_grey(image: Image.Image, fields: Mapping, compressed: bool) -> Image.Image:
    """A grey TIFF image with the values that the file stores; any other image unchanged. Pillow reads unsigned 32-bit
    integers as signed and signed 8-bit ones as unsigned, does not invert images of more than 8 bits, and swaps the
    bytes of compressed big-endian images twice."""
    bits, kind = fields.get(BITSPERSAMPLE, (1,))[0], fields.get(SAMPLEFORMAT, (1,))[0]
    stored = TIFF_SAMPLES.get((bits, kind))
    if stored is None or image.mode not in ("L", "I", "F", "I;16", "I;16B"):
        if fields.get(PLANAR_CONFIGURATION) == 2 and (image.mode == "LA" if compressed else bits == 16):
            raise ValueError("Pillow cannot read this kind of TIFF in separate planes; save it as PNG")
        return image
    values = np.asarray(image).astype(stored, copy=False)
    if fields.prefix == b"MM" and compressed and image.mode in ("I", "F"):
        values = values.byteswap()
    has_white = kind == 1 and bits <= 16
    grey = _grey(values, 0, 2**bits - 1) if has_white else _grey(values)
    return ImageOps.invert(grey) if fields.get(PHOTOMETRIC_INTERPRETATION) == 0 else grey


def check_source(source: object) -> str:
    """The name of the image in error messages. Raises CallError for anything that `open_image` does not take."""
    if isinstance(source, np.ndarray):
        found = f"{str(source.dtype)[:60]} {list(source.shape)}"
        is_image = source.ndim == 2 or (source.ndim == 3 and source.shape[2] in (3, 4))
        if not is_image or source.dtype != np.uint8 or source.size == 0:
            expected = "uint8 [H, W, 3] (RGB), [H, W, 4] (RGBA) or [H, W] (grey)"
            raise CallError(f"image of {found}: an array must be {expected}")
        return f"image of {found}"
    if isinstance(source, str | os.PathLike):
        return str(source)
    if isinstance(source, bytes | bytearray | memoryview):
        return f"image of {len(source):,} bytes"
    if isinstance(source, Image.Image):
        return getattr(source, "filename", "") or f"image of {source.width} x {source.height} pixels"
    if hasattr(source, "read"):
        name = getattr(source, "name", None)
        name = name if isinstance(name, str) else f"image in a {type(source).__name__}"
        if isinstance(source, io.TextIOBase):
            raise CallError(f"{name}: an image file must be opened in binary mode")
        return name
    expected = "a path, bytes, a binary file object, a Pillow image or a NumPy array"
    raise CallError(f"image of type {type(source).__name__}: must be {expected}")


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image in any of Pillow's modes to RGB. An RGB image is returned as it is, not copied.

    16-bit values are divided by 257 (65535 becomes 255), whereas Pillow would clip them. No value of 32-bit integers,
    signed integers or floats is white by convention, so the range of each image is scaled to 0 to 255. Transparent
    pixels become white: drawings with a transparent background are made for white pages, and the stored colour of
    those pixels is arbitrary, mostly black.
    """
    transparent = image.info.get("transparency")
    if image.mode.startswith("I;16"):
        values = np.asarray(image)
        image = _grey(values, 0, 65535)
        if isinstance(transparent, int):
            image.paste(255, mask=Image.fromarray(values == transparent))
    elif image.mode in ("I", "F"):
        image = _grey(np.asarray(image))
    if image.mode == "La":
        image = image.convert("LA")  # the only conversion that Pillow has for it
    if image.has_transparency_data:
        image = image.convert("RGBA")
        page = Image.new("RGB", image.size, "white")
        page.paste(image, mask=image)
        return page
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey(values: np.ndarray, black: float | None = None, white: float | None = None) -> Image.Image:
    """Numbers [H,W] as an image with 8 bits; `black` and `white` are by default the smallest and largest of them."""

    def rows(start: int) -> np.ndarray:  # a few at a time, because the image may be large
        return np.nan_to_num(values[start : start + 64].astype(np.float64), copy=False, posinf=0, neginf=0)

    starts = range(0, len(values), 64)
    black = min(rows(start).min() for start in starts) if black is None else black
    white = max(rows(start).max() for start in starts) if white is None else white
    grey = np.empty(values.shape, np.uint8)
    for start in starts:
        grey[start : start + 64] = np.rint((rows(start) - black) * 255 / ((white - black) or 1))
    return Image.fromarray(grey)
