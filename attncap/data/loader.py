"""From examples to batches of tensors."""

import ctypes
import functools
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2

from attncap.data.vocabulary import Vocabulary
from attncap.errors import UserError


def to_tensor(image: Image.Image, size: int) -> Tensor:
    """An RGB image -> uint8 [3,size,size], resized without keeping its proportions: every part of it is seen."""
    image = image.resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class Pictures(Dataset):
    """Images by index, each as (index, uint8 [3,S,S] or the UserError that says why it cannot be read)."""

    def __init__(self, examples: Sequence, size: int):
        self.examples, self.size = examples, size

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[int, Tensor | UserError]:
        try:
            return index, self.prepare(self.examples[index].image())
        except UserError as error:
            return index, error

    def prepare(self, image: Image.Image) -> Tensor:
        return to_tensor(image, self.size)


class AugmentedPictures(Pictures):
    """For training: a random part of the image (60 to 100 % of its area), mirrored half of the time. What is drawn for
    an image depends on the seed, the epoch and its index alone, not on who reads it or what was read before."""

    def __init__(self, examples: Sequence, size: int, seed: int, epoch: int):
        super().__init__(examples, size)
        self.seed, self.epoch = seed, epoch
        self.augment = v2.Compose(
            [
                v2.RandomResizedCrop(size, scale=(0.6, 1), interpolation=InterpolationMode.BILINEAR),
                v2.RandomHorizontalFlip(),
            ]
        )

    def __getitem__(self, index: int) -> tuple[int, Tensor | UserError]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of("augmentation", self.seed, self.epoch, index))
            return super().__getitem__(index)

    def prepare(self, image: Image.Image) -> Tensor:
        return to_tensor(self.augment(image), self.size)


def seed_of(purpose: str, *numbers: int) -> int:
    """A seed of its own, below 2**63, for each purpose and each tuple of numbers."""
    return int(np.random.SeedSequence((*purpose.encode(), *numbers)).generate_state(1, np.uint64)[0]) >> 1


def draw_batches(count: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The indices of all `count` examples in the order of an epoch, cut into batches; the last one may be smaller."""
    order = np.random.default_rng(seed_of("order", seed, epoch)).permutation(count).tolist()
    return [order[i : i + batch_size] for i in range(0, count, batch_size)]


def batches(
    pictures: Dataset, batch_size: int, workers: int, chosen: Sequence[Sequence[int]] | None = None, pin: bool = False
) -> DataLoader:
    """Batches (indices, images uint8 [B,3,S,S], errors): the images that could be read, and an error for each of the
    others; images are None where none is left. `chosen` are the indices of each batch; by default all as they stand.
    `pin`: images in memory from which a GPU fetches them by itself."""
    if chosen is None:
        chosen = [range(i, min(i + batch_size, len(pictures))) for i in range(0, len(pictures), batch_size)]
    return _Loader(
        pictures,
        batch_sampler=chosen,
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=_start_worker,
        pin_memory=pin,
        generator=torch.Generator(),  # the loader seeds its workers; the process's own random numbers stay as they are
    )


class _Loader(DataLoader):
    def __iter__(self) -> Iterator:
        """Workers are born deaf to the signals that `_start_worker` has them ignore: one may come before that."""
        hears = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, hears)


def _start_worker(_: int) -> None:
    """A worker lives exactly as long as the process it reads for: signals, which launchers and Ctrl-C send to all
    processes at once, are for that one to act on; and it leaves no worker behind, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":  # elsewhere torch's own workers look every few seconds
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
        # It may have died before that.
        if multiprocessing.get_start_method() == "fork" and os.getppid() != multiprocessing.parent_process().pid:
            os._exit(1)


def _collate(items: list[tuple[int, Tensor | UserError]]) -> tuple[list[int], Tensor | None, list[UserError]]:
    good = [(index, image) for index, image in items if isinstance(image, Tensor)]
    errors = [image for _, image in items if not isinstance(image, Tensor)]
    images = torch.stack([image for _, image in good]) if good else None
    return [index for index, _ in good], images, errors


@functools.cache
def report(message: str) -> None:
    """Warn of an image that is left out; once, however many epochs meet it."""
    logging.getLogger("attncap").warning("skipped: %s", message)


def draw_rows(captions: Sequence[list[int]], rows: int, seed: int) -> list[list[int]]:
    """`rows` of an image's captions, drawn without repetition; of one that has fewer some come twice."""
    drawn = [captions[i] for i in np.random.default_rng(seed).permutation(len(captions))]
    return [drawn[i % len(drawn)] for i in range(rows)]


def pad(rows: list[list[int]]) -> Tensor:
    """Token ids of different lengths -> int64 [N,T], filled with <pad>."""
    longest = max(map(len, rows))
    return torch.tensor([row + [Vocabulary.PAD] * (longest - len(row)) for row in rows])
