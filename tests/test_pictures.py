import io
import warnings

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.font_manager import fontManager
from PIL import Image

from attncap import Caption, UserError, pictures
from attncap.pictures import MAX_WORDS, PANEL, draw_attention, save_attention


def caption_looking_at(row: int, column: int) -> Caption:
    attention = torch.zeros(1, 4, 4)
    attention[0, row, column] = 1
    return Caption("dog", -1.0, ["dog"], attention)


def test_the_heat_is_where_the_attention_is(tmp_path):
    """Moving the attention from the top left to the bottom right cell moves the red of the picture with it."""
    grey = Image.new("RGB", (60, 60), (128, 128, 128))
    redness = []
    for name, cell in (("a", (0, 0)), ("b", (3, 3))):
        save_attention(tmp_path / name, [(grey, caption_looking_at(*cell))])
        pixels = np.asarray(Image.open(tmp_path / name).convert("RGB")).astype(float)
        redness.append(pixels[..., 0] - pixels[..., 2])
    moved = redness[1] - redness[0]
    assert moved.max() > 50 and moved.min() < -50
    to, away = np.argwhere(moved > 50).mean(axis=0), np.argwhere(moved < -50).mean(axis=0)
    assert (to > away + 20).all()


def test_one_panel_per_word_and_one_row_per_picture(tmp_path):
    image = Image.new("RGB", (60, 40))
    words = "a dog runs over the green grass".split()
    long = Caption(" ".join(words), -1.0, words, torch.rand(7, 4, 4))
    heights = []
    for name, captions in (("one", [long]), ("both", [long, caption_looking_at(1, 1)])):
        save_attention(tmp_path / name, [(image, caption) for caption in captions])
        heights.append(Image.open(tmp_path / name).height)
    assert heights[1] == pytest.approx(1.5 * heights[0], abs=2)  # two rows of panels, then one more
    save_attention(tmp_path / "empty", [(image, Caption("", -1.0, [], torch.zeros(0, 4, 4)))])


def test_dollar_signs_are_not_formulas(tmp_path):
    save_attention(
        tmp_path / "picture.png", [(Image.new("RGB", (60, 40)), Caption("# $^$", -1.0, ["$^$"], torch.rand(1, 4, 4)))]
    )


def caption_of(words: list[str]) -> Caption:
    return Caption(" ".join(words), -1.0, words, torch.rand(len(words), 4, 4))


def titles(monkeypatch) -> list[str]:
    """Collects the words above the panels as they are drawn."""
    drawn, set_title = [], Axes.set_title
    monkeypatch.setattr(Axes, "set_title", lambda axes, word, **k: drawn.append(word) or set_title(axes, word, **k))
    return drawn


def test_many_and_long_words_are_cut(monkeypatch):
    drawn = titles(monkeypatch)
    image = Image.new("RGB", (60, 40))
    words = ["x" * 1000, *(f"word{i}" for i in range(300))]
    with Image.open(io.BytesIO(draw_attention([(image, caption_of(words))]))) as picture:
        assert picture.size == (960, 1800)  # ten rows
    assert drawn == ["x" * 20 + "…", *words[1:MAX_WORDS]]


def test_characters_that_no_font_has(monkeypatch, caplog):
    """They are reported once for each script, not by warnings of matplotlib's for each; surrogates and control
    characters, which cannot be drawn, are left out."""
    for cache in (pictures._family, pictures._report_missing):
        cache.cache_clear()
    fonts = [font for font in fontManager.ttflist if font.name == "DejaVu Sans"]
    monkeypatch.setattr(fontManager, "ttflist", fonts)
    drawn = titles(monkeypatch)
    words = ["犬", "一", "ไทย", "dog", "\ud83da\x1b[1m\n", "é▁"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            draw_attention([(Image.new("RGB", (60, 40)), caption_of(words))])
    assert drawn[:6] == ["□", "□", "□□□", "dog", "a[1m", "é▁"]
    scripts = [line.split(" for ")[1].split(" characters")[0] for line in caplog.messages]
    assert sorted(scripts) == ["CJK", "THAI"] and "Noto Sans" in caplog.messages[0]
    for cache in (pictures._family, pictures._report_missing):
        cache.cache_clear()


def test_a_font_that_has_the_characters_is_found(monkeypatch):
    """Matplotlib's own font STIX has this letter, but DejaVu Sans does not."""
    drawn = titles(monkeypatch)
    assert pictures._family("a") == "DejaVu Sans" != pictures._family("Ⓐ")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_attention([(Image.new("RGB", (60, 40)), caption_of(["Ⓐ"]))])
    assert drawn == ["Ⓐ"]


def test_a_picture_that_cannot_be_drawn_is_reported(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(Axes, "imshow", lambda *_, **__: 1 / 0)
    save_attention(tmp_path / "picture.png", [(Image.new("RGB", (9, 9)), caption_looking_at(0, 0))])
    assert caplog.messages == [f"{tmp_path}/picture.png: cannot be drawn: ZeroDivisionError: division by zero"]
    assert not list(tmp_path.iterdir())


def test_attention_that_is_not_finite_or_zero(tmp_path):
    for value in (0, torch.nan, torch.inf):
        caption = Caption("dog", -1.0, ["dog"], torch.full((1, 4, 4), float(value)))
        save_attention(tmp_path / f"{value}.png", [(Image.new("RGB", (60, 40)), caption)])
    assert len(list(tmp_path.iterdir())) == 3


def test_large_photographs_are_shrunk_before_they_are_drawn(tmp_path, monkeypatch):
    drawn, imshow = [], Axes.imshow

    def record(axes, image, **settings):
        drawn.append(np.shape(image))
        return imshow(axes, image, **settings)

    monkeypatch.setattr(Axes, "imshow", record)
    save_attention(tmp_path / "picture.png", [(Image.new("RGB", (6000, 4000)), caption_looking_at(0, 0))])
    assert len(drawn) == 3 and all(max(shape) <= PANEL for shape in drawn)  # the image, then image and heat of a word


def test_folder_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        save_attention(tmp_path / "file" / "picture.png", [(Image.new("RGB", (9, 9)), caption_looking_at(0, 0))])
