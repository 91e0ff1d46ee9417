"""The file from which a run continues, in the folder of the run."""

import dataclasses
import logging
from pathlib import Path

import torch

from attncap.config import ModelConfig
from attncap.data.dataset import one_line
from attncap.errors import CallError, UserError
from attncap.files import atomic_file, read_json
from attncap.training.config import TrainConfig, flatten, read_settings
from attncap.versions import versions
from attncap.weights import read_pickle

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

log = logging.getLogger("attncap")


def save(folder: Path, state: dict) -> None:
    """Write a state of tensors, numbers, strings, and lists and dicts of them. The previous file stays until the new
    one is complete and on the disk. Raises UserError."""
    with atomic_file(folder / NAME) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch's error about the file replaces that of the file, such as a full disk
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


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


def check_settings(config: TrainConfig, folder: Path) -> TrainConfig:
    """The settings to continue the run in the folder with: those given, and the sizes of the model that the run itself
    started from. Warns about versions of packages that have changed. Raises CallError unless all but a few settings are
    the same as before."""
    try:
        before = read_settings(folder / "settings.json")
    except UserError as error:
        raise CallError(f"cannot resume: no run to continue in {folder} ({error})") from error
    before = flatten(dataclasses.asdict(TrainConfig())) | before  # settings that did not exist then had their defaults
    if config.run.start_from:
        sizes = {field.name: before[f"model.{field.name}"] for field in dataclasses.fields(ModelConfig)}
        config = dataclasses.replace(config, model=ModelConfig(**sizes))
    changed = [
        f"{name}={value} (was {one_line(before[name])[:80]})"
        for name, value in flatten(dataclasses.asdict(config)).items()
        if name not in FREE and value != before[name]
    ]
    if changed:
        raise CallError(f"cannot resume: the run in {folder} began with other settings: {', '.join(changed)}")
    began, now = read_json(folder / "settings.json").get("versions"), versions()
    began = began if isinstance(began, dict) else {}
    others = [f"{name} {began[name]}" for name in now if began.get(name, now[name]) != now[name]]
    if others:
        log.warning("%s: began with other versions, so results may differ: %s", folder, ", ".join(others))
    return config
