"""The file from which a run continues, in the folder of the run."""

import dataclasses
from pathlib import Path

import torch

from attncap.errors import CallError, UserError
from attncap.files import atomic_path
from attncap.training.config import TrainConfig, flatten, read_settings
from attncap.weights import read_pickle

NAME = "checkpoint.pt"
# Settings that may change when a run is resumed.
FREE = ("data.path", "run.recipe", "run.output", "run.epochs", "run.resume", "run.device", "run.workers", "run.debug")


def save(folder: Path, state: dict) -> None:
    """Write a state of tensors, numbers, strings, and lists and dicts of them. The previous file stays until the new
    one is complete and on the disk. Raises UserError."""
    with atomic_path(folder / NAME) as temporary:
        torch.save(state, temporary)


def load(folder: Path) -> dict:
    """What `save` wrote, on the CPU, still to be compared with the run. Raises UserError for a file that is missing or
    damaged."""
    try:
        return read_pickle(folder / NAME)
    except ValueError as error:
        raise unusable(folder, error) from error


def unusable(folder: Path, error: ValueError) -> UserError:
    """The error to raise for a checkpoint that cannot be used."""
    return UserError(f"{folder / NAME}: cannot continue from it: {error}; start a new run in another folder")


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
        f"{name}={value} (was {_printable(before[name])})"
        for name, value in now.items()
        if name not in FREE and value != before[name]
    ]
    if changed:
        raise CallError(f"cannot resume: the run in {folder} began with other settings: {', '.join(changed)}")


def _printable(value: object) -> str:
    text = str(value)
    return (text if text.isprintable() else ascii(text))[:80]
