"""The file from which a run continues, in the folder of the run."""

import dataclasses
from pathlib import Path

import torch

from attncap.errors import CallError, UserError
from attncap.files import atomic_path
from attncap.training.config import TrainConfig, flatten, read_settings

NAME = "checkpoint.pt"
# Settings that may change when a run is resumed.
FREE = (
    "data.path",
    "data.images",
    "run.recipe",
    "run.output",
    "run.epochs",
    "run.resume",
    "run.device",
    "run.workers",
    "run.debug",
)


def save(folder: Path, state: dict) -> None:
    """Write a state of tensors, numbers, strings, and lists and dicts of them. The previous file stays until the new
    one is complete and on the disk. Raises UserError."""
    with atomic_path(folder / NAME) as temporary:
        torch.save(state, temporary)


def load(folder: Path) -> dict:
    """What `save` wrote, on the CPU. Raises UserError for a file that is missing or damaged."""
    try:
        return torch.load(folder / NAME, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no single kind of error for a damaged file
        raise unusable(folder, error) from error


def unusable(folder: Path, error: Exception) -> UserError:
    """The error to raise for a checkpoint that cannot be used."""
    return UserError(f"{folder / NAME}: cannot continue from it: {' '.join(str(error).split())[:200]}")


def check_settings(config: TrainConfig, folder: Path) -> None:
    """Raises CallError unless the run in the folder can continue with these settings: all but a few must be the same as
    before."""
    try:
        before = read_settings(folder / "settings.json")
    except UserError as error:
        raise CallError(f"cannot resume: no run to continue in {folder} ({error})") from error
    now, default = (flatten(dataclasses.asdict(settings)) for settings in (config, TrainConfig()))
    before = default | before  # settings that are newer than the run had their default
    changed = [
        f"{name}={value} (was {before[name]})"
        for name, value in now.items()
        if name not in FREE and value != before[name]
    ]
    if changed:
        raise CallError(f"cannot resume: the run in {folder} began with other settings: {', '.join(changed)}")
