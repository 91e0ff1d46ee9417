"""Loads the native libraries, which `pip install .` puts into attncap/lib.

The native ops never fall back to PyTorch silently: `require` raises an error that says what is missing and how to get
it.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attncap.errors import UserError

FOLDER = Path(__file__).resolve().parent.parent / "lib"

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # that the ops take

# For each device type, why its library could not be loaded; None if it was.
_missing: dict[str, str | None] = {}
# For each CUDA device that was asked for, why the library cannot be used on it; None if it can. (torch.compile warns of
# functools.cache.)
_unusable: dict[int, str | None] = {}


def _build_record() -> dict[str, Any]:
    path = FOLDER / "build.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _load(device_type: str) -> str | None:
    """Loads the library for a device type. Returns None, or the reason why it could not be loaded."""
    path = FOLDER / f"libattncap_{device_type}.so"
    if device_type == "cuda" and torch.version.cuda is None:
        return "the installed torch has no CUDA support"
    if not path.is_file():
        if not FOLDER.is_dir():
            return "the package was not built; run `pip install .` in its source directory"
        reason = _build_record().get("cuda_left_out", f"{path} does not exist")
        return f"it was not built ({reason}); with a working nvcc, run `pip install .` again"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path} could not be loaded ({error}); run `pip install .` again"
    return None


def load() -> None:
    """Loads the libraries that were built. The CUDA library needs the CPU library, which contains the schemas."""
    _missing["cpu"] = _load("cpu")
    _missing["cuda"] = _load("cuda") if _missing["cpu"] is None else _missing["cpu"]


def is_loaded(device_type: str) -> bool:
    """Whether the kernels for a device type ("cpu" or "cuda") can be used."""
    return _missing.get(device_type, "") is None


def _cuda_unusable(index: int) -> str | None:
    """Why the CUDA library, which is loaded, cannot be used on this device; None if it can."""
    error, driver, runtime = torch.ops.attncap.cuda_probe(index)
    if error == 0:
        return None
    major, minor = torch.cuda.get_device_capability(index)
    supported, built = (f"{version // 1000}.{version % 1000 // 10}" for version in (driver, runtime))
    if error == 35:  # cudaErrorInsufficientDriver
        return (
            f"it was built with CUDA {built}, but the NVIDIA driver only supports CUDA {supported}; update the driver, "
            f"or run `pip install .` again with the nvcc of CUDA {supported} on PATH"
        )
    if (major, minor) < (7, 5):
        return f"{torch.cuda.get_device_name(index)} has compute capability {major}.{minor}, and it needs 7.5"
    if error in (209, 218, 222):  # cudaErrorNoKernelImageForDevice, InvalidPtx, UnsupportedPtxVersion
        return (
            f"it was not built for compute capability {major}.{minor}; run `pip install .` again with "
            f"ATTNCAP_CUDA_ARCHITECTURES={major}{minor} in the environment"
        )
    return f"{torch.cuda.get_device_name(index)} reports CUDA error {error} (driver {supported}, library {built})"


def missing(device: torch.device) -> str | None:
    """Why the kernels for the device cannot be used; None if they can."""
    reason = _missing.get(device.type, "attncap has kernels for cpu and cuda only")
    if reason is None and device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        if index not in _unusable:
            _unusable[index] = _cuda_unusable(index)
        reason = _unusable[index]
    return reason


def require(device: torch.device) -> None:
    """Raises UserError unless the kernels for the device can be used."""
    reason = missing(device)
    if reason is None:
        return
    raise UserError(
        f"attncap's native library for {device.type} cannot be used: {reason}. The torch backend works without it."
    )


def check_tensors(
    expected: dict[str, tuple[Tensor | None, tuple[int, ...], torch.dtype]],
    device: torch.device,
    others: Callable[[], str],
) -> None:
    """Raises ValueError unless every tensor of an op has the given shape and dtype, and is on the device.

    Args:
        expected: by name, the tensor (None is skipped), its shape and its dtype.
        others: describes the tensors that the shapes follow from, for the error message. A function, since formatting
            takes longer than the check.
    """
    for name, (tensor, shape, dtype) in expected.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, but must be {list(shape)} to match {others()}")
        if tensor.dtype != dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype}, but must be {dtype}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, but the other tensors are on {device}")


def to_device(device: torch.device, *tensors: Tensor) -> Sequence[Tensor]:
    """The tensors, int64 on the CPU, moved in one copy that the CPU does not wait for."""
    if device.type == "cpu":
        return tensors
    packed = torch.cat([x.flatten() for x in tensors])
    packed = packed.pin_memory() if device.type == "cuda" else packed
    parts = packed.to(device, non_blocking=True).split([x.numel() for x in tensors])
    return [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)]


def autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, cast to autocast's dtype if it is enabled (except float64, as for torch's own ops)."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device_type)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which the kernels accumulate sums."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def status() -> dict[str, Any]:
    """Which libraries are built and loaded, for `python -m attncap.info`.

    Returns a dict with "cpu" and "cuda", each {"built": bool, "loaded": bool, "reason": str | None}, where the reason
    says why the library is not loaded, and with "build", the record of the build: compiler, torch_headers, and either
    nvcc and cuda_architectures or cuda_left_out.
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
