"""soft_attention: the native kernels compared with plain PyTorch, eager and compiled. Results are checked, then timed.

python benchmarks/soft_attention.py                     # CPU
python benchmarks/soft_attention.py --device cuda
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import measure
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from tqdm import tqdm

from attncap.ops import soft_attention, soft_attention_reference


@dataclass
class Config:
    device: Literal["cpu", "cuda"] = "cpu"
    images: tuple[int, ...] | None = None
    """Batch sizes B; by default 1 and 32, on CUDA 1, 64 and 256."""
    beams: tuple[int, ...] = (1, 5)
    """Rows per image, K."""
    cells: int = 196
    """Cells of the feature grid, P."""
    channels: int = 2048
    """Channels of a cell, D."""
    attention: int = 512
    """Attention size, A."""
    dtypes: tuple[Literal["float32", "bfloat16", "float16"], ...] = ("float32", "bfloat16")
    activations: tuple[Literal["tanh", "relu"], ...] = ("relu", "tanh")
    passes: tuple[Literal["forward", "frozen", "fine-tuned"], ...] = ("forward", "frozen", "fine-tuned")
    """forward: the forward pass only; frozen: forward and backward, with a frozen encoder, so the features need no
    gradient; fine-tuned: forward and backward, with the gradient of the features."""
    rounds: int = 15
    """Timed calls of each provider."""
    output: Path = Path(__file__).parent / "results"
    """Directory for the results and the picture."""


def naive(features, keys, query, score_weight, *, activation, gate, projection):
    """The naive baseline, as in tutorials: the features are repeated for each row and projected in every step. (The
    argument `keys` is ignored; the keys are computed again.)"""
    rows = len(query) // len(features)
    features = features.repeat_interleave(rows, dim=0)  # [N,P,D]
    keys = F.linear(features, projection)
    hidden = getattr(torch, activation)(keys + query.unsqueeze(1))  # [N,P,A]
    weights = (hidden @ score_weight).softmax(dim=1)
    context = (features * weights.unsqueeze(2)).sum(dim=1)
    return torch.sigmoid(gate) * context, weights


def make_inputs(config: Config, B: int, K: int, dtype: torch.dtype) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=random) * scale).to(config.device, dtype)

    features = normal(B, config.cells, config.channels).relu()
    projection = normal(config.attention, config.channels, scale=config.channels**-0.5)
    return {
        "features": features,
        "keys": F.linear(features, projection),
        "query": normal(B * K, config.attention),
        "score_weight": normal(config.attention, scale=config.attention**-0.5),
        "gate": normal(B * K, config.channels),
        "projection": projection,
    }


def providers(inputs: dict[str, Tensor], activation: str, passes: str) -> dict[str, Callable]:
    """Functions without arguments that run one forward, or one forward and backward."""
    projection, tensors = inputs["projection"], {k: t for k, t in inputs.items() if k != "projection"}
    torch.compiler.reset()
    functions = {
        "naive": lambda **arguments: naive(**arguments, projection=projection),
        "eager": soft_attention_reference,
        "compiled": torch.compile(soft_attention_reference, dynamic=False, fullgraph=True),
        "native": soft_attention,
    }
    random = torch.Generator().manual_seed(1)
    N, D, P = *inputs["gate"].shape, inputs["features"].shape[1]
    context_grad = torch.randn(N, D, generator=random).to(inputs["gate"])
    weights_grad = torch.randn(N, P, generator=random).to(inputs["gate"])

    def forward(function):
        with torch.inference_mode():
            return function(**tensors, activation=activation)

    def forward_and_backward(function):
        leaves = {k: t.requires_grad_(k != "features" or passes == "fine-tuned") for k, t in tensors.items()}
        outputs = function(**leaves, activation=activation)
        trainable = [t for t in leaves.values() if t.requires_grad]
        # The naive baseline does not use the keys, so they get no gradient.
        gradients = torch.autograd.grad(outputs, trainable, [context_grad, weights_grad], allow_unused=True)
        for tensor in tensors.values():
            tensor.requires_grad_(False)
        return *outputs, *gradients

    run = forward if passes == "forward" else forward_and_backward
    return {name: lambda function=function: run(function) for name, function in functions.items()}


def check(functions: dict[str, Callable], truth: list[Tensor], dtype: torch.dtype) -> None:
    """Compares with float64: the errors of native's outputs and gradients must be at most twice those of eager PyTorch,
    the errors of the other providers' outputs at most ten times."""
    floor = {torch.float32: 1e-6, torch.bfloat16: 2**-9, torch.float16: 2**-12}[dtype]
    eager = [(actual - true).abs().max() for actual, true in zip(functions["eager"](), truth, strict=True)]
    for name, function in functions.items():
        factor, count = (2, len(truth)) if name == "native" else (10, 2)
        for index, (actual, true) in enumerate(zip(function()[:count], truth[:count], strict=True)):
            error, allowed = (actual - true).abs().max(), factor * eager[index] + floor * true.abs().max()
            assert error <= allowed, f"{name}, result {index}: error {error:.2e}, allowed {allowed:.2e}"


def necessary_bytes(inputs: dict[str, Tensor], passes: str) -> int:
    """The least memory traffic: forward reads features and keys; backward reads both again and writes the gradient of
    the keys and, if needed, of the features. The tensors of the rows are counted once for each direction."""
    features, keys = inputs["features"].nbytes, inputs["keys"].nbytes
    rows = 2 * inputs["gate"].nbytes + inputs["query"].nbytes
    forward = features + keys + rows
    if passes == "forward":
        return forward
    return 2 * forward + keys + rows + (features if passes == "fine-tuned" else 0)


def main(config: Config) -> None:
    device = measure.select(config.device)
    torch.manual_seed(0)
    bandwidth = measure.bandwidth(device, config.rounds)
    environment = measure.environment(device)
    print(", ".join(f"{key} {value}" for key, value in environment.items()))
    print("bandwidth: " + ", ".join(f"{key} {value:.1f} GB/s" for key, value in bandwidth.items()))
    images = config.images or ((1, 32) if device.type == "cpu" else (1, 64, 256))
    cases = [
        (passes, B, K, dtype, activation)
        for passes in config.passes
        for B in images
        for K in config.beams
        for dtype in config.dtypes
        for activation in config.activations
    ]
    results = []
    for passes, B, K, dtype, activation in tqdm(cases, unit="case", leave=False):
        inputs = make_inputs(config, B, K, getattr(torch, dtype))
        functions = providers(inputs, activation, passes)
        wide = {name: tensor.double() for name, tensor in inputs.items()}
        check(functions, providers(wide, activation, passes)["eager"](), getattr(torch, dtype))
        del wide
        times = measure.interleaved(functions, device, config.rounds, 1 if device.type == "cpu" else measure.CALLS)
        gigabytes = necessary_bytes(inputs, passes) / 1e9
        case = {"passes": passes, "B": B, "K": K, "dtype": dtype, "activation": activation}
        tqdm.write(f"{passes}, B {B}, K {K}, {dtype}, {activation}")
        for name, milliseconds in times.items():
            result = {
                **case,
                "provider": name,
                "ms": milliseconds,
                "GB/s": gigabytes / milliseconds * 1000,
                "share of copy bandwidth": gigabytes / milliseconds * 1000 / bandwidth["copy"],
                "peak MiB": measure.peak_memory(functions[name], device),
                "native is faster by": milliseconds / times["native"],
            }
            results.append(result)
            tqdm.write(
                f"  {name:8} {result['ms']:9.3f} ms  {result['GB/s']:7.1f} GB/s  "
                f"{result['share of copy bandwidth']:5.0%} of copy  {result['peak MiB']:7.1f} MiB  "
                f"native is faster by {result['native is faster by']:.2f}"
            )
    path = config.output / f"soft_attention-{config.device}.json"
    sizes = {"P": config.cells, "D": config.channels, "A": config.attention}
    measure.save(path, {**environment, "sizes": sizes, "bandwidth GB/s": bandwidth, "results": results})
    panels = {passes: [result for result in results if result["passes"] == passes] for passes in config.passes}
    title = f"soft_attention, {environment['device']}, {environment['date']}"
    measure.draw(panels, _label, title, path.with_suffix(".png"))


def _label(result: dict) -> str:
    return f"B={result['B']} K={result['K']} {result['dtype']} {result['activation']}"


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
