"""Reading and writing results files, and the seed of a model's training."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attncap.errors import UserError
from attncap.evaluation import image_id, read_results, summary
from attncap.metrics import score
from attncap.report import as_text
from attncap.training.config import training_seed

# Any JSON value, and values close to COCO's results.
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["image_id", "caption", "x"]), inner),
    max_leaves=20,
)
RESULTS = st.lists(
    st.fixed_dictionaries({"image_id": st.integers(0, 9) | st.text(max_size=2) | JSON, "caption": st.text() | JSON})
)


@settings(max_examples=300, deadline=None)
@given(content=st.binary() | st.text().map(str.encode) | (JSON | RESULTS).map(lambda value: json.dumps(value).encode()))
def test_any_results_file_is_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzzed.json"
    path.write_bytes(content)
    try:
        captions = read_results(path)
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert captions == {str(entry["image_id"]): entry["caption"] for entry in json.loads(content)}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[", "not a whole JSON file"),
        ("[" * 100_000, "not a whole JSON file"),
        ("[]", "empty"),
        ('[{"caption": "a"}]', 'field "image_id" of entry 0'),
        ('[{"image_id": 1, "caption": "a"}, {"image_id": 2, "caption": null}]', 'field "caption" of entry 1'),
        ('[{"image_id": true, "caption": "a"}]', 'field "image_id" of entry 0'),
        ("[7]", 'field "image_id" of entry 0'),
        ('{"image_id": 1}', "expected"),
        ('[{"image_id": 1, "caption": "a"}, {"image_id": 1, "caption": "b"}]', "twice"),
        ('[{"image_id": "1", "caption": "a"}, {"image_id": 1, "caption": "b"}]', "image id 1 occurs twice"),
        (
            '[{"image_id": "a\\n", "caption": "a"}, {"image_id": "a\\n", "caption": "b"}]',
            r"image id 'a\\n' occurs twice",
        ),
    ],
)
def test_invalid_results_files(tmp_path, content, reason):
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(UserError, match=f"{path}: .*{reason}"):
        read_results(path)


def test_image_ids_are_integers_only_where_these_read_the_same():
    assert [image_id(name) for name in ("391895", "0", "007", "٣", "a.jpg")] == [391895, 0, "007", "٣", "a.jpg"]


def test_the_seed_of_a_models_training(trained, tmp_path):
    assert training_seed(trained) == 0 and training_seed(tmp_path) == 0
    (tmp_path / "settings.json").write_text('{"settings": {"seed": 7}}')
    assert training_seed(tmp_path) == 7  # as older versions wrote it
    for broken in ('{"settings"', '{"settings": {}}', '{"settings": {"seed": "7"}}', "[]"):
        (tmp_path / "settings.json").write_text(broken)
        with pytest.raises(UserError, match=r"settings\.json: (not a whole JSON file|field \"(settings|seed)\")"):
            training_seed(tmp_path)


def report_of(captions, references):
    return as_text(summary(score(captions, references), captions, None, None))


def test_the_report_says_why_cider_is_0():
    for captions, references in (
        ({"1": "a dog"}, {"1": ["a dog", "the dog"]}),  # one image, all of whose words are in every image's references
        ({"1": "a dog", "2": "a dog"}, {"1": ["a dog"], "2": ["a dog"]}),
        ({"1": "a cat", "2": "a dog"}, {"1": ["a dog"], "2": ["a cat"]}),
    ):
        assert "CIDEr is 0: no caption shares words with its references, apart from" in report_of(captions, references)
    assert "CIDEr is 0" not in report_of({"1": "a dog", "2": "a cat"}, {"1": ["a dog"], "2": ["a cat"]})
