"""The augmentation of an image depends on the seed, the epoch and the image, and on nothing else."""

import os
import signal

import numpy as np
import pytest
import torch
from conftest import make_flickr8k
from PIL import Image

from attncap.data import read_dataset
from attncap.data.loader import AugmentedPictures, Pictures, batches, draw_batches, draw_rows, seed_of


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    data = make_flickr8k(tmp_path_factory.mktemp("loader") / "data", 12)
    for path in (data / "Images").iterdir():  # all crops of an image of one colour are alike
        noise = np.random.default_rng(int(path.stem)).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
    (data / "Images" / "004.png").write_bytes(b"broken")
    splits = read_dataset(data, 0).splits
    return sorted((example for part in splits.values() for example in part), key=lambda example: example.name)


def test_broken_images_are_skipped(examples):
    [(indices, images, [skipped])] = batches(Pictures(examples, 32), 12, 0)
    assert indices == [*range(4), *range(5, 12)] and images.shape == (11, 3, 32, 32) and images.dtype == torch.uint8
    assert (skipped.index, skipped.name) == (4, str(examples[4].path)) and skipped.reason.startswith("not an image")
    assert list(batches(Pictures(examples, 32), 2, 0, [[4]])) == [([], None, [skipped])]


def read(pictures, chosen, workers=0) -> dict:
    found = {}
    for indices, images, _ in batches(pictures, 3, workers, chosen):
        found |= dict(zip(indices, images if images is not None else (), strict=True))
    return found


def test_augmentation_does_not_depend_on_who_reads_the_image_or_when(examples):
    pictures = AugmentedPictures(examples, 32, seed=5, epoch=2)
    expected = read(pictures, [range(12)])
    assert len(expected) == 11
    for workers, chosen in ((0, [[7], [3, 2], [4], []]), (2, [[11, 0], [7], [3, 2], [5]])):
        found = read(pictures, chosen, workers)
        assert found.keys() == {index for part in chosen for index in part} - {4}
        assert all(image.equal(expected[index]) for index, image in found.items())
    whole = read(Pictures(examples, 32), [range(12)])
    for other in (AugmentedPictures(examples, 32, 5, 3), AugmentedPictures(examples, 32, 6, 2)):
        drawn = read(other, [range(12)])
        assert not any(drawn[index].equal(expected[index]) for index in expected)
        assert not any(drawn[index].equal(whole[index]) for index in expected)


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_leaves_the_global_generator_unchanged(examples, workers):
    before = torch.get_rng_state()
    read(AugmentedPictures(examples, 32, 0, 0), [[0, 1], [2]], workers)
    assert torch.get_rng_state().equal(before)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_to_a_worker_that_is_starting(examples, monkeypatch):
    """Launchers send SIGTERM to all processes at once, perhaps before a worker has set itself to ignore it."""
    monkeypatch.setattr(torch, "set_num_threads", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert read(Pictures(examples, 32), [[0, 1], [2]], workers=1).keys() == {0, 1, 2}
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGINT, signal.SIGTERM}


def test_every_epoch_has_every_image_once_in_a_different_order():
    drawn = draw_batches(23, 5, seed=1, epoch=0)
    assert [len(batch) for batch in drawn] == [5, 5, 5, 5, 3]
    assert sorted(index for batch in drawn for index in batch) == list(range(23))
    assert drawn == draw_batches(23, 5, 1, 0)
    others = [draw_batches(23, 5, 1, 1), draw_batches(23, 5, 2, 0), [list(range(i, i + 5)) for i in range(0, 23, 5)]]
    assert all(drawn != other for other in others)
    halves = draw_batches(23, 10, 1, 0)  # the order does not depend on the batch size
    assert [index for batch in halves for index in batch] == [index for batch in drawn for index in batch]


def test_seeds():
    numbers = [(a, b, c) for a in range(8) for b in range(8) for c in range(8)]
    seeds = {seed_of(purpose, *part) for purpose in ("order", "step") for part in numbers}
    assert len(seeds) == 2 * 8**3 and all(0 <= seed < 2**63 for seed in seeds)
    torch.Generator().manual_seed(max(seeds))


def test_captions_are_drawn_without_replacement():
    captions = [[1, 4, 2], [1, 5, 2], [1, 6, 6, 2]]
    assert sorted(draw_rows(captions, 3, 0)) == captions and len(set(map(tuple, draw_rows(captions, 2, 1)))) == 2
    assert len({str(draw_rows(captions, 3, seed)) for seed in range(60)}) == 6
    assert draw_rows(captions, 5, 3)[:2] == draw_rows(captions, 5, 3)[3:]
