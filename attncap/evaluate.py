"""Score a model on a data set, or captions in a file against references.

python -m attncap.evaluate --model runs/shapes --data shapes
python -m attncap.evaluate --predictions results.json --references captions.json
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from attncap import command, metrics
from attncap.caption import caption_examples
from attncap.captioner import Captioner
from attncap.data import open_dataset
from attncap.data.coco import read_captions
from attncap.data.shapes import Scene, is_true
from attncap.errors import CallError, UserError
from attncap.files import write_atomically


@dataclass
class EvaluateConfig(command.CaptioningConfig):
    model: tuple[str, ...] | None = None
    """Folder of a trained model; goes with --data. Of several, words' probabilities are averaged."""
    data: str | None = None
    """shapes, or the path of a data set (see `python -m attncap.train --help`)."""
    split: str = "test"
    """Part of the data set to score: train, val or test."""
    predictions: str | None = None
    """Captions in COCO's results format, [{"image_id": 1, "caption": "..."}, ...]; goes with --references."""
    references: str | None = None
    """COCO's caption JSON that holds the references of the same image ids."""
    output: str | None = None
    """Also write the figures to this JSON file, NAME.json, and a model's captions to NAME.results.json."""
    seed: int | None = None
    """Seed of `shapes`, and of splits that the data set leaves open; by default the one the model was trained with."""


def main(config: EvaluateConfig) -> None:
    given = [config.model, config.data, config.predictions, config.references]
    match [value is not None for value in given]:
        case [True, True, False, False]:
            device = command.find_device(config.device)
            models = [Captioner.from_pretrained(folder, config.implementation).to(device) for folder in config.model]
            splits = open_dataset(config.data, training_seed(config.model[0]) if config.seed is None else config.seed)
            if config.split not in splits:
                raise CallError(f"--split {config.split}: {config.data} has only {', '.join(splits)}")
            figures, results = evaluate(models, splits[config.split], config)
        case [False, False, True, True]:
            predictions, references = read_results(config.predictions), read_captions(config.references)
            if len(predictions) < len(references):
                print(f"scoring {len(predictions)} of the {len(references)} images with references", file=sys.stderr)
            figures, results = metrics.score(predictions, {key: references.get(key, ()) for key in predictions}), None
        case _:
            raise CallError("give --model and --data, or --predictions and --references")
    print(table(figures))
    if config.output is not None:
        output = Path(config.output)
        write_atomically(output, json.dumps(figures, indent=2) + "\n")
        if results is not None:
            write_atomically(output.with_suffix(".results.json"), json.dumps(results, indent=1) + "\n")


def evaluate(
    models: Sequence[Captioner], examples: Sequence, config: command.CaptioningConfig
) -> tuple[dict[str, float], list[dict[str, int | str]]]:
    """Caption every example freely, each image once, and score the captions against all its references.

    Returns the figures (see `metrics.score`; on `shapes` also `true`, the share of captions exactly true of their
    scene) and the captions in COCO's results format.
    """
    written = list(caption_examples(models, examples, config))
    if not written:
        raise UserError("none of the images to be scored could be read")
    figures = metrics.score(
        {example.name: caption.text for example, caption in written},
        {example.name: example.captions for example, _ in written},
    )
    if isinstance(examples[0], Scene):
        figures["true"] = sum(is_true(caption.text, scene) for scene, caption in written) / len(written)
    return figures, [{"image_id": image_id(example.name), "caption": caption.text} for example, caption in written]


def image_id(name: str) -> int | str:
    """An example's name as COCO's results format has it: COCO's ids are numbers, other data sets have file names."""
    return int(name) if name.isdecimal() else name


def training_seed(model: str) -> int:
    """The seed a model was trained with, from its folder; 0, the default of training, where that is not told."""
    path = Path(model) / "settings.json"
    return json.loads(path.read_text(encoding="utf-8"))["settings"]["seed"] if path.exists() else 0


def read_results(path: str | Path) -> dict[str, str]:
    """COCO's results format -> caption by image id. Raises UserError when the file is something else."""
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
        captions = {str(result["image_id"]): str(result["caption"]) for result in results}
    except OSError as error:
        raise CallError(f"--predictions {path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f'{path}: expected [{{"image_id": 1, "caption": "..."}}, ...]: {error!r}') from error
    if len(captions) < len(results):
        raise UserError(
            f"{path}: {len(results) - len(captions)} image ids stand there twice; keep one caption an image"
        )
    return captions


def table(figures: dict[str, float]) -> str:
    """The figures as aligned lines of text."""
    width = max(map(len, figures))
    return "\n".join(f"{name:{width}}  {value:.4f}" for name, value in figures.items())


if __name__ == "__main__":
    command.run("evaluate", main, EvaluateConfig, __doc__)
