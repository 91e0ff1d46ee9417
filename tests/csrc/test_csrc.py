"""Builds and runs the C++ tests: device code in the emulator, without torch and without a GPU."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True)


def tool(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path=Path(sys.executable).parent)
    assert found, f"{name} is missing: pip install '.[test]'"
    return found


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("build")
    options = ["-DATTNCAP_LIBRARIES=OFF", "-DATTNCAP_TESTS=ON", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    for arguments in ["-S", ROOT, "-B", folder, "-G", "Ninja", *options], ["--build", folder]:
        done = run(tool("cmake"), *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("name", ["test_cuda_emulator", "test_soft_attention"])
def test_passes(build, name):
    done = run(build / name)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("planted", ["read-behind-array", "read-behind-shared"])
def test_a_planted_read_out_of_bounds_is_caught(build, planted):
    done = run(build / "test_cuda_emulator", planted)
    assert done.returncode != 0 and "AddressSanitizer" in done.stderr
