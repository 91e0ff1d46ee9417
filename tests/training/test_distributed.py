"""Several processes are one run."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import TINY, make_flickr8k
from running import assert_gone, checkpoint, children, metrics, wait_for_checkpoints
from safetensors.torch import load_file

from attncap.errors import CallError
from attncap.training import distributed

# No batch norm, which normalises by each process's share, and nothing random: only rounding can differ. Batches of 5
# are split 3 + 2, those of the last step 2 + 1.
pytestmark = pytest.mark.slow
SETTINGS = [
    *TINY,
    *"--encoder squeezenet1_1 --encoder-layer features.7 --image-size 64 --grid 3 --captions-per-image 1".split(),
    *"--epochs 2 --batch-size 5 --accumulate 2 --fine-tune-after 1 --beam-size 1 --max-length 8".split(),
    *"--learning-rate 1e-3 --encoder-learning-rate 1e-4".split(),
]


# In double precision, rounding can be distinguished from other differences.
DOUBLE = "import torch; torch.set_default_dtype(torch.float64)"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    data = make_flickr8k(tmp_path_factory.mktemp("distributed") / "data", 54)
    (data / "Images" / "007.png").write_bytes(b"broken")
    return data


@pytest.fixture(scope="module")
def alone(server, data, tmp_path_factory):
    """The run of one process, with batches twice as large instead of two batches to a step."""
    folder = tmp_path_factory.mktemp("alone")
    arguments = ["--data", data, *SETTINGS, "--output", folder / "run", "--batch-size", 10, "--accumulate", 1]
    running = server.start(folder / "log", arguments, DOUBLE)
    assert running.status() == 0, running.text()
    return folder / "run"


def assert_same_run(one, other):
    """Apart from rounding in double precision, which Adam amplifies where a gradient is nearly 0."""
    for name, value in checkpoint(one)["model"].items():
        torch.testing.assert_close(checkpoint(other)["model"][name], value, rtol=0, atol=1e-10, msg=name)
    for line, expected in zip(metrics(other), metrics(one), strict=True):
        assert line == pytest.approx(expected, rel=1e-9)
    best = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert all(torch.allclose(value, best[1][name], rtol=0, atol=1e-10) for name, value in best[0].items())


def test_two_processes_train_like_one(server, data, alone, tmp_path):
    arguments = ["--data", data, *SETTINGS, "--output", tmp_path / "run"]
    processes = server.start_processes(2, tmp_path / "log", arguments, DOUBLE)
    assert [process.status() for process in processes] == [0, 0], [process.text() for process in processes]
    assert_same_run(alone, tmp_path / "run")
    main, other = (process.text() for process in processes)
    assert "44 train" in main and "epoch 2" in main and "test split" in main and "007.png: not an image" in main
    assert other == "" or ("007.png" in other and other.count("\n") == 1)


def test_a_signal_to_one_process_stops_all(server, data, alone, tmp_path):
    """And the run continues with another number of processes."""
    arguments = ["--data", data, *SETTINGS, "--output", tmp_path / "run"]
    processes = server.start_processes(2, tmp_path / "log", [*arguments, "--workers", 1], DOUBLE)
    wait_for_checkpoints(tmp_path / "run", 0)
    time.sleep(0.3)
    readers = [child for process in processes for child in children(process.pid)]
    os.kill(processes[1].pid, signal.SIGTERM)
    assert [process.status() for process in processes] == [143, 143], [process.text() for process in processes]
    assert_gone(readers)
    message = "attncap: stopped; continue with: torchrun --nproc-per-node 2 -m attncap.train"
    assert [process.text().count(message) for process in processes] == [1, 0]
    assert checkpoint(tmp_path / "run")["epoch"] < 2
    processes = server.start_processes(3, tmp_path / "log", [*arguments, "--resume"], DOUBLE)
    assert [process.status() for process in processes] == [0, 0, 0], [process.text() for process in processes]
    assert_same_run(alone, tmp_path / "run")


FAULTS = {
    "a rank's own error": (
        "if os.environ['RANK'] == '1':\n"
        "    from attncap.errors import UserError\n"
        "    def fail(*_): raise UserError('the disk of machine 7 is full')\n"
        "    trainer.update_average = fail",
        "the disk of machine 7 is full",
    ),
    "a loss that is NaN": (
        "if os.environ['RANK'] == '1':\n"
        "    whole = trainer.Trainer.prepare\n"
        "    def spoiled(self, indices, images, skipped):\n"
        "        batch = whole(self, indices, images, skipped)\n"
        "        if '023.png' in [self.splits['train'][i].name for i in indices]: batch.images *= float('nan')\n"
        "        return batch\n"
        "    trainer.Trainer.prepare = spoiled",
        "023.png",
    ),
    "rank 0 finds a run in the folder": ("", "already contains a run"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_error_ends_all_processes_with_one_message(server, data, tmp_path, fault):
    before, message = FAULTS[fault]
    if not before:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "model.safetensors").touch()
    arguments = ["--data", data, *SETTINGS, "--fine-tune-from", "none", "--output", tmp_path / "run"]
    processes = server.start_processes(2, tmp_path / "log", arguments, before)
    statuses = {process.status() for process in processes}
    text = "".join(process.text() for process in processes)
    assert statuses == ({1} if before else {1, 2}), text
    assert text.count("attncap: error") == 1 and message in text and "Traceback" not in text


def test_torchrun(data, alone, tmp_path):
    """As a user calls it. SIGTERM goes to the launcher, which sends it to all processes and to their workers."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "attncap.train"]
    command += [*map(str, ["--data", data, "--output", tmp_path / "run"]), *SETTINGS, "--epochs", "1000"]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = subprocess.Popen([*command, "--workers", "1"], stderr=subprocess.PIPE, text=True, env=one_thread)
    wait_for_checkpoints(tmp_path / "run", 1)
    processes, readers = children(launcher.pid), []
    while launcher.poll() is None and len(readers) < 2:
        readers = [child for process in processes for child in children(process)]
    launcher.send_signal(signal.SIGTERM)
    _, errors = launcher.communicate(timeout=120)
    assert "SIGKILL" not in errors  # what has not ended after 30 seconds, torchrun kills
    assert errors.count("attncap: stopped; continue with: torchrun --nproc-per-node 2") == 1, errors
    assert "a worker" not in errors and "attncap: error" not in errors
    assert len(processes) == 2 and len(readers) == 2
    assert_gone([*processes, *readers])
    state = checkpoint(tmp_path / "run")
    assert state["epoch"] >= 1 and state["step"] >= 1


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    """And touches no other one."""
    chosen = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    for name in ("auto", "cuda", "cuda:0"):
        assert distributed._own_device(name) == torch.device("cuda", 1)
    assert distributed._own_device("cpu") == torch.device("cpu") and chosen == [1, 1, 1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(CallError, match="there are 2 GPUs"):
        distributed._own_device("auto")
