"""Builds and runs the C++ tests: CPU kernels in every instruction set, device code in the emulator; without torch and
without a GPU."""

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


@pytest.mark.parametrize(
    "name", ["test_cuda_emulator", "test_soft_attention", "test_beam_search_step", "test_lstm_step", "test_cider"]
)
def test_passes(build, name):
    done = run(build / name)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_simd(build, isa):
    flag = {"baseline": "", "avx2": "avx2", "avx512": "avx512dq"}[isa]
    if flag not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this processor has no {isa}")
    done = run(build / f"test_simd_{isa}")
    assert done.returncode == 0, done.stdout + done.stderr


def test_nothing_compiled_for_a_newer_processor_can_be_shared(build):
    """A function of the headers that two object files both define is taken from either of them; were it the one with
    AVX-512, the program would crash on a processor without."""
    objects = [str(path) for path in build.glob("CMakeFiles/cpu_kernels_*/**/*.o")]
    assert objects
    symbols = run("nm", "-C", "--defined-only", *objects).stdout.splitlines()
    shared = [line.split(maxsplit=2)[2] for line in symbols if line.split()[1:2] == ["W"]]
    own = tuple(f"void attncap::{isa}::" for isa in ("baseline", "avx2", "avx512"))
    assert shared and all(name.startswith(own) for name in shared), shared


@pytest.mark.parametrize(
    "planted, finding",
    [
        ("read-behind-array", "heap-buffer-overflow"),
        ("read-behind-shared", "use-after-poison"),
        ("read-misaligned", "misaligned address"),
    ],
)
def test_a_planted_wrong_read_is_caught(build, planted, finding):
    done = run(build / "test_cuda_emulator", planted)
    assert done.returncode != 0 and finding in done.stderr
