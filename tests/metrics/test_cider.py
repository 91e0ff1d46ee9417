"""The C++ scorer against pycocoevalcap's CIDEr-D and against cases worked by hand, and with invalid input."""

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
    """pycocoevalcap's score of each caption. It takes one caption per image, so it is called several times."""
    texts = {i: [" ".join(map(str, ref)) for ref in refs] for i, refs in enumerate(references)}
    scores = np.zeros(len(captions))
    remaining = list(range(len(captions)))
    while remaining:
        turn = {images[i]: i for i in remaining}
        answers = {i: [" ".join(map(str, captions[turn[i]])) if i in turn else "none"] for i in texts}
        by_image = Cider().compute_score(texts, answers)[1]
        for image, i in turn.items():
            scores[i] = by_image[image]
        remaining = [i for i in remaining if i not in turn.values()]
    return scores


def make_captions(seed, images, captions, words):
    rng = random.Random(seed)

    def caption():
        return rng.choices(range(words), weights=[1 / (w + 1) for w in range(words)], k=rng.randint(0, 16))

    references = [[caption() for _ in range(rng.randint(1, 5))] for _ in range(images)]
    return references, [caption() for _ in range(captions)], [rng.randrange(images) for _ in range(captions)]


@pytest.mark.parametrize("words", [5, 40, 2000])
def test_a_thousand_random_captions_equal_pycocoevalcap(words):
    references, captions, images = make_captions(words, 200, 1000, words)
    scores = CiderD(references).score(captions, images)
    assert scores.shape == (1000,) and scores.dtype == np.float64 and scores.max() > 0.5
    np.testing.assert_allclose(scores, official(references, captions, images), rtol=0, atol=1e-9)


SHORT = st.lists(st.integers(0, 3), max_size=7)  # few different words, so that n-grams repeat


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(SHORT, st.lists(SHORT, min_size=1, max_size=3)), min_size=1, max_size=4))
def test_arbitrary_captions_equal_pycocoevalcap(cases):
    captions, references = map(list, zip(*cases, strict=True))
    if not any(ref for refs in references for ref in refs):
        references[0].append([0])  # pycocoevalcap fails if no reference has a word
    images = list(range(len(cases)))
    found = CiderD(references).score(captions, images)
    np.testing.assert_allclose(found, official(references, captions, images), rtol=0, atol=1e-9)


def test_worked_by_hand():
    # The idf is ln 2, except for word 3, which occurs in both images: 0. The first caption has word 1 twice and word 2
    # once, clipped to 1 and 1, with norms sqrt(5) and sqrt(2). One of its pairs, 11 and 12, is in the reference, which
    # has 12 and 23. The second caption has three more words and three more pairs that are in no reference (idf ln 2
    # each), and the length penalty is exp(-9 / 72).
    scores = CiderD([[[1, 2, 3]], [[3, 4]]]).score([[1, 1, 2], [1, 1, 2, 9, 9, 9]], [0, 0])
    first = 2.5 * (2 / math.sqrt(10) + 1 / 2)
    second = 2.5 * math.exp(-1 / 8) * (2 / math.sqrt(14 * 2) + 1 / math.sqrt(7 * 2))
    assert scores == pytest.approx([first, second], abs=1e-12)


def test_references_are_averaged_and_each_image_is_one_document():
    # Both references of the first image have word 1, so it still occurs in only one image of two.
    scores = CiderD([[[1], [1, 2]], [[3]]]).score([[1]], [0])
    assert scores == pytest.approx([2.5 * (1 + math.exp(-1 / 72) / math.sqrt(2)) / 2], abs=1e-12)


def test_captions_without_words_or_shorter_than_an_ngram():
    scores = CiderD([[[1, 2, 3, 4, 5]], [[7]], [[]]]).score([[], [1], [7], [], [7]], [0, 0, 1, 2, 2])
    penalty = math.exp(-16 / 72)  # 0 pairs instead of 4
    assert scores == pytest.approx([0, 2.5 * penalty / math.sqrt(5), 2.5, 0, 0], abs=1e-12)
    assert CiderD([[[]]]).score([[], [1]], [0, 0]).tolist() == [0, 0]
    assert CiderD([[[1]]]).score([], []).shape == (0,)


def test_ids_may_be_any_integers():
    ids = [0, -1, 2**63 - 1, -(2**63), 2**32]
    scores = CiderD([[ids], [[5]]]).score([ids, ids[::-1], [i + 1 for i in ids[:2]]], [0, 0, 0])
    assert scores == pytest.approx([10, 2.5, 2.5 * math.exp(-9 / 72) / math.sqrt(10)], abs=1e-12)


def test_scores_do_not_depend_on_threads():
    references, captions, images = make_captions(0, 300, 2000, 100)
    one = CiderD(references, threads=1).score(captions, images)
    for threads in (2, 3, 7):
        assert (CiderD(references, threads).score(captions, images) == one).all()


def test_a_score_does_not_depend_on_other_captions():
    references, captions, images = make_captions(1, 20, 50, 30)
    scorer = CiderD(references)
    together = scorer.score(captions, images)
    assert [scorer.score([c], [i])[0] for c, i in zip(captions, images, strict=True)] == together.tolist()


def test_words_instead_of_ids():
    predictions, references = [["a", "dog"], ["cats"]], [[["a", "dog"], ["dogs"]], [["two", "cats"]]]
    expected = CiderD([[[0, 1], [2]], [[3, 4]]]).score([[0, 1], [4]], [0, 1])
    assert cider(predictions, references).tolist() == pytest.approx(expected.tolist(), abs=1e-12)


def test_invalid_input():
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


def test_default_number_of_threads(monkeypatch):
    for setting, threads in (("3", 3), ("4,2", 4), ("", 7), ("0", 7), ("many", 7)):
        monkeypatch.setenv("OMP_NUM_THREADS", setting)
        monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(7)))
        assert CiderD([[[1]]]).threads == threads
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert CiderD([[[1]]]).threads == 7 and CiderD([[[1]]], threads=2).threads == 2


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
def test_offsets_that_would_read_out_of_bounds(offsets, message):
    scorer = CiderD([[[1]]]).scorer
    captions = max(0, len(offsets) - 1)
    with pytest.raises(ValueError, match=message):
        scorer.score(np.array([1, 2]), np.array(offsets, dtype=np.int64), np.zeros(captions, dtype=np.int64), 1)


def test_scorer_is_not_built(monkeypatch):
    module = importlib.import_module("attncap.metrics.cider")
    monkeypatch.setattr(module, "missing", "No module named 'attncap.lib.cider'; run `pip install .` ...")
    with pytest.raises(UserError, match="CIDEr scorer is missing: No module .* run `pip install .`"):
        CiderD([[[1]]])
