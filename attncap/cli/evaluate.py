"""Score a model on a data set, or captions in a file against references.

attncap evaluate --model runs/shapes --data shapes
attncap evaluate --predictions results.json --data flickr8k --compare others.json
attncap evaluate --predictions results.json --references captions.json
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from attncap.cli import command, process
from attncap.errors import CallError
from attncap.files import write_atomically

if TYPE_CHECKING:
    from PIL import Image

    from attncap.data import CaptionedImage
    from attncap.data.vocabulary import Vocabulary
    from attncap.metrics import Scores

log = logging.getLogger("attncap")


@dataclass(kw_only=True)
class EvaluateConfig(command.CaptioningConfig):
    model: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Folder of a trained model; needs --data.
    Several (--model A --model B) form an ensemble: their word probabilities are averaged."""
    predictions: str | None = None
    """File of captions to score instead of those of a model; needs --data or --references.
    It has COCO's results format: [{"image_id": 1, "caption": "..."}, ...]."""
    data: str | None = None
    """shapes, or the path of a data set (see `attncap train --help`)."""
    images: str | None = None
    """Folder of the data set's images, if it is not near the captions."""
    split: str | None = None
    """Part of the data set to score: train, val or test. By default test, but the whole file if --predictions are
    scored against a COCO caption file without lists of splits beside it."""
    references: str | None = None
    """COCO caption file (JSON) with references for the same image ids, instead of --data."""
    compare: str | None = None
    """Also show the differences from another system: its captions of the same images, in COCO's results format."""
    output: str | None = None
    """Also write the metrics to this JSON file, NAME.json, and other results to files next to it.
    NAME.results.json: a model's captions. NAME.images.jsonl: the metrics of each image.
    NAME.report.json and NAME.report.md: the tables. NAME.html: the images with their captions, from worst to best."""
    seed: int | None = None
    """Random seed for generating shapes, and for the splits if the data set has none.
    By default, the seed that the model was trained with."""


def run(prog: str, arguments: Sequence[str]) -> None:
    command.run(main, EvaluateConfig, __doc__, prog, arguments)


def main(config: EvaluateConfig) -> None:
    check(config)
    from attncap import evaluation
    from attncap.data.readers.coco import read_captions
    from attncap.data.tokenizer import tokenize
    from attncap.metrics import bootstrap, java, score
    from attncap.report import as_text

    captions = others = None
    if config.predictions is not None:
        captions = evaluation.read_results(config.predictions)
    if config.compare is not None:
        others = evaluation.read_results(config.compare)
    examples, training, vocabulary = [], None, None
    if config.references is not None:
        references = read_captions(config.references)
    else:
        examples, training = open_split(config)
        references = {example.name: example.captions for example in examples}
    if captions:
        evaluation.check_predictions(config.predictions, captions, references, config.references or config.data)
    if others:
        evaluation.check_comparison(config.compare, others, captions or references)
    unavailable = java.unavailable()  # reported before the work, not after it
    for name, reason in unavailable.items():
        log.warning("%s skipped: %s", name, reason)
    java_metrics = [name for name in java.NAMES if name not in unavailable]

    if captions:
        scores = score(captions, {name: references[name] for name in captions}, java_metrics)
    else:
        scores, captions, vocabulary = score_model(config, examples, java_metrics)
    if empty := [name for name, caption in captions.items() if not tokenize(caption)]:
        log.warning("%d of %d captions have no words, e.g. that of image %s", len(empty), len(captions), empty[0])
    report = evaluation.summary(scores, captions, vocabulary, training)
    report["left out"] = {**unavailable, **scores.skipped}
    if others:
        java_metrics = [name for name in java_metrics if name not in scores.skipped]
        compared = score(
            {name: others[name] for name in captions}, {name: references[name] for name in captions}, java_metrics
        )
        report["left out"] |= {f"difference in {name}": reason for name, reason in compared.skipped.items()}
        differences = bootstrap.compare(scores, compared)
        metrics = {
            name: {"value": d.value, "low": d.low, "high": d.high, "above": d.share_above_zero}
            for name, d in differences.items()
        }
        report["difference"] = {"from": config.compare, "figures": metrics}
    if config.output is not None:
        process.make_output_optional()
    print(as_text(report))
    if config.output is not None:
        images = {example.name: example.image for example in examples}
        write(Path(config.output), bool(config.model), report, scores, captions, references, images)


def check(config: EvaluateConfig) -> None:
    """Raises CallError for flags that cannot be used together."""
    for name in ("predictions", "data", "references", "compare", "output"):
        if getattr(config, name) == "":
            raise CallError(f"--{name} is empty; give a path, or leave it out")
    if config.model:
        valid = config.predictions is None and config.data is not None and config.references is None
    else:
        valid = config.predictions is not None and (config.data is None) != (config.references is None)
    if not valid:
        raise CallError("give --model and --data, or --predictions and --data, or --predictions and --references")
    if config.output is not None:
        if not config.output.endswith(".json"):
            raise CallError(f"--output {config.output}: should be NAME.json")
        inputs = (config.predictions, config.data, config.references, config.compare)
        if Path(config.output).resolve() in [Path(path).resolve() for path in inputs if path]:
            raise CallError(f"--output {config.output}: is an input; give another name")


def open_split(config: EvaluateConfig) -> tuple[Sequence["CaptionedImage"], list[str] | None]:
    """The images of --split, where splits are drawn as in the model's training, and the training captions, if there are
    any. Raises CallError when --split has no images."""
    from attncap.data import check_dataset, read_dataset
    from attncap.training.config import training_seed

    split, seed = config.split or "test", config.seed
    if config.predictions is not None and config.split is None and str(config.data).lower().endswith(".json"):
        seed = None  # a file of COCO's captions is a split by itself
    elif seed is None:
        seed = training_seed(config.model[0]) if config.model else 0
    dataset = read_dataset(config.data, seed, config.images, need_images=config.predictions is None)
    check_dataset(config.data, dataset)
    splits = dataset.splits
    if not splits.get(split):
        sizes = ", ".join(f"{name} ({len(part)} images)" for name, part in splits.items() if part)
        wrong = "has no images in" if split in splits else "has no split"
        raise CallError(f"--split: {config.data} {wrong} {split}; choose from {sizes}")
    return splits[split], [caption for example in splits["train"] for caption in example.captions] or None


def score_model(
    config: EvaluateConfig, examples: Sequence, java_metrics: Sequence[str]
) -> tuple["Scores", dict[str, str], "Vocabulary"]:
    """Caption the examples with the models of --model: the scores, the captions by image, and the vocabulary."""
    from tqdm import tqdm

    from attncap import evaluation
    from attncap.captioner import Captioner, Ensemble
    from attncap.devices import find_device, find_workers

    device = find_device(config.device)
    models = [Captioner.from_pretrained(folder, device=device, backend=config.backend) for folder in config.model]
    model = models[0] if len(models) == 1 else Ensemble(models)
    with tqdm(total=len(examples), desc="captioning", unit="image", leave=False) as bar:
        scores, captions = evaluation.evaluate(
            model,
            examples,
            config.search,
            java_metrics=java_metrics,
            batch_size=config.batch_size,
            workers=find_workers(config.workers, device),
            progress=bar.update,
        )
    return scores, captions, model.vocabulary


def write(
    path: Path,
    captioned: bool,
    report: Mapping,
    scores: "Scores",
    captions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    images: Mapping[str, Callable[[], "Image.Image"]],
) -> None:
    """Write the files of --output. The captions are written only if a model has just written them (`captioned`)."""
    from attncap.evaluation import results
    from attncap.report import as_markdown, write_page

    write_atomically(path, json.dumps(scores.corpus(), indent=2) + "\n")
    if captioned:
        write_atomically(path.with_suffix(".results.json"), json.dumps(results(captions), indent=1) + "\n")
    lines = (json.dumps({**line, **row}) for line, row in zip(results(captions), scores.rows(), strict=True))
    write_atomically(path.with_suffix(".images.jsonl"), "".join(f"{line}\n" for line in lines))
    write_atomically(path.with_suffix(".report.json"), json.dumps(report, indent=2) + "\n")
    write_atomically(path.with_suffix(".report.md"), as_markdown(report))
    write_page(path.with_suffix(".html"), report, captions, references, scores, images)
