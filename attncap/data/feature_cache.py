"""Features of a frozen encoder, computed once, kept on disk in half precision and read through a memory map.

Each encoder (its name, layer, grid and weights, and the images' size) has a folder of its own. A file in it is a
safetensors file of at most SHARD bytes with the features of some images and, in its header, the images' identities. It
gets its name when it is complete and never changes afterwards. So runs over the same images share their features, also
with different splits; several processes may write at once; and after an interruption only the last file is missing.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from attncap.data.dataset import CaptionedImage, Skipped
from attncap.data.feature_size import feature_bytes, size_in_words
from attncap.data.loader import Pictures, batches
from attncap.errors import UserError
from attncap.files import open_regular, write_atomically
from attncap.weights import open_safetensors

SHARD = 128 * 2**20
VERSION = 1  # part of the folders' names: raise it when images are read, resized or generated in another way

log = logging.getLogger("attncap")


class FeatureCache(Dataset):
    """Features by index, each as (index, float16 [P,D]), or (index, Skipped) where the image could not be read: what
    `Pictures` is for images.

    `locations` has for each index a file and the row in it, or Skipped. The files are opened at once, so that deleting
    them later does no harm. A copy sent to another process opens them again.
    """

    def __init__(self, folder: Path, locations: Sequence[tuple[Path, int] | Skipped]):
        self.folder, self.locations = folder, locations
        paths = {location[0] for location in locations if not isinstance(location, Skipped)}
        self.features = {path: _open(path) for path in paths}

    @classmethod
    def of(
        cls,
        examples: Sequence[CaptionedImage],
        encoder: nn.Module,
        image_size: int,
        batch_size: int,
        workers: int,
        folder: Path | None = None,
    ) -> "FeatureCache":
        """The features of `examples` from `folder`, by default `cache_folder()`. Those that are missing are computed
        first, by `encoder` on its device, in batches of `batch_size` images that `workers` processes read, and added.

        Images are found by their `identity()`. Those that cannot be read are Skipped, and tried again the next time.
        Raises UserError when the disk has not enough space, the folder cannot be written, or half precision cannot hold
        the features.
        """
        cells, channels = encoder.grid_shape(image_size)
        folder = (folder or cache_folder()) / _key(encoder, image_size, cells)
        locations = _find(folder, cells, channels)
        images = [example.identity() for example in examples]
        missing = {image: example for image, example in zip(images, examples, strict=True) if image not in locations}
        if missing:
            _check_space(folder, len(missing), cells, channels)
            print(f"writing features to {folder}: {size_in_words(len(missing), cells, channels)}")
            pictures = Pictures(list(missing.values()), image_size)
            locations |= _encode(list(missing), pictures, encoder, batch_size, workers, folder)
        return cls(folder, [locations[image] for image in images])

    def __len__(self) -> int:
        return len(self.locations)

    def __getitem__(self, index: int) -> tuple[int, Tensor | Skipped]:
        location = self.locations[index]
        if isinstance(location, Skipped):
            return index, replace(location, index=index)
        path, row = location
        return index, self.features[path][row]

    def __reduce__(self):
        return FeatureCache, (self.folder, self.locations)


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/attncap, by default ~/.cache/attncap. Data sets' folders are often read-only, and runs share
    features."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attncap"


@torch.inference_mode()
def _encode(
    images: list[str], pictures: Pictures, encoder: nn.Module, batch_size: int, workers: int, folder: Path
) -> dict[str, tuple[Path, int] | Skipped]:
    """Write the features of `pictures`, whose identities are `images`. Returns the location of each."""
    training, device = encoder.training, next(encoder.parameters()).device
    locations: dict[str, tuple[Path, int] | Skipped] = {}
    waiting: list[tuple[str, Tensor]] = []
    done = 0
    encoder.eval()
    try:
        with tqdm(total=len(images), desc="encoding images", unit="image", leave=False) as bar:
            for indices, batch, skipped in batches(pictures, batch_size, workers):
                locations |= {images[item.index]: item for item in skipped}
                if batch is not None:
                    features = encoder(batch.to(device)).half().cpu()
                    for index, cells in zip(indices, features, strict=True):
                        if not cells.isfinite().all():
                            raise UserError(
                                f"{pictures.examples[index].name}: its features do not fit half precision "
                                "(beyond 65504, or NaN); train without --cache-features"
                            )
                        waiting.append((images[index], cells))
                done += len(indices) + len(skipped)
                bar.update(done - bar.n)
                rows = max(1, SHARD // waiting[0][1].nbytes) if waiting else 0
                while waiting and (len(waiting) >= rows or done == len(images)):
                    locations |= _write(folder, waiting[:rows])
                    del waiting[:rows]
    finally:
        encoder.train(training)
    return locations


def _write(folder: Path, rows: list[tuple[str, Tensor]]) -> dict[str, tuple[Path, int]]:
    """Write a file of features, named after its images: two processes that encode the same images write one file."""
    images = [image for image, _ in rows]
    path = folder / f"{hashlib.sha256(json.dumps(images).encode()).hexdigest()[:16]}.safetensors"
    features = torch.stack([features for _, features in rows])
    write_atomically(path, safetensors.torch.save({"features": features}, {"images": json.dumps(images)}))
    return {image: (path, row) for row, image in enumerate(images)}


def _find(folder: Path, cells: int, channels: int) -> dict[str, tuple[Path, int]]:
    """The location of every image whose features are in the folder. Removes files that are damaged or hold anything
    else, and temporary files older than an hour, which a killed process left."""
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > 3600:
                path.unlink()
    locations: dict[str, tuple[Path, int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            open_regular(path).close()
            with open_safetensors(path) as file:
                images, features = json.loads(file.metadata()["images"]), file.get_slice("features")
            if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
                raise ValueError("no list of images")
            if (features.get_dtype(), features.get_shape()) != ("F16", [len(images), cells, channels]):
                raise ValueError("not the features of these images")
        except OSError:  # just deleted, not permitted, or not a regular file: left alone
            continue
        except Exception as error:  # safetensors raises errors of many types
            log.warning("%s: damaged, its images are encoded again (%s)", path, error)
            with contextlib.suppress(OSError):
                path.unlink()
            continue
        locations |= {image: (path, row) for row, image in enumerate(images)}
    return locations


def _open(path: Path) -> Tensor:
    """float16 [images,P,D], memory-mapped: pages are loaded when they are read, and all processes share them."""
    try:
        with open_safetensors(path) as file:
            return file.get_tensor("features")
    except Exception as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def _key(encoder: nn.Module, image_size: int, cells: int) -> str:
    """The name of an encoder's folder. The layer and the number of cells determine the grid."""
    digest = hashlib.sha256(f"{VERSION}".encode())
    for name, value in sorted([*encoder.named_parameters(), *encoder.named_buffers()]):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return f"{encoder.name}-{encoder.layer}-{image_size}px-{cells}cells-{digest.hexdigest()[:16]}"


def _check_space(folder: Path, images: int, cells: int, channels: int) -> None:
    """Make the folder. Raises UserError when it cannot be made, or its disk has not enough space for the features."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; set XDG_CACHE_HOME to another folder") from error
    if free < feature_bytes(images, cells, channels):
        raise UserError(
            f"{folder}: not enough space for the features of the images ({size_in_words(images, cells, channels)}): "
            f"{free / 2**20:,.0f} MiB free; set XDG_CACHE_HOME to a folder on a larger disk, or train without "
            "--cache-features"
        )
