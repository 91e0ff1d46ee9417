"""Whatever a data set's files contain, opening it gives examples or one clear line."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_datasets import photograph, write_coco
from test_layouts import COCO_IMAGES, OWN, RESULTS, TOKENS, karpathy

from attncap.data import read_dataset
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
}
FUZZ = settings(
    derandomize=True, deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


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
    for read in (lambda: read_dataset(path, 0), lambda: coco.read_captions(path)):
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
