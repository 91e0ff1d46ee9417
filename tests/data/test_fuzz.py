"""Whatever a data set's files contain, opening it gives examples or one clear line.

ATTNCAP_FUZZ=1000 tries more files of each kind than the default.
"""

import json
import os
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_datasets import photograph, write_coco
from test_layouts import COCO_IMAGES, OWN, RESULTS, TOKENS, karpathy

from attncap.data import read_dataset
from attncap.data.image_folders import fold
from attncap.data.readers import coco
from attncap.errors import UserError

CAPTIONS = 'image,caption\na.jpg,A dog , running .\nb.JPG,"A ""big"" cat, asleep"\nc.jpg,ein Bär\n'
SAMPLES = {
    "captions.txt": CAPTIONS,
    "Flickr8k.token.txt": TOKENS,
    "results.csv": RESULTS,
    **OWN,
    "dataset_coco.json": karpathy(*COCO_IMAGES),
    "dataset_flickr8k.json": karpathy({"filename": "a.jpg", "split": "train"}, {"filename": "b.JPG", "split": "val"}),
    "captions_train2017.json": None,
    "image_info_test2017.json": None,
    "metadata.csv": 'file_name,text\na.jpg,A dog\nb.JPG,"A cat, asleep"\nc.jpg,ein Bär\n',
    "metadata.jsonl": '{"file_name": "a.jpg", "text": ["A dog", "..."]}\n{"file_name": "b.jpg", "captions": "A cat"}\n',
    "flickr8kzhc.caption.txt": "a.jpg#zhc#0 一 条 狗\nb.JPG#zhc#0 猫\nc.jpg#zhc#1\t鸟\n",
}
LISTS = {"Flickr_8k.trainImages.txt": "a.jpg\n", "dev.txt": "Images\\b.jpg#0\n", "TEST.TXT": "c\nd\n"}
FUZZ = settings(
    derandomize=True,
    deadline=5000,  # ms
    max_examples=int(os.environ.get("ATTNCAP_FUZZ", 60)),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture
def tmp_path(tmp_path):
    """A folder with no others beside it: these are searched for the images and lists of a file that is given."""
    (tmp_path / "alone").mkdir()
    return tmp_path / "alone"


@pytest.fixture(params=SAMPLES)
def sample(request, tmp_path):
    """A file of captions beside the images it names, and the file's content."""
    if SAMPLES[request.param] is None:
        folder = request.param.split("_")[-1].removesuffix(".json")
        path = write_coco(tmp_path, folder, range(3)).rename(tmp_path / request.param)
    else:
        path = tmp_path / request.param
        path.write_bytes(SAMPLES[request.param].encode())
    for image in ("a.jpg", "b.JPG", "c.jpg", "sub/1.JPG", "2.jpg", "3.jpg", "val2014/COCO_val2014_1.jpg"):
        photograph(tmp_path / image)
    return path, path.read_bytes()


def check(path, content: bytes):
    path.write_bytes(content)
    check_folder(path)


def check_folder(path):
    reads = [lambda: read_dataset(path, 0), lambda: read_dataset(path.parent, 0), lambda: coco.read_captions(path)]
    for read in reads:
        try:
            read()
        except UserError as error:
            assert str(error).startswith(str(path.parent)) and "\n" not in str(error)
            assert len(str(error)) < 1000


def test_the_samples_themselves_are_read(sample):
    assert any(read_dataset(sample[0], 0).splits.values())


@FUZZ
@given(content=st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
def test_random_bytes(sample, content):
    check(sample[0], content)


@FUZZ
@given(data=st.data())
def test_cut_short(sample, data):
    path, content = sample
    check(path, content[: data.draw(st.integers(0, len(content)))])


PIECES = [b"", b"\0", b'"', b"'", b",", b"|", b";", b"\t", b"#0\t", b"\r", b"\n", b"\\", b"\xff", b"../", b"/", b"\0/"]
PIECES += [b"[", b"{", b"\xef\xbb\xbf", b"\\ud800", b"1e999", b"a\\n/", "\u2028".encode()]
PIECES += [b"9" * 5000, b"/" + b"9" * 5000, b"[" * 100_000, b"a" * 200_000]


@FUZZ
@given(data=st.data())
def test_pieces_put_in(sample, data):
    path, content = sample
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content)))
        stop = start + data.draw(st.integers(0, 20))
        content = content[:start] + data.draw(st.sampled_from(PIECES) | st.binary(max_size=8)) + content[stop:]
    check(path, content)


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.just({}) | st.just([])


@FUZZ
@given(data=st.data())
@pytest.mark.parametrize("sample", [name for name in SAMPLES if name.endswith(".json")], indirect=True)
def test_json_with_another_value(sample, data):
    """One value anywhere in the file is replaced by one of any type, or removed."""
    path, content = sample
    node = content = json.loads(content.decode("utf-8-sig"))
    while True:
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if not (isinstance(node[key], dict | list) and node[key] and data.draw(st.booleans())):
            break
        node = node[key]
    if data.draw(st.booleans()):
        node[key] = data.draw(VALUES | st.lists(VALUES, max_size=2))
    else:
        del node[key]
    check(path, json.dumps(content).encode())


@FUZZ
@given(data=st.data())
@pytest.mark.parametrize("sample", ["captions.txt", "metadata.jsonl", "flickr8kzhc.caption.txt"], indirect=True)
def test_lists_of_splits(sample, data):
    """Lists with other lines, pieces or names beside the captions, or without one of them."""
    path, _ = sample
    for name, content in LISTS.items():
        names = content.encode().splitlines() + [b"b.JPG", b"a", b"c.jpg", b"Images/a.jpg"]
        lines = data.draw(st.lists(st.sampled_from(names + PIECES) | st.binary(max_size=8), max_size=5))
        if data.draw(st.integers(0, 9)):
            (path.parent / name).write_bytes(b"\n".join(lines))
        else:
            (path.parent / name).unlink(missing_ok=True)
    check_folder(path)


NAMES = st.sampled_from(
    ["a.jpg", "A.JPG", "cafe\u0301.jpg", "café.jpg", "a\\b.jpg", "Images/a.jpg", "a b.jpg", "..", "."]
)


@FUZZ
@given(data=st.data())
def test_names_of_images(tmp_path, data):
    """Any names in the captions and in the folders: each file that is found is the image's own, and no file is two
    images."""
    folder = tmp_path / "data"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    texts = NAMES | st.text(max_size=9)
    for name in data.draw(st.lists(texts, min_size=1, max_size=4)):
        file = folder / data.draw(st.sampled_from(["", "Images", "x/photos"])) / name.replace("\0", "").lstrip("/")
        try:
            photograph(file)
        except (OSError, ValueError):  # not the name of an image
            pass
    captions = data.draw(st.lists(texts, min_size=1, max_size=4))
    lines = (json.dumps({"image": name, "caption": "a dog"}) + "\n" for name in captions)
    (folder / "mine.jsonl").write_text("".join(lines))
    try:
        examples = [e for part in read_dataset(folder, 0).splits.values() for e in part]
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return
    assert len({os.path.realpath(e.path) for e in examples}) == len(examples)
    for example in examples:
        bare = example.name.replace("\\", "/").rpartition("/")[2]
        assert example.path.exists() and fold(example.path.name) in (fold(bare), fold(example.name))
