"""The augmentation of an image depends on the seed, the epoch and the image, and on nothing else. Workers need no
shared memory, and one that fails or dies ends the work with one clear error."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from conftest import TINY, make_flickr8k
from PIL import Image

from attncap.data import dataset, read_dataset
from attncap.data.loader import AugmentedPictures, Pictures, batches, draw_batches, draw_rows, seed_of
from attncap.errors import UserError


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


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_workers_need_no_shared_memory(examples, monkeypatch):
    """As where /dev/shm is full: neither semaphores nor tensors find space in it."""
    expected = read(Pictures(examples, 32), [[0, 1], [2], [3]])
    monkeypatch.setattr("_multiprocessing.SemLock", no_space)
    for name in ("_share_fd_cpu_", "_share_filename_cpu_"):
        monkeypatch.setattr(torch.UntypedStorage, name, no_space)
    found = read(Pictures(examples, 32), [[0, 1], [2], [3]], workers=2)
    assert found.keys() == expected.keys() and all(found[index].equal(expected[index]) for index in expected)


class Failing(Pictures):
    """Image 7 does something to the process that reads it."""

    def __init__(self, examples, size, action):
        super().__init__(examples, size)
        self.action = action

    def __getitem__(self, index):
        return self.action() if index == 7 else super().__getitem__(index)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def fail():
    raise ValueError("two\nlines")


FAILURES = {
    "Killed": kill,
    "exit status 3": lambda: os._exit(3),
    "exit status 0": lambda: os._exit(0),
    "ValueError: two lines": fail,
}


@pytest.mark.parametrize("message", FAILURES)
@pytest.mark.parametrize("workers", [1, 3])
def test_a_worker_that_fails_or_dies(examples, message, workers):
    pictures, read = Failing(examples, 200, FAILURES[message]), []
    start = time.monotonic()
    with pytest.raises(UserError, match=f"^a worker, .*{message}.*--workers 0.*$"):
        for indices, _, _ in batches(pictures, 2, workers):
            read += indices
    assert read == [0, 1, 2, 3, 5]  # what came before it
    assert not multiprocessing.active_children() and time.monotonic() - start < 10


def test_a_worker_is_killed_while_it_writes_a_batch(examples):
    """Half a batch is in its pipe."""
    reading = batches(Pictures(examples, 224), 1, 2)
    next(reading)
    first, second = sorted(multiprocessing.active_children(), key=lambda process: process.pid)
    time.sleep(0.5)
    os.kill(second.pid, signal.SIGKILL)
    with pytest.raises(UserError, match="Killed"):
        list(reading)
    assert not first.is_alive()


def test_workers_end_when_reading_stops_early(examples):
    reading = batches(Pictures(examples, 224), 1, 2)
    next(reading)
    assert len(multiprocessing.active_children()) == 2
    reading.close()
    assert not multiprocessing.active_children()


def test_a_worker_that_cannot_start(examples, monkeypatch):
    """The first one can."""
    start, started = multiprocessing.Process.start, []

    def fail(self):
        if started:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        started.append(start(self))

    monkeypatch.setattr(multiprocessing.Process, "start", fail)
    with pytest.raises(UserError, match="cannot start 2 workers: .*Resource temporarily unavailable; .*--workers 0"):
        next(batches(Pictures(examples, 224), 1, 2))
    assert started and not multiprocessing.active_children()


def test_the_thread_that_started_the_workers_may_end(examples):
    reading, read = batches(Pictures(examples, 224), 1, 2), []
    thread = threading.Thread(target=lambda: read.extend(next(reading)[0]))
    thread.start()
    thread.join()
    assert read + [i for indices, _, _ in reading for i in indices] == [i for i in range(12) if i != 4]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_other_ways_to_start_processes(examples, monkeypatch, method):
    expected = read(AugmentedPictures(examples, 32, 5, 2), [range(12)])
    monkeypatch.setattr(multiprocessing, "Process", multiprocessing.get_context(method).Process)
    found = read(AugmentedPictures(examples, 32, 5, 2), [range(6), range(6, 12)], workers=2)
    assert found.keys() == expected.keys() and all(found[index].equal(expected[index]) for index in expected)


@pytest.mark.slow
@pytest.mark.parametrize("end, status", [("", 0), ("os.kill(os.getpid(), 9)", -9)])
def test_workers_end_with_their_parent(examples, end, status):
    """At its end, Python joins its children: these ignore SIGTERM, and wait until their batch is taken. They inherit
    standard output, so reading it to its end waits for them."""
    script = f"""
import os, sys
from pathlib import Path
from attncap.data import Example
from attncap.data.loader import Pictures, batches
reading = batches(Pictures([Example(str(i), (), Path(sys.argv[1])) for i in range(12)], 224), 1, 2)
next(reading)
{end}
"""
    command = [sys.executable, "-c", script, examples[0].path]
    assert subprocess.run(command, stdout=subprocess.PIPE, timeout=60).returncode == status


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_in_page_locked_memory(examples, monkeypatch, workers):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self.clone()) or pinned[-1])
    images = [batch for _, batch, _ in batches(Pictures(examples, 32), 1, workers, pin=True)]
    assert images.pop(4) is None and len(images) == len(pinned) == 11
    assert all(any(image is copy for copy in pinned) for image in images)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["caption", "evaluate", "data", "train", "train --cache-features"])
def test_a_worker_dies_in_a_command(attncap, trained, flickr8k, tmp_path, monkeypatch, command):
    parent = os.getpid()
    monkeypatch.setattr(dataset, "open_image", lambda _: os.getpid() == parent or kill())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fine_tune = "none" if "--cache-features" in command else "all"
    name, *flags = command.split()
    arguments = {
        "caption": [flickr8k / "Images", "--model", trained],
        "evaluate": ["--data", flickr8k, "--model", trained],
        "data": [flickr8k, "--decode"],
        "train": ["--data", flickr8k, "--output", tmp_path / "run", *TINY, "--fine-tune-from", fine_tune],
    }
    status, _, err = attncap(name, *arguments[name], *flags, "--workers", "2")
    *_, last = err.strip().splitlines()
    assert (
        status == 1 and last.startswith("attncap: error: a worker, ") and "(Killed)" in last and "--workers 0" in last
    )
    assert "Traceback" not in err and not multiprocessing.active_children()


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
