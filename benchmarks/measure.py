"""Tools that the benchmarks share: interleaved timing, CUDA graphs of calls, memory bandwidth, peak memory, a record of
the environment, and a picture of the results."""

import ctypes
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from attncap.files import write_atomically
from attncap.versions import versions

CALLS = 20  # of a kernel in a graph


def select(name: str) -> torch.device:
    """The device to measure on. On CUDA, all work from here on runs on a stream of its own, since the default one
    cannot be captured."""
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())
    return device


def interleaved(functions: dict[str, Callable], device: torch.device, rounds: int, calls: int = 1) -> dict[str, float]:
    """Median milliseconds of a call of each function. In every round each function runs once, so that other load on the
    machine affects all of them alike. Two more rounds come first, as a warm-up.

    With `calls` above 1, a function runs that often each time. On CUDA these calls are a graph, which is waiting for
    the device before its time begins: kernels take microseconds, less than Python takes to launch them."""
    if calls > 1:
        functions = {name: repeated(function, device, calls) for name, function in functions.items()}
    times = {name: [] for name in functions}
    for index in range(rounds + 2):
        for name, function in functions.items():
            elapsed = _milliseconds(function, device, queued=calls > 1)
            if index >= 2:
                times[name].append(elapsed / calls)
    return {name: statistics.median(values) for name, values in times.items()}


def repeated(function: Callable, device: torch.device, calls: int) -> Callable[[], None]:
    """Some calls as one, on CUDA as a graph. See `select`."""
    if device.type == "cpu":

        def run() -> None:
            for _ in range(calls):
                function()

        return run
    for _ in range(2):  # what a first call sets up cannot be captured
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(calls):
            function()
    return graph.replay


def _milliseconds(function: Callable, device: torch.device, queued: bool) -> float:
    if device.type == "cpu":
        start = time.perf_counter()
        function()
        return 1000 * (time.perf_counter() - start)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    if queued:
        torch.cuda._sleep(500_000)  # cycles, about 0.3 ms in which the host launches what follows
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def large_array(device: torch.device) -> torch.Tensor:
    """An array far larger than the caches."""
    return torch.ones((64 if device.type == "cpu" else 1024) * 2**20, device=device)


def bandwidth(device: torch.device, rounds: int) -> dict[str, float]:
    """GB/s of copying (bytes read and written) and of reading large arrays."""
    source = large_array(device)
    target = torch.empty_like(source)
    times = interleaved({"copy": lambda: target.copy_(source), "read": source.sum}, device, rounds)
    gigabytes = source.numel() * source.element_size() / 1e9
    return {"copy": 2 * gigabytes / times["copy"] * 1000, "read": gigabytes / times["read"] * 1000}


def peak_memory(function: Callable, device: torch.device) -> float:
    """The most MiB that a call allocates at any time, beyond what was allocated before. On the CPU it is the increase
    of the peak resident memory of the process (Linux only)."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # memory that is free, but cached by the C library, would hide the peak
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    function()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    """A field of the kernel's status of this process, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def environment(device: torch.device) -> dict[str, Any]:
    """Device, versions and date, for the results."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        cpu = Path("/proc/cpuinfo").read_text() if platform.system() == "Linux" else ""
        models = [line.split(":")[1].strip() for line in cpu.splitlines() if line.startswith("model name")]
        name = f"{models[0] if models else platform.processor()}, {torch.backends.cpu.get_cpu_capability()}"
        name += f", {torch.get_num_threads()} threads"
    return {"device": name, "date": datetime.date.today().isoformat(), **versions()}


def save(path: Path, record: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(record, indent=1) + "\n")
    print(f"results: {path}")


def draw(panels: dict[str, list[dict]], label: Callable[[dict], str], title: str, path: Path) -> None:
    """Draws how many times faster attncap is than each other provider: a panel for each list of results, with a group
    of bars for each label."""
    providers = dict.fromkeys(result["provider"] for results in panels.values() for result in results)
    others = [name for name in providers if name != "native"]
    labels = [list(dict.fromkeys(map(label, results))) for results in panels.values()]
    height = 1.5 + 0.45 * max(map(len, labels))
    size = (5.5 * len(panels), height)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for axis, (name, results), panel_labels in zip(axes[0], panels.items(), labels, strict=True):
        for index, other in enumerate(others):
            chosen = [result for result in results if result["provider"] == other]
            offset = (index - (len(others) - 1) / 2) * 0.27
            positions = [panel_labels.index(label(result)) + offset for result in chosen]
            axis.barh(positions, [result["native is faster by"] for result in chosen], height=0.25, label=other)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set(xscale="log", title=name, xlabel="native is faster by")
        axis.set_yticks(range(len(panel_labels)), panel_labels)
        axis.invert_yaxis()
    axes[0][0].legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    print(f"picture: {path}")
