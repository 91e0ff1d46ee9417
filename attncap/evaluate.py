"""Score a model on a data set, or captions in a file against references.

python -m attncap.evaluate --model runs/shapes --data shapes
python -m attncap.evaluate --predictions results.json --data flickr8k --compare others.json
python -m attncap.evaluate --predictions results.json --references captions.json
"""

import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from attncap import command
from attncap.caption import caption_examples
from attncap.captioner import Captioner
from attncap.data import open_dataset
from attncap.data.feature_cache import FeatureCache
from attncap.data.readers.coco import read_captions
from attncap.data.shapes import Scene, is_true
from attncap.data.tokenizer import tokenize
from attncap.data.vocabulary import Vocabulary
from attncap.errors import CallError, UserError
from attncap.files import read_json, write_atomically
from attncap.metrics import Scores, bootstrap, java, score
from attncap.metrics.diversity import diversity
from attncap.metrics.grounding import grounding
from attncap.report import as_markdown, as_text, write_page

log = logging.getLogger("attncap")


@dataclass
class EvaluateConfig(command.CaptioningConfig):
    model: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Folder of a trained model; goes with --data. Of several (--model A --model B), words' probabilities are
    averaged."""
    predictions: str | None = None
    """Captions in COCO's results format, [{"image_id": 1, "caption": "..."}, ...], instead of a model; goes with --data
    or --references."""
    data: str | None = None
    """shapes, or the path of a data set (see `python -m attncap.train --help`)."""
    split: str = "test"
    """Part of the data set to score: train, val or test."""
    references: str | None = None
    """COCO's caption JSON that holds the references of the same image ids; instead of --data."""
    compare: str | None = None
    """Captions of the same images by another system, in COCO's results format: also tell the differences."""
    output: str | None = None
    """Also write the figures to this JSON file, NAME.json; a model's captions to NAME.results.json; the figures of each
    image to NAME.images.jsonl; the tables to NAME.report.json and NAME.report.md; and the images with their captions,
    from the worst to the best, to the page NAME.html."""
    seed: int | None = None
    """Seed of `shapes`, and of splits that the data set leaves open; by default the one the model was trained with."""


# Which of --model, --predictions, --data and --references go together.
WAYS = [[True, False, True, False], [False, True, True, False], [False, True, False, True]]


def main(config: EvaluateConfig) -> None:
    for name in ("predictions", "data", "references", "compare", "output"):
        if getattr(config, name) == "":
            raise CallError(f"--{name} is empty; give a path, or leave it out")
    given = [config.model or None, config.predictions, config.data, config.references]
    if [value is not None for value in given] not in WAYS:
        raise CallError("give --model and --data, or --predictions and --data, or --predictions and --references")
    if config.output is not None:
        if not config.output.endswith(".json"):
            raise CallError(f"--output {config.output}: should be NAME.json")
        if Path(config.output).resolve() in [Path(path).resolve() for path in (*given[1:], config.compare) if path]:
            raise CallError(f"--output {config.output}: is an input; give another name")
    captions, others = (path and read_results(path) for path in (config.predictions, config.compare))
    examples, training, vocabulary = [], None, None
    if config.references is not None:
        references = read_captions(config.references)
    else:
        seed = config.seed
        if seed is None:
            seed = training_seed(config.model[0]) if config.model else 0
        splits = open_dataset(config.data, seed, images=config.predictions is None)
        examples = splits.get(config.split)
        if not examples:
            sizes = ", ".join(f"{name} ({len(part)} images)" for name, part in splits.items() if part)
            wrong = "has no images in" if config.split in splits else "has no split"
            raise CallError(f"--split: {config.data} {wrong} {config.split}; choose from {sizes}")
        references = {example.name: example.captions for example in examples}
        training = [caption for example in splits["train"] for caption in example.captions]
    if captions:
        check_images(config.predictions, captions, references, config.references or config.data)
    left_out = java.unavailable()  # said before the work, not after it
    for name, reason in left_out.items():
        log.warning("%s skipped: %s", name, reason)
    with_java = [name for name in java.NAMES if name not in left_out]

    if captions:
        if others:
            check_others(config.compare, others, captions)
        scores = score(captions, {name: references[name] for name in captions}, with_java)
    else:
        if others:
            check_others(config.compare, others, references)
        device = command.find_device(config.device)
        models = [Captioner.from_pretrained(folder, config.implementation).to(device) for folder in config.model]
        vocabulary = models[0].vocabulary
        scores, captions = evaluate(models, examples, config, with_java)
    if empty := [name for name, caption in captions.items() if not tokenize(caption)]:
        log.warning("%d of %d captions have no words, e.g. that of image %s", len(empty), len(captions), empty[0])
    report = {**summary(scores, captions, vocabulary, training), "left out": {**left_out, **scores.skipped}}
    if others:
        with_java = [name for name in with_java if name not in scores.skipped]
        others, refs = ({name: both[name] for name in captions} for both in (others, references))
        compared = score(others, refs, with_java)
        report["left out"] |= {f"difference in {name}": reason for name, reason in compared.skipped.items()}
        differences = bootstrap.compare(scores, compared)
        figures = {
            name: {"value": d.value, "low": d.low, "high": d.high, "above": d.share_above_zero}
            for name, d in differences.items()
        }
        report["difference"] = {"from": config.compare, "figures": figures}
    print(as_text(report))
    if config.output is not None:
        images = {example.name: example.image for example in examples}
        write(Path(config.output), bool(config.model), report, scores, captions, references, images)


def write(
    path: Path,
    captioned: bool,
    report: Mapping,
    scores: Scores,
    captions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    images: Mapping[str, Callable[[], Image.Image]],
) -> None:
    """The files of --output; the captions only where a model has just written them."""
    write_atomically(path, json.dumps(scores.corpus(), indent=2) + "\n")
    if captioned:
        write_atomically(path.with_suffix(".results.json"), json.dumps(results(captions), indent=1) + "\n")
    lines = (json.dumps({**line, **row}) for line, row in zip(results(captions), scores.rows(), strict=True))
    write_atomically(path.with_suffix(".images.jsonl"), "".join(f"{line}\n" for line in lines))
    write_atomically(path.with_suffix(".report.json"), json.dumps(report, indent=2) + "\n")
    write_atomically(path.with_suffix(".report.md"), as_markdown(report))
    write_page(path.with_suffix(".html"), report, captions, references, scores, images)


def evaluate(
    models: Sequence[Captioner],
    examples: Sequence,
    config: command.CaptioningConfig,
    with_java: Collection[str] = (),
    features: FeatureCache | None = None,
    seen: set[tuple[str, str]] | None = None,
) -> tuple[Scores, dict[str, str]]:
    """Caption every example freely, each image once, and score the captions against all its references. `features`
    spares encoding the examples; `seen` as in `report_skipped`.

    Returns the scores (see `metrics.score`; on `shapes` also `true`, the share of captions exactly true of their
    scene, and `grounded`, see `grounding`) and the captions by image.
    """
    written = list(caption_examples(models, examples, config, features, seen))
    if not written:
        raise UserError("none of the images to be scored could be read")
    captions = {example.name: caption.text for example, caption in written}
    scores = score(captions, {example.name: example.captions for example, _ in written}, with_java)
    if isinstance(examples[0], Scene):
        scores.by_image["true"] = np.array([float(is_true(caption.text, scene)) for scene, caption in written])
        grounded = np.array([grounding(scene, caption) for scene, caption in written])
        scores.by_image |= {"grounded": grounded[:, 0], "grounded by chance": grounded[:, 1]}
    return scores, captions


def summary(
    scores: Scores, captions: Mapping[str, str], vocabulary: Vocabulary | None, training: Collection[str] | None
) -> dict:
    """What is told of a system: its figures with their 95 % intervals, and how varied its captions are beside the
    model's vocabulary and the training captions."""
    intervals = bootstrap.intervals(scores)
    figures = {}
    for name, value in scores.corpus().items():
        low, high = intervals[name]
        figures[name] = {"value": value, "low": low, "high": high}
    words = None  # of a vocabulary of pieces no share is told
    if vocabulary and vocabulary.merges is None:
        words = vocabulary.words[len(vocabulary.SPECIALS) :]
    seen = None if training is None else (tokenize(caption) for caption in training)
    varied = diversity([tokenize(caption) for caption in captions.values()], words, seen)
    return {"images": len(captions), "figures": figures, "captions": varied}


def results(captions: Mapping[str, str]) -> list[dict[str, int | str]]:
    """The captions in COCO's results format."""
    return [{"image_id": image_id(name), "caption": caption} for name, caption in captions.items()]


def image_id(name: str) -> int | str:
    """An example's name as COCO's results format has it: COCO's ids are numbers, other data sets have file names."""
    return int(name) if name.isdecimal() and str(int(name)) == name else name


def training_seed(model: str) -> int:
    """The seed a model was trained with, from its folder; 0, the default of training, where that is not told. Raises
    UserError when the file that should tell it is broken."""
    path = Path(model) / "settings.json"
    if not path.exists():
        return 0
    found = read_json(path)
    settings = found.get("settings") if isinstance(found, dict) else None
    seed = settings.get("seed") if isinstance(settings, dict) else None
    if type(seed) is not int:
        raise UserError(f'{path}: field "seed" of "settings" should be a whole number; or give --seed')
    return seed


def read_results(path: str | Path) -> dict[str, str]:
    """COCO's results format -> caption by image id. Raises CallError when there is no such file, UserError naming the
    field when it holds something else."""
    if not Path(path).is_file():
        raise CallError(f"{path}: no such file")
    found = read_json(Path(path))
    if not isinstance(found, list):
        raise UserError(f'{path}: expected a list, [{{"image_id": 1, "caption": "..."}}, ...]')
    captions: dict[str, str] = {}
    for i, result in enumerate(found):
        for field, kinds in (("image_id", (int, str)), ("caption", (str,))):
            if not isinstance(result, dict) or type(result.get(field)) not in kinds:
                raise UserError(f'{path}: field "{field}" of entry {i} is missing or of the wrong type')
        name = str(result["image_id"])
        if name in captions:
            raise UserError(f"{path}: image id {name} stands there twice; keep one caption an image")
        captions[name] = result["caption"]
    if not captions:
        raise UserError(f"{path}: the list of captions is empty")
    return captions


def check_images(path: str, captions: Mapping[str, str], references: Mapping[str, Sequence], source: str) -> None:
    """Raises UserError for captions of images without references; says how many images with references lack one."""
    unknown = [name for name in captions if not references.get(name)]
    if unknown:
        raise UserError(
            f"{path}: {len(unknown)} of {len(captions)} image ids have no references in {source}, e.g. {unknown[0]}"
        )
    if missing := [name for name in references if name not in captions]:
        counts = f"scoring {len(captions)} of the {len(references)} images with references"
        log.warning("%s: %s; no caption for image %s and so on", path, counts, missing[0])


def check_others(path: str, others: Mapping[str, str], captions: Mapping[str, str]) -> None:
    """Raises UserError unless the captions to compare with are of all the images."""
    if missing := [name for name in captions if name not in others]:
        raise UserError(f"--compare {path}: no caption for {len(missing)} of the images, e.g. image {missing[0]}")


if __name__ == "__main__":
    command.run("evaluate", main, EvaluateConfig, __doc__)
