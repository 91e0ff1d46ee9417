"""What to run when a GPU is at hand for some minutes: tests, then times, each beside its floor and its prediction.

python benchmarks/first_gpu_run.py                     # at most 9 minutes
python benchmarks/first_gpu_run.py --minutes 4         # the last parts are left out

Each part is a process of its own, so that none can harm the next one; what it found is written at once.
"""

import contextlib
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gpu_measurements
import measure
import torch
import tyro
from gpu_measurements import Settings

from attncap.files import write_atomically

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Config:
    minutes: float = 9.0
    """For all parts. What does not fit is left out."""
    parts: tuple[str, ...] = ()
    """By default all."""
    tests: tuple[str, ...] = ()
    """What to test, instead of everything."""
    measured: Settings = field(default_factory=Settings)
    output: Path = Path(__file__).parent / "results"
    """Directory for first_gpu_run-DEVICE.json, the page first_gpu_run-DEVICE.md, and the logs of the parts."""


# Programs. Each is a command, and a function from its output and exit status (None: it ran out of time) to a result.


class Program(NamedTuple):
    command: list[str]
    summary: Callable[[str, int | None], dict[str, Any]]


def info(config: Config) -> Program:
    return Program([sys.executable, "-m", "attncap.info"], lambda output, status: {"case": "info", "output": output})


def driver(config: Config) -> Program:
    fields = "name,driver_version,compute_cap,clocks.max.sm,clocks.sm,clocks.mem,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"]
    return Program(command, lambda output, status: {"case": "driver", "output": output})


def tests(target: str, processes: int, config: Config) -> Program:
    """Those marked gpu; the first failure ends the part."""
    command = [sys.executable, "-m", "pytest", "-x", "-v", "--tb=short", "-p", "no:cacheprovider", "--durations=5"]
    marked = ["-m", "gpu"] if config.measured.device == "cuda" else []
    distribution = "loadscope" if processes == 1 else "worksteal"
    chosen = config.tests or [target]
    return Program([*command, "-n", str(processes), "--dist", distribution, *marked, *chosen], count_tests)


def count_tests(output: str, status: int | None) -> dict[str, Any]:
    outcomes = re.findall(r"^\[gw\d+\] \[ *\d+%\] (PASSED|FAILED|ERROR|SKIPPED) (\S+)", output, re.MULTILINE)
    counts = {word.lower(): sum(outcome == word for outcome, _ in outcomes) for word in ("PASSED", "SKIPPED")}
    failed = [test for outcome, test in outcomes if outcome in ("FAILED", "ERROR")]
    return {"case": "tests", **counts, "failed": failed, "last line": (output.splitlines() or [""])[-1]}


def sanitizer(tool: str, config: Config) -> Program:
    packages = Path(sysconfig.get_paths()["purelib"])
    of_pip = map(str, packages.glob("nvidia/**/compute-sanitizer/compute-sanitizer"))
    found = shutil.which("compute-sanitizer") or next(of_pip, "compute-sanitizer")
    options = ["--tool", tool, "--kernel-name", "kns=attncap", "--error-exitcode", "9", "--print-limit", "20"]
    command = gpu_measurements.command("small calls", config.measured, Path(os.devnull))
    return Program([found, *options, *command], sanitizer_summary)


def sanitizer_summary(output: str, status: int | None) -> dict[str, Any]:
    found = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY: .*)", output)
    return {"case": "sanitizer", "summary": found[-1] if found else "none"}


COUNTERS = {  # of Nsight Compute
    "gpu__time_duration.sum": "ns",
    "smsp__inst_executed.sum": "instructions",
    "l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum": "sectors loaded",
    "l1tex__t_sectors_pipe_lsu_mem_global_op_st.sum": "sectors stored",
    "dram__bytes_read.sum": "bytes from DRAM",
    "l1tex__data_bank_conflicts_pipe_lsu.sum": "bank conflicts",
    "sm__warps_active.avg.per_cycle_active": "warps a multiprocessor",
    "smsp__average_warp_latency_per_inst_issued.ratio": "cycles an instruction",
}


def counters(config: Config) -> Program:
    places = [Path("/usr/local/cuda/bin/ncu"), *Path("/opt/nvidia/nsight-compute").glob("*/ncu")]
    found = shutil.which("ncu") or next((str(path) for path in places if path.is_file()), "ncu")
    options = ["--clock-control", "none", "--csv", "--print-units", "base", "--metrics", ",".join(COUNTERS)]
    options += ["--kernel-name", "regex:soft_attention|beam_search_step|lstm_step"]
    command = gpu_measurements.command("single calls", config.measured, Path(os.devnull))
    return Program([found, *options, *command], counted)


def counted(output: str, status: int | None) -> dict[str, Any]:
    """Each launch with its counters. The lines of CSV are between those of the program."""
    rows = csv.DictReader(line for line in output.splitlines() if line.startswith('"'))
    launches: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["Metric Name"] in COUNTERS:
            launch = launches.setdefault(row["ID"], {"kernel": row["Kernel Name"]})
            launch[COUNTERS[row["Metric Name"]]] = row["Metric Value"]
    return {"case": "counters", "launches": list(launches.values())}


CORES = min(16, os.cpu_count() or 1)
PROGRAMS: dict[str, Callable[[Config], Program]] = {
    "driver": driver,
    "info": info,
    "tests of ops": partial(tests, "tests/ops", CORES),
    "tests of search": partial(tests, "tests/search", CORES),
    "tests of training": partial(tests, "tests/training/test_devices.py", 1),
    "memcheck": partial(sanitizer, "memcheck"),
    "racecheck": partial(sanitizer, "racecheck"),
    "counters": counters,
}

LEAST_SECONDS = 10  # with less left, no part begins
# The most seconds that a part may take, in the order in which they run.
SECONDS = {
    "driver": 20,
    "info": 30,
    "ceilings": 40,
    "tests of ops": 100,
    "kernels": 70,
    "search": 60,
    "training": 50,
    "tests of search": 100,
    "memcheck": 60,
    "racecheck": 60,
    "counters": 60,
    "plain": 70,
    "tests of training": 100,
}


def run_part(part: str, config: Config, seconds: float, folder: Path) -> dict[str, Any]:
    """Runs a part for at most this long, and returns what it found until then."""
    begin, log = time.perf_counter(), folder / f"{part.replace(' ', '-')}.log"
    results = log.with_suffix(".jsonl")
    results.unlink(missing_ok=True)
    program = PROGRAMS[part](config) if part in PROGRAMS else None
    command = program.command if program else gpu_measurements.command(part, config.measured, results)
    status, error = run_program(command, seconds, log)
    output = log.read_text(errors="replace")
    if program:
        found = [] if error else [program.summary(output, status)]
    else:
        found = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    record = {"part": part, "status": "ok", "seconds": time.perf_counter() - begin, "results": found}
    if status != 0:
        record["status"] = error or ("out of time" if status is None else f"failed, exit status {status}")
    if status != 0 or any("error" in result for result in found):
        record["output"] = output[-6000:]
    return record


def run_program(command: Sequence[str], seconds: float, log: Path) -> tuple[int | None, str]:
    """Exit status (None: stopped when the time was over), and why it could not be started."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1"}
    with open(log, "w") as output:
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            return 1, f"could not be started: {error}"
        try:
            return process.wait(seconds), ""
        except subprocess.TimeoutExpired:
            return None, ""
        finally:
            with contextlib.suppress(ProcessLookupError):  # with all processes that it has started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def main(config: Config) -> None:
    begin = time.perf_counter()
    if unknown := set(config.parts) - set(SECONDS):
        sys.exit(f"no such part: {', '.join(sorted(unknown))}. There are: {', '.join(SECONDS)}")
    path = config.output / f"first_gpu_run-{config.measured.device}.json"
    config.output.mkdir(parents=True, exist_ok=True)
    logs = config.output / "first_gpu_run-logs"
    logs.mkdir(exist_ok=True)
    record = {**measure.environment(torch.device(config.measured.device)), "minutes": config.minutes, "parts": []}
    for part in config.parts or SECONDS:
        left = 60 * config.minutes - (time.perf_counter() - begin)
        print(f"{part}, {left:.0f} s left", flush=True)
        record["parts"].append({"part": part, "status": "left out: no time", "seconds": 0.0, "results": []})
        if left >= LEAST_SECONDS:
            try:
                record["parts"][-1] = run_part(part, config, min(left, SECONDS[part]), logs)
            except Exception as error:
                traceback.print_exc()
                record["parts"][-1]["status"] = f"failed: {type(error).__name__}: {error}"
        print(f"{part}: {outcome(record['parts'][-1])}", flush=True)
        write_atomically(path, json.dumps(record, indent=1) + "\n")
        write_atomically(path.with_suffix(".md"), page(record))
    print(page(record))
    print(f"results: {path}")


# The page.


def page(record: dict[str, Any]) -> str:
    """Everything that was found, as Markdown."""
    parts = {part["part"]: part for part in record["parts"]}
    lines = ["# First run on a GPU", "", ", ".join(f"{k} {record[k]}" for k in ("device", "date", "torch", "python"))]
    lines += ["", "| part | result | seconds |", "|---|---|---|"]
    lines += [f"| {name} | {outcome(part)} | {part['seconds']:.0f} |" for name, part in parts.items()]
    ceiling = {result["case"]: result for result in results_of(parts, "ceilings")}
    predicted = predictions(record["device"])
    if ceiling:
        lines += ["", "## Ceilings", "", "| | |", "|---|---|"]
        lines += [f"| {case} | {values(result)} |" for case, result in ceiling.items()]
    for name in ("kernels", "search", "training", "plain"):
        timed = [result for result in results_of(parts, name) if "kernels" not in result]
        if timed:
            lines += ["", f"## {name.capitalize()}", ""]
            lines += ["| case | floor us | predicted us | measured us | times the floor | |", "|---" * 6 + "|"]
            lines += [time_row(result, ceiling, predicted) for result in timed]
    for result in (result for name in ("search", "training") for result in results_of(parts, name)):
        if "kernels" in result:
            lines += ["", f"## {result['case'].capitalize()}", "", f"{result['all us']:.0f} us on the device.", ""]
            lines += ["| kernel | calls | us |", "|---|---|---|"]
            lines += [f"| `{row['kernel'][:90]}` | {row['calls']} | {row['us']:.1f} |" for row in result["kernels"]]
    for launches in (result["launches"] for result in results_of(parts, "counters")):
        lines += ["", "## Counters", "", f"| kernel | {' | '.join(COUNTERS.values())} |"]
        lines.append("|---" * (1 + len(COUNTERS)) + "|")
        for launch in launches:
            lines.append(f"| {' | '.join(launch.get(name, '') for name in ('kernel', *COUNTERS.values()))} |")
    for name, part in parts.items():
        if "output" in part:
            lines += ["", f"## Output of {name}", "", "```", part["output"][-3000:], "```"]
    return "\n".join(lines) + "\n"


def results_of(parts: dict[str, dict], name: str) -> list[dict]:
    return parts[name]["results"] if name in parts else []


def outcome(part: dict[str, Any]) -> str:
    """The status, and what the program says of itself."""
    said = [str(result[key]) for result in part["results"] for key in ("last line", "summary") if key in result]
    errors = sum("error" in result for result in part["results"])
    return ", ".join([part["status"], *said, *([f"{errors} cases failed"] if errors else [])])


def floor(result: dict[str, Any], ceiling: dict[str, dict]) -> float | None:
    """Microseconds that a result's work takes at the least, one part after the other, at the measured ceilings."""
    works = result.get("of parts") or ([[result["bytes"], result["flops"]]] if "bytes" in result else [])
    bandwidth = max(ceiling.get("bandwidth", {}).get(f"{way} GB/s", 0.0) for way in ("copy", "read"))
    rate = ceiling.get(f"product {result.get('dtype')}", {}).get("TFLOP/s")
    if not works or not bandwidth or not rate:
        return None
    return sum(max(size / bandwidth / 1e3, flops / rate / 1e6) for size, flops in works)


def time_row(result: dict[str, Any], ceiling: dict[str, dict], predicted: dict[str, float]) -> str:
    case = result["case"]
    if "error" in result:
        return f"| {case} | | | | | {result['error']} |"
    least = floor(result, ceiling)
    measured = result["us"] if "us" in result else 1000 * result["ms"]
    expected = predicted.get(case.removeprefix("of the step: "))
    cells = [least, expected, measured, least and measured / least]
    shown = ["" if cell is None else f"{cell:.1f}" for cell in cells]
    hidden = ("case", "us", "ms", "bytes", "flops", "dtype", "sets", "of parts", "by kernel")
    others = {key: value for key, value in result.items() if key not in hidden}
    others |= {kernel_name(row["kernel"]): row["us"] for row in result.get("by kernel", [])[:6]}
    return f"| {case} | {' | '.join(shown)} | {values(others)} |"


def kernel_name(signature: str) -> str:
    """A kernel's name without its namespace, template arguments and parameters."""
    return re.sub(r"^(?:void )?(?:\w+::)*(\w+).*$", r"\1", signature)


def values(result: dict[str, Any]) -> str:
    shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in result.items()}
    return ", ".join(f"{key} {value}" for key, value in shown.items() if key != "case")


def predictions(device: str) -> dict[str, float]:
    """Microseconds by case that cuda_model.py predicted for this GPU, if it did."""
    path = Path(__file__).parent / "results" / "cuda_model.json"
    cases = json.loads(path.read_text())["cases"] if path.is_file() else []
    of_gpu = ((case["case"], gpu, us) for case in cases for gpu, us in case["predicted us"].items())
    return {case: us for case, gpu, us in of_gpu if re.search(rf"\b{gpu}\b", device)}


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
