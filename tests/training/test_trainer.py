"""Runs that are ended at any moment, in any way, and gone on with."""

import os
import random
import signal
import time

import pytest
from conftest import make_flickr8k
from running import QUICK, Server, assert_gone, assert_same_state, checkpoint, children, metrics, wait_for_checkpoints
from safetensors.torch import load_file

EACH_STEP = "trainer.CHECKPOINT_EVERY = 0"  # a checkpoint after every step


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """48 images to train on: 6 steps an epoch. Some with several captions to choose from, one that cannot be read."""
    data = make_flickr8k(tmp_path_factory.mktemp("engine") / "data")
    (data / "Images" / "007.png").write_bytes(b"broken")
    return data


# Everything that draws at random or changes in the midst of a run.
SETTINGS = [*QUICK, *"--scheduled-sampling 0.5 --fine-tune-after 1 --accumulate 2 --batch-size 4".split()]


@pytest.fixture(scope="module")
def whole(server, data, tmp_path_factory):
    """A run that nothing ended."""
    folder = tmp_path_factory.mktemp("whole")
    running = server.start(folder / "log", ["--data", data, *SETTINGS, "--output", folder / "run"])
    assert running.status() == 0, running.text()
    return folder / "run"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_killed_at_random_moments(server, data, whole, tmp_path, name, workers):
    """Whenever a run is killed, --resume goes on with it to the same weights, bit for bit, as if nothing had been; and
    none of its processes is left."""
    draw, run, kill = random.Random(f"{name} {workers}"), tmp_path / "run", getattr(signal, name)
    arguments = ["--data", data, *SETTINGS, "--output", run, "--workers", workers]
    places = []
    for _ in range(3):
        resume = ["--resume"] if (run / "checkpoint.pt").exists() else []
        running = server.start(tmp_path / "log", [*arguments, *resume], EACH_STEP)
        wait_for_checkpoints(run, draw.randrange(4))
        time.sleep(draw.uniform(0, 0.2))
        readers = children(running.pid)
        os.kill(running.pid, kill)
        assert running.status() in (0, 143, -kill), running.text()
        assert_gone(readers)
        state = checkpoint(run)
        places.append((state["epoch"], state["step"]))
    running = server.start(tmp_path / "log", [*arguments, "--resume"])
    assert running.status() == 0, running.text()
    assert places == sorted(places) and len(set(places)) > 1
    assert_same_state(checkpoint(whole), checkpoint(run))
    assert metrics(whole) == metrics(run)
    best = load_file(whole / "model.safetensors"), load_file(run / "model.safetensors")
    assert all(value.equal(best[1][name]) for name, value in best[0].items())
    assert (whole / "results.json").read_bytes() == (run / "results.json").read_bytes()
    assert not list(run.glob(".*.tmp"))
