"""Training: steps, epochs, validation, and the state from which a run continues, however it ended."""

import contextlib
import copy
import dataclasses
import functools
import logging
import math
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from attncap.captioner import Caption, Captioner
from attncap.data import Skipped, Splits, report_skipped
from attncap.data.feature_cache import FeatureCache
from attncap.data.loader import AugmentedPictures, Pictures, batches, draw_batches, draw_rows, pad, seed_of
from attncap.data.vocabulary import Vocabulary
from attncap.devices import find_workers
from attncap.errors import UserError
from attncap.evaluation import evaluate
from attncap.files import FolderLock
from attncap.ops.library import to_device
from attncap.training import checkpoint, distributed
from attncap.training.config import TrainConfig
from attncap.training.optimization import Schedule, clip_gradients, make_optimizer, update_average
from attncap.training.run_logger import RunLogger
from attncap.training.scheduled_sampling import sample_inputs
from attncap.training.self_critical import SelfCritical
from attncap.training.signals import SignalHandler, Stopped
from attncap.weights import conform

CHECKPOINT_EVERY = 600  # seconds, within an epoch
MAX_UNREADABLE = 100  # images in a row that cannot be read; with more, their folder has probably been removed
TERMS = ("words", "attention")  # of the loss
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

log = logging.getLogger("attncap")


@dataclass
class Batch:
    """A process's share of a batch, on the process's device. If none of its images can be read, `indices` is empty and
    the rest is None."""

    indices: Sequence[int]  # of the examples
    images: Tensor | None = None  # uint8 [B,3,S,S]; if the encoder is frozen, their features [B,P,D]
    tokens: Tensor | None = None  # int64 [N,T], the words that are fed
    targets: Tensor | None = None  # int64 [N,T], the words that follow; on the CPU, except in self-critical training
    row_weights: Tensor | None = None  # [N]
    reward: float = 0.0  # summed over rows

    @property
    def words(self) -> int:
        """The number of words to predict."""
        return 0 if self.targets is None else int((self.targets != Vocabulary.PAD).sum())

    @property
    def rows(self) -> int:
        """The number of captions."""
        return 0 if self.targets is None else len(self.targets)


class Trainer:
    """One run: a model, its data, and the folder its files go to.

    `epoch` and `step` are its position: the number of complete epochs, and of optimizer steps in the current one.
    Everything that is drawn at random (order, captions, augmentation, dropout, samples) depends only on the seed and
    the position, so a checkpoint needs no random generator states.

    Args:
        config: all settings.
        model: on the device it is trained on; the trainer changes it.
        splits: examples under "train" and "val".
        output: the run's folder.
        lock: that of the folder; None in the processes that do not write there.
    """

    def __init__(self, config: TrainConfig, model: Captioner, splits: Splits, output: Path, lock: FolderLock | None):
        self.config, self.model, self.splits, self.output, self.lock = config, model, splits, output, lock
        self.device, self.workers = model.device, find_workers(config.run.workers, model.device)
        self.optimizer = make_optimizer(config, model)
        # The model that is validated and kept.
        self.average = copy.deepcopy(model).eval() if config.run.average_weights else model
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.run.precision == "float16")
        self.caches: dict[str, FeatureCache] = {}  # features by split
        batches_per_step = config.optimizer.accumulate
        self.steps = math.ceil(len(splits["train"]) / (config.data.batch_size * batches_per_step))  # per epoch
        self.schedule = Schedule(config.schedule, config.run.epochs, self.steps)
        captions = [example.captions for example in splits["train"]]
        max_length = config.search.max_length
        self.self_critical, self.captions_per_image = None, config.data.captions_per_image
        self.tokens_by_image: list[list[list[int]]] = []
        if config.objective.name == "scst":
            self.captions_per_image = config.objective.samples
            self.self_critical = SelfCritical(model.vocabulary, captions, self.captions_per_image, max_length)
        else:  # encoded once: encoding them in every epoch would take longer than training on them takes on a GPU
            encode = functools.partial(model.vocabulary.encode, max_length=max_length)
            self.tokens_by_image = [list(map(encode, of_image)) for of_image in captions]
        self.skipped_seen: set[tuple[str, str]] = set()  # images that have been reported
        self.unreadable = 0  # images in a row that could not be read
        self.signals = SignalHandler()
        self.epoch = self.step = 0
        self.start_sums()

    def cache_features(self) -> None:
        """Find the images' features in the cache, or compute them with the encoder's current weights (for a resumed
        run, those of its checkpoint). Raises UserError, see `FeatureCache.of`."""
        encoder, size = self.model.encoder, self.model.config.image_size
        with distributed.main_first():
            for split in ("train", "val"):
                self.caches[split] = FeatureCache.of(
                    self.splits[split], encoder, size, self.config.data.batch_size, self.workers
                )

    def start_sums(self) -> None:
        """Reset what is logged for an epoch: sums over its words and captions, and the time."""
        self.sums = dict.fromkeys((*TERMS, "reward"), 0.0)
        self.words, self.rows, self.seconds = 0, 0, 0.0

    def means(self) -> dict[str, float]:
        """The terms of the loss in this epoch so far, per word or per caption, and the mean reward."""
        words, rows = max(1, self.words), max(1, self.rows)
        means = {"loss_words": self.sums["words"] / words, "loss_attention": self.sums["attention"] / rows}
        if self.self_critical:
            means["reward"] = self.sums["reward"] / rows
        return means

    @property
    def steps_done(self) -> int:
        """Steps of the optimizer in the whole run."""
        return self.epoch * self.steps + self.step

    def fit(self) -> None:
        """Train for the rest of the run. Raises Stopped after Ctrl-C or SIGTERM, once a checkpoint has been written,
        and UserError when the loss is not finite or no image can be read."""
        if distributed.is_main():
            self.logger = RunLogger(self.output, self.config.run.best_by, self.epoch, self.steps_done)
            if self.schedule.best is not None and not self.has_model:
                log.warning("%s: the best model is missing; that of the last checkpoint takes its place", self.output)
                self.average.save_pretrained(self.output)
        try:
            if self.config.run.start_from and self.schedule.best is None:  # the model that epochs are compared with
                self.record_epoch({"epoch": 0, **self.validate()})
                self.save_checkpoint()
            while self.epoch < self.config.run.epochs and not self.schedule.should_stop:
                self.train_epoch()
                self.end_epoch(self.validate())
        except Stopped:
            self.save_checkpoint()
            if distributed.is_main() and not self.has_model:
                self.average.save_pretrained(self.output)
            raise
        finally:
            if distributed.is_main():
                self.logger.close()

    @property
    def has_model(self) -> bool:
        """Whether the run's folder has a model yet."""
        return (self.output / "model.safetensors").exists()

    def train_epoch(self) -> None:
        """Take the remaining steps of an epoch."""
        config, examples, seed = self.config, self.splits["train"], self.config.run.seed
        fine_tune = self.epoch >= config.encoder.fine_tune_after
        self.model.encoder.fine_tune(config.encoder.fine_tune_from if fine_tune else "none")
        # Samples must come from exactly the model that learns from them: no dropout, no batch statistics.
        self.model.train(self.self_critical is None)
        model = distributed.data_parallel(self.model)
        batches_per_step = config.optimizer.accumulate
        order = draw_batches(len(examples), config.data.batch_size, seed, self.epoch)[self.step * batches_per_step :]
        shares = [batch[distributed.rank() :: distributed.size()] for batch in order]
        saved = before = time.monotonic()
        with tqdm(
            total=len(examples) * self.captions_per_image,
            initial=self.rows,
            desc=f"epoch {self.epoch + 1}/{config.run.epochs}",
            unit="caption",
            leave=False,
            disable=not distributed.is_main(),
        ) as bar:
            pin = self.device.type == "cuda"
            # Only the loop holds a reference to the iterator, so the workers end with the loop, however it ends.
            for group in in_groups(
                batches(self.pictures(), config.data.batch_size, self.workers, shares, pin=pin), batches_per_step
            ):
                torch.manual_seed(seed_of("step", seed, self.steps_done, distributed.rank()))  # for dropout
                self.train_step(model, [self.prepare(*batch) for batch in group])
                self.step += 1
                now = time.monotonic()
                self.seconds, before = self.seconds + now - before, now
                if sum(distributed.all_reduce_sum([self.signals.signum])):  # a signal to any process stops all
                    raise Stopped(self.signals.signum or signal.SIGTERM)
                bar.update(self.rows - bar.n)  # after the check: without a terminal (SIGHUP), it may fail
                bar.set_postfix({name.removeprefix("loss_"): f"{mean:.3f}" for name, mean in self.means().items()})
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
        if self.config.data.augment:
            return AugmentedPictures(examples, size, self.config.run.seed, self.epoch)
        return Pictures(examples, size)

    def prepare(self, indices: Sequence[int], images: Tensor | None, skipped: Sequence[Skipped]) -> Batch:
        """A batch from the loader -> a batch on the device, with captions, and with features instead of images unless
        gradients flow through the encoder."""
        config, objective = self.config, self.config.objective
        report_skipped(skipped, self.skipped_seen)
        if images is None:
            return Batch([])
        images = images.to(self.device, non_blocking=True)
        is_frozen = not any(parameter.requires_grad for parameter in self.model.encoder.parameters())
        sample_seed = seed_of("samples", config.run.seed, self.steps_done)  # the same for an image in any process
        if self.self_critical:
            features = self.features(images)
            decoder = self.model.decoder.for_inference(table=False)
            tokens, row_weights, metrics = self.self_critical(decoder, features, indices, sample_seed)
            images, reward = features if is_frozen else images, metrics["reward"] * len(tokens)
            return Batch(indices, images, tokens[:, :-1], tokens[:, 1:], row_weights.to(self.device), reward)

        count, seed = self.captions_per_image, config.run.seed
        captions = [
            draw_rows(self.tokens_by_image[index], count, seed_of("captions", seed, self.epoch, index))
            for index in indices
        ]
        # The decoder sorts images by their longest caption, longest first; sorting is cheaper here, before the features
        # exist.
        order = sorted(range(len(indices)), key=lambda i: -max(map(len, captions[i])))
        [image_order] = to_device(self.device, torch.tensor(order, device="cpu"))
        indices, images = [indices[i] for i in order], images[image_order]
        tokens = pad([row for i in order for row in captions[i]])
        tokens, targets = tokens[:, :-1], tokens[:, 1:]
        if is_frozen or objective.scheduled_sampling:
            features = self.features(images)
            images = features if is_frozen else images
        if objective.scheduled_sampling:
            decoder = self.model.decoder.for_inference(table=False)
            probability = objective.scheduled_sampling * self.steps_done / (config.run.epochs * self.steps)
            seeds = [(sample_seed, index) for index in indices]
            tokens = sample_inputs(decoder, features, tokens.to(self.device), probability, seeds)
        return Batch(indices, images, tokens, targets)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Images uint8 [B,3,S,S], or their features from a cache -> features [B,P,D], as in evaluation."""
        if images.is_floating_point():
            return images.float()
        encoder = self.model.encoder.eval()
        with self.autocast():
            features = encoder(images)
        encoder.train(self.model.training)
        return features

    def autocast(self) -> torch.autocast:
        """The context in which models compute in the run's precision."""
        precision = self.config.run.precision
        return torch.autocast(self.device.type, DTYPES[precision], enabled=precision != "float32")

    def train_step(self, model: nn.Module, step_batches: Sequence[Batch]) -> None:
        """One step of the optimizer. Its loss is that of all batches of the step in all processes together."""
        words, rows = sum(batch.words for batch in step_batches), sum(batch.rows for batch in step_batches)
        words, rows = distributed.all_reduce_sum([words, rows])
        self.unreadable = 0 if rows else self.unreadable + len(step_batches) * self.config.data.batch_size
        if self.unreadable > MAX_UNREADABLE:
            raise UserError(f"none of the last {self.unreadable} training images could be read; are they still there?")
        if not rows:
            return
        factor = self.schedule.factor(self.steps_done)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        objective = self.config.objective
        label_smoothing = 0.0 if self.self_critical else objective.label_smoothing
        penalty = 0.0 if self.self_critical else objective.attention_penalty
        self.optimizer.zero_grad(set_to_none=True)
        terms = []  # of each batch
        for number, batch in enumerate(step_batches, start=1):
            is_last = number == len(step_batches)
            with contextlib.nullcontext() if is_last else distributed.no_sync(model):
                with self.autocast():
                    losses = model(
                        batch.images,
                        batch.tokens,
                        batch.targets,
                        label_smoothing=label_smoothing,
                        row_weights=batch.row_weights,
                        losses_only=True,
                    )
                loss = losses.words / words + penalty * losses.attention / rows
                # The gradients are averaged over the processes, but should be summed.
                self.scaler.scale(loss * distributed.size()).backward()
            terms.append(torch.stack(losses).detach())
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.model.parameters(), self.config.optimizer)
        sums = self.sum_terms(step_batches, torch.stack(terms).tolist(), norm.item())
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not self.model:
            update_average(self.average, self.model, self.steps_done)
        self.words, self.rows = self.words + int(words), self.rows + int(rows)
        self.sums = {name: self.sums[name] + value for name, value in sums.items()}
        if distributed.is_main():
            decoder, encoder = self.optimizer.param_groups
            scalars = {
                "loss/words": sums["words"] / words,
                "loss/attention": sums["attention"] / rows,
                "learning_rate/decoder": decoder["lr"],
                "learning_rate/encoder": encoder["lr"],
                "gradient_norm": norm,
            }
            if self.self_critical:
                scalars["reward"] = sums["reward"] / rows
            self.logger.log_step(self.steps_done, scalars)

    def sum_terms(
        self, step_batches: Sequence[Batch], terms: Sequence[Sequence[float]], norm: float
    ) -> dict[str, float]:
        """The terms of the loss for each batch of this process -> their sums over batches and processes, and the sum of
        the rewards.

        Raises UserError in all processes if one of the terms, or the norm of the gradients, is not finite. The caller
        then discards this step.
        """
        bad = [batch for batch, values in zip(step_batches, terms, strict=True) if not all(map(math.isfinite, values))]
        if not bad and not math.isfinite(norm) and not self.scaler.is_enabled():  # a scaler checks the gradients itself
            bad = step_batches
        sums = [sum(values) for values in zip(*terms, strict=True)]
        sums.append(sum(batch.reward for batch in step_batches))
        *sums, bad_batches = distributed.all_reduce_sum([*sums, len(bad)])
        if bad_batches:
            examples = self.splits["train"]
            names = distributed.all_gather([examples[index].name for batch in bad for index in batch.indices])
            raise UserError(
                f"the loss or its gradient is not finite in epoch {self.epoch + 1}, step {self.step + 1}, for the "
                f"images {', '.join(names)}; the last checkpoint, from before this step, is kept; check these images "
                "and their captions, or try a new run with a lower learning rate"
            )
        return dict(zip((*TERMS, "reward"), sums, strict=True))

    def validate(self) -> dict[str, float]:
        """Caption the validation images and score the captions in rank 0, while the other processes wait. A signal
        interrupts this, and a resumed run then starts with it."""
        metrics = None
        if distributed.is_main():
            with contextlib.suppress(Stopped), self.signals.raising():
                metrics = self.validation_metrics()
        metrics = distributed.broadcast(metrics)
        if metrics is None:
            raise Stopped(self.signals.signum or signal.SIGTERM)
        return metrics

    def validation_metrics(self) -> dict[str, float]:
        """The metrics of the model's captions of the validation images."""
        self.average.eval()
        self.average.refresh()  # its weights have changed in place
        self.optimizer.zero_grad(set_to_none=True)  # with gradients a model would prepare its decoder for every batch
        with tqdm(total=len(self.splits["val"]), desc="captioning", unit="image", leave=False) as bar:
            scores, _ = evaluate(
                self.average,
                self.splits["val"],
                self.config.search,
                batch_size=self.config.data.batch_size,
                workers=self.workers,
                features=self.caches.get("val"),
                progress=bar.update,
                skip=functools.partial(report_skipped, seen=self.skipped_seen),
            )
        return scores.corpus()

    def end_epoch(self, metrics: dict[str, float]) -> None:
        """Log the epoch, keep the model if it is the best so far, write the checkpoint, and draw captions last, because
        that is slow."""
        decoder, encoder = self.optimizer.param_groups
        rates = {"learning_rate": decoder["lr"]}
        if encoder["params"]:
            rates["encoder_learning_rate"] = encoder["lr"]
        self.record_epoch(
            {"epoch": self.epoch + 1, **self.means(), **rates, "seconds": round(self.seconds, 1), **metrics}
        )
        self.epoch, self.step = self.epoch + 1, 0
        self.start_sums()
        self.save_checkpoint()
        if distributed.is_main() and self.logger.wants_captions and not self.signals.signum:
            self.logger.log_captions(self.captioned_examples())

    def record_epoch(self, line: dict[str, float]) -> None:
        """Log an epoch (epoch 0 is the state before the first one), and keep the model if it is the best so far."""
        # If the first metric cannot distinguish models (CIDEr is 0 for a single image), the next one decides.
        self.schedule.epoch_ended([line[name] for name in (self.config.run.best_by, "BLEU-4", "ROUGE-L")])
        if distributed.is_main():
            tqdm.write("  ".join(f"{name} {value:.4g}" for name, value in line.items()))
            self.lock.check()
            if self.schedule.epochs_without_gain == 0:
                self.average.save_pretrained(self.output)
            self.logger.log_epoch(line)

    def captioned_examples(self) -> list[tuple[Image.Image, Caption]]:
        """Four validation images with the captions that the model currently gives them."""
        images = []
        for example in self.splits["val"]:
            with contextlib.suppress(UserError):
                images.append(example.image())
            if len(images) == 4:
                break
        captions = self.average.caption(images, dataclasses.replace(self.config.search, n_best=1))
        return list(zip(images, captions, strict=True))

    def save_checkpoint(self) -> None:
        """Write the state of the run, in rank 0; it is the same in every process."""
        if distributed.is_main():
            self.lock.check()
            checkpoint.save(self.output, self.state_dict())

    def state_dict(self) -> dict:
        """The state of the run."""
        return {
            "model": self.model.state_dict(),
            "average": {} if self.average is self.model else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "images": len(self.splits["train"]),
            "epoch": self.epoch,
            "step": self.step,
            "sums": self.sums,
            "words": self.words,
            "rows": self.rows,
            "seconds": self.seconds,
        }

    def load_checkpoint(self) -> None:
        """Restore the last state that was written. Raises UserError for a file that is damaged or does not fit."""
        own = self.state_dict()
        # Adam's state of each parameter. In the groups, only the learning rates change; the other entries depend on the
        # version of torch.
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        moments = {i: {"step": torch.zeros(()), "exp_avg": p, "exp_avg_sq": p} for i, p in enumerate(parameters)}
        groups = own["optimizer"]["param_groups"]
        own["optimizer"] = {"state": moments, "param_groups": [{"lr": 0.0} for _ in groups]}
        try:
            state = conform(checkpoint.load(self.output), own) if distributed.is_main() else None
            state = distributed.broadcast(state)
            if state["images"] != len(self.splits["train"]):
                raise ValueError(f"the data had {state['images']} training images, now {len(self.splits['train'])}")
            if state["step"] > self.steps:
                raise ValueError(f"step={state['step']} is out of range")
            self.schedule.load_state_dict(state["schedule"])
        except ValueError as error:
            raise checkpoint.unusable(self.output, error) from error
        self.model.load_state_dict(state["model"])
        if self.average is not self.model:
            self.average.load_state_dict(state["average"])
        rates = state["optimizer"]["param_groups"]
        groups = [{**group, **rate} for group, rate in zip(groups, rates, strict=True)]
        self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step, self.sums = state["epoch"], state["step"], state["sums"]
        self.words, self.rows, self.seconds = state["words"], state["rows"], state["seconds"]


def in_groups(items: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` consecutive items; the last one may be shorter."""
    items = iter(items)
    while group := list(islice(items, size)):
        yield group
