"""The console command `attncap`."""

import importlib
import sys

COMMANDS = {
    "train": "Train a captioner on your photographs and their captions, or on the synthetic data set shapes.",
    "caption": "Write a caption for every image.",
    "evaluate": "Score a model on a data set, or captions in a file against references.",
    "data": "Describe a data set, or convert it to JSON Lines.",
    "info": "Show versions, devices, and which kernels are built.",
}
HELP = f"""usage: attncap [-h] [--version] COMMAND [OPTIONS]

Image captioning with soft attention.

commands:
{"".join(f"  {name:10}{text}{chr(10)}" for name, text in COMMANDS.items())}
options:
  -h, --help  Show this help.
  --version   Show the version.

attncap COMMAND --help lists the options of a command. For shell completion in bash, zsh or fish:
  attncap --tyro-write-completion bash ~/.local/share/bash-completion/completions/attncap
"""
COMPLETION = ("--tyro-print-completion", "--tyro-write-completion")


def main() -> None:
    """Run `attncap COMMAND OPTIONS`. Importing torch, which takes seconds, is left to the commands that need it."""
    name, arguments = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    if name in ("-h", "--help"):
        print(HELP, end="")
    elif name == "--version":
        from attncap import __version__

        print(f"attncap {__version__}")
    elif name in COMPLETION:
        write_completion([name, *arguments])
    elif name not in COMMANDS:
        print(f"attncap: error: no command {name!r}; choose one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    elif arguments and arguments[0] in COMPLETION:
        write_completion(arguments)
    else:
        importlib.import_module(f"attncap.cli.{name}").run(f"attncap {name}", arguments)


def write_completion(arguments: list[str]) -> None:
    """Print or write the script with which a shell completes the commands and their flags, as tyro makes it. A shell has
    one such script per program, so it covers all commands. Ends the process."""
    import tyro

    configs = {name: importlib.import_module(f"attncap.cli.{name}").DEFAULTS for name in COMMANDS}
    tyro.extras.subcommand_cli_from_dict(configs, prog="attncap", args=arguments, config=(tyro.conf.OmitArgPrefixes,))


if __name__ == "__main__":
    main()
