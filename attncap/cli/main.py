"""The console command `attncap`."""

import contextlib
import importlib
import io
import re
import sys

from attncap.cli import process
from attncap.errors import CallError
from attncap.files import write_atomically

COMMANDS = {
    "train": "Train a captioner on your photographs and their captions, or on the synthetic data set shapes.",
    "caption": "Write a caption for every image.",
    "evaluate": "Score a model on a data set, or captions in a file against references.",
    "data": "Describe a data set, or convert it to JSON Lines.",
    "info": "Show versions, devices, and which kernels are built.",
}
HELP = """usage: attncap [-h] [--version] COMMAND [OPTIONS]

Image captioning with soft attention.

commands:
{commands}

options:
  -h, --help  Show this help.
  --version   Show the version.

attncap COMMAND --help lists the options of a command. For shell completion in bash, zsh or fish:
  attncap --tyro-write-completion bash ~/.local/share/bash-completion/completions/attncap
"""
COMPLETION_FLAGS = ("--tyro-print-completion", "--tyro-write-completion")


def main() -> None:
    """Run `attncap COMMAND OPTIONS`. Only the commands that need torch import it, which takes seconds."""
    name, arguments = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    if name in COMMANDS and not (arguments and arguments[0] in COMPLETION_FLAGS):
        importlib.import_module(f"attncap.cli.{name}").run(f"attncap {name}", arguments)
    else:
        process.run(lambda: show(name, arguments))


def show(name: str, arguments: list[str]) -> None:
    """The help, the version or a script for a shell. Raises CallError for an unknown command."""
    if name in ("-h", "--help"):
        lines = [f"  {command:10}{text}" for command, text in COMMANDS.items()]
        print(HELP.format(commands="\n".join(lines)), end="")
    elif name == "--version":
        from attncap import __version__

        print(f"attncap {__version__}")
    elif name in COMPLETION_FLAGS:
        complete([name, *arguments])
    elif name in COMMANDS:
        complete(arguments)  # a shell has one script per program, so it covers all commands
    else:
        raise CallError(f"no command {name!r}; choose one of {', '.join(COMMANDS)}")


def complete(arguments: list[str]) -> None:
    """Print the script with which a shell completes the commands and their flags, or write it to a file:
    --tyro-print-completion SHELL, or --tyro-write-completion SHELL FILE."""
    flag, *values = arguments
    if values[:1] not in (["bash"], ["zsh"], ["fish"]) or len(values) != 1 + (flag == "--tyro-write-completion"):
        raise CallError(
            "give --tyro-print-completion SHELL or --tyro-write-completion SHELL FILE; SHELL is bash, zsh or fish"
        )
    script = completion_script(values[0])
    if len(values) == 1:
        print(script)
    else:
        write_atomically(values[1], script)


def completion_script(shell: str) -> str:
    """tyro's script for the flags of all commands."""
    import tyro

    from attncap.cli import caption, data, evaluate, info, train

    configs = {
        "train": train.TrainConfig,
        "caption": caption.CaptionConfig,
        "evaluate": evaluate.EvaluateConfig,
        "data": data.DataConfig,
        "info": info.InfoConfig,
    }
    options = {"prog": "attncap", "config": (tyro.conf.OmitArgPrefixes,)}
    with contextlib.redirect_stdout(io.StringIO()) as script, contextlib.suppress(SystemExit):
        tyro.extras.subcommand_cli_from_dict(configs, args=["--tyro-print-completion", shell], **options)
    # The script would take line breaks within a help text for the ends of flags.
    return re.sub("^COMPLETION_SPEC = .*$", lambda spec: spec[0].replace(r"\n", " "), script.getvalue(), flags=re.M)


if __name__ == "__main__":
    main()
