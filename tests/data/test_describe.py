"""python -m attncap.data, as a user calls it."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
import torchvision
from test_datasets import photograph, write_coco
from test_fuzz import SAMPLES

from attncap.cli.data import CELLS, CHANNELS, convert
from attncap.config import ModelConfig
from attncap.data import read_dataset
from attncap.data.tokenizer import tokenize
from attncap.data.vocabulary import Vocabulary


@pytest.fixture
def describe(attncap):
    return lambda *arguments: attncap("data.__main__", *arguments, "--workers", 2)


@pytest.fixture
def dataset(tmp_path):
    """Ten images, of which 0.jpg is missing and 1.jpg and 2.jpg are broken; the captions of i.jpg have i + 1 words."""
    lines = ["image,caption,split"]
    for i in range(10):
        photograph(tmp_path / f"{i}.jpg")
        split = "val" if i == 8 else "test" if i == 9 else "train"
        lines += [f"{i}.jpg,{'dog ' * i}cat{i % 3},{split}"] * 2
    (tmp_path / "table.csv").write_text("\n".join(lines))
    (tmp_path / "0.jpg").unlink()
    (tmp_path / "1.jpg").write_bytes(b"")
    (tmp_path / "2.jpg").write_bytes(b"no image")
    return tmp_path


def test_a_data_set_in_figures(describe, dataset):
    status, out, err = describe(dataset, "--decode")
    lines = [line.split() for line in out.splitlines()]
    assert status == 0 and lines[0] == ["layout", "a", "table", "of", "captions", "(table.csv)"]
    for row in (["train", "7", "14"], ["val", "1", "2"], ["test", "1", "2"], ["all", "9", "18"]):
        assert row in lines
    # Two captions each of images 1 to 7: dog 2 (1 + ... + 7) = 56 times; cat1 of 1, 4, 7; cat2 of 2, 5; cat0 of 3, 6.
    running = 56 + 6 + 4 + 4
    words = {1: (4, running), 2: (4, running), 3: (4, running), 5: (2, 62), 10: (1, 56)}
    for least, (kept, seen) in words.items():
        assert [str(least), "times", str(kept), f"{seen / running:.2%}"] in lines
    assert ["2", "2", "4", "6", "8", "10", "10"] in lines  # words at 0, 5, 25, 50, 75, 95 and 100 % of 18 captions
    assert f"missing images  1: {dataset / '0.jpg'}" in out
    assert "broken images   2: 1.jpg, 2.jpg" in out
    for name, reason in (("1.jpg", "the file is empty"), ("2.jpg", "not an image")):
        assert any(str(dataset / name) in line and reason in line for line in err.splitlines())
    assert "broken" not in describe(dataset)[1]


def test_words_are_those_a_model_would_learn(describe, flickr8k):
    out = describe(flickr8k, "--seed", 5)[1]
    captions = [caption for example in read_dataset(flickr8k, 5).splits["train"] for caption in example.captions]
    running = Counter(word for caption in captions for word in tokenize(caption))
    for least in (1, 2, 3, 5, 10):
        words = Vocabulary.build(captions, least).words[4:]
        share = np.mean([word in words for word in running.elements()])
        assert [str(least), "times", str(len(words)), f"{share:.2%}"] in [line.split() for line in out.splitlines()]


def test_size_of_a_feature_cache(describe, flickr8k):
    model = ModelConfig()
    with torch.device("meta"):  # shapes alone, no work
        backbone = torchvision.models.get_model(model.encoder)
        features = torch.nn.Sequential(*list(backbone.children())[:-2])(
            torch.zeros(1, 3, model.image_size, model.image_size)
        )
    assert features.shape[1:] == (CHANNELS, CELLS**0.5, CELLS**0.5) and model.grid is None
    assert f"{60 * features.numel() * 2 / 2**20:.0f} MiB" in describe(flickr8k)[1]


def test_shapes(describe):
    out = describe("shapes")[1]
    assert "layout          shapes (synthetic)" in out and ["train", "10,000", "50,000"] in [
        line.split() for line in out.splitlines()
    ]


def content(splits, root):
    """The examples without their names."""
    return {
        split: [(e.path.resolve().relative_to(root), e.captions) for e in examples]
        for split, examples in splits.items()
    }


@pytest.mark.parametrize("place", ["x.jsonl", "images/new/x.jsonl"])
@pytest.mark.parametrize("name", [name for name in SAMPLES if name != "image_info_test2017.json"])
def test_converted_reads_back_the_same(describe, tmp_path, name, place):
    root = tmp_path / "data"
    if SAMPLES[name] is None:
        path = write_coco(root, "train2017", range(9))
    else:
        path = root / name
        path.parent.mkdir()
        path.write_bytes(SAMPLES[name].encode())
    for image in ("a.jpg", "b.JPG", "c.jpg", "2.jpg", "3.jpg", "sub/1.JPG", "val2014/COCO_val2014_1.jpg"):
        photograph(root / image)
    status, out, _ = describe(path, "--convert", root / place, "--seed", 3)
    splits = read_dataset(path, 3).splits
    captions = sum(len(example.captions) for examples in splits.values() for example in examples)
    assert status == 0 and out.startswith(f"wrote {root / place}: {captions} lines\n")
    assert content(read_dataset(root / place, 0).splits, root) == content(splits, root)
    lines = [json.loads(line) for line in (root / place).read_bytes().splitlines()]
    assert {tuple(line) for line in lines} == {("image", "caption", "split")}
    if place == "x.jsonl":  # so that the folder can be moved
        assert not any(line["image"].startswith("/") for line in lines)


def test_converted_beside_lists_reads_back_the_same(describe, tmp_path):
    (tmp_path / "captions.txt").write_text("image,caption\na.jpg,a dog\n2.jpg,a cat\n3.jpg,a bird\n")
    for split, image in (("train", "3.jpg"), ("val", "2.jpg"), ("test", "a.jpg")):
        (tmp_path / f"{split}Images.txt").write_text(f"{image}\n")
        photograph(tmp_path / "Images" / image)
    assert describe(tmp_path, "--convert", tmp_path / "mine.jsonl")[0] == 0
    splits = read_dataset(tmp_path / "mine.jsonl", 0).splits
    assert content(splits, tmp_path) == content(read_dataset(tmp_path, 0).splits, tmp_path)
    status, _, err = describe(tmp_path / "mine.jsonl", "--convert", tmp_path / "mine.jsonl")
    assert status == 2 and "is the data set itself" in err


def test_half_a_character_survives(tmp_path):
    photograph(tmp_path / "1.jpg")
    (tmp_path / "a.jsonl").write_text('{"image": "1.jpg", "caption": "\\ud83d 犬"}')
    convert(read_dataset(tmp_path, 0).splits, tmp_path / "b.jsonl")
    assert read_dataset(tmp_path / "b.jsonl", 0).splits["train"][0].captions == ("\ud83d 犬",)
    assert "犬" in (tmp_path / "b.jsonl").read_text(encoding="utf-8")


def test_coco_test_images_are_described_and_captioned(describe, attncap, trained, tmp_path):
    path = write_coco(tmp_path, "test2017", range(3)).rename(tmp_path / "annotations" / "image_info_test2017.json")
    (tmp_path / "test2017" / "000000000001.jpg").unlink()
    status, out, _ = describe(path, "--decode")
    assert status == 0 and "images without captions" in out and "words" not in out
    status, out, err = attncap("caption", path, "--model", trained, "--workers", 0, "--format", "jsonl")
    assert status == 0 and [json.loads(line)["image"] for line in out.splitlines()] == ["0", "2"]
    assert f"skipped: {tmp_path / 'test2017' / '000000000001.jpg'}: the file does not exist" in err
    for arguments in (
        ["train", "--data", path, "--output", tmp_path / "run"],
        ["data.__main__", path, "--convert", "x.jsonl"],
    ):
        status, _, err = attncap(*arguments)
        assert status in (1, 2) and "no captions" in err and "Traceback" not in err


def test_wrong_calls(describe, dataset, tmp_path):
    nowhere = dataset / "nowhere"
    for arguments, message in (
        ((nowhere,), f'{nowhere}: no such file or folder; give "shapes" or the path of a data set'),
        ((dataset, "--convert", "x.csv"), "--convert x.csv: should be NAME.jsonl"),
        (("shapes", "--convert", "x.jsonl"), "--convert x.jsonl: shapes is synthetic and has no image files to name"),
    ):
        status, out, err = describe(*arguments)
        assert (status, out, err) == (2, "", f"attncap: error: {message}\n")
    (tmp_path / "file").touch()
    target = tmp_path / "file" / "x.jsonl"
    status, _, err = describe(dataset, "--convert", target)
    assert status == 1 and err == f"attncap: error: cannot write {target}: {target.parent} is not a folder\n"
