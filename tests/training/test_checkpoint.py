import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import largest_file

from attncap.errors import CallError, UserError
from attncap.files import atomic_file, remove_temporary, write_atomically
from attncap.training import checkpoint, recipes
from attncap.training.config import training_seed
from attncap.training.signals import SignalHandler, Stopped
from attncap.versions import versions

STATE = {"model": {"w": torch.arange(3.0)}, "schedule": {"best": [0.5, 0.25], "lowered": 1.0}, "epoch": 2, "best": None}


def test_a_state_is_loaded_as_it_was_saved(tmp_path):
    checkpoint.save(tmp_path / "run", STATE)
    found = checkpoint.load(tmp_path / "run")
    assert found.pop("model")["w"].equal(STATE["model"]["w"])
    assert found == {name: value for name, value in STATE.items() if name != "model"}
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint.pt"]


def test_the_old_file_stays_until_the_new_one_is_on_the_disk(tmp_path, monkeypatch):
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


def test_the_limit_of_the_disk_is_named(tmp_path):
    """Rather than torch's own error, which follows it."""
    checkpoint.save(tmp_path, STATE)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with largest_file(100_000), pytest.raises(UserError) as caught:
        checkpoint.save(tmp_path, {"model": {"w": torch.zeros(100_000)}})
    assert str(caught.value) == f"cannot write {tmp_path / 'checkpoint.pt'}: File too large"
    assert (tmp_path / "checkpoint.pt").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_no_pickle_is_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"model": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="checkpoint.pt: cannot continue from it"):
        checkpoint.load(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_only_temporary_files_of_killed_processes_are_removed(tmp_path):
    with atomic_file(tmp_path / "model.safetensors") as file:
        left = Path(file.name).name
    for name in (left, ".hidden", "notes.tmp", ".notes.tmp", "model.safetensors"):
        (tmp_path / name).touch()
    remove_temporary(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".hidden", "notes.tmp", ".notes.tmp", "model.safetensors"}
    remove_temporary(tmp_path / "nowhere")


def test_settings_must_be_the_same(tmp_path):
    config = recipes.load("shapes")
    with pytest.raises(CallError, match="no run to continue in"):
        checkpoint.check_settings(config, tmp_path)
    write_atomically(tmp_path / "settings.json", json.dumps({"settings": asdict(config)}))
    free = {"epochs": 99, "resume": True, "workers": 3, "output": "elsewhere", "device": "cpu"}
    moved = replace(config, run=replace(config.run, **free), data=replace(config.data, path="moved"))
    checkpoint.check_settings(moved, tmp_path)
    other = replace(config, data=replace(config.data, batch_size=3), optimizer=replace(config.optimizer, accumulate=2))
    with pytest.raises(CallError, match=r"data\.batch_size=3 \(was 16\), optimizer\.accumulate=2 \(was 1\)$"):
        checkpoint.check_settings(other, tmp_path)


def test_the_sizes_of_the_model_that_a_run_started_from(tmp_path):
    """That model may have been removed or replaced. The flags that a user repeats do not have its sizes."""
    began = recipes.load("shapes")
    began = replace(began, run=replace(began.run, start_from="gone"), model=replace(began.model, hidden_size=48))
    write_atomically(tmp_path / "settings.json", json.dumps({"settings": asdict(began)}))
    asked = replace(began, model=recipes.load("shapes").model)
    assert checkpoint.check_settings(asked, tmp_path) == began


def test_other_versions_are_reported(tmp_path, caplog):
    config = recipes.load("shapes")
    content = {"settings": asdict(config), "versions": {**versions(), "pillow": "1.0", "torch": "2.0", "other": "1"}}
    write_atomically(tmp_path / "settings.json", json.dumps(content))
    checkpoint.check_settings(config, tmp_path)
    assert caplog.messages == [f"{tmp_path}: began with other versions, so results may differ: torch 2.0, pillow 1.0"]


def test_settings_edited_by_hand(tmp_path):
    config, path = recipes.load("shapes"), tmp_path / "settings.json"
    deep = json.loads("[" * 400 + "]" * 400)
    for change in ({"run": {"seed": deep}}, {"run": {"seed": {"a": 1}}}, {"run": {"seed": [[1]]}}, {"epochs": [deep]}):
        path.write_text(json.dumps({"settings": change}))
        with pytest.raises(CallError, match=r"cannot resume: .*settings.json: field '.*' should be a number, a string"):
            checkpoint.check_settings(config, tmp_path)
    path.write_text(json.dumps({"settings": {**asdict(config), "optimizer": {"name": "a\n" * 500, "unknown": 1}}}))
    with pytest.raises(CallError, match=r"optimizer.name=adamw \(was [a ]{80}\), optimizer.learning_rate") as raised:
        checkpoint.check_settings(config, tmp_path)
    assert str(raised.value).isprintable() and len(str(raised.value)) < 500
    for seed in (-1, 2**63, 10**300, True, 1.0):
        path.write_text(json.dumps({"settings": {"run": {"seed": seed}}}))
        with pytest.raises(UserError, match='field "seed" should be an integer from 0'):
            training_seed(tmp_path)
    path.write_text(" " * (2**20 + 1))
    with pytest.raises(UserError, match="larger than 1 MiB"):
        training_seed(tmp_path)


# What a version before the settings were nested wrote for a run of the recipe shapes.
FLAT = {
    "search": {"beam_size": 5, "method": "shrink", "max_length": 50, "length_penalty": "none"},
    "suppressed": "<unk>",
    "batch_size": 16,
    "workers": None,
    "device": "auto",
    "implementation": "native",
    "debug": False,
    "data": "shapes",
    "recipe": "shapes",
    "output": None,
    "objective": "cross-entropy",
    "epochs": 4,
    "captions_per_image": 2,
    "optimizer": "adamw",
    "learning_rate": 0.001,
    "encoder_learning_rate": 0.001,
    "schedule": "cosine",
    "label_smoothing": 0.0,
    "attention_penalty": 0.0,
    "augment": False,
    "encoder_weights": "none",
    "fine_tune_from": "all",
    "min_count": 1,
    "seed": 7,
    "resume": False,
    "model": {
        "encoder": "resnet18",
        "encoder_layer": "layer2",
        "image_size": 64,
        "attention_size": 128,
        "embedding_size": 128,
        "hidden_size": 256,
        "dropout": 0.1,
    },
}


def test_settings_of_older_versions(tmp_path):
    """They were flat, apart from those of the model and, later, of the search."""
    write_atomically(tmp_path / "settings.json", json.dumps({"settings": FLAT, "versions": {}}))
    shapes = recipes.load("shapes")
    config = replace(shapes, run=replace(shapes.run, seed=7, resume=True))
    checkpoint.check_settings(config, tmp_path)
    assert training_seed(tmp_path) == 7
    others = {
        "run.backend=torch (was native)": {"run": replace(config.run, backend="torch")},
        "search.suppressed=[] (was ['<unk>'])": {"search": replace(config.search, suppressed=())},
        "search.temperature=2.0 (was 1.0)": {"search": replace(config.search, temperature=2.0)},
        "optimizer.learning_rate=0.1 (was 0.001)": {"optimizer": replace(config.optimizer, learning_rate=0.1)},
        "encoder.learning_rate=0.1 (was 0.001)": {"encoder": replace(config.encoder, learning_rate=0.1)},
        "model.encoder=vgg16 (was resnet18)": {"model": replace(config.model, encoder="vgg16")},
        "schedule.name=constant (was cosine)": {"schedule": replace(config.schedule, name="constant")},
    }
    for message, change in others.items():
        with pytest.raises(CallError) as raised:
            checkpoint.check_settings(replace(config, **change), tmp_path)
        assert str(raised.value).endswith(f"began with other settings: {message}")


@pytest.mark.parametrize(("signum", "status"), [(1, 129), (2, 130), (15, 143)])
def test_a_signal_is_noted_or_raised(signum, status):
    with SignalHandler() as signals:
        os.kill(os.getpid(), signum)
        assert signals.signum == signum
        with pytest.raises(Stopped) as stopped, signals.raising():
            raise AssertionError("the signal came before, so the block does not begin")
        assert stopped.value.code == status
    with SignalHandler() as signals, pytest.raises(Stopped), signals.raising():
        os.kill(os.getpid(), signum)
