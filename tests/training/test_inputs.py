"""What a resumed run takes from outside, and what it keeps."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from attncap.data import Example
from attncap.data.vocabulary import Vocabulary
from attncap.errors import UserError
from attncap.training import inputs


def example(name: str, *captions: str) -> Example:
    return Example(name, captions, Path(name))


SPLITS = {
    "train": [example("b.png", "a dog", "a cat"), example("a.png", "a bird"), example("\udce9.png", "a 犬")],
    "val": [example("c.png", "a cat")],
    "test": [example("d.png", "a dog")],
}
WORDS = Vocabulary.build(["a dog", "a cat", "a bird"], 1)


@pytest.fixture
def run(tmp_path):
    inputs.save(tmp_path, WORDS, SPLITS)
    return tmp_path


def test_the_same_images_and_captions(run, caplog):
    began = inputs.load(run)
    assert began.vocabulary.words == WORDS.words
    assert inputs.compare(began, SPLITS, "data") == (SPLITS, False)
    assert not caplog.records


def test_the_runs_own_order_and_splits(run, caplog):
    """A table in another order draws other splits."""
    (b, a, e), [c], [d] = SPLITS.values()
    other = {"train": [e, c, b], "val": [d], "test": [a]}
    assert inputs.compare(inputs.load(run), other, "data") == (SPLITS, False)
    assert caplog.messages == [
        "data: images that are new in the train split, where the run does not use them: 1 (c.png)",
        "data: images that are new in the val split, where the run does not use them: 1 (d.png)",
        "data: images that are new in the test split, where the run does not use them: 1 (a.png)",
    ]


def test_captions_that_have_changed_are_counted(run, caplog):
    edited = {**SPLITS, "val": [example("c.png", "a kitten")]}
    assert inputs.compare(inputs.load(run), edited, "data") == (edited, False)
    b, a, e = SPLITS["train"]
    edited["train"] = [b, replace(a, captions=("a bird", "a bird")), replace(e, captions=("a dog",))]
    assert inputs.compare(inputs.load(run), edited, "data") == (edited, True)
    assert caplog.messages[-2:] == [
        "data: images of the train split whose captions have changed since the run began: 2 (a.png, \\udce9.png)",
        "data: images of the val split whose captions have changed since the run began: 1 (c.png)",
    ]


def test_files_that_have_changed_are_counted(tmp_path, caplog):
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).write_bytes(b"a picture")
    a, b, c = (Example(name, ("a dog",), tmp_path / name) for name in ("a.png", "b.png", "c.png"))
    splits = {"train": [a, b], "val": [c], "test": []}
    inputs.save(tmp_path, WORDS, splits)
    assert inputs.compare(inputs.load(tmp_path), splits, "data") == (splits, False) and not caplog.records
    (tmp_path / "b.png").write_bytes(b"another picture")
    assert inputs.compare(inputs.load(tmp_path), splits, "data") == (splits, False)
    reason = "images of the train split whose files have changed or moved since the run began: 1 (b.png)"
    assert caplog.messages == [f"data: {reason}"]


@pytest.mark.parametrize("split", SPLITS)
def test_other_images_are_refused(run, split):
    for images, message in (
        (SPLITS[split][1:], f"missing since the run began: 1 ({SPLITS[split][0].name})"),
        ([*SPLITS[split], example("new.png", "a dog")], "new since the run began: 1 (new.png)"),
    ):
        with pytest.raises(UserError) as error:
            inputs.compare(inputs.load(run), {**SPLITS, split: images}, "data")
        assert (
            str(error.value)
            == f"cannot resume: data: images that are {message}; restore them as they were, or begin a new run"
        )


def test_another_vocabulary_is_refused(run):
    Vocabulary([*WORDS.words[:4], *reversed(WORDS.words[4:])]).save(run / "vocabulary.json")
    with pytest.raises(UserError, match="vocabulary.json: is not the vocabulary that the run began with"):
        inputs.load(run)
    (run / "vocabulary.json").unlink()
    with pytest.raises(UserError, match="vocabulary.json: cannot be read"):
        inputs.load(run)


def test_runs_of_older_versions(run, caplog):
    (run / "inputs.json").unlink()
    began = inputs.load(run)
    assert began.vocabulary.words == WORDS.words and inputs.compare(began, SPLITS, "data") == (SPLITS, True)
    assert "has no inputs.json, so its images and captions are not compared" in caplog.text
    (run / "vocabulary.json").unlink()
    assert inputs.load(run).vocabulary is None


@pytest.mark.parametrize("images", [None, [], {"train": {}, "val": {}}, {"train": {}, "val": {}, "test": {"a": "0"}}])
def test_a_damaged_record(run, images):
    content = 3 if images is None else {"images": images}
    (run / "inputs.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match='inputs.json: field "images" should have the images of each split'):
        inputs.load(run)
