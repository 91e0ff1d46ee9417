"""COCO captions (Chen et al. 2015): annotations/captions_train2017.json beside train2017/, and so on.

The official test set, annotations/image_info_test2017.json beside test2017/, has images only: to be captioned.
"""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pycocotools.coco import COCO

from attncap.data import Dataset, Example, draw_parts, draw_splits, karpathy, keep_existing, report
from attncap.errors import UserError
from attncap.files import read_json

EXPECTED = "annotations/captions_*.json beside folders such as train2017/ (COCO)"
TYPES = {
    "annotations": {"id": (int, str), "image_id": (int, str), "caption": str},
    "images": {"id": (int, str), "file_name": str},
}


def find(path: Path) -> list[Path]:
    """The file itself, if it is not Karpathy's, or the caption files in annotations/, or else its lists of images."""
    if path.is_file():
        return [path] if path.suffix.lower() == ".json" and not karpathy.find(path) else []
    annotations = path / "annotations"
    return sorted(annotations.glob("captions_*.json")) or sorted(annotations.glob("image_info_*.json"))


def read(path: Path, files: list[Path], seed: int, images: bool = True) -> Dataset:
    """The examples by split; `name` is the image id, so that results are in COCO's own format. `images` as in
    `read_dataset`.

    With a train and a val file, train is train and the seed cuts val into halves, val and test (the
    official test set has no public captions). A single file is cut 80/10/10; a list of images is all
    test. Raises UserError on broken files, missing fields and missing folders.
    """
    layout = f"COCO ({', '.join(file.name for file in files)})"
    if len(files) == 1 and files[0].name.startswith("image_info_"):
        examples, missing = read_images(files[0])
        return Dataset(f"{layout}: images without captions", {"train": [], "val": [], "test": examples}, missing)
    if len(files) == 1:
        examples, missing = _examples(files[0], images)
        return Dataset(layout, draw_splits(examples, seed), missing)
    kinds = {kind: [f for f in files if _suffix(f).startswith(kind)] for kind in ("train", "val")}
    if len(files) != 2 or not all(len(found) == 1 for found in kinds.values()):
        names = ", ".join(file.name for file in files)
        raise UserError(
            f"{path / 'annotations'}: expected one captions_train*.json and one captions_val*.json, "
            f"found {names}; give the path of one file, or move the others away"
        )
    held, missing_held = _examples(kinds["val"][0], images)
    train, missing = _examples(kinds["train"][0], images)
    val, test = draw_parts(held, [len(held) // 2], seed)
    return Dataset(layout, {"train": train, "val": val, "test": test}, missing + missing_held)


def read_captions(path: str | Path) -> dict[str, list[str]]:
    """Captions by image id (as text), without blank ones. Raises UserError naming the file and the field that is
    wrong."""
    captions: dict[str, list[str]] = {}
    blank: list[str] = []
    for annotation in _load(Path(path), "annotations").dataset["annotations"]:
        key, caption = str(annotation["image_id"]), annotation["caption"].strip()
        if caption:
            captions.setdefault(key, []).append(caption)
        else:
            blank.append(key)
    report(path, blank, "blank captions, of images")
    return captions


def read_images(path: Path) -> tuple[Sequence[Example], list[Path]]:
    """All images of a file, without captions, and the missing ones. Raises UserError."""
    coco = _load(path, "images")
    folder = _image_folder(path)
    examples = [Example(str(key), (), folder / image["file_name"]) for key, image in coco.imgs.items()]
    return keep_existing(examples, path)


def _examples(path: Path, images: bool) -> tuple[Sequence[Example], list[Path]]:
    coco = _load(path, "annotations", "images")
    folder = _image_folder(path, images)
    captions = {
        key: tuple(a["caption"].strip() for a in annotations if a["caption"].strip())
        for key, annotations in coco.imgToAnns.items()
    }
    examples = [
        Example(str(key), captions[key], folder / image["file_name"])
        for key, image in coco.imgs.items()
        if captions.get(key)
    ]
    unknown = [str(key) for key in captions if key not in coco.imgs]
    report(path, unknown, 'image ids with captions that "images" lacks')
    report(path, [str(key) for key in coco.imgs if not captions.get(key)], "images without captions")
    if not examples:
        raise UserError(f'{path}: no caption belongs to an image of field "images"')
    return keep_existing(examples, path, images)


def _image_folder(path: Path, needed: bool = True) -> Path:
    path, name = path.absolute(), _suffix(path)
    candidates = [top / name for top in (path.parent.parent, path.parent, path.parent.parent / "images")]
    for folder in candidates:
        if folder.is_dir():
            return folder
    if not needed:
        return candidates[0]
    raise UserError(f"{path}: no folder with its images; put them in {candidates[0]}")


def _load(path: Path, *fields: str) -> COCO:
    """An index of these fields alone: pycocotools stumbles over other ones that are not as in COCO's own files."""
    content = read_json(path)
    for field in fields:
        _check(path, content, field, TYPES[field])
    coco = COCO()
    coco.dataset = {field: content[field] for field in fields}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        coco.createIndex()
    return coco


def _check(path: Path, content: object, field: str, types: dict) -> None:
    """pycocotools takes the fields for granted; this names the one that is wrong."""
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
            raise UserError(f"{path}: image id {twice} stands {times} times in its images; keep one")


def _suffix(path: Path) -> str:
    """What images' folder a file is about. COCO's test-dev has no folder of its own: it is a part of test."""
    return path.stem.removeprefix("captions_").removeprefix("image_info_").replace("-dev", "")
