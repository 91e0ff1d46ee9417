"""The file from which a run goes on, in the folder of the run."""

import dataclasses
import json
import os
import shlex
import sys
from pathlib import Path

import torch

from attncap.errors import CallError, UserError
from attncap.files import atomic_path
from attncap.training.config import TrainConfig

NAME = "checkpoint.pt"


def save(folder: Path, state: dict) -> None:
    """Write a state of tensors, numbers, strings, lists and dicts of them. The file before it stays until the new one
    is whole and on the disk. Raises UserError."""
    with atomic_path(folder / NAME) as temporary:
        torch.save(state, temporary)


def load(folder: Path) -> dict:
    """What `save` wrote, on the CPU. Raises UserError for a file that is missing or damaged."""
    try:
        return torch.load(folder / NAME, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no one kind of error for a file that is damaged
        raise unusable(folder, error) from error


def unusable(folder: Path, error: Exception) -> UserError:
    """The error that tells of a checkpoint why it cannot be used."""
    return UserError(f"{folder / NAME}: cannot go on from it: {' '.join(str(error).split())[:200]}")


def check_settings(config: TrainConfig, folder: Path) -> None:
    """Raises CallError unless the run in the folder can go on with these settings: all but a few must be as they
    were."""
    path = folder / "settings.json"
    try:
        before = json.loads(path.read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError) as error:
        raise CallError(f"--resume: no run to go on with in {folder} ({path}: {error}); train without it") from error
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    free = {"data", "recipe", "output", "epochs", "resume", "device", "workers", "debug"}
    default = json.loads(json.dumps(dataclasses.asdict(TrainConfig())))  # for settings that came later than the run
    before, now, default = ({**x.pop("model"), **x.pop("search", {}), **x} for x in (before, now, default))
    changed = [
        f"--{name.replace('_', '-')} {value} (was {before.get(name)})"
        for name, value in now.items()
        if name not in free and value != before.get(name, default[name])
    ]
    if changed:
        raise CallError(f"--resume: the run in {folder} began with other settings: {', '.join(changed)}")


def how_to_go_on() -> str:
    """The command that goes on with the run of this process."""
    launcher = "python"
    if "RANK" in os.environ:
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        machines = int(os.environ["WORLD_SIZE"]) // here
        launcher = f"torchrun --nproc-per-node {here}"
        if machines > 1:
            launcher = f"torchrun --nnodes {machines} --nproc-per-node {here} ..."
    arguments = [argument for argument in sys.argv[1:] if argument != "--resume"]
    return f"{launcher} -m attncap.train {shlex.join([*arguments, '--resume'])}"
