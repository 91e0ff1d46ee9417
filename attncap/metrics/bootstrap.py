"""Confidence intervals by the bootstrap over images (Efron and Tibshirani 1993, "An Introduction to the Bootstrap",
chapter 13), for corpus metrics and for the paired difference of two systems (Koehn 2004, "Statistical Significance
Tests for Machine Translation Evaluation")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from attncap.metrics import Scores

RESAMPLES = 1000
CHUNK = 50  # resamples computed at once: an array [RESAMPLES,I] would be large


@dataclass
class Difference:
    """A metric of one system minus that of another."""

    value: float
    low: float  # of the 95% interval
    high: float
    share_above_zero: float  # the share of resamples in which the first system is better


def intervals(scores: Scores, seed: int = 0) -> dict[str, tuple[float, float]]:
    """The 95% interval of each metric: the 2.5 and 97.5 percentiles over resampled corpora, which have the same number
    of images, drawn with replacement. The caption and the references of an image stay together."""
    [resampled] = _resample([scores], seed)
    return {name: tuple(np.percentile(values, [2.5, 97.5]).tolist()) for name, values in resampled.items()}


def compare(scores: Scores, others: Scores, seed: int = 0) -> dict[str, Difference]:
    """The differences `scores` minus `others`, by metric, for the metrics that both have.

    Both must have the same images in the same order. Each resample has the same images for both.
    """
    assert scores.images == others.images
    resampled, resampled_others = _resample([scores, others], seed)
    corpus, corpus_others = scores.corpus(), others.corpus()
    differences = {}
    for name in (name for name in resampled if name in resampled_others):
        values = resampled[name] - resampled_others[name]
        low, high = np.percentile(values, [2.5, 97.5]).tolist()
        difference = corpus[name] - corpus_others[name]
        differences[name] = Difference(difference, low, high, float((values > 0).mean()))
    return differences


def _resample(systems: list[Scores], seed: int) -> list[dict[str, np.ndarray]]:
    """The metrics of each system, [RESAMPLES] each, on resampled corpora that are the same for all systems."""
    rng, images = np.random.default_rng(seed), len(systems[0].images)
    chunks: list[list[dict[str, np.ndarray]]] = []
    for _ in range(0, RESAMPLES, CHUNK):
        counts = np.array([np.bincount(rng.integers(images, size=images), minlength=images) for _ in range(CHUNK)])
        chunks.append([scores.resampled(counts.astype(float)) for scores in systems])
    return [
        {name: np.concatenate([chunk[i][name] for chunk in chunks]) for name in chunks[0][i]}
        for i in range(len(systems))
    ]
