"""Train a captioner: on `shapes`, which draws itself, or on your photographs and their captions.

After each epoch the model captions the validation images freely (no teacher forcing) and is kept when it is the best so
far; at the end the best one captions the test images. Ctrl-C and SIGTERM stop a run at the next step, --resume goes on.
Several GPUs share every batch: torchrun --nproc-per-node 8 -m attncap.train ...
"""

import argparse
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from attncap import command
from attncap.captioner import Captioner
from attncap.data import Splits, open_dataset
from attncap.data.vocabulary import Vocabulary
from attncap.errors import CallError, UserError
from attncap.evaluate import evaluate, results, summary
from attncap.files import remove_temporary, write_atomically
from attncap.info import versions
from attncap.pictures import save_attention
from attncap.report import as_text
from attncap.training import checkpoint, distributed, recipes
from attncap.training.config import TrainConfig
from attncap.training.interruption import Stopped
from attncap.training.trainer import Trainer


def main(config: TrainConfig) -> None:
    config.check()
    with distributed.processes(config.device) as device:
        status = run(config, device)
        if status:
            sys.exit(status)


def run(config: TrainConfig, device: torch.device) -> int:
    """The command, in each of the processes. Returns the exit status: that of the signal that stopped it, or 0."""
    output = Path(config.output or Path("runs") / Path(config.data).resolve().stem)
    start = config.start_from and Captioner.from_pretrained(config.start_from, config.implementation)
    asked = config  # whose model is what the flags and the recipe say
    if start:
        config = dataclasses.replace(config, model=start.config)
    if distributed.is_main():
        check_output(config, output)
    with distributed.one_voice():
        splits = open_dataset(config.data, config.seed)
    for split, examples in splits.items():
        if not examples:
            raise UserError(f"{config.data}: no images for the {split} split; it takes three or more")
    captions = [caption for example in splits["train"] for caption in example.captions]
    if start and not config.resume:
        check_start(asked, start, captions)
    vocabulary = start.vocabulary if start else find_vocabulary(config, captions)
    vocabulary.suppress(config.suppressed.split())  # a word that is none is told now, not after the first epoch
    torch.manual_seed(config.seed)
    weights = "none" if config.resume else config.encoder_weights  # of a resumed run they come from the checkpoint
    model = (start or Captioner(config.model, vocabulary, weights, config.implementation)).to(device)
    trainer = Trainer(config, model, splits, output)
    if config.resume:
        trainer.load_checkpoint()
    if config.cache_features:
        trainer.cache_features()
    if not config.resume and distributed.is_main():
        settings = {"settings": dataclasses.asdict(config), "versions": versions()}
        write_atomically(output / "settings.json", json.dumps(settings, indent=2) + "\n")
        trainer.save_checkpoint()
    if distributed.is_main():
        sizes = ", ".join(f"{len(examples)} {split}" for split, examples in splits.items())
        where = f"{device}, {distributed.size()} processes" if distributed.size() > 1 else device
        print(f"{config.data}: {sizes} images, {len(model.vocabulary)} words; {where}; writing to {output}")
    try:
        with trainer.interruption:
            trainer.fit()
            if distributed.is_main():
                with trainer.interruption.raised():
                    test(config, splits, captions, output, device)
    except Stopped as stopped:
        if distributed.is_main():
            print(f"\nattncap: stopped; go on with: {checkpoint.how_to_go_on()}", file=sys.stderr, flush=True)
        return stopped.code
    return 0


def check_output(config: TrainConfig, output: Path) -> None:
    """Raises CallError unless the folder has no run yet, or, to resume it, one of the same settings. What a killed
    process left half written is removed."""
    if config.resume:
        checkpoint.check_settings(config, output)
    elif any((output / name).exists() for name in (checkpoint.NAME, "model.safetensors")):
        raise CallError(f"{output} holds a run already; go on with --resume, or give another --output")
    remove_temporary(output)


def check_start(config: TrainConfig, start: Captioner, captions: Sequence[str]) -> None:
    """Raises CallError where flags that were given ask for another model than that of --start-from."""
    flags = [argument.partition("=")[0] for argument in sys.argv[1:] if argument.startswith("--")]
    given = {flag[2:].replace("-", "_"): flag for flag in flags}
    asked, has = vars(config.model), vars(start.config)
    others = [
        f"{flag} {asked[name]} (it has {has[name]})"
        for name, flag in given.items()
        if name in asked and asked[name] != has[name]
    ]
    if "encoder_weights" in given and config.encoder_weights != "none":
        others.append(f"{given['encoder_weights']} {config.encoder_weights} (it has its own)")
    if words := [name for name in given if name in ("vocabulary", "subwords", "min_count")]:
        vocabulary, of_start = find_vocabulary(config, captions), start.vocabulary
        if (vocabulary.words, vocabulary.merges) != (of_start.words, of_start.merges):
            values = " ".join(f"{given[name]} {getattr(config, name)}" for name in words)
            others.append(f"{values} (gives {len(vocabulary)} words, others than the {len(of_start)} that it has)")
    if others:
        raise CallError(
            f"--start-from {config.start_from}: the model there is another: {', '.join(others)}; leave these flags out"
        )


def find_vocabulary(config: TrainConfig, captions: Sequence[str]) -> Vocabulary:
    """That of --vocabulary, or else one learnt from the training captions. Raises CallError and UserError."""
    if config.vocabulary is None:
        return Vocabulary.build(captions, config.min_count, config.subwords)
    if config.subwords:
        raise CallError("--subwords: --vocabulary has its words already; give one of the two")
    if not Path(config.vocabulary).is_file():
        raise CallError(f"--vocabulary {config.vocabulary}: no such file")
    vocabulary = Vocabulary.load(config.vocabulary)
    ids = Counter(i for caption in captions for i in vocabulary.encode(caption, sys.maxsize)[1:-1])
    if ids.total() == ids[Vocabulary.UNK]:
        raise UserError(f"--vocabulary {config.vocabulary}: has no word of the training captions")
    known = 1 - ids[Vocabulary.UNK] / ids.total()
    if distributed.is_main():
        print(f"{config.vocabulary}: knows {known:.2%} of the running words of the training captions")
    return vocabulary


def test(config: TrainConfig, splits: Splits, training: Sequence[str], output: Path, device: torch.device) -> None:
    """Caption the test images with the best model; write the figures, the captions, and a picture of attention.
    `training`: the training captions, to tell how many of the model's are new."""
    model = Captioner.from_pretrained(output, config.implementation).to(device)
    scores, captions = evaluate([model], splits["test"], config)
    write_atomically(output / "test.json", json.dumps(scores.corpus(), indent=2) + "\n")
    write_atomically(output / "results.json", json.dumps(results(captions), indent=1) + "\n")
    report = summary(scores, captions, model.vocabulary, training)
    print(f"test split, beam {config.search.beam_size}\n{as_text(report)}")
    names = list(captions)[:4]
    images = [example.image() for example in splits["test"] if example.name in names]
    captions = model.caption(images, config.search, suppressed=config.suppressed.split())
    for name, caption in zip(names, captions, strict=True):
        print(f"{name}: {caption.text}")
    save_attention(output / "attention.png", list(zip(images, captions, strict=True)))
    print(f"where the model looked: {output / 'attention.png'}")


if __name__ == "__main__":
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--data", default="shapes")
    early.add_argument("--recipe")
    chosen = early.parse_known_args()[0]
    name = chosen.recipe or ("shapes" if chosen.data == "shapes" else "flickr8k")
    # What an unknown name is answered with is TrainConfig.check's part.
    command.run("train", main, recipes.load(name) if name in recipes.NAMES else TrainConfig, __doc__)
