"""COCO captions (Chen et al. 2015): annotations/captions_train2017.json beside train2017/, and so on.

The official test set, annotations/image_info_test2017.json beside test2017/, has images without captions.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from attncap.data.dataset import Dataset, Example, Skipped, report_skipped
from attncap.data.readers import karpathy
from attncap.data.readers.splits import draw_parts, draw_splits, keep_existing
from attncap.errors import UserError
from attncap.files import read_json

EXPECTED = "annotations/captions_*.json beside folders such as train2017/ (COCO)"
TYPES = {
    "annotations": {"id": (int, str), "image_id": (int, str), "caption": str},
    "images": {"id": (int, str), "file_name": str},
}


def find(path: Path) -> list[Path]:
    """The file itself, unless it is Karpathy's; in a folder, the caption files in annotations/, or else its lists of
    images."""
    if path.is_file():
        return [path] if path.suffix.lower() == ".json" and not karpathy.find(path) else []
    annotations = path / "annotations"
    return sorted(annotations.glob("captions_*.json")) or sorted(annotations.glob("image_info_*.json"))


def read(path: Path, files: list[Path], seed: int, images: bool = True) -> Dataset:
    """The examples by split; `name` is the image id, so that results are in COCO's own format. `images` as in
    `read_dataset`.

    With a train and a val file, the seed cuts val into halves, val and test (the official test set has no public
    captions). A single file is split 80/10/10; a list of images is all test. Raises UserError for broken files, missing
    fields and missing folders.
    """
    layout = f"COCO ({', '.join(file.name for file in files)})"
    if len(files) == 1 and files[0].name.startswith("image_info_"):
        examples, missing = read_images(files[0])
        return Dataset(f"{layout}: images without captions", {"train": [], "val": [], "test": examples}, missing)
    if len(files) == 1:
        examples, missing, skipped = _examples(files[0], images)
        return Dataset(layout, draw_splits(examples, seed), missing, skipped)
    train_files = [file for file in files if _image_set(file).startswith("train")]
    val_files = [file for file in files if _image_set(file).startswith("val")]
    if len(files) != 2 or len(train_files) != 1 or len(val_files) != 1:
        names = ", ".join(file.name for file in files)
        raise UserError(
            f"{path / 'annotations'}: expected one captions_train*.json and one captions_val*.json, "
            f"found {names}; give the path of one file, or move the others away"
        )
    held_out, held_out_missing, held_out_skipped = _examples(val_files[0], images)
    train, missing, skipped = _examples(train_files[0], images)
    val, test = draw_parts(held_out, [len(held_out) // 2], seed)
    splits = {"train": train, "val": val, "test": test}
    return Dataset(layout, splits, missing + held_out_missing, skipped + held_out_skipped)


def read_captions(path: str | Path) -> dict[str, list[str]]:
    """Captions by image id (as text), without blank ones. Raises UserError naming the file and the field that is
    wrong."""
    captions: dict[str, list[str]] = {}
    skipped: list[Skipped] = []
    for annotation in _entries(Path(path), "annotations")["annotations"]:
        key, caption = str(annotation["image_id"]), annotation["caption"].strip()
        if caption:
            captions.setdefault(key, []).append(caption)
        else:
            skipped.append(Skipped(None, f"image id {key}", f"{path} has a blank caption of it"))
    report_skipped(skipped)
    return captions


def read_images(path: Path) -> tuple[list[Example], list[Skipped]]:
    """All images of a file, without captions, and those whose files do not exist. Raises UserError."""
    entries = _entries(path, "images")["images"]
    folder = _image_folder(path)
    examples = [Example(str(image["id"]), (), folder / image["file_name"]) for image in entries]
    return keep_existing(examples, path, images=True)


def _examples(path: Path, images: bool) -> tuple[list[Example], list[Skipped], list[Skipped]]:
    """The examples, the images whose files do not exist, and what else is skipped."""
    entries = _entries(path, "annotations", "images")
    folder = _image_folder(path, must_exist=images)
    # By the ids as they are in the file: as for pycocotools, a caption of image "7" is not one of image 7.
    captions: dict[int | str, list[str]] = {image["id"]: [] for image in entries["images"]}
    unknown = dict.fromkeys(a["image_id"] for a in entries["annotations"] if a["image_id"] not in captions)
    for annotation in entries["annotations"]:
        key, caption = annotation["image_id"], annotation["caption"].strip()
        if caption and key not in unknown:
            captions[key].append(caption)
    reason = f'{path} has captions of it, but no entry in "images"'
    skipped = [Skipped(None, f"image id {key}", reason) for key in unknown]
    examples = []
    for image in entries["images"]:
        if texts := captions[image["id"]]:
            examples.append(Example(str(image["id"]), tuple(texts), folder / image["file_name"]))
        else:
            skipped.append(Skipped(None, f"image id {image['id']}", f"{path} has no captions of it"))
    if not examples:
        raise UserError(f'{path}: no caption belongs to an image of field "images"')
    examples, missing = keep_existing(examples, path, images)
    return examples, missing, skipped


def _image_folder(path: Path, must_exist: bool = True) -> Path:
    path, name = path.absolute(), _image_set(path)
    candidates = [parent / name for parent in (path.parent.parent, path.parent, path.parent.parent / "images")]
    for folder in candidates:
        if folder.is_dir():
            return folder
    if not must_exist:
        return candidates[0]
    raise UserError(f"{path}: no folder with its images; put them in {candidates[0]}")


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


def _image_set(path: Path) -> str:
    """The name of the images' folder. COCO's test-dev has no folder of its own: it is a part of test."""
    return path.stem.removeprefix("captions_").removeprefix("image_info_").replace("-dev", "")
