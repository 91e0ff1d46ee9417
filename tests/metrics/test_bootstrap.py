"""The bootstrap from kept statistics against one that scores every drawn corpus anew."""

import random

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu

from attncap.metrics import bootstrap, score

IMAGES = 30


def system(seed: int, mistakes: float):
    rng = random.Random(seed)
    wrong = {name: " ".join(rng.choices("abcdefxyz", k=3)) for name in REFERENCES}
    return {name: wrong[name] if rng.random() < mistakes else refs[0] for name, refs in REFERENCES.items()}


REFERENCES = {str(i): [" ".join(random.Random(i).choices("abcdef", k=4 + i % 3)), "a b c"] for i in range(IMAGES)}


def drawn_anew(predictions, seed: int) -> list[dict]:
    """pycocoevalcap's BLEU, and our own by image, of each drawn corpus."""
    rng, by_image = np.random.default_rng(seed), score(predictions, REFERENCES).rows()
    found = []
    for _ in range(bootstrap.DRAWS):
        images = rng.integers(IMAGES, size=IMAGES).tolist()
        bleus, _ = Bleu(4).compute_score(
            {k: REFERENCES[str(i)] for k, i in enumerate(images)},
            {k: [predictions[str(i)]] for k, i in enumerate(images)},
            verbose=0,
        )
        means = {name: np.mean([by_image[i][name] for i in images]) for name in ("ROUGE-L", "CIDEr")}
        found.append({**{f"BLEU-{n}": value for n, value in enumerate(bleus, 1)}, **means})
    return found


def test_equals_scoring_every_drawn_corpus(monkeypatch):
    monkeypatch.setattr(bootstrap, "DRAWS", 100)
    better, worse = system(1, 0.3), system(2, 0.6)
    scores, others = score(better, REFERENCES), score(worse, REFERENCES)
    draws, draws_others = drawn_anew(better, 5), drawn_anew(worse, 5)
    intervals = bootstrap.intervals(scores, seed=5)
    differences = bootstrap.compare(scores, others, seed=5)
    assert list(intervals) == list(differences) == list(draws[0]) == list(scores.figures())
    for name in draws[0]:
        values = [draw[name] for draw in draws]
        assert intervals[name] == pytest.approx(np.percentile(values, [2.5, 97.5]).tolist(), abs=1e-12)
        apart = [draw[name] - other[name] for draw, other in zip(draws, draws_others, strict=True)]
        found = differences[name]
        assert found.value == pytest.approx(scores.figures()[name] - others.figures()[name])
        assert [found.low, found.high] == pytest.approx(np.percentile(apart, [2.5, 97.5]).tolist(), abs=1e-12)
        assert found.above == pytest.approx(np.mean([value > 0 for value in apart]))


def test_no_difference_from_itself():
    scores = score(system(1, 0.5), REFERENCES)
    assert all((d.value, d.low, d.high, d.above) == (0, 0, 0, 0) for d in bootstrap.compare(scores, scores).values())


def test_an_interval_covers_the_truth_as_often_as_it_says():
    """Means of 60 numbers from a known distribution: 95 % intervals should hold its mean about 95 times in 100."""
    rng, held = np.random.default_rng(0), 0
    blank = score({str(i): "a" for i in range(60)}, {str(i): ["a"] for i in range(60)})
    for seed in range(100):
        blank.by_image = {"known": rng.exponential(2.0, 60)}
        low, high = bootstrap.intervals(blank, seed)["known"]
        held += low <= 2.0 <= high
    assert 87 <= held <= 100
