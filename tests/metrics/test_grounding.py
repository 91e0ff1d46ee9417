import pytest
import torch

from attncap.captioner import Caption
from attncap.data.shapes import Object, Scene
from attncap.metrics.grounding import grounding

# Two circles side by side in the upper half, a cross in the lower left; 128 pixels are 4 cells of 32.
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
    """A caption whose words look at these cells (row, column)."""
    attention = torch.full((len(peaks), 4, 4), 0.01)
    for word, (row, column) in enumerate(peaks):
        attention[word, row, column] = 0.5
    return Caption(words, -1.0, words.split(), attention)


def test_a_hand_worked_scene():
    # The circles cover the centres of cells (0, 1) and (0, 2), the cross that of (3, 0): 2 and 1 of 16 cells.
    found = grounding(
        [
            (SCENE, caption("two small red circles", (3, 0), (0, 1), (0, 2), (0, 3))),  # 2 of 3
            (SCENE, caption("a large blue cross", (0, 0), (3, 0), (3, 0), (3, 0))),  # 3 of 3
            (SCENE, caption("a large red cross", (0, 0), (3, 0), (3, 0), (3, 0))),  # names nothing in the scene
        ]
    )
    assert found["grounded"] == pytest.approx(5 / 6)
    assert found["grounded by chance"] == pytest.approx((3 * 2 / 16 + 3 * 1 / 16) / 6)


def test_nothing_named():
    assert grounding([(SCENE, caption("a picture", (0, 0), (0, 0)))]) == {"grounded": 0, "grounded by chance": 0}
