"""Images from files and from memory, read by Pillow alone: torchvision's own decoder can crash the process on a bad
PNG."""

from __future__ import annotations

import io
import os
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from attncap.errors import CallError, UserError

# An allow-list: some of Pillow's other readers start programs or are hardly ever tested.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")


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
    (RGB), [H,W,4] (RGBA) or [H,W] (grey). For an animation, the first frame is used.

    Raises ImageError, with the file and the reason on one line, when the file is missing, empty, cut short, not an
    image, or larger than Pillow's MAX_IMAGE_PIXELS; raises CallError for anything else that is passed as an image.

    Several threads may call this at once, because it changes no global state. For the same reason it does not silence
    Pillow's warnings about odd metadata.
    """
    name = check_source(source)
    if isinstance(source, np.ndarray):
        return to_rgb(Image.fromarray(source))
    try:
        if isinstance(source, Image.Image):
            return _upright_rgb(source)
        file = io.BytesIO(source) if isinstance(source, bytes | bytearray | memoryview) else source
        with Image.open(file, formats=FORMATS) as image:
            # Pillow itself only warns above its limit, and refuses an image only if it is twice as large.
            if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError
            return _upright_rgb(image)
    except UnidentifiedImageError as error:
        empty = isinstance(source, str | os.PathLike) and os.path.getsize(source) == 0
        raise ImageError(name, "the file is empty" if empty else f"not an image ({', '.join(FORMATS)})") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # the latter if warnings are errors
        raise ImageError(name, f"more than {Image.MAX_IMAGE_PIXELS:,} pixels; make the image smaller") from error
    except Exception as error:  # on a broken file Pillow's readers raise nearly anything
        message = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ImageError(name, f"cannot be read: {' '.join(message.split())}") from error


def _upright_rgb(image: Image.Image) -> Image.Image:
    if 0 in image.size:
        raise ValueError("it has no pixels")
    return to_rgb(ImageOps.exif_transpose(image))


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
    """Convert an image in any of Pillow's modes to RGB.

    16-bit values are divided by 257 (65535 becomes 255), whereas Pillow would clip them. 32-bit integers and floats
    have no agreed white, so their own range becomes 0 to 255. Transparent pixels become white: drawings with a
    transparent background are made for white pages, and the colour of those pixels is arbitrary, mostly black.
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
