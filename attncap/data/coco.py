"""COCO captions (Chen et al. 2015): annotations/captions_train2017.json beside train2017/, and so on."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

from pycocotools.coco import COCO

from attncap.data import Example, Splits, draw_parts, draw_splits, keep_existing, report
from attncap.errors import UserError

EXPECTED = "annotations/captions_*.json beside folders such as train2017/ (COCO)"


def recognises(path: Path) -> bool:
    return path.suffix == ".json" if path.is_file() else bool(_caption_files(path))


def read(path: Path, seed: int) -> Splits:
    """The examples by split; `name` is the image id, so that results are in COCO's own format.

    With a train and a val file, train is train and the seed cuts val into halves, val and test (the
    official test set has no public captions). A single file is cut 80/10/10. Raises UserError on
    broken files, missing fields and missing folders.
    """
    files = [path] if path.is_file() else _caption_files(path)
    if len(files) == 1:
        return draw_splits(_examples(files[0]), seed)
    kinds = {kind: [f for f in files if _suffix(f).startswith(kind)] for kind in ("train", "val")}
    if len(files) != 2 or not all(len(found) == 1 for found in kinds.values()):
        names = ", ".join(file.name for file in files)
        raise UserError(
            f"{path / 'annotations'}: expected one captions_train*.json and one captions_val*.json, "
            f"found {names}; give the path of one file, or move the others away"
        )
    held = _examples(kinds["val"][0])
    val, test = draw_parts(held, [len(held) // 2], seed)
    return {"train": _examples(kinds["train"][0]), "val": val, "test": test}


def read_captions(path: str | Path) -> dict[str, list[str]]:
    """Captions by image id (as text). Raises UserError naming the file and the field that is wrong."""
    captions: dict[str, list[str]] = {}
    for annotation in _load(Path(path)).dataset["annotations"]:
        captions.setdefault(str(annotation["image_id"]), []).append(annotation["caption"])
    return captions


def _examples(path: Path) -> list[Example]:
    coco = _load(path, with_images=True)
    folder = _image_folder(path)
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
    report(unknown, f'{path}: left out %d image ids with captions that "images" lacks')
    if not examples:
        raise UserError(f'{path}: no caption belongs to an image of field "images"')
    return keep_existing(examples, path)


def _image_folder(path: Path) -> Path:
    name = _suffix(path)
    candidates = [top / name for top in (path.parent.parent, path.parent, path.parent.parent / "images")]
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise UserError(f"{path}: no folder with its images; put them in {candidates[0]}")


def _load(path: Path, with_images: bool = False) -> COCO:
    coco = COCO()
    try:
        coco.dataset = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a whole JSON file: {error}") from error
    _check(path, coco.dataset, "annotations", {"id": (int, str), "image_id": (int, str), "caption": str})
    if with_images:
        _check(path, coco.dataset, "images", {"id": (int, str), "file_name": str})
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


def _caption_files(path: Path) -> list[Path]:
    return sorted((path / "annotations").glob("captions_*.json"))


def _suffix(path: Path) -> str:
    return path.stem.removeprefix("captions_")
