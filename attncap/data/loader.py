"""From images of a data set to batches of tensors."""

import ctypes
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from attncap.data.dataset import CaptionedImage, Skipped
from attncap.data.images import ImageError
from attncap.data.vocabulary import Vocabulary


def to_tensor(image: Image.Image, size: int) -> Tensor:
    """An RGB image -> uint8 [3,size,size]. Proportions are not kept, so that every part of the image is seen."""
    image = image.resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class Pictures(Dataset):
    """Images by index, each as (index, uint8 [3,S,S]), or (index, Skipped) where the image cannot be read."""

    def __init__(self, examples: Sequence[CaptionedImage], size: int):
        self.examples, self.size = examples, size

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[int, Tensor | Skipped]:
        try:
            return index, self.prepare(self.examples[index].image())
        except ImageError as error:
            return index, Skipped(index, error.name, error.reason)

    def prepare(self, image: Image.Image) -> Tensor:
        return to_tensor(image, self.size)


class AugmentedPictures(Pictures):
    """For training: a random part of each image (60 to 100% of its area), mirrored half of the time. The draw depends
    only on the seed, the epoch and the image's index, not on the process that reads it or on what was read before."""

    def __init__(self, examples: Sequence[CaptionedImage], size: int, seed: int, epoch: int):
        from torchvision.transforms import InterpolationMode, v2  # slow to import, and only needed here

        super().__init__(examples, size)
        self.seed, self.epoch = seed, epoch
        self.augment = v2.Compose(
            [
                v2.RandomResizedCrop(size, scale=(0.6, 1), interpolation=InterpolationMode.BILINEAR),
                v2.RandomHorizontalFlip(),
            ]
        )

    def __getitem__(self, index: int) -> tuple[int, Tensor | Skipped]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of("augmentation", self.seed, self.epoch, index))
            return super().__getitem__(index)

    def prepare(self, image: Image.Image) -> Tensor:
        return to_tensor(self.augment(image), self.size)


def seed_of(purpose: str, *numbers: int) -> int:
    """A seed below 2**63, different for each purpose and each tuple of numbers."""
    return int(np.random.SeedSequence((*purpose.encode(), *numbers)).generate_state(1, np.uint64)[0]) >> 1


def draw_batches(count: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The indices of all `count` examples in the order of an epoch, cut into batches; the last one may be smaller."""
    order = np.random.default_rng(seed_of("order", seed, epoch)).permutation(count).tolist()
    return [order[i : i + batch_size] for i in range(0, count, batch_size)]


def batches(
    pictures: Dataset, batch_size: int, workers: int, chosen: Sequence[Sequence[int]] | None = None, pin: bool = False
) -> DataLoader:
    """Batches (indices, images uint8 [B,3,S,S], skipped): the images that could be read, None where there are none, and
    a list of Skipped with the others. From a FeatureCache, features [B,P,D] instead of images.

    `chosen` has the indices of each batch; by default all images come in order. With `pin`, batches are in page-locked
    memory, from which copies to a GPU are asynchronous.
    """
    if chosen is None:
        chosen = [range(i, min(i + batch_size, len(pictures))) for i in range(0, len(pictures), batch_size)]
    return _Loader(
        pictures,
        batch_sampler=chosen,
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=_start_worker,
        pin_memory=pin,
        generator=torch.Generator(),  # seeds the workers without drawing from the process's own generator
    )


class _Loader(DataLoader):
    def __iter__(self) -> Iterator:
        """Workers inherit the mask of blocked signals. Blocking SIGINT and SIGTERM while they start keeps one that
        arrives before `_start_worker` has run from killing them."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(_: int) -> None:
    """Tie a worker's life to its parent's. Launchers and Ctrl-C send signals to all processes at once: only the parent
    acts on them, workers ignore them. A worker ends when the parent does, whatever ended it."""
    warnings.filterwarnings("ignore", module="PIL")  # about odd metadata: every worker would print them
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":  # elsewhere torch's workers check for the parent every few seconds
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
        # The parent may have died before the call above.
        if multiprocessing.get_start_method() == "fork" and os.getppid() != multiprocessing.parent_process().pid:
            os._exit(1)


def _collate(items: list[tuple[int, Tensor | Skipped]]) -> tuple[list[int], Tensor | None, list[Skipped]]:
    indices = [index for index, item in items if isinstance(item, Tensor)]
    images = [item for _, item in items if isinstance(item, Tensor)]
    skipped = [item for _, item in items if isinstance(item, Skipped)]
    return indices, torch.stack(images) if images else None, skipped


def draw_rows(captions: Sequence[list[int]], rows: int, seed: int) -> list[list[int]]:
    """`rows` of an image's captions, drawn without replacement; where there are fewer, they repeat."""
    drawn = [captions[i] for i in np.random.default_rng(seed).permutation(len(captions))]
    return [drawn[i % len(drawn)] for i in range(rows)]


def pad(rows: list[list[int]]) -> Tensor:
    """Token ids of different lengths -> int64 [N,T], filled with <pad>."""
    longest = max(map(len, rows))
    return torch.tensor([row + [Vocabulary.PAD] * (longest - len(row)) for row in rows])
