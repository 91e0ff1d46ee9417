"""The versions of the packages that a result depends on."""

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    "attncap",
    "torchvision",
    "numpy",
    "pillow",
    "safetensors",
    "tyro",
    "matplotlib",
    "tensorboard",
)


def versions() -> dict[str, str]:
    """The version of Python and of each package; "not installed" for a package that is missing. Imports torch, whose
    version names its build (CPU, CUDA)."""
    import torch

    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
