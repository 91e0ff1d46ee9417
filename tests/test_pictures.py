import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image

from attncap import Caption, UserError
from attncap.pictures import PANEL, save_attention


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
