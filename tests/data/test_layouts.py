"""More layouts than in test_datasets.py: small samples with the oddities of the real files."""

import json
import shutil
from pathlib import Path

import pytest
from test_datasets import failure, names, photograph, write_coco

from attncap.data import Skipped, open_dataset, read_dataset


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


def test_lists_beside_an_own_table_are_not_its_splits(tmp_path):
    write(tmp_path / "mine.csv", "image,caption,split\na.jpg,a dog,test\nb.jpg,a cat,train\n")
    for name in ("train", "val", "test"):
        write(tmp_path / f"{name}Images.txt", "a.jpg\n")
    photographs(tmp_path, "a.jpg", "b.jpg")
    assert names(open_dataset(tmp_path, 0)) == {"train": ["b.jpg"], "val": [], "test": ["a.jpg"]}


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
