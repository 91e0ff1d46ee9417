"""Loads the native libraries that `pip install .` left in attncap/lib.

Nothing falls back silently: `require` says what is missing and how to get it.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attncap.errors import UserError

FOLDER = Path(__file__).resolve().parent.parent / "lib"

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # of the ops

# Why the kernels of a device cannot be used; None where they can.
_missing: dict[str, str | None] = {}


def _build_record() -> dict[str, Any]:
    path = FOLDER / "build.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _load(device_type: str) -> str | None:
    """Load the library of a device; returns why it could not be loaded."""
    path = FOLDER / f"libattncap_{device_type}.so"
    if device_type == "cuda" and torch.version.cuda is None:
        return "this torch is a build without CUDA"
    if not path.is_file():
        if not FOLDER.is_dir():
            return "the package was not built; run `pip install .` in its source folder"
        reason = _build_record().get("cuda_left_out", f"{path} is gone")
        return f"it was left out of the build ({reason}); install nvcc, then `pip install .` again"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path} could not be loaded ({error}); run `pip install .` again"
    return None


def load() -> None:
    """Load what was built. The CPU library holds the schemas, so the CUDA library needs it."""
    _missing["cpu"] = _load("cpu")
    _missing["cuda"] = _load("cuda") if _missing["cpu"] is None else _missing["cpu"]


def is_loaded(device_type: str) -> bool:
    """Whether the kernels for a device type ("cpu" or "cuda") can be used."""
    return _missing.get(device_type, "") is None


def require(device: torch.device) -> None:
    """Raises UserError, in one sentence, unless the kernels for the device can be used."""
    if is_loaded(device.type):
        return
    reason = _missing.get(device.type, "attncap has kernels for cpu and cuda only")
    raise UserError(
        f"attncap's native library for {device.type} is missing: {reason}. The plain PyTorch path needs none."
    )


def check_tensors(
    expected: dict[str, tuple[Tensor | None, tuple[int, ...], torch.dtype]],
    device: torch.device,
    others: Callable[[], str],
) -> None:
    """Raises ValueError unless every tensor of an op, by name, has its shape and dtype and the op's device. `others`
    tells the tensors that the shapes follow from, for the sentence, which takes longer than the check."""
    for name, (tensor, shape, dtype) in expected.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, but {list(shape)} fits {others()}")
        if tensor.dtype != dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype}, but {dtype} is needed")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, but the other tensors are on {device}")


def autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Cast to autocast's dtype where it is on (float64 stays, as it does for torch's own ops)."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device_type)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def sum_dtype(x: Tensor) -> torch.dtype:
    """What the kernels keep sums in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def status() -> dict[str, Any]:
    """What is built and loaded, for `python -m attncap.info`.

    Returns "cpu" and "cuda", each {"built": bool, "loaded": bool, "reason": str | None} (the reason
    says why it is not loaded), and "build", what the build recorded: compiler, torch_headers, and
    nvcc with cuda_architectures or else cuda_left_out.
    """
    devices = {
        device_type: {
            "built": (FOLDER / f"libattncap_{device_type}.so").is_file(),
            "loaded": is_loaded(device_type),
            "reason": reason,
        }
        for device_type, reason in _missing.items()
    }
    return {**devices, "build": _build_record()}


load()
