"""Scoring a model on a data set, and captions in a file against references."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from attncap.config import short
from attncap.data import CaptionedImage, Skipped, report_skipped
from attncap.data.shapes import is_true
from attncap.data.tokenizer import characters, tokenize
from attncap.data.vocabulary import Vocabulary
from attncap.errors import CallError, UserError
from attncap.files import read_json
from attncap.metrics import Scores, bootstrap, score
from attncap.metrics.diversity import diversity
from attncap.search.config import SearchConfig

if TYPE_CHECKING:  # these import torch, which scoring a file does not need
    from attncap.captioner import Captioner, Ensemble
    from attncap.data.feature_cache import FeatureCache

MAX_RESULTS = 256 * 2**20  # bytes of a results file; those for COCO's 40,775 test images have 4 MiB

log = logging.getLogger("attncap")


def evaluate(
    model: Captioner | Ensemble,
    examples: Sequence[CaptionedImage],
    search: SearchConfig | None = None,
    *,
    java_metrics: Collection[str] = (),
    batch_size: int = 32,
    workers: int = 0,
    features: FeatureCache | None = None,
    progress: Callable[[int], object] | None = None,
    skip: Callable[[Sequence[Skipped]], object] = report_skipped,
) -> tuple[Scores, dict[str, str]]:
    """Caption every example freely (no teacher forcing), and score the best caption of each against all of its
    references.

    Args:
        model, examples, search, batch_size, workers, features, progress, skip: see `caption_examples`.
        java_metrics: the metrics that need Java, "METEOR" and "SPICE", to compute as well.

    Returns:
        The scores (see `metrics.score`; on `shapes`, also `true`, the share of captions that are exactly true of their
        scene, and `grounded`, see `grounding`), and the captions by image.

    Raises UserError when none of the images can be read.
    """
    from attncap.captioning import caption_examples
    from attncap.metrics.grounding import grounding

    captioned = caption_examples(
        model,
        examples,
        search,
        batch_size=batch_size,
        workers=workers,
        features=features,
        progress=progress,
        skip=skip,
    )
    best = [(example, captions[0]) for example, captions in captioned]
    if not best:
        raise UserError("none of the images to be scored could be read")
    captions = {example.name: caption.text for example, caption in best}
    scores = score(captions, {example.name: example.captions for example, _ in best}, java_metrics)
    scenes = [(example.scene, caption) for example, caption in best if example.scene is not None]
    if len(scenes) == len(best):
        scores.by_image["true"] = np.array([float(is_true(caption.text, scene)) for scene, caption in scenes])
        grounded = np.array([grounding(scene, caption) for scene, caption in scenes])
        scores.by_image |= {"grounded": grounded[:, 0], "grounded by chance": grounded[:, 1]}
    return scores, captions


def summary(
    scores: Scores, captions: Mapping[str, str], vocabulary: Vocabulary | None, training: Collection[str] | None
) -> dict:
    """The report of an evaluation: the metrics with their 95% intervals, and how varied the captions are, compared with
    the model's vocabulary and the captions it was trained on, if these are given. Notes explain the figures."""
    intervals = bootstrap.intervals(scores)
    metrics = {}
    for name, value in scores.corpus().items():
        low, high = intervals[name]
        metrics[name] = {"value": value, "low": low, "high": high}
    words = None  # the share of a subword vocabulary that is used says little
    if vocabulary and vocabulary.merges is None:
        words = vocabulary.words[len(vocabulary.SPECIALS) :]

    def split(caption: str) -> list[str]:
        return characters(tokenize(caption)) if scores.by_characters else tokenize(caption)

    varied = diversity(list(map(split, captions.values())), words, None if training is None else map(split, training))
    notes = []
    if not scores.by_image["CIDEr"].any():
        notes.append(
            "CIDEr is 0: no caption shares words with its references, apart from words that the references of every "
            "image contain, which have no weight (with one image, all words)."
        )
    if scores.by_characters:
        notes.append("The captions have no spaces between words, so words are characters in all figures.")
    return {"images": len(captions), "figures": metrics, "captions": varied, "notes": notes}


def results(captions: Mapping[str, str]) -> list[dict[str, int | str]]:
    """Captions by image -> COCO's results format."""
    return [{"image_id": image_id(name), "caption": caption} for name, caption in captions.items()]


def image_id(name: str) -> int | str:
    """An example's name as an image id of COCO's results format: COCO's ids are integers; other data sets use file
    names."""
    return int(name) if name.isdecimal() and str(int(name)) == name else name


def read_results(path: str | Path) -> dict[str, str]:
    """COCO's results format -> captions by image id. Raises CallError when there is no such file, and UserError, which
    names the field, when its content has a different form."""
    if not Path(path).is_file():
        raise CallError(f"{path}: no such file")
    found = read_json(path, MAX_RESULTS)
    if not isinstance(found, list):
        raise UserError(f'{path}: expected a list, [{{"image_id": 1, "caption": "..."}}, ...]')
    captions: dict[str, str] = {}
    for i, result in enumerate(found):
        for field, kinds in (("image_id", (int, str)), ("caption", (str,))):
            if not isinstance(result, dict) or type(result.get(field)) not in kinds:
                raise UserError(f'{path}: field "{field}" of entry {i} is missing or of the wrong type')
        name = str(result["image_id"])
        if name in captions:
            raise UserError(f"{path}: image id {short(result['image_id'])} occurs twice; keep one caption per image")
        captions[name] = result["caption"]
    if not captions:
        raise UserError(f"{path}: the list of captions is empty")
    return captions


def check_predictions(
    path: str | Path, captions: Mapping[str, str], references: Mapping[str, Sequence[str]], source: str | Path
) -> None:
    """Raises UserError when the captions in `path` include images without references in `source`. Warns when images
    with references have no caption: these images are not scored."""
    unknown = [name for name in captions if not references.get(name)]
    if unknown:
        raise UserError(
            f"{path}: {len(unknown)} of {len(captions)} image ids have no references in {source}, e.g. {unknown[0]}"
        )
    if missing := [name for name in references if name not in captions]:
        counts = f"scoring {len(captions)} of the {len(references)} images with references"
        log.warning("%s: %s; no caption for image %s, for example", path, counts, missing[0])


def check_comparison(path: str | Path, others: Mapping[str, str], captions: Mapping[str, str]) -> None:
    """Raises UserError unless the captions to compare with, in `path`, include all the images."""
    if missing := [name for name in captions if name not in others]:
        raise UserError(f"{path}: no caption for {len(missing)} of the images, e.g. image {missing[0]}")
