"""The optimizer and what controls it: learning rates, early stopping, clipping, the moving average of the weights."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from attncap.captioner import Captioner
from attncap.training.config import OptimizerConfig, ScheduleConfig, TrainConfig


def make_optimizer(config: TrainConfig, model: Captioner) -> torch.optim.Optimizer:
    """Adam (Kingma and Ba 2015) or AdamW (Loshchilov and Hutter 2019) with two groups: the decoder's parameters, and
    the encoder's from the layer `fine_tune_from` on. Each group has its highest learning rate as "peak".

    Leaves the encoder's layers ready to be trained (`Encoder.fine_tune`). They are in the group however late their
    training begins, so that the state in a checkpoint always fits; the optimizer skips parameters without gradients.

    Raises CallError when the encoder has no such layer.
    """
    model.encoder.fine_tune(config.encoder.fine_tune_from)
    encoder = [parameter for parameter in model.encoder.parameters() if parameter.requires_grad]
    decoder_rate, encoder_rate = config.optimizer.learning_rate, config.encoder.learning_rate
    groups = [
        {"params": list(model.decoder.parameters()), "lr": decoder_rate, "peak": decoder_rate},
        {"params": encoder, "lr": encoder_rate, "peak": encoder_rate},
    ]
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[config.optimizer.name]
    return kind(groups, weight_decay=config.optimizer.weight_decay, fused=True)


class Schedule:
    """Learning rates over a run, and early stopping.

    After a linear warm-up the rates fall to 0 along half a cosine (Loshchilov and Hutter 2017, equation 5), stay
    constant, or are multiplied by `plateau_factor` after every `plateau_patience` epochs in a row without improvement.
    An epoch is an improvement if its rating is above all earlier ones, by any amount; the first epoch is one.

    torch's ReduceLROnPlateau is not used because ratings here are several metrics, early stopping counts the same
    epochs, and it cannot be combined with a warm-up by SequentialLR.

    Args:
        config: which schedule.
        epochs: of the run.
        steps_per_epoch: steps of the optimizer.
    """

    def __init__(self, config: ScheduleConfig, epochs: int, steps_per_epoch: int):
        self.config = config
        self.total = epochs * steps_per_epoch
        self.warmup = config.warmup * self.total  # steps
        self.best = None  # rating
        self.epochs_without_gain = 0
        self.lowered = 1.0  # by plateaus

    def factor(self, step: int) -> float:
        """Factor of the peak learning rates in this step, which counts from 0 over the whole run."""
        rise = min(1.0, (step + 1) / (self.warmup + 1))
        if self.config.name != "cosine":
            return rise * self.lowered
        done = max(0.0, (step - self.warmup) / (self.total - self.warmup))
        return rise * 0.5 * (1 + math.cos(math.pi * done))

    def epoch_ended(self, rating: float | list[float]) -> None:
        """Count an epoch. `rating`: higher is better; of lists, the first value that differs decides."""
        if self.best is None or rating > self.best:
            self.best, self.epochs_without_gain = rating, 0
            return
        self.epochs_without_gain += 1
        if self.config.name == "plateau" and self.epochs_without_gain % self.config.plateau_patience == 0:
            self.lowered *= self.config.plateau_factor

    @property
    def should_stop(self) -> bool:
        """Whether the last `patience` epochs were all without improvement."""
        return 0 < self.config.patience <= self.epochs_without_gain

    def state_dict(self) -> dict:
        """What a checkpoint keeps."""
        return {"best": self.best, "epochs_without_gain": self.epochs_without_gain, "lowered": self.lowered}

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError for a factor that no schedule has."""
        if not 0 < state["lowered"] <= 1:
            raise ValueError(f"schedule.lowered={state['lowered']} is out of range")
        self.best, self.epochs_without_gain = state["best"], state["epochs_without_gain"]
        self.lowered = state["lowered"]


def clip_gradients(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> Tensor:
    """Scale the gradients down to the norm `clip_norm`, all of them together, then clamp each to +-`clip_value`. If one
    of the two is 0, that step is left out. Returns the norm before clipping, a float tensor without dimensions."""
    parameters = list(parameters)
    norm = nn.utils.clip_grad_norm_(parameters, config.clip_norm or math.inf)
    if config.clip_value:
        nn.utils.clip_grad_value_(parameters, config.clip_value)
    return norm


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, step: int) -> None:
    """Exponential moving average of the weights, over the last tenth of the steps so far, at most 200. Its validation
    metrics vary less from epoch to epoch than those of the weights themselves.

    Weights that are not trained are the same in both models and are skipped. torch's AveragedModel would average them
    too, at every step, which costs more than the rest of this function when the encoder is frozen; its averaging
    function is the one used here.

    Args:
        average: a copy of `model` from before its first step.
        model: the model after a step.
        step: the number of this step, from 0.
    """
    share = max(1 / 200, 1 / (1 + step / 10))
    pairs = [(a, p) for a, p in zip(average.parameters(), model.parameters(), strict=True) if p.requires_grad]
    pairs += zip(average.buffers(), model.buffers(), strict=True)  # statistics of batch norms
    floats = [(averaged, current) for averaged, current in pairs if averaged.is_floating_point()]
    averaged, current = (list(tensors) for tensors in zip(*floats, strict=True))
    get_ema_multi_avg_fn(1 - share)(averaged, current, None)
    for averaged, current in pairs:
        if not averaged.is_floating_point():
            averaged.copy_(current)
