"""A whole run: from the settings to the data, the vocabulary, the model and the trainer, and finally the test."""

import contextlib
import dataclasses
import json
import logging
import sys
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from attncap.captioner import Captioner
from attncap.captioning import read_images
from attncap.data import Splits, open_dataset
from attncap.data.dataset import one_line
from attncap.data.tokenizer import lacks_spaces
from attncap.data.vocabulary import Vocabulary
from attncap.devices import find_workers
from attncap.errors import CallError, UserError
from attncap.evaluation import evaluate, results, summary
from attncap.files import FolderLock, remove_temporary, write_atomically
from attncap.pictures import save_attention
from attncap.report import as_text
from attncap.search.processors import processors_for
from attncap.training import checkpoint, distributed, inputs
from attncap.training.config import DataConfig, TrainConfig
from attncap.training.trainer import Trainer
from attncap.versions import versions

log = logging.getLogger("attncap")


class ResumableError(UserError):
    """An error after the state of the run was written, so the run can be resumed."""


def train(config: TrainConfig, device: torch.device, given: Collection[str] = ()) -> None:
    """Train a model according to the settings, and write it and its log to `config.run.output`. If several processes
    share a run, each of them calls this inside `distributed.process_group`.

    Args:
        config: all settings.
        device: that of this process.
        given: the settings that the caller has chosen, e.g. "model.hidden_size", as opposed to those of a recipe: only
            these can contradict the model that `start_from` names.

    Raises Stopped after Ctrl-C, SIGTERM or SIGHUP, once the state of the run has been written; CallError and UserError
    before it is written for the first time, and ResumableError for any error after that.
    """
    output = Path(config.run.output or Path("runs") / Path(config.data.path).resolve().stem)
    with FolderLock(output) if distributed.is_main() else contextlib.nullcontext() as lock:
        trainer = prepare(config, device, given, output, lock)
        config, splits = trainer.config, trainer.splits
        with trainer.signals:  # from before the first checkpoint, so that the run can be resumed after any later signal
            if distributed.is_main():
                if not config.run.resume:
                    settings = {"settings": dataclasses.asdict(config), "versions": versions()}
                    write_atomically(output / "settings.json", json.dumps(settings, indent=2) + "\n")
                    inputs.save(output, trainer.model.vocabulary, splits)
                    trainer.save_checkpoint()
                sizes = ", ".join(f"{len(examples)} {split}" for split, examples in splits.items())
                where = f"{device}, {distributed.size()} processes" if distributed.size() > 1 else device
                words = len(trainer.model.vocabulary)
                print(f"{config.data.path}: {sizes} images, {words} words; {where}; writing to {output}")
            try:
                trainer.fit()
                if distributed.is_main():
                    with trainer.signals.raising():
                        evaluate_test_split(config, splits, training_captions(splits), output, device)
            except Exception as error:
                if not (output / checkpoint.NAME).exists():  # the folder was removed
                    raise
                kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
                reason = " ".join(f"{kind}{error}".splitlines())
                saved = f"; the best model so far is in {output}" if (output / "model.safetensors").exists() else ""
                raise ResumableError(reason + saved) from error


def prepare(
    config: TrainConfig, device: torch.device, given: Collection[str], output: Path, lock: FolderLock | None
) -> Trainer:
    """The trainer of a new run, or of the run in `output` in the state of its last checkpoint. Raises CallError and
    UserError."""
    requested, start, recorded, edited = config, None, None, False
    if distributed.is_main():
        check_output(config, output)
    if config.run.resume:  # it keeps its own sizes and vocabulary, even if the files they came from have changed
        kept = (checkpoint.check_settings(config, output), inputs.load(output)) if distributed.is_main() else None
        config, recorded = distributed.broadcast(kept)
    elif config.run.start_from:
        start = Captioner.from_pretrained(config.run.start_from, backend=config.run.backend)
        config = dataclasses.replace(config, model=start.config)
    with distributed.log_on_main_only():
        splits = open_dataset(config.data.path, config.run.seed, config.data.images)
        for split, examples in splits.items():
            if not examples:
                raise UserError(
                    f"{config.data.path}: no images for the {split} split; at least three images are needed"
                )
        if recorded:
            splits, edited = inputs.compare(recorded, splits, config.data.path)
    captions = training_captions(splits)
    if start:
        check_start(requested, start, given, captions)
    if recorded and recorded.vocabulary:
        source, vocabulary = output / inputs.VOCABULARY, recorded.vocabulary
    elif start:
        source, vocabulary = Path(config.run.start_from) / inputs.VOCABULARY, start.vocabulary
    else:
        source, vocabulary = config.data.vocabulary, find_vocabulary(config.data, captions)
    if source and (edited or not recorded):
        check_coverage(source, vocabulary, captions)
    processors_for(config.search, vocabulary)  # a word that does not exist is an error now, not after an epoch
    torch.manual_seed(config.run.seed)
    # The weights of a resumed run come from its checkpoint.
    weights = "none" if config.run.resume else config.encoder.weights
    model = (start or Captioner(config.model, vocabulary, weights, config.run.backend)).to(device)
    trainer = Trainer(config, model, splits, output, lock)
    if config.run.resume:
        trainer.load_checkpoint()
        if trainer.epoch > config.run.epochs:
            raise CallError(f"epochs={config.run.epochs}: the run in {output} has already done {trainer.epoch}")
    if config.data.cache_features:
        trainer.cache_features()
    return trainer


def check_output(config: TrainConfig, output: Path) -> None:
    """Raises CallError if the folder of a new run already contains a run. Removes files that a killed process left
    half-written."""
    if not config.run.resume and any((output / name).exists() for name in (checkpoint.NAME, "model.safetensors")):
        raise CallError(f"{output} already contains a run; resume it, or choose another output folder")
    remove_temporary(output)


def training_captions(splits: Splits) -> list[str]:
    return [caption for example in splits["train"] for caption in example.captions]


def check_start(config: TrainConfig, start: Captioner, given: Collection[str], captions: Sequence[str]) -> None:
    """Raises CallError if settings that were given contradict the model that `start_from` names."""
    differences = []
    for setting in dataclasses.fields(config.model):
        value, has = getattr(config.model, setting.name), getattr(start.config, setting.name)
        if f"model.{setting.name}" in given and value != has:
            differences.append(f"{setting.name}={value} (it has {has})")
    if "encoder.weights" in given and config.encoder.weights != "none":
        differences.append(f"encoder.weights={config.encoder.weights} (it has its own)")
    if words := [name for name in ("min_count", "vocabulary", "subwords") if f"data.{name}" in given]:
        vocabulary, of_start = find_vocabulary(config.data, captions), start.vocabulary
        if (vocabulary.words, vocabulary.merges) != (of_start.words, of_start.merges):
            values = ", ".join(f"{name}={getattr(config.data, name)}" for name in words)
            differences.append(f"{values} (gives {len(vocabulary)} words; it has its own {len(of_start)})")
    if differences:
        raise CallError(
            f"{config.run.start_from}: the model to start from differs from the settings: {', '.join(differences)}; "
            "leave these settings out"
        )


def find_vocabulary(config: DataConfig, captions: Sequence[str]) -> Vocabulary:
    """The vocabulary in the file that the settings name, or otherwise one built from the training captions. Raises
    CallError and UserError."""
    if config.vocabulary is None:
        if distributed.is_main() and not config.subwords and lacks_spaces(captions):
            log.warning("the captions have no spaces between words, so each clause is one word; use --subwords 4000")
        vocabulary = Vocabulary.build(captions, config.min_count, config.subwords)
        if len(vocabulary) == len(Vocabulary.SPECIALS):
            raise UserError(
                f"{config.path}: no word occurs {config.min_count} times in the training captions; lower --min-count"
            )
        return vocabulary
    if not Path(config.vocabulary).is_file():
        raise CallError(f"{config.vocabulary}: no such vocabulary file")
    return Vocabulary.load(config.vocabulary)


def check_coverage(source: str | Path, vocabulary: Vocabulary, captions: Sequence[str]) -> None:
    """Print how much of the training captions a vocabulary covers that was not built from them. Raises UserError if it
    has none of their words."""
    ids = Counter(i for caption in captions for i in vocabulary.encode(caption, sys.maxsize)[1:-1])
    if ids.total() == ids[Vocabulary.UNK]:
        raise UserError(f"{source}: contains none of the words of the training captions")
    unknown = ids[Vocabulary.UNK] / ids.total()
    if distributed.is_main():
        print(f"{source}: covers {1 - unknown:.2%} of the words in the training captions; {unknown:.2%} are unknown")


def evaluate_test_split(
    config: TrainConfig, splits: Splits, training: Sequence[str], output: Path, device: torch.device
) -> None:
    """Caption the test images with the best model. Writes the metrics, the captions, and a picture of the attention.
    `training` are the training captions, with which the report compares those of the model."""
    model = Captioner.from_pretrained(output, device=device, backend=config.run.backend)
    with tqdm(total=len(splits["test"]), desc="captioning", unit="image", leave=False) as bar:
        scores, captions = evaluate(
            model,
            splits["test"],
            config.search,
            batch_size=config.data.batch_size,
            workers=find_workers(config.run.workers, device),
            progress=bar.update,
        )
    write_atomically(output / "test.json", json.dumps(scores.corpus(), indent=2) + "\n")
    write_atomically(output / "results.json", json.dumps(results(captions), indent=1) + "\n")
    report = summary(scores, captions, model.vocabulary, training)
    print(f"test split, beam size {config.search.beam_size}\n{as_text(report)}")
    read = list(islice(read_images(example for example in splits["test"] if example.name in captions), 4))
    images = [image for _, image in read]
    shown = model.caption(images, dataclasses.replace(config.search, n_best=1))
    for (example, _), caption in zip(read, shown, strict=True):
        print(f"{one_line(example.name)}: {one_line(caption.text)}")
    if images:
        save_attention(output / "attention.png", list(zip(images, shown, strict=True)))
