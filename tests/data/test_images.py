import io
import json
import pickle
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

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
