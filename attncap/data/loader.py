"""From examples to batches of tensors."""

import functools
import logging
from collections.abc import Sequence

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
    """For training: a random part of the image (60 to 100 % of its area), mirrored half of the time."""

    def __init__(self, examples: Sequence, size: int):
        super().__init__(examples, size)
        self.augment = v2.Compose(
            [
                v2.RandomResizedCrop(size, scale=(0.6, 1), interpolation=InterpolationMode.BILINEAR),
                v2.RandomHorizontalFlip(),
            ]
        )

    def prepare(self, image: Image.Image) -> Tensor:
        return to_tensor(self.augment(image), self.size)


def batches(pictures: Pictures, batch_size: int, workers: int, order: Sequence[int] | None = None) -> DataLoader:
    """Batches (indices, images uint8 [B,3,S,S], errors): the images that could be read, and an error for each of the
    others. `order` tells which examples, and in which order; by default all as they stand."""
    return DataLoader(pictures, batch_size, sampler=order, num_workers=workers, collate_fn=_collate)


def _collate(items: list[tuple[int, Tensor | UserError]]) -> tuple[list[int], Tensor | None, list[UserError]]:
    good = [(index, image) for index, image in items if isinstance(image, Tensor)]
    errors = [image for _, image in items if not isinstance(image, Tensor)]
    images = torch.stack([image for _, image in good]) if good else None
    return [index for index, _ in good], images, errors


@functools.cache
def report(message: str) -> None:
    """Warn of an image that is left out; once, however many epochs meet it."""
    logging.getLogger("attncap").warning("skipped: %s", message)


def caption_rows(captions: Sequence[str], rows: int, vocabulary: Vocabulary, max_length: int, rng) -> list[list[int]]:
    """`rows` captions of an image as token ids, drawn without repetition; an image that has fewer has some twice."""
    drawn = [captions[i] for i in rng.permutation(len(captions))]
    return [vocabulary.encode(drawn[i % len(drawn)], max_length) for i in range(rows)]


def pad(rows: list[list[int]]) -> Tensor:
    """Token ids of different lengths -> int64 [N,T], filled with <pad>."""
    longest = max(map(len, rows))
    return torch.tensor([row + [Vocabulary.PAD] * (longest - len(row)) for row in rows])
