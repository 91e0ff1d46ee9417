"""What the commands share: reading their flags, and ending with one clear line when something is wrong."""

import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

import tyro

from attncap.config import check_at_least
from attncap.errors import UserError
from attncap.search.config import SearchConfig

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
) -> None:
    """Run a command: read `arguments` into a dataclass, given as a class or as its defaults, and call `main` with it.

    Ends the process with status 0 (success), 1 (the work failed), 2 (the call was wrong) or 130 (interrupted). An error
    is one line on standard error; --debug adds the traceback.
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # the name of a file may not be valid text
    logging.basicConfig(format="attncap: %(message)s")
    default = {} if isinstance(config, type) else {"default": config}
    kind = config if isinstance(config, type) else type(config)
    try:
        # Flags of nested dataclasses are written without the names of those dataclasses.
        options = {"prog": prog, "description": description, "config": (tyro.conf.OmitArgPrefixes,)}
        parsed = tyro.cli(kind, args=arguments, **options, **default)
        from tqdm.contrib.logging import logging_redirect_tqdm  # --help does without

        with logging_redirect_tqdm():
            main(parsed)
        status = 0
    except KeyboardInterrupt:
        print("attncap: interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:  # the reader of the output has gone, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except Exception as error:  # whatever it is, the user gets one line
        if "--debug" in arguments:
            traceback.print_exc()
        if isinstance(error, UserError):
            message, status = str(error), error.status
        else:
            message, status = f"{type(error).__name__}: {error} (--debug shows where)", 1
        print(f"attncap: error: {message}", file=sys.stderr)
    sys.exit(status)
