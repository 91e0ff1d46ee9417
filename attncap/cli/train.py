"""Train a captioner on your photographs and their captions, or on the synthetic data set shapes.

After each epoch the model captions the validation images freely (no teacher forcing), and is kept if it is the best so
far; at the end, the best model captions the test images. Ctrl-C and SIGTERM stop a run after the current step, and
--resume continues it. To share every batch among several GPUs: torchrun --nproc-per-node 8 -m attncap.train ...
"""

import argparse
import functools
import os
import shlex
import sys
from collections.abc import Mapping, Sequence

from attncap.cli import command, process
from attncap.errors import UserError
from attncap.training import recipes
from attncap.training.config import TrainConfig, setting_paths


def run(prog: str, arguments: Sequence[str]) -> None:
    command.run(functools.partial(main, prog, arguments), defaults(arguments), __doc__, prog, arguments)


def defaults(arguments: Sequence[str]) -> TrainConfig:
    """The settings of the requested recipe, which the flags then change."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--data", nargs="?", default="shapes")  # a missing value is reported when the flags are read
    early.add_argument("--recipe", nargs="?")
    chosen = early.parse_known_args(arguments)[0]
    name = chosen.recipe or ("shapes" if chosen.data == "shapes" else "flickr8k")
    # A name that is not a recipe is refused later, when the flags are read.
    return recipes.load(name) if name in recipes.NAMES else TrainConfig()


def main(prog: str, arguments: Sequence[str], config: TrainConfig) -> None:
    from attncap.training import distributed
    from attncap.training.run import ResumableError, train
    from attncap.training.signals import Stopped

    process.make_output_optional()
    with distributed.process_group(config.run.device) as device:
        try:
            train(config, device, given_settings(arguments))
        except Stopped:
            if distributed.is_main():
                command_line = resume_command(prog, arguments, os.environ)
                print(f"\nattncap: stopped; continue with: {command_line}", file=sys.stderr, flush=True)
            raise
        except ResumableError as error:
            command_line = resume_command(prog, arguments, os.environ)
            raise UserError(f"{error}; continue with: {command_line}") from error


def given_settings(arguments: Sequence[str]) -> set[str]:
    """The settings named by flags, e.g. optimizer.learning_rate, including those that only repeat the recipe."""
    paths = setting_paths()
    flags = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
    names = [flag.removeprefix("--").replace("-", "_") for flag in flags]
    return {paths[name] for name in names if name in paths}


def resume_command(prog: str, arguments: Sequence[str], environment: Mapping[str, str]) -> str:
    """The command that continues the run of this process."""
    if "RANK" in environment:
        here = int(environment["LOCAL_WORLD_SIZE"])
        machines = int(environment["WORLD_SIZE"]) // here
        launcher = f"torchrun --nproc-per-node {here}"
        if machines > 1:
            launcher = f"torchrun --nnodes {machines} --nproc-per-node {here} ..."
        prog = f"{launcher} -m attncap.train"
    kept = [argument for argument in arguments if argument != "--resume"]
    return f"{prog} {shlex.join([*kept, '--resume'])}"
