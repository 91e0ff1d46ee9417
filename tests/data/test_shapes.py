from collections import Counter

import numpy as np
import pytest

from attncap.data import open_dataset
from attncap.data.shapes import CANVAS, COLORS, Object, Scene, is_true, open_shapes


@pytest.fixture(scope="module")
def splits():
    return open_shapes(0, {"train": 1500, "val": 100, "test": 300})


def scene(*things: tuple[str, tuple[float, float], float]) -> Scene:
    """A scene from ("small red circle", centre, radius)."""
    objects = tuple(Object(*kind.split(), center=center, radius=radius) for kind, center, radius in things)
    return Scene("by hand", objects, (), (0,))


def test_captions_are_true_of_hand_made_scenes():
    row = scene(("small red circle", (20, 60), 9), ("large blue square", (90, 64), 16))
    for caption in (
        "a small red circle is to the left of a large blue square",
        "A large blue square is to the right of a small red circle.",
        "a small red circle on the left and a large blue square on the right",
    ):
        assert is_true(caption, row)
    for caption in (
        "a small red circle is to the right of a large blue square",  # relation
        "a small red circle is above a large blue square",  # relation
        "a large red circle is to the left of a large blue square",  # size
        "a small green circle is to the left of a large blue square",  # colour
        "a small red cross is to the left of a large blue square",  # shape
        "two small red circles are to the left of a large blue square",  # count
        "a small red circle",  # not the whole scene
        "a picture",
        "",
    ):
        assert not is_true(caption, row)

    column = scene(
        ("small red circle", (50, 20), 9), ("small red circle", (55, 50), 9), ("large green cross", (50, 100), 16)
    )
    assert is_true("two small red circles are above a large green cross", column)
    assert is_true("a large green cross is below two small red circles", column)
    assert not is_true("a small red circle is above a large green cross", column)
    assert not is_true("two small red circles are below a large green cross", column)

    # Where two relations hold, both are true.
    diagonal = scene(("small red circle", (20, 20), 9), ("large blue square", (90, 90), 16))
    assert is_true("a small red circle is above a large blue square", diagonal)
    assert is_true("a small red circle is to the left of a large blue square", diagonal)
    # Boxes that overlap along an axis have no relation along it.
    overlap = scene(("small red circle", (60, 20), 9), ("large blue square", (70, 90), 16))
    assert not is_true("a small red circle is to the left of a large blue square", overlap)


def test_every_scene_has_five_different_true_captions(splits):
    for example in splits["train"]:
        assert len(set(example.captions)) == 5
        assert all(is_true(caption, example) for caption in example.captions)


def test_splits_share_no_scene_and_a_seed_fixes_them(splits):
    scenes = [example.objects for examples in splits.values() for example in examples]
    assert len(set(scenes)) == len(scenes)
    again = open_shapes(0, {"train": 10, "val": 100})
    assert again["train"] == splits["train"][:10] and again["val"] == splits["val"]
    assert np.array_equal(again["val"][3].image(), splits["val"][3].image())
    assert open_shapes(1, {"train": 10})["train"][0].objects != again["train"][0].objects


def test_a_captioner_that_ignores_the_picture_fails(splits):
    """No caption is true of more than 2 % of the scenes."""
    true = Counter(tokens for example in splits["test"] for tokens in example.true_captions)
    assert max(true.values()) <= 0.02 * len(splits["test"])


def test_objects_are_drawn_where_their_boxes_are(splits):
    """Each box contains the object's colour, and objects neither touch each other nor leave the image."""
    for example in splits["test"][:100]:
        pixels = np.asarray(example.image(), dtype=float)
        assert pixels.shape == (CANVAS, CANVAS, 3)
        for thing in example.objects:
            left, top, right, bottom = thing.box
            assert 0 <= left < right <= CANVAS and 0 <= top < bottom <= CANVAS
            x, y = (int(value) for value in thing.center)
            center = pixels[y - 2 : y + 3, x - 2 : x + 3].mean(axis=(0, 1))
            distance = {name: np.linalg.norm(center - color) for name, color in COLORS.items()}
            assert min(distance, key=distance.get) == thing.color
        for i, one in enumerate(example.objects):
            for other in example.objects[:i]:
                apart = max(max(one.box[k] - other.box[k + 2], other.box[k] - one.box[k + 2]) for k in (0, 1))
                assert apart > 0


def test_identity_is_that_of_the_scene():
    first, again, other = (open_shapes(seed, {"train": 1})["train"][0] for seed in (0, 0, 1))
    assert first.scene is first and first.identity() == again.identity() != other.identity()


def test_shapes_is_opened_by_name():
    splits = open_dataset("shapes", 0)
    assert {split: len(examples) for split, examples in splits.items()} == {"train": 10_000, "val": 250, "test": 500}
