"""What one watches a run by: metrics.jsonl, the picture of its curves, and TensorBoard where it is installed."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from attncap.captioner import Caption
from attncap.errors import UserError
from attncap.files import write_atomically
from attncap.pictures import draw_attention, draw_curves

EVERY = 20  # steps between two points of TensorBoard's curves

log = logging.getLogger("attncap")


class Watch:
    """The log of a run in the folder `output`: metrics.jsonl has a line an epoch, curves.png shows them, and
    tensorboard/ has the steps too, where TensorBoard is installed.

    `epoch` and `step` are those that were done when the checkpoint was written that the run goes on from: what the log
    has beyond them goes, and the curves go on. `best_by` is the figure that decides which epoch is the best; between
    equals BLEU-4 and ROUGE-L do, and then the earlier one is.
    """

    def __init__(self, output: Path, best_by: str, epoch: int = 0, step: int = 0):
        self.output, self.best_by, self.last = output, best_by, step - 1
        self.lines = _read(output / "metrics.jsonl", epoch)
        write_atomically(output / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.lines))
        self.board = _open_board(output / "tensorboard", step)

    @property
    def wants_pictures(self) -> bool:
        """Whether there is a place for `pictures`."""
        return self.board is not None

    def step(self, step: int, scalars: Mapping[str, float | Tensor]) -> None:
        """Note figures after step number `step`, from 0 on over the whole run. Tensors are asked for their values only
        in steps that are written, so that a GPU seldom has to wait."""
        self.last = step
        if self.board and step % EVERY == 0:
            for name, value in scalars.items():
                self.board.add_scalar(name, float(value), step)

    def epoch(self, line: Mapping[str, float]) -> None:
        """Write the figures of an epoch, "epoch" among them, which counts from 1, or is 0 for the model that a run
        starts from; they are on the disk when this returns."""
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
                self.board.add_scalar(f"epoch/{name}", value, self.last)
            self.board.flush()

    def pictures(self, captioned: Sequence[tuple[Image.Image, Caption]]) -> None:
        """Show images with their captions in TensorBoard, where `wants_pictures`. It takes seconds to draw them."""
        picture = np.asarray(Image.open(io.BytesIO(draw_attention(captioned))).convert("RGB"))
        self.board.add_image("captions", picture, self.last, dataformats="HWC")
        self.board.flush()

    def close(self) -> None:
        """Draw the curves: at the end of the run, or where it was stopped."""
        if self.lines:
            write_atomically(self.output / "curves.png", draw_curves(self.lines, self._best()))
        if self.board:
            self.board.close()

    def _best(self) -> int:
        def rating(i: int) -> list[float]:
            return [self.lines[i].get(name, 0) for name in (self.best_by, "BLEU-4", "ROUGE-L")]

        return max(range(len(self.lines)), key=rating)


def _read(path: Path, epoch: int) -> list[dict]:
    """The lines of metrics.jsonl up to that epoch; one that was cut short as it was written is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, LookupError, TypeError):
            line = json.loads(text)
            if line["epoch"] <= epoch:
                lines.append(line)
    return lines


def _open_board(folder: Path, step: int):
    """A SummaryWriter that hides what the folder has from step number `step` on; None without TensorBoard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    except Exception as error:  # with a protobuf that does not fit it, the import raises nearly anything
        log.warning("TensorBoard is left out, it cannot be imported: %s", " ".join(str(error).split())[:200])
        return None
    return SummaryWriter(str(folder), purge_step=step)
