import json
import os
import sys
from dataclasses import asdict, replace

import pytest
import torch

from attncap.errors import CallError, UserError
from attncap.files import atomic_path, remove_temporary, write_atomically
from attncap.training import checkpoint, recipes
from attncap.training.interruption import Interruption, Stopped

STATE = {"model": {"w": torch.arange(3.0)}, "schedule": {"best": [0.5, 0.25], "lowered": 1.0}, "epoch": 2, "best": None}


def test_what_was_saved_comes_back(tmp_path):
    checkpoint.save(tmp_path / "run", STATE)
    found = checkpoint.load(tmp_path / "run")
    assert found.pop("model")["w"].equal(STATE["model"]["w"])
    assert found == {name: value for name, value in STATE.items() if name != "model"}
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint.pt"]


def test_the_old_one_stays_until_the_new_one_is_on_the_disk(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, STATE)
    before, events = (tmp_path / "checkpoint.pt").read_bytes(), []
    sync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (events.append(os.fstat(file).st_size), sync(file))[1])
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append("renamed"), rename(old, new))[1])
    checkpoint.save(tmp_path, {**STATE, "epoch": 3})
    assert events[:2] == [(tmp_path / "checkpoint.pt").stat().st_size, "renamed"]
    checkpoint.save(tmp_path, STATE)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="checkpoint.pt: No space left on device"):
        checkpoint.save(tmp_path, {**STATE, "epoch": 4})
    assert (tmp_path / "checkpoint.pt").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_no_pickle_is_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"model": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="checkpoint.pt: cannot go on from it"):
        checkpoint.load(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_temporary_files_of_the_dead_are_removed_and_no_others(tmp_path):
    with atomic_path(tmp_path / "model.safetensors") as path:
        left = path.name
    for name in (left, ".hidden", "notes.tmp", ".notes.tmp", "model.safetensors"):
        (tmp_path / name).touch()
    remove_temporary(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".hidden", "notes.tmp", ".notes.tmp", "model.safetensors"}
    remove_temporary(tmp_path / "nowhere")


def test_settings_must_be_as_they_were(tmp_path):
    config = recipes.load("shapes")
    with pytest.raises(CallError, match="no run to go on with"):
        checkpoint.check_settings(config, tmp_path)
    write_atomically(tmp_path / "settings.json", json.dumps({"settings": asdict(config)}))
    free = {"epochs": 99, "resume": True, "workers": 3, "output": "elsewhere", "device": "cpu", "data": "moved"}
    checkpoint.check_settings(replace(config, **free), tmp_path)
    with pytest.raises(CallError, match=r"--batch-size 3 \(was 16\), --accumulate 2 \(was 1\)$"):
        checkpoint.check_settings(replace(config, batch_size=3, accumulate=2), tmp_path)


def test_the_command_to_go_on_with(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", "my photos", "--epochs", "3"])
    expected = "-m attncap.train --data 'my photos' --epochs 3 --resume"
    assert checkpoint.how_to_go_on() == f"python {expected}"
    sys.argv.append("--resume")
    assert checkpoint.how_to_go_on() == f"python {expected}"
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert checkpoint.how_to_go_on() == f"torchrun --nproc-per-node 4 {expected}"
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert checkpoint.how_to_go_on() == f"torchrun --nnodes 2 --nproc-per-node 4 ... {expected}"


@pytest.mark.parametrize(("number", "status"), [(2, 130), (15, 143)])
def test_a_signal_is_noted_or_raised(number, status):
    with Interruption() as interruption:
        os.kill(os.getpid(), number)
        assert interruption.number == number
        with pytest.raises(Stopped) as stopped, interruption.raised():
            raise AssertionError("asked before, so nothing is begun")
        assert stopped.value.code == status
    with Interruption() as interruption, pytest.raises(Stopped), interruption.raised():
        os.kill(os.getpid(), number)
