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

    from attncap.metrics.cider import missing as cider_missing
    from attncap.ops import library
    from attncap.versions import versions

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
