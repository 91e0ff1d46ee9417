"""CIDEr-D: the C++ scorer compared with pycocoevalcap's, on random captions. Scores are checked, then timed.

python benchmarks/cider.py
"""

import random
from dataclasses import dataclass
from pathlib import Path

import measure
import numpy as np
import torch
import tyro
from pycocoevalcap.cider.cider_scorer import CiderScorer

from attncap.metrics.cider import CiderD, cider


@dataclass
class Config:
    captions: int = 5000
    """Predicted captions, one per image."""
    references: int = 5
    """References per image."""
    vocabulary: int = 5000
    """Different words. The k-th most frequent one is 1 / k times as frequent as the first."""
    threads: tuple[int, ...] = (1, 2)
    """Numbers of threads of the C++ scorer."""
    rounds: int = 3
    """Timed calls of each provider."""
    output: Path = Path(__file__).parent / "results"
    """Directory for the results."""


def make_captions(config: Config) -> tuple[list[list[str]], list[list[list[str]]]]:
    """Predictions and references of 8 to 14 words. A prediction is a reference with a quarter of its words replaced."""
    rng = random.Random(0)
    words = [f"word{k}" for k in range(1, config.vocabulary + 1)]
    weights = np.cumsum(1 / np.arange(1, config.vocabulary + 1)).tolist()

    def draw(count: int) -> list[str]:
        return rng.choices(words, cum_weights=weights, k=count)

    references = [[draw(rng.randint(8, 14)) for _ in range(config.references)] for _ in range(config.captions)]
    predictions = [[draw(1)[0] if rng.random() < 0.25 else word for word in refs[0]] for refs in references]
    return predictions, references


def main(config: Config) -> None:
    predictions, references = make_captions(config)
    texts = [
        (" ".join(words), [" ".join(r) for r in refs]) for words, refs in zip(predictions, references, strict=True)
    ]
    numbers: dict[str, int] = {}

    def ids(words: list[str]) -> list[int]:
        return [numbers.setdefault(word, len(numbers)) for word in words]

    prediction_ids, reference_ids = [ids(p) for p in predictions], [[ids(r) for r in refs] for refs in references]
    counted = {threads: CiderD(reference_ids, threads) for threads in config.threads}
    images = range(len(predictions))

    def pycocoevalcap() -> np.ndarray:
        scorer = CiderScorer()
        for prediction, refs in texts:
            scorer += (prediction, refs)
        return scorer.compute_score()[1]

    providers = {
        "pycocoevalcap": pycocoevalcap,
        "from words": lambda: cider(predictions, references),
    }
    for n, scorer in counted.items():
        providers[f"from ids, {n} threads"] = lambda n=n: CiderD(reference_ids, n).score(prediction_ids, images)
        providers[f"references counted, {n} threads"] = lambda scorer=scorer: scorer.score(prediction_ids, images)
    truth = pycocoevalcap()
    for name, function in providers.items():
        error = np.abs(function() - truth).max()
        assert error < 1e-9, f"{name}: error {error:.1e}"
    device = torch.device("cpu")
    times = measure.interleaved(providers, device, config.rounds)
    results = []
    for name, milliseconds in times.items():
        faster = times["pycocoevalcap"] / milliseconds
        results.append({"provider": name, "ms": milliseconds, "faster than pycocoevalcap by": faster})
        print(f"{name:38} {milliseconds:9.1f} ms {faster:8.1f} x")
    case = {"captions": config.captions, "references": config.references, "mean score": float(truth.mean())}
    measure.save(config.output / "cider.json", {**measure.environment(device), **case, "results": results})


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
