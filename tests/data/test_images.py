import io
import json
import os
import pickle
import socket
import struct
import sys
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from attncap.data import image_limits, images
from attncap.data.image_folders import find_images
from attncap.data.images import ImageError, open_image, to_rgb
from attncap.data.readers import coco
from attncap.errors import CallError, UserError

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin"),  # about metadata
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
]

RED, WHITE, BLUE = (255, 0, 0), (255, 255, 255), (0, 0, 255)


def saved(image, path, **options):
    image.save(path, **options)
    return open_image(path)


def failure(path):
    with pytest.raises(ImageError) as caught:
        open_image(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    # By EXIF 2.3: where the first row and the first column of the stored image are displayed.
    stored = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.T,
        6: stored[::-1].T,
        7: stored[::-1, ::-1].T,
        8: stored[:, ::-1].T,
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = saved(Image.fromarray(stored), tmp_path / "a.png", exif=exif)
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.array(image)[..., 0], upright[orientation])


def test_every_mode_of_a_png(tmp_path):
    path = tmp_path / "a.png"
    assert saved(Image.new("1", (1, 1), 1), path).getpixel((0, 0)) == WHITE
    assert saved(Image.new("L", (1, 1), 77), path).getpixel((0, 0)) == (77, 77, 77)
    assert saved(Image.new("RGB", (1, 1), RED), path).getpixel((0, 0)) == RED
    assert saved(Image.new("P", (1, 1), "red"), path).getpixel((0, 0)) == RED
    assert saved(Image.new("LA", (1, 1), (0, 0)), path).getpixel((0, 0)) == WHITE
    assert saved(Image.new("RGBA", (1, 1), (255, 0, 0, 0)), path).getpixel((0, 0)) == WHITE
    half = saved(Image.new("RGBA", (1, 1), (0, 0, 255, 127)), path).getpixel((0, 0))
    assert half == (128, 128, 255)


def test_transparent_colour_of_a_palette_becomes_white(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.putpixel((1, 0), 1)
    read = saved(image, tmp_path / "a.png", transparency=0)
    assert [read.getpixel((x, 0)) for x in range(2)] == [WHITE, RED]
    read = saved(image, tmp_path / "a.gif", transparency=0)
    assert [read.getpixel((x, 0)) for x in range(2)] == [WHITE, RED]


def test_transparent_colour_of_rgb_and_grey_becomes_white(tmp_path):
    assert saved(Image.new("RGB", (1, 1), RED), tmp_path / "a.png", transparency=RED).getpixel((0, 0)) == WHITE
    assert saved(Image.new("L", (1, 1), 9), tmp_path / "a.png", transparency=9).getpixel((0, 0)) == WHITE


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled(tmp_path, suffix):
    values = np.array([[0, 257, 256 * 100, 65535]], dtype=np.uint16)
    image = saved(Image.fromarray(values), tmp_path / f"a.{suffix}")
    assert np.array(image)[0].tolist() == [[v] * 3 for v in (0, 1, 100, 255)]


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_integers_and_floats_fill_their_range(tmp_path, dtype):
    image = saved(Image.fromarray(np.array([[-100, 0, 100]], dtype=dtype)), tmp_path / "a.tif")
    assert np.array(image)[0, :, 1].tolist() == [0, 128, 255]
    flat = saved(Image.fromarray(np.full((1, 1), 7, dtype=dtype)), tmp_path / "b.tif")
    assert flat.getpixel((0, 0)) == (0, 0, 0)


def test_integers_and_floats_of_many_rows():
    values = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32) * 1e30
    low, high = values.astype(float).min(), values.astype(float).max()
    expected = np.rint((values.astype(float) - low) * 255 / (high - low))
    assert (np.array(to_rgb(Image.fromarray(values)))[..., 0] == expected).all()


def test_floats_that_are_not_finite():
    values = np.array([[np.nan, 0, 2, np.inf]], dtype=np.float32)
    assert np.array(to_rgb(Image.fromarray(values)))[0, :, 0].tolist() == [0, 0, 255, 0]


def test_cmyk_jpeg(tmp_path):
    image = saved(Image.new("CMYK", (16, 16), (255, 255, 0, 0)), tmp_path / "a.jpg", quality=100)
    np.testing.assert_allclose(image.getpixel((8, 8)), BLUE, atol=3)


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "bmp", "webp", "tif", "ppm"])
def test_formats(tmp_path, suffix):
    image = saved(Image.new("RGB", (5, 4), BLUE), tmp_path / f"a.{suffix}")
    assert (image.mode, image.size) == ("RGB", (5, 4))
    np.testing.assert_allclose(image.getpixel((2, 2)), BLUE, atol=3)


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (3, 3), color) for color in (RED, BLUE)]
    assert saved(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:]).getpixel((1, 1)) == RED


def test_two_photographs_in_one_jpeg(tmp_path):  # as some phones and 3-D cameras write them
    frames = [Image.new("RGB", (16, 16), color) for color in (RED, BLUE)]
    image = saved(frames[0], tmp_path / "a.jpg", format="MPO", save_all=True, append_images=frames[1:])
    np.testing.assert_allclose(image.getpixel((8, 8)), RED, atol=3)


def test_a_single_pixel(tmp_path):
    assert saved(Image.new("RGB", (1, 1)), tmp_path / "a.jpg").size == (1, 1)


def test_files_that_are_not_images(tmp_path):
    formats = "not an image (JPEG, PNG, GIF, BMP, WEBP, TIFF, PPM)"
    assert failure(tmp_path / "missing.jpg") == "cannot be read: No such file or directory"
    assert failure(tmp_path) == "cannot be read: Is a directory"
    (tmp_path / "empty.jpg").touch()
    assert failure(tmp_path / "empty.jpg") == "the file is empty"
    (tmp_path / "text.jpg").write_text("A dog runs.\n" * 50)
    assert failure(tmp_path / "text.jpg") == formats
    (tmp_path / "drawing.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    assert failure(tmp_path / "drawing.eps") == formats


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "bmp", "webp", "tif", "ppm"])
def test_truncated_files(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, {"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix))
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    assert failure(path)


def test_random_damage_is_an_error_or_an_image(tmp_path):
    rng = np.random.default_rng(1)
    path = tmp_path / "a"
    image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    for kind in ("jpeg", "png", "gif", "bmp", "webp", "tiff", "ppm"):
        buffer = io.BytesIO()
        image.save(buffer, kind)
        for _ in range(40):
            damaged = np.frombuffer(buffer.getvalue(), dtype=np.uint8).copy()
            damaged[rng.integers(0, len(damaged), 5)] = rng.integers(0, 256, 5)
            path.write_bytes(damaged.tobytes())
            try:
                assert open_image(path).mode == "RGB"
            except UserError as error:
                assert str(error).startswith(f"{path}: ") and "\n" not in str(error)


@pytest.mark.parametrize("pixels", [101, 300])  # above Pillow's warning, and above its error at the double
def test_decompression_bomb(tmp_path, monkeypatch, pixels):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("L", (pixels, 1)).save(tmp_path / "a.png")
    assert failure(tmp_path / "a.png") == "more than 100 pixels; make the image smaller"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert failure(tmp_path / "a.png") == "more than 100 pixels; make the image smaller"


def test_a_limit_that_was_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert saved(Image.new("L", (300, 1)), tmp_path / "a.png").size == (300, 1)


# Depths and kinds of pixels, in files made by hand: the expected values follow from the definitions of the formats.


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(size, bits, color_type, rows, *chunks):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, bits, color_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(values, bits, kind=1, white_is_zero=False, order="<", compressed=False, **fields):
    """A grey TIFF of an array [H,W] in one strip; `fields` of 32-bit integers, t278=1, are added or replaced."""
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    data = zlib.compress(data) if compressed else data
    height, width = values.shape
    found = {256: width, 257: height, 258: bits, 259: 8 if compressed else 1, 262: int(not white_is_zero), 273: 8}
    found |= {277: 1, 278: height, 279: len(data), 339: kind} | {int(name[1:]): value for name, value in fields.items()}
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8 + len(data))
    entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in sorted(found.items()))
    return head + data + struct.pack(order + "H", len(found)) + entries + bytes(4)


def greys(content):
    image = np.asarray(open_image(content))
    assert (image == image[..., :1]).all()
    return image[..., 0].ravel().tolist()


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_grey_png_of_every_depth(bits):
    white = 2**bits - 1
    rows = b"\0" + (
        b"\0\0\xff\xff" if bits == 16 else bytes([white]) if bits == 8 else bytes([white << (8 - 2 * bits)])
    )
    size = (1, 1) if bits == 8 else (2, 1)
    expected = [255] if bits == 8 else [0, 255]
    assert greys(png(size, bits, 0, rows)) == expected
    # The transparent colour becomes white.
    assert greys(png(size, bits, 0, rows, chunk(b"tRNS", struct.pack(">H", 0)))) == [255] * len(expected)
    assert greys(png(size, bits, 0, rows, chunk(b"tRNS", struct.pack(">H", white)))) == expected


def test_a_transparent_grey_between_black_and_white():
    def transparent(value):
        return chunk(b"tRNS", struct.pack(">H", value))

    assert greys(png((4, 1), 2, 0, b"\0\x1b", transparent(1))) == [0, 255, 170, 255]  # 0, 1, 2, 3
    assert greys(png((2, 1), 4, 0, b"\0\x56", transparent(6))) == [85, 255]
    assert greys(png((2, 1), 16, 0, b"\0\x12\x34\x12\x35", transparent(0x1234))) == [255, 18]


def test_a_transparent_colour_of_16_bits():
    rows = b"\0" + struct.pack(">6H", 0x1234, 0, 0, 0x3412, 0, 0)
    image = open_image(png((2, 1), 16, 2, rows, chunk(b"tRNS", struct.pack(">3H", 0x1234, 0, 0))))
    assert [image.getpixel((x, 0)) for x in range(2)] == [WHITE, (0x34, 0, 0)]


@pytest.mark.parametrize("most", [1, 100, 255, 256, 1000, 4095, 65535])
def test_pnm_values_are_fractions_of_the_largest(most):
    values = [0, most // 2, most]
    expected = [0, round(most // 2 * 255 / most), 255]
    binary = struct.pack(">3H" if most > 255 else "3B", *values)
    assert greys(b"P5 3 1 %d\n" % most + binary) == expected
    assert greys(b"P2 3 1 %d\n%d %d %d\n" % (most, *values)) == expected
    for content in (b"P6 1 1 %d\n" % most + binary, b"P3 1 1 %d\n%d %d %d\n" % (most, *values)):
        assert list(open_image(content).getpixel((0, 0))) == expected
    white = b"P5 2 1 %d\n" % most + struct.pack(">2H" if most > 255 else "2B", most, most)
    assert greys(white) == [255, 255]


def test_pbm():
    assert greys(b"P1 3 1 101") == greys(b"P4 3 1\n\xa0") == [0, 255, 0]


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
def test_grey_tiff_of_every_depth(order, compressed):
    def read(values, dtype, bits, kind=1, **options):
        return greys(tiff(np.array([values], dtype), bits, kind, order=order, compressed=compressed, **options))

    assert read([0, 257, 65535], np.uint16, 16) == [0, 1, 255]
    assert read([0, 77, 255], np.uint8, 8) == [0, 77, 255]
    assert read([0, 77, 255], np.uint8, 8, white_is_zero=True) == [255, 178, 0]
    # No agreed white: the smallest value is black, the largest white.
    assert read([-128, 127, 0], np.int8, 8, kind=2) == [0, 255, 128]
    assert read([-300, 300, 0], np.int16, 16, kind=2) == [0, 255, 128]
    assert read([-(2**31), 2**31 - 1, 0], np.int32, 32, kind=2) == [0, 255, 128]
    assert read([-1, 1, 0], np.float32, 32, kind=3) == [0, 255, 128]
    assert read([-1, 1, 1], np.float32, 32, kind=3, white_is_zero=True) == [255, 0, 0]
    if order == "<":  # Pillow does not know the others
        assert read([0, 257, 65535], np.uint16, 16, white_is_zero=True) == [255, 254, 0]
        assert read([0, 2**32 - 1, 2**31], np.uint32, 32) == [0, 255, 128]


def test_tiff_of_12_bits():
    packed = np.array([[0xFF, 0xF8, 0x00]], np.uint8)  # 4095, 2048
    assert greys(tiff(packed, 12, t256=2)) == [255, 128]


def test_tiff_in_planes_that_pillow_reads_wrong():
    data = tiff(np.zeros((3, 2), np.uint16), 16, t257=1, t262=2, t277=3, t284=2)
    with pytest.raises(ImageError, match="in separate planes; save it as PNG"):
        open_image(data)
    grey_and_alpha = tiff(np.zeros((2, 2), np.uint8), 8, compressed=True, t277=2, t284=2, t338=2)
    size = len(zlib.compress(bytes(4)))
    for tag, value in ((273, 8), (279, size)):  # a strip for each plane, here the same one
        one, two = struct.pack("<HHII", tag, 4, 1, value), struct.pack("<HHIHH", tag, 3, 2, value, value)
        grey_and_alpha = grey_and_alpha.replace(one, two)
    with pytest.raises(ImageError, match="in separate planes; save it as PNG"):
        open_image(grey_and_alpha)


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "RGBA", "RGBX", "RGBa", "LA", "La", "PA", "CMYK", "YCbCr", "HSV"]
)
def test_every_mode_of_a_pillow_image(mode):
    image = Image.new("RGBA", (2, 2), (255, 255, 255, 255))
    image.putpixel((0, 0), (0, 0, 0, 255))
    start = {"RGBa": "RGBA", "La": "LA", "PA": "P"}.get(mode)
    image = (image.convert(start) if start else image).convert(mode)
    np.testing.assert_allclose(open_image(image).get_flattened_data(), [(0, 0, 0), *[WHITE] * 3], atol=1)


@pytest.mark.parametrize(("mode", "order"), [("I;16", "<u2"), ("I;16L", "<u2"), ("I;16B", ">u2"), ("I;16N", "=u2")])
def test_pillow_images_of_16_bits(mode, order):
    image = Image.frombytes(mode, (3, 1), np.array([0, 257, 65535], order).tobytes())
    assert greys(image) == [0, 1, 255]


def test_a_pillow_image_in_lab():
    assert open_image(Image.new("LAB", (1, 1), (255, 128, 128))).getpixel((0, 0)) == pytest.approx(
        (254, 255, 254), abs=1
    )


def test_exif_is_not_written_again():
    """Pillow's exif_transpose does that, which took minutes for these fractions, and failed for others."""
    entries = struct.pack("<HHII", 0x0112, 3, 1, 6) + struct.pack("<HHII", 33434, 5, 100_000, 38)
    exif = b"II*\0\x08\0\0\0\2\0" + entries + bytes(4) + struct.pack("<II", 1, 3) * 100_000
    start = time.process_time()
    assert open_image(png((1, 2), 8, 0, bytes(4), chunk(b"eXIf", exif))).size == (2, 1)
    assert time.process_time() - start < 1


@pytest.mark.parametrize("exif", [b"", b"garbage", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff"])
@pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")
def test_broken_exif_is_ignored(exif):
    for kind in ("jpeg", "png", "webp"):
        content = encoded(Image.new("RGB", (16, 8), WHITE), kind, exif=b"Exif\0\0" + exif)
        assert open_image(content).size == (16, 8)


# Limits


def test_anything_but_a_regular_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    os.mkfifo("a.fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("a.socket")
        for path in ("a.fifo", "/dev/zero"):
            assert failure(path) == "cannot be read: not a regular file"
        assert failure("a.socket") == "cannot be read: No such device or address"


def test_a_file_that_is_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_IMAGE_FILE", 2**20)
    path = tmp_path / "a.png"
    with path.open("wb") as file:
        file.truncate(2**40)  # a sparse file, which takes no space
    assert failure(path) == "larger than 1 MiB; make the image smaller"
    with open("/dev/zero", "rb") as zeros, pytest.raises(ImageError, match="^/dev/zero: larger than 1 MiB"):
        open_image(zeros)
    with pytest.raises(ImageError, match="larger than 1 MiB"):
        open_image(bytes(2**20 + 1))


def test_sides_and_pixels_have_limits():
    with pytest.raises(ImageError, match="more than 70,000,000 pixels; make the image smaller"):
        open_image(png((8400, 8400), 8, 0, b""))
    for content in (png((1, 65536), 8, 0, b""), tiff(np.zeros((1, 1), np.uint8), 8, t322=2**30, t323=16, t324=8)):
        with pytest.raises(ImageError, match="more than 65,535 pixels wide or high"):
            open_image(content)
    for content in (
        png((8192, 4300), 8, 6, b""),
        png((8192, 4300), 16, 0, b""),
        png((8192, 4300), 8, 0, b"", chunk(b"tRNS", b"\0\0")),
        tiff(np.zeros((1, 1), np.float32), 32, 3, t256=8192, t257=4300),
    ):
        with pytest.raises(ImageError, match="more than 35,000,000 pixels"):
            open_image(content)
    white = png((4960, 7016), 1, 0, (b"\0" + b"\xff" * 620) * 7016, chunk(b"tRNS", b"\0\0"))  # A4 at 600 dpi
    assert open_image(white).getextrema() == ((255, 255),) * 3
    for content in (b"P2 2049 1024 255\n", b"P5 2049 1024 100\n"):  # decoded in Python
        with pytest.raises(ImageError, match="more than 2,097,152 pixels"):
            open_image(content)


def test_a_jpeg_with_the_same_scan_many_times():
    content = encoded(Image.new("L", (4096, 4096)), "jpeg", progressive=True)
    last = content.rindex(b"\xff\xda")
    assert image_limits.jpeg_scans(content) == 6
    bomb = content[:-2] + content[last:-2] * 200 + content[-2:]
    assert image_limits.jpeg_scans(bomb) == 206
    with pytest.raises(ImageError, match="more than 64 JPEG scans of 16,777,216 pixels"):
        open_image(bomb)
    for jpeg in (bomb, content):
        file = tiff(np.frombuffer(jpeg, np.uint8)[None], 8, t256=4096, t257=4096, t259=7, t278=4096)
        if jpeg is bomb:
            with pytest.raises(ImageError, match="too many JPEG scans; save it as an ordinary JPEG"):
                open_image(file)
        else:
            assert open_image(file).size == (4096, 4096)
    video = b"\xff\xda" * 1000  # after the image, as phones store them
    assert image_limits.jpeg_scans(content + video) == 6


SMALL_JPEG = b"\xff\xd8\xff\xe0\0\x04\0\0"


@pytest.mark.parametrize(
    "content",
    [
        SMALL_JPEG + b"\xff\xe1\xff\xffExif\0\0".ljust(65537, b"\0") * 201,
        png((1, 1), 8, 0, b"\0\0", chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**20))) * 201),
        png((1, 1), 8, 0, b"\0\0", chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**20))[:-4]) * 201),
        b"P2 900 900 255\n" + b"#\n" * 2**17,
    ],
    ids=["exif", "profiles", "texts", "comments"],
)
def test_metadata_in_many_pieces(content):
    with pytest.raises(ImageError, match="too many pieces of metadata"):
        open_image(content)


@pytest.mark.parametrize(
    "content",
    [
        png((1, 1), 8, 0, b"\0\0", chunk(b"abCd", b"") * 20_000),
        SMALL_JPEG + b"\xff\xe5\0\x02" * 50_000,
        SMALL_JPEG + bytes(2**17),
        b"GIF89a\1\0\1\0\0\0\0!\xf0" + b"\1a" * 2**17,
        b"P5 " + b" " * 2**17,
    ],
    ids=["png", "segments", "zeros", "gif", "spaces"],
)
def test_files_of_many_small_pieces(content, monkeypatch):
    monkeypatch.setattr(image_limits, "MAX_READS", 5000)
    with pytest.raises(ImageError, match="too many small pieces"):
        open_image(content)


def test_tiff_with_too_many_strips():
    offsets = struct.pack("<HHII", 273, 4, 2**18, 8)
    content = tiff(np.zeros((1024, 1024), np.uint8), 8)
    at = content.index(struct.pack("<HHI", 273, 4, 1))
    with pytest.raises(ImageError, match="TIFF field 273 has too many values"):
        open_image(content[:at] + offsets + content[at + 12 :])
    # The same half of the image a thousand times.
    offsets = struct.pack("<HHII", 273, 4, 1000, 8)
    content = tiff(np.zeros((64, 64), np.uint8), 8, t278=32)
    at = content.index(struct.pack("<HHI", 273, 4, 1))
    with pytest.raises(ImageError, match="strips or tiles overlap"):
        open_image(content[:at] + offsets + content[at + 12 :])


# Other sources than files


def encoded(image, kind="png", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_sources_give_the_same_image(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(array))
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with path.open("rb") as file:
        sources = [path, str(path), content, bytearray(content), io.BytesIO(content), file, array, Image.open(path)]
        sources += [array[::-1, ::-1][::-1, ::-1], Image.fromarray(array)]
        for source in sources:
            image = open_image(source)
            assert image.mode == "RGB" and np.array_equal(image, array)
        assert not file.closed
    image = open_image(array)
    array[:] = 0  # the image is a copy
    assert np.asarray(image).any()


def test_a_stream_that_cannot_seek():
    class Stream(io.RawIOBase):
        content = io.BytesIO(encoded(Image.new("RGB", (3, 2), RED)))

        def readable(self):
            return True

        def readinto(self, buffer):
            return self.content.readinto(buffer)

    assert open_image(Stream()).getpixel((2, 1)) == RED


def test_grey_and_transparent_arrays():
    assert open_image(np.full((1, 1), 77, np.uint8)).getpixel((0, 0)) == (77, 77, 77)
    assert open_image(np.array([[[0, 0, 255, 127]]], np.uint8)).getpixel((0, 0)) == (128, 128, 255)


def test_a_pillow_image_is_turned_upright_and_left_as_it_was():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(io.BytesIO(encoded(Image.new("L", (3, 2)), exif=exif)))
    assert open_image(image).size == (2, 3) and image.size == (3, 2) and image.mode == "L"


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate"])
def test_a_broken_pillow_image_that_is_not_decoded_yet(compression):
    noise = np.random.default_rng(0).integers(0, 256, (99, 99, 3), dtype=np.uint8)
    content = bytearray(encoded(Image.fromarray(noise), "tiff", compression=compression))
    content[9000:20000] = b"\xff" * 11000
    content = content[:9000] if compression == "raw" else content
    try:
        image = Image.open(io.BytesIO(content))
    except OSError:  # cut before its directory
        content = encoded(Image.fromarray(noise), "ppm")[:9000]
        image = Image.open(io.BytesIO(content))
    for _ in range(2):  # Pillow itself would take it for whole the second time
        with pytest.raises(ImageError, match="cannot be read"):
            open_image(image)


@pytest.mark.parametrize(
    ("array", "found"),
    [
        (np.zeros((3, 4, 5), np.uint8), r"uint8 \[3, 4, 5\]"),
        (np.zeros((2, 3, 4, 3), np.uint8), r"uint8 \[2, 3, 4, 3\]"),
        (np.zeros((5, 4, 3), np.float32), r"float32 \[5, 4, 3\]"),
        (np.zeros((0, 4, 3), np.uint8), r"uint8 \[0, 4, 3\]"),
        (np.array("a dog"), r"<U5 \[\]"),
        (np.zeros(7, np.uint8), r"uint8 \[7\]"),
    ],
)
def test_arrays_that_are_not_images(array, found):
    with pytest.raises(CallError, match=rf"^image of {found}: an array must be uint8 \[H, W, 3\] \(RGB\), .*\(grey\)$"):
        open_image(array)


@pytest.mark.parametrize("source", [None, 7, [[1, 2]], {"image": "a.png"}, object()])
def test_objects_that_are_not_images(source):
    with pytest.raises(
        CallError, match=rf"^image of type {type(source).__name__}: must be a path, bytes, a binary file"
    ):
        open_image(source)


def test_errors_name_the_source(tmp_path):
    (tmp_path / "a.png").write_bytes(b"a dog")
    cut = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)))[:999]
    for source, name, reason in (
        (b"a dog", "image of 5 bytes", "not an image (JPEG, "),
        (b"", "image of 0 bytes", "not an image (JPEG, "),
        (cut, "image of 999 bytes", "cannot be read: "),
        (io.BytesIO(b"a dog"), "image in a BytesIO", "not an image (JPEG, "),
        (open(tmp_path / "a.png", "rb"), str(tmp_path / "a.png"), "not an image (JPEG, "),
        (Image.open(io.BytesIO(cut)), "image of 40 x 40 pixels", "cannot be read: "),
        (Image.new("RGB", (0, 5)), "image of 0 x 5 pixels", "cannot be read: it has no pixels"),
        ("\0", "\0", "cannot be read: embedded null byte"),
    ):
        with pytest.raises(ImageError) as caught:
            open_image(source)
        assert caught.value.name == name and caught.value.reason.startswith(reason)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    for source in (io.StringIO("a dog"), open(tmp_path / "a.png")):
        with pytest.raises(CallError, match="an image file must be opened in binary mode"):
            open_image(source)


def test_threads_read_at_once_and_nothing_global_changes(tmp_path, capsys):
    """Images, broken ones and COCO's files in eight threads, as in one."""
    rng = np.random.default_rng(0)
    for i in range(16):
        Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        annotations = [{"id": j, "image_id": j, "caption": f"caption {i} {j}"} for j in range(200)]
        (tmp_path / f"{i}.json").write_text(json.dumps({"annotations": annotations}))
    (tmp_path / "3.png").write_bytes(b"broken")

    def read(i):
        try:
            pixels = np.asarray(open_image(tmp_path / f"{i}.png")).tobytes()
        except ImageError as error:
            pixels = str(error)
        return pixels, coco.read_captions(tmp_path / f"{i}.json")

    expected = [read(i) for i in range(16)]
    before = sys.stdout, sys.stderr, list(warnings.filters), warnings.showwarning
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            assert list(pool.map(read, range(16))) == expected
    assert (sys.stdout, sys.stderr, list(warnings.filters), warnings.showwarning) == before
    assert capsys.readouterr() == ("", "")


def test_find_images(tmp_path):
    for name in ("b.JPG", "a.png", "sub/c.jpeg", "sub/deep/d.Tiff", "notes.txt", "captions.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    inside = ["a.png", "b.JPG", "sub/c.jpeg", "sub/deep/d.Tiff"]
    assert find_images([str(tmp_path)]) == [tmp_path / name for name in inside]
    given = [tmp_path / "notes.txt", tmp_path / "sub"]
    assert find_images(given) == [tmp_path / name for name in ("notes.txt", "sub/c.jpeg", "sub/deep/d.Tiff")]
    with pytest.raises(CallError) as caught:
        find_images([tmp_path / "nowhere"])
    assert str(caught.value) == f"{tmp_path / 'nowhere'}: no such file or folder"
