"""Runs that are ended at any moment, in any way, and resumed."""

import os
import random
import shutil
import signal
import time

import numpy as np
import pytest
import torch
import torchvision
from conftest import make_flickr8k
from PIL import Image
from running import (
    QUICK,
    assert_gone,
    assert_same_state,
    checkpoint,
    children,
    is_running,
    metrics,
    wait_for_checkpoints,
)
from safetensors.torch import load_file

from attncap import Captioner

pytestmark = pytest.mark.slow
EACH_STEP = "trainer.CHECKPOINT_EVERY = 0"  # a checkpoint after every step


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """48 images to train on, 6 steps an epoch. Noise makes crops of them differ; one cannot be read."""
    data = make_flickr8k(tmp_path_factory.mktemp("engine") / "data")
    for path in (data / "Images").iterdir():
        pixels = np.asarray(Image.open(path)).astype(int)
        pixels += np.random.default_rng(int(path.stem)).integers(-60, 60, pixels.shape)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    (data / "Images" / "007.png").write_bytes(b"broken")
    return data


# Everything that is random or changes within a run.
SETTINGS = [*QUICK, *"--scheduled-sampling 0.5 --fine-tune-after 1 --accumulate 2 --batch-size 4".split()]


@pytest.fixture(scope="module")
def whole(server, data, tmp_path_factory):
    """A run that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    running = server.start(folder / "log", ["--data", data, *SETTINGS, "--output", folder / "run"])
    assert running.status() == 0, running.text()
    return folder / "run"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_killed_at_random_moments(server, data, whole, tmp_path, name, workers):
    """Whenever a run is killed, --resume continues it to the same weights, bit for bit, as if it had not been
    interrupted; and none of its processes is left."""
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


def run(server, tmp_path, arguments, before="", **environment) -> tuple[int, str]:
    running = server.start(tmp_path / "log", arguments, before, **environment)
    return running.status(), running.text()


def test_images_seen_before_the_stop_are_not_read_again(server, data, tmp_path):
    arguments = ["--data", data, *SETTINGS, "--output", tmp_path / "run", "--epochs", 1]
    log = (
        "from attncap.data import Example\n"
        "whole, read = Example.image, open(sys.argv.pop(), 'a', 1)\n"
        "Example.image = lambda self: (read.write(self.name + '\\n'), whole(self))[1]\n"
    )
    stop = (
        "step, calls = trainer.Trainer.train_step, []\n"
        "def stopping(*arguments):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 3: os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return step(*arguments)\n"
        "trainer.Trainer.train_step = stopping\n"
    )
    status, text = run(server, tmp_path, [*arguments, tmp_path / "first"], log + stop)
    assert status == 143, text
    state = checkpoint(tmp_path / "run")
    assert (state["epoch"], state["step"]) == (0, 3)
    status, text = run(server, tmp_path, [*arguments, "--resume", tmp_path / "second"], log)
    assert status == 0, text
    first, second = ((tmp_path / name).read_text().split() for name in ("first", "second"))
    assert len(first) == 3 * 8  # three steps of two batches of four
    validation_and_test = 6 + 6 + 4  # the last for the picture of attention
    assert len(second) == 48 - len(first) + validation_and_test
    assert not set(first) & set(second)


def test_stopped_while_it_validates(server, data, whole, tmp_path):
    """The epoch is not trained again, and the temporary files of a killed process are removed."""
    arguments = ["--data", data, *SETTINGS, "--output", tmp_path / "run"]
    slow = (
        "def slow(*_, **__):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    __import__('time').sleep(60)\n"
        "trainer.evaluate = slow"
    )
    status, text = run(server, tmp_path, arguments, slow)
    state = checkpoint(tmp_path / "run")
    assert status == 143 and (state["epoch"], state["step"]) == (0, 6), text
    Captioner.from_pretrained(tmp_path / "run")  # usable as it is
    (tmp_path / "run" / ".checkpoint.pt.123.tmp").write_bytes(b"cut short")
    with open(tmp_path / "run" / "metrics.jsonl", "a") as log:
        log.write('{"epoch": 1, "loss_wo')  # and a line
    status, text = run(server, tmp_path, [*arguments, "--resume"])
    assert status == 0 and not list((tmp_path / "run").glob(".*.tmp")), text
    assert_same_state(checkpoint(whole), checkpoint(tmp_path / "run"))
    assert metrics(whole) == metrics(tmp_path / "run")


def test_killed_while_it_draws(server, data, tmp_path):
    """The epoch is on the disk before its pictures are drawn, which takes seconds."""
    arguments = ["--data", data, *SETTINGS, "--output", tmp_path / "run"]
    draw = (
        "run_logger._open_board = lambda *_: __import__('unittest.mock').mock.MagicMock()\n"
        "trainer.Trainer.captioned_examples = lambda _: os.kill(os.getpid(), signal.SIGKILL)"
    )
    status, text = run(server, tmp_path, arguments, draw)
    state = checkpoint(tmp_path / "run")
    assert status == -signal.SIGKILL and (state["epoch"], state["step"]) == (1, 0), text
    assert len(metrics(tmp_path / "run")) == 1


def test_a_second_signal_ends_it_at_once(server, data, tmp_path):
    slow = "trainer.Trainer.train_step = lambda *_: __import__('time').sleep(60)"
    running = server.start(tmp_path / "log", ["--data", data, *SETTINGS, "--output", tmp_path / "run"], slow)
    wait_for_checkpoints(tmp_path / "run", 0)
    time.sleep(0.3)
    os.kill(running.pid, signal.SIGINT)
    os.kill(running.pid, signal.SIGINT)  # the same one, sent on by a launcher
    time.sleep(1.2)
    assert is_running(running.pid)
    os.kill(running.pid, signal.SIGINT)
    assert running.status() == 130


def test_a_loss_that_is_nan_names_the_images(server, data, tmp_path):
    """All images of the batch; and the checkpoint stays the one from before."""
    spoil = (
        "step = trainer.Trainer.train_step\n"
        "def noted(self, losses, batches):\n"
        "    if self.step == 2:\n"
        "        names = [self.splits['train'][i].name for i in batches[1].indices]\n"
        "        open(sys.argv[-1] + '/names', 'w').write(', '.join(names))\n"
        "        batches[1].images = batches[1].images.float() * float('nan')\n"
        "    step(self, losses, batches)\n"
        "trainer.Trainer.train_step = noted\n" + EACH_STEP
    )
    arguments = ["--data", data, *SETTINGS, "--fine-tune-from", "none", "--output", tmp_path / "run"]
    status, text = run(server, tmp_path, arguments, spoil)
    names = (tmp_path / "run" / "names").read_text()
    assert status == 1 and f"for the images {names}; the last checkpoint" in text, text
    state = checkpoint(tmp_path / "run")
    assert state["step"] == 2 and all(value.isfinite().all() for value in state["model"].values())


def test_self_critical_training_from_a_trained_model(server, data, whole, tmp_path):
    """Under autocast, interrupted and resumed like any other run. Scheduled sampling has no effect: the model is fed
    what it has sampled."""
    arguments = ["--data", data, *SETTINGS, "--objective", "scst", "--start-from", whole]
    arguments += ["--samples", 3, "--precision", "bfloat16", "--epochs", 2, "--output"]
    status, text = run(server, tmp_path, [*arguments, tmp_path / "one", "--scheduled-sampling", 0])
    assert status == 0, text
    running = server.start(tmp_path / "log", [*arguments, tmp_path / "two"], EACH_STEP)
    wait_for_checkpoints(tmp_path / "two", 3)
    os.kill(running.pid, signal.SIGKILL)
    assert running.status() == -signal.SIGKILL
    status, text = run(server, tmp_path, [*arguments, tmp_path / "two", "--resume"])
    assert status == 0, text
    assert_same_state(checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two"))
    start, *lines = metrics(tmp_path / "one")
    assert start["epoch"] == 0 and start["CIDEr"] == max(line["CIDEr"] for line in metrics(whole))
    assert [line["epoch"] for line in lines] == [1, 2] and all(0 <= line["reward"] <= 10 for line in lines)
    start = load_file(whole / "model.safetensors")
    assert any(not value.equal(start[name]) for name, value in checkpoint(tmp_path / "one")["model"].items())


def test_features_from_the_cache(server, data, tmp_path):
    """The same run apart from half precision. The second run with the cache encodes nothing, and neither does a resumed
    one, whose encoder is that of its checkpoint."""
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "encoder.pth")
    frozen = ["--fine-tune-from", "none", "--no-augment", "--scheduled-sampling", 0, "--dropout", 0, "--epochs", 2]
    frozen += ["--encoder-weights", tmp_path / "encoder.pth"]
    arguments = ["--data", data, *SETTINGS, *frozen, "--output"]
    texts = []
    for name, flags in (("plain", []), ("first", ["--cache-features"]), ("second", ["--cache-features"])):
        status, text = run(server, tmp_path, [*arguments, tmp_path / name, *flags], XDG_CACHE_HOME=tmp_path / "cache")
        assert status == 0, text
        texts.append(text)
    assert ["writing features" in text for text in texts] == [False, True, False]
    plain, first, second = (metrics(tmp_path / name) for name in ("plain", "first", "second"))
    assert first == second
    for one, other in zip(plain, first, strict=True):
        assert other["loss_words"] == pytest.approx(one["loss_words"], rel=1e-2)
    further = [*arguments, tmp_path / "first", "--cache-features", "--resume", "--epochs", 3]
    status, text = run(server, tmp_path, further, XDG_CACHE_HOME=tmp_path / "cache")
    assert status == 0 and "writing features" not in text, text


def test_early_stopping(server, data, tmp_path):
    """Nothing is learned, so no epoch after the first is an improvement."""
    still = ["--learning-rate", 0, "--encoder-learning-rate", 0, "--fine-tune-from", "none"]
    arguments = ["--data", data, *SETTINGS, *still, "--epochs", 9, "--patience", 2, "--output", tmp_path / "run"]
    status, text = run(server, tmp_path, arguments)
    assert status == 0 and "test split" in text, text
    assert [line["epoch"] for line in metrics(tmp_path / "run")] == [1, 2, 3]


STOP = """
step, calls = trainer.Trainer.train_step, []
def stopping(*arguments):
    calls.append(1)
    if len(calls) == 8: os.kill(os.getpid(), signal.SIGTERM)
    return step(*arguments)
trainer.Trainer.train_step = stopping
"""


def test_a_run_keeps_its_order_splits_and_vocabulary(server, data, whole, tmp_path):
    """The rows of the table are in another order, which would give other splits and word ids."""
    copy = shutil.copytree(data, tmp_path / "data")
    arguments = ["--data", copy, *SETTINGS, "--output", tmp_path / "run"]
    status, text = run(server, tmp_path, arguments, STOP)
    assert status == 143, text
    head, *lines = (copy / "captions.txt").read_text().splitlines()
    pairs = [lines[i : i + 2] for i in range(0, len(lines), 2)]
    (copy / "captions.txt").write_text("\n".join([head, *(line for pair in reversed(pairs) for line in pair)]) + "\n")
    status, text = run(server, tmp_path, [*arguments, "--resume"])
    assert status == 0 and "images that are new in the train split, where the run does not use them" in text, text
    assert_same_state(checkpoint(whole), checkpoint(tmp_path / "run"))
    assert metrics(whole) == metrics(tmp_path / "run")


def test_captions_edited_before_a_resume(server, data, tmp_path):
    """A new word is now the most frequent one, so every word would get another id."""
    copy = shutil.copytree(data, tmp_path / "data")
    arguments = ["--data", copy, *SETTINGS, "--output", tmp_path / "run"]
    status, text = run(server, tmp_path, arguments, STOP)
    assert status == 143, text
    vocabulary = (tmp_path / "run" / "vocabulary.json").read_bytes()
    table = copy / "captions.txt"
    table.write_text(table.read_text().replace("picture", "photograph"))
    status, text = run(server, tmp_path, [*arguments, "--resume"])
    assert status == 0 and "images of the train split whose captions have changed since the run began: 48 (" in text
    share = 2 / len("a red photograph a photograph all red".split())
    assert f"of the words in the training captions; {share:.2%} are unknown" in text, text
    assert (tmp_path / "run" / "vocabulary.json").read_bytes() == vocabulary


def test_a_disk_that_fills_up(server, data, whole, tmp_path):
    """The run ends with the cause and the command that continues it, and the last checkpoint is whole."""
    full = (
        "import resource\n"
        "save, calls = trainer.checkpoint.save, []\n"
        "def full(*arguments):\n"
        "    calls.append(1)\n"
        "    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 if len(calls) == 3 else hard, hard))\n"
        "    try: save(*arguments)\n"
        "    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))\n"
        "trainer.checkpoint.save = full\n"
    )
    arguments = ["--data", data, *SETTINGS, "--output", tmp_path / "run"]
    status, text = run(server, tmp_path, arguments, full)
    error = f"attncap: error: cannot write {tmp_path}/run/checkpoint.pt: File too large; the best model so far is in "
    assert status == 1 and text.splitlines()[-1].startswith(error), text
    assert "; continue with: python -m attncap.train --data" in text and text.endswith(" --resume\n")
    assert checkpoint(tmp_path / "run")["epoch"] == 1 and not list((tmp_path / "run").glob(".*"))
    status, text = run(server, tmp_path, [*arguments, "--resume"])
    assert status == 0, text
    assert_same_state(checkpoint(whole), checkpoint(tmp_path / "run"))


def test_images_that_go_away(server, data, whole, tmp_path):
    """Nothing is trained or kept without them, and the run continues when they are back."""
    copy = shutil.copytree(data, tmp_path / "data")
    arguments = ["--data", copy, *SETTINGS, "--output", tmp_path / "run"]
    move = f"import shutil\nshutil.move('{copy}/Images', '{copy}/gone')"
    status, text = run(
        server, tmp_path, arguments, STOP.replace("os.kill(os.getpid(), signal.SIGTERM)", move.replace("\n", "; "))
    )
    error = "attncap: error: none of the images to be scored could be read; the best model so far is in"
    assert status == 1 and text.splitlines()[-1].startswith(error), text
    assert checkpoint(tmp_path / "run")["epoch"] == 1
    shutil.move(copy / "gone", copy / "Images")
    status, text = run(server, tmp_path, [*arguments, "--resume"])
    assert status == 0, text
    assert_same_state(checkpoint(whole), checkpoint(tmp_path / "run"))


def test_images_in_a_row_that_cannot_be_read(server, tmp_path):
    """The run ends before the epoch does."""
    data = make_flickr8k(tmp_path / "data", 300)
    gone = f"import shutil; run.inputs.save = lambda *_: shutil.move('{data}/Images', '{data}/gone')"
    status, text = run(server, tmp_path, ["--data", data, *QUICK, "--output", tmp_path / "run"], gone)
    error = "attncap: error: none of the last 104 training images could be read; are they still there?; continue with"
    assert status == 1 and text.splitlines()[-1].startswith(error), text


def test_two_runs_in_one_folder(server, data, whole, tmp_path):
    """The second one ends, whether new or resumed, and the first does not notice."""
    arguments = ["--data", data, *SETTINGS, "--output", tmp_path / "run"]
    first = server.start(tmp_path / "first", [*arguments, "--workers", 1], EACH_STEP)
    wait_for_checkpoints(tmp_path / "run", 1)
    os.kill(first.pid, signal.SIGSTOP)  # or it might end before the second begins
    expected = f"attncap: error: {tmp_path}/run: another run is writing to it (process {first.pid})\n"
    for flags in ([], ["--resume"]):
        assert run(server, tmp_path, [*arguments, *flags]) == (1, expected)
    os.kill(first.pid, signal.SIGCONT)
    assert first.status() == 0, first.text()
    assert_same_state(checkpoint(whole), checkpoint(tmp_path / "run"))


def test_a_folder_that_is_removed(server, data, tmp_path):
    """It is not created again with only some of a run's files."""
    remove = STOP.replace("os.kill(os.getpid(), signal.SIGTERM)", "__import__('shutil').rmtree(sys.argv[-1])")
    status, text = run(server, tmp_path, ["--data", data, *SETTINGS, "--output", tmp_path / "run"], remove)
    error = f"attncap: error: {tmp_path}/run: the folder was removed or replaced while this run was writing to it"
    assert status == 1 and text.splitlines()[-1] == error, text
    assert not (tmp_path / "run").exists()


def test_a_failed_test_does_not_lose_the_run(server, data, tmp_path):
    """Nor does a deleted best model."""
    fail = "def fail(*_): raise MemoryError('no memory')\nrun.evaluate_test_split = fail"
    arguments = ["--data", data, *SETTINGS, "--output", tmp_path / "run", "--epochs", 1]
    status, text = run(server, tmp_path, arguments, fail)
    error = f"attncap: error: MemoryError: no memory; the best model so far is in {tmp_path}/run; continue with: python"
    assert status == 1 and text.splitlines()[-1].startswith(error), text
    Captioner.from_pretrained(tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    status, text = run(server, tmp_path, [*arguments, "--resume"])
    assert status == 0 and "the best model is missing; that of the last checkpoint takes its place" in text, text
    Captioner.from_pretrained(tmp_path / "run")
