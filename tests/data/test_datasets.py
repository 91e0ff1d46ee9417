import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from pycocotools.coco import COCO

from attncap.data import Example, Skipped, open_dataset, read_dataset, report_skipped
from attncap.data.dataset import MAX_WARNINGS
from attncap.data.readers import coco
from attncap.data.readers.splits import draw_splits
from attncap.errors import CallError, UserError


def photograph(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 2), "red").save(path)


def names(splits):
    return {split: [example.name for example in examples] for split, examples in splits.items()}


def failure(path):
    with pytest.raises(UserError) as caught:
        open_dataset(path, 0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def flickr8k(tmp_path):
    """Ten images, 0.jpg to 9.jpg, with two captions each."""
    lines = ["image,caption"]
    for i in range(10):
        photograph(tmp_path / "Images" / f"{i}.jpg")
        lines += [f"{i}.jpg,A dog number {i} .", f'{i}.jpg,"A ""big"" dog, a cat"']
    (tmp_path / "captions.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.fixture
def coco_2017(tmp_path):
    """Six images in train and four in val, with two captions each."""
    for folder, ids in (("train2017", range(6)), ("val2017", range(100, 104))):
        write_coco(tmp_path, folder, ids)
    return tmp_path


def write_coco(root, folder, ids):
    content = {"images": [], "annotations": []}
    for i in ids:
        photograph(root / folder / f"{i:012d}.jpg")
        content["images"].append({"id": i, "file_name": f"{i:012d}.jpg"})
        for j in range(2):
            content["annotations"].append({"id": 10 * i + j, "image_id": i, "caption": f"A dog {i}.\n"})
    return write_json(root, folder, content)


def write_json(root, folder, content):
    path = root / "annotations" / f"captions_{folder}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


# Common to all layouts


def test_no_such_path(tmp_path):
    with pytest.raises(CallError) as caught:
        open_dataset(tmp_path / "x", 0)
    assert str(caught.value) == f'{tmp_path / "x"}: no such file or folder; give "shapes" or the path of a data set'


def test_not_a_data_set_says_what_was_expected_and_found(tmp_path):
    expected = (
        "captions.txt or Flickr8k.token.txt beside the images' folder (Flickr8k); "
        "results.csv or results_20130124.token beside the images' folder (Flickr30k); "
        "one .csv, .tsv or .jsonl file of image, caption and perhaps split (your own); "
        "annotations/captions_*.json beside folders such as train2017/ (COCO); "
        "dataset_coco.json, dataset_flickr8k.json or dataset_flickr30k.json beside the images' folder (Karpathy)"
    )

    def message(found):
        return f"{tmp_path}: not a data set; found {found}; expected one of: {expected}"

    assert failure(tmp_path) == message("an empty folder")
    (tmp_path / "a").mkdir()
    for name in "bcdefg":
        (tmp_path / name).touch()
    assert failure(tmp_path) == message("a/, b, c, d, e and 2 more")
    assert "not a data set; found a file; expected" in failure(tmp_path / "b")


@pytest.mark.parametrize(("count", "sizes"), [(0, (0, 0, 0)), (2, (2, 0, 0)), (3, (1, 1, 1)), (50, (40, 5, 5))])
def test_drawn_splits_share_no_image(count, sizes):
    splits = draw_splits(range(count), seed=3)
    assert tuple(len(splits[split]) for split in ("train", "val", "test")) == sizes
    assert sorted(sum(splits.values(), [])) == list(range(count))


def test_splits_depend_on_the_seed():
    assert draw_splits(range(50), seed=1) == draw_splits(range(50), seed=1)
    assert draw_splits(range(50), seed=1) != draw_splits(range(50), seed=2)


def test_folders_are_listed_instead_of_asking_for_every_file(flickr8k, monkeypatch):
    looked_at = []
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **rest: looked_at.append(str(path)) or stat(path, **rest))
    open_dataset(flickr8k, 0)
    assert looked_at and not any(path.endswith(".jpg") for path in looked_at)


def test_shapes_are_generated_by_their_own_module(monkeypatch):
    from attncap.data import shapes

    monkeypatch.setattr(shapes, "open_shapes", lambda seed: {"train": [seed]})
    assert read_dataset("shapes", 5).splits == {"train": [5]}


# Flickr8k


def test_flickr8k(flickr8k):
    splits = open_dataset(str(flickr8k), seed=0)
    assert {split: len(examples) for split, examples in splits.items()} == {"train": 8, "val": 1, "test": 1}
    example = splits["train"][0]
    assert example.captions == (f"A dog number {example.name[0]} .", 'A "big" dog, a cat')
    assert example.path == flickr8k / "Images" / example.name
    assert example.image().mode == "RGB"


def test_flickr8k_as_written_on_other_systems(flickr8k):
    (flickr8k / "Images").rename(flickr8k / "images")
    text = "\ufeffImage, Caption\r\n1.jpg,Ein Bär, der läuft\r\n\r\n2.jpg,ok\r\n3.jpg,last"
    (flickr8k / "captions.txt").write_bytes(text.encode())
    splits = open_dataset(flickr8k, seed=0)
    captions = {example.name: example.captions for split in splits.values() for example in split}
    assert captions == {"1.jpg": ("Ein Bär, der läuft",), "2.jpg": ("ok",), "3.jpg": ("last",)}


@pytest.mark.parametrize(
    "lists",
    [
        ("trainImages.txt", "valImages.txt", "testImages.txt"),
        ("trainImages.txt", "devImages.txt", "testImages.txt"),
        ("Flickr_8k.trainImages.txt", "Flickr_8k.devImages.txt", "Flickr_8k.testImages.txt"),
    ],
)
def test_flickr8k_lists(flickr8k, caplog, lists):
    for name, content in zip(lists, ("3.jpg\r\n1.jpg\r\n1.jpg\r\n", "2.jpg\n\n", "4.jpg\nx.jpg"), strict=True):
        (flickr8k / name).write_text(content)
    assert names(open_dataset(flickr8k, 0)) == {"train": ["3.jpg", "1.jpg"], "val": ["2.jpg"], "test": ["4.jpg"]}
    unlisted = [f"skipped: {i}.jpg: in none of the lists ({', '.join(lists)})" for i in (0, 5, 6, 7, 8, 9)]
    assert caplog.messages == [f"skipped: x.jpg: listed in {flickr8k / lists[2]}, but without captions", *unlisted]


def test_flickr8k_wrong_lists(flickr8k):
    (flickr8k / "trainImages.txt").write_text("1.jpg\n2.jpg\n")
    assert failure(flickr8k) == (
        f"{flickr8k}: valImages.txt is missing beside the other lists (trainImages.txt); add it, or remove the lists "
        "to have the splits drawn"
    )
    (flickr8k / "valImages.txt").write_text("2.jpg\n")
    (flickr8k / "testImages.txt").write_text("x.jpg\n")
    message = f"{flickr8k / 'valImages.txt'}: 2.jpg is in trainImages.txt too; remove it from one"
    assert failure(flickr8k) == message
    (flickr8k / "valImages.txt").write_text("3.jpg\n")
    message = f"{flickr8k / 'testImages.txt'}: none of its 1 names has captions and an image"
    assert failure(flickr8k) == message


def test_flickr8k_missing_images_are_reported(flickr8k, caplog):
    caplog.set_level(logging.WARNING, "attncap")
    for i in range(6):
        (flickr8k / "Images" / f"{i}.jpg").unlink()
    splits = open_dataset(flickr8k, 0)
    assert sorted(sum(names(splits).values(), [])) == ["6.jpg", "7.jpg", "8.jpg", "9.jpg"]
    missing = [flickr8k / "Images" / f"{i}.jpg" for i in range(6)]
    assert caplog.messages == [f"skipped: {path}: the file does not exist" for path in missing]


def test_flickr8k_without_any_image(flickr8k):
    for path in (flickr8k / "Images").iterdir():
        path.unlink()
    assert failure(flickr8k) == (
        f"{flickr8k / 'captions.txt'}: none of the 10 images it names exist, e.g. "
        f"{flickr8k / 'Images' / '0.jpg'}; put the images in that folder, or give theirs with --images"
    )
    (flickr8k / "Images").rmdir()
    assert f"e.g. {flickr8k / '0.jpg'}; put the images in that folder" in failure(flickr8k)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", 'line 1 should be "image,caption" or "image,caption,split", found ""'),
        (b"1.jpg,A dog\n", 'line 1 should be "image,caption" or "image,caption,split", found "1.jpg,A dog"'),
        (b"image,caption\n", "no captions in it"),
        (
            b"image,caption\n1.jpg,a\n2.jpg\n",
            "line 3 is not image,caption: '2.jpg'",
        ),
        (b"image,caption\n,a\n", "line 2 is not image,caption: ',a'"),
        (
            b'image,caption\n1.jpg,"a dog\n2.jpg,a cat\n',
            "the caption that ends on line 3 spans several lines; close its quotation mark",
        ),
        (b"image,caption\n1.jpg,\xff\n", "not UTF-8 text (byte 20); save it as UTF-8"),
        (b"image,caption\n1.jpg," + b"a" * 200_000, "line 2: field larger than field limit (131072)"),
    ],
)
def test_flickr8k_wrong_captions_file(flickr8k, content, reason):
    (flickr8k / "captions.txt").write_bytes(content)
    assert failure(flickr8k) == f"{flickr8k / 'captions.txt'}: {reason}"


def test_flickr8k_empty_captions_are_reported(flickr8k, caplog):
    (flickr8k / "captions.txt").write_text("image,caption\n1.jpg,a\n1.jpg,\n2.jpg, \n")
    assert sum(names(open_dataset(flickr8k, 0)).values(), []) == ["1.jpg"]
    lines = [f"line {number} of {flickr8k / 'captions.txt'}" for number in (3, 4)]
    assert caplog.messages == [f"skipped: {line}: the caption is empty" for line in lines]


def test_identity_changes_with_the_file(tmp_path):
    example = Example("1", (), tmp_path / "1.jpg")
    missing = example.identity()
    photograph(example.path)
    before = example.identity()
    example.path.write_bytes(b"other")
    assert len({missing, before, example.identity(), Example("2", (), tmp_path / "2.jpg").identity()}) == 4
    assert Example("1", ("a dog",), tmp_path / "." / "1.jpg").identity() == example.identity()
    assert example.scene is None and Example("1", (), Path("\0")).identity()


def test_data_sets_are_read_without_torch_and_images_without_torchvision(flickr8k):
    script = (
        "import sys\n"
        "from attncap.data import read_dataset, vocabulary, feature_size\n"
        "example = read_dataset(sys.argv[1], 0).splits['train'][0]\n"
        "example.image(), example.identity()\n"
        "assert not {'torch', 'torchvision', 'pycocotools'} & sys.modules.keys()\n"
        "from attncap.data.loader import Pictures\n"
        "assert Pictures([example], 8)[0][1].shape == (3, 8, 8) and 'torchvision' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script, flickr8k], check=True)


def test_what_is_skipped_is_reported_once_and_many_share_a_line(caplog):
    missing = [Skipped(None, f"{i}.jpg", "the file does not exist") for i in range(MAX_WARNINGS + 1)]
    report_skipped([*missing, Skipped(3, "a\nb.jpg", "the file is empty")])
    assert caplog.messages == [
        "skipped: 0.jpg, 1.jpg, 2.jpg and 8 more: the file does not exist",
        "skipped: a b.jpg: the file is empty",
    ]
    caplog.clear()
    seen = set()
    for epoch in range(2):
        report_skipped([replace(item, index=epoch) for item in missing[:2]], seen)
    assert caplog.messages == [f"skipped: {i}.jpg: the file does not exist" for i in range(2)]


# COCO


def test_coco_train_and_val(coco_2017, capsys):
    splits = names(open_dataset(coco_2017, seed=0))
    assert splits["train"] == ["0", "1", "2", "3", "4", "5"]
    assert len(splits["val"]) == len(splits["test"]) == 2
    assert sorted(splits["val"] + splits["test"]) == ["100", "101", "102", "103"]
    assert capsys.readouterr().out == ""
    assert any(names(open_dataset(coco_2017, seed=seed)) != splits for seed in range(1, 10))


def test_coco_example(coco_2017):
    example = open_dataset(coco_2017, seed=0)["train"][3]
    assert example.captions == ("A dog 3.", "A dog 3.")
    assert example.path == coco_2017 / "train2017" / "000000000003.jpg"
    assert example.image().size == (2, 2)


def test_coco_as_pycocotools_reads_it(tmp_path):
    """Captions of different images in turn, in no order of their ids."""
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in (7, 300, 5)]
    annotations = [{"id": 20 - i, "image_id": (5, 7, 300)[i % 3], "caption": f"A dog {i} ."} for i in range(8)]
    for image in images:
        photograph(tmp_path / "val2014" / image["file_name"])
    path = write_json(tmp_path, "val2014", {"images": images, "annotations": annotations})
    expected = COCO(path)
    examples = [example for part in open_dataset(path, seed=0).values() for example in part]
    assert sorted(int(example.name) for example in examples) == sorted(expected.getImgIds())
    for example in examples:
        [image], captions = expected.loadImgs(int(example.name)), expected.imgToAnns[int(example.name)]
        assert example.path == tmp_path / "val2014" / image["file_name"]
        assert list(example.captions) == [annotation["caption"] for annotation in captions]
    assert coco.read_captions(path) == {example.name: list(example.captions) for example in examples}


def test_coco_one_file(coco_2017):
    path = coco_2017 / "annotations" / "captions_train2017.json"
    splits = open_dataset(path, seed=0)
    assert {split: len(examples) for split, examples in splits.items()} == {"train": 4, "val": 1, "test": 1}
    (coco_2017 / "annotations" / "captions_val2017.json").unlink()
    assert names(open_dataset(coco_2017, seed=0)) == names(splits)


def test_coco_missing_images_and_stray_captions_are_reported(coco_2017, caplog):
    path = coco_2017 / "annotations" / "captions_val2017.json"
    content = json.loads(path.read_text())
    content["annotations"].append({"id": 9, "image_id": 7, "caption": "stray"})
    content["images"].append({"id": 8, "file_name": "8.jpg"})  # has no captions
    path.write_text(json.dumps(content))
    gone = coco_2017 / "val2017" / "000000000100.jpg"
    gone.unlink()
    splits = names(open_dataset(coco_2017, 0))
    assert sorted(splits["val"] + splits["test"]) == ["101", "102", "103"]
    assert caplog.messages == [
        f'skipped: image id 7: {path} has captions of it, but no entry in "images"',
        f"skipped: image id 8: {path} has no captions of it",
        f"skipped: {gone}: the file does not exist",
    ]


def test_coco_two_years_in_one_folder(coco_2017):
    write_coco(coco_2017, "train2014", range(2))
    assert failure(coco_2017) == (
        f"{coco_2017 / 'annotations'}: expected one captions_train*.json and one captions_val*.json, found "
        "captions_train2014.json, captions_train2017.json, captions_val2017.json; give the path of one "
        "file, or move the others away"
    )


def test_coco_without_images(tmp_path):
    path = write_coco(tmp_path, "val2014", range(3))
    for photo in (tmp_path / "val2014").iterdir():
        photo.unlink()
    first = tmp_path / "val2014" / "000000000000.jpg"
    assert failure(tmp_path) == (
        f"{path}: none of the 3 images it names exist, e.g. {first}; put the images in that folder, "
        "or give theirs with --images"
    )
    (tmp_path / "val2014").rmdir()
    assert f"e.g. {first}; put the images in that folder, or" in failure(tmp_path)


IMAGE = {"id": 1, "file_name": "1.jpg"}
CAPTION = {"id": 1, "image_id": 1, "caption": "a"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "not a whole JSON file: Expecting value: line 1 column 1 (char 0)"),
        ('{"images": [{"id', "not a whole JSON file: Unterminated string starting at: line 1 column 14 (char 13)"),
        ([], 'field "annotations" should be a list with entries, as in COCO\'s files'),
        ({"images": [IMAGE]}, 'field "annotations" should be a list with entries, as in COCO\'s files'),
        ({"annotations": []}, 'field "annotations" should be a list with entries, as in COCO\'s files'),
        ({"annotations": [CAPTION]}, 'field "images" should be a list with entries, as in COCO\'s files'),
        ({"annotations": [CAPTION, 3]}, 'field "id" of annotations[1] is missing or of the wrong type'),
        (
            {"annotations": [{"id": 1, "image_id": 1}], "images": [IMAGE]},
            'field "caption" of annotations[0] is missing or of the wrong type',
        ),
        (
            {"annotations": [{**CAPTION, "image_id": [1]}], "images": [IMAGE]},
            'field "image_id" of annotations[0] is missing or of the wrong type',
        ),
        (
            {"annotations": [CAPTION], "images": [{"id": 1}]},
            'field "file_name" of images[0] is missing or of the wrong type',
        ),
        (
            {"annotations": [{**CAPTION, "image_id": 2}], "images": [IMAGE]},
            'no caption belongs to an image of field "images"',
        ),
    ],
)
def test_coco_wrong_files(tmp_path, content, reason):
    photograph(tmp_path / "val2017" / "1.jpg")
    path = write_json(tmp_path, "val2017", content)
    assert failure(tmp_path) == f"{path}: {reason}"


def test_coco_references_alone(tmp_path, caplog):
    path = write_json(tmp_path, "val2017", {"annotations": [CAPTION, {**CAPTION, "id": 2, "caption": "b"}]})
    assert coco.read_captions(path) == {"1": ["a", "b"]}
    blank = [{**CAPTION, "id": 3, "caption": " \n"}, {**CAPTION, "id": 4, "image_id": 2, "caption": ""}]
    path = write_json(tmp_path, "val2017", {"annotations": [CAPTION, *blank]})
    assert coco.read_captions(path) == {"1": ["a"]}
    assert caplog.messages == [f"skipped: image id {key}: {path} has a caption of it without a word" for key in (1, 2)]
    with pytest.raises(UserError, match="x.json: cannot be read: No such file or directory"):
        coco.read_captions(tmp_path / "x.json")
