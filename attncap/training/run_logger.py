"""The log of a run: metrics.jsonl, the picture of its curves, and TensorBoard where it is installed."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from torch import Tensor

from attncap.captioner import Caption
from attncap.errors import UserError
from attncap.files import read_text, write_atomically
from attncap.pictures import draw_attention, draw_curves, save, try_to_draw

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event

MAX_LOG = 16 * 2**20  # bytes of metrics.jsonl; a line has about 400
LOG_EVERY = 20  # steps between two points of TensorBoard's curves

log = logging.getLogger("attncap")


class RunLogger:
    """Writes the log of a run to the folder `output`: a line per epoch to metrics.jsonl, its curves to curves.png, and,
    where TensorBoard is installed, the steps too to tensorboard/.

    Args:
        output: folder of the run.
        best_by: the metric that decides which epoch is marked as the best. Between equal ones BLEU-4 decides, then
            ROUGE-L, then the earlier epoch is the best.
        epoch, step: epochs and steps done in the checkpoint that the run continues from. What the log has after them is
            removed, and the curves continue from there.
    """

    def __init__(self, output: Path, best_by: str, epoch: int = 0, step: int = 0):
        self.output, self.best_by, self.last_step = output, best_by, step - 1
        self.lines = _read(output / "metrics.jsonl", epoch)
        self._write_lines()
        self.board = _open_board(output / "tensorboard", step)

    @property
    def wants_captions(self) -> bool:
        """Whether `log_captions` has somewhere to show them."""
        return self.board is not None

    def log_step(self, step: int, scalars: Mapping[str, float | Tensor]) -> None:
        """Log values after step number `step`, which counts from 0 over the whole run. Tensors are read only in steps
        that are logged, so that a GPU seldom has to wait."""
        self.last_step = step
        if self.board and step % LOG_EVERY == 0:
            with self._board_errors():
                self.board.add_scalars(step, {name: float(value) for name, value in scalars.items()})

    def log_epoch(self, line: Mapping[str, float]) -> None:
        """Log the values of an epoch. "epoch" is one of them; it counts from 1, and is 0 for the model that a run
        starts from. They are on the disk when this returns. Raises UserError when they cannot be written."""
        self.lines.append(dict(line))
        self._write_lines()
        if self.board:
            with self._board_errors():
                self.board.add_scalars(self.last_step, {f"epoch/{name}": value for name, value in line.items()})

    def log_captions(self, captioned: Sequence[tuple[Image.Image, Caption]]) -> None:
        """Show images with their captions and attention in TensorBoard, if `wants_captions`. Drawing takes seconds."""
        picture = try_to_draw("TensorBoard's picture of captions", lambda: draw_attention(captioned))
        if picture is not None:
            with self._board_errors():
                pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))
                self.board.add_image(self.last_step, "captions", pixels)

    def close(self) -> None:
        """Draw the curves: at the end of the run, or where it was stopped."""
        if self.lines and self.output.exists():
            try:
                save(self.output / "curves.png", lambda: draw_curves(self.lines, self._best()))
            except UserError as error:  # only a picture, and it must not hide an error that ended the run
                log.warning("%s", error)

    def _write_lines(self) -> None:
        write_atomically(self.output / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.lines))

    @contextlib.contextmanager
    def _board_errors(self) -> Iterator[None]:
        """A run goes on without TensorBoard when its file cannot be written."""
        try:
            yield
        except OSError as error:
            log.warning("nothing more is logged to TensorBoard: cannot write %s: %s", self.board.path, error.strerror)
            self.board = None

    def _best(self) -> int:
        """The index of the best epoch's line."""

        def rating(i: int) -> list[float]:
            return [self.lines[i].get(name, 0) for name in (self.best_by, "BLEU-4", "ROUGE-L")]

        return max(range(len(self.lines)), key=rating)


def _read(path: Path, epoch: int) -> list[dict]:
    """The lines of metrics.jsonl up to that epoch. The last one is left out if it was cut short while it was written.
    Raises UserError, naming the line, for any other line that is not an object of an epoch's numbers."""
    texts = read_text(path, MAX_LOG).splitlines() if path.exists() else []
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
            if number == len(texts):
                break
        if not isinstance(line, dict) or not all(map(_is_number, line.values())) or type(line.get("epoch")) is not int:
            raise UserError(f'{path}: line {number} should be an object of numbers, {{"epoch": 1, ...}}; remove it')
        if line["epoch"] <= epoch:
            lines.append(line)
    return lines


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30  # what can be drawn


class _EventFile:
    """An event file of TensorBoard. It hides the values from `step` on in earlier files of its folder. (torch's
    SummaryWriter writes in a thread of its own, where a full disk ends in a traceback.)"""

    def __init__(self, folder: Path, step: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard import summary

        self.event, self.records, self.summary = Event, RecordWriter, summary
        # TensorBoard reads the files of a folder in the order of their names.
        self.path = folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        folder.mkdir(parents=True, exist_ok=True)
        self.write(step, Event(file_version="brain.Event:2"), Event(session_log=SessionLog(status=SessionLog.START)))

    def add_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self.write(step, *(self.event(summary=self.summary.scalar(*scalar)) for scalar in scalars.items()))

    def add_image(self, step: int, name: str, picture: np.ndarray) -> None:
        """uint8 [H,W,3]"""
        self.write(step, self.event(summary=self.summary.image(name, picture, dataformats="HWC")))

    def write(self, step: int, *events: Event) -> None:
        """Raises OSError."""
        with open(self.path, "ab") as file:
            records = self.records(file)
            for event in events:
                event.step, event.wall_time = step, time.time()
                records.write(event.SerializeToString())


def _open_board(folder: Path, step: int) -> _EventFile | None:
    """None without TensorBoard."""
    try:
        return _EventFile(folder, step)
    except ImportError:
        return None
    except OSError as error:
        log.warning("TensorBoard is left out: cannot write %s: %s", folder, error.strerror)
    except Exception as error:  # with an incompatible protobuf, the import raises nearly anything
        log.warning("TensorBoard is left out, it cannot be imported: %s", " ".join(str(error).split())[:200])
    return None
