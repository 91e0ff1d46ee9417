"""More layouts than in test_datasets.py: small samples with the oddities of the real files."""

import json
import os
import shutil
from pathlib import Path

import pytest
from test_datasets import failure, names, photograph, write_coco

from attncap.data import Skipped, open_dataset, read_dataset
from attncap.data.image_folders import find_images
from attncap.errors import CallError


@pytest.fixture
def tmp_path(tmp_path):
    """A folder with no others beside it: these are searched for the images and lists of a file that is given."""
    (tmp_path / "alone").mkdir()
    return tmp_path / "alone"


def captions(splits):
    return {example.name: example.captions for examples in splits.values() for example in examples}


def write(path, content: str | bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def photographs(folder, *images):
    for image in images:
        photograph(folder / image)


# Flickr8k and Flickr30k

# Both files are real: captions with quotation marks and commas, a name without an image, no newline at the end.
TOKENS = (
    'a.jpg#0\tA " quoted " dog , running .\r\na.jpg#1\tEin Bär\u2028läuft\r\n\r\n'
    "b.JPG#0\tA cat #1 .\nc.jpg#0\tdog\n2258277193_586949ec62.jpg.1#0\tA man\nc.jpg#1\tlast"
)
TOKEN_CAPTIONS = {"a.jpg": ('A " quoted " dog , running .', "Ein Bär\u2028läuft"), "b.JPG": ("A cat #1 .",)}
TOKEN_CAPTIONS["c.jpg"] = ("dog", "last")
RESULTS = (
    "\ufeffimage_name| comment_number| comment\na.jpg| 0| A \"dog , running .\na.jpg| 1| A 'cat' | a bird\n"
    "b.JPG| 4   A dog runs across the grass .\nc.jpg| 0| last"
)
RESULTS_CAPTIONS = {
    "a.jpg": ('A "dog , running .', "A 'cat' | a bird"),
    "b.JPG": ("A dog runs across the grass .",),
    "c.jpg": ("last",),
}


@pytest.mark.parametrize("images", ["Flicker8k_Dataset", "Flickr8k_Dataset/Flicker8k_Dataset", "images", "."])
@pytest.mark.parametrize("text", ["Flickr8k.token.txt", "Flickr8k_text/Flickr8k.token.txt"])
def test_original_flickr8k(tmp_path, text, images):
    source = write(tmp_path / text, TOKENS)
    photographs(tmp_path / images, "a.jpg", "b.JPG", "c.jpg", "unnamed.jpg")
    for name, image in (("train", "c.jpg"), ("dev", "a.jpg"), ("test", "b.JPG")):
        write(source.parent / f"Flickr_8k.{name}Images.txt", f"{image}\r\n")
    for path in (tmp_path, source):
        dataset = read_dataset(path, 0)
        assert dataset.layout == "Flickr8k (Flickr8k.token.txt)"
        assert names(dataset.splits) == {"train": ["c.jpg"], "val": ["a.jpg"], "test": ["b.JPG"]}
        assert captions(dataset.splits) == TOKEN_CAPTIONS
        assert [Path(item.name).name for item in dataset.missing] == ["2258277193_586949ec62.jpg.1"]
        assert dataset.splits["test"][0].path.samefile(tmp_path / images / "b.JPG")


@pytest.mark.parametrize(
    ("text", "images"),
    [
        ("results.csv", "flickr30k_images"),
        ("flickr30k_images/results.csv", "flickr30k_images/flickr30k_images"),
        ("flickr30k_images/results.csv", "flickr30k_images"),
    ],
)
def test_flickr30k_as_on_kaggle(tmp_path, text, images):
    source = write(tmp_path / text, RESULTS)
    photographs(tmp_path / images, "a.jpg", "b.JPG", "c.jpg")
    for path in (tmp_path, source.parent, source):
        dataset = read_dataset(path, 3)
        assert dataset.layout == "Flickr30k, as on Kaggle (results.csv)"
        assert captions(dataset.splits) == RESULTS_CAPTIONS
        assert {split: len(examples) for split, examples in dataset.splits.items()} == {"train": 1, "val": 1, "test": 1}
        assert names(dataset.splits) == names(read_dataset(path, 3).splits)


def test_original_flickr30k(tmp_path):
    write(tmp_path / "results_20130124.token", TOKENS)
    photographs(tmp_path / "flickr30k-images", "a.jpg", "b.JPG", "c.jpg")
    dataset = read_dataset(tmp_path, 0)
    assert (dataset.layout, captions(dataset.splits)) == ("Flickr30k (results_20130124.token)", TOKEN_CAPTIONS)
    write(tmp_path / "results_20130124.token", "a.jpg#0\ta dog\nb.JPG\ta cat\n")
    path = tmp_path / "results_20130124.token"
    assert failure(tmp_path) == f"{path}: line 2 is not NAME#NUMBER, a tab, caption: 'b.JPG\\ta cat'"


def test_images_are_never_looked_for_outside_the_given_folder(tmp_path):
    source = write(tmp_path / "mine" / "captions.txt", "image,caption\n1.jpg,a dog\n")
    photographs(tmp_path / "images", "1.jpg")
    assert f"e.g. {source.parent / '1.jpg'}" in failure(tmp_path / "mine")


def test_several_data_sets_in_a_folder(tmp_path, caplog):
    photographs(tmp_path / "Images", "a.jpg", "b.JPG", "c.jpg")
    write(tmp_path / "captions.txt", "image,caption\na.jpg,first\n")
    write(tmp_path / "dataset_flickr8k.json", karpathy({"filename": "a.jpg", "split": "train"}))
    write_coco(tmp_path, "train2017", range(3))
    assert captions(open_dataset(tmp_path, 0)) == {"a.jpg": ("first",)}
    others = [tmp_path / "annotations" / "captions_train2017.json", tmp_path / "dataset_flickr8k.json"]
    reason = "another data set beside captions.txt; give its path to read it"
    assert caplog.messages == [f"skipped: {path}: {reason}" for path in others]
    assert captions(open_dataset(tmp_path / "dataset_flickr8k.json", 0)) == {"a.jpg": ("A dog .",)}


# COCO's test set


def test_coco_images_without_captions(tmp_path):
    path = write_coco(tmp_path, "test2017", range(3)).rename(tmp_path / "annotations" / "image_info_test-dev2017.json")
    content = json.loads(path.read_text())
    del content["annotations"]
    path.write_text(json.dumps(content), encoding="utf-8-sig")
    (tmp_path / "test2017" / "000000000001.jpg").unlink()
    for given in (tmp_path, path):
        dataset = read_dataset(given, 0)
        assert names(dataset.splits) == {"train": [], "val": [], "test": ["0", "2"]}
        path_of_missing = str(tmp_path / "test2017" / "000000000001.jpg")
        assert dataset.missing == [Skipped(None, path_of_missing, "the file does not exist")]
    assert failure(path) == f"{path}: has no captions; its images can be captioned: python -m attncap.caption {path}"


# Karpathy's splits


def karpathy(*images):
    sentences = [{"tokens": ["a", "dog"], "raw": "A dog .\n"}, {"tokens": [], "raw": " "}]
    return json.dumps({"images": [{"sentences": sentences, **image} for image in images], "dataset": "x"})


COCO_IMAGES = [
    {"filepath": "val2014", "filename": "COCO_val2014_1.jpg", "cocoid": 1, "split": "test"},
    {"filepath": "val2014", "filename": "COCO_val2014_2.jpg", "cocoid": 2, "split": "restval"},
    {"filepath": "train2014", "filename": "COCO_train2014_3.jpg", "cocoid": 3, "split": "train"},
    {"filepath": "val2014", "filename": "COCO_val2014_4.JPG", "cocoid": 4, "split": "val"},
    {"filepath": "val2014", "filename": "gone.jpg", "cocoid": 5, "split": "train"},
]


@pytest.mark.parametrize(
    ("text", "images"),
    [("dataset_coco.json", "."), ("annotations/dataset_coco.json", "."), ("dataset_coco.json", "images")],
)
def test_karpathy_coco(tmp_path, text, images):
    source = write(tmp_path / text, "\ufeff" + karpathy(*COCO_IMAGES))
    photographs(tmp_path / images, *(f"{i['filepath']}/{i['filename']}" for i in COCO_IMAGES[:4]))
    for path in (tmp_path, source):
        dataset = read_dataset(path, 0)
        assert names(dataset.splits) == {"train": ["2", "3"], "val": ["4"], "test": ["1"]}
        assert set(captions(dataset.splits).values()) == {("A dog .",)}
        assert dataset.splits["val"][0].path.samefile(tmp_path / images / "val2014" / "COCO_val2014_4.JPG")
        assert [Path(item.name).name for item in dataset.missing] == ["gone.jpg"]


@pytest.mark.parametrize(("name", "folder"), [("flickr8k", "Flicker8k_Dataset"), ("flickr30k", "flickr30k-images")])
def test_karpathy_flickr(tmp_path, name, folder):
    images = [{"filename": f"{split}.jpg", "split": split} for split in ("test", "val", "train")]
    write(tmp_path / f"dataset_{name}.json", karpathy(*images))
    photographs(tmp_path / folder, "test.jpg", "val.jpg", "train.jpg")
    dataset = read_dataset(tmp_path, 0)
    assert dataset.layout == f"Karpathy's splits (dataset_{name}.json)"
    assert names(dataset.splits) == {"train": ["train.jpg"], "val": ["val.jpg"], "test": ["test.jpg"]}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[]", 'field "images" should be a list with entries, as in Karpathy\'s files'),
        (karpathy({"filename": "1.jpg"}), 'field "split" of images[0] is missing or of the wrong type'),
        (
            karpathy({"filename": "1.jpg", "split": "x"}),
            'field "split" of images[0] should be train, restval, val or test',
        ),
        (
            karpathy({"filename": "1.jpg", "split": "val", "sentences": ["a"]}),
            'field "raw" of images[0].sentences[0] is missing or of the wrong type',
        ),
        (
            karpathy(*[{"filename": "1.jpg", "split": "val"}] * 2),
            "images[1] is '1.jpg', which is there already; remove one",
        ),
        (karpathy({"filename": "1.jpg", "split": "val", "sentences": []}), "no captions in it"),
    ],
)
def test_karpathy_wrong_files(tmp_path, content, reason):
    photographs(tmp_path / "Images", "1.jpg")
    path = write(tmp_path / "dataset_flickr8k.json", content)
    assert failure(tmp_path) == f"{path}: {reason}"


def test_karpathy_all_three_files_in_one_folder(tmp_path):  # as they are distributed
    for name in ("coco", "flickr30k", "flickr8k"):
        write(tmp_path / f"dataset_{name}.json", karpathy({"filename": "1.jpg", "split": "val"}))
    assert failure(tmp_path) == (
        f"{tmp_path}: expected one of Karpathy's files, found dataset_coco.json, dataset_flickr30k.json, "
        "dataset_flickr8k.json; give the path of one"
    )


# Your own tables

# 1.JPG is in a subfolder, 2.jpg has two captions, one of them with quotation marks, and 3.jpg no newline after it.
OWN = {
    "a.csv": 'image,caption,split\nsub/1.JPG,"A dog, a cat",train\n2.jpg,"Ein ""Bär""",DEV\n2.jpg,犬,val\n3.jpg,a,test',
    "b.CSV": "\ufeffSplit;Image;Caption\r\ntrain;sub/1.JPG;A dog, a cat\r\ndev;2.jpg;'Ein ''Bär'''\r\n"
    "val;2.jpg;犬\r\ntest;3.jpg;a".replace("'", '"'),
    "c.tsv": "id\timage\tsplit\tcaption\n1\tsub/1.JPG\ttrain\tA dog, a cat\n2\t2.jpg\tval\t'Ein ''Bär'''\n"
    "3\t2.jpg\tval\t犬\n4\t3.jpg\ttest\ta\n".replace("'", '"'),
    "d.jsonl": '{"image": "sub/1.JPG", "caption": "A dog, a cat", "split": "train"}\r\n\n'
    '{"image": "2.jpg", "caption": "Ein \\"Bär\\"\\n", "split": "validation", "score": 1}\n'
    '{"image": "2.jpg", "caption": "\\u72ac", "split": "val"}\n{"image": "3.jpg", "caption": "a", "split": "test"}',
}


@pytest.mark.parametrize("images", [".", "photos", "My images"])
@pytest.mark.parametrize("name", OWN)
def test_own_table(tmp_path, name, images):
    source = write(tmp_path / name, OWN[name])
    if images == "photos":  # a folder with any name, if the table has it
        source.write_text(OWN[name].replace("sub/1", "photos/sub/1").replace("2.jpg", "photos/2.jpg"))
        source.write_text(source.read_text().replace("3.jpg", "photos/3.jpg"))
    photographs(tmp_path / images, "sub/1.JPG", "2.jpg", "3.jpg")
    for path in (tmp_path, source):
        dataset = read_dataset(path, 0)
        assert dataset.layout == f"a table of captions ({name})"
        [one], [two], [three] = dataset.splits["train"], dataset.splits["val"], dataset.splits["test"]
        assert [example.captions for example in (one, two, three)] == [("A dog, a cat",), ('Ein "Bär"', "犬"), ("a",)]
        assert one.path.samefile(tmp_path / images / "sub" / "1.JPG")


def test_splits_of_an_own_table_without_any_are_drawn_by_image(tmp_path):
    photographs(tmp_path, *(f"{i}.jpg" for i in range(20)))
    lines = [json.dumps({"image": f"{i % 20}.jpg", "caption": f"{i}", "split": None}) for i in range(100)]
    write(tmp_path / "x.jsonl", "\n".join(lines))
    splits = open_dataset(tmp_path, 1)
    assert {split: len(examples) for split, examples in splits.items()} == {"train": 16, "val": 2, "test": 2}
    assert captions(splits) == {f"{i}.jpg": tuple(str(j) for j in range(i, 100, 20)) for i in range(20)}
    assert names(splits) == names(open_dataset(tmp_path, 1)) != names(open_dataset(tmp_path, 2))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.csv", "1.jpg,a,b,val", "line 2 is not image,caption,split: '1.jpg,a,b,val'; put a caption with commas "
         "in quotation marks"),
        ("a.csv", "1.jpg,a,dog", "line 2: split 'dog' should be train, val or test"),
        ("a.csv", "1.jpg,a,val\n1.jpg,b,test", "line 3: '1.jpg' is in split val and in test; keep one"),
        ("a.csv", "1.jpg,a,val\n2.jpg,b,", "'2.jpg' has no split, others have; give every image one, or none"),
        ("a.tsv", "1.jpg\n", "line 2 is not image,caption: '1.jpg'"),
        ("a.jsonl", "", "no captions in it"),
        ("a.jsonl", '\n{"image": "1.jp', "line 2 is not complete JSON: Unterminated string starting at: line 1 column "
         "11 (char 10)"),
        ("a.jsonl", '["1.jpg"]', 'line 1 is not {"image": "NAME", "caption": "..."}: \'["1.jpg"]\''),
        ("a.jsonl", '{"image": "", "caption": "a"}', 'line 1 is not {"image": "NAME", "caption": "..."}: '
         '\'{"image": "", "caption": "a"}\''),
    ],
)  # fmt: skip
def test_own_table_wrong(tmp_path, name, content, reason):
    photographs(tmp_path, "1.jpg", "2.jpg")
    header = {"a.csv": "image,caption,split\n", "a.tsv": "image\tcaption\n", "a.jsonl": ""}[name]
    path = write(tmp_path / name, header + content)
    assert failure(tmp_path) == f"{path}: {reason}"


def test_several_own_tables(tmp_path):
    write(tmp_path / "a.csv", "image,caption\n")
    write(tmp_path / "b.jsonl", "")
    message = "expected one table of captions, found a.csv, b.jsonl; give the path of one"
    assert failure(tmp_path) == f"{tmp_path}: {message}"


# Lists of the images in each split

WITH_SPLITS = {"train": ["3.jpg"], "val": ["2.jpg"], "test": ["1.jpg"]}
PUBLISHED = {"Flickr_8k.trainImages.txt": "3.jpg\n", "Flickr_8k.devImages.txt": "2.jpg\n"}
PUBLISHED["Flickr_8k.testImages.txt"] = "1.jpg\n"
THREE = "image,caption\n1.jpg,a dog\n2.jpg,a cat\n3.jpg,a bird\n"


def write_all(folder, files):
    for name, content in files.items():
        write(folder / name, content)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("mine.csv", THREE),
        ("mine.TSV", THREE.replace(",", "\t")),
        ("mine.jsonl", "".join(f'{{"image": "{i}.jpg", "caption": "a dog"}}\n' for i in (1, 2, 3))),
        ("Flickr8k.lemma.token.txt", "1.jpg#0\ta dog\n2.jpg#0\ta cat\n3.jpg#0\ta bird"),
        ("Flickr8k.arabic.full.txt", "1.jpg#0\tكلب\n2.jpg#0\tقط\n3.jpg#0\tطائر"),
        ("flickr8kzhc.caption.txt", "1.jpg#zhc#0 一 条 狗\n2.jpg#en-us2zh#0 猫\n3.jpg#zhc#1\t鸟"),
        ("captions_x.json", None),
    ],
)
def test_lists_are_used_whatever_the_captions_are_called(tmp_path, name, content):
    if content is None:  # in COCO's layout, where the images' names are their ids
        images = [{"id": i, "file_name": f"{i}.jpg"} for i in (1, 2, 3)]
        captions_of = [{"id": i, "image_id": i, "caption": "a dog"} for i in (1, 2, 3)]
        content = json.dumps({"images": images, "annotations": captions_of})
    source = write(tmp_path / "text" / name, content)
    write_all(source.parent, PUBLISHED)
    photographs(tmp_path / "Flicker8k_Dataset", "1.jpg", "2.jpg", "3.jpg")
    for path in (tmp_path, source):
        dataset = read_dataset(path, 0)
        found = {split: [f"{Path(e).stem}.jpg" for e in part] for split, part in names(dataset.splits).items()}
        assert found == WITH_SPLITS and not dataset.drawn and not dataset.skipped
        assert [path.name for path in dataset.lists] == list(PUBLISHED)


@pytest.mark.parametrize(
    "lists",
    [
        {"TRAINIMAGES.TXT": "3.jpg", "ValImages.Txt": "2.jpg", "testImages.txt": "1.jpg"},
        {"flickr8ktrain.txt": "3\n", "flickr8kval.txt": "2\n", "flickr8ktest.txt": "1\n"},  # as with Flickr8k-CN
        {"train.txt": "3.jpg#0\n3.jpg#1\n", "dev.txt": "2.jpg#0\n", "test.txt": "1.jpg#0\n"},
        {"train.txt": "Images/3.jpg", "validation.txt": "Images\\2.jpg", "test_2016_flickr.txt": "x/1.JPG"},
        {**PUBLISHED, "._Flickr_8k.trainImages.txt": b"\0\5\xff", "test.txt": "1.jpg", "trainval.txt": "1.jpg\n2.jpg"},
        {**PUBLISHED, "Flickr_8k.trainImages.txt": "._3.jpg\n3.jpg\n", "latest.txt": "1 is the best"},
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", ["text", ".", "splits", "text/splits"])
def test_lists_in_all_spellings_and_places(tmp_path, lists, place):
    source = write(tmp_path / "text" / "mine.csv", THREE)
    write_all(tmp_path / place, lists)
    photographs(tmp_path / "Images", "1.jpg", "2.jpg", "3.jpg")
    for path in (tmp_path, source):
        dataset = read_dataset(path, 0)
        assert names(dataset.splits) == WITH_SPLITS and not dataset.skipped
    photographs(tmp_path / "text" / "Images", "1.jpg", "2.jpg", "3.jpg")
    if place != "splits":  # lists are looked for one level above the given folder, but not beside it
        assert names(open_dataset(tmp_path / "text", 0)) == WITH_SPLITS


def test_notes_are_no_lists_and_lists_with_other_columns_are_reported(tmp_path):
    write(tmp_path / "mine.csv", THREE)
    photographs(tmp_path, "1.jpg", "2.jpg", "3.jpg")
    write(tmp_path / "training_log.txt", "epoch 1 of\n3\nloss 0.5")  # 3 would be 3.jpg
    assert not read_dataset(tmp_path, 0).skipped
    write_all(tmp_path, {"val.txt": "2.jpg 0\n3.jpg 1\n", "test.txt": "1.jpg 5\n"})
    dataset = read_dataset(tmp_path, 0)
    assert dataset.drawn and [Path(item.name).name for item in dataset.skipped] == ["test.txt", "val.txt"]
    write(tmp_path / "train.txt", "2.jpg\n3.jpg\n")
    assert failure(tmp_path) == f"{tmp_path / 'val.txt'}: none of its 2 names has captions and an image"


def test_a_caption_with_an_image_and_a_number_in_a_table(tmp_path):
    write(tmp_path / "mine.csv", THREE + "3.jpg,as in 1.jpg#0 a bird\n")
    photographs(tmp_path, "1.jpg", "2.jpg", "3.jpg")
    assert captions(read_dataset(tmp_path, 0).splits)["3.jpg"] == ("a bird", "as in 1.jpg#0 a bird")


def test_photographs_beside_the_folder_of_a_translation(tmp_path):
    write(tmp_path / "Flickr8k_text" / "Flickr8k.arabic.full.txt", "1.jpg#0\tكلب\n2.jpg#0\tقط\n3.jpg#0\tطائر")
    write_all(tmp_path / "Flickr8k_text", PUBLISHED)
    photographs(tmp_path / "Flickr8k_Dataset" / "Flicker8k_Dataset", "1.jpg", "2.jpg", "3.jpg")
    for path in (tmp_path, tmp_path / "Flickr8k_text" / "Flickr8k.arabic.full.txt"):
        assert names(open_dataset(path, 0)) == WITH_SPLITS


def test_lists_beside_images_that_are_elsewhere(tmp_path):
    source = write(tmp_path / "mine" / "text" / "mine.csv", THREE)
    write_all(tmp_path / "flickr8k", PUBLISHED)
    photographs(tmp_path / "flickr8k" / "photos", "1.jpg", "2.jpg", "3.jpg")
    assert names(open_dataset(source, 0, tmp_path / "flickr8k" / "photos")) == WITH_SPLITS


def test_a_table_with_splits_beside_lists(tmp_path, caplog):
    write(tmp_path / "mine.csv", "image,caption,split\n1.jpg,a dog,train\n2.jpg,a cat,test\n3.jpg,a bird,val\n")
    write_all(tmp_path, PUBLISHED)
    photographs(tmp_path, "1.jpg", "2.jpg", "3.jpg")
    assert names(open_dataset(tmp_path, 0)) == {"train": ["1.jpg"], "val": ["3.jpg"], "test": ["2.jpg"]}
    reason = "not used, because mine.csv has splits of its own"
    assert caplog.messages == [f"skipped: {tmp_path / name}: {reason}" for name in PUBLISHED]


def test_lists_of_other_images(tmp_path, caplog):
    write(tmp_path / "mine.csv", THREE)
    write_all(tmp_path, dict.fromkeys(PUBLISHED, "4.jpg\n"))
    write_all(tmp_path, {"test.txt": "5\n6\n", "development.txt": "a plan\n", "latest.txt": b"\xff"})
    photographs(tmp_path, "1.jpg", "2.jpg", "3.jpg")
    dataset = read_dataset(tmp_path, 0)
    assert dataset.drawn and not dataset.missing
    assert sorted(item.name for item in dataset.skipped) == sorted(
        str(tmp_path / name) for name in (*PUBLISHED, "test.txt")
    )
    assert {item.reason for item in dataset.skipped} == {
        "names none of the images of mine.csv; not used as a list of a split"
    }
    (tmp_path / "Flickr_8k.devImages.txt").write_bytes(b"\xff")
    assert failure(tmp_path) == f"{tmp_path / 'Flickr_8k.devImages.txt'}: not UTF-8 text (byte 0); save it as UTF-8"


@pytest.mark.parametrize("found", [1, 2])
def test_some_of_the_lists(tmp_path, found):
    write(tmp_path / "text" / "mine.csv", THREE)
    write_all(tmp_path / "text", dict(list(PUBLISHED.items())[-found:]))
    photographs(tmp_path / "Images", "1.jpg", "2.jpg", "3.jpg")
    assert f"{tmp_path / 'text'}: trainImages.txt is missing beside the other lists" in failure(tmp_path)
    for name in list(PUBLISHED)[-found:]:  # elsewhere they may belong to other captions
        (tmp_path / "text" / name).rename(tmp_path / name)
    assert read_dataset(tmp_path, 0).drawn


def test_images_that_differ_only_in_case_are_not_confused_in_lists(tmp_path):
    write(tmp_path / "mine.csv", THREE.replace("2.jpg", "1.JPG"))
    write_all(tmp_path, {**PUBLISHED, "Flickr_8k.devImages.txt": "1.JPG"})
    photographs(tmp_path, "1.jpg", "1.JPG", "3.jpg")
    assert names(open_dataset(tmp_path, 0)) == {"train": ["3.jpg"], "val": ["1.JPG"], "test": ["1.jpg"]}


def test_published_lists_of_real_captions_in_another_language(tmp_path):
    """Flickr8k's own lists, which have 6,000, 1,000 and 1,000 names, beside a translation of 10 captions."""
    lists = {
        f"Flickr_8k.{s}Images.txt": "".join(f"{s}{i}.jpg\n" for i in range(1000)) for s in ("train", "dev", "test")
    }
    lines = [f"{s}{i}.jpg#0\tكلب أسود" for i in range(10) for s in ("train", "dev", "test", "other")]
    write_all(tmp_path, {**lists, "Flickr8k.arabic.full.txt": "\n".join(lines)})
    photographs(tmp_path / "Images", *(line.partition("#")[0] for line in lines))
    dataset = read_dataset(tmp_path, 0)
    expected = {
        split: [f"{s}{i}.jpg" for i in range(10)]
        for split, s in zip(WITH_SPLITS, ("train", "dev", "test"), strict=True)
    }
    assert names(dataset.splits) == expected
    unlisted = [item.name for item in dataset.skipped if item.reason.startswith("in none of the lists")]
    assert unlisted == [f"other{i}.jpg" for i in range(10)]


# Hugging Face's ImageFolder


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", "file_name,text\n1.jpg,a dog\n1.jpg,dogs\n2.jpg,a cat\n3.jpg,a bird\n"),
        ("metadata.csv", "file_name,width,caption\n1.jpg,5,a dog\n1.jpg,5,dogs\n2.jpg,5,a cat\n3.jpg,5,a bird\n"),
        (
            "metadata.jsonl",
            '{"file_name": "1.jpg", "text": ["a dog", "dogs"]}\n{"file_name": "2.jpg", "captions": ["a cat"]}\n'
            '{"file_name": "3.jpg", "text": "a bird", "label": 1}',
        ),
    ],
)
@pytest.mark.parametrize("place", [".", "data"])
def test_image_folder(tmp_path, name, content, place):
    source = write(tmp_path / place / name, content)
    photographs(tmp_path / place, "1.jpg", "2.jpg", "3.jpg")
    for path in (tmp_path, source):
        dataset = read_dataset(path, 0)
        assert dataset.layout.startswith("Hugging Face's ImageFolder (")
        assert captions(dataset.splits) == {"1.jpg": ("a dog", "dogs"), "2.jpg": ("a cat",), "3.jpg": ("a bird",)}


@pytest.mark.parametrize("in_root", [False, True])
def test_image_folder_with_a_folder_for_each_split(tmp_path, in_root):
    folders = {"train": "train", "val": "validation", "test": "test"}
    lines = ["file_name,text"]
    for folder in folders.values():
        photographs(tmp_path / folder, "0.jpg", "1.jpg")
        if not in_root:
            write(tmp_path / folder / "metadata.csv", f"file_name,text\n0.jpg,a {folder}\n1.jpg,dog\n")
        lines += [f"{folder}/0.jpg,a {folder}", f"{folder}/1.jpg,dog"]
    if in_root:
        write(tmp_path / "metadata.csv", "\n".join(lines))
    dataset = read_dataset(tmp_path, 0)
    assert names(dataset.splits) == {split: [f"{f}/0.jpg", f"{f}/1.jpg"] for split, f in folders.items()}
    for folder in folders.values():
        assert captions(dataset.splits)[f"{folder}/0.jpg"] == (f"a {folder}",)
    paths = {example.path for examples in dataset.splits.values() for example in examples}
    assert paths == {tmp_path / folder / f"{i}.jpg" for folder in folders.values() for i in (0, 1)}


# Wherever the images are


def paths_of(dataset):
    return {e.name: e.path for examples in dataset.splits.values() for e in examples}


@pytest.mark.parametrize("folder", ["imgs", "photos", "raw/jpg", "Images", "."])
@pytest.mark.parametrize("name", ["mine.csv", "dataset.json", "annotations/stair_captions_v1.2_train.json"])
def test_images_are_found_in_any_folder(tmp_path, name, folder):
    if name == "mine.csv":
        content, keys = THREE, ("1.jpg", "2.jpg", "3.jpg")
    elif name == "dataset.json":  # Karpathy's layout, recognised by its content
        content, keys = karpathy(*({"filename": f"{i}.jpg", "split": "val"} for i in (1, 2, 3))), None
        write(tmp_path / "state.json", '{"sentence": 1}')
    else:
        images = [{"id": i, "file_name": f"{i}.jpg"} for i in (1, 2, 3)]
        content = json.dumps(
            {"images": images, "annotations": [{"id": i, "image_id": i, "caption": "犬"} for i in (1, 2, 3)]}
        )
        keys = ("1", "2", "3")
        write(tmp_path / "annotations" / "._captions_train.json", b"\0\5")
    keys = keys or ("1.jpg", "2.jpg", "3.jpg")
    source = write(tmp_path / name, content)
    photographs(tmp_path / folder, "1.jpg", "2.jpg", "3.jpg")
    (tmp_path / folder / "._1.jpg").write_bytes(b"\0\5")
    for path in (tmp_path, source):
        dataset = read_dataset(path, 0)
        assert paths_of(dataset) == {k: tmp_path / folder / f"{i}.jpg" for i, k in enumerate(keys, 1)}
        assert not dataset.missing and not dataset.skipped


def test_images_in_the_folder_that_was_given(tmp_path, attncap):
    source = write(tmp_path / "data" / "mine.csv", THREE)
    photographs(tmp_path / "data" / "Images", "1.jpg", "2.jpg", "3.jpg")
    photographs(tmp_path / "elsewhere" / "photos", "1.jpg", "2.jpg")
    dataset = read_dataset(source, 0, tmp_path / "elsewhere")
    assert paths_of(dataset) == {name: tmp_path / "elsewhere" / "photos" / name for name in ("1.jpg", "2.jpg")}
    assert [item.name for item in dataset.missing] == [str(tmp_path / "elsewhere" / "photos" / "3.jpg")]
    status, out, _ = attncap("data.__main__", source, "--images", tmp_path / "elsewhere" / "photos")
    assert status == 0 and f"images          {tmp_path / 'elsewhere' / 'photos'}\n" in out
    assert "splits          drawn at random with --seed 0\n" in out
    assert attncap("data.__main__", source)[1].count(f"images          {tmp_path / 'data' / 'Images'}\n") == 1
    for path, images in ((source, tmp_path / "nowhere"), (source, source), (source, ""), ("shapes", tmp_path)):
        with pytest.raises(CallError, match="^images .*: (no such folder|shapes has no image files)$"):
            read_dataset(path, 0, images)


def test_images_of_two_folders(tmp_path):
    """COCO's images for a file that has those of train and val, by their bare names; not those of another size."""
    write(tmp_path / "mine.csv", THREE)
    photographs(tmp_path / "train2014", "1.jpg", "2.jpg")
    photographs(tmp_path / "val2014", "3.jpg")
    assert {path.parent.name for path in paths_of(read_dataset(tmp_path, 0)).values()} == {"train2014", "val2014"}
    photographs(tmp_path / "a_thumbnails", "1.jpg", "3.jpg")
    (tmp_path / "val2014" / "3.jpg").unlink()
    dataset = read_dataset(tmp_path, 0)
    assert {path.parent.name for path in paths_of(dataset).values()} <= {"train2014", "a_thumbnails"}
    assert len(dataset.missing) == 1


def test_a_few_images_beside_the_given_file_are_of_another_data_set(tmp_path):
    source = write(tmp_path / "mine" / "mine.csv", THREE)
    photographs(tmp_path / "other", "1.jpg")
    photographs(tmp_path / "other_images", "1.jpg")
    assert f"none of the 3 images it names exist, e.g. {tmp_path / 'mine' / '1.jpg'}" in failure(source)
    photographs(tmp_path / "Flicker8k_Dataset", "1.jpg", "2.jpg")
    assert {path.parent.name for path in paths_of(read_dataset(source, 0)).values()} == {"Flicker8k_Dataset"}


@pytest.mark.parametrize(
    ("named", "on_disk"),
    [
        ("{}.jpg", "Images/{}.JPG"),
        ("images/{}.jpg", "Images/{}.Jpg"),
        ("Images\\{}.jpg", "Images/{}.jpg"),
        ("C:\\data\\Images\\{}.jpg", "Images/{}.jpg"),
        ("/content/drive/{}.jpg", "Images/{}.jpg"),
        ("./{}.jpg", "{}.jpg"),
        ("café {}.jpg", "Images/cafe\u0301 {}.jpg"),  # as macOS writes it
        ("CAFE\u0301 {}.jpg", "Images/café {}.jpg"),
        ("a\\{}.jpg", "a\\{}.jpg"),
        ("val2014/{}.jpg", "all/{}.jpg"),
    ],
)
def test_names_as_other_systems_write_them(tmp_path, named, on_disk):
    write(
        tmp_path / "mine.jsonl",
        "".join(json.dumps({"image": named.format(i), "caption": "a dog"}) + "\n" for i in (1, 2)),
    )
    photographs(tmp_path, on_disk.format(1), on_disk.format(2))
    expected = {named.format(i): tmp_path / on_disk.format(i) for i in (1, 2)}
    assert paths_of(read_dataset(tmp_path, 0)) == expected


def test_some_names_with_backslashes(tmp_path):
    write(tmp_path / "mine.csv", THREE.replace("2.jpg", "Images\\2.jpg"))
    photographs(tmp_path / "Images", "1.jpg", "2.jpg", "3.jpg")
    expected = {name: tmp_path / "Images" / name[-5:] for name in ("1.jpg", "Images\\2.jpg", "3.jpg")}
    assert paths_of(read_dataset(tmp_path, 0)) == expected


def test_one_image_beside_the_captions_and_the_others_elsewhere(tmp_path):
    write(tmp_path / "mine.csv", THREE)
    photographs(tmp_path, "1.jpg")
    photographs(tmp_path / "photos", "1.jpg", "2.jpg", "3.jpg")
    assert {path.parent for path in paths_of(read_dataset(tmp_path, 0)).values()} == {tmp_path / "photos"}


def test_absolute_names_below_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    """As the folders above one's own often are on shared computers."""
    names_of = [str(tmp_path / "photos" / f"{i}.jpg") for i in (1, 2)]
    write(tmp_path / "mine.csv", "image,caption\n" + "".join(f"{name},a dog\n" for name in names_of))
    photographs(tmp_path / "photos", "1.jpg", "2.jpg")
    scandir = os.scandir

    def refuse(path):
        if Path(path) == tmp_path.parent:
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert {str(path) for path in paths_of(read_dataset(tmp_path, 0)).values()} == set(names_of)


def test_names_that_fit_several_files_or_the_same_one(tmp_path):
    write(tmp_path / "mine.csv", "image,caption\n1.jpg,a\n2.jpg,b\n./2.jpg,c\n3.jpg,d\n3.JPG,e\n._4.jpg,f\n")
    photographs(tmp_path / "Images", "1.JPG", "1.Jpg", "2.jpg", "3.JPG")
    dataset = read_dataset(tmp_path, 0)
    assert sorted(paths_of(dataset)) == ["2.jpg", "3.JPG"]
    assert [(Path(item.name).name, item.reason) for item in dataset.missing] == [
        ("1.jpg", "the file does not exist, but 1.JPG and 1.Jpg do"),
        ("._4.jpg", "a file of macOS, not an image"),
    ]
    assert {(item.name, item.reason) for item in dataset.skipped} == {
        ("./2.jpg", f"{tmp_path / 'mine.csv'} has the same file as 2.jpg"),
        ("3.jpg", f"{tmp_path / 'mine.csv'} has the same file as 3.JPG"),
    }


def test_leaving_out_folders_does_not_merge_names(tmp_path):
    write(tmp_path / "mine.csv", "image,caption\na/1.jpg,a dog\nb/1.jpg,a cat\n")
    photographs(tmp_path / "Images", "1.jpg")
    assert "none of the 2 images it names exist" in failure(tmp_path)


def test_files_of_macos_are_ignored(tmp_path):
    write(tmp_path / "mine.csv", THREE)
    write_all(tmp_path, {"._mine.csv": b"\0\5\x16\7", ".DS_Store": b"\0\0\0\1Bud1", "Images/._1.jpg": b"\0\5\x16\7"})
    write_all(tmp_path, {"__MACOSX/._mine.csv": b"\0\5", "__MACOSX/Images/._1.jpg": b"\0\5"})
    photographs(tmp_path / "Images", "1.jpg", "2.jpg", "3.jpg")
    dataset = read_dataset(tmp_path, 0)
    assert len(paths_of(dataset)) == 3 and not dataset.missing and not dataset.skipped


def test_captions_without_a_word_are_left_out(tmp_path, caplog):
    """As a model reads them: punctuation, emoji and entities are not words; a number, an accent and a sign are."""
    wordless = ["-", ".", "...", "!!", "😀", "&nbsp;", "( )", "***", "\u200b"]
    lines = [{"image": "1.jpg", "caption": text} for text in (*wordless, "5", "é", "犬", "ไป", "&amp; so")]
    lines += [{"image": "2.jpg", "caption": "."}, {"image": "3.jpg", "caption": "a dog"}]
    write(tmp_path / "mine.jsonl", "\n".join(map(json.dumps, lines)))
    photographs(tmp_path, "1.jpg", "2.jpg", "3.jpg")
    assert captions(open_dataset(tmp_path, 0)) == {"1.jpg": ("5", "é", "犬", "ไป", "&amp; so"), "3.jpg": ("a dog",)}
    assert len(caplog.messages) == len(wordless) + 1
    assert caplog.messages[0] == "skipped: '-' of 1.jpg: a caption without a word"
    write(tmp_path / "mine.jsonl", "\n".join(map(json.dumps, lines[:3])))
    assert failure(tmp_path) == f"{tmp_path / 'mine.jsonl'}: none of its captions has a word, e.g. '-' of 1.jpg"


def test_images_in_formats_that_are_not_read_are_reported(tmp_path, caplog):
    for name in ("1.jpg", "._1.jpg", "2.HEIC", "a/3.heic", "4.avif", "5.CR2", "._6.heic", ".DS_Store", "notes.txt"):
        write(tmp_path / name, b"")
    assert find_images([tmp_path]) == [tmp_path / "1.jpg"]
    assert caplog.messages == [f"{tmp_path}: 4 images left out (.avif, .cr2, .heic); convert them to JPEG"]
    caplog.clear()
    assert find_images([tmp_path / "2.HEIC"]) == [tmp_path / "2.HEIC"] and not caplog.messages


# What is not a regular file, and odd folders


@pytest.mark.parametrize("name", ["captions.txt", "mine.csv", "metadata.csv", "dataset_coco.json", "trainImages.txt"])
def test_pipes_are_refused(tmp_path, name):
    """Opening one would wait forever for a writer."""
    photographs(tmp_path, "1.jpg", "2.jpg", "3.jpg")
    if name == "trainImages.txt":
        write(tmp_path / "x.csv", THREE)
    os.mkfifo(tmp_path / name)
    assert failure(tmp_path) == f"{tmp_path / name}: cannot be read: not a regular file"
    assert failure(tmp_path / name) == f"{tmp_path / name}: not a regular file or a folder"


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/stdin", "/proc/self/fd/0"])
def test_devices_are_refused(path):
    assert "not a" in failure(path)


def test_a_list_that_is_too_large(tmp_path):
    write(tmp_path / "mine.csv", THREE)
    photographs(tmp_path, "1.jpg", "2.jpg", "3.jpg")
    with open(tmp_path / "trainImages.txt", "wb") as file:
        file.truncate(2**30)
    assert failure(tmp_path) == f"{tmp_path / 'trainImages.txt'}: cannot be read: larger than 64 MiB"


def test_links_that_lead_in_circles(tmp_path):
    write(tmp_path / "mine.csv", THREE)
    photographs(tmp_path / "photos" / "deep", "1.jpg", "2.jpg", "3.jpg")
    for link, target in (("a", "a"), ("here", "."), ("photos/up", ".."), ("photos/deep/up", "../..")):
        (tmp_path / link).symlink_to(target)
    assert set(paths_of(read_dataset(tmp_path, 0)).values()) == {
        tmp_path / "photos" / "deep" / f"{i}.jpg" for i in (1, 2, 3)
    }


def test_each_folder_is_listed_once(tmp_path, monkeypatch):
    write(tmp_path / "text" / "mine.csv", THREE)
    photographs(tmp_path / "photos", "1.jpg", "2.jpg", "3.jpg")
    listed = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(str(path)) or scandir(path))
    read_dataset(tmp_path, 0)
    assert str(tmp_path / "photos") in listed and len(listed) == len(set(listed))


def test_names_from_files_are_on_one_line(tmp_path, caplog):
    lines = [
        {"image": name, "caption": "a dog"} for name in ("1.jpg", "a\n\x1b[31m.jpg", "\udcff.jpg", "a" * 5000, "a\0/1")
    ]
    write(tmp_path / "mine.jsonl", "\n".join(map(json.dumps, lines)))
    photographs(tmp_path, "1.jpg")
    open_dataset(tmp_path, 0)
    assert caplog.messages[0] == f"skipped: {tmp_path}/a \\x1b[31m.jpg: the file does not exist"
    assert caplog.messages[1] == f"skipped: {tmp_path}/\\udcff.jpg: the file does not exist"
    assert len(caplog.messages) == 4 and all(len(line) < 400 and line.isprintable() for line in caplog.messages)


def test_several_data_sets_in_subfolders(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name / "captions.txt", f"image,caption\n1.jpg,{name}\n")
        photographs(tmp_path / name / "Images", "1.jpg")
    dataset = read_dataset(tmp_path, 0)
    assert paths_of(dataset) == {"1.jpg": tmp_path / "a" / "Images" / "1.jpg"}
    reason = "another data set beside captions.txt; give its path to read it"
    assert dataset.skipped == [Skipped(None, str(tmp_path / "b" / "captions.txt"), reason)]


def test_the_folder_itself_comes_before_its_subfolders(tmp_path, caplog):
    write(tmp_path / "mine.csv", "image,caption\na.jpg,mine\n")
    write(tmp_path / "old" / "captions.txt", "image,caption\na.jpg,old\n")
    write(tmp_path / "dataset_infos.json", '{"default": {}}')
    photographs(tmp_path, "a.jpg")
    assert captions(open_dataset(tmp_path, 0)) == {"a.jpg": ("mine",)} and not caplog.messages
    write(tmp_path / "captions.txt", "image,caption\na.jpg,new\n")
    assert captions(open_dataset(tmp_path, 0)) == {"a.jpg": ("new",)}
    assert caplog.messages == [
        f"skipped: {tmp_path}/mine.csv: another data set beside captions.txt; give its path to read it"
    ]


def test_a_symbolic_link_to_itself_is_ignored(tmp_path):
    write(tmp_path / "captions.txt", "image,caption\na.jpg,a dog\n")
    photographs(tmp_path / "Images", "a.jpg")
    (tmp_path / "loop").symlink_to("loop")
    assert captions(open_dataset(tmp_path, 0)) == {"a.jpg": ("a dog",)}


def test_a_path_relative_to_the_folder_of_annotations(tmp_path, monkeypatch):
    write_coco(tmp_path, "train2017", range(3))
    monkeypatch.chdir(tmp_path / "annotations")
    assert len(captions(open_dataset("captions_train2017.json", 0))) == 3


def test_coco_image_id_that_appears_twice(tmp_path):
    path = write_coco(tmp_path, "train2017", range(3))
    content = json.loads(path.read_text())
    content["images"].append(dict(content["images"][0], file_name="other.jpg"))
    path.write_text(json.dumps(content))
    assert "image id 0 appears 2 times in its images; keep one" in failure(tmp_path)


def test_only_flickr30k_has_comment_numbers_to_fix(tmp_path):
    write(tmp_path / "mine.csv", "image|caption\nmy.jpg dog.jpg\n")
    photographs(tmp_path, "my.jpg")
    assert "line 2 is not image,caption" in failure(tmp_path)


# Without the images, to score captions written earlier


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("dataset_coco.json", karpathy(*COCO_IMAGES), {"train": ["2", "3", "5"], "val": ["4"], "test": ["1"]}),
        ("a.csv", OWN["a.csv"], {"train": ["sub/1.JPG"], "val": ["2.jpg"], "test": ["3.jpg"]}),
        ("d.jsonl", OWN["d.jsonl"], {"train": ["sub/1.JPG"], "val": ["2.jpg"], "test": ["3.jpg"]}),
    ],
)
@pytest.mark.parametrize("existing", [(), ("val2014/COCO_val2014_1.jpg", "2.jpg")])
def test_given_splits_need_no_images(tmp_path, caplog, name, content, expected, existing):
    path = write(tmp_path / name, content)
    photographs(tmp_path, *existing)
    assert names(open_dataset(path, 0, need_images=False)) == expected and not caplog.messages


@pytest.mark.parametrize("existing", [(), ("a.jpg",)])
def test_listed_splits_need_no_images(tmp_path, existing):
    photographs(tmp_path, *existing)
    write(tmp_path / "Flickr8k.token.txt", TOKENS)
    for name, image in (("train", "c.jpg"), ("dev", "a.jpg"), ("test", "b.JPG")):
        write(tmp_path / f"Flickr_8k.{name}Images.txt", image)
    assert names(open_dataset(tmp_path, 0, need_images=False)) == {
        "train": ["c.jpg"],
        "val": ["a.jpg"],
        "test": ["b.JPG"],
    }


def test_drawn_splits_without_any_image_are_those_of_a_folder_with_all(tmp_path, caplog):
    """Where some of the images exist, the splits are those of training, which leaves the others out."""
    lines = [f"{i}.jpg#0\ta dog" for i in range(20)]
    write(tmp_path / "results_20130124.token", "\n".join(lines))
    alone = names(open_dataset(tmp_path, 1, need_images=False))
    assert caplog.messages[0].endswith("none of its images exist; splits are drawn from all of them")
    photographs(tmp_path / "flickr30k-images", *(f"{i}.jpg" for i in range(10)))
    assert names(open_dataset(tmp_path, 1, need_images=False)) == names(open_dataset(tmp_path, 1)) != alone
    photographs(tmp_path / "flickr30k-images", *(f"{i}.jpg" for i in range(20)))
    assert alone == names(open_dataset(tmp_path, 1))


@pytest.mark.parametrize("folders", [["train2017", "val2017"], ["val2014"]])
def test_coco_without_images(tmp_path, folders):
    for i, folder in enumerate(folders):
        write_coco(tmp_path, folder, range(100 * i, 100 * i + 10))
    whole = names(open_dataset(tmp_path, 0))
    for folder in folders:
        shutil.rmtree(tmp_path / folder)
    assert "; put the images in that folder, or" in failure(tmp_path)
    assert names(open_dataset(tmp_path, 0, need_images=False)) == whole


def test_karpathy_null_counts_as_missing(tmp_path):
    images = [
        {"filename": f"{split}.jpg", "split": split, "filepath": None, "cocoid": None} for split in ("test", "val")
    ]
    path = write(tmp_path / "dataset_flickr8k.json", karpathy(*images))
    photographs(tmp_path / "Images", "test.jpg", "val.jpg")
    dataset = read_dataset(path, 0)
    assert names(dataset.splits) == {"train": [], "val": ["val.jpg"], "test": ["test.jpg"]} and not dataset.missing
    for field, wrong in (("filepath", 1), ("cocoid", [])):
        path.write_text(karpathy({"filename": "test.jpg", "split": "test", field: wrong}))
        assert failure(path) == f'{path}: field "{field}" of images[0] is missing or of the wrong type'
