"""What first_gpu_run.py measures: ceilings, kernels, the search, a training step, and plain PyTorch beside them. Each
part is a process of its own: python gpu_measurements.py PART SETTINGS RESULTS, the settings as JSON."""

import dataclasses
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

import cases
import measure
import torch
from cases import Case, Sizes
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from attncap import ops
from attncap.data.vocabulary import Vocabulary
from attncap.models.losses import caption_losses
from attncap.search.beam_search import beam_search
from attncap.search.config import SearchConfig
from attncap.search.graphs import GraphCache
from attncap.training.optimization import update_average


@dataclass
class Settings:
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu: a stand-in, to try the script where there is no GPU."""
    images: tuple[int, ...] = (1, 64, 256)
    """B, for the kernels. The search takes the first and the last."""
    captions: int = 64
    """B in the training step, with a caption of each image."""
    words: int = 20
    """Of every caption, T."""
    sizes: Sizes = field(default_factory=Sizes)
    rounds: int = 7
    """Timed groups of calls."""


class Results:
    """The results of a part, a line of JSON each, written at once."""

    def __init__(self, path: Path):
        self.path = path

    def add(self, **values: Any) -> None:
        print("  " + "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()))
        with open(self.path, "a") as file:
            file.write(json.dumps(values) + "\n")

    def attempt(self, name: str, function: Callable[[], dict[str, Any]]) -> None:
        """Adds what the function returns; or its error, and goes on."""
        try:
            self.add(case=name, **function())
        except Exception as error:
            traceback.print_exc()
            self.add(case=name, error=f"{type(error).__name__}: {error}"[:500])


def ceilings(settings: Settings, device: torch.device, results: Results) -> None:
    """What no kernel can be faster than."""
    on_cpu = device.type == "cpu"
    n = 64 if on_cpu else 8192

    def product(dtype: torch.dtype) -> dict[str, float]:
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        milliseconds = measure.interleaved({"product": lambda: a @ b}, device, settings.rounds, calls=3)["product"]
        return {"TFLOP/s": 2 * n**3 / milliseconds / 1e9}

    def bandwidth() -> dict[str, float]:
        array = torch.ones(2**16, device=device) if on_cpu else measure.large_array(device)
        target = torch.empty_like(array)
        functions = {"copy": lambda: target.copy_(array), "read": array.sum}
        times = measure.interleaved(functions, device, settings.rounds, calls=2)
        return {f"{k} GB/s": (2 if k == "copy" else 1) * array.nbytes / ms / 1e6 for k, ms in times.items()}

    def cached() -> dict[str, float]:
        """Of arrays that fit into the L2 cache together."""
        array = torch.ones(2**20, device=device)
        target = torch.empty_like(array)
        milliseconds = measure.interleaved({"": lambda: target.copy_(array)}, device, settings.rounds, measure.CALLS)[
            ""
        ]
        return {"copy GB/s": 2 * array.nbytes / milliseconds / 1e6}

    def launch() -> dict[str, float]:
        x = torch.zeros(1, device=device)
        milliseconds = measure.interleaved({"": lambda: x.add_(1)}, device, settings.rounds, calls=100)[""]
        return {"us": 1000 * milliseconds}

    results.attempt("bandwidth", bandwidth)
    results.attempt("product bfloat16", partial(product, torch.bfloat16))
    results.attempt("launch in a graph", launch)
    results.attempt("bandwidth of L2", cached)
    results.attempt("product float32", partial(product, torch.float32))


def kernels(settings: Settings, device: torch.device, results: Results) -> None:
    for case in cases.kernels(settings.images):
        results.attempt(case.name, partial(time_case, case, settings, device))


def time_case(case: Case, settings: Settings, device: torch.device) -> dict[str, Any]:
    """Microseconds of a call. For one image, its inputs come from the L2 cache, as in a search; for more, they are so
    many different ones that they come from memory."""
    work = cases.work(case, settings.sizes)
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) if device.type == "cuda" else 0
    sets = 1 if case.B == 1 else min(max(2, -(-2 * cache // work.bytes)), measure.CALLS)
    turn = cycle([cases.make(case, settings.sizes, device) for _ in range(sets)])
    with torch.no_grad():
        times = measure.interleaved({"": lambda: next(turn)()}, device, settings.rounds, measure.CALLS)
        kernels = profile(lambda: next(turn)(), device)["kernels"]
    return {"us": 1000 * times[""], **work._asdict(), "dtype": case.dtype, "sets": sets, "by kernel": kernels}


@torch.inference_mode()
def search(settings: Settings, device: torch.device, results: Results) -> None:
    """A step of the search, its parts, and a whole search."""
    K = 5
    model = cases.make_decoder(settings.sizes, device).to(torch.bfloat16).eval()
    for B in sorted({settings.images[-1], settings.images[0]}, reverse=True):
        parts = cases.decode_parts(B, K)
        features = cases.make_features(B, settings.sizes, device, torch.bfloat16)
        decoder = model.for_inference()
        works = [cases.work(case, settings.sizes) for case in parts]

        def whole_step(decoder=decoder, features=features, works=works) -> dict[str, Any]:
            step = cases.make_decode_step(decoder, features, K)
            times = measure.interleaved({"": step}, device, settings.rounds, calls=measure.CALLS)
            return {"us": 1000 * times[""], "of parts": [[*part] for part in works], "dtype": "bfloat16"}

        results.attempt(f"decode step B={B} K={K}", whole_step)
        for case in parts:
            results.attempt(f"of the step: {case.name}", partial(time_case, case, settings, device))

        graphs = GraphCache()
        options = SearchConfig(beam_size=K, max_length=settings.words)

        def find(decoder=decoder, features=features, graphs=graphs, options=options, attention: bool = True) -> Any:
            return beam_search(decoder, features, options, (), graphs=graphs, attention=attention)

        for attention in (True, False):
            what = "" if attention else " without attention maps"
            results.attempt(f"search B={B} K={K}{what}", partial(captions_per_second, settings, find, B, attention))
        results.attempt(f"profile of search B={B} K={K}", partial(profile, find, device))


def captions_per_second(settings: Settings, find: Callable, B: int, attention: bool) -> dict[str, Any]:
    """Of whole searches, the host's part included: the captions are on the host at the end."""
    times = []
    for _ in range(2 + settings.rounds):
        start = time.perf_counter()
        found = find(attention=attention)
        times.append(time.perf_counter() - start)
    words = {len(best.tokens) for best, *_ in found}
    assert words == {settings.words}, f"captions of {words} words"
    seconds = statistics.median(times[2:])
    return {"ms": 1000 * seconds, "captions/s": B / seconds}


def profile(function: Callable, device: torch.device) -> dict[str, Any]:
    """The device's microseconds in each kernel of a call."""
    function()
    on_cpu = device.type == "cpu"
    activity = ProfilerActivity.CPU if on_cpu else ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[activity]) as profiler:
        function()
        measure.synchronize(device)
    kind = DeviceType.CPU if on_cpu else DeviceType.CUDA
    field = "self_cpu_time_total" if on_cpu else "self_device_time_total"
    found = [(x.key, x.count, getattr(x, field)) for x in profiler.key_averages() if x.device_type == kind]
    found = sorted((row for row in found if row[2] > 0), key=lambda row: -row[2])
    kernels = [{"kernel": name[:160], "calls": calls, "us": float(us)} for name, calls, us in found[:25]]
    return {"kernels": kernels, "all us": float(sum(row[2] for row in found))}


def training(settings: Settings, device: torch.device, results: Results) -> None:
    """A step of the decoder's training with a frozen encoder, with optimizer and moving average."""
    for backend in ("native", "torch"):
        step = make_training_step(settings, device, backend)
        results.attempt(f"training step, {backend}", partial(time_training, step, settings, device))
        if backend == "native":
            results.attempt("profile of a training step", partial(profile, step, device))


def make_training_step(settings: Settings, device: torch.device, backend: str) -> Callable[[Callable[[], None]], None]:
    """The step; it calls its argument after the forward, after the backward and at its end."""
    B, T, sizes = settings.captions, settings.words, settings.sizes
    decoder = cases.make_decoder(sizes, device, backend).train()
    average = cases.make_decoder(sizes, device, backend)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-5, fused=True)
    features = cases.make_features(B, sizes, device, torch.bfloat16)
    tokens = torch.randint(Vocabulary.UNK + 1, sizes.vocabulary, (B, T + 1))
    tokens[:, 0] = Vocabulary.START

    def step(mark: Callable[[], None] = lambda: None) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            words, attention = caption_losses(decoder, features, tokens[:, :-1], tokens[:, 1:])
        loss = words / (B * T) + attention / B
        mark()
        optimizer.zero_grad()
        loss.backward()
        mark()
        nn.utils.clip_grad_norm_(decoder.parameters(), 5.0)
        optimizer.step()
        update_average(average, decoder, 1000)
        mark()

    return step


def time_training(step: Callable, settings: Settings, device: torch.device) -> dict[str, Any]:
    """Milliseconds of a step among others, and of its parts when each waits for the one before."""
    for _ in range(3):
        step()
    measure.synchronize(device)
    start = time.perf_counter()
    for _ in range(settings.rounds):
        step()
    measure.synchronize(device)
    whole = (time.perf_counter() - start) / settings.rounds
    parts = []
    for _ in range(settings.rounds):
        marks = [time.perf_counter()]

        def mark(marks=marks) -> None:
            measure.synchronize(device)
            marks.append(time.perf_counter())

        step(mark)
        parts.append([1000 * (b - a) for a, b in zip(marks, marks[1:], strict=False)])
    forward, backward, update = (statistics.median(times) for times in zip(*parts, strict=True))
    works = training_work(settings)
    return {
        "ms": 1000 * whole,
        "forward ms": forward,
        "backward ms": backward,
        "update ms": update,
        "of parts": works,
        "dtype": "bfloat16",
    }


def training_work(settings: Settings) -> list[tuple[int, int]]:
    """Bytes and operations that a training step cannot do without, one after the other."""
    B, T, s = settings.captions, settings.words, settings.sizes
    forward, backward = (cases.work(Case(op, B, 1), s).bytes for op in ("soft_attention", "soft_attention_backward"))
    keys_grad = 2 * B * s.cells * s.size  # bytes; once for all steps
    product = 2 * B * T * sum(a * b for a, b in (shape(s) for shape in cases.PRODUCTS.values()))
    keys = 2 * B * s.cells * s.channels * s.size
    update = update_bytes(s)
    attention = T * (forward + backward - keys_grad) + 2 * keys_grad
    return [(attention, 0), (0, 3 * product), (0, 2 * keys), (update, 0)]


def update_bytes(sizes: Sizes) -> int:
    """Of clipping, Adam and the moving average of the decoder's weights."""
    parameters = sum(p.numel() for p in cases.make_decoder(sizes, torch.device("cpu")).parameters())
    return 4 * parameters * (2 + 7 + 3)


@torch.inference_mode()
def plain(settings: Settings, device: torch.device, results: Results) -> None:
    """Some of the kernels' calls by plain PyTorch, eager and compiled."""
    s, K, B = settings.sizes, 5, settings.images[-1]
    dtype = torch.bfloat16

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    def select(logits: Tensor, scores: Tensor) -> Any:
        candidates = scores.unsqueeze(2) + logits.float().log_softmax(dim=1).view(B, K, s.vocabulary)
        return candidates.view(B, K * s.vocabulary).topk(K)

    P, D, A, N = s.cells, s.channels, s.size, B * K
    tensors = [normal(B, P, D), normal(B, P, A), normal(N, A), normal(A)]
    gate, rows = normal(N, D), torch.arange(N, device=device)
    lstm = [normal(N, 4 * A), normal(N, 5 * A), normal(s.vocabulary, 5 * A), normal(N, A), rows, rows % s.vocabulary]
    logits, scores = normal(N, s.vocabulary), torch.randn(B, K, device=device)
    functions = {
        f"soft_attention B={B} K={K} bfloat16 relu": (
            lambda *x: ops.soft_attention_reference(*x, activation="relu", gate=gate),
            tensors,
        ),
        f"lstm_step B={B} K={K} bfloat16": (ops.lstm_step_reference, lstm),
        f"beam_search_step B={B} K={K} bfloat16": (select, [logits, scores]),
    }
    for kind in ("eager", "compiled"):
        for name, (function, arguments) in functions.items():

            def run(function=function, arguments=arguments, kind=kind) -> dict[str, float]:
                if kind == "compiled":
                    function = torch.compile(function, dynamic=False, fullgraph=True)
                call = partial(function, *arguments)
                return {"us": 1000 * measure.interleaved({"": call}, device, settings.rounds, calls=5)[""]}

            results.attempt(f"{kind}: {name}", run)


def single_calls(settings: Settings, device: torch.device, results: Results) -> None:
    """A call of each kernel, for a profiler that counts what the hardware does."""
    with torch.no_grad():
        for case in cases.kernels(sorted({settings.images[0], settings.images[-1]})):
            cases.make(case, settings.sizes, device)()
            measure.synchronize(device)
            results.add(case=case.name, done=True)


def small_calls(settings: Settings, device: torch.device, results: Results) -> None:
    """Every kernel on a few small inputs, for the sanitizer; sizes that divide by nothing, and some that do."""
    torch.manual_seed(0)
    for P, D, A in ((13, 21, 7), (20, 64, 32)):
        for dtype in (torch.bfloat16, torch.float32):
            for K in (1, 3, 5):
                _small_calls(P, D, A, K, dtype, device)
    measure.synchronize(device)
    results.add(case="small calls", done=True)


def _small_calls(P: int, D: int, A: int, K: int, dtype: torch.dtype, device: torch.device) -> None:
    B, V, H = 3, 37, A
    N = B * K

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype, requires_grad=True)

    inputs = [normal(B, P, D), normal(B, P, A), normal(N, A), normal(A)]
    mask, gate = torch.rand(B, P, device=device) > 0.3, normal(N, D)
    for activation in ("tanh", "relu"):
        context, weights = ops.soft_attention(*inputs, activation=activation, mask=mask, gate=gate)
        (context.sum() + weights.square().sum()).backward()
    states = [normal(N, H), normal(N, H)]
    weights = [normal(4 * H + A + D, H), normal(4 * H + A + D), normal(4 * H, D), normal(A)]
    outputs = ops.attention_lstm(*inputs[:2], normal(2 * N, 4 * H), *states, *weights, batch_sizes=[B, B])
    sum(x.sum() for x in outputs).backward()
    with torch.no_grad():
        rows, tokens = torch.arange(N, device=device), torch.randint(V, (N,), device=device)
        ops.lstm_step(normal(N, 4 * H), normal(N, 5 * H), normal(V, 5 * H), normal(N, H), rows, tokens)
        finished = torch.full((B, K), -torch.inf, device=device)
        ops.beam_search_step(normal(N, V), torch.randn(B, K, device=device), finished, end=Vocabulary.END)


MEASUREMENTS = {
    f.__name__.replace("_", " "): f for f in (ceilings, kernels, search, training, plain, single_calls, small_calls)
}


def command(part: str, settings: Settings, results: Path) -> list[str]:
    """What runs a part. Its results are lines of JSON."""
    return [sys.executable, str(Path(__file__).resolve()), part, json.dumps(dataclasses.asdict(settings)), str(results)]


def main(part: str, settings: str, results: str) -> None:
    fields = json.loads(settings)
    chosen = Settings(**{**fields, "sizes": Sizes(**fields["sizes"])})
    MEASUREMENTS[part](chosen, measure.select(chosen.device), Results(Path(results)))


if __name__ == "__main__":
    main(*sys.argv[1:])
