"""Karpathy's splits (Karpathy and Fei-Fei 2015): dataset_coco.json, dataset_flickr8k.json, dataset_flickr30k.json.

{"images": [{"filepath": "val2014", "filename": "COCO_val2014_000000391895.jpg", "cocoid": 391895,
             "split": "test", "sentences": [{"raw": "A man with a red helmet ..."}]}]}

Flickr's files have no filepath and no cocoid. Folders of images are looked for beside the file, then one level up.
"""

from __future__ import annotations

import re
from pathlib import Path

from attncap.data.dataset import Dataset, Example, Skipped
from attncap.data.image_folders import find_image_folder, image_roots
from attncap.data.readers.splits import SPLITS, given_splits, keep_existing
from attncap.errors import UserError
from attncap.files import read_json

NAMES = ("dataset_coco.json", "dataset_flickr30k.json", "dataset_flickr8k.json")
OPTIONAL = {"filepath": str, "cocoid": int | str}  # null counts as missing
EXPECTED = "dataset_coco.json, dataset_flickr8k.json or dataset_flickr30k.json beside the images' folder (Karpathy)"


def find(path: Path) -> list[Path]:
    """The file itself, recognised by its first image; in a folder, the files with the names above."""
    if path.is_dir():
        return [path / name for name in NAMES if (path / name).is_file()]
    with path.open("rb") as file:
        return [path] if path.suffix.lower() == ".json" and re.search(rb'"sentences"\s*:', file.read(2**16)) else []


def read(path: Path, files: list[Path], seed: int, images: bool = True) -> Dataset:
    """The examples by the file's own split, with restval in train; `name` is COCO's id, or the file name of a Flickr
    image. `images` as in `read_dataset`.

    Raises UserError for a broken file, and where there are several files to choose from.
    """
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise UserError(f"{path}: expected one of Karpathy's files, found {names}; give the path of one")
    [source] = files
    content = read_json(source)
    entries = content.get("images") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise UserError(f'{source}: field "images" should be a list with entries, as in Karpathy\'s files')
    captions: dict[str, tuple[str, ...]] = {}
    paths: dict[str, str] = {}
    splits: dict[str, str] = {}
    for i, image in enumerate(entries):
        _check(source, f"images[{i}]", image, {"filename": str, "split": str, "sentences": list})
        if image["split"] not in SPLITS:
            raise UserError(f'{source}: field "split" of images[{i}] should be train, restval, val or test')
        for j, sentence in enumerate(image["sentences"]):
            _check(source, f"images[{i}].sentences[{j}]", sentence, {"raw": str})
        given = {key: kind for key, kind in OPTIONAL.items() if image.get(key) is not None}
        _check(source, f"images[{i}]", image, given)
        key = str(image["cocoid"] if "cocoid" in given else image["filename"])
        if key in splits:
            raise UserError(f"{source}: images[{i}] is {key[:60]!r}, which is there already; remove one")
        paths[key] = f"{image.get('filepath') or '.'}/{image['filename']}"
        captions[key] = tuple(text for sentence in image["sentences"] if (text := sentence["raw"].strip()))
        splits[key] = SPLITS[image["split"]]
    reason = f"{source} has no captions of it"
    skipped = [Skipped(None, f"image {key}", reason) for key, texts in captions.items() if not texts]
    folder = find_image_folder(paths.values(), image_roots(path, source))
    examples = [Example(key, texts, folder / paths[key]) for key, texts in captions.items() if texts]
    if not examples:
        raise UserError(f"{source}: no captions in it")
    examples, missing = keep_existing(examples, source, images, drawn=False)
    return Dataset(f"Karpathy's splits ({source.name})", given_splits(examples, splits), missing, skipped)


def _check(source: Path, where: str, entry: object, types: dict) -> None:
    for key, kind in types.items():
        if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
            raise UserError(f'{source}: field "{key}" of {where} is missing or of the wrong type')
