"""What the commands share: how they read their flags, and the flags of those that caption."""

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NoReturn, TypeVar

import tyro

from attncap.cli import process
from attncap.config import check_at_least
from attncap.search.config import SearchConfig

MIN_COLUMNS = 40  # of a terminal; in a very narrow one, tyro never finishes --help

Config = TypeVar("Config")


@dataclass(kw_only=True)
class CaptioningConfig:
    """The flags of every command that captions images with a trained model."""

    batch_size: int = 32
    """Number of images that go through the model together."""
    workers: int | None = None
    """Number of processes that read images; 0 reads them in the main process.
    By default, 0 if the model runs on a CPU, or one per CPU core, at most 8, if it runs on a GPU."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto uses a GPU if there is one."""
    # tyro lists aliases before the name, so this shows --backend first.
    backend: Annotated[Literal["native", "torch"], tyro.conf.arg(name="implementation", aliases=("--backend",))] = (
        "native"
    )
    """native: this project's own kernels. torch: plain PyTorch."""
    debug: bool = False
    """Show the traceback of an error."""
    search: SearchConfig = SearchConfig()

    def __post_init__(self) -> None:
        check_at_least(self, 1, "batch_size")
        if self.workers is not None:
            check_at_least(self, 0, "workers")


def run(
    main: Callable[[Config], None],
    config: type[Config] | Config,
    description: str,
    prog: str,
    arguments: Sequence[str],
) -> NoReturn:
    """Run a command: read `arguments` into a dataclass, given as a class or as its defaults, and call `main` with it.

    Ends the process, see `process.run`; --debug adds the traceback of an error.
    """

    def work() -> None:
        # Flags of nested dataclasses are written without the names of those dataclasses.
        options = {"prog": prog, "description": description, "config": (tyro.conf.OmitArgPrefixes,)}
        default = {} if isinstance(config, type) else {"default": config}
        kind = config if isinstance(config, type) else type(config)
        parsed = tyro.cli(kind, args=arguments, **options, **default)
        from tqdm.contrib.logging import logging_redirect_tqdm  # --help does without

        sys.stdout.escaped = True  # tyro's own output has colours
        with logging_redirect_tqdm():
            main(parsed)

    if shutil.get_terminal_size().columns < MIN_COLUMNS:
        os.environ["COLUMNS"] = str(MIN_COLUMNS)
    process.run(work, debug="--debug" in arguments)
