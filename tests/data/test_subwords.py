"""Pieces of words: byte-pair encoding against a plain implementation, and vocabularies of pieces."""

import json
import subprocess
import sys
from collections import Counter

import pytest
from conftest import COLORS, TINY, make_flickr8k
from hypothesis import given, settings
from hypothesis import strategies as st

from attncap import Captioner
from attncap.data import subwords
from attncap.data.tokenizer import tokenize
from attncap.data.vocabulary import Vocabulary
from attncap.errors import CallError, UserError

CAPTIONS = [
    "Ein Hunderennen im Schnee .",
    "Die Hunde rennen im Schneesturm .",
    "Ein Hund , ein Rennen , Hunde",
    "ein Rennhund rennt , Hunde rennen",
    "犬が走る 犬が",
    "( ) < > / - ' ä",
]


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary.build(CAPTIONS, min_count=2, pieces=70)


def test_merges_worked_by_hand():
    # "ab" occurs five times, in both words; then the only pair seen often enough is ▁ab, three times.
    pieces, merges = subwords.learn({"ab": 3, "cab": 2, "d": 1}, pieces=20, min_count=3)
    assert merges == ["a b", "▁ ab"] and pieces == ["a", "b", "c", "d", "▁", "ab", "▁ab"]
    encoder = subwords.BpeEncoder({piece: i for i, piece in enumerate(["<unk>", *pieces])}, merges)
    assert encoder.split(["ab", "cab", "zydab"]) == ["▁ab", "▁", "c", "ab", "▁", "<unk>", "d", "ab"]
    assert subwords.learn({"ab": 3, "cab": 2, "d": 1}, pieces=6, min_count=3)[1] == ["a b"]


def test_merges_are_of_the_most_frequent_pair(vocabulary):
    """Sennrich's algorithm, written plainly: no pair is more frequent than the one that is merged."""
    counts = Counter(word for caption in CAPTIONS for word in tokenize(caption))
    words = {word: ["▁", *word] for word in counts}
    for merge in vocabulary.merges:
        pairs = Counter()
        for word, pieces in words.items():
            for pair in zip(pieces, pieces[1:], strict=False):
                pairs[" ".join(pair)] += counts[word]
        assert pairs[merge] == max(pairs.values()) >= 2
        a, b = merge.split(" ")
        for pieces in words.values():
            for i in range(len(pieces) - 2, -1, -1):
                if pieces[i : i + 2] == [a, b]:
                    pieces[i : i + 2] = [a + b]
    encoder = subwords.BpeEncoder({piece: i for i, piece in enumerate(vocabulary.words)}, vocabulary.merges)
    assert {word: encoder.split([word]) for word in words} == words
    assert len(vocabulary.merges) > 10 and len(vocabulary) <= 74


def test_the_same_captions_give_the_same_pieces_in_every_process():
    script = (
        "from attncap.data.vocabulary import Vocabulary\n"
        f"v = Vocabulary.build({CAPTIONS!r}, 1, 25)\n"
        "print(ascii([v.words, v.merges]))"
    )
    outputs = {subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout for _ in range(2)}
    assert len(outputs) == 1 and b"<unk>" in outputs.pop()


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from("ehindrsuc HÄ犬が走 .,'-()<>/"), max_size=40) | st.sampled_from(CAPTIONS))
def test_what_is_encoded_is_decoded(vocabulary, text):
    ids = vocabulary.encode(text, 1000)
    assert ids[0] == Vocabulary.START and ids[-1] == Vocabulary.END
    if Vocabulary.UNK not in ids:
        assert vocabulary.decode(ids) == " ".join(tokenize(text))


def test_unknown_characters_and_special_words(vocabulary):
    assert "<unk>" in [vocabulary.words[i] for i in vocabulary.encode("ein zoo", 50)]
    assert vocabulary.decode(vocabulary.encode("ein zoo im 公園", 50)) == "ein im"
    forged = vocabulary.encode("<end> <pad> ein <end>x", 50)
    assert forged.count(Vocabulary.END) == 1 and Vocabulary.PAD not in forged
    assert vocabulary.encode("a\ud83d", 50)[-1] == Vocabulary.END
    for pieces in (5, 30, 200):
        built = Vocabulary.build(["<end> x<end>x <<end>> <pad>"] * 9 + CAPTIONS + ["a\ud83d"], 1, pieces)
        assert len(set(built.words)) == len(built.words) <= 4 + pieces


def test_pieces_are_cut_at_the_maximum_length(vocabulary):
    whole = vocabulary.encode("Die Hunde rennen im Schneesturm", 50)
    assert vocabulary.encode("Die Hunde rennen im Schneesturm", 3) == [*whole[:4], Vocabulary.END]


@pytest.mark.parametrize(
    ("pieces", "words", "firsts"),
    [
        (["▁ein", "▁hund", "e", "rennen"], ["ein", "hunderennen"], [0, 1]),
        (["e", "▁", "▁", "in", "▁s", "o"], ["e", "in", "so"], [0, 3, 4]),  # a model may write these
        (["▁"], [], []),
        (["▁▁", "▁a"], ["a"], [1]),  # a caption may contain the mark itself
        ([], [], []),
    ],
)
def test_words_that_pieces_spell(pieces, words, firsts):
    assert subwords.spell(pieces) == words and subwords.first_pieces(pieces) == firsts


def test_saved_in_one_file(vocabulary, tmp_path, monkeypatch):
    path = tmp_path / "vocabulary.json"
    vocabulary.save(path)
    assert '"▁hunde"' in path.read_text(encoding="utf-8") and '"▁hund e"' in path.read_text(encoding="utf-8")
    loaded = Vocabulary.load(path)
    assert (loaded.words, loaded.merges) == (vocabulary.words, vocabulary.merges)
    assert loaded.encode(CAPTIONS[0], 50) == vocabulary.encode(CAPTIONS[0], 50)

    # Reading and decoding work without the library; encoding says what is missing.
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    loaded = Vocabulary.load(path)
    assert loaded.decode(vocabulary.encode(CAPTIONS[0], 50)) == "ein hunderennen im schnee"
    for work in (lambda: loaded.encode("ein", 9), lambda: Vocabulary.build(CAPTIONS, 1, 50)):
        with pytest.raises(CallError, match=r"needs the tokenizers library; pip install 'attncap\[subwords\]'"):
            work()


@pytest.mark.parametrize("merges", ["a b", [1], ["ab"], ["a b c"], ["a c"], ["a  b"]])
def test_wrong_merges(tmp_path, merges):
    path = tmp_path / "vocabulary.json"
    path.write_text(json.dumps({"words": [*Vocabulary.SPECIALS, "a", "b", "ab", "c"], "merges": merges}))
    with pytest.raises(UserError, match=f'{path}: field "merges" should be a list of pairs of "words"'):
        Vocabulary.load(path)
    path.write_text(json.dumps({"words": [*Vocabulary.SPECIALS, "a", "b", "ab", "c"], "merges": ["a b"]}))
    assert Vocabulary.load(path).encode("cab", 9) == [1, 3, 7, 6, 2]


def test_tokens_of_a_prefix(vocabulary):
    assert vocabulary.token_ids("Ein hunderennen") == vocabulary.encode("Ein hunderennen", 50)[1:-1]
    with pytest.raises(CallError, match="^'zoo' is not in the vocabulary$"):
        vocabulary.token_ids("ein zoo im")


def test_the_error_for_a_word_that_is_no_piece_names_the_piece(vocabulary):
    assert vocabulary.suppress(["▁hunde"]) == [vocabulary.words.index("▁hunde")]
    with pytest.raises(CallError, match="'hunde' cannot be suppressed.*; '▁hunde' is"):
        vocabulary.suppress(["hunde"])


UNSPACED = {  # names of colours, and captions
    "zh": (("红", "绿", "蓝"), ("一张{}色的图片。", "这张图片，全是{}色的。")),
    "th": (("แดง", "เขียว", "น้ำเงิน"), ("รูปภาพสี{}", "ภาพนี้เป็นสี{}ทั้งหมด")),
}


@pytest.mark.slow
@pytest.mark.parametrize("language", UNSPACED)
def test_captions_without_spaces_between_words(attncap, tmp_path, language):
    """A model of subwords writes them as they are in the training data, and CIDEr compares their characters."""
    data, (names, sentences) = make_flickr8k(tmp_path / "data"), UNSPACED[language]
    captions = [[sentence.format(name) for sentence in sentences] for name in names]
    lines = [f"{i:03d}.png,{caption}" for i in range(60) for caption in captions[i % len(COLORS)]]
    (data / "captions.txt").write_text("\n".join(["image,caption", *lines]), encoding="utf-8")
    output = tmp_path / "run"
    run = ("train", "--data", data, "--output", output, *TINY, "--epochs", 8)
    status, out, _ = attncap(*run, "--subwords", 60)
    assert status == 0 and "so words are characters in all figures" in out
    scores = json.loads((output / "test.json").read_text())
    assert scores["CIDEr"] > 5 and scores["BLEU-4"] > 0.9
    found = Captioner.from_pretrained(output).caption(sorted((data / "Images").iterdir())[:6])
    assert all(caption.text in captions[i % 3] for i, caption in enumerate(found))


def test_vocabularies_of_clauses_are_reported(tmp_path, caplog):
    """Without subwords."""
    from attncap.training.config import DataConfig
    from attncap.training.run import find_vocabulary

    config = DataConfig(path="zh", min_count=1)
    find_vocabulary(config, ["一张红色的图片。"])
    assert "have no spaces between words, so each clause is one word; use --subwords 4000" in caplog.text
    caplog.clear()
    find_vocabulary(config, ["一张 红色 的 图片 。", "a red picture"])
    assert not caplog.text
