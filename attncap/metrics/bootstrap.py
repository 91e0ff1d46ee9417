"""How far figures can be trusted: the bootstrap over images (Efron and Tibshirani 1993, "An Introduction to the
Bootstrap", chapter 13), of corpus metrics and in pairs for two systems (Koehn 2004, "Statistical Significance Tests for
Machine Translation Evaluation")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from attncap.metrics import Scores

DRAWS = 1000
CHUNK = 50  # so many at a time: [DRAWS,I] would be large


@dataclass
class Difference:
    """One system's figure less the other's, its 95 % interval, and the share of draws in which it is above 0."""

    value: float
    low: float
    high: float
    above: float


def intervals(scores: Scores, seed: int = 0) -> dict[str, tuple[float, float]]:
    """The 95 % interval of each figure: the 2.5 and 97.5 percentiles over corpora of as many images, drawn with
    replacement. Captions and references of an image stay together."""
    [drawn] = _draw([scores], seed)
    return {name: tuple(np.percentile(values, [2.5, 97.5]).tolist()) for name, values in drawn.items()}


def compare(scores: Scores, others: Scores, seed: int = 0) -> dict[str, Difference]:
    """Each figure of `scores` less that of `others`, which must be of the same images in the same order; in every draw
    both have the same images."""
    assert scores.images == others.images
    drawn, drawn_others = _draw([scores, others], seed)
    figures, figures_others = scores.figures(), others.figures()
    differences = {}
    for name in (name for name in drawn if name in drawn_others):
        draws = drawn[name] - drawn_others[name]
        low, high = np.percentile(draws, [2.5, 97.5]).tolist()
        difference = figures[name] - figures_others[name]
        differences[name] = Difference(difference, low, high, float((draws > 0).mean()))
    return differences


def _draw(systems: list[Scores], seed: int) -> list[dict[str, np.ndarray]]:
    """The figures of each system in DRAWS corpora, the same ones for all."""
    rng, images = np.random.default_rng(seed), len(systems[0].images)
    chunks: list[list[dict[str, np.ndarray]]] = []
    for _ in range(0, DRAWS, CHUNK):
        times = np.array([np.bincount(rng.integers(images, size=images), minlength=images) for _ in range(CHUNK)])
        chunks.append([scores.drawn(times.astype(float)) for scores in systems])
    return [
        {name: np.concatenate([chunk[i][name] for chunk in chunks]) for name in chunks[0][i]}
        for i in range(len(systems))
    ]
