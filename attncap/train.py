"""Train a captioner: on `shapes`, which draws itself, or on your photographs and their captions.

After each epoch the model captions the validation images freely (no teacher forcing) and is kept when it is the best so
far; at the end the best one captions the test images.
"""

import argparse
import copy
import dataclasses
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from tqdm import tqdm

from attncap import command
from attncap.captioner import Captioner
from attncap.config import ModelConfig
from attncap.data import open_dataset
from attncap.data.loader import AugmentedPictures, Pictures, batches, caption_rows, pad, report
from attncap.data.vocabulary import Vocabulary
from attncap.errors import CallError, UserError
from attncap.evaluate import evaluate, results, summary
from attncap.files import atomic_path, write_atomically
from attncap.info import versions
from attncap.pictures import save_attention
from attncap.report import as_text


@dataclass(kw_only=True)
class TrainConfig(command.CaptioningConfig):
    data: str = "shapes"
    """shapes, or the path of a data set: Flickr8k, Flickr30k, COCO, Karpathy's splits, or a table of your own (see
    `python -m attncap.data PATH`)."""
    output: str | None = None
    """Folder for the model and the log; by default runs/NAME, after the data."""
    epochs: int = 10
    """Times every training image is seen."""
    batch_size: int = 8
    """Images in a step, each with --captions-per-image captions."""
    captions_per_image: int = 5
    """Captions of an image in a step; an image with more gets others the next time."""
    learning_rate: float = 5e-4
    """AdamW's, for the decoder; it rises over the first tenth of the run and then falls to 0 along a cosine."""
    encoder_learning_rate: float = 1e-4
    """The same for the layers of the encoder that are trained."""
    weight_decay: float = 0.01
    """AdamW's."""
    label_smoothing: float = 0.1
    """Share of a word's target spread over the whole vocabulary."""
    attention_penalty: float = 1.0
    """Weight of the doubly stochastic penalty: over a caption every cell should get attention 1 in sum."""
    clip_norm: float = 5.0
    """Gradients are scaled down to this norm."""
    augment: bool = True
    """Train on random parts of the images, mirrored half of the time."""
    encoder_weights: str = "default"
    """default (torchvision's ImageNet weights), none, or the file of a state dict."""
    fine_tune_from: str = "none"
    """Train the encoder from this layer on (torchvision's name, e.g. layer3); all of it, or none of it."""
    min_count: int = 3
    """Words seen less often in the training captions become <unk>."""
    vocabulary: str | None = None
    """File of the words to use instead of the training captions' own: another run's vocabulary.json, or the WORDMAP of
    the tutorial a-PyTorch-Tutorial-to-Image-Captioning."""
    subwords: int = 0
    """Pieces of words to learn from the training captions (byte-pair encoding), for a language with too many words; 0:
    whole words. Needs the tokenizers library."""
    best_by: Literal["CIDEr", "BLEU-4"] = "CIDEr"
    """The validation figure that decides which model is kept."""
    seed: int = 0
    """Of the weights, the order, and the splits where the data set has none."""
    resume: bool = False
    """Go on after the last whole epoch of the run in --output."""
    model: Annotated[ModelConfig, tyro.conf.arg(name="")] = field(default_factory=ModelConfig)


# What suits each kind of data: photographs want a pretrained encoder, shapes a small one that learns in minutes.
PHOTOGRAPHS = TrainConfig()
SHAPES = TrainConfig(
    epochs=4,
    batch_size=16,
    captions_per_image=2,
    learning_rate=1e-3,
    encoder_learning_rate=1e-3,
    label_smoothing=0.0,
    attention_penalty=0.0,  # 64 cells and a dozen words: most cells hold nothing to look at
    augment=False,  # a mirrored scene would make "left" a lie
    encoder_weights="none",
    fine_tune_from="all",
    min_count=1,
    model=ModelConfig(
        encoder="resnet18",
        encoder_layer="layer2",
        image_size=64,
        attention_size=128,
        embedding_size=128,
        hidden_size=256,
        dropout=0.1,
    ),
)


def main(config: TrainConfig) -> None:
    output = Path(config.output or Path("runs") / Path(config.data).resolve().stem)
    device = command.find_device(config.device)
    if config.resume:
        check_resume(config, output)
    elif any((output / name).exists() for name in ("checkpoint.pt", "model.safetensors")):
        raise CallError(f"{output} holds a run already; go on with --resume, or give another --output")

    splits = open_dataset(config.data, config.seed)
    for split, examples in splits.items():
        if not examples:
            raise UserError(f"{config.data}: no images for the {split} split; it takes three or more")
    vocabulary = find_vocabulary(config, [caption for example in splits["train"] for caption in example.captions])
    vocabulary.forbid(config.suppressed.split())  # a word that is none is told now, not after the first epoch
    torch.manual_seed(config.seed)
    # A resumed run takes its weights from the checkpoint.
    weights = "none" if config.resume else config.encoder_weights
    model = Captioner(config.model, vocabulary, weights, config.implementation).to(device)
    model.encoder.fine_tune(config.fine_tune_from)
    trainer = Trainer(config, model, splits, output)
    if config.resume:
        trainer.load_checkpoint()
    else:
        settings = {"settings": dataclasses.asdict(config), "versions": versions()}
        write_atomically(output / "settings.json", json.dumps(settings, indent=2) + "\n")
        trainer.save_checkpoint()
    sizes = ", ".join(f"{len(examples)} {split}" for split, examples in splits.items())
    print(f"{config.data}: {sizes} images, {len(vocabulary)} words; {device}; writing to {output}")
    try:
        trainer.fit()
    except KeyboardInterrupt:
        if not (output / "model.safetensors").exists():
            trainer.average.save_pretrained(output)
        print(f"\nattncap: stopped; {output} holds the best model so far, --resume goes on", file=sys.stderr)
        raise
    trainer.test()


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
    print(f"{config.vocabulary}: knows {known:.2%} of the running words of the training captions")
    return vocabulary


def check_resume(config: TrainConfig, output: Path) -> None:
    """Raises CallError unless the run in `output` can go on with these settings: all but a few must be as they were."""
    path = output / "settings.json"
    try:
        before = json.loads(path.read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError) as error:
        raise CallError(f"--resume: no run to go on with in {output} ({path}: {error}); train without it") from error
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    free = {"data", "output", "epochs", "resume", "device", "workers", "debug"}
    default = json.loads(json.dumps(dataclasses.asdict(TrainConfig())))  # for settings that came later than the run
    before, now, default = ({**x.pop("model"), **x.pop("search", {}), **x} for x in (before, now, default))
    changed = [
        f"--{name.replace('_', '-')} {value} (was {before.get(name)})"
        for name, value in now.items()
        if name not in free and value != before.get(name, default[name])
    ]
    if changed:
        raise CallError(f"--resume: the run in {output} began with other settings: {', '.join(changed)}")


class Trainer:
    """One run: a model, its data, and the folder its files go to."""

    def __init__(self, config: TrainConfig, model: Captioner, splits: dict[str, Sequence], output: Path):
        self.config, self.model, self.splits, self.output = config, model, splits, output
        pictures = AugmentedPictures if config.augment else Pictures
        self.pictures = pictures(splits["train"], model.config.image_size)
        self.steps = math.ceil(len(splits["train"]) / config.batch_size)  # in an epoch
        encoder = [p for p in model.encoder.parameters() if p.requires_grad]
        groups = [
            {"params": list(model.decoder.parameters()), "peak": config.learning_rate},
            {"params": encoder, "peak": config.encoder_learning_rate},
        ]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
        self.average = copy.deepcopy(model).eval()  # what is validated and kept, see `update_average`
        self.workers = command.find_workers(config.workers, model.device)
        self.epoch, self.best = 0, []

    def fit(self) -> None:
        """Train the epochs that are left. After each one: validate, log, keep the model if it is the best, write the
        checkpoint."""
        while self.epoch < self.config.epochs:
            start = time.time()
            losses = self.train_epoch()
            seconds = time.time() - start
            figures = evaluate([self.average], self.splits["val"], self.config)[0].figures()
            self.epoch += 1
            line = {"epoch": self.epoch, **losses, "seconds": round(seconds, 1), **figures}
            with open(self.output / "metrics.jsonl", "a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
            tqdm.write("  ".join(f"{name} {value:.4g}" for name, value in line.items()))
            # Where the first figure cannot tell models apart (CIDEr is 0 for a single image), the next one decides.
            rating = [figures[name] for name in (self.config.best_by, "BLEU-4", "ROUGE-L")]
            if rating > self.best:
                self.best = rating
                self.average.save_pretrained(self.output)
            self.save_checkpoint()

    def train_epoch(self) -> dict[str, float]:
        """One pass over the training images. Returns the mean of each term of the loss."""
        config, examples = self.config, self.splits["train"]
        rng = np.random.default_rng((config.seed, self.epoch))
        torch.manual_seed(config.seed + 1 + self.epoch)  # dropout and augmentation: an epoch is the same after --resume
        order = rng.permutation(len(examples)).tolist()
        self.model.train()
        sums, step = {"words": 0.0, "attention": 0.0}, 0
        with tqdm(total=len(order), desc=f"epoch {self.epoch + 1}/{config.epochs}", unit="image", leave=False) as bar:
            for indices, images, errors in batches(self.pictures, config.batch_size, self.workers, order):
                for error in errors:
                    report(str(error))
                bar.update(len(indices) + len(errors))
                if images is None:
                    continue
                rows = [
                    row
                    for index in indices
                    for row in caption_rows(
                        examples[index].captions,
                        config.captions_per_image,
                        self.model.vocabulary,
                        config.search.max_length,
                        rng,
                    )
                ]
                losses = self.train_step(images, pad(rows), step)
                step += 1
                for name in sums:
                    sums[name] += losses[name].item()
                bar.set_postfix({name: f"{total / step:.3f}" for name, total in sums.items()})
        if not step:
            raise UserError("none of the training images could be read")
        return {f"loss_{name}": total / step for name, total in sums.items()}

    def train_step(self, images: Tensor, tokens: Tensor, step: int) -> dict[str, Tensor]:
        """images uint8 [B,3,S,S], tokens int64 [N,T]: one step of the optimizer."""
        config, device = self.config, self.model.device
        factor = self.schedule(self.epoch + step / self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        tokens = tokens.to(device)
        logits, weights = self.model(images.to(device), tokens)
        losses = caption_losses(logits, weights, tokens[:, 1:], config.label_smoothing)
        loss = losses["words"] + config.attention_penalty * losses["attention"]
        if not loss.isfinite():
            raise UserError(
                f"the loss is {loss.item()} in epoch {self.epoch + 1}; try a new run with a lower --learning-rate"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        self.optimizer.step()
        self.update_average(self.epoch * self.steps + step)
        return losses

    @torch.no_grad()
    def update_average(self, step: int) -> None:
        """Exponential moving average of the weights, over a tenth of the steps so far and at most 200. Its aim is
        validation figures that jump less from one epoch to the next than those of the weights themselves."""
        share = max(1 / 200, 1 / (1 + step / 10))
        weights = self.model.state_dict()
        for name, average in self.average.state_dict().items():
            if average.is_floating_point():
                average.lerp_(weights[name], share)
            else:
                average.copy_(weights[name])

    def schedule(self, epoch: float) -> float:
        """Share of the peak learning rate: up over the first tenth of the run, then down to 0 along a cosine."""
        done = epoch / self.config.epochs
        if done < 0.1:
            return (done + 0.001) / 0.101
        return 0.5 * (1 + math.cos(math.pi * (done - 0.1) / 0.9))

    def test(self) -> None:
        """Caption the test images with the best model; write the figures, the captions, and a picture of attention."""
        self.model = Captioner.from_pretrained(self.output, self.config.implementation).to(self.model.device)
        scores, captions = evaluate([self.model], self.splits["test"], self.config)
        write_atomically(self.output / "test.json", json.dumps(scores.figures(), indent=2) + "\n")
        write_atomically(self.output / "results.json", json.dumps(results(captions), indent=1) + "\n")
        training = [caption for example in self.splits["train"] for caption in example.captions]
        report = summary(scores, captions, self.model.vocabulary, training)
        print(f"test split, beam {self.config.search.beam_size}\n{as_text(report)}")
        names = list(captions)[:4]
        images = [example.image() for example in self.splits["test"] if example.name in names]
        captions = self.model.caption(images, self.config.search, suppressed=self.config.suppressed.split())
        for name, caption in zip(names, captions, strict=True):
            print(f"{name}: {caption.text}")
        save_attention(self.output / "attention.png", list(zip(images, captions, strict=True)))
        print(f"where the model looked: {self.output / 'attention.png'}")

    def save_checkpoint(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "best": self.best,
        }
        with atomic_path(self.output / "checkpoint.pt") as temporary:
            torch.save(state, temporary)

    def load_checkpoint(self) -> None:
        path = self.output / "checkpoint.pt"
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.model.load_state_dict(state["model"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.epoch, self.best = state["epoch"], state["best"]
        except Exception as error:  # torch.load has no one kind of error for a file that is damaged
            raise UserError(f"{path}: cannot go on from it: {' '.join(str(error).split())[:200]}") from error
        log = self.output / "metrics.jsonl"
        if log.exists():  # it may be one epoch ahead of the checkpoint
            lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
            write_atomically(log, "".join(lines[: self.epoch]))


def caption_losses(logits: Tensor, weights: Tensor, targets: Tensor, label_smoothing: float) -> dict[str, Tensor]:
    """The terms of the loss, Xu et al. 2015, equation 14.

    logits [N,T,V], attention weights [N,T,P], targets int64 [N,T] with <pad> after the end ->
    `words`: cross entropy, the mean over all words; `attention`: the doubly stochastic penalty (1 - sum over the
    caption's words of a cell's weight) squared, the mean over rows and cells.
    """
    words = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=Vocabulary.PAD, label_smoothing=label_smoothing
    )
    written = (targets != Vocabulary.PAD).unsqueeze(2)
    attention = (1 - (weights * written).sum(dim=1)).square().mean()
    return {"words": words, "attention": attention}


if __name__ == "__main__":
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--data", default="shapes")
    data = early.parse_known_args()[0].data
    preset = SHAPES if data == "shapes" else PHOTOGRAPHS
    command.run("train", main, preset, __doc__)
