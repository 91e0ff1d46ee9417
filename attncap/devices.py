"""Where a model runs, and how many processes read images for it."""

import logging
import os

import torch

from attncap.errors import CallError

log = logging.getLogger("attncap")


def cuda_missing() -> str | None:
    """Why torch, which has CUDA, finds no device for it; None if it finds one, or has no CUDA."""
    if torch.version.cuda is None or torch.cuda.is_available():
        return None
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0]
    return None


def find_device(name: str | torch.device = "auto") -> torch.device:
    """The device with this name; "auto" is CUDA if there is a GPU, otherwise the CPU. Raises CallError for a device
    that does not exist."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        reason = cuda_missing() or ""
        if reason and "no NVIDIA driver" not in reason and "No CUDA GPUs" not in reason:  # a GPU that cannot be used
            log.warning("using the CPU: %s", reason)
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise CallError(f"device={name!r}: {str(error).splitlines()[0]}") from error


def find_workers(workers: int | None, device: torch.device) -> int:
    """The number of processes that read images: `workers`, or by default one for each CPU core, up to 8, when the model
    runs on a GPU, and 0 when it runs on the CPU, where they would compete with it for the cores."""
    if workers is not None:
        return workers
    return 0 if device.type == "cpu" else min(8, os.cpu_count() or 1)
