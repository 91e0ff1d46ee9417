"""The console command: its help, its start-up, and shell completion."""

import re
import runpy
import subprocess
import sys

import pytest

from attncap.cli.main import COMMANDS, main

MODULES = {name: f"attncap.{name}" for name in COMMANDS}
# Runs a module and prints which of the slow packages it has imported.
IMPORTS = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
except SystemExit as ended:
    assert not ended.code, ended.code
print("imported:", sorted({"torch", "torchvision", "matplotlib", "tyro"} & sys.modules.keys()))
"""


def imports(*arguments: object) -> list[str]:
    """The slow packages that `python -m ARGUMENTS` imports."""
    command = [sys.executable, "-c", IMPORTS, *map(str, arguments)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    return re.findall(r"'(\w+)'", found.stdout.splitlines()[-1])


@pytest.fixture
def console(monkeypatch, capsys):
    """Runs `attncap ARGUMENTS` in this process: (exit status, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["attncap", *map(str, arguments)])
        try:
            main()
            status = 0
        except SystemExit as ended:
            status = ended.code or 0
        return status, *capsys.readouterr()

    return run


def test_help_lists_every_command_on_a_line(console):
    for arguments in ([], ["-h"], ["--help"]):
        status, out, err = console(*arguments)
        assert status == 0 and err == ""
        for name, text in COMMANDS.items():
            assert f"  {name:10}{text}" in out.splitlines()


def test_version(console):
    status, out, _ = console("--version")
    assert status == 0 and re.fullmatch(r"attncap \d+\.\d+.*\n", out)


def test_an_unknown_command(console):
    status, out, err = console("trian")
    assert status == 2 and out == ""
    assert err == "attncap: error: no command 'trian'; choose one of train, caption, evaluate, data, info\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_both_ways_to_call_a_command(console, monkeypatch, capsys, name):
    status, out, _ = console(name, "--help")
    assert status == 0 and out.startswith(f"usage: attncap {name} [-h]")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    module = MODULES[name] if name != "data" else "attncap.data.__main__"
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(SystemExit):
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert capsys.readouterr().out == out.replace(f"usage: attncap {name}", f"usage: python -m attncap.{name}")


def test_import_and_help_do_not_import_torch():
    found = subprocess.run(
        [sys.executable, "-c", "import attncap, sys; dir(attncap); print('torch' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout == "False\n"
    assert imports("attncap.cli.main", "--help") == []
    assert imports("attncap.cli.main", "--version") == []


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_does_not_import_torch(name):
    assert imports("attncap.cli.main", name, "--help") == ["tyro"]
    assert imports(MODULES[name], "--help") == ["tyro"]


@pytest.mark.slow  # METEOR takes seconds
def test_scoring_a_file_does_not_import_torch(tmp_path):
    (tmp_path / "references.json").write_text('{"annotations": [{"id": 1, "image_id": 1, "caption": "a dog"}]}')
    (tmp_path / "results.json").write_text('[{"image_id": 1, "caption": "a dog"}]')
    files = ["--predictions", tmp_path / "results.json", "--references", tmp_path / "references.json"]
    assert imports("attncap.evaluate", *files) == ["tyro"]


def test_describing_a_data_set_does_not_import_torch(flickr8k, tmp_path):
    assert imports("attncap.data", flickr8k, "--convert", tmp_path / "data.jsonl") == ["tyro"]


COMPLETE = """
source {script}
complete_words() {{ COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _tyro_attncap; echo "${{COMPREPLY[@]}}"; }}
complete -p attncap
complete_words attncap ""
complete_words attncap train --lear
complete_words attncap train --epochs 3 --optimizer ""
complete_words attncap caption photo.jpg --mode
complete_words attncap evaluate --pred
"""


@pytest.mark.parametrize("command", [[], ["train"]])
def test_bash_completion(console, tmp_path, command):
    """One script for all commands, whichever command prints it."""
    status, out, _ = console(*command, "--tyro-print-completion", "bash")
    script = tmp_path / "attncap.bash"
    assert status == 0 and console(*command, "--tyro-write-completion", "bash", script)[0] == 0
    assert out == script.read_text() + "\n"
    completed = subprocess.run(
        ["bash", "-c", COMPLETE.format(script=script)], capture_output=True, text=True, check=True
    )
    assert completed.stdout.splitlines() == [
        "complete -F _tyro_attncap attncap",
        "-h --help caption data evaluate info train",
        "--learning-rate",
        "adamw adam",
        "--model",
        "--predictions",
    ]


def test_completion_for_other_shells(console):
    for shell in ("zsh", "fish"):
        status, out, _ = console("--tyro-print-completion", shell)
        assert status == 0 and "attncap" in out and "--learning-rate" in out
    for arguments in (["--tyro-print-completion"], ["--tyro-print-completion", "ksh"]):
        status, out, err = console(*arguments)
        assert status == 2 and out == "" and "SHELL is bash, zsh or fish" in err
