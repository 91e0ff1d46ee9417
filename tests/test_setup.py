"""What the build says when something is missing."""

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
