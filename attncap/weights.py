"""Weights from untrusted files: read without running code, and compared with what this process expects, name by name,
before anything is allocated for them or computed with them."""

import io
import math
import os
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode

from attncap.files import open_regular

MAX_WEIGHTS = 16 * 2**30  # bytes of a file; torchvision's largest backbone has 2.4 GiB, its checkpoint 10 GiB
MAX_INDEX = 4 * 2**20  # bytes of the names and shapes in it; the largest checkpoints take less than 1 MiB for them

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# All that torch.save names in a file of plain tensors, numbers, strings, lists and dicts.
PLAIN = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor|tensor_v2|parameter)"
    r"|torch (Half|BFloat16|Float|Double|Bool|Byte|Char|Short|Int|Long)Storage"
)


class OnMetaDevice(TorchFunctionMode):
    """A context in which new modules of this thread have their parameters on the meta device: shapes without data. (In
    `torch.device("meta")`, RegNet could not compute its widths.)"""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.empty, torch.ones, torch.zeros):
            kwargs = {**kwargs, "device": "meta"}
        return function(*args, **kwargs)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors in a .safetensors file, memory-mapped, or in a state dict that torch.save wrote. Raises ValueError,
    with the reason in one line, for any other file."""
    if path.suffix == ".safetensors":
        with open_safetensors(path, MAX_INDEX) as file:
            try:
                state = {name: file.get_tensor(name) for name in file.keys()}
            except Exception as error:  # the library's own, and others for types that torch lacks
                raise _damaged(error) from error
    else:
        state = read_pickle(path)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError("not a state dict of names and tensors; write it with torch.save(model.state_dict(), path)")
    if not all(isinstance(name, str) and name.isprintable() and len(name) < 200 for name in state):
        raise ValueError("not a state dict: not all of its keys are names of weights")
    return state


def open_safetensors(path: Path, most_header: int = 100 * 2**20) -> Any:
    """The file as `safetensors.safe_open` opens it. Raises ValueError, with the reason in one line, when it is damaged,
    not a regular file, or has a header of more than `most_header` bytes."""
    with _open(path) as file:
        header = int.from_bytes(file.read(8), "little")
    if header > most_header:
        raise ValueError(f"damaged, or its header is larger than {most_header / 2**20:.0f} MiB")
    try:
        return safe_open(path, "pt")
    except Exception as error:  # the library's own, and others
        raise _damaged(error) from error


def _damaged(error: Exception) -> ValueError:
    return ValueError(f"damaged or cut short ({str(error)[:100]!a})")


def read_pickle(path: Path) -> Any:
    """What torch.save wrote, on the CPU: plain tensors, numbers, strings, lists and dicts. Raises ValueError, with the
    reason in one line, for anything else, without running it."""
    with _open(path) as file:
        try:
            _check_pickle(file)
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
        except RefusedError:
            raise
        except Exception as error:  # torch.load has no single kind of error for a damaged file
            raise ValueError(f"damaged, or not written by torch.save ({type(error).__name__})") from error


class RefusedError(ValueError):
    """A file that is not read although torch might read it."""


def conform(found: object, own: object, name: str = "") -> Any:
    """`found`, which was read from a file, in the form of `own`, which this process made: tensors on the CPU with the
    shape, dtype and memory layout of its tensors; numbers; lists and dicts of these.

    Floating-point tensors may have another precision. Extra entries of a dict are dropped, but are an error in a dict
    of tensors. Entries whose key is an integer may be missing, because an optimizer has no state for parameters that
    were never trained. None may be replaced by a list of numbers.

    Raises ValueError, with the entry and the reason in one line, for anything else, and for values that are not finite.
    """
    if isinstance(own, Tensor):
        return _conform_tensor(found, own, name)
    if isinstance(own, dict):
        if not isinstance(found, dict):
            raise ValueError(f"{name or 'its content'} is not a dict")
        prefix = f"{name}." if name else ""
        missing = [key for key in own if key not in found and not isinstance(key, int)]
        if missing:
            raise ValueError(f"{prefix}{missing[0]} is missing")
        unknown = [key for key in found if key not in own]
        if unknown and own and all(isinstance(value, Tensor) for value in own.values()):
            raise ValueError(f"{prefix}{unknown[0]!a:.100} is unknown")
        return {key: conform(found[key], value, f"{prefix}{key}") for key, value in own.items() if key in found}
    if isinstance(own, list):
        if not isinstance(found, list) or len(found) != len(own):
            raise ValueError(f"{name} is not a list of {len(own)} entries")
        return [conform(*pair, f"{name}.{i}") for i, pair in enumerate(zip(found, own, strict=True))]
    if own is None and isinstance(found, list):
        return [conform(value, 0.0, f"{name}.{i}") for i, value in enumerate(found)]
    if type(found) is not type(own):
        raise ValueError(f"{name} is not of type {type(own).__name__}")
    if isinstance(found, float) and not math.isfinite(found) or isinstance(found, int) and not 0 <= found < 2**53:
        raise ValueError(f"{name}={found!s:.20} is out of range")
    return found


def _conform_tensor(found: object, own: Tensor, name: str) -> Tensor:
    if not isinstance(found, Tensor) or found.device.type != "cpu" or found.layout != torch.strided:
        raise ValueError(f"{name} is not a plain tensor")
    if found.shape != own.shape:
        raise ValueError(f"{name} has the shape {list(found.shape)} instead of {list(own.shape)}")
    # A script that casts a whole state dict casts its counters and indices too.
    if found.dtype not in (*FLOATS, *([] if own.dtype in FLOATS else [own.dtype])):
        raise ValueError(f"{name} is {found.dtype} instead of {own.dtype}")
    if own.dtype in FLOATS and own.numel():
        low, high = found.detach().aminmax()
        if not -torch.finfo(own.dtype).max <= low <= high <= torch.finfo(own.dtype).max:
            raise ValueError(f"{name} has values that are NaN, or infinite in {own.dtype}")
    # A copy, because tensors in a file may share memory, with one another and within themselves.
    conformed = torch.empty_like(own, device="cpu", requires_grad=False).copy_(found.detach())
    if own.dtype not in FLOATS and own.dim() and not conformed.equal(own.cpu()):
        raise ValueError(f"{name} differs from the backbone's indices, which never change")
    return conformed


def _open(path: Path) -> BinaryIO:
    """Raises ValueError unless it is a regular file of at most MAX_WEIGHTS bytes."""
    try:
        file = open_regular(path)
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL character
        raise ValueError(getattr(error, "strerror", None) or str(error)) from error
    if os.fstat(file.fileno()).st_size > MAX_WEIGHTS:
        file.close()
        raise ValueError(f"larger than {MAX_WEIGHTS / 2**30:.0f} GiB")
    return file


def _check_pickle(file: BinaryIO) -> None:
    """Raises RefusedError unless the file has the form that torch.save gives to plain tensors, numbers, strings, lists
    and dicts, and needs no more memory than disk space. `weights_only` alone also allows calls of functions with which
    a small file can take any amount of memory."""
    if file.read(4) != b"PK\x03\x04":  # older than torch 1.6: five pickles, then the values
        file.seek(0)
        return _check_names(file.read(MAX_INDEX), pickles=5)
    with zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
        names = {part.filename for part in parts}
        stored = all(part.compress_type == zipfile.ZIP_STORED for part in parts)
        if not stored or len(names) < len(parts) or sum(part.file_size for part in parts) > file.seek(0, os.SEEK_END):
            raise RefusedError("not written by torch.save: its parts are compressed or overlap")
        [index] = [part for part in parts if part.filename.endswith("/data.pkl")]
        if index.file_size > MAX_INDEX:
            raise RefusedError(f"its names and shapes take more than {MAX_INDEX / 2**20:.0f} MiB")
        _check_names(archive.read(index), pickles=1)


def _check_names(content: bytes, pickles: int) -> None:
    stream = io.BytesIO(content)
    for _ in range(pickles):
        for operation, argument, _ in pickletools.genops(stream):
            if operation.name in ("GLOBAL", "INST") and not PLAIN.fullmatch(str(argument)):
                problem = f"holds {'.'.join(str(argument).split())[:80]!a}"
            elif operation.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
                problem = "holds objects"
            else:
                continue
            raise RefusedError(
                f"refused, because it {problem}, which could run code; only plain tensors, numbers, strings, lists and "
                "dicts are read, as written by torch.save(model.state_dict(), path)"
            )
