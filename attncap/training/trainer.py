"""The run itself: steps, epochs, validation, and the state from which it goes on whatever ended it."""

import contextlib
import copy
import functools
import math
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from attncap import command
from attncap.captioner import Caption, Captioner
from attncap.data import Skipped, report_skipped
from attncap.data.feature_cache import FeatureCache
from attncap.data.loader import AugmentedPictures, Pictures, batches, draw_batches, draw_rows, pad, seed_of
from attncap.errors import UserError
from attncap.evaluate import evaluate
from attncap.training import checkpoint, distributed
from attncap.training.batch import TERMS, Batch, Losses
from attncap.training.config import TrainConfig
from attncap.training.interruption import Interruption, Stopped
from attncap.training.optimization import Schedule, clip_gradients, make_optimizer, update_average
from attncap.training.scheduled_sampling import mix_tokens
from attncap.training.self_critical import SelfCritical
from attncap.training.watch import Watch

CHECKPOINT_EVERY = 600  # seconds, within an epoch
PLACE = ("epoch", "step", "sums", "words", "rows", "seconds")  # where a run is, and what it has summed there
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Trainer:
    """One run: a model, its data, and the folder its files go to.

    `epoch` and `step` are its place: whole epochs done, and steps of the optimizer done in the next one. All that is
    drawn at random (order, captions, augmentation, dropout, samples) is drawn from the seed and the place alone, so
    that a checkpoint has no random states to keep.
    """

    def __init__(self, config: TrainConfig, model: Captioner, splits: dict[str, Sequence], output: Path):
        self.config, self.model, self.splits, self.output = config, model, splits, output
        self.device, self.workers = model.device, command.find_workers(config.workers, model.device)
        self.optimizer = make_optimizer(config, model)
        self.average = copy.deepcopy(model).eval() if config.average_weights else model  # what is validated and kept
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "float16")
        self.skipped_seen: set[tuple[str, str]] = set()  # images that were reported
        self.caches: dict[str, FeatureCache] = {}  # features by split
        self.steps = math.ceil(len(splits["train"]) / (config.batch_size * config.accumulate))  # in an epoch
        self.schedule = Schedule(config, self.steps)
        captions = [example.captions for example in splits["train"]]
        self.self_critical, self.rows_of_tokens = None, []
        if config.objective == "scst":
            self.self_critical = SelfCritical(model.vocabulary, captions, config.samples, config.search.max_length)
        else:  # once: splitting them anew takes longer than a GPU takes to learn from them
            encode = functools.partial(model.vocabulary.encode, max_length=config.search.max_length)
            self.rows_of_tokens = [list(map(encode, of_image)) for of_image in captions]
        self.captions_per_image = config.samples if self.self_critical else config.captions_per_image
        self.generator = torch.Generator()  # for what is sampled on the way to the loss
        self.interruption = Interruption()
        self.epoch = self.step = 0
        self.start_sums()

    def cache_features(self) -> None:
        """Find the features of the images, or compute them, with the weights that the encoder has now: of a resumed
        run, those of its checkpoint. Raises UserError, see `FeatureCache.of`."""
        encoder, size = self.model.encoder, self.model.config.image_size
        with distributed.main_first():
            for split in ("train", "val"):
                self.caches[split] = FeatureCache.of(
                    self.splits[split], encoder, size, self.config.batch_size, self.workers
                )

    def start_sums(self) -> None:
        """What the log tells of an epoch: sums over its words and rows, and the time."""
        self.sums, self.words, self.rows, self.seconds = dict.fromkeys((*TERMS, "reward"), 0.0), 0, 0, 0.0

    def means(self) -> dict[str, float]:
        """Each term of the loss in this epoch so far, a word's or a row's, and the reward."""
        words, rows = max(1, self.words), max(1, self.rows)
        means = {"loss_words": self.sums["words"] / words, "loss_attention": self.sums["attention"] / rows}
        return means | ({"reward": self.sums["reward"] / rows} if self.self_critical else {})

    @property
    def steps_done(self) -> int:
        """In the whole run."""
        return self.epoch * self.steps + self.step

    def fit(self) -> None:
        """Train what is left of the run. Raises Stopped after Ctrl-C and SIGTERM, when a checkpoint is written, and
        UserError when the loss is no number or no image can be read."""
        if distributed.is_main():
            self.watch = Watch(self.output, self.config.best_by, self.epoch, self.steps_done)
        try:
            if self.config.start_from and self.schedule.best is None:  # there is a model already, to be bettered
                self.rate({"epoch": 0, **self.validate()})
                self.save_checkpoint()
            while self.epoch < self.config.epochs and not self.schedule.should_stop:
                self.train_epoch()
                self.end_epoch(self.validate())
        except Stopped:
            self.save_checkpoint()
            if distributed.is_main() and not (self.output / "model.safetensors").exists():
                self.average.save_pretrained(self.output)
            raise
        finally:
            if distributed.is_main():
                self.watch.close()

    def train_epoch(self) -> None:
        """The steps of an epoch that are left."""
        config, examples = self.config, self.splits["train"]
        self.model.encoder.fine_tune(config.fine_tune_from if self.epoch >= config.fine_tune_after else "none")
        # Samples are to be drawn from the very model that then learns from them: no dropout, no statistics of a batch.
        self.model.train(self.self_critical is None)
        losses = distributed.wrapped(Losses(self.model, 0.0 if self.self_critical else config.label_smoothing))
        order = draw_batches(len(examples), config.batch_size, config.seed, self.epoch)[self.step * config.accumulate :]
        shares = [batch[distributed.rank() :: distributed.size()] for batch in order]
        saved = before = time.monotonic()
        with tqdm(
            total=len(examples) * self.captions_per_image,
            initial=self.rows,
            desc=f"epoch {self.epoch + 1}/{config.epochs}",
            unit="caption",
            leave=False,
            disable=not distributed.is_main(),
        ) as bar:
            loader = batches(self.pictures(), config.batch_size, self.workers, shares, pin=self.device.type == "cuda")
            # No name but the loop's own holds its readers, so that they end with the loop, whatever ends it.
            for read in in_groups(loader, config.accumulate):
                seed = seed_of("step", config.seed, self.steps_done, distributed.rank())
                torch.manual_seed(seed)
                self.generator.manual_seed(seed)
                self.train_step(losses, [self.prepare(*batch) for batch in read])
                self.step += 1
                now = time.monotonic()
                self.seconds, before = self.seconds + now - before, now
                bar.update(self.rows - bar.n)
                bar.set_postfix({name.removeprefix("loss_"): f"{mean:.3f}" for name, mean in self.means().items()})
                if sum(distributed.total([self.interruption.number])):
                    raise Stopped(self.interruption.number or signal.SIGTERM)
                if now - saved > CHECKPOINT_EVERY:
                    self.save_checkpoint()
                    saved = now
        if not self.rows:
            raise UserError("none of the training images could be read")

    def pictures(self) -> Dataset:
        """The training images of this epoch, or their features."""
        examples, size = self.splits["train"], self.model.config.image_size
        if self.caches:
            return self.caches["train"]
        if self.config.augment:
            return AugmentedPictures(examples, size, self.config.seed, self.epoch)
        return Pictures(examples, size)

    def prepare(self, indices: Sequence[int], pictures: Tensor | None, skipped: Sequence[Skipped]) -> Batch:
        """From what the loader gives to a batch on the device: with captions, and, unless gradients go through the
        encoder, with features instead of images."""
        config = self.config
        report_skipped(skipped, self.skipped_seen)
        if pictures is None:
            return Batch([])
        batch = Batch(indices, pictures.to(self.device, non_blocking=True))
        if not self.self_critical:
            captions = [
                draw_rows(
                    self.rows_of_tokens[index],
                    config.captions_per_image,
                    seed_of("captions", config.seed, self.epoch, index),
                )
                for index in indices
            ]
            # The decoder wants images with long captions first: while it is cheap to sort them.
            order = sorted(range(len(indices)), key=lambda i: -max(map(len, captions[i])))
            batch.indices, batch.pictures = [indices[i] for i in order], batch.pictures[order]
            batch.tokens = pad([row for i in order for row in captions[i]])
        frozen = not any(parameter.requires_grad for parameter in self.model.encoder.parameters())
        if frozen or self.self_critical or config.scheduled_sampling:
            features = self.features(batch.pictures)
            batch.pictures = features if frozen else batch.pictures
        if self.self_critical:
            decoder = self.model.decoder
            batch.tokens, batch.row_weights, figures = self.self_critical(decoder, features, indices, self.generator)
            batch.reward = figures["reward"] * len(batch.tokens)
        elif config.scheduled_sampling:
            probability = config.scheduled_sampling * self.steps_done / (config.epochs * self.steps)
            tokens = batch.tokens.to(self.device)
            batch.inputs = mix_tokens(self.model.decoder, features, tokens, probability, self.generator)[:, :-1]
        return batch

    @torch.no_grad()
    def features(self, pictures: Tensor) -> Tensor:
        """images uint8 [B,3,S,S], or their features from a cache -> features [B,P,D], as in evaluation."""
        if pictures.is_floating_point():
            return pictures.float()
        encoder = self.model.encoder.eval()
        with self.autocast():
            features = encoder(pictures)
        encoder.train(self.model.training)
        return features

    def autocast(self) -> torch.autocast:
        precision = self.config.precision
        return torch.autocast(self.device.type, DTYPES[precision], enabled=precision != "float32")

    def train_step(self, losses: nn.Module, step_batches: Sequence[Batch]) -> None:
        """One step of the optimizer: the loss is that of all its batches, and of all processes, together."""
        config = self.config
        words, rows = sum(batch.words for batch in step_batches), sum(batch.rows for batch in step_batches)
        words, rows = distributed.total([words, rows])
        if not rows:
            return
        factor = self.schedule.factor(self.steps_done)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        penalty = 0.0 if self.self_critical else config.attention_penalty
        self.optimizer.zero_grad(set_to_none=True)
        terms = []  # of each batch
        for number, batch in enumerate(step_batches, start=1):
            with distributed.gradients_stay(losses, number < len(step_batches)):
                with self.autocast():
                    found = losses(batch)
                loss = found["words"] / words + penalty * found["attention"] / rows
                self.scaler.scale(loss * distributed.size()).backward()  # the processes' gradients are averaged
            terms.append(torch.stack([found[name].detach() for name in TERMS]))
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.model.parameters(), config)
        sums = self.agree(step_batches, torch.stack(terms).tolist(), norm.item())
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not self.model:
            update_average(self.average, self.model, self.steps_done)
        self.words, self.rows = self.words + int(words), self.rows + int(rows)
        self.sums = {name: self.sums[name] + value for name, value in sums.items()}
        if distributed.is_main():
            rates = (group["lr"] for group in self.optimizer.param_groups)
            scalars = {
                "loss/words": sums["words"] / words,
                "loss/attention": sums["attention"] / rows,
                **dict(zip(("learning_rate/decoder", "learning_rate/encoder"), rates, strict=True)),
                "gradient_norm": norm,
                **({"reward": sums["reward"] / rows} if self.self_critical else {}),
            }
            self.watch.step(self.steps_done, scalars)

    def agree(self, step_batches: Sequence[Batch], terms: Sequence[Sequence[float]], norm: float) -> dict[str, float]:
        """The loss's terms, of each batch in this process -> their sums, and the rewards', over batches and processes.
        Raises UserError in all processes if one of them, or the gradients' norm, is no number: what comes of the step
        is not kept."""
        bad = [batch for batch, values in zip(step_batches, terms, strict=True) if not all(map(math.isfinite, values))]
        if not bad and not math.isfinite(norm) and not self.scaler.is_enabled():  # a scaler looks at them itself
            bad = step_batches
        rewards = sum(batch.reward for batch in step_batches)
        *sums, count = distributed.total([*map(sum, zip(*terms, strict=True)), rewards, len(bad)])
        if count:
            examples = self.splits["train"]
            names = distributed.gathered([examples[index].name for batch in bad for index in batch.indices])
            raise UserError(
                f"the loss or its gradient is no finite number in epoch {self.epoch + 1}, step {self.step + 1}, at the "
                f"images {', '.join(names)}; the last checkpoint, from before that, is kept; look at these images and "
                "their captions, or try a new run with a lower --learning-rate"
            )
        return dict(zip((*TERMS, "reward"), sums, strict=True))

    def validate(self) -> dict[str, float]:
        """Caption the validation images and score the captions, in rank 0; the other processes wait. Being asked to
        stop breaks it off, and the run goes on from here."""
        figures = None
        if distributed.is_main():
            with contextlib.suppress(Stopped), self.interruption.raised():
                scores, _ = evaluate(
                    [self.average], self.splits["val"], self.config, (), self.caches.get("val"), self.skipped_seen
                )
                figures = scores.corpus()
        figures = distributed.from_main(figures)
        if figures is None:
            raise Stopped(self.interruption.number or signal.SIGTERM)
        return figures

    def end_epoch(self, figures: dict[str, float]) -> None:
        """Log, keep the model if it is the best so far, write the checkpoint, and last draw, which is slow."""
        decoder, encoder = self.optimizer.param_groups
        rates = {
            "learning_rate": decoder["lr"],
            **({"encoder_learning_rate": encoder["lr"]} if encoder["params"] else {}),
        }
        self.rate({"epoch": self.epoch + 1, **self.means(), **rates, "seconds": round(self.seconds, 1), **figures})
        self.epoch, self.step = self.epoch + 1, 0
        self.start_sums()
        self.save_checkpoint()
        if distributed.is_main() and self.watch.wants_pictures and not self.interruption.number:
            self.watch.pictures(self.captioned())

    def rate(self, line: dict[str, float]) -> None:
        """Log the figures of an epoch, 0 before any, and keep the model if it is the best so far."""
        # Where the first figure cannot tell models apart (CIDEr is 0 for a single image), the next one decides.
        self.schedule.epoch_ended([line[name] for name in (self.config.best_by, "BLEU-4", "ROUGE-L")])
        if distributed.is_main():
            tqdm.write("  ".join(f"{name} {value:.4g}" for name, value in line.items()))
            if self.schedule.epochs_without_gain == 0:
                self.average.save_pretrained(self.output)
            self.watch.epoch(line)

    def captioned(self) -> list[tuple[Image.Image, Caption]]:
        """Four validation images with the captions that the model gives them now."""
        images = []
        for example in self.splits["val"]:
            with contextlib.suppress(UserError):
                images.append(example.image())
            if len(images) == 4:
                break
        captions = self.average.caption(images, self.config.search, suppressed=self.config.suppressed.split())
        return list(zip(images, captions, strict=True))

    def save_checkpoint(self) -> None:
        """Write the state of the run, in rank 0; every process has the same."""
        if not distributed.is_main():
            return
        state = {
            "model": self.model.state_dict(),
            "average": {} if self.average is self.model else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "images": len(self.splits["train"]),
            **{name: getattr(self, name) for name in PLACE},
        }
        checkpoint.save(self.output, state)

    def load_checkpoint(self) -> None:
        """Take the state that was written last. Raises UserError for a file that is damaged or does not fit."""
        state = distributed.from_main(checkpoint.load(self.output) if distributed.is_main() else None)
        try:
            if state["images"] != len(self.splits["train"]):
                raise ValueError(f"the data had {state['images']} training images, and has {len(self.splits['train'])}")
            for name in ("model", "optimizer", "schedule", "scaler"):
                getattr(self, name).load_state_dict(state[name])
            if self.average is not self.model:
                self.average.load_state_dict(state["average"])
            for name in PLACE:
                setattr(self, name, state[name])
        except (KeyError, ValueError, RuntimeError) as error:
            raise checkpoint.unusable(self.output, error) from error


def in_groups(items: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` items one after the other; the last one may be shorter."""
    items = iter(items)
    while group := list(islice(items, size)):
        yield group
