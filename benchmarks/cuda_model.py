"""What the CUDA kernels do, counted without a GPU, and how long that should take on some GPUs.

python benchmarks/cuda_model.py                     # counts, predicts, writes results/cuda_model.json; needs nvcc
python benchmarks/cuda_model.py --measure           # and measures on the GPU of this machine

nvcc's PTX of the kernels runs on the CPU (tests/ptx), which counts what their threads do; ptxas says how many registers
they get. A kernel of G blocks on a GPU of M multiprocessors, the busiest of which runs ceil(G / M) blocks, then takes

    launch + sqrt(memory^2 + max(warps, units)^2)

    memory  bytes of the different sectors that the kernel touches / bandwidth; of L2 for one image (a T4's is too
            small for the matrices of a decoder, so its times for one image are too low)
    warps   cycles of all warps of a scheduler / warps that are resident on it. The cycles of a warp are INSTRUCTION for
            each instruction, and beyond that LOAD for each that reads global memory, SHUFFLE for each shuffle, and
            EXPANDED for each of which ptxas makes many, such as a division
    units   operations of the busiest unit (issue, FMA, MUFU, shared memory) / its rate

A matrix product takes PRODUCT + max(operations / rate, bytes / bandwidth). Kernels of a call run one after the other.
"""

import contextlib
import functools
import importlib.util
import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cases
import gpu_measurements
import measure
import torch
import tyro
from cases import Case, Sizes
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Config:
    measure: bool = False
    """Measure too, on the GPU of this machine."""
    images: tuple[int, ...] = (1, 256)
    """B."""
    sizes: Sizes = field(default_factory=Sizes)
    build: Path | None = None
    """Directory for the translated PTX; by default a temporary one."""
    output: Path = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Gpu:
    """What limits a kernel. Numbers of units are for each multiprocessor and cycle, from the tables "Throughput of
    Native Arithmetic Instructions" and "Technical Specifications per Compute Capability" of NVIDIA's CUDA C++
    Programming Guide; the others from the data sheet of the GPU, except the H100's rates, which are measured."""

    capability: int
    processors: int
    gigahertz: float  # boost clock
    bandwidth: float  # GB/s of reading
    l2_bandwidth: float  # GB/s
    tensor: float  # TFLOP/s of a large product of 16-bit numbers
    float32: float  # TFLOP/s of a large product of float32
    fma: int
    warps: int  # that fit at once
    blocks: int
    shared: int  # bytes
    mufu: int = 16
    schedulers: int = 4
    registers: int = 65536


# Measured on an H100 SXM: 3,089 GB/s of reading, 92 % of the data sheet's bandwidth, and 726 TFLOP/s, 73 % of its peak.
# The H200 is given the same shares of its data sheet; those of the T4 and the A100 are estimates.
GPUS = {
    "T4": Gpu(75, 40, 1.59, 0.85 * 320, 1200, 0.6 * 65, 0.8 * 8.1, 64, 32, 16, 65536),
    "A100": Gpu(80, 108, 1.41, 0.92 * 2039, 4000, 0.8 * 312, 0.9 * 19.5, 64, 64, 32, 167936),
    "H100": Gpu(90, 132, 1.98, 3089, 5500, 726, 46, 128, 64, 32, 233472),
    "H200": Gpu(90, 132, 1.98, 0.92 * 4800, 5500, 726, 46, 128, 64, 32, 233472),
}

# Fitted to the times of 72 launches on an H100: all forward kernels, in bfloat16 and float32, for 1 to 256 images.
LAUNCH = 2.0  # us; 0.8 of it from the end of the kernel before to the beginning of this one, in a graph
PRODUCT = 4.0  # us
INSTRUCTION = 5.2  # cycles
LOAD, LOAD_L2 = 230.0, 25.0  # cycles that are not hidden by other loads of the same warp
SHUFFLE = 90.0  # cycles
EXPANDED = 650.0  # cycles
UNCERTAINTY = (
    "On the H100, the model is off by a factor of 1.14 (root mean square) for the 72 launches that it is fitted to, "
    "and of 1.20 for 42 calls of the kernels as rewritten since (the worst ones: 0.65 for the selection of one image, "
    "2.05 for lstm_step of 5 rows in float32); matrix products by 1.35. On other GPUs the same cycles are assumed, and "
    "nothing has been measured: take a factor of 1.5 for the A100 and the H200, of 2 for the T4."
)


@dataclass
class Launch:
    """A kernel's launch: what `ptx.count` says of it, for all images, and what ptxas says of its code."""

    kernel: str
    blocks: int
    threads: int
    shared: int  # bytes a block
    counts: dict[str, Any]
    scale: float  # images / images counted
    registers: int
    spills: int  # bytes

    def resident(self, gpu: Gpu) -> int:
        """Blocks that fit on a multiprocessor."""
        warps = self.threads // 32
        registers = -(-self.registers // 8) * 8 * 32 * warps
        shared = -(-(self.shared + (1024 if gpu.capability >= 80 else 0)) // 128) * 128
        return max(1, min(gpu.blocks, gpu.warps // warps, gpu.registers // registers, gpu.shared // max(shared, 1)))

    def instructions(self) -> dict[str, float]:
        """By unit, of all threads. What ptxas makes no instruction of is left out."""
        return {unit: n * self.scale for unit, n in self.counts["instructions"].items() if n and unit != "move"}

    def touched(self) -> float:
        """Bytes of the different sectors of global memory that are read or written."""
        return 32 * self._sum("distinct", "global_load", "global_store", "async_copy")

    def accessed(self, what: str) -> float:
        """Of global memory: "requests" of warps, "sectors" of 32 bytes that they ask for, "bytes" that they use."""
        return self._sum(what, "global_load", "global_store", "async_copy")

    def wavefronts(self, what: str = "wavefronts") -> float:
        """Of shared memory; "conflicts": those that bank conflicts add."""
        return self._sum(what, "shared_load", "shared_store", "remote_load", "remote_store")

    def _sum(self, what: str, *kinds: str) -> float:
        return self.scale * sum(self.counts.get(kind, {}).get(what, 0) for kind in kinds)

    def microseconds(self, gpu: Gpu, cached: bool) -> float:
        limits = self.limits(gpu, cached)
        memory = limits.pop("memory")
        return LAUNCH + math.hypot(memory, max(limits.values()))

    def limits(self, gpu: Gpu, cached: bool) -> dict[str, float]:
        """Microseconds that each part of the model takes alone."""
        instructions = self.instructions()
        issued = sum(instructions.values()) / 32
        cycles = INSTRUCTION * issued
        cycles += (LOAD_L2 if cached else LOAD) * self.scale * self.counts["global_load"]["requests"]
        cycles += SHUFFLE * instructions.get("shuffle", 0) / 32 + EXPANDED * instructions.get("expanded", 0) / 32
        blocks = -(-self.blocks // gpu.processors)  # of the busiest multiprocessor
        turns = -(-blocks // self.resident(gpu))
        warps = blocks / turns * self.threads / 32  # that are resident on it, on average
        busiest = blocks / self.blocks
        of_cycles = {
            "warps": cycles / warps,
            "issue": issued / gpu.schedulers,
            "FMA": instructions.get("fma", 0) / gpu.fma,
            "MUFU": instructions.get("mufu", 0) / gpu.mufu,
            "shared": self.wavefronts(),
        }
        bandwidth = gpu.l2_bandwidth if cached else gpu.bandwidth
        return {
            "memory": self.touched() / bandwidth / 1e3,
            **{name: busiest * n / gpu.gigahertz / 1e3 for name, n in of_cycles.items()},
        }


def load_ptx() -> Any:
    """The module tests/ptx/ptx.py."""
    spec = importlib.util.spec_from_file_location("ptx", ROOT / "tests" / "ptx" / "ptx.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Counter:
    """Counts launches by the PTX runner of tests/ptx, built for `arch` into `folder`."""

    def __init__(self, folder: Path, arch: str):
        self.ptx, self.folder = load_ptx(), folder
        self.ptx.build(folder, arch=arch)
        self.resources = self.ptx.resources(folder, arch=arch)

    @functools.cache  # noqa: B019, the counter lives as long as the program
    def launches(self, case: Case, sizes: Sizes) -> list[Launch]:
        """Of a call. Of many images two are counted, on a GPU that is smaller in proportion: then its blocks are cut as
        those of all images are."""
        images = case.B if case.B == 1 else 2
        processors = 132 if case.B == 1 else max(1, round(2 * 132 / case.B))
        scale = case.B / images
        return self.launches_of(arguments(case._replace(B=images), sizes), processors, scale)

    def launches_of(self, call: list[str], processors: int = 132, scale: float = 1) -> list[Launch]:
        """Of what `ptx.count` calls a case; `scale` is images / images counted."""
        launches = self.ptx.count(self.folder, call, processors=processors)
        return [self._launch(counts, scale) for counts in launches]

    def _launch(self, counts: dict[str, Any], scale: float) -> Launch:
        code = self.resources[counts["entry"]]
        return Launch(
            counts["kernel"],
            round(counts["blocks"] * scale),
            counts["threads"],
            counts["static_shared"] + counts["dynamic_shared"],
            counts,
            scale,
            code["registers"],
            code["spill_stores"] + code["spill_loads"],
        )


def arguments(case: Case, sizes: Sizes) -> list[str]:
    """What `ptx.count` calls a case."""
    P, D, A, V = sizes.cells, sizes.channels, sizes.size, sizes.vocabulary
    attention = [case.B, case.K, P, D, A, case.activation, "gate"]
    numbers = {
        "soft_attention": attention,
        "soft_attention_backward": [*attention, "keys"],
        "beam_search_step": [case.B, case.K, case.K, V],
        "lstm_step": [case.B * case.K, A, A],
        # of a training step
        "soft_attention_backward of a step": attention,
        "soft_attention_keys_backward": [case.B, case.K, P, A, case.activation],
        "lstm_step of a sequence": [case.B * case.K, A, 0],
        "lstm_step_backward": [case.B * case.K, A],
    }[case.op]
    return [str(x) for x in (case.op.split(" of ")[0], case.dtype, *numbers)]


class Model:
    """Predictions for one GPU, from launches that were counted."""

    def __init__(self, gpu: Gpu, counter: Counter, sizes: Sizes):
        self.gpu, self.counter, self.sizes = gpu, counter, sizes

    def launches(self, case: Case) -> list[Launch]:
        return self.counter.launches(case, self.sizes)

    def call(self, case: Case) -> float:
        """Microseconds of a kernel's call, or of a matrix product."""
        cached = self.is_cached(case)
        if case.op in cases.PRODUCTS:
            work = cases.work(case, self.sizes)
            return self.product(work.flops, work.bytes, case.dtype, cached)
        return sum(launch.microseconds(self.gpu, cached) for launch in self.launches(case))

    def is_cached(self, case: Case) -> bool:
        """Whether its inputs are taken from the L2 cache, see gpu_measurements.time_case."""
        return case.B == 1

    def product(self, flops: float, size: float, dtype: str = "bfloat16", cached: bool = False) -> float:
        rate = self.gpu.float32 if dtype == "float32" else self.gpu.tensor
        bandwidth = self.gpu.l2_bandwidth if cached else self.gpu.bandwidth
        return PRODUCT + max(flops / rate / 1e6, size / bandwidth / 1e3)

    def decode_step(self, B: int, K: int) -> float:
        return sum(self.call(case) for case in cases.decode_parts(B, K))

    def training_step(self, B: int, T: int) -> float:
        """Of the decoder in bfloat16, for a frozen encoder: forward and backward of T words, loss, update."""
        s = self.sizes
        forward = [Case(op, B, 1) for op in ("product of h", "product of context")]
        forward += [Case("soft_attention", B, 1, activation="relu"), Case("lstm_step of a sequence", B, 1)]
        backward = [
            Case("soft_attention_backward of a step", B, 1, activation="relu"),
            Case("lstm_step_backward", B, 1),
        ]
        backward += forward[:2]  # the products with the transposed weights
        loops = T * sum(map(self.call, forward + backward))
        once = self.call(Case("soft_attention_keys_backward", B, T, activation="relu"))
        rows = B * T
        shapes = [shape(s) for shape in cases.PRODUCTS.values()]
        for_weights = sum(self.product(2 * rows * a * b, 4 * a * b) for a, b in shapes)
        output = 2 * sum(self.product(2 * rows * a * b, 2 * rows * (a + b)) for a, b in shapes[2:])
        keys = 2 * self.product(2 * B * s.cells * s.channels * s.size, 2 * B * s.cells * (s.channels + s.size))
        update = gpu_measurements.update_bytes(s) / self.gpu.bandwidth / 1e3
        return loops + once + for_weights + output + keys + update


def elements(kernel: str, case: Case, sizes: Sizes) -> int:
    """Of the largest array that a kernel works through, an activation, a product or a logit each."""
    N, P, D, A = case.B * case.K, sizes.cells, sizes.channels, sizes.size
    of_kernel = {
        "score_kernel": N * P * A,
        "keys_grad": N * P * A,
        "context_kernel": N * P * D,
        "weights_grad": N * P * D,
        "features_grad": N * P * D,
        "cluster": N * P * (A + D),
        "softmax": N * P,
        "gate_grad": N * D,
        "sum_parts": N * D,
        "beam_search": N * sizes.vocabulary,
        "lstm": N * A,
    }
    return next((count for part, count in of_kernel.items() if part in kernel), N)


def describe(case: Case, models: dict[str, Model], sizes: Sizes) -> dict[str, Any]:
    """What the JSON says of a case."""
    model = models["H100"]
    work = cases.work(case, sizes)
    launches = []
    for launch in model.launches(case):
        n = elements(launch.kernel, case, sizes)
        instructions = {unit: round(count / n, 3) for unit, count in launch.instructions().items()}
        limits = launch.limits(model.gpu, model.is_cached(case))
        launches.append(
            {
                "kernel": launch.kernel,
                "blocks": launch.blocks,
                "threads": launch.threads,
                "registers": launch.registers,
                "spilled bytes": launch.spills,
                "shared bytes": launch.shared,
                "blocks a multiprocessor": launch.resident(model.gpu),
                "sectors asked / used": round(32 * launch.accessed("sectors") / max(launch.accessed("bytes"), 1), 3),
                "bytes touched": round(launch.touched()),
                "bank conflicts a wavefront": round(launch.wavefronts("conflicts") / max(launch.wavefronts(), 1), 3),
                "instructions an element": instructions,
                "limits us": {name: round(us, 2) for name, us in limits.items()},
            }
        )
    return {
        "case": case.name,
        "bytes": work.bytes,
        "bytes touched / necessary": round(sum(launch["bytes touched"] for launch in launches) / work.bytes, 3),
        "predicted us": {name: round(model.call(case), 2) for name, model in models.items()},
        "launches": launches,
    }


def table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    gpus = list(record["cases"][0]["predicted us"])
    measured = any("measured us" in case for case in record["cases"])
    lines = [f"| case | bytes touched / necessary | {' | '.join(gpus)} |{' measured |' if measured else ''}"]
    lines.append("|---" * (2 + len(gpus) + measured) + "|")
    for case in record["cases"]:
        cells = [case["case"], f"{case['bytes touched / necessary']:.2f}" if "launches" in case else ""]
        cells += [f"{us:.1f}" for us in case["predicted us"].values()]
        cells += [f"{case['measured us']:.1f}" if "measured us" in case else ""] if measured else []
        lines.append(f"| {' | '.join(cells)} |")
    columns = ("registers", "spilled bytes", "shared bytes", "blocks a multiprocessor", "bank conflicts a wavefront")
    columns += ("sectors asked / used",)
    lines += ["", f"| kernel | blocks x threads | {' | '.join(columns)} | instructions an element | limits us |"]
    lines.append("|---" * (4 + len(columns)) + "|")
    for case in record["cases"]:
        for launch in case.get("launches", []):
            cells = [f"{case['case']}: {launch['kernel']}", f"{launch['blocks']} x {launch['threads']}"]
            cells += [str(launch[column]) for column in columns]
            for pairs in (launch["instructions an element"], launch["limits us"]):
                cells.append(", ".join(f"{name} {value:g}" for name, value in pairs.items() if value >= 0.01))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(config: Config) -> None:
    device = torch.device("cuda" if config.measure else "cpu")
    with contextlib.ExitStack() as stack:
        folder = config.build or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        models = make_models(folder, config.sizes)
        chosen = cases.kernels(config.images)
        record = {
            **(measure.environment(device) if config.measure else {}),
            "sizes": vars(config.sizes),
            "uncertainty": UNCERTAINTY,
            "cases": [describe(case, models, config.sizes) for case in tqdm(chosen, unit="case", leave=False)],
        }
        for B in config.images:
            steps = {name: round(model.decode_step(B, 5), 1) for name, model in models.items()}
            record["cases"].append({"case": f"decode step B={B} K=5", "predicted us": steps})
        steps = {name: round(model.training_step(64, 20), 1) for name, model in models.items()}
        record["cases"].append({"case": "training step, native", "predicted us": steps})
    if config.measure:
        settings = gpu_measurements.Settings(images=config.images, sizes=config.sizes)
        device = measure.select("cuda")
        for case, described in zip(chosen, record["cases"], strict=False):
            described["measured us"] = gpu_measurements.time_case(case, settings, device)["us"]
    print(table(record))
    measure.save(config.output / ("cuda_model-measured.json" if config.measure else "cuda_model.json"), record)


def make_models(folder: Path, sizes: Sizes) -> dict[str, Model]:
    """For each GPU: those before 9.0 run the kernels as compiled for 7.5, the others as compiled for 9.0."""
    counters = {arch: Counter(folder / arch, arch) for arch in ("sm_75", "sm_90")}
    return {
        name: Model(gpu, counters["sm_90" if gpu.capability >= 90 else "sm_75"], sizes) for name, gpu in GPUS.items()
    }


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
