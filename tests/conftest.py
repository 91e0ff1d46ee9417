import contextlib
import os
import resource
import runpy
import signal
import sys

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # several test processes share the cores; set before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from filelock import FileLock
from PIL import Image

# A shell starts background jobs with SIGINT ignored, which they inherit; tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

COLORS = {"red": (200, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 210)}
# A model and a recipe so small that an epoch takes a second.
TINY = (
    "--encoder resnet18 --encoder-layer layer1 --image-size 32 --grid 4 --encoder-weights none --fine-tune-from all "
    "--fine-tune-after 0 "
    "--attention-size 16 --embedding-size 16 --hidden-size 32 --dropout 0 --epochs 15 --batch-size 8 --workers 0 "
    "--learning-rate 1e-2 --encoder-learning-rate 1e-3 --label-smoothing 0 --no-augment --min-count 1 --device cpu"
).split()


def pytest_collection_modifyitems(items):
    """Slow tests first: then no process is left alone with them at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_CUDA])])
def device(request) -> str:
    """A test that asks for this runs on every device."""
    return request.param


@pytest.fixture
def attncap(monkeypatch, capsys):
    """Runs `python -m attncap.NAME ARGUMENTS` in this process: (exit status, standard output, standard error). Java and
    TensorBoard, which take seconds, are not found; the device is the CPU unless another one is named."""
    monkeypatch.setattr("attncap.devices.torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("attncap.metrics.java.find_java", lambda: None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)

    def run(name: str, *arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.delitem(sys.modules, f"attncap.{name}", raising=False)
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(f"attncap.{name}", run_name="__main__", alter_sys=True)
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return run


def make_flickr8k(folder, count: int = 60):
    """A data set in Flickr8k's layout: `count` images of a single colour, a third of them in each colour."""
    (folder / "Images").mkdir(parents=True)
    lines = ["image,caption"]
    for index in range(count):
        name = list(COLORS)[index % 3]
        shade = tuple(min(255, value + index // 2) for value in COLORS[name])
        Image.new("RGB", (40 + index, 50), shade).save(folder / "Images" / f"{index:03d}.png")
        lines += [f"{index:03d}.png,A {name} picture .", f'{index:03d}.png,"A picture, all {name} ."']
    (folder / "captions.txt").write_text("\n".join(lines) + "\n")
    return folder


@contextlib.contextmanager
def largest_file(size: int):
    """A limit of the system on the size of files. Writing fails at any byte beyond it, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="session")
def flickr8k(tmp_path_factory):
    return make_flickr8k(tmp_path_factory.mktemp("data") / "flickr8k")


@pytest.fixture(scope="session")
def trained(flickr8k, tmp_path_factory):
    """The folder of a model trained on `flickr8k`, in another process, as a user would."""
    import subprocess

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all test processes
    output = folder / "trained"
    command = [sys.executable, "-m", "attncap.train", "--data", flickr8k, "--output", output, *TINY]
    with FileLock(folder / "trained.lock"):
        if not output.exists():
            subprocess.run(list(map(str, command)), check=True, timeout=300)
    return output


@pytest.fixture(scope="session")
def server():
    """Starts training commands, see tests/training/running.py."""
    from running import Server

    server = Server()
    yield server
    server.close()
