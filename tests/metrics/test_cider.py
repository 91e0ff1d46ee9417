"""The C++ scorer against pycocoevalcap's CIDEr-D, against cases worked by hand, and with input that does not fit."""

import importlib
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocoevalcap.cider.cider import Cider

from attncap.errors import UserError
from attncap.metrics.cider import CiderD, cider


def official(references, captions, images):
    """pycocoevalcap's score of each caption. It takes one caption an image, so captions of an image come in turns."""
    texts = {i: [" ".join(map(str, ref)) for ref in refs] for i, refs in enumerate(references)}
    scores = np.zeros(len(captions))
    left = list(range(len(captions)))
    while left:
        turn = {images[i]: i for i in left}
        answers = {i: [" ".join(map(str, captions[turn[i]])) if i in turn else "none"] for i in texts}
        by_image = Cider().compute_score(texts, answers)[1]
        for image, i in turn.items():
            scores[i] = by_image[image]
        left = [i for i in left if i not in turn.values()]
    return scores


def draw(seed, images, captions, words):
    rng = random.Random(seed)

    def caption():
        return rng.choices(range(words), weights=[1 / (w + 1) for w in range(words)], k=rng.randint(0, 16))

    references = [[caption() for _ in range(rng.randint(1, 5))] for _ in range(images)]
    return references, [caption() for _ in range(captions)], [rng.randrange(images) for _ in range(captions)]


@pytest.mark.parametrize("words", [5, 40, 2000])
def test_a_thousand_random_captions_are_pycocoevalcaps(words):
    references, captions, images = draw(words, 200, 1000, words)
    scores = CiderD(references).score(captions, images)
    assert scores.shape == (1000,) and scores.dtype == np.float64 and scores.max() > 0.5
    np.testing.assert_allclose(scores, official(references, captions, images), rtol=0, atol=1e-9)


SHORT = st.lists(st.integers(0, 3), max_size=7)  # few words, so that n-grams repeat


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(SHORT, st.lists(SHORT, min_size=1, max_size=3)), min_size=1, max_size=4))
def test_any_captions_are_pycocoevalcaps(cases):
    captions, references = map(list, zip(*cases, strict=True))
    if not any(ref for refs in references for ref in refs):
        references[0].append([0])  # pycocoevalcap stumbles where no reference has a word
    images = list(range(len(cases)))
    found = CiderD(references).score(captions, images)
    np.testing.assert_allclose(found, official(references, captions, images), rtol=0, atol=1e-9)


def test_worked_by_hand():
    # idf is ln 2 but for word 3, which both images have: 0. The first caption's words: 2 of 1 and 1 of 2, clipped
    # 1 and 1, over norms sqrt(5) and sqrt(2); of its pairs 11 and 12, one of the reference's 12 and 23. The second has
    # three more words that no reference has (ln 2 each), and three more pairs: the penalty is exp(-9 / 72).
    scores = CiderD([[[1, 2, 3]], [[3, 4]]]).score([[1, 1, 2], [1, 1, 2, 9, 9, 9]], [0, 0])
    first = 2.5 * (2 / math.sqrt(10) + 1 / 2)
    second = 2.5 * math.exp(-1 / 8) * (2 / math.sqrt(14 * 2) + 1 / math.sqrt(7 * 2))
    assert scores == pytest.approx([first, second], abs=1e-12)


def test_references_are_averaged_and_an_image_is_one_document():
    # Both references of the first image have word 1, and still it is in one image of two.
    scores = CiderD([[[1], [1, 2]], [[3]]]).score([[1]], [0])
    assert scores == pytest.approx([2.5 * (1 + math.exp(-1 / 72) / math.sqrt(2)) / 2], abs=1e-12)


def test_captions_without_words_or_shorter_than_an_ngram():
    scores = CiderD([[[1, 2, 3, 4, 5]], [[7]], [[]]]).score([[], [1], [7], [], [7]], [0, 0, 1, 2, 2])
    penalty = math.exp(-16 / 72)  # 0 pairs beside 4
    assert scores == pytest.approx([0, 2.5 * penalty / math.sqrt(5), 2.5, 0, 0], abs=1e-12)
    assert CiderD([[[]]]).score([[], [1]], [0, 0]).tolist() == [0, 0]
    assert CiderD([[[1]]]).score([], []).shape == (0,)


def test_ids_are_any_integers():
    ids = [0, -1, 2**63 - 1, -(2**63), 2**32]
    scores = CiderD([[ids], [[5]]]).score([ids, ids[::-1], [i + 1 for i in ids[:2]]], [0, 0, 0])
    assert scores == pytest.approx([10, 2.5, 2.5 * math.exp(-9 / 72) / math.sqrt(10)], abs=1e-12)


def test_threads_change_no_bit():
    references, captions, images = draw(0, 300, 2000, 100)
    one = CiderD(references, threads=1).score(captions, images)
    for threads in (2, 3, 7):
        assert (CiderD(references, threads).score(captions, images) == one).all()


def test_a_score_depends_on_no_other_caption():
    references, captions, images = draw(1, 20, 50, 30)
    scorer = CiderD(references)
    together = scorer.score(captions, images)
    assert [scorer.score([c], [i])[0] for c, i in zip(captions, images, strict=True)] == together.tolist()


def test_words_in_place_of_ids():
    predictions, references = [["a", "dog"], ["cats"]], [[["a", "dog"], ["dogs"]], [["two", "cats"]]]
    expected = CiderD([[[0, 1], [2]], [[3, 4]]]).score([[0, 1], [4]], [0, 1])
    assert cider(predictions, references).tolist() == pytest.approx(expected.tolist(), abs=1e-12)


def test_input_that_does_not_fit():
    with pytest.raises(ValueError, match="images must rise by 1 or more at place 1"):
        CiderD([[[1]], []])
    with pytest.raises(ValueError, match="there must be an image"):
        CiderD([])
    scorer = CiderD([[[1]]])
    for image in (1, -1):
        with pytest.raises(ValueError, match=f"image {image} of caption 1 is none of the 1 images"):
            scorer.score([[1], [1]], [0, image])
    with pytest.raises(ValueError, match="image_of must have a value for each caption"):
        scorer.score([[1]], [])


@pytest.mark.parametrize(
    "offsets, message",
    [
        ([], "offsets must have one dimension, and one value at least"),
        ([[0, 2]], "offsets must have one dimension"),
        ([0, 1], "offsets must go from 0 to 2"),
        ([1, 2], "offsets must go from 0 to 2"),
        ([0, 3, 2], "offsets must rise by 0 or more at place 1"),
    ],
)
def test_offsets_that_would_read_elsewhere(offsets, message):
    scorer = CiderD([[[1]]]).scorer
    captions = max(0, len(offsets) - 1)
    with pytest.raises(ValueError, match=message):
        scorer.score(np.array([1, 2]), np.array(offsets, dtype=np.int64), np.zeros(captions, dtype=np.int64), 1)


def test_scorer_that_is_not_built(monkeypatch):
    module = importlib.import_module("attncap.metrics.cider")
    monkeypatch.setattr(module, "missing", "No module named 'attncap.lib.cider'; run `pip install .` ...")
    with pytest.raises(UserError, match="CIDEr scorer is missing: No module .* run `pip install .`"):
        CiderD([[[1]]])
