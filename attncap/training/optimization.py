"""The optimizer and what steers it: learning rates, clipping, early stopping, the moving average of the weights."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from attncap.captioner import Captioner
from attncap.training.config import TrainConfig


def make_optimizer(config: TrainConfig, model: Captioner) -> torch.optim.Optimizer:
    """Adam (Kingma and Ba 2015) or AdamW (Loshchilov and Hutter 2019) in two groups, the decoder's parameters and those
    of the encoder that `fine_tune_from` names, each with its highest learning rate as "peak".

    The encoder's are left ready to be trained (`Encoder.fine_tune`). They are in the group however late their training
    begins, so that the state in a checkpoint always fits: parameters without gradients are passed over.

    Raises CallError when the encoder has no such layer.
    """
    model.encoder.fine_tune(config.fine_tune_from)
    encoder = [parameter for parameter in model.encoder.parameters() if parameter.requires_grad]
    groups = [
        {"params": list(model.decoder.parameters()), "lr": config.learning_rate, "peak": config.learning_rate},
        {"params": encoder, "lr": config.encoder_learning_rate, "peak": config.encoder_learning_rate},
    ]
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[config.optimizer]
    return kind(groups, weight_decay=config.weight_decay, fused=True)


class Schedule:
    """Learning rates over a run, and when it ends for want of gain.

    After a linear warm-up the rates fall to 0 along half a cosine (Loshchilov and Hutter 2017, equation 5), stay, or
    are lowered by `plateau_factor` each time that so many epochs in a row as `plateau_patience` brought no gain. A gain
    is a rating above all before it, by however little; the first is one.

    Args:
        steps_per_epoch: steps of the optimizer.
    """

    def __init__(self, config: TrainConfig, steps_per_epoch: int):
        self.config = config
        self.total = config.epochs * steps_per_epoch
        self.warmup = config.warmup * self.total  # steps
        self.best = None  # rating
        self.epochs_without_gain = 0
        self.lowered = 1.0  # by plateaus

    def factor(self, step: int) -> float:
        """Share of the highest learning rate in this step, counted from 0 over the whole run."""
        rise = min(1.0, (step + 1) / (self.warmup + 1))
        if self.config.schedule != "cosine":
            return rise * self.lowered
        done = max(0.0, (step - self.warmup) / (self.total - self.warmup))
        return rise * 0.5 * (1 + math.cos(math.pi * done))

    def epoch_ended(self, rating: float | list[float]) -> None:
        """`rating`: the higher the better; of lists the first figure that differs decides."""
        if self.best is None or rating > self.best:
            self.best, self.epochs_without_gain = rating, 0
            return
        self.epochs_without_gain += 1
        if self.config.schedule == "plateau" and self.epochs_without_gain % self.config.plateau_patience == 0:
            self.lowered *= self.config.plateau_factor

    @property
    def should_stop(self) -> bool:
        """Whether `patience` epochs in a row brought no gain."""
        return 0 < self.config.patience <= self.epochs_without_gain

    def state_dict(self) -> dict:
        """What a checkpoint keeps."""
        return {"best": self.best, "epochs_without_gain": self.epochs_without_gain, "lowered": self.lowered}

    def load_state_dict(self, state: dict) -> None:
        self.best, self.epochs_without_gain = state["best"], state["epochs_without_gain"]
        self.lowered = state["lowered"]


def clip_gradients(parameters: Iterable[nn.Parameter], config: TrainConfig) -> Tensor:
    """Scale the gradients down to the norm `clip_norm`, all of them together, then clamp each to +-`clip_value`; where
    one of the two is 0, it is left out. Returns the norm before that (float, no dimensions)."""
    parameters = list(parameters)
    norm = nn.utils.clip_grad_norm_(parameters, config.clip_norm or math.inf)
    if config.clip_value:
        nn.utils.clip_grad_value_(parameters, config.clip_value)
    return norm


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, step: int) -> None:
    """Exponential moving average of the weights, over a tenth of the steps so far and at most 200. Its aim is
    validation figures that jump less from one epoch to the next than those of the weights themselves.

    `average` is a copy of `model` from before the first step (counted from 0), to be called after each. Weights that
    are not trained are the same in both and passed over.
    """
    share = max(1 / 200, 1 / (1 + step / 10))
    pairs = [(a, p) for a, p in zip(average.parameters(), model.parameters(), strict=True) if p.requires_grad]
    pairs += zip(average.buffers(), model.buffers(), strict=True)  # statistics of batch norms
    floats = [pair for pair in pairs if pair[0].is_floating_point()]
    torch._foreach_lerp_(*map(list, zip(*floats, strict=True)), share)
    for a, count in pairs:
        if not a.is_floating_point():
            a.copy_(count)
