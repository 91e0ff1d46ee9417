"""Features of a frozen encoder, computed once, kept on disk in half precision and read through a memory map.

The files of one encoder (its name, layer, grid and weights, and the images' size) stand in a folder of their own. Each
is a safetensors file of at most SHARD bytes with the features of some images and, in its header, which images they are;
it takes its name when it is whole and is never changed afterwards. So runs over the same images share their features,
with other splits too; several may write at once; and what was interrupted goes on behind the last whole file.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from attncap.data.loader import Pictures, batches, report
from attncap.errors import UserError
from attncap.files import write_atomically

SHARD = 128 * 2**20
VERSION = 1  # to be raised when images are read, resized or drawn in another way: older features are then not found

log = logging.getLogger("attncap")


class FeatureCache(Dataset):
    """Features by index, each as (index, float16 [P,D] or the UserError that says why the image cannot be read): what
    `Pictures` is for images.

    `places` are, for each index, a file and the row in it, or the error. Opens the files, so that they may be removed
    while they are in use; a process that gets a copy of this opens them for itself.
    """

    def __init__(self, folder: Path, places: Sequence[tuple[Path, int] | UserError]):
        self.folder, self.places = folder, places
        paths = {place[0] for place in places if not isinstance(place, UserError)}
        self.features = {path: _open(path) for path in paths}

    @classmethod
    def of(
        cls,
        examples: Sequence,
        encoder: nn.Module,
        image_size: int,
        batch_size: int,
        workers: int,
        folder: Path | None = None,
    ) -> "FeatureCache":
        """The features of `examples`, from `folder` (by default `cache_folder()`), where those that are missing are
        added first: by `encoder` on its device, in batches of `batch_size` images that `workers` processes read.

        An image is known by its file's path, size and time of change, a scene of `shapes` by what is drawn. One that
        cannot be read is reported, and tried again the next time. Raises UserError when the disk has no room, the
        folder cannot be written, or half precision cannot hold the features.
        """
        cells, channels = encoder.grid_shape(image_size)
        folder = (folder or cache_folder()) / _key(encoder, image_size, cells)
        places = _find(folder)
        images = [_identity(example) for example in examples]
        missing = {image: example for image, example in zip(images, examples, strict=True) if image not in places}
        if missing:
            _check_room(folder, len(missing), cells, channels)
            print(f"writing features to {folder}: {size_in_words(len(missing), cells, channels)}")
            pictures = Pictures(list(missing.values()), image_size)
            places |= _encode(list(missing), pictures, encoder, batch_size, workers, folder)
        return cls(folder, [places[image] for image in images])

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[int, Tensor | UserError]:
        place = self.places[index]
        if isinstance(place, UserError):
            return index, place
        path, row = place
        return index, self.features[path][row]

    def __reduce__(self):
        return FeatureCache, (self.folder, self.places)


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/attncap, by default ~/.cache/attncap: a data set's own folder is often read-only, and runs with
    folders of their own should share their features."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attncap"


def size_of(images: int, cells: int, channels: int) -> int:
    """Bytes of the features of so many images, in half precision."""
    return images * cells * channels * 2


def size_in_words(images: int, cells: int, channels: int) -> str:
    size = size_of(images, cells, channels) / 2**20
    return f"{size:,.0f} MiB = {images:,} images x {cells} cells x {channels} channels x 2 bytes"


@torch.inference_mode()
def _encode(
    images: list[str], pictures: Pictures, encoder: nn.Module, batch_size: int, workers: int, folder: Path
) -> dict[str, tuple[Path, int] | UserError]:
    """Write the features of `pictures`, which are known as `images`. Returns the place of each."""
    training, device = encoder.training, next(encoder.parameters()).device
    places, waiting, done = {}, [], 0
    encoder.eval()
    try:
        with tqdm(total=len(images), desc="encoding images", unit="image", leave=False) as bar:
            for indices, batch, errors in batches(pictures, batch_size, workers):
                start, done = done, done + len(indices) + len(errors)
                broken = [index for index in range(start, done) if index not in indices]
                for index, error in zip(broken, errors, strict=True):
                    report(str(error))
                    places[images[index]] = error
                if batch is not None:
                    features = encoder(batch.to(device)).half().cpu()
                    for index, cells in zip(indices, features, strict=True):
                        if not cells.isfinite().all():
                            raise UserError(
                                f"{pictures.examples[index].name}: has features that half precision cannot hold "
                                "(beyond 65504, or not a number); train without --cache-features"
                            )
                        waiting.append((images[index], cells))
                rows = max(1, SHARD // waiting[0][1].nbytes) if waiting else 0
                while waiting and (len(waiting) >= rows or done == len(images)):
                    places |= _write(folder, waiting[:rows])
                    del waiting[:rows]
                bar.update(done - start)
    finally:
        encoder.train(training)
    return places


def _write(folder: Path, rows: list[tuple[str, Tensor]]) -> dict[str, tuple[Path, int]]:
    """Write a file of features, named after its images: who encodes the same ones writes the same file."""
    images = [image for image, _ in rows]
    path = folder / f"{hashlib.sha256(json.dumps(images).encode()).hexdigest()[:16]}.safetensors"
    features = torch.stack([features for _, features in rows])
    write_atomically(path, safetensors.torch.save({"features": features}, {"images": json.dumps(images)}))
    return {image: (path, row) for row, image in enumerate(images)}


def _find(folder: Path) -> dict[str, tuple[Path, int]]:
    """The place of every image whose features the folder holds. A file that is damaged is removed, and so is what a
    process that was killed left an hour ago or more."""
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > 3600:
                path.unlink()
    places = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                images = json.loads(file.metadata()["images"])
        except OSError:  # removed since, or not ours to read
            continue
        except (SafetensorError, ValueError, LookupError, TypeError) as error:
            log.warning("%s: damaged, its images are encoded anew (%s)", path, error)
            path.unlink(missing_ok=True)
            continue
        places |= {image: (path, row) for row, image in enumerate(images)}
    return places


def _open(path: Path) -> Tensor:
    """float16 [images,P,D], mapped: pages come into memory as they are read, and all processes share them."""
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor("features")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def _key(encoder: nn.Module, image_size: int, cells: int) -> str:
    """The name of an encoder's folder. With the layer, the number of cells tells the grid they were pooled to."""
    digest = hashlib.sha256(f"{VERSION}".encode())
    for name, value in sorted([*encoder.named_parameters(), *encoder.named_buffers()]):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return f"{encoder.name}-{encoder.layer}-{image_size}px-{cells}cells-{digest.hexdigest()[:16]}"


def _identity(example) -> str:
    """What an image is known by."""
    path = getattr(example, "path", None)
    if path is None:
        return repr(example)
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return json.dumps([os.path.abspath(path)])
    return json.dumps([os.path.abspath(path), status.st_size, status.st_mtime_ns])


def _check_room(folder: Path, images: int, cells: int, channels: int) -> None:
    """Make the folder. Raises UserError when it cannot be made, or its disk has no room for the features."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; set XDG_CACHE_HOME to another folder") from error
    if free < size_of(images, cells, channels):
        raise UserError(
            f"{folder}: no room for the features of the images ({size_in_words(images, cells, channels)}): "
            f"{free / 2**20:,.0f} MiB are free; set XDG_CACHE_HOME to a folder on a larger disk, or train without "
            "--cache-features"
        )
