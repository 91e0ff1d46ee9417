"""Builds the native libraries: finds torch's headers and nvcc, runs CMake and reports what was built.

Environment variables:
  CXX                         the C++ compiler
  ATTNCAP_CUDA                1: build the CUDA library, or fail; 0: do not; unset: build it if a working nvcc is found
  ATTNCAP_CUDA_ARCHITECTURES  in CMake's syntax, such as "80;90"; by default those of the GPUs that are present, or if
                              there are none, all that the kernels run on; with PTX for newer GPUs
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
SITE_PACKAGES = Path(sysconfig.get_paths()["purelib"])
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)  # T4, A100, RTX 30, RTX 40, H100, B200, RTX 50


def find_torch() -> tuple[Path, str] | None:
    """The directory and version of an installed torch >= 2.10, without importing it.

    pip's build isolation hides the packages of the environment from `import`, but the path of site-packages is still
    known. Using the torch there avoids downloading it a second time.
    """
    spec = importlib.util.find_spec("torch")
    folder = Path(spec.origin).parent if spec else SITE_PACKAGES / "torch"
    if not (folder / "version.py").is_file():
        return None
    version = re.search(r"__version__ = '(.+)'", (folder / "version.py").read_text()).group(1)
    return (folder, version) if tuple(map(int, version.split(".")[:2])) >= (2, 10) else None


def find_nvcc() -> Path | None:
    """nvcc from CUDA_HOME, PATH, /usr/local/cuda or NVIDIA's pip packages, in this order."""
    candidates = [
        Path(os.environ.get("CUDA_HOME", "")) / "bin" / "nvcc",
        Path(shutil.which("nvcc") or ""),
        Path("/usr/local/cuda/bin/nvcc"),
        *sorted(SITE_PACKAGES.glob("nvidia/cu*/bin/nvcc"), reverse=True),
    ]
    return next((path for path in candidates if path.is_file()), None)


def find_architectures(nvcc: Path) -> str:
    """What to compile for, in CMake's syntax: for each GPU that is present, the closest architecture that nvcc knows.
    If none is present, all that the kernels run on and nvcc knows."""
    known = [int(code) for code in re.findall(r"sm_(\d+)$", output_of(nvcc, "--list-gpu-code"), re.MULTILINE)]
    known = [code for code in known if code >= ARCHITECTURES[0]] or list(ARCHITECTURES)
    capabilities = output_of("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    present = [int(major + minor) for major, minor in re.findall(r"^(\d+)\.(\d)$", capabilities, re.MULTILINE)]
    chosen = {max(code for code in known if code <= gpu) for gpu in present if gpu >= known[0]}
    chosen = sorted(chosen or set(ARCHITECTURES).intersection(known))
    return ";".join([f"{code}-real" for code in chosen[:-1]] + [str(chosen[-1])])  # the last one with PTX


def output_of(*command: str | Path) -> str:
    """What a program writes; nothing if it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def find_tool(name: str) -> str:
    tool = shutil.which(name) or shutil.which(name, path=os.path.dirname(sys.executable))
    return tool or sys.exit(f"attncap: {name} was not found. Install it with: pip install {name}")


def check_compiler() -> None:
    names = shlex.split(os.environ.get("CXX", ""))[:1] or ["c++", "g++", "clang++"]
    if not any(map(shutil.which, names)):
        sys.exit(
            f"attncap: no C++ compiler was found (tried {', '.join(names)}). Install one that supports C++20 (on "
            "Debian or Ubuntu: apt install g++) or set the environment variable CXX to yours."
        )


def check_python() -> None:
    headers = sysconfig.get_paths()["include"]
    if not (Path(headers) / "Python.h").is_file():
        sys.exit(
            f"attncap: {headers} has no Python.h. Install Python's headers (on Debian or Ubuntu: apt install "
            "python3-dev)."
        )


def check_pybind11() -> None:
    if importlib.util.find_spec("pybind11") is None:  # only without build isolation
        sys.exit("attncap: pybind11 was not found. Install it with: pip install pybind11")


class BuildLibraries(build_ext):
    """Builds with CMake and puts the libraries and build.json into attncap/lib."""

    def run(self) -> None:
        check_compiler()
        check_python()
        check_pybind11()
        torch, torch_version = find_torch() or sys.exit("attncap: the build needs torch>=2.10. Install it first.")
        wanted = os.environ.get("ATTNCAP_CUDA")
        nvcc = None if wanted == "0" else find_nvcc()
        searched = "no nvcc in CUDA_HOME, PATH, /usr/local/cuda or NVIDIA's pip packages"
        if wanted == "1" and not nvcc:
            sys.exit(f"attncap: ATTNCAP_CUDA=1 requires the CUDA library, but there is {searched}.")

        options = {
            "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
            "Python_EXECUTABLE": sys.executable,  # for the CIDEr-D scorer
            "TORCH_DIR": torch,
            "TORCH_VERSION": torch_version,
            "ATTNCAP_CUDA": "ON" if nvcc else "OFF",
            "ATTNCAP_CUDA_LEFT_OUT": "ATTNCAP_CUDA=0" if wanted == "0" else searched,
        }
        if nvcc:
            options["CMAKE_CUDA_COMPILER"] = nvcc
            architectures = os.environ.get("ATTNCAP_CUDA_ARCHITECTURES")
            options["CMAKE_CUDA_ARCHITECTURES"] = architectures or find_architectures(nvcc)
        # In the source tree, since Python started there imports this attncap instead of the installed one.
        libraries = ROOT.resolve() / "attncap" / "lib"
        shutil.rmtree(libraries, ignore_errors=True)
        done = self.build_with_cmake(options, libraries)
        if not done and nvcc and wanted != "1":  # nvcc does not work: build without CUDA
            left_out = f"the build with {nvcc} failed; pip install -v . shows why"
            options |= {"ATTNCAP_CUDA": "OFF", "ATTNCAP_CUDA_LEFT_OUT": left_out}
            done, nvcc = self.build_with_cmake(options, libraries), None
        if not done:
            sys.exit("attncap: the build failed. The compiler's output is above (with pip install -v .)")
        if not (self.editable_mode or self.inplace):
            shutil.copytree(libraries, Path(self.build_lib) / "attncap" / "lib", dirs_exist_ok=True)

        built = json.loads((libraries / "build.json").read_text())
        print("attncap: built the CPU library ({compiler}, torch {torch_headers})".format(**built))
        if nvcc:
            print("attncap: built the CUDA library ({nvcc}, {cuda_architectures})".format(**built))
        else:
            print("attncap: did not build the CUDA library: {cuda_left_out}".format(**built))

    def build_with_cmake(self, options: dict[str, object], libraries: Path) -> bool:
        cmake, build = find_tool("cmake"), self.build_temp
        defines = [f"-D{name}={value}" for name, value in options.items()]
        return all(
            subprocess.run([cmake, *arguments]).returncode == 0
            for arguments in (
                ["-S", ROOT, "-B", build, "-G", "Ninja", "--fresh", *defines],
                ["--build", build],
                ["--install", build, "--prefix", libraries],
            )
        )

    def get_outputs(self) -> list[str]:
        return []  # the base class would list a Python extension module

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    ext_modules=[Extension("attncap.lib", sources=[])],  # makes the wheel platform-specific
    cmdclass={"build_ext": BuildLibraries},
    setup_requires=[] if find_torch() else ["torch>=2.10"],
)
