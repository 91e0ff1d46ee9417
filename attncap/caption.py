"""Write a caption for every image: python -m attncap.caption photo.jpg folder/ --model runs/shapes"""

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from tqdm import tqdm

from attncap import command
from attncap.captioner import Caption, Captioner
from attncap.data import Example, report_skipped
from attncap.data.feature_cache import FeatureCache
from attncap.data.images import find_images
from attncap.data.loader import Pictures, batches
from attncap.data.readers import coco
from attncap.errors import CallError, UserError
from attncap.pictures import save_attention


@dataclass
class CaptionConfig(command.CaptioningConfig):
    images: tyro.conf.Positional[tuple[str, ...]]
    """Image files, folders that are searched for images, and COCO's JSON files, e.g. image_info_test2017.json, whose
    images are captioned by their ids."""
    model: tyro.conf.UseAppendAction[tuple[str, ...]]
    """Folder of a trained model, as `python -m attncap.train` writes it; of several (--model A --model B), words'
    probabilities are averaged."""
    format: Literal["text", "jsonl"] = "text"
    """Print `path: caption`, or a JSON object a line; of several captions of an image, the best first."""
    attention_dir: str | None = None
    """Folder for a picture of each caption: its words, each with the places the model looked at."""


def main(config: CaptionConfig) -> None:
    if not config.model:
        raise CallError("give --model, the folder of a trained model")
    examples = find_examples(config.images)
    if not examples:
        raise CallError(f"no images in {', '.join(config.images)}; give image files, or folders that hold some")
    device = command.find_device(config.device)
    models = [Captioner.from_pretrained(folder, config.implementation).to(device) for folder in config.model]
    written = 0
    with contextlib.closing(caption_examples(models, examples, config)) as captions:
        for example, caption in captions:
            for found in (caption, *caption.others):
                if config.format == "text":
                    tqdm.write(f"{example.name}: {found.text}")
                else:
                    score = found.score if math.isfinite(found.score) else None  # -inf: no word was allowed
                    line = {"image": example.name, "caption": found.text, "score": score}
                    tqdm.write(json.dumps(line, ensure_ascii=False))
            if config.attention_dir is not None:
                picture = Path(config.attention_dir) / f"{written:06d}-{example.path.stem}.png"
                save_attention(picture, [(example.image(), caption)])
            written += 1
    if not written:
        raise UserError("none of the images could be read")


def find_examples(images: Sequence[str]) -> list[Example]:
    """What the images given on the command line are. Raises CallError for what is not there, UserError for a JSON file
    other than COCO's."""
    examples = []
    for given in images:
        if given.lower().endswith(".json"):
            if not Path(given).is_file():
                raise CallError(f"{given}: no such file")
            found, missing = coco.read_images(Path(given))
            report_skipped(missing)
            examples += found
        else:
            examples += [Example(name=str(path), captions=(), path=path) for path in find_images([given])]
    return examples


def caption_examples(
    models: Sequence[Captioner],
    examples: Sequence,
    config: command.CaptioningConfig,
    features: FeatureCache | None = None,
    seen: set[tuple[str, str]] | None = None,
) -> Iterator[tuple[Example, Caption]]:
    """Each example that can be read, with its caption by the model, or the ensemble of models, in order, under a
    progress bar; the others are reported and left out. `features` spares encoding the examples; `seen` as in
    `report_skipped`."""
    model, *ensemble = models
    with tqdm(total=len(examples), desc="captioning", unit="image", leave=False) as bar:
        pictures = Pictures(examples, model.config.image_size) if features is None else features
        workers = command.find_workers(config.workers, model.device)
        for indices, images, skipped in batches(pictures, config.batch_size, workers):
            report_skipped(skipped, seen)
            if images is not None:
                captions = model.caption(
                    images,
                    config.search,
                    batch_size=config.batch_size,
                    suppressed=config.suppressed.split(),
                    ensemble=ensemble,
                )
                yield from ((examples[i], caption) for i, caption in zip(indices, captions, strict=True))
            bar.update(len(indices) + len(skipped))


if __name__ == "__main__":
    command.run("caption", main, CaptionConfig, __doc__)
