import shutil

import pytest
from pycocoevalcap.meteor.meteor import Meteor

from attncap.metrics import java, score

CAPTIONS = {"1": "A dog runs on the grass.", "2": "two men, playing chess"}
REFERENCES = {"1": ["A dog is running over green grass.", "the dog runs"], "2": ["Two men play chess in a park."]}


@pytest.mark.skipif(shutil.which("java") is None, reason="no Java on the PATH")
def test_meteor_is_pycocoevalcaps():
    texts = {"1": ["a dog runs on the grass"], "2": ["two men playing chess"]}
    refs = {"1": ["a dog is running over green grass", "the dog runs"], "2": ["two men play chess in a park"]}
    total, by_image = Meteor().compute_score(refs, texts)
    assert "METEOR" not in java.left_out()
    scores = score(CAPTIONS, REFERENCES, ["METEOR"])
    assert scores.figures()["METEOR"] == total and [row["METEOR"] for row in scores.rows()] == by_image


def test_what_cannot_run_is_named_with_the_reason(monkeypatch, caplog):
    monkeypatch.setattr(java, "find_java", lambda: None)
    assert all("no Java" in java.left_out()[name] for name in ("METEOR", "SPICE"))
    monkeypatch.setattr(java, "find_spec", lambda name: None)
    assert all("pycocoevalcap is not installed" in java.left_out()[name] for name in ("METEOR", "SPICE"))


def test_java_that_fails_costs_only_its_own_figure(monkeypatch, caplog, tmp_path):
    (tmp_path / "java").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(java, "find_java", lambda: tmp_path / "java")
    scores = score(CAPTIONS, REFERENCES, ["METEOR"])
    assert list(scores.figures()) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr"]
    [record] = caplog.records
    assert "METEOR left out: its Java program failed" in record.getMessage()
