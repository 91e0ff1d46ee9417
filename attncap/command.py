"""What the commands share: reading their flags, and ending with one clear line when something is wrong."""

import dataclasses
import logging
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeVar

import torch
import tyro
from tqdm.contrib.logging import logging_redirect_tqdm

from attncap.errors import CallError, UserError
from attncap.search import SearchConfig

Config = TypeVar("Config")


@dataclass(kw_only=True)
class CaptioningConfig:
    """The flags of every command that captions images."""

    search: Annotated[SearchConfig, tyro.conf.arg(name="")] = field(default_factory=SearchConfig)
    suppressed: str = "<unk>"
    """Words that no caption has, separated by spaces; of a model of subwords, pieces as in its vocabulary.json."""
    batch_size: int = 32
    """Images that go through the model together."""
    workers: int | None = None
    """Processes that read images, 0 for none beside the main one; by default 0 on a CPU, and on a GPU one a core, at
    most 8."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU where there is one."""
    implementation: Literal["native", "torch"] = "native"
    """The project's own kernels, or plain PyTorch."""
    debug: bool = False
    """Show the traceback of an error."""


def run(name: str, main: Callable[[Config], None], config: type[Config] | Config, description: str) -> None:
    """Run `python -m attncap.NAME`: read the flags into a dataclass, given as a class or as its defaults, and call
    `main` with it.

    Exit status 0, 1 (the work failed), 2 (the call was wrong), 130 (interrupted). Errors are one line on standard
    error; the traceback comes only with --debug.
    """
    options = {"prog": f"python -m attncap.{name}", "description": description}
    if not isinstance(config, type):
        options["default"], config = config, type(config)
    config = tyro.cli(config, **options)
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be no valid text
    logging.basicConfig(format="attncap: %(message)s")
    try:
        check_numbers(config)
        with logging_redirect_tqdm():
            main(config)
        status = 0
    except KeyboardInterrupt:
        print("attncap: interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:  # the reader of our output has gone, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except Exception as error:  # the last resort of a command: whatever it is, one line
        if config.debug:
            traceback.print_exc()
        known = isinstance(error, UserError)
        message = str(error) if known else f"{type(error).__name__}: {error} (--debug shows where)"
        print(f"attncap: error: {message}", file=sys.stderr)
        status = error.status if known else 1
    sys.exit(status)


def check_numbers(config: object) -> None:
    """Raises CallError for a number outside what its flag allows: from 1 on for whole numbers, from 0 on for the others
    and for those that may count nothing, below 1 for shares."""
    for setting in dataclasses.fields(config):
        value, least = getattr(config, setting.name), 0
        if isinstance(value, SearchConfig):
            value.check()
        elif dataclasses.is_dataclass(value):
            check_numbers(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            may_be_0 = ("seed", "workers", "patience", "fine_tune_after", "subwords")
            if isinstance(value, int) and setting.name not in may_be_0:
                least = 1
            if not value >= least:
                raise CallError(f"--{setting.name.replace('_', '-')} {value}: must be at least {least}")
            if setting.name in ("dropout", "label_smoothing") and value >= 1:
                raise CallError(f"--{setting.name.replace('_', '-')} {value}: must be below 1")


def find_device(name: str) -> torch.device:
    """ "auto" (CUDA where there is one), or any name torch knows. Raises CallError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise CallError(f"--device {name}: {str(error).splitlines()[0]}") from error


def find_workers(workers: int | None, device: torch.device) -> int:
    """The number given, or by default: none beside a CPU that is busy with the model (its threads would wait for the
    workers at every step), and beside a GPU a process for each core, at most 8."""
    if workers is None:
        return 0 if device.type == "cpu" else min(8, os.cpu_count() or 1)
    return workers
