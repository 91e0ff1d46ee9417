"""Builds and runs the C++ tests, without torch and without a GPU: the CPU kernels in every instruction set, and the
device code in the emulator."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
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
        pytest.skip(f"this processor does not support {isa}")
    done = run(build / f"test_simd_{isa}")
    assert done.returncode == 0, done.stdout + done.stderr


def test_object_files_of_different_instruction_sets_share_no_function(build):
    """If several object files define the same function of a header, the linker keeps any one of them. If that is the
    one compiled for AVX-512, the program crashes on processors without AVX-512."""
    objects = [str(path) for path in build.glob("CMakeFiles/cpu_kernels_*/**/*.o")]
    assert objects
    symbols = run("nm", "-C", "--defined-only", *objects).stdout.splitlines()
    shared = [line.split(maxsplit=2)[2] for line in symbols if line.split()[1:2] == ["W"]]
    own = tuple(f"void attncap::{isa}::" for isa in ("baseline", "avx2", "avx512"))
    assert shared and all(name.startswith(own) for name in shared), shared


@pytest.mark.parametrize(
    "invalid_read, report",
    [
        ("read-past-array", "heap-buffer-overflow"),
        ("read-past-shared", "use-after-poison"),
        ("read-misaligned", "misaligned address"),
    ],
)
def test_an_invalid_read_is_detected(build, invalid_read, report):
    done = run(build / "test_cuda_emulator", invalid_read)
    assert done.returncode != 0 and report in done.stderr
