import io
import json
import logging
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import largest_file
from matplotlib.figure import Figure
from PIL import Image

from attncap import Caption, UserError
from attncap.pictures import draw_curves
from attncap.training.run_logger import LOG_EVERY, RunLogger


def line(epoch: int, cider: float = 0.0, **others) -> dict:
    return {"epoch": epoch, "loss_words": 4 / epoch, "loss_attention": 0.5, "CIDEr": cider, "BLEU-4": 0.1, **others}


def lines(folder) -> list[dict]:
    return [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]


def board(folder):
    """What TensorBoard shows for a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder / "tensorboard")).Reload()


def points(folder, name: str) -> dict[int, float]:
    return {event.step: pytest.approx(event.value) for event in board(folder).Scalars(name)}


@pytest.fixture
def drawn(monkeypatch):
    """Collects the figures that are drawn."""
    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k))[1])
    return figures


def test_a_line_per_epoch_is_on_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.path.getsize(f"/proc/self/fd/{file}")))
    logger = RunLogger(tmp_path / "run", "CIDEr")
    for epoch in (1, 2, 3):
        logger.log_epoch(line(epoch))
        assert lines(tmp_path / "run") == [line(e) for e in range(1, epoch + 1)]
        assert (tmp_path / "run" / "metrics.jsonl").stat().st_size in synced
    logger.close()


def test_resumed_logs_continue_at_the_checkpoint(tmp_path):
    logger = RunLogger(tmp_path, "CIDEr")
    for epoch in (1, 2, 3):
        logger.log_epoch(line(epoch, cider=epoch / 10))
    logger.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 4, "loss_wo')
    logger = RunLogger(tmp_path, "CIDEr", epoch=2, step=200)
    assert lines(tmp_path) == [line(1, 0.1), line(2, 0.2)]
    logger.log_epoch(line(3, 0.7))
    assert lines(tmp_path) == [line(1, 0.1), line(2, 0.2), line(3, 0.7)]
    logger.close()
    RunLogger(tmp_path, "CIDEr").close()
    assert lines(tmp_path) == []  # a new run


@pytest.mark.parametrize(
    "text",
    ["[]", "7", "null", "{}", '{"epoch": "1"}', '{"epoch": 1, "CIDEr": "0.5"}', '{"epoch": 1, "CIDEr": NaN}', '{"epo']
    + [
        '{"epoch": 1, "CIDEr": null}',
        '{"epoch": true}',
        '{"epoch": 1, "loss_words": 1e999}',
        "[" * 100_000,
        "1" * 5000,
    ],
    ids=lambda text: text[:30],
)
def test_a_log_edited_by_hand(tmp_path, text):
    """The line is named, and nothing of the log is lost."""
    content = f"{json.dumps(line(1))}\n{text}\n{json.dumps(line(2))}\n"
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"metrics.jsonl: line 2 should be an object of numbers, .*; remove it"):
        RunLogger(tmp_path, "CIDEr", epoch=2)
    assert (tmp_path / "metrics.jsonl").read_text() == content


def test_a_log_that_cannot_be_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    os.mkfifo(path)
    with pytest.raises(UserError, match="metrics.jsonl: cannot be read: not a regular file"):
        RunLogger(tmp_path, "CIDEr", epoch=2)
    path.unlink()
    path.write_bytes(b" " * (16 * 2**20 + 1))
    with pytest.raises(UserError, match="metrics.jsonl: cannot be read: larger than 16 MiB"):
        RunLogger(tmp_path, "CIDEr", epoch=2)


def test_a_log_without_values_is_drawn(tmp_path, drawn):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": 2, "further": 1e29}\n')
    RunLogger(tmp_path, "CIDEr", epoch=2).close()
    assert len(drawn) == 1 and lines(tmp_path) == [{"epoch": 1}, {"epoch": 2, "further": 1e29}]


def test_curves(tmp_path, drawn):
    logger = RunLogger(tmp_path, "CIDEr")
    ciders = [0.2, 0.5, 0.4, 0.5]  # of equal ones the first is the best
    for epoch, cider in enumerate(ciders, start=1):
        late = {"encoder_learning_rate": 1e-5} if epoch > 2 else {}
        logger.log_epoch(line(epoch, cider, learning_rate=1e-3 / epoch, **late))
    logger.close()
    assert Image.open(tmp_path / "curves.png").size[0] >= 600
    loss, scores, rate = drawn[-1].axes
    for panel, title, unit, curves in (
        (loss, "Training loss", "loss", {"words (nats per word)": [4, 2, 4 / 3, 1], "attention penalty": [0.5] * 4}),
        (scores, "Validation metrics", "score", {"CIDEr": ciders, "BLEU-4": [0.1] * 4}),
        (
            rate,
            "Learning rate",
            "rate",
            {"decoder": [1e-3, 1e-3 / 2, 1e-3 / 3, 1e-3 / 4], "encoder": [None] * 2 + [1e-5] * 2},
        ),
    ):
        assert panel.get_title(loc="left") == title and panel.get_ylabel() == unit
        found = {curve.get_label(): curve for curve in panel.lines}
        assert found.keys() == {*curves, "best, epoch 2"}
        assert list(found["best, epoch 2"].get_xdata()) == [2, 2]
        for name, values in curves.items():
            expected = np.array(values, dtype=float)
            np.testing.assert_allclose(found[name].get_ydata(), expected)
            assert list(found[name].get_xdata()) == [1, 2, 3, 4]
        assert {text.get_text() for text in panel.get_legend().get_texts()} == found.keys()
        assert panel.get_ylim()[0] == 0
    assert rate.get_xlabel() == "epoch" and all(tick == int(tick) for tick in rate.get_xticks())


def test_curves_of_an_incomplete_log(drawn):
    """One epoch of an older run, whose log has no learning rates, with a negative loss as in self-critical training."""
    draw_curves([{"epoch": 1, "loss_words": -0.5}], 0)
    [panel] = drawn[-1].axes
    assert panel.get_ylim()[0] < -0.5


@pytest.mark.parametrize(("best_by", "best"), [("CIDEr", 1), ("BLEU-4", 2)])
def test_the_best_epoch_is_that_of_the_chosen_metric(tmp_path, drawn, best_by, best):
    logger = RunLogger(tmp_path, best_by)
    logger.log_epoch({"epoch": 1, "CIDEr": 0.5, "BLEU-4": 0.1})
    logger.log_epoch({"epoch": 2, "CIDEr": 0.4, "BLEU-4": 0.2})
    logger.close()
    assert f"best, epoch {best}" in {curve.get_label() for curve in drawn[-1].axes[0].lines}


def test_a_longer_run_has_no_more_to_draw(drawn):
    """Curves are one line each, whatever the number of epochs, so that drawing them takes no longer."""
    for epochs in (2, 100):
        draw_curves([line(epoch, learning_rate=1e-3) for epoch in range(1, epochs + 1)], 1)
    short, long = ([len(panel.get_children()) for panel in figure.axes] for figure in drawn)
    assert short == long


def test_tensorboard_has_steps_epochs_and_captions(tmp_path):
    logger = RunLogger(tmp_path, "CIDEr")
    assert logger.wants_captions
    caption = Caption("a dog", -1.0, ["a", "dog"], torch.full((2, 4, 4), 1 / 16))
    for step in range(2 * LOG_EVERY + 1):
        logger.log_step(step, {"loss/words": torch.tensor(5.0 - step / 100), "gradient_norm": 1.0 + step})
    logger.log_epoch(line(1, 0.25))
    logger.log_captions([(Image.new("RGB", (50, 40)), caption)])
    shown = board(tmp_path)  # before it is closed
    logger.close()
    assert points(tmp_path, "loss/words") == {
        0: 5.0,
        LOG_EVERY: 5 - LOG_EVERY / 100,
        2 * LOG_EVERY: 5 - 2 * LOG_EVERY / 100,
    }
    assert points(tmp_path, "gradient_norm") == {step: 1.0 + step for step in (0, LOG_EVERY, 2 * LOG_EVERY)}
    assert points(tmp_path, "epoch/CIDEr") == {2 * LOG_EVERY: 0.25}
    [event] = shown.Images("captions")
    picture = Image.open(io.BytesIO(event.encoded_image_string))
    assert event.step == 2 * LOG_EVERY and picture.width > 500 and len(picture.getcolors(10**6)) > 50


def test_tensorboard_continues_at_the_checkpoint(tmp_path):
    """A run of 50 steps per epoch is killed in its third epoch, after logging it, and resumed after the second."""
    for first, value in ((0, 1.0), (2, 2.0)):
        logger = RunLogger(tmp_path, "CIDEr", epoch=first, step=50 * first)
        for epoch in range(first, 3 if first == 0 else 4):
            for step in range(50 * epoch, 50 * (epoch + 1)):
                logger.log_step(step, {"loss": value})
            logger.log_epoch(line(epoch + 1, value))
        logger.close()
        if first == 0:
            time.sleep(1.1)  # TensorBoard orders its files by their time in seconds
    written = [step for step in range(200) if step % LOG_EVERY == 0]
    assert points(tmp_path, "loss") == {step: 1.0 if step < 100 else 2.0 for step in written}
    assert points(tmp_path, "epoch/CIDEr") == {49: 1.0, 99: 1.0, 149: 2.0, 199: 2.0}
    assert len(board(tmp_path).Scalars("epoch/CIDEr")) == 4 and len(board(tmp_path).Scalars("loss")) == len(written)


class Counted:
    """A number that counts how often it is read; reading a tensor on a GPU makes the CPU wait."""

    count = 0

    def __float__(self) -> float:
        self.count += 1
        return 1.0


def test_tensors_are_seldom_read(tmp_path):
    logger, number = RunLogger(tmp_path, "CIDEr"), Counted()
    for step in range(10 * LOG_EVERY):
        logger.log_step(step, {"loss": number})
    logger.close()
    assert number.count == 10


def test_without_tensorboard(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    logger = RunLogger(tmp_path, "CIDEr")
    assert not logger.wants_captions
    logger.log_step(0, {"loss": 1.0})
    logger.log_epoch(line(1))
    logger.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]
    assert not caplog.records


def test_a_tensorboard_that_cannot_be_imported(tmp_path, monkeypatch, caplog):
    class Broken:
        def __getattr__(self, name):
            raise TypeError("Descriptors cannot be created directly.\nregenerate your protos")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", Broken())
    with caplog.at_level(logging.WARNING):
        RunLogger(tmp_path, "CIDEr").log_epoch(line(1))
    assert "TensorBoard is left out, it cannot be imported: Descriptors cannot be created" in caplog.text
    assert lines(tmp_path) == [line(1)]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        RunLogger(tmp_path / "file", "CIDEr")
    logger = RunLogger(tmp_path / "run", "CIDEr")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    (tmp_path / "run" / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*metrics.jsonl"):
        logger.log_epoch(line(1))
    logger.close()


@pytest.mark.parametrize("fault", ["a full disk", "its folder is gone"])
def test_a_run_goes_on_without_its_pictures(tmp_path, caplog, fault):
    """TensorBoard's file and the curves are not worth ending a run for; each is reported once."""
    logger = RunLogger(tmp_path, "CIDEr")
    if fault == "a full disk":
        (tmp_path / "curves.png").mkdir()
        with largest_file(200):
            for step in range(10 * LOG_EVERY):
                logger.log_step(step, {"loss": 1.0})
    else:
        shutil.rmtree(tmp_path / "tensorboard")
        logger.log_step(0, {"loss": 1.0})
    assert not logger.wants_captions
    logger.log_step(0, {"loss": 1.0})
    logger.log_epoch(line(1))
    logger.close()
    assert lines(tmp_path) == [line(1)]
    reason = "File too large" if fault == "a full disk" else "No such file or directory"
    board, *curves = caplog.messages
    assert board.startswith(f"nothing more is logged to TensorBoard: cannot write {tmp_path}/tensorboard/events.out.")
    assert board.endswith(reason)
    assert curves == ([f"cannot write {tmp_path}/curves.png: Is a directory"] if fault == "a full disk" else [])


def test_a_full_disk_keeps_the_lines_before(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    logger = RunLogger(tmp_path, "CIDEr")
    logger.log_epoch(line(1))
    with largest_file(150), pytest.raises(UserError, match="cannot write .*metrics.jsonl: File too large"):
        logger.log_epoch(line(2))
    assert lines(tmp_path) == [line(1)]


def test_a_removed_folder_is_not_made_again(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    logger = RunLogger(tmp_path / "run", "CIDEr")
    logger.log_epoch(line(1))
    shutil.rmtree(tmp_path / "run")
    logger.close()
    assert not (tmp_path / "run").exists()


def test_nothing_slow_is_imported_before_it_is_needed():
    slow = {"matplotlib", "tensorboard", "tensorflow"}
    script = f"import sys, attncap.training.run_logger; print({slow} & sys.modules.keys())"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"
