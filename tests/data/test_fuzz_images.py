"""Whatever an image file contains, reading it gives an image or one clear line, within 5 seconds and 1 GiB.

ATTNCAP_FUZZ=2000 tries more files than the default.
"""

import io
import json
import os
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from attncap.data.images import ImageError, open_image

BATCH = 100
COUNT = int(os.environ.get("ATTNCAP_FUZZ", 500))
SECONDS, MIB = 5, 1024

EXTREMES = [b"\0", b"\1", b"\x7f", b"\x80", b"\xff", b"\0\0", b"\xff\xff", b"\x7f\xff", b"\xff\x7f"]
EXTREMES += [
    b"\0\0\0\0",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    b"\0\0\xff\xff",
    b"\xff\xff\0\0",
]
PIECES = [
    b"\xff\xda",
    b"\xff\xd8",
    b"\xff\xd9",
    b"\xff\xe1\0\x10Exif\0\0II*\0",
    b"\xff\xc4\0\x02",
    b"\xff\xc2",
    b"\xff\xdd",
]
PIECES += [b"\0\0\0\0IDAT", b"\0\0\0\0IEND", b"\0\0\0\6tRNS", b"\0\0\0\x10iCCP", b"\0\0\0\x10zTXt", b"\0\0\0\x1afcTL"]
PIECES += [b"!\xf9\4", b"!\xfe", b",\0\0\0\0", b"VP8X", b"ANMF", b"ALPH", b"#", b"\n", b" 999999999 ", b"-1", b"P7\n"]


def samples() -> list[bytes]:
    """Small images in every format, mode and compression."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (20, 24, 4), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = [("jpeg", mode, {"exif": exif, "progressive": p}) for mode in ("L", "RGB", "CMYK") for p in (False, True)]
    kinds += [("png", mode, {"exif": exif}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")]
    kinds += [
        ("png", "P", {"transparency": 3, "bits": 4}),
        ("png", "RGBA", {"save_all": True, "append_images": [image] * 2}),
    ]
    kinds += [("gif", "P", {"transparency": 3}), ("gif", "P", {"save_all": True, "append_images": [image] * 2})]
    kinds += [("bmp", mode, {}) for mode in ("1", "L", "P", "RGB", "RGBA")]
    kinds += [("webp", "RGB", {"exif": exif}), ("webp", "RGBA", {"lossless": True})]
    kinds += [("webp", "RGBA", {"save_all": True, "append_images": [image] * 2})]
    kinds += [
        ("tiff", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "F", "I;16")
    ]
    compressions = ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "lzma", "zstd")
    kinds += [("tiff", "RGB", {"compression": name}) for name in compressions]
    kinds += [("tiff", "1", {"compression": name}) for name in ("group3", "group4")]
    kinds += [("ppm", mode, {}) for mode in ("1", "L", "RGB", "I", "F")]
    found = [b"P2 3 2 999\n1 2 3\n4 5 6\n", b"P3 1 1 7 # grey\n1 2 3\n", b"P1 3 1 101", b"P5 2 1 999\n\1\2\3\4"]
    for kind, mode, options in kinds:
        buffer = io.BytesIO()
        grey = mode in ("I", "F", "I;16")
        (image.convert("L") if grey else image if mode == "RGBA" else image.convert("RGB")).convert(mode).save(
            buffer, kind, **options
        )
        found.append(buffer.getvalue())
    return found


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    for _ in range(rng.integers(1, 3)):
        # Half of the damage is to the first bytes, where most formats describe the image.
        at = int(rng.integers(len(content) if rng.random() < 0.5 else min(len(content), 80)))
        way = rng.integers(6)
        if way == 0:
            content = content[:at] + rng.bytes(1) + content[at + 1 :]
        elif way == 1:
            content = content[: max(at, 8)]
        elif way == 2:
            piece = PIECES[rng.integers(len(PIECES))] * int(rng.choice([1, 1, 1000]))
            content = content[:at] + piece + content[at:]
        elif way == 3:
            value = EXTREMES[rng.integers(len(EXTREMES))]
            content = content[:at] + value + content[at + len(value) :]
        elif way == 4:
            start = int(rng.integers(len(content)))
            content = content[:at] + content[start : start + 200] * int(rng.choice([1, 1, 500])) + content[at:]
        else:
            stop = at + int(rng.integers(1, 20))
            content = content[:at] + content[stop:]
        content = content or b"P"
    return content


def run(seed: int, count: int) -> dict:
    """Read `count` damaged images; figures of the whole batch."""
    warnings.simplefilter("ignore")  # Pillow's, about metadata
    rng = np.random.default_rng(seed)
    originals, errors, slowest = samples(), 0, 0.0
    for _ in range(count):
        content = damaged(originals[rng.integers(len(originals))], rng)
        start = time.process_time()
        try:
            image = open_image(content)
            assert image.mode == "RGB" and 0 not in image.size
        except ImageError as error:
            errors += 1
            message = str(error)
            assert message.startswith(f"image of {len(content):,} bytes: ") and len(message.splitlines()) == 1
            assert len(message) < 500
        slowest = max(slowest, time.process_time() - start)
    # Of this process alone: ru_maxrss would begin with the memory of the process that started it.
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return {"errors": errors, "slowest": slowest, "memory": int(peak[1]) / 1024}


def test_the_samples_themselves_are_read():
    for content in samples():
        assert open_image(content).mode == "RGB"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(COUNT // BATCH))
def test_damaged_images(seed):
    """In a process of its own, which a crash would end."""
    ended = subprocess.run([sys.executable, __file__, str(seed), str(BATCH)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    figures = json.loads(ended.stdout)
    print(figures)
    assert figures["errors"] > 0
    assert figures["slowest"] < SECONDS and figures["memory"] < MIB


if __name__ == "__main__":
    print(json.dumps(run(int(sys.argv[1]), int(sys.argv[2]))))
