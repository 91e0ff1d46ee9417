"""Write a caption for every image.

attncap caption photo.jpg folder/ --model runs/shapes
"""

import contextlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from attncap.cli import command, process
from attncap.data import Example, report_skipped
from attncap.data.image_folders import find_images
from attncap.data.readers import coco
from attncap.errors import CallError, UserError


@dataclass(kw_only=True)
class CaptionConfig(command.CaptioningConfig):
    images: tyro.conf.Positional[tuple[str, ...]]
    """Image files, and folders that are searched for images.
    A COCO JSON file, e.g. image_info_test2017.json, stands for the images in it, which are then named by their ids."""
    model: tyro.conf.UseAppendAction[tuple[str, ...]]
    """Folder of a trained model, as written by `attncap train`.
    Several (--model A --model B) form an ensemble: their word probabilities are averaged."""
    format: Literal["text", "jsonl"] = "text"
    """Print `path: caption`, or one JSON object per line.
    With --n-best, the captions of an image are printed best first."""
    attention_dir: str | None = None
    """Folder for pictures of the captions, which show where the model looked for each word."""


def run(prog: str, arguments: Sequence[str]) -> None:
    command.run(main, CaptionConfig, __doc__, prog, arguments)


def main(config: CaptionConfig) -> None:
    if not config.model:
        raise CallError("give --model, the folder of a trained model")
    examples = find_examples(config.images)
    if not examples:
        raise CallError(f"no images in {', '.join(config.images)}; give image files, or folders that contain some")

    from tqdm import tqdm

    from attncap.captioner import Captioner, Ensemble
    from attncap.captioning import caption_examples, read_images
    from attncap.devices import find_device, find_workers
    from attncap.pictures import save_attention

    device = find_device(config.device)
    models = [Captioner.from_pretrained(folder, device=device, backend=config.backend) for folder in config.model]
    model = models[0] if len(models) == 1 else Ensemble(models)
    if config.attention_dir is not None:
        process.make_output_optional()
    written = 0
    with tqdm(total=len(examples), desc="captioning", unit="image", leave=False) as bar:
        captioned = caption_examples(
            model,
            examples,
            config.search,
            batch_size=config.batch_size,
            workers=find_workers(config.workers, device),
            progress=bar.update,
        )
        with contextlib.closing(captioned):
            for example, captions in captioned:
                for caption in captions:
                    if config.format == "text":
                        tqdm.write(f"{process.escape_line(example.name)}: {process.escape_line(caption.text)}")
                    else:
                        score = caption.score if math.isfinite(caption.score) else None  # -inf: no word was allowed
                        line = {"image": example.name, "caption": caption.text, "score": score}
                        tqdm.write(json.dumps(line))  # ASCII: valid JSON in any encoding of the output
                if config.attention_dir is not None:
                    picture = Path(config.attention_dir) / picture_name(written, example.path)
                    for _, image in read_images([example]):  # the file may have been removed since
                        save_attention(picture, [(image, captions[0])])
                written += 1
    if not written:
        raise UserError("none of the images could be read")


def picture_name(number: int, image: Path) -> str:
    """The name of a picture of the attention, short enough for every file system."""
    stem = os.fsencode(image.stem)[:100].decode(errors="ignore")
    return f"{number:06d}-{stem}.png"


def find_examples(paths: Sequence[str]) -> list[Example]:
    """The images named by the arguments. Raises CallError for a path that does not exist, and UserError for a JSON file
    that is not COCO's."""
    examples = []
    for path in paths:
        if path.lower().endswith(".json"):
            if not Path(path).is_file():
                raise CallError(f"{path}: no such file")
            found, missing = coco.read_images(Path(path))
            report_skipped(missing)
            examples += found
        else:
            examples += [Example(name=str(image), captions=(), path=image) for image in find_images([path])]
    return examples
