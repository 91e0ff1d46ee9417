"""What this installation has: versions, devices, which kernels are built and in use, and how to get what is missing."""

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from attncap import command
from attncap.metrics.cider import missing as cider_missing
from attncap.ops import library

PACKAGES = ("attncap", "torchvision", "numpy", "pillow", "pycocotools", "safetensors", "tyro", "matplotlib")


@dataclass
class InfoConfig:
    debug: bool = False
    """Show the traceback of an error."""


def main(config: InfoConfig) -> None:
    devices = {"cpu": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"}
    for index in range(torch.cuda.device_count()):
        devices[f"cuda:{index}"] = torch.cuda.get_device_name(index)
    status = library.status()
    kernels = {name: "in use" if status[name]["loaded"] else status[name]["reason"] for name in ("cpu", "cuda")}
    if status["cpu"]["loaded"]:
        kernels["cpu"] += f", {torch.ops.attncap.cpu_isa()}"
    kernels["cider"] = cider_missing or "in use"
    for title, lines in (
        ("versions", versions()),
        ("devices", devices),
        ("kernels", kernels),
        ("build", status["build"]),
    ):
        print(title)
        for name, value in lines.items():
            print(f"  {name:18} {value}")


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


if __name__ == "__main__":
    command.run("info", main, InfoConfig, __doc__)
