"""Data sets: images and their captions, split into train, val and test. Importing this does not import torch."""

from attncap.data.dataset import CaptionedImage, Dataset, Example, Skipped, Splits, first_of, report_skipped
from attncap.data.images import ImageError, open_image
from attncap.data.readers import check_dataset, open_dataset, read_dataset

__all__ = [
    "CaptionedImage",
    "Dataset",
    "Example",
    "ImageError",
    "Skipped",
    "Splits",
    "check_dataset",
    "first_of",
    "open_dataset",
    "open_image",
    "read_dataset",
    "report_skipped",
]
