"""Builds the native libraries: finds torch's headers and nvcc, drives CMake, says what it built.

Environment:
  CXX                         the C++ compiler
  ATTNCAP_CUDA                1: a missing nvcc is an error; 0: no CUDA; else if nvcc is found
  ATTNCAP_CUDA_ARCHITECTURES  CMake's list, such as "80;90"; else 75 to 90 and PTX for newer ones
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


def find_torch() -> tuple[Path, str] | None:
    """The folder and version of an installed torch >= 2.10, without importing it.

    pip's build isolation hides the environment's packages from import, yet site-packages is still
    known; taking the headers from there saves downloading torch a second time.
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


def find_tool(name: str) -> str:
    tool = shutil.which(name) or shutil.which(name, path=os.path.dirname(sys.executable))
    return tool or sys.exit(f"attncap: {name} was not found; install it with: pip install {name}")


def check_compiler() -> None:
    names = shlex.split(os.environ.get("CXX", ""))[:1] or ["c++", "g++", "clang++"]
    if not any(map(shutil.which, names)):
        sys.exit(
            f"attncap: no C++20 compiler was found (tried {', '.join(names)}); install one (on "
            "Debian or Ubuntu: apt install g++) or name yours in the environment variable CXX."
        )


def check_python() -> None:
    headers = sysconfig.get_paths()["include"]
    if not (Path(headers) / "Python.h").is_file():
        sys.exit(
            f"attncap: no Python.h in {headers}; install its headers (on Debian or Ubuntu: apt install python3-dev)."
        )


class BuildLibraries(build_ext):
    """Builds with CMake and leaves the libraries and build.json in attncap/lib."""

    def run(self) -> None:
        check_compiler()
        check_python()
        torch, torch_version = find_torch() or sys.exit("attncap: the build needs torch>=2.10.")
        wanted = os.environ.get("ATTNCAP_CUDA")
        nvcc = None if wanted == "0" else find_nvcc()
        searched = "no nvcc in CUDA_HOME, PATH, /usr/local/cuda or NVIDIA's pip packages"
        if wanted == "1" and not nvcc:
            sys.exit(f"attncap: ATTNCAP_CUDA=1 asks for the CUDA library, but there is {searched}.")

        options = {
            "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
            "Python_EXECUTABLE": sys.executable,  # the CIDEr-D scorer's
            "TORCH_DIR": torch,
            "TORCH_VERSION": torch_version,
            "ATTNCAP_CUDA": "ON" if nvcc else "OFF",
            "ATTNCAP_CUDA_LEFT_OUT": "ATTNCAP_CUDA=0" if wanted == "0" else searched,
        }
        if nvcc:
            options["CMAKE_CUDA_COMPILER"] = nvcc
        if architectures := os.environ.get("ATTNCAP_CUDA_ARCHITECTURES"):
            options["CMAKE_CUDA_ARCHITECTURES"] = architectures
        # Always in the source tree: python run there finds this attncap before the installed one.
        libraries = ROOT.resolve() / "attncap" / "lib"
        shutil.rmtree(libraries, ignore_errors=True)
        done = self.build_with_cmake(options, libraries)
        if not done and nvcc and wanted != "1":  # an nvcc that does not work takes only CUDA away
            left_out = f"{nvcc} failed; pip install -v . shows why"
            options |= {"ATTNCAP_CUDA": "OFF", "ATTNCAP_CUDA_LEFT_OUT": left_out}
            done, nvcc = self.build_with_cmake(options, libraries), None
        if not done:
            sys.exit("attncap: the build failed; the compiler says why above (with pip install -v .)")
        if not (self.editable_mode or self.inplace):
            shutil.copytree(libraries, Path(self.build_lib) / "attncap" / "lib", dirs_exist_ok=True)

        built = json.loads((libraries / "build.json").read_text())
        print("attncap: built the CPU library ({compiler}, torch {torch_headers})".format(**built))
        if nvcc:
            print("attncap: built the CUDA library ({nvcc}, {cuda_architectures})".format(**built))
        else:
            print("attncap: left out the CUDA library: {cuda_left_out}".format(**built))

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
        return []  # the base class would name a Python extension module

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    ext_modules=[Extension("attncap.lib", sources=[])],  # makes the wheel this platform's
    cmdclass={"build_ext": BuildLibraries},
    setup_requires=[] if find_torch() else ["torch>=2.10"],
)
