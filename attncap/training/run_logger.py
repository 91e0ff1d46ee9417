"""The log of a run: metrics.jsonl, the picture of its curves, and TensorBoard where it is installed."""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from torch import Tensor

from attncap.captioner import Caption
from attncap.errors import UserError
from attncap.files import read_text, write_atomically
from attncap.pictures import draw_attention, draw_curves

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

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
        write_atomically(output / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.lines))
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
            for name, value in scalars.items():
                self.board.add_scalar(name, float(value), step)

    def log_epoch(self, line: Mapping[str, float]) -> None:
        """Log the values of an epoch. "epoch" is one of them; it counts from 1, and is 0 for the model that a run
        starts from. They are on the disk when this returns."""
        self.lines.append(dict(line))
        path = self.output / "metrics.jsonl"
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(self.lines[-1]) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        if self.board:
            for name, value in line.items():
                self.board.add_scalar(f"epoch/{name}", value, self.last_step)
            self.board.flush()

    def log_captions(self, captioned: Sequence[tuple[Image.Image, Caption]]) -> None:
        """Show images with their captions and attention in TensorBoard, if `wants_captions`. Drawing takes seconds."""
        picture = np.asarray(Image.open(io.BytesIO(draw_attention(captioned))).convert("RGB"))
        self.board.add_image("captions", picture, self.last_step, dataformats="HWC")
        self.board.flush()

    def close(self) -> None:
        """Draw the curves: at the end of the run, or where it was stopped."""
        if self.lines:
            write_atomically(self.output / "curves.png", draw_curves(self.lines, self._best()))
        if self.board:
            self.board.close()

    def _best(self) -> int:
        """The index of the best epoch's line."""

        def rating(i: int) -> list[float]:
            return [self.lines[i].get(name, 0) for name in (self.best_by, "BLEU-4", "ROUGE-L")]

        return max(range(len(self.lines)), key=rating)


def _read(path: Path, epoch: int) -> list[dict]:
    """The lines of metrics.jsonl up to that epoch. The last one is left out if it was cut short while it was written.
    Raises UserError, which names the line, for any other line that is not one of epoch's numbers."""
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


def _open_board(folder: Path, step: int) -> SummaryWriter | None:
    """A SummaryWriter that hides what the folder has from step number `step` on; None without TensorBoard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    except Exception as error:  # with an incompatible protobuf, the import raises nearly anything
        log.warning("TensorBoard is left out, it cannot be imported: %s", " ".join(str(error).split())[:200])
        return None
    return SummaryWriter(str(folder), purge_step=step)
