"""Grounding: whether a captioner looks at the objects it names. Measured on `shapes`, where the objects' boxes are
known."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from attncap.data import subwords
from attncap.data.shapes import CANVAS, SHAPES, Scene

if TYPE_CHECKING:
    from attncap.captioner import Caption

PLURALS = {shape + ("es" if shape == "cross" else "s"): shape for shape in SHAPES}


def grounding(scene: Scene, caption: Caption) -> tuple[float, float]:
    """The share of words whose attention peaks inside a box of the object they name, and the share expected by chance,
    with the peak equally likely in every cell.

    Only the words of a size, colour and shape that together name an object of the scene count. Without such words both
    shares are 0. The peak is the centre of the cell with the largest weight. A word that is split into pieces has the
    peak of its first piece.

    Args:
        caption: its `attention` is [words or pieces, rows, columns], an array or a tensor on the CPU.
    """
    attention = np.asarray(caption.attention)
    count, rows, columns = attention.shape
    words, peaks = caption.text.split(), attention.reshape(count, rows * columns).argmax(axis=1)
    if words != caption.words:  # they are pieces of words
        peaks = peaks[subwords.first_pieces(caption.words)]
    y = (np.arange(rows)[:, None] + 0.5) * CANVAS / rows
    x = (np.arange(columns) + 0.5) * CANVAS / columns
    hits, chances = [], []
    for i in range(len(words) - 2):
        size, color, shape = words[i : i + 3]
        boxes = [thing.box for thing in scene.objects if thing.kind == (size, color, PLURALS.get(shape, shape))]
        if boxes:
            inside = np.zeros((rows, columns), dtype=bool)
            for left, top, right, bottom in boxes:
                inside |= (left <= x) & (x < right) & (top <= y) & (y < bottom)
            hits += inside.ravel()[peaks[i : i + 3]].tolist()
            chances += [inside.mean()] * 3
    return sum(hits) / max(1, len(hits)), float(sum(chances)) / max(1, len(hits))
