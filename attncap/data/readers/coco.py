"""COCO captions (Chen et al. 2015): annotations/captions_train2017.json beside train2017/, and so on.

The official test set, annotations/image_info_test2017.json beside test2017/, has images without captions.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from itertools import product
from pathlib import Path

from attncap.data.dataset import Example, Skipped, report_skipped
from attncap.data.image_folders import Folders, ImagePlaces
from attncap.data.readers import karpathy
from attncap.data.readers.caption_file import CaptionFile, find_examples, has_word
from attncap.errors import UserError
from attncap.files import read_beginning, read_json

EXPECTED = "annotations/captions_*.json beside folders such as train2017/ (COCO)"
_BEGINNING = re.compile(rb'\s*\{\s*"(info|licenses|images|annotations|type)"')
TYPES = {
    "annotations": {"id": (int, str), "image_id": (int, str), "caption": str},
    "images": {"id": (int, str), "file_name": str},
}


def find(path: Path, folders: Folders) -> list[Path]:
    """The file itself, unless it is Karpathy's; in a folder, the caption files in annotations/ or in the folder itself,
    or else its lists of images."""
    if path.is_file():
        return [path] if path.suffix.lower() == ".json" and not karpathy.find(path, folders) else []
    in_annotations = _json_files(path / "annotations", folders)
    others = set(karpathy.find(path, folders))
    # Outside annotations/, other files may have such names, e.g. results.
    here = [file for file in _json_files(path, folders) if file not in others]
    for files, kind in product((in_annotations, here), ("caption", "image_info_")):
        named = [file for file in files if kind in file.name.lower()]
        if named := [file for file in named if files is in_annotations or _BEGINNING.match(read_beginning(file))]:
            return named
    return []


def _json_files(folder: Path, folders: Folders) -> list[Path]:
    return sorted(folder / name for name in folders.names(folder).exact if name.lower().endswith(".json"))


def read(path: Path, files: list[Path]) -> tuple[str, list[CaptionFile]]:
    """The layout, and the captions; the name of an image is its id, so that results are in COCO's own format.

    With a train and a val file, the images of val have no split yet: the official test set has no public captions. The
    images of a list of images are all in test. Raises UserError for broken files and missing fields.
    """
    layout = f"COCO ({', '.join(file.name for file in files)})"
    if len(files) == 1 and files[0].name.startswith("image_info_"):
        return f"{layout}: images without captions", [_image_list(files[0])]
    if len(files) == 1:
        return layout, [_captions(files[0])]
    train_files = [file for file in files if "train" in file.name.lower()]
    val_files = [file for file in files if "val" in file.name.lower()]
    if len(files) != 2 or len(train_files) != 1 or len(val_files) != 1:
        names = ", ".join(file.name for file in files)
        raise UserError(
            f"{files[0].parent}: expected one captions_train*.json and one captions_val*.json, "
            f"found {names}; give the path of one file, or move the others away"
        )
    train, val = _captions(train_files[0]), _captions(val_files[0])
    train.splits = dict.fromkeys(train.files, "train")
    return layout, [train, val]


def read_captions(path: str | Path) -> dict[str, list[str]]:
    """Captions by image id (as text), without those that have no word. Raises UserError naming the file and the field
    that is wrong."""
    captions: dict[str, list[str]] = {}
    skipped: list[Skipped] = []
    for annotation in _entries(Path(path), "annotations")["annotations"]:
        key, caption = str(annotation["image_id"]), annotation["caption"].strip()
        if has_word(caption):
            captions.setdefault(key, []).append(caption)
        else:
            skipped.append(Skipped(None, f"image id {key}", f"{path} has a caption of it without a word"))
    report_skipped(skipped)
    return captions


def read_images(path: Path) -> tuple[list[Example], list[Skipped]]:
    """All images of a file, without captions, and those whose files do not exist. Raises UserError."""
    path = path.absolute()
    examples, missing, skipped = find_examples(_image_list(path), ImagePlaces.of(path, path), Folders(), drawn=False)
    return examples, [*missing, *skipped]


def _image_list(path: Path) -> CaptionFile:
    files = _files(path, _entries(path, "images")["images"])
    return CaptionFile(path, dict.fromkeys(files, ()), files, dict.fromkeys(files, "test"))


def _captions(path: Path) -> CaptionFile:
    """The captions by image id, with the images and captions that do not belong together as `skipped`."""
    entries = _entries(path, "annotations", "images")
    # By the ids as they are in the file: as for pycocotools, a caption of image "7" is not one of image 7.
    captions: dict[int | str, list[str]] = {image["id"]: [] for image in entries["images"]}
    unknown = dict.fromkeys(a["image_id"] for a in entries["annotations"] if a["image_id"] not in captions)
    for annotation in entries["annotations"]:
        key, caption = annotation["image_id"], annotation["caption"].strip()
        if caption and key not in unknown:
            captions[key].append(caption)
    reason = f'{path} has captions of it, but no entry in "images"'
    skipped = [Skipped(None, f"image id {key}", reason) for key in unknown]
    without = [key for key, texts in captions.items() if not texts]
    skipped += [Skipped(None, f"image id {key}", f"{path} has no captions of it") for key in without]
    kept = {str(key): texts for key, texts in captions.items() if texts}
    if not kept:
        raise UserError(f'{path}: no caption belongs to an image of field "images"')
    files = {image: name for image, name in _files(path, entries["images"]).items() if image in kept}
    return CaptionFile(path, kept, files, skipped=skipped)


def _files(path: Path, images: list[dict]) -> dict[str, str]:
    """The files by image id, in the folder after which the file of captions is named: captions_val2017.json, val2017/.
    COCO's test-dev has no folder of its own: it is a part of test."""
    folder = re.sub(".*captions?_|image_info_|-dev", "", path.stem)
    return {str(image["id"]): os.path.join(folder, image["file_name"]) for image in images}


def _entries(path: Path, *fields: str) -> dict[str, list[dict]]:
    """These fields of the file, their entries checked."""
    content = read_json(path)
    for field in fields:
        _check(path, content, field, TYPES[field])
    return {field: content[field] for field in fields}


def _check(path: Path, content: object, field: str, types: dict) -> None:
    entries = content.get(field) if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise UserError(f'{path}: field "{field}" should be a list with entries, as in COCO\'s files')
    for i, entry in enumerate(entries):
        for key, kind in types.items():
            if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
                raise UserError(f'{path}: field "{key}" of {field}[{i}] is missing or of the wrong type')
    if field == "images":
        [(twice, times)] = Counter(str(entry["id"]) for entry in entries).most_common(1)
        if times > 1:
            raise UserError(f"{path}: image id {twice} appears {times} times in its images; keep one")
