"""Show what this installation has: versions, devices, which kernels are built and in use, and how to get what is
missing."""

from collections.abc import Sequence
from dataclasses import dataclass

from attncap.cli import command


@dataclass
class InfoConfig:
    debug: bool = False
    """Show the traceback of an error."""


def run(prog: str, arguments: Sequence[str]) -> None:
    command.run(main, InfoConfig, __doc__, prog, arguments)


def main(config: InfoConfig) -> None:
    import torch

    from attncap.devices import cuda_missing
    from attncap.metrics.cider import missing as cider_missing
    from attncap.ops import library
    from attncap.versions import versions

    devices = {"cpu": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"}
    for index in range(torch.cuda.device_count()):
        devices[f"cuda:{index}"] = torch.cuda.get_device_name(index)
    if reason := cuda_missing():
        devices["cuda"] = reason
    status = library.status()
    kernels = {"cpu": library.missing(torch.device("cpu")) or f"in use, {torch.ops.attncap.cpu_isa()}"}
    kernels["cuda"] = status["cuda"]["reason"] or "built, but there is no CUDA device"
    for index in range(torch.cuda.device_count() if status["cuda"]["loaded"] else 0):
        kernels.pop("cuda", None)
        kernels[f"cuda:{index}"] = library.missing(torch.device("cuda", index)) or "in use"
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
