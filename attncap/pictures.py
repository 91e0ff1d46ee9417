"""Pictures of results: captions with their attention, and the curves of a run. Matplotlib is slow to import, so it is
imported only when something is drawn."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from attncap.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from attncap.captioner import Caption

# The panels of a run's curves: title, unit, and the label of each value in metrics.jsonl.
PANELS = (
    ("Training loss", "loss", {"loss_words": "words (nats per word)", "loss_attention": "attention penalty"}),
    ("Validation metrics", "score", {"CIDEr": "CIDEr", "BLEU-4": "BLEU-4"}),
    ("Learning rate", "rate", {"learning_rate": "decoder", "encoder_learning_rate": "encoder"}),
)
COLUMNS = 6
PANEL = 320  # pixels, more than a panel shows; drawing a photograph in full size would take seconds per word


def save_attention(path: str | Path, captioned: Sequence[tuple[Image.Image, Caption]]) -> None:
    """Write the PNG of `draw_attention`. Raises UserError if the file cannot be written."""
    write_atomically(Path(path), draw_attention(captioned))


def draw_attention(captioned: Sequence[tuple[Image.Image, Caption]]) -> bytes:
    """A PNG of each image with its caption, followed by one panel per word with its attention as a heat map over the
    image, as in figure 5 of Xu et al. 2015. The heat is relative to the maximum of the word's own attention."""
    from matplotlib.figure import Figure

    heights = [math.ceil((len(caption.words) + 1) / COLUMNS) for _, caption in captioned]
    figure = Figure(figsize=(2 * COLUMNS, 2.25 * sum(heights)), layout="constrained", dpi=80)
    rows = figure.subfigures(len(captioned), 1, height_ratios=heights, squeeze=False)[:, 0]
    for row, height, (image, caption) in zip(rows, heights, captioned, strict=True):
        panels = row.subplots(height, COLUMNS, squeeze=False).ravel()
        for panel in panels:
            panel.axis("off")
        image = image.copy()
        image.thumbnail((PANEL, PANEL))
        row.suptitle(caption.text, fontsize=11, parse_math=False)
        panels[0].imshow(image)
        attention = np.asarray(caption.attention, dtype=np.float32)
        for panel, word, weights in zip(panels[1:], caption.words, attention, strict=False):
            heat = Image.fromarray(weights / weights.max()).resize(image.size, Image.Resampling.BICUBIC)
            heat = np.asarray(heat).clip(0, 1)
            panel.imshow(np.asarray(image) // 2)
            panel.imshow(heat, cmap="inferno", alpha=0.8 * heat, vmin=0, vmax=1)
            panel.set_title(word, fontsize=10, parse_math=False)
    return _png(figure)


def draw_curves(epochs: Sequence[Mapping[str, float]], best: int) -> bytes:
    """A PNG of the curves of a run, with one panel each for the losses, validation metrics and learning rates that the
    run has.

    Args:
        epochs: the lines of the run's metrics.jsonl.
        best: index of the best epoch, which is marked.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    numbers = [line["epoch"] for line in epochs]
    present = [
        (title, unit, {label: [line.get(name, math.nan) for line in epochs] for name, label in found.items()})
        for title, unit, names in PANELS
        if (found := {name: label for name, label in names.items() if any(name in line for line in epochs)})
    ] or [("No values", "", {})]
    figure = Figure(figsize=(7, 0.5 + 2.4 * len(present)), layout="constrained", dpi=100)
    panels = figure.subplots(len(present), 1, sharex=True, squeeze=False)[:, 0]
    for panel, (title, unit, curves) in zip(panels, present, strict=True):
        for label, values in curves.items():
            panel.plot(numbers, values, marker="o", markersize=3, label=label)
        panel.axvline(numbers[best], color="grey", linestyle="--", linewidth=1, label=f"best, epoch {numbers[best]}")
        panel.set_title(title, loc="left", fontsize=11)
        panel.set_ylabel(unit)
        if panel.dataLim.ymin >= 0:
            panel.set_ylim(bottom=0)
        panel.ticklabel_format(axis="y", scilimits=(-3, 4), useMathText=True)
        panel.grid(alpha=0.3)
        panel.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    panels[-1].set_xlabel("epoch")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
