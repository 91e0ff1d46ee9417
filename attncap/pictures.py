"""Pictures of results: captions with their attention, and the curves of a run. Matplotlib is slow to import, so it is
imported only when something is drawn."""

from __future__ import annotations

import functools
import io
import logging
import math
import textwrap
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from attncap.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontEntry

    from attncap.captioner import Caption

# The panels of a run's curves: title, unit, and the label of each value in metrics.jsonl.
PANELS = (
    ("Training loss", "loss", {"loss_words": "words (nats per word)", "loss_attention": "attention penalty"}),
    ("Validation metrics", "score", {"CIDEr": "CIDEr", "BLEU-4": "BLEU-4"}),
    ("Learning rate", "rate", {"learning_rate": "decoder", "encoder_learning_rate": "encoder"}),
)
COLUMNS = 6
MAX_WORDS = 10 * COLUMNS - 1  # of a caption that are drawn, in ten rows with the image
MAX_LETTERS = 20  # of a word above its panel
PANEL = 320  # pixels, more than a panel shows; drawing a photograph in full size would take seconds per word


log = logging.getLogger("attncap")


def save_attention(path: str | Path, captioned: Sequence[tuple[Image.Image, Caption]]) -> None:
    """Draw the attention (see `draw_attention`) and write the PNG to a file (see `save`)."""
    save(path, lambda: draw_attention(captioned))


def save(path: str | Path, draw: Callable[[], bytes]) -> None:
    """Write a picture to a file, if `try_to_draw` gives one. Raises UserError if the file cannot be written."""
    picture = try_to_draw(path, draw)
    if picture is not None:
        write_atomically(Path(path), picture)


def try_to_draw(name: str | Path, draw: Callable[[], bytes]) -> bytes | None:
    """The result of `draw`, or None and a warning if that fails: drawing depends on the user's fonts and settings of
    matplotlib, and the results that a picture illustrates are worth more."""
    try:
        return draw()
    except Exception as error:
        log.warning("%s: cannot be drawn: %s: %s", name, type(error).__name__, error)
        return None


def draw_attention(captioned: Sequence[tuple[Image.Image, Caption]]) -> bytes:
    """A PNG of each image with its caption, followed by one panel per word with its attention as a heat map over the
    image, as in figure 5 of Xu et al. 2015. The heat is relative to the maximum of the word's own attention. Words
    after the first MAX_WORDS, and long ones, are cut."""
    from matplotlib.figure import Figure

    heights = [math.ceil((min(len(caption.words), MAX_WORDS) + 1) / COLUMNS) for _, caption in captioned]
    figure = Figure(figsize=(2 * COLUMNS, 2.25 * sum(heights)), layout="constrained", dpi=80)
    rows = figure.subfigures(len(captioned), 1, height_ratios=heights, squeeze=False)[:, 0]
    for row, height, (image, caption) in zip(rows, heights, captioned, strict=True):
        panels = row.subplots(height, COLUMNS, squeeze=False).ravel()
        for panel in panels:
            panel.axis("off")
        image = image.copy()
        image.thumbnail((PANEL, PANEL))
        title = textwrap.fill(_drawable(caption.text), 75, max_lines=4, placeholder=" …")
        row.suptitle(title, fontsize=11, family=_families(title), parse_math=False)
        panels[0].imshow(image)
        attention = np.nan_to_num(np.asarray(caption.attention, dtype=np.float32))
        for panel, word, weights in zip(panels[1:], caption.words[:MAX_WORDS], attention, strict=False):
            heat = Image.fromarray(weights / max(weights.max(), 1e-9)).resize(image.size, Image.Resampling.BICUBIC)
            heat = np.asarray(heat).clip(0, 1)
            panel.imshow(np.asarray(image) // 2)
            panel.imshow(heat, cmap="inferno", alpha=0.8 * heat, vmin=0, vmax=1)
            word = _drawable(word if len(word) <= MAX_LETTERS else f"{word[:MAX_LETTERS]}…")
            panel.set_title(word, fontsize=10, family=_families(word), parse_math=False)
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
    figure.savefig(buffer, format="png", dpi="figure")
    return buffer.getvalue()


def _drawable(text: str) -> str:
    """The text without control characters and the like, and with □ for characters that no installed font has."""
    text = "".join(char for char in " ".join(text.split()) if unicodedata.category(char)[0] != "C")
    for char in sorted(set(text)):
        if _family(char) is None:
            text = text.replace(char, "□")
            letter = unicodedata.category(char)[0] in "LM"  # the names of these begin with that of their script
            _report_missing(unicodedata.name(char, "unnamed").split()[0] if letter else "symbol")
    return text


@functools.cache  # once for each script
def _report_missing(script: str) -> None:
    log.warning("pictures show □ for %s characters, which no installed font has; Noto Sans has fonts for them", script)


def _families(text: str) -> list[str]:
    """The fonts for the characters of a text, the default one first. Matplotlib takes each character from the first
    font that has it."""
    return list(dict.fromkeys(["DejaVu Sans", *filter(None, map(_family, sorted(set(text))))]))


@functools.lru_cache(maxsize=2**16)
def _family(char: str) -> str | None:
    """The name of an installed font that has the character, DejaVu Sans where it does."""
    from matplotlib.font_manager import fontManager

    fonts = sorted(fontManager.ttflist, key=lambda font: (font.name != "DejaVu Sans", font.weight != 400, font.name))
    return next((font.name for font in fonts if ord(char) in _characters(font)), None)


@functools.cache
def _characters(font: FontEntry) -> frozenset[int]:
    """The code points that a font has; none for one that cannot be read or has bitmaps only, such as those of emoji."""
    from matplotlib.font_manager import get_font

    if font.name.startswith("Last Resort"):  # has a placeholder for every character
        return frozenset()
    try:
        face = get_font(font.fname)
    except (OSError, RuntimeError):
        return frozenset()
    return frozenset(face.get_charmap()) if face.scalable else frozenset()
