"""Write a caption for every image.

attncap caption photo.jpg folder/ --model runs/shapes
attncap caption folder/ --model runs/shapes --output captions.jsonl
attncap caption folder/ --model runs/shapes --sidecars
"""

import contextlib
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import tyro

from attncap.cli import command, process
from attncap.cli.caption_files import Records, Sidecars, count_records, exists
from attncap.data import Example, Skipped, report_skipped
from attncap.data.dataset import first_of
from attncap.data.image_folders import SUFFIXES, UNSUPPORTED, find_images
from attncap.data.readers import coco
from attncap.errors import CallError, UserError
from attncap.files import read_bytes

SOME_FAILED = 3  # exit status: some of the images could not be read


@dataclass(kw_only=True)
class CaptionConfig(command.CaptioningConfig):
    images: tyro.conf.Positional[tuple[str, ...]] = ()
    """Image files, and folders that are searched for images.
    A COCO JSON file, e.g. image_info_test2017.json, stands for the images in it, which are then named by their ids."""
    from_file: str | None = None
    """File with the paths of more images and folders, one a line; - reads standard input.
    Or with NUL characters between them, as `find -print0` writes."""
    model: tyro.conf.UseAppendAction[tuple[str, ...]]
    """Folder of a trained model, as written by `attncap train`.
    Several (--model A --model B) form an ensemble: their word probabilities are averaged."""
    format: Literal["text", "jsonl"] = "text"
    """Print `path: caption`, or one JSON object per line.
    With --n-best, the captions of an image are printed best first."""
    output: str | None = None
    """JSON Lines file to write instead: a record for each image, also for one that cannot be read."""
    sidecars: bool = False
    """Write a text file for each image, photo.txt beside photo.jpg, with a line for each caption."""
    sidecar_folder: str | None = None
    """Folder for the text files, in subfolders as the images are; by default they are beside the images."""
    extension: str = ".txt"
    """Of the text files."""
    existing: Literal["skip", "overwrite", "append", "prepend", "error"] = "skip"
    """What happens to images that have captions in --output or a text file.
    skip leaves them out, so that a run that was stopped goes on; overwrite begins anew; append and prepend add lines to
    text files; error does nothing if there are any."""
    retry_failed: bool = False
    """Try the images again that could not be read, according to --output."""
    verify: bool = False
    """Caption nothing, but check that every image has exactly one record in --output, and its text file."""
    prepend_text: str = ""
    """Text before each caption."""
    append_text: str = ""
    """Text after each caption."""
    attention_dir: str | None = None
    """Folder for pictures of the captions, which show where the model looked for each word."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sidecar_folder is not None:
            self.sidecars = True
        extension = self.extension.lower()
        if not re.fullmatch(r"\.[^./\0]+", extension) or extension in SUFFIXES | UNSUPPORTED:
            raise CallError(f"extension={self.extension!r}: must be a suffix, such as .txt, that no image has")
        if self.existing in ("append", "prepend") and not self.sidecars:
            raise CallError(f"existing={self.existing}: adds lines to text files; give --sidecars too")
        if self.retry_failed and self.output is None:
            raise CallError("retry_failed: which images failed is in the records; give --output")
        if self.verify and not self.writes_files:
            raise CallError("verify: give what to check, --output or --sidecars")

    @property
    def writes_files(self) -> bool:
        return self.output is not None or self.sidecars


class Found(NamedTuple):
    """An image to be captioned."""

    example: Example
    inside: Path  # its path within the folder that was given


def run(prog: str, arguments: Sequence[str]) -> None:
    command.run(main, CaptionConfig, __doc__, prog, arguments)


def main(config: CaptionConfig) -> None:
    found = find_all(config)
    if config.verify:
        verify(config, found)
        return
    if not config.model:
        raise CallError("give --model, the folder of a trained model")
    with contextlib.ExitStack() as stack:
        sidecars = records = None
        if config.sidecars:
            sidecars = make_sidecars(config, found)
        if config.output is not None:
            forget = {"overwrite": ("captioned", "failed"), "skip": ("failed",) if config.retry_failed else ()}
            records = stack.enter_context(Records(Path(config.output), forget.get(config.existing, ())))
        pending = [image for image in found if not is_done(image, config, records, sidecars)]
        done = len(found) - len(pending)
        if config.existing == "error" and done:
            first = next(image for image in found if is_done(image, config, records, sidecars))
            raise CallError(f"{first.example.name} has captions, and {done - 1} more images; give --existing skip")
        failed = caption(config, pending, records, sidecars) if pending else 0
        if config.writes_files:
            counts = f"{len(pending) - failed} images captioned, {done} had captions, {failed} failed"
            print(f"attncap: {counts}", file=sys.stderr)
    if failed:
        raise SystemExit(SOME_FAILED)


def find_all(config: CaptionConfig) -> list[Found]:
    """The images to be captioned; for files, each once. Raises CallError if there are none."""
    found = find_examples(config.images)
    if config.from_file is not None:
        found += listed_examples(config.from_file)
    if not found:
        places = ", ".join([*config.images, *([config.from_file] if config.from_file else [])]) or "the call"
        raise CallError(f"no images in {places}; give image files, or folders that contain some")
    return list({image.example.name: image for image in found}.values()) if config.writes_files else found


def make_sidecars(config: CaptionConfig, found: Sequence[Found]) -> Sidecars:
    folder = Path(config.sidecar_folder) if config.sidecar_folder is not None else None
    existing = "skip" if config.existing == "error" else config.existing
    sidecars = Sidecars(folder, config.extension, existing)
    sidecars.check([(image.example.path, image.inside) for image in found])
    return sidecars


def is_done(image: Found, config: CaptionConfig, records: Records | None, sidecars: Sidecars | None) -> bool:
    """Whether nothing has to be written for an image."""
    known = records.known.get(image.example.name) if records is not None else None
    if sidecars is None or known == "failed":
        return known is not None
    if config.existing == "overwrite":
        return False
    if config.existing in ("append", "prepend"):  # a text file does not tell whether it has the new captions
        return known is not None
    return exists(sidecars.path(image.example.path, image.inside)) and (records is None or known is not None)


def caption(config: CaptionConfig, pending: Sequence[Found], records: Records | None, sidecars: Sidecars | None) -> int:
    """Caption the images, and print or write their captions. Returns how many could not be read. Raises UserError if
    those are all and nothing records it."""
    from tqdm import tqdm

    from attncap.captioner import Captioner, Ensemble
    from attncap.captioning import caption_examples, read_images
    from attncap.devices import find_device, find_workers
    from attncap.pictures import save_attention

    device = find_device(config.device)
    models = [Captioner.from_pretrained(folder, device=device, backend=config.backend) for folder in config.model]
    model = models[0] if len(models) == 1 else Ensemble(models)
    weights = "+".join(hash_of(Path(folder) / "model.safetensors") for folder in config.model) if records else ""
    if config.attention_dir is not None:
        process.make_output_optional()
    failed = 0

    def skip(skipped: Sequence[Skipped]) -> None:
        nonlocal failed
        report_skipped(skipped)
        failed += len(skipped)
        for item in skipped:
            name = pending[item.index].example.name
            if records is not None and name not in records.known:
                records.write({"image": name, "status": "failed", "error": item.reason, "model": weights})

    with tqdm(total=len(pending), desc="captioning", unit="image", leave=False) as bar:
        captioned = caption_examples(
            model,
            [image.example for image in pending],
            config.search,
            batch_size=config.batch_size,
            workers=find_workers(config.workers, device),
            progress=bar.update,
            skip=skip,
        )
        numbers = {id(image.example): number for number, image in enumerate(pending)}
        with contextlib.closing(captioned):
            for example, captions in captioned:
                number = numbers[id(example)]
                described = [(f"{config.prepend_text}{c.text}{config.append_text}", finite(c.score)) for c in captions]
                if sidecars is not None:
                    path = sidecars.path(example.path, pending[number].inside)
                    sidecars.write(path, [text for text, _ in described])
                if records is not None and example.name not in records.known:
                    best = {"caption": described[0][0], "score": described[0][1]}
                    record = {"image": example.name, "status": "captioned", **best}
                    if len(described) > 1:
                        record["captions"] = [{"caption": text, "score": score} for text, score in described]
                    records.write({**record, "model": weights})
                if not config.writes_files:
                    for text, score in described:
                        if config.format == "text":
                            tqdm.write(f"{process.escape_line(example.name)}: {process.escape_line(text)}")
                        else:  # ASCII: valid JSON in any encoding of the output
                            tqdm.write(json.dumps({"image": example.name, "caption": text, "score": score}))
                if config.attention_dir is not None:
                    picture = Path(config.attention_dir) / picture_name(number, example.path)
                    for _, image in read_images([example]):  # the file may have been removed since
                        save_attention(picture, [(image, captions[0])])
    if failed == len(pending) and records is None:
        raise UserError("none of the images could be read")
    return failed


def finite(score: float) -> float | None:
    return score if math.isfinite(score) else None  # -inf: no word was allowed


def hash_of(file: Path) -> str:
    """By which a record tells the model that wrote it: the first 16 digits of the SHA-256 of its weights."""
    digest = hashlib.sha256()
    with open(file, "rb") as content:
        while piece := content.read(2**20):
            digest.update(piece)
    return digest.hexdigest()[:16]


def verify(config: CaptionConfig, found: Sequence[Found]) -> None:
    """Print how many images have captions. Raises UserError unless each has exactly one record and its text file."""
    records = count_records(Path(config.output)) if config.output is not None else None
    sidecars = make_sidecars(config, found) if config.sidecars else None
    captioned, failed, missing, repeated = [], [], [], []
    for image in found:
        name = image.example.name
        counts = {status: records[name, status] for status in ("captioned", "failed")} if records is not None else {}
        has_text = sidecars is None or exists(sidecars.path(image.example.path, image.inside))
        if sum(counts.values()) > 1:
            repeated.append(name)
        elif counts.get("failed"):
            failed.append(name)
        elif has_text and (records is None or counts["captioned"]):
            captioned.append(name)
        else:
            missing.append(name)
    print(f"{len(found)} images: {len(captioned)} captioned, {len(failed)} failed")
    for names, problem in ((missing, "no captions"), (repeated, "several records")):
        if names:
            raise UserError(f"{len(names)} of the images have {problem}: {first_of(names)}")


def picture_name(number: int, image: Path) -> str:
    """The name of a picture of the attention, short enough for every file system."""
    stem = os.fsencode(image.stem)[:100].decode(errors="ignore")
    return f"{number:06d}-{stem}.png"


def find_examples(paths: Sequence[str]) -> list[Found]:
    """The images named by the arguments. Raises CallError for a path that does not exist, and UserError for a JSON file
    that is not COCO's."""
    found = []
    for path in paths:
        if path.lower().endswith(".json"):
            if not Path(path).is_file():
                raise CallError(f"{path}: no such file")
            examples, missing = coco.read_images(Path(path))
            report_skipped(missing)
            found += [Found(example, Path(example.path.name)) for example in examples]
        else:
            found += images_at(path)
    return found


def listed_examples(file: str) -> list[Found]:
    """The images in a list of paths. Raises UserError when it cannot be read, and not for a path that does not exist,
    which is an image that cannot be read."""
    try:
        content = sys.stdin.buffer.read() if file == "-" else read_bytes(file)
    except OSError as error:
        raise UserError(f"cannot read standard input: {error.strerror}") from error
    paths = content.split(b"\0") if b"\0" in content else content.splitlines()
    found = []
    for path in map(os.fsdecode, filter(None, paths)):
        found += images_at(path) if os.path.isdir(path) else [Found(named(Path(path)), Path(Path(path).name))]
    return found


def images_at(path: str) -> list[Found]:
    """The image at a path, or those in a folder. Raises CallError for a path that does not exist."""
    images = find_images([path])
    top = Path(path) if os.path.isdir(path) else Path(path).parent
    return [Found(named(image), image.relative_to(top)) for image in images]


def named(image: Path) -> Example:
    return Example(name=str(image), captions=(), path=image)
