"""Grounding: whether a captioner looks at what it names. Measured on `shapes`, where the objects' boxes are known."""

from collections.abc import Iterable

import torch

from attncap.captioner import Caption
from attncap.data.shapes import CANVAS, SHAPES, Scene

PLURALS = {shape + ("es" if shape == "cross" else "s"): shape for shape in SHAPES}


def grounding(captions: Iterable[tuple[Scene, Caption]]) -> dict[str, float]:
    """Of the words that name an object of their scene by size, colour and shape, the share whose attention peaks in a
    box of such an object.

    The peak is the centre of the cell with the largest weight. Phrases that name nothing in the scene do not count.

    Returns:
        "grounded", that share, and "grounded by chance", the same for a peak in any cell, each as likely. Both are 0
        where no word counts.
    """
    hits, chances = [], []
    for scene, caption in captions:
        rows, columns = caption.attention.shape[1:]
        y = (torch.arange(rows).unsqueeze(1) + 0.5) * CANVAS / rows
        x = (torch.arange(columns) + 0.5) * CANVAS / columns
        for i in range(len(caption.words) - 2):
            size, color, shape = caption.words[i : i + 3]
            boxes = [thing.box for thing in scene.objects if thing.kind == (size, color, PLURALS.get(shape, shape))]
            if boxes:
                inside = torch.stack(
                    [(left <= x) & (x < right) & (top <= y) & (y < bottom) for left, top, right, bottom in boxes]
                ).any(dim=0)
                peaks = caption.attention[i : i + 3].flatten(1).argmax(dim=1)
                hits += inside.flatten()[peaks].tolist()
                chances += [inside.float().mean().item()] * 3
    count = max(1, len(hits))
    return {"grounded": sum(hits) / count, "grounded by chance": sum(chances) / count}
