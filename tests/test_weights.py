"""Files of weights: what is read, what is refused, and that neither takes more memory or time than it should."""

import io
import os
import pickle
import resource
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from attncap.models.encoder import Encoder
from attncap.weights import OnMetaDevice, conform, open_safetensors, read_pickle, read_state_dict


def peak() -> float:
    """The most memory that this process has used so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def refuse(read, path, message):
    with pytest.raises(ValueError, match=message) as raised:
        read(path)
    assert str(raised.value).isprintable() and "weights_only" not in str(raised.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_states_are_read_as_torch_reads_them(tmp_path, zipped):
    """Also those of modules, which have parameters and metadata, and views of one another."""
    torch.manual_seed(0)
    whole = torch.randn(4, 6)
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm2d(3))
    state = {"w": torch.nn.Parameter(whole), "view": whole[1:3].t(), "half": whole.half(), "n": torch.tensor(7)}
    state = {"model": module.state_dict(), "best": [0.5, None, True], "name": "größe", **state}
    torch.save(state, tmp_path / "file", _use_new_zipfile_serialization=zipped)
    found, expected = read_pickle(tmp_path / "file"), torch.load(tmp_path / "file", weights_only=True)
    assert found.keys() == expected.keys() and found["best"] == state["best"] and found["name"] == "größe"
    assert isinstance(found["model"], OrderedDict) and all(
        v.equal(expected["model"][k]) for k, v in found["model"].items()
    )
    assert all(found[name].equal(state[name]) for name in ("w", "view", "half", "n"))


class Code:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False, None])
@pytest.mark.parametrize(
    "name, call",
    [
        ("posix.mkdir", (os.mkdir, ("owned",))),
        ("__builtin__.bytearray", (bytearray, (2 * 10**9,))),  # those from here on are allowed by torch
        ("torch.FloatTensor", (torch.FloatTensor, (10**9,))),
        ("torch._utils._rebuild_sparse_tensor", (torch._utils._rebuild_sparse_tensor, (torch.sparse_coo, ()))),
        ("torch._utils._rebuild_device_tensor_from_cpu_tensor", None),
    ],
)
def test_files_that_call_functions_are_refused(tmp_path, monkeypatch, zipped, name, call):
    """One of them would turn four bytes into 8 GB."""
    monkeypatch.chdir(tmp_path)
    rebuild = torch._utils._rebuild_device_tensor_from_cpu_tensor
    code = Code(*call or (rebuild, (torch.ones(1).expand(10**9), torch.float64, "cpu", False)))
    if zipped is None:
        (tmp_path / "file").write_bytes(pickle.dumps({"w": code}, protocol=2))
    else:
        torch.save({"w": code}, tmp_path / "file", _use_new_zipfile_serialization=zipped)
    before = peak()
    refuse(read_pickle, tmp_path / "file", f"refused, because it holds '{name}', which could run code; only plain")
    assert peak() < before + 200 and not (tmp_path / "owned").exists()


def test_other_pickles_are_refused(tmp_path):
    (tmp_path / "file").write_bytes(pickle.dumps(Code(os.mkdir, ("owned",)), protocol=4))
    refuse(read_pickle, tmp_path / "file", "refused, because it holds objects, which could run code")
    for content in (b"", b"no pickle", pickle.dumps({"w": 1}), b"PK\x03\x04", b"\x80\x02" + b"(" * 10**6 + b"."):
        (tmp_path / "file").write_bytes(content)
        refuse(read_pickle, tmp_path / "file", "damaged, or not written by torch.save")


def zipped(path: Path, parts: dict[str, bytes], compression: int) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


def test_zip_bombs_are_refused(tmp_path):
    """A compressed file, and one whose names alone are too long: neither is read."""
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(100)}, buffer)
    parts = {name: zipfile.ZipFile(buffer).read(name) for name in zipfile.ZipFile(buffer).namelist()}
    zipped(tmp_path / "file", parts, zipfile.ZIP_STORED)
    assert read_pickle(tmp_path / "file")["w"].equal(torch.zeros(100))
    before, began = peak(), time.process_time()
    zipped(tmp_path / "file", {**parts, "archive/data/0": bytes(100 * 2**20)}, zipfile.ZIP_DEFLATED)
    written = peak()
    refuse(read_pickle, tmp_path / "file", "its parts are compressed or overlap")
    assert peak() == written
    zipped(tmp_path / "file", {**parts, "archive/data.pkl": b"N" * (5 * 2**20)}, zipfile.ZIP_STORED)
    refuse(read_pickle, tmp_path / "file", "its names and shapes take more than 4 MiB")
    assert before <= written and time.process_time() - began < 10


@pytest.mark.parametrize("read", [read_pickle, read_state_dict, open_safetensors])
def test_only_regular_files_of_a_bounded_size(tmp_path, read):
    path = tmp_path / "file.safetensors"
    refuse(read, path, "No such file")
    os.mkfifo(path)
    refuse(read, path, "not a regular file")
    refuse(read, tmp_path, "directory")
    refuse(read, Path("/dev/zero"), "not a regular file")
    refuse(read, Path("a\0b"), "null")
    path.unlink()
    with open(path, "wb") as file:
        file.truncate(17 * 2**30)
    refuse(read, path, "larger than 16 GiB")


@pytest.mark.parametrize("kind, size", [("F4", 2), ("F6_E2M3", 3), ("F8_E8M0", 4), ("U64", 32), ("X", 4), ("F32", 15)])
def test_tensors_that_torch_lacks_are_refused(tmp_path, kind, size):
    header = f'{{"a": {{"dtype": "{kind}", "shape": [4], "data_offsets": [0, {size}]}}}}'.encode()
    (tmp_path / "file.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    try:
        state = read_state_dict(tmp_path / "file.safetensors")
    except ValueError as error:
        assert str(error).startswith("damaged or cut short (") and str(error).isprintable()
    else:  # torch has this one
        with pytest.raises(ValueError, match="a is torch.* instead of torch.float32|a has the shape"):
            conform(state, {"a": torch.zeros(4)})


def test_names_of_weights_are_names(tmp_path):
    for state in ({"a\n": torch.ones(1)}, {7: torch.ones(1)}, {"a" * 999: torch.ones(1)}):
        torch.save(state, tmp_path / "file.pth")
        refuse(read_state_dict, tmp_path / "file.pth", "not all of its keys are names")
    for state in ([torch.ones(1)], {"a": [torch.ones(1)]}, {"state_dict": {"a": torch.ones(1)}}):
        torch.save(state, tmp_path / "file.pth")
        refuse(read_state_dict, tmp_path / "file.pth", "not a state dict of names and tensors; write it with")
    save_file({f"{i:0190d}": torch.ones(0) for i in range(20_000)}, tmp_path / "many.safetensors")
    refuse(read_state_dict, tmp_path / "many.safetensors", "its header is larger than 4 MiB")


OWN = torch.zeros(2, 3)
TENSORS = {
    "a is not a plain tensor": [
        None,
        [0.0],
        OWN.to_sparse(),
        OWN.to_sparse_csr(),
        OWN.to("meta"),
        torch.ones(1, device="meta").expand(10**9, 10**9),
    ],
    "a has the shape": [torch.zeros(3, 2), torch.zeros(6), torch.zeros(()), torch.ones(1).expand(10**9, 10**9)],
    "a is torch.*instead of torch.float32": [
        *(OWN.to(dtype) for dtype in (torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e5m2)),
        torch.quantize_per_tensor(OWN, 0.1, 0, torch.qint8),
    ],
    "a has values that are NaN, or infinite": [OWN * float("nan"), OWN - float("inf"), OWN.double() + 1e300],
}


@pytest.mark.parametrize("message, found", [(message, found) for message in TENSORS for found in TENSORS[message]])
def test_tensors_that_do_not_fit(message, found):
    with pytest.raises(ValueError, match=message):
        conform({"a": found}, {"a": OWN})


def test_tensors_that_fit_are_copied():
    """The copies have the expected layout and dtype, and share no memory."""
    values = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)
    own = torch.empty(2, 3, 4, 5, device="meta").to(memory_format=torch.channels_last)
    for found in (
        values,
        values.double(),
        values.transpose(0, 3).contiguous().transpose(0, 3),
        torch.nn.Parameter(values),
    ):
        fitted = conform({"a": found}, {"a": own})["a"]
        assert fitted.equal(values) and fitted.dtype == torch.float32 and not fitted.requires_grad
        assert fitted.is_contiguous(memory_format=torch.channels_last) and fitted.data_ptr() != found.data_ptr()
    one, other = conform({"a": OWN, "b": OWN}, {"a": OWN, "b": OWN}).values()
    assert one.data_ptr() != other.data_ptr()
    repeated = conform(torch.ones(()).expand(2, 3), OWN)
    repeated[0, 0] = 5
    assert repeated.sum() == 10


def test_indices_that_belong_to_the_architecture():
    own = {"index": torch.tensor([2, 0, 1]), "count": torch.tensor(0)}
    assert conform({"index": torch.tensor([2, 0, 1]), "count": torch.tensor(9)}, own)["count"] == 9
    halved = conform({"index": torch.tensor([2, 0, 1]).half(), "count": torch.tensor(9).half()}, own)
    assert halved["count"] == 9 and halved["count"].dtype == torch.int64 and halved["index"].equal(own["index"])
    with pytest.raises(ValueError, match="index differs from the backbone's indices"):
        conform({"index": torch.tensor([2, 0, 10**9]), "count": torch.tensor(0)}, own)


STATE = {"n": 1, "x": 0.5, "best": None, "list": [1.0], "inner": {"a": OWN}, "state": {0: {"a": OWN}, 1: {"a": OWN}}}


def test_states_that_fit():
    found = {**STATE, "best": [0.5, 0.25], "state": {1: {"a": OWN}, 7: "left out"}, "further": object()}
    fitted = conform(found, STATE)
    assert fitted["best"] == [0.5, 0.25] and fitted["state"].keys() == {1} and "further" not in fitted


@pytest.mark.parametrize(
    "change, message",
    [
        ({"n": 1.0}, "n is not of type int"),
        ({"n": True}, "n is not of type int"),
        ({"n": -1}, "n=-1 is out of range"),
        ({"n": 10**400}, "n=10000000000000000000 is out of range"),
        ({"x": float("nan")}, "x=nan is out of range"),
        ({"x": "0.5"}, "x is not of type float"),
        ({"best": [0.5, "1"]}, "best.1 is not of type float"),
        ({"best": 0.5}, "best is not of type NoneType"),
        ({"list": [1.0, 2.0]}, "list is not a list of 1 entries"),
        ({"inner": 5}, "inner is not a dict"),
        ({"inner": {}}, "inner.a is missing"),
        ({"inner": {"a": OWN, "b": OWN}}, "inner.'b' is unknown"),
        ({"state": {1: {"a": OWN[0]}}}, r"state.1.a has the shape \[3\] instead of \[2, 3\]"),
    ],
    ids=str,
)
def test_states_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        conform({**STATE, **change}, STATE)
    for found in (7, None, [STATE]):
        with pytest.raises(ValueError, match="^its content is not a dict"):
            conform(found, STATE)


@pytest.mark.parametrize("name", ["regnet_y_400mf", "swin_v2_t", "mnasnet0_5"])
def test_modules_without_data(name):
    """They have the names, shapes, and constants of those with data."""
    torch.manual_seed(0)
    random = torch.get_rng_state()
    with OnMetaDevice():
        empty = Encoder(name)
    assert torch.get_rng_state().equal(random) and all(parameter.is_meta for parameter in empty.parameters())
    own, state = empty.state_dict(), Encoder(name).state_dict()
    assert own.keys() == state.keys() and all(own[key].shape == value.shape for key, value in state.items())
    empty.load_state_dict(conform(state, own), assign=True)
    assert not any(tensor.is_meta for tensor in [*empty.parameters(), *empty.buffers()])
    assert all(tensor.equal(state[key]) for key, tensor in empty.state_dict().items())


def test_the_largest_backbone_takes_no_memory():
    before = peak()
    with OnMetaDevice():
        assert sum(p.numel() for p in torchvision.models.regnet_y_128gf().parameters()) > 600e6
    assert peak() < before + 100
