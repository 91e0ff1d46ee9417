import io
import warnings

import numpy as np
import pytest
from PIL import Image

from attncap.data.images import find_images, load_image, to_rgb
from attncap.errors import CallError, UserError

RED, WHITE, BLUE = (255, 0, 0), (255, 255, 255), (0, 0, 255)


def saved(image, path, **options):
    image.save(path, **options)
    return load_image(path)


def failure(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the error is the only thing to be heard
        with pytest.raises(UserError) as caught:
            load_image(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    # What EXIF 2.3 says about where the stored picture's first row and first column are to be seen.
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


def test_float_without_a_number():
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


def test_two_photographs_in_one_jpeg(tmp_path):  # as some telephones and 3-D cameras write them
    frames = [Image.new("RGB", (16, 16), color) for color in (RED, BLUE)]
    image = saved(frames[0], tmp_path / "a.jpg", format="MPO", save_all=True, append_images=frames[1:])
    np.testing.assert_allclose(image.getpixel((8, 8)), RED, atol=3)


def test_a_single_pixel(tmp_path):
    assert saved(Image.new("RGB", (1, 1)), tmp_path / "a.jpg").size == (1, 1)


def test_files_that_are_no_images(tmp_path):
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
                assert load_image(path).mode == "RGB"
            except UserError as error:
                assert str(error).startswith(f"{path}: ") and "\n" not in str(error)


@pytest.mark.parametrize("pixels", [101, 300])  # above Pillow's warning, and above its error at the double
def test_decompression_bomb(tmp_path, monkeypatch, pixels):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("L", (pixels, 1)).save(tmp_path / "a.png")
    assert failure(tmp_path / "a.png") == "more than 100 pixels; make the image smaller"


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
