"""The metrics against pycocoevalcap, the official implementation, and against cases worked by hand."""

import math
import random

import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from attncap.data.tokenizer import characters, tokenize
from attncap.errors import UserError
from attncap.metrics import score
from attncap.metrics.bleu import bleu, bleu_statistics
from attncap.metrics.cider import cider
from attncap.metrics.rouge import rouge_l

BLEU = [f"BLEU-{n}" for n in range(1, 5)]
HAND_WRITTEN = {
    "exact": ("a dog runs on the grass", ["a dog runs on the grass", "the dog is running"]),
    "repeated": ("the the the the the the", ["the cat is on the mat", "there is a cat on the mat"]),
    "nothing shared": ("blue sky", ["a dog runs", "a cat sleeps on a red sofa in the sun"]),
    "empty": ("", ["a dog runs", "two dogs"]),
    "empty reference": ("a dog", ["", "a dog runs on the grass"]),
    "both empty": ("", ["", "."]),
    "one word": ("dog", ["dog", "a dog"]),
    "too long": ("a dog runs on the green grass near a red house with a man", ["a dog runs"]),
    "punctuation": ("A man's hat, isn't it?", ["the man's hat is n't red .", "(a hat)"]),
    "tie of lengths": ("a b c d", ["a b c", "a b c d e", "x"]),
}


def official(cases):
    """pycocoevalcap's metrics of the corpus and by image."""
    predictions = {key: [" ".join(tokenize(caption))] for key, (caption, _) in cases.items()}
    references = {key: [" ".join(tokenize(r)) for r in refs] for key, (_, refs) in cases.items()}
    bleus, by_image = Bleu(4).compute_score(references, predictions, verbose=0)
    rouge, rouges = Rouge().compute_score(references, predictions)
    consensus, ciders = Cider().compute_score(references, predictions)
    corpus = {**dict(zip(BLEU, bleus, strict=True)), "ROUGE-L": rouge, "CIDEr": consensus}
    return corpus, {**dict(zip(BLEU, by_image, strict=True)), "ROUGE-L": rouges, "CIDEr": ciders}


def check(cases):
    predictions = {key: caption for key, (caption, _) in cases.items()}
    references = {key: refs for key, (_, refs) in reversed(cases.items())}
    corpus, by_image = official(cases)
    scores = score(predictions, references)
    assert scores.corpus() == pytest.approx(corpus, rel=0, abs=1e-9)
    assert scores.images == list(cases)
    for i, row in enumerate(scores.rows()):
        assert row == pytest.approx({name: values[i] for name, values in by_image.items()}, rel=0, abs=1e-9)


def sentences(seed, images, references=5, words=30, shortest=0):
    rng = random.Random(seed)
    vocabulary = [f"w{i}" for i in range(words)]

    def caption():
        return " ".join(rng.choices(vocabulary, weights=range(words, 0, -1), k=rng.randint(shortest, 14)))

    return {str(i): (caption(), [caption() for _ in range(rng.randint(1, references))]) for i in range(images)}


def test_hand_written_captions_together():
    check(HAND_WRITTEN)


@pytest.mark.parametrize("name", [name for name in HAND_WRITTEN if name != "both empty"])
def test_hand_written_captions_alone(name):
    check({name: HAND_WRITTEN[name]})


def test_no_words_at_all():  # pycocoevalcap's CIDEr crashes here
    expected = {**dict.fromkeys(BLEU, 0), "ROUGE-L": 1, "CIDEr": 0}
    assert score({"1": ""}, {"1": ["."]}).corpus() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("seed", range(20))
def test_random_captions(seed):
    check(sentences(seed, images=1 + 3 * seed, words=3 + 2 * seed))


def test_bleu_worked_by_hand():
    # 3 of 4 words and 1 of 3 pairs match. The closest reference has 5 words, so the penalty is exp(1 - 5/4).
    [statistics] = bleu_statistics([["a", "b", "x", "c"]], [[["a", "b", "y", "c", "z"], ["q"] * 9]])
    assert statistics.tolist() == [[3, 4, 4, 5], [1, 3, 4, 5], [0, 2, 4, 5], [0, 1, 4, 5]]
    values = bleu(statistics)
    penalty = math.exp(-0.25)
    assert values[0] == pytest.approx(penalty * 0.75)
    assert values[1] == pytest.approx(penalty * math.sqrt(0.75 / 3))
    assert values[2] == pytest.approx(0, abs=1e-4)


def test_rouge_worked_by_hand():
    # The longest common subsequence of "a x b c" and "a b c d e" is "a b c": P = 3/4, R = 3/5.
    [value] = rouge_l([["a", "x", "b", "c"]], [[["a", "b", "c", "d", "e"]]])
    assert value == pytest.approx(2.44 * 0.75 * 0.6 / (0.6 + 1.44 * 0.75))


def test_cider_worked_by_hand():
    # Two images without a common word, so the idf of every n-gram is ln 2. "a b" has n-grams of length 1 and 2 and
    # equals its reference: 10 * (1 + 1 + 0 + 0) / 4. "c" shares no word with its reference.
    assert cider([["a", "b"], ["c"]], [[["a", "b"]], [["d"]]]) == pytest.approx([5, 0])


def test_perfect_captions():
    caption = "a small red circle is left of a large blue square"
    other = "two green triangles stand above one yellow cross"
    scores = score({"1": caption, "2": other}, {"1": [caption], "2": [other]})
    assert scores.corpus() == pytest.approx({**dict.fromkeys(BLEU, 1), "ROUGE-L": 1, "CIDEr": 10})


def test_captions_without_spaces_between_words():
    """Characters are compared, as pycocoevalcap does if they are separated; with spaces, words are."""
    cases = {
        "1": ("一只黑狗在跑。", ["一只黑狗在草地上跑。", "黑色的狗跑"]),
        "2": ("一只猫，睡觉", ["一只猫在椅子上睡觉", "白猫"]),
        "3": ("两个人", ["三个人在玩iPad"]),
    }
    spread = {
        key: (" ".join(characters(tokenize(caption))), [" ".join(characters(tokenize(ref))) for ref in refs])
        for key, (caption, refs) in cases.items()
    }
    assert spread["1"][0] == "一 只 黑 狗 在 跑 。" and spread["3"][1] == ["三 个 人 在 玩 ipad"]
    found = score(
        {key: caption for key, (caption, _) in cases.items()}, {key: refs for key, (_, refs) in cases.items()}
    )
    assert found.by_characters and found.corpus() == pytest.approx(official(spread)[0], rel=0, abs=1e-9)
    assert found.corpus()["CIDEr"] > 1
    check(
        {
            "1": ("一只 黑狗 在 跑 。", ["一只 黑狗 在 草地 上 跑 。"]),
            "2": ("หมา สี ดำ", ["หมา สี ดำ วิ่ง บน หญ้า", "ผู้ชาย ขี่ ม้า"]),
        }
    )


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ({}, {}, "no captions to score"),
        ({}, {"1": ["a"]}, "no captions to score"),
        ({"1": "a"}, {}, "image 1 has a caption but no references to score it against"),
        ({"1": "a", "2": "b"}, {"1": ["a"], "2": []}, "image 2 has a caption but no references to score it against"),
        ({"1": "a"}, {"1": ["a"], "3": ["c"], "2": ["b"]}, "2 images with references have no caption, e.g. image 2"),
    ],
)
def test_captions_and_references_of_different_images(predictions, references, message):
    with pytest.raises(UserError) as caught:
        score(predictions, references)
    assert str(caught.value) == message
