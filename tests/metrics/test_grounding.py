import pytest
import torch

from attncap.captioner import Caption
from attncap.data.shapes import Object, Scene
from attncap.metrics.grounding import grounding

# Two circles side by side in the upper half and a cross in the lower left. 128 pixels are 4 cells of 32.
SCENE = Scene(
    "scene",
    (
        Object("small", "red", "circle", center=(48, 16), radius=12),
        Object("small", "red", "circle", center=(80, 16), radius=12),
        Object("large", "blue", "cross", center=(16, 112), radius=17),
    ),
    (),
    (0,),
)


def caption(words: str, *peaks: tuple[int, int]) -> Caption:
    """A caption whose words have their attention peaks in these cells (row, column)."""
    attention = torch.full((len(peaks), 4, 4), 0.01)
    for word, (row, column) in enumerate(peaks):
        attention[word, row, column] = 0.5
    return Caption(words, -1.0, words.split(), attention)


@pytest.mark.parametrize(
    "words, peaks, share, chance",
    [  # the circles cover the centres of cells (0, 1) and (0, 2), the cross covers that of (3, 0): 2 and 1 of 16 cells
        ("two small red circles", [(3, 0), (0, 1), (0, 2), (0, 3)], 2 / 3, 2 / 16),
        ("a large blue cross", [(0, 0), (3, 0), (3, 0), (3, 0)], 1, 1 / 16),
        ("large blue cross small red circles", [(3, 0)] * 6, 1 / 2, 3 / 32),
        ("a large red cross", [(0, 0), (3, 0), (3, 0), (3, 0)], 0, 0),  # names nothing in the scene
        ("a picture", [(0, 0), (0, 0)], 0, 0),
    ],
)
def test_worked_by_hand(words, peaks, share, chance):
    assert grounding(SCENE, caption(words, *peaks)) == (pytest.approx(share), pytest.approx(chance))


def test_attention_may_be_an_array():
    found = caption("large blue cross", (3, 0), (0, 0), (3, 0))
    found.attention = found.attention.numpy()
    assert grounding(SCENE, found) == (pytest.approx(2 / 3), pytest.approx(1 / 16))


def test_a_caption_without_words():
    assert grounding(SCENE, Caption("", -1.0, [], torch.zeros(0, 4, 4))) == (0, 0)


def test_a_word_in_pieces_has_the_peak_of_its_first_piece():
    pieces = ["▁a", "▁lar", "ge", "▁", "blue", "▁cross"]
    attention = caption(" ".join(pieces), (0, 0), (3, 0), (0, 1), (0, 1), (0, 2), (3, 0)).attention
    found = grounding(SCENE, Caption("a large blue cross", -1.0, pieces, attention))
    assert found == (pytest.approx(2 / 3), pytest.approx(1 / 16))
