"""What the build says when something is missing, and which GPUs it compiles for."""

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

WITHOUT = """
import runpy, sys
sys.modules[{module!r}] = None  # cannot be found
sys.argv = ["setup.py", "build_ext"]
runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.mark.slow
def test_a_build_without_pybind11_names_it(tmp_path):
    """Without build isolation, what pyproject.toml asks for may be missing."""
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(Path(__file__).parent.parent / name, tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(module="pybind11")], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "attncap: pybind11 was not found. Install it with: pip install pybind11"


NVCC_13 = "75 80 86 87 88 89 90 100 110 103 120 121"
NVCC_12_4 = "50 52 53 60 61 62 70 72 75 80 86 87 89 90"
NVCC_11_8 = "35 37 50 52 53 60 61 62 70 72 75 80 86 87 89 90"


@pytest.fixture
def choose(tmp_path, monkeypatch):
    """What setup.py chooses where nvcc knows these architectures and nvidia-smi says this (None: there is none)."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    find_architectures = runpy.run_path(str(Path(__file__).parents[1] / "setup.py"))["find_architectures"]
    monkeypatch.setenv("PATH", str(tmp_path))

    def program(name, output, status=0):
        (tmp_path / name).write_text(f"#!/bin/sh\n/bin/cat <<EOF\n{output}\nEOF\nexit {status}\n")
        (tmp_path / name).chmod(0o755)

    def run(nvcc: str, smi: str | None, status: int = 0) -> str:
        program("nvcc", "\n".join(f"sm_{code}" for code in nvcc.split()))
        if smi is not None:
            program("nvidia-smi", smi, status)
        return find_architectures(tmp_path / "nvcc")

    return run


@pytest.mark.parametrize(
    "nvcc, smi, chosen",
    [
        (NVCC_13, "9.0", "90"),
        (NVCC_13, "7.5\n7.5", "75"),
        (NVCC_13, "9.0\n8.0\n9.0", "80-real;90"),
        (NVCC_13, "8.7", "87"),
        (NVCC_13, "12.1", "121"),
        (NVCC_12_4, "8.6\n12.0", "86-real;90"),  # nvcc is older than the GPU, whose driver then compiles the PTX
        (NVCC_13, "6.0\n8.9", "89"),  # no kernel runs on the first
        (NVCC_13, "6.0", "75-real;80-real;86-real;89-real;90-real;100-real;120"),
        (NVCC_13, "", "75-real;80-real;86-real;89-real;90-real;100-real;120"),
        (NVCC_13, None, "75-real;80-real;86-real;89-real;90-real;100-real;120"),
        (NVCC_12_4, None, "75-real;80-real;86-real;89-real;90"),
        (NVCC_11_8, None, "75-real;80-real;86-real;89-real;90"),
        ("", None, "75-real;80-real;86-real;89-real;90-real;100-real;120"),
    ],
)
def test_architectures(choose, nvcc, smi, chosen):
    assert choose(nvcc, smi) == chosen


def test_an_nvidia_smi_that_fails(choose):
    """Of an old driver, which has no such field, or one that does not fit the GPU."""
    message = 'Field "compute_cap" is not a valid field to query.'
    assert choose(NVCC_12_4, message, status=2) == choose(NVCC_12_4, None)
