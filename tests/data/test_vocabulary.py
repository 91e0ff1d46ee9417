import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attncap.data.tokenizer import tokenize
from attncap.data.vocabulary import Vocabulary
from attncap.errors import CallError, UserError

CAPTIONS = ["A dog runs.", "a cat runs", "a bird sings", "<start> a"]


@pytest.fixture
def vocabulary():
    return Vocabulary.build(CAPTIONS, min_count=1)


def test_words_by_decreasing_count_then_alphabet(vocabulary):
    assert vocabulary.words == ["<pad>", "<start>", "<end>", "<unk>", "a", "runs", "bird", "cat", "dog", "sings"]
    assert len(vocabulary) == 10
    assert (Vocabulary.PAD, Vocabulary.START, Vocabulary.END, Vocabulary.UNK) == (0, 1, 2, 3)


def test_rare_words_are_left_out():
    assert Vocabulary.build(iter(CAPTIONS), min_count=2).words[4:] == ["a", "runs"]


def test_encode_cuts_words_and_keeps_the_ends(vocabulary):
    assert vocabulary.encode("A zebra runs!", 50) == [1, 4, 3, 5, 2]
    assert vocabulary.encode("A zebra runs!", 2) == [1, 4, 3, 2]
    assert vocabulary.encode("", 2) == [1, 2]


def test_a_caption_cannot_forge_special_words(vocabulary):
    assert vocabulary.encode("<pad> <end> a", 50) == [1, 3, 3, 4, 2]


def test_decode_stops_at_end_and_skips_specials(vocabulary):
    assert vocabulary.decode([1, 4, 3, 8, 0, 5, 2, 4]) == "a dog runs"
    assert vocabulary.decode([]) == ""


def test_save_and_load(tmp_path):
    vocabulary = Vocabulary.build(["Ein Bär läuft <b>"], min_count=1)
    path = tmp_path / "new" / "vocabulary.json"
    vocabulary.save(path)
    assert Vocabulary.load(path).words == vocabulary.words
    assert "bär" in path.read_text(encoding="utf-8")
    assert [file.name for file in path.parent.iterdir()] == ["vocabulary.json"]


SPECIALS = list(Vocabulary.SPECIALS)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "not a whole JSON file"),
        ('{"words": ["<pad>", "<sta', "not a whole JSON file"),
        ("[" * 100_000, "not a whole JSON file"),
        (b"\xff\xfe", "not UTF-8 text"),
        ("[]", 'field "words" should be a list of words'),
        ('{"words": "a"}', 'field "words" should be a list of words'),
        ('{"words": [1, 2]}', 'field "words" should be a list of words'),
        ('{"words": ["a", "b"]}', '"words" should begin with <pad>, <start>, <end>, <unk>'),
        (json.dumps({"words": [*SPECIALS, "a", "b", "a"]}), "\"words\" has 'a' 2 times"),
        (json.dumps({"words": [*SPECIALS, "\n", "b", "\n"]}), "\"words\" has '\\n' 2 times"),
        (json.dumps({"words": [*SPECIALS, "▁", "\ud800"], "merges": []}), '"words" has an unpaired surrogate'),
        (" " * (2**24 + 1), "cannot be read: larger than 16 MiB"),
    ],
)
def test_wrong_files_are_named(tmp_path, content, reason):
    path = tmp_path / "vocabulary.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        Vocabulary.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: {reason}") and "\n" not in message
    assert message.endswith("copy vocabulary.json again from the trained model, or train again")


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="vocabulary.json: cannot be read: No such file"):
        Vocabulary.load(tmp_path / "vocabulary.json")


def test_a_lone_surrogate_is_saved(tmp_path):
    vocabulary = Vocabulary([*Vocabulary.SPECIALS, "a\ud83d"])
    vocabulary.save(tmp_path / "vocabulary.json")
    assert Vocabulary.load(tmp_path / "vocabulary.json").words == vocabulary.words


# The tutorial's WORDMAP


def test_words_of_a_wordmap_keep_their_order(tmp_path):
    """As create_input_files writes it: words from 1 in no special order, then <unk>, <start>, <end>; <pad> is 0."""
    path = tmp_path / "WORDMAP_coco_5_cap_per_img_5_min_word_freq.json"
    path.write_text('{"a": 2, "man": 1, "words": 3, "<unk>": 4, "<start>": 5, "<end>": 6, "<pad>": 0}')
    vocabulary = Vocabulary.load(path)
    assert vocabulary.words == [*SPECIALS, "man", "a", "words"]
    assert vocabulary.encode("A man, a plan", 9) == [1, 5, 4, 5, 3, 2]
    vocabulary.save(tmp_path / "vocabulary.json")
    assert Vocabulary.load(tmp_path / "vocabulary.json").words == vocabulary.words


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"a": "1", "<start>": 2}, "the id of 'a' should be a whole number"),
        ({"a": True, "<start>": 2}, "the id of 'a' should be a whole number"),
        ({"a": 1, "b": 2, "<start>": 2}, "2 words have the id 2"),
    ],
)
def test_wrong_wordmaps(tmp_path, content, reason):
    path = tmp_path / "WORDMAP.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"{path}: {reason}"):
        Vocabulary.load(path)


def test_tokens_of_a_prefix(vocabulary):
    assert vocabulary.token_ids("A dog, runs") == [4, 8, 5] and vocabulary.token_ids(" ") == []
    for text, word in (("a zebra", "zebra"), ("a <end>", "<end>"), ("<unk> dog", "<unk>")):
        with pytest.raises(CallError, match=f"^'{word}' is not in the vocabulary$"):
            vocabulary.token_ids(text)


def test_suppressed_words(vocabulary):
    assert vocabulary.suppress(["<unk>", "dog"]) == [3, 8]
    for word, reason in (("zebra", "it is not in the vocabulary"), ("<end>", "captions need it to end")):
        with pytest.raises(CallError, match=f"^'{word}' cannot be suppressed: {reason}$"):
            vocabulary.suppress([word])


FILES = [
    {"words": [*SPECIALS, "▁", "a", "b", "▁a", "▁ab"], "merges": ["▁ a", "▁a b"]},
    {"a": 1, "man": 2, "<unk>": 3, "<start>": 4, "<end>": 5, "<pad>": 0},
]
VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.sampled_from("ab ▁\ud800"), max_size=4)


@settings(derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_file_is_a_vocabulary_or_refused(tmp_path, data):
    """One value is replaced, or the end is cut off: what can be loaded can encode."""
    content = json.loads(json.dumps(data.draw(st.sampled_from(FILES))))
    node = data.draw(st.sampled_from([content, *(value for value in content.values() if isinstance(value, list))]))
    key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
    node[key] = data.draw(VALUES | st.lists(VALUES, max_size=2))
    text = json.dumps(content)
    path = tmp_path / "vocabulary.json"
    path.write_text(text[: data.draw(st.integers(0, len(text)) | st.just(len(text)))])
    try:
        vocabulary = Vocabulary.load(path)
    except UserError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
    else:
        assert vocabulary.words[:4] == SPECIALS and vocabulary.encode("a man ab", 9)[-1] == Vocabulary.END


def test_punctuation_of_scripts_without_spaces():
    """It has no spaces around it, and the text is still split into the same words."""
    for caption, text in (
        ("一只 黑狗 ， 在 草地 。", "一只 黑狗，在 草地。"),
        ("「黒い犬」が走る！", "「黒い犬」が走る！"),
        ("བོད་ཡིག", "བོད་ཡིག"),
        ("a dog, black.", "a dog black"),
    ):
        vocabulary = Vocabulary.build([caption], 1)
        assert vocabulary.text(tokenize(caption)) == text
        assert tokenize(text) == tokenize(caption)
