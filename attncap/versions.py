"""The versions of the packages that a result depends on, read without importing them."""

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    "torch",
    "attncap",
    "torchvision",
    "numpy",
    "pillow",
    "pycocotools",
    "safetensors",
    "tyro",
    "matplotlib",
    "tensorboard",
)


def versions() -> dict[str, str]:
    """The version of Python and of each package; "not installed" for a package that is missing."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
