"""What an image may cost: a file of a few kilobytes can make Pillow's readers use minutes and gigabytes.

With these limits, reading a file takes less than 5 seconds and 1 GiB of memory (measured on one core of a server CPU).
They are checked before anything is decoded, and are far above what cameras and common programs write.
"""

from __future__ import annotations

import io
import re

from PIL import Image
from PIL.TiffImagePlugin import ROWSPERSTRIP, TILELENGTH, TILEWIDTH, ImageFileDirectory_v1

MAX_IMAGE_FILE = 200 * 2**20  # bytes
MAX_PIXELS = 70_000_000  # of 8 bits in grey, palette or RGB; half as many in other modes: A4 at 600 dpi
MAX_PYTHON_PIXELS = 2**21  # where Pillow's decoder is a loop in Python
MAX_SIDE = 65_535  # as in JPEG; Pillow needs memory for each row, however short
MAX_SCANNED = 2**30  # pixels of all scans of a JPEG together: 15 scans of the largest, 44 of one with 24 megapixels
MAX_READS = 2_200_000  # pieces in which Pillow reads the file: some of its parsers read single bytes
MAX_METADATA = 200  # pieces of compressed text, colour profiles, EXIF, or comments
MAX_TIFF_FIELD = 2**19  # bytes of numbers in one field, such as the offsets of the tiles

PYTHON_DECODERS = ("bmp_rle", "ppm", "ppm_plain")
# A marker is FF and another byte, except that 00 (a stuffed FF) and D0 to D7 (restarts) belong to the data of a scan.
JPEG_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")
SCAN, END = b"\xda", b"\xd9"


class LimitError(ValueError):
    """An image costs too much. Not an OSError, which Pillow's parsers take for the end of a file."""


class LimitedFile(io.BytesIO):
    """The bytes of an image file, which can be read in at most MAX_READS pieces."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        if self.reads > MAX_READS:
            raise LimitError("it consists of too many small pieces")
        return io.BytesIO.read(self, size)


def limited_file(data: bytes) -> io.BytesIO:
    """The bytes of an image file, for Pillow to open. Raises LimitError for metadata that takes long to parse."""
    if len(data) < 2**17:  # too small to take long
        return io.BytesIO(data)
    if data.startswith(b"\xff\xd8"):
        pieces = data.count(b"Exif\0\0")
    elif data.startswith(b"\x89PNG"):
        pieces = sum(map(data.count, (b"iCCP", b"zTXt", b"iTXt")))
    elif data.startswith((b"P1", b"P2", b"P3")):
        pieces = data.count(b"#")
    else:
        pieces = 0
    if pieces > MAX_METADATA:
        raise LimitError("it has too many pieces of metadata")
    file = LimitedFile(data)
    if data.startswith((b"II", b"MM")):
        fields = ImageFileDirectory_v1(data[: 16 if data[2] == 43 else 8])
        file.seek(fields.next)
        fields.load(file)
        for tag, value in fields.tagdata.items():
            of_bytes = fields.tagtype[tag] in (1, 2, 6, 7)
            is_text = of_bytes and (tag > 532 or tag == 270)  # or a colour profile, a preview
            if len(value) > MAX_TIFF_FIELD and not is_text:
                raise LimitError(f"its TIFF field {tag} has too many values")
    return file


def check_image(image: Image.Image, data: bytes) -> None:
    """Check an opened image that is not decoded yet. Raises LimitError."""
    pixels = image.width * image.height
    tiles = [tile[:2] for tile in getattr(image, "tile", ())]
    most = MAX_PIXELS
    jpeg_in_tiff = image.info.get("compression") in ("jpeg", "tiff_jpeg")
    plain = image.mode in ("1", "L", "P", "RGB") and not image.has_transparency_data
    if image.format == "WEBP" or jpeg_in_tiff or not plain:
        most //= 2
    if any(decoder in PYTHON_DECODERS for decoder, _ in tiles):
        most = MAX_PYTHON_PIXELS
    # Pillow itself only warns above its limit, and refuses an image only if it is twice as large.
    most = min(most, Image.MAX_IMAGE_PIXELS or most)
    if pixels > most:
        raise LimitError(f"more than {most:,} pixels; make the image smaller")
    fields = getattr(image, "tag_v2", {})  # of TIFF
    if max(*image.size, fields.get(TILEWIDTH, 0), fields.get(TILELENGTH, 0)) > MAX_SIDE:
        raise LimitError(f"more than {MAX_SIDE:,} pixels wide or high; make the image smaller")
    covered = sum((right - left) * (lower - upper) for _, (left, upper, right, lower) in tiles)
    if covered > pixels * len(image.getbands()):
        raise LimitError("its TIFF strips or tiles overlap")
    if image.format in ("JPEG", "MPO"):
        scans = MAX_SCANNED // pixels
        # In a JPEG that is not progressive, a scan has some bits for each block, so many scans need a large file.
        may_have_many = image.info.get("progressive") or len(data) > 2**25
        if may_have_many and data.count(b"\xff" + SCAN) > scans and jpeg_scans(data) > scans:
            raise LimitError(f"more than {scans} JPEG scans of {pixels:,} pixels; save it as an ordinary JPEG")
    if jpeg_in_tiff:
        strip = image.width * min(image.height, fields.get(ROWSPERSTRIP, image.height))
        part = fields[TILEWIDTH] * fields[TILELENGTH] if TILEWIDTH in fields else strip
        if data.count(b"\xff" + SCAN) * part > MAX_SCANNED:
            raise LimitError("too many JPEG scans; save it as an ordinary JPEG")


def jpeg_scans(data: bytes) -> int:
    """The number of scans of the first image in a JPEG file."""
    scans, position = 0, 2
    while (marker := JPEG_MARKER.search(data, position)) and marker[1] != END:
        scans += marker[1] == SCAN
        position = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return scans
