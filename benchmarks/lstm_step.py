"""lstm_step: the native kernels compared with plain PyTorch, eager and compiled. Results are checked, then timed.

python benchmarks/lstm_step.py                     # CPU
python benchmarks/lstm_step.py --device cuda
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import measure
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from attncap.ops import lstm_step, lstm_step_reference


@dataclass
class Config:
    device: Literal["cpu", "cuda"] = "cpu"
    rows: tuple[int, ...] = (5, 40, 160)
    """Numbers of rows N = R: the beams of all images, 5 per image."""
    hidden: int = 512
    """Hidden size, H."""
    embedding: int = 512
    """Embedding size E, for the deep output layer. The step is also timed with E = 0, for the plain output layer."""
    vocabulary: int = 9490
    """Vocabulary size, V."""
    dtypes: tuple[Literal["float32", "bfloat16", "float16"], ...] = ("float32",)
    calls: int = 50
    """Calls that are timed together, since one takes only microseconds."""
    rounds: int = 15
    """Timed groups of calls of each provider."""
    output: Path = Path(__file__).parent / "results"
    """Directory for the results and the picture."""


def providers(config: Config, N: int, E: int, dtype: torch.dtype) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    random = torch.Generator().manual_seed(0)
    shapes = [(N, 4 * config.hidden), (N, 4 * config.hidden + E), (config.vocabulary, 4 * config.hidden + E)]
    numbers = [torch.randn(*shape, generator=random) for shape in [*shapes, (N, config.hidden)]]
    parents = torch.arange(N) // 5 * 5 + torch.randint(5, (N,), generator=random)  # a beam of the same image
    tokens = torch.randint(config.vocabulary, (N,), generator=random)
    indices = [parents.clamp(max=N - 1).to(config.device), tokens.to(config.device)]
    inputs = {kind: [x.to(config.device, dtype).to(kind) for x in numbers] for kind in (dtype, torch.float64)}
    compiled = torch.compile(lstm_step_reference, dynamic=False, fullgraph=True)

    @torch.inference_mode()
    def run(function: Callable, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return function(*inputs[dtype], *indices)

    return {
        "truth": lambda: run(lstm_step_reference, torch.float64),
        "eager": lambda: run(lstm_step_reference, dtype),
        "compiled": lambda: run(compiled, dtype),
        "native": lambda: run(lstm_step, dtype),
    }


def check(functions: dict[str, Callable[[], tuple[Tensor, ...]]], dtype: torch.dtype) -> None:
    """Removes the truth, computed in float64, from the providers and compares the others with it."""
    allowed = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype]
    truth = functions.pop("truth")()
    for name, function in functions.items():
        for index, (actual, true) in enumerate(zip(function(), truth, strict=True)):
            assert torch.allclose(actual.double(), true, rtol=allowed, atol=allowed), f"{name}, result {index}"


def main(config: Config) -> None:
    device = measure.select(config.device)
    environment = measure.environment(device)
    print(", ".join(f"{key} {value}" for key, value in environment.items()))
    cases = list(itertools.product((config.embedding, 0), config.rows, config.dtypes))
    results = []
    for E, N, dtype in tqdm(cases, unit="case", leave=False):
        torch.compiler.reset()
        functions = providers(config, N, E, getattr(torch, dtype))
        check(functions, getattr(torch, dtype))
        times = measure.interleaved(functions, device, config.rounds, config.calls)
        tqdm.write(f"N {N}, E {E}, {dtype}")
        for name, milliseconds in times.items():
            result = {
                **{"N": N, "E": E, "dtype": dtype, "provider": name},
                "ms": milliseconds,
                "native is faster by": milliseconds / times["native"],
            }
            results.append(result)
            faster = f"native is faster by {result['native is faster by']:.2f}"
            tqdm.write(f"  {name:8} {1000 * result['ms']:8.1f} microseconds  {faster}")
    path = config.output / f"lstm_step-{config.device}.json"
    sizes = {"H": config.hidden, "V": config.vocabulary}
    measure.save(path, {**environment, "sizes": sizes, "results": results})
    title = f"lstm_step, {environment['device']}, {environment['date']}"
    measure.draw(
        {"a step of a search": results},
        lambda r: f"N={r['N']} E={r['E']} {r['dtype']}",
        title,
        path.with_suffix(".png"),
    )


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
