"""The bootstrap from per-image statistics against one that scores every resampled corpus from scratch."""

import random

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu

from attncap.metrics import bootstrap, score

IMAGES = 30


def make_predictions(seed: int, mistakes: float):
    rng = random.Random(seed)
    wrong = {name: " ".join(rng.choices("abcdefxyz", k=3)) for name in REFERENCES}
    return {name: wrong[name] if rng.random() < mistakes else refs[0] for name, refs in REFERENCES.items()}


REFERENCES = {str(i): [" ".join(random.Random(i).choices("abcdef", k=4 + i % 3)), "a b c"] for i in range(IMAGES)}


def score_every_resample(predictions, seed: int) -> list[dict]:
    """The metrics of each resampled corpus: BLEU from pycocoevalcap, the others as means of our scores per image."""
    rng, by_image = np.random.default_rng(seed), score(predictions, REFERENCES).rows()
    found = []
    for _ in range(bootstrap.RESAMPLES):
        images = rng.integers(IMAGES, size=IMAGES).tolist()
        bleus, _ = Bleu(4).compute_score(
            {k: REFERENCES[str(i)] for k, i in enumerate(images)},
            {k: [predictions[str(i)]] for k, i in enumerate(images)},
            verbose=0,
        )
        means = {name: np.mean([by_image[i][name] for i in images]) for name in ("ROUGE-L", "CIDEr")}
        found.append({**{f"BLEU-{n}": value for n, value in enumerate(bleus, 1)}, **means})
    return found


def test_equals_scoring_every_resampled_corpus(monkeypatch):
    monkeypatch.setattr(bootstrap, "RESAMPLES", 100)
    better, worse = make_predictions(1, 0.3), make_predictions(2, 0.6)
    scores, others = score(better, REFERENCES), score(worse, REFERENCES)
    resamples, resamples_others = score_every_resample(better, 5), score_every_resample(worse, 5)
    intervals = bootstrap.intervals(scores, seed=5)
    differences = bootstrap.compare(scores, others, seed=5)
    assert list(intervals) == list(differences) == list(resamples[0]) == list(scores.corpus())
    for name in resamples[0]:
        values = [resample[name] for resample in resamples]
        assert intervals[name] == pytest.approx(np.percentile(values, [2.5, 97.5]).tolist(), abs=1e-12)
        expected = [a[name] - b[name] for a, b in zip(resamples, resamples_others, strict=True)]
        found = differences[name]
        assert found.value == pytest.approx(scores.corpus()[name] - others.corpus()[name])
        assert [found.low, found.high] == pytest.approx(np.percentile(expected, [2.5, 97.5]).tolist(), abs=1e-12)
        assert found.share_above_zero == pytest.approx(np.mean([value > 0 for value in expected]))


def test_a_system_does_not_differ_from_itself():
    scores = score(make_predictions(1, 0.5), REFERENCES)
    differences = bootstrap.compare(scores, scores).values()
    assert all((d.value, d.low, d.high, d.share_above_zero) == (0, 0, 0, 0) for d in differences)


def test_a_95_percent_interval_contains_the_truth_in_95_percent_of_cases():
    """Means of 60 numbers from a known distribution. About 95 of 100 intervals should contain its mean."""
    rng, covered = np.random.default_rng(0), 0
    scores = score({str(i): "a" for i in range(60)}, {str(i): ["a"] for i in range(60)})
    for seed in range(100):
        scores.by_image = {"known": rng.exponential(2.0, 60)}
        low, high = bootstrap.intervals(scores, seed)["known"]
        covered += low <= 2.0 <= high
    assert 87 <= covered <= 100
