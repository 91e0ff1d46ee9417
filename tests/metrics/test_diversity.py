import pytest

from attncap.metrics.diversity import diversity


def test_worked_by_hand():
    captions = [["a", "dog", "runs"], ["a", "dog"], ["a"]]
    # Words: a dog runs a dog a, 3 distinct of 6. Pairs: a-dog dog-runs a-dog, 2 distinct of 3.
    assert diversity(captions) == pytest.approx({"distinct-1": 3 / 6, "distinct-2": 2 / 3, "words": 3, "length": 2})
    found = diversity(captions, vocabulary=["a", "dog", "cat", "runs", "red"], training=[["a", "dog"], ["a", "cat"]])
    assert found["vocabulary"] == 3 / 5 and found["new"] == pytest.approx(2 / 3)


def test_captions_without_words():
    found = diversity([[], []], vocabulary=["a"], training=[[]])
    assert found == {"distinct-1": 0, "distinct-2": 0, "words": 0, "vocabulary": 0, "new": 0, "length": 0}


def test_empty_vocabulary_and_training_captions():
    found = diversity([[], []], vocabulary=[], training=[])
    assert (
        found["vocabulary"] == found["distinct-1"] == found["distinct-2"] == found["length"] == 0 and found["new"] == 1
    )
