"""Grounding: whether a captioner looks at what it names. Measured on `shapes`, where the objects' boxes are known."""

import torch

from attncap.captioner import Caption
from attncap.data import subwords
from attncap.data.shapes import CANVAS, SHAPES, Scene

PLURALS = {shape + ("es" if shape == "cross" else "s"): shape for shape in SHAPES}


def grounding(scene: Scene, caption: Caption) -> tuple[float, float]:
    """Of the caption's words that name an object of the scene by size, colour and shape, the share whose attention
    peaks in a box of such an object; and by chance, the same for a peak in any cell, each as likely.

    The peak is the centre of the cell with the largest weight; a word in pieces looks where its first piece does.
    Phrases that name nothing in the scene do not count; where none does, both are 0.
    """
    words, peaks = caption.text.split(), caption.attention.flatten(1).argmax(dim=1)
    if words != caption.words:  # they are pieces
        peaks = peaks[subwords.first_pieces(caption.words)]
    rows, columns = caption.attention.shape[1:]
    y = (torch.arange(rows).unsqueeze(1) + 0.5) * CANVAS / rows
    x = (torch.arange(columns) + 0.5) * CANVAS / columns
    hits, chances = [], []
    for i in range(len(words) - 2):
        size, color, shape = words[i : i + 3]
        boxes = [thing.box for thing in scene.objects if thing.kind == (size, color, PLURALS.get(shape, shape))]
        if boxes:
            in_boxes = [(left <= x) & (x < right) & (top <= y) & (y < bottom) for left, top, right, bottom in boxes]
            inside = torch.stack(in_boxes).any(dim=0)
            hits += inside.flatten()[peaks[i : i + 3]].tolist()
            chances += [inside.float().mean().item()] * 3
    return sum(hits) / max(1, len(hits)), sum(chances) / max(1, len(hits))
