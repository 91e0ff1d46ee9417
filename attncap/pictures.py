"""Pictures of results: captions with the places the model looked at."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from attncap.captioner import Caption
from attncap.files import write_atomically

COLUMNS = 6
PANEL = 320  # pixels, more than a panel shows: a photograph in full size would cost seconds a word


def save_attention(path: str | Path, captioned: Sequence[tuple[Image.Image, Caption]]) -> None:
    """Write a PNG: each image with its caption, then a panel a word with the word's attention as a heat map over the
    image, as in figure 5 of Xu et al. 2015. Brightness is relative to the word's own peak."""
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
        for panel, word, attention in zip(panels[1:], caption.words, caption.attention, strict=False):
            heat = Image.fromarray((attention / attention.max()).numpy()).resize(image.size, Image.Resampling.BICUBIC)
            heat = np.asarray(heat).clip(0, 1)
            panel.imshow(np.asarray(image) // 2)
            panel.imshow(heat, cmap="inferno", alpha=0.8 * heat, vmin=0, vmax=1)
            panel.set_title(word, fontsize=10, parse_math=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(Path(path), buffer.getvalue())
