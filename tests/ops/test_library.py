"""The errors if a native library is missing or broken."""

import contextlib
import json

import pytest
import torch
from conftest import NO_CUDA

from attncap.errors import UserError
from attncap.ops import library, soft_attention


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty attncap/lib, from which nothing has been loaded."""
    monkeypatch.setattr(library, "FOLDER", tmp_path / "lib")
    monkeypatch.setattr(library, "_missing", {})
    (tmp_path / "lib").mkdir()
    return tmp_path / "lib"


def call():
    soft_attention(torch.ones(1, 2, 3), torch.ones(1, 2, 3), torch.ones(1, 3), torch.ones(3))


def test_status_of_this_build():
    status = library.status()
    assert status["cpu"] == {"built": True, "loaded": True, "reason": None}
    assert {"compiler", "torch_headers"} <= status["build"].keys()
    assert ("cuda_left_out" in status["build"]) != status["cuda"]["built"]
    assert status["cuda"]["loaded"] == (status["cuda"]["reason"] is None)


def test_not_built(folder):
    folder.rmdir()
    library.load()
    with pytest.raises(UserError, match="library for cpu cannot be used: .* run `pip install .`"):
        call()


def test_truncated_library(folder):
    (folder / "libattncap_cpu.so").write_bytes(b"\x7fELF")
    library.load()
    with pytest.raises(UserError, match="libattncap_cpu.so could not be loaded"):
        call()
    assert library.status()["cpu"]["built"] and not library.status()["cpu"]["loaded"]


def test_cuda_not_built(folder, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    (folder / "libattncap_cpu.so").touch()
    (folder / "build.json").write_text(json.dumps({"cuda_left_out": "ATTNCAP_CUDA=0"}))
    library.load()
    assert library.is_loaded("cpu") and not library.is_loaded("cuda")
    with pytest.raises(UserError, match="for cuda cannot be used: .*ATTNCAP_CUDA=0.* working nvcc"):
        library.require(torch.device("cuda"))


def test_torch_without_cuda(folder, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert library._load("cuda") == "the installed torch has no CUDA support"


def test_other_devices():
    with pytest.raises(UserError, match="kernels for cpu and cuda only"):
        library.require(torch.device("mps"))


def test_tensors_move_in_one_copy():
    tensors = [torch.arange(6).view(2, 3), torch.empty(0, dtype=torch.int64), torch.tensor(7)]
    for moved, x in zip(library.to_device(torch.device("cpu"), *tensors), tensors, strict=True):
        assert moved.equal(x)
    moved = library.to_device(torch.device("meta"), *tensors)
    assert [(x.shape, x.dtype) for x in moved] == [(x.shape, x.dtype) for x in tensors]
    assert len({x.untyped_storage()._cdata for x in moved}) == 1


@pytest.mark.parametrize(
    "error, capability, message",
    [
        (0, (7, 5), None),
        (35, (8, 0), "built with CUDA 13.0, but the NVIDIA driver only supports CUDA 12.8; update the driver, or run"),
        (209, (6, 0), "Card has compute capability 6.0, and it needs 7.5. The torch backend works"),
        (209, (12, 0), "not built for compute capability 12.0; .*ATTNCAP_CUDA_ARCHITECTURES=120 in"),
        (222, (12, 0), "not built for compute capability 12.0; .*ATTNCAP_CUDA_ARCHITECTURES=120 in"),
        (999, (9, 0), r"Card reports CUDA error 999 \(driver 12.8, library 13.0\)"),
    ],
)
def test_devices_that_cannot_run_the_library(monkeypatch, error, capability, message):
    """The device is asked once."""
    asked = []
    monkeypatch.setattr(library, "_missing", {"cuda": None})
    monkeypatch.setattr(
        torch.ops.attncap, "cuda_probe", lambda index: asked.append(index) or (error, 12080, 13000), raising=False
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Card")
    monkeypatch.setattr(library, "_unusable", {})
    for _ in range(2):
        with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
            library.require(torch.device("cuda", 1))
    assert asked == [1]


@pytest.mark.gpu
@NO_CUDA
def test_this_device_runs_the_library():
    error, driver, runtime = torch.ops.attncap.cuda_probe(0)
    assert error == 0 and min(driver, runtime) >= 11000
