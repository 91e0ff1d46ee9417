"""The first run on a GPU does not fail for a reason that has nothing to do with the GPU: its parts run on the CPU, the
graphs with a stand-in for torch.cuda."""

import contextlib
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import cases
import first_gpu_run
import gpu_measurements
import measure
from first_gpu_run import Config, Program
from gpu_measurements import MEASUREMENTS, Results, Settings

SIZES = cases.Sizes(cells=9, channels=16, size=8, vocabulary=50)
SMALL = Settings(device="cpu", images=(1, 2), captions=3, words=4, sizes=SIZES, rounds=1)


@pytest.mark.parametrize("part", MEASUREMENTS)
def test_a_measurement(part, tmp_path, monkeypatch, capsys):
    """Nothing fails in any part, and what is timed has the work from which its floor follows."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    MEASUREMENTS[part](SMALL, torch.device("cpu"), Results(tmp_path / "results"))
    results = [json.loads(line) for line in (tmp_path / "results").read_text().splitlines()]
    assert results and not [result for result in results if "error" in result]
    assert all(result["us"] > 0 for result in results if "us" in result)
    ceiling = {"bandwidth": {"copy GB/s": 1.0}, "product bfloat16": {"TFLOP/s": 1.0}, "product float32": {"TFLOP/s": 1}}
    for result in results:
        if "bytes" in result or "of parts" in result:
            assert first_gpu_run.floor(result, ceiling) > 0
    if part == "kernels":
        assert [result["case"] for result in results] == [case.name for case in cases.kernels(SMALL.images)]
    if part == "search":
        assert {"decode step B=2 K=5", "search B=1 K=5"} <= {result["case"] for result in results}
    record = {"device": "a device", "date": "today", "torch": "2", "python": "3"}
    record["parts"] = [{"part": part, "status": "ok", "seconds": 1.0, "results": results}]
    assert all(result["case"].lower() in first_gpu_run.page(record).lower() for result in results[:1] if "us" in result)


def test_an_error_in_one_case_leaves_the_others(tmp_path, monkeypatch):
    def make(case, *_):
        if case.op == "lstm_step":
            raise RuntimeError("it broke")
        return lambda: None

    monkeypatch.setattr(cases, "make", make)
    MEASUREMENTS["kernels"](SMALL, torch.device("cpu"), Results(tmp_path / "results"))
    results = [json.loads(line) for line in (tmp_path / "results").read_text().splitlines()]
    errors = [result["error"] for result in results if result["case"].startswith("lstm_step")]
    assert errors == ["RuntimeError: it broke"] * 4
    assert all("us" in result for result in results if not result["case"].startswith("lstm_step"))


def test_necessary_bytes_and_operations():
    """By hand, for P = 9, D = 16, A = E = H = 8, V = 50, B = 2 images of K = 5 rows."""

    def work(op: str, dtype: str) -> tuple[int, int]:
        return cases.work(cases.Case(op, 2, 5, dtype), SIZES)

    features, keys, rows = 2 * 9 * 16, 2 * 9 * 8, 10
    assert work("soft_attention", "bfloat16") == (2 * (features + keys + 8 + rows * (8 + 16) + rows * (16 + 9)), 0)
    assert work("lstm_step", "float32") == (4 * rows * (32 + 40 + 40 + 8 + 8 + 8 + 8) + 16 * rows, 0)
    assert work("beam_search_step", "float32") == (4 * rows * 50 + 36 * rows, 0)
    assert work("product for words", "bfloat16") == (2 * (rows * 8 + 8 * 50 + rows * 50), 2 * rows * 8 * 50)


PROGRAMS = {
    "good": ["sh", "-c", "echo all is well"],
    "bad": ["sh", "-c", "echo it broke; exit 3"],
    "slow": ["sh", "-c", "echo begun; sleep 600 & sleep 600"],
    "missing": ["no such program"],
    "wrong": None,
    "last": ["true"],
}


@pytest.fixture
def programs(monkeypatch):
    """Parts that are these programs, and their summaries: what they wrote, in capitals."""

    def program(command, config):
        return Program(command, lambda output, status: {"case": command[0], "last line": output.strip().upper()})

    functions = {name: lambda config, c=command: program(c, config) for name, command in PROGRAMS.items()}
    functions["wrong"] = lambda config: 1 / 0
    monkeypatch.setattr(first_gpu_run, "PROGRAMS", functions)
    monkeypatch.setattr(first_gpu_run, "SECONDS", dict.fromkeys(PROGRAMS, 60) | {"slow": 1})


def test_a_part_that_fails_leaves_the_others(programs, tmp_path, monkeypatch):
    monkeypatch.setattr(first_gpu_run, "LEAST_SECONDS", 0)
    first_gpu_run.main(Config(output=tmp_path, measured=SMALL))
    record = json.loads((tmp_path / "first_gpu_run-cpu.json").read_text())
    assert {part["part"]: part["status"] for part in record["parts"]} == {
        "good": "ok",
        "bad": "failed, exit status 3",
        "slow": "out of time",
        "missing": "could not be started: [Errno 2] No such file or directory: 'no such program'",
        "wrong": "failed: ZeroDivisionError: division by zero",
        "last": "ok",
    }
    assert [part.get("output") for part in record["parts"]] == [None, "it broke\n", "begun\n", "", None, None]
    assert 1 <= record["parts"][2]["seconds"] < 20
    page = (tmp_path / "first_gpu_run-cpu.md").read_text()
    assert "| good | ok, ALL IS WELL | 0 |" in page and "| bad | failed, exit status 3, IT BROKE | 0 |" in page


def test_results_are_on_disk_after_every_part(programs, tmp_path, monkeypatch):
    done = []

    def run_part(part, *_):
        if done:
            record = json.loads((tmp_path / "first_gpu_run-cpu.json").read_text())
            assert [part["part"] for part in record["parts"]] == done
        done.append(part)
        return {"part": part, "status": "ok", "seconds": 0.0, "results": []}

    monkeypatch.setattr(first_gpu_run, "run_part", run_part)
    first_gpu_run.main(Config(output=tmp_path, measured=SMALL))
    assert done == list(PROGRAMS)


def test_what_does_not_fit_is_left_out(programs, tmp_path):
    first_gpu_run.main(Config(output=tmp_path, measured=SMALL, minutes=0.0))
    record = json.loads((tmp_path / "first_gpu_run-cpu.json").read_text())
    assert {part["status"] for part in record["parts"]} == {"left out: no time"}


def test_a_part_that_there_is_not(tmp_path):
    with pytest.raises(SystemExit, match="no such part: kernel. There are: driver, info"):
        first_gpu_run.main(Config(output=tmp_path, measured=SMALL, parts=("kernel",)))


@pytest.mark.slow
def test_from_the_command_to_the_page(tmp_path, monkeypatch):
    """Two parts as they are: a measurement in its own process, and tests."""
    config = Config(
        output=tmp_path, measured=SMALL, parts=("training", "tests of ops"), tests=("tests/ops/test_library.py",)
    )
    first_gpu_run.main(config)
    training, tests = json.loads((tmp_path / "first_gpu_run-cpu.json").read_text())["parts"]
    assert training["status"] == tests["status"] == "ok"
    assert [result["case"] for result in training["results"]][0] == "training step, native"
    assert tests["results"][0]["passed"] > 5 and tests["results"][0]["failed"] == []
    assert re.search(r"\| tests of ops \| ok, =+ \d+ passed", (tmp_path / "first_gpu_run-cpu.md").read_text())


def test_tests_are_counted_even_if_they_are_stopped():
    output = (
        "[gw3] [  2%] PASSED tests/ops/test_a.py::test_b[cuda-1] \n"
        "[gw0] [  4%] SKIPPED tests/ops/test_a.py::test_c \n"
        "[gw0] [  6%] FAILED tests/ops/test_a.py::test_d[cuda] \n"
        "tests/ops/test_a.py::test_e"
    )
    found = first_gpu_run.count_tests(output, None)
    assert found["passed"] == found["skipped"] == 1 and found["failed"] == ["tests/ops/test_a.py::test_d[cuda]"]


def test_the_sanitizers_last_words():
    output = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 2 errors\n"
    assert first_gpu_run.sanitizer_summary(output, 9)["summary"] == "ERROR SUMMARY: 2 errors"
    output = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
    assert "0 hazards" in first_gpu_run.sanitizer_summary(output, 0)["summary"]
    assert first_gpu_run.sanitizer_summary("", 1)["summary"] == "none"


def test_counters_among_other_output():
    output = (
        "==PROF== Connected to process 1\n  case soft_attention  done True\n"
        '"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
        '"0","1","void a<float, 5>(b)","gpu__time_duration.sum","ns","1,234"\n'
        '"0","1","void a<float, 5>(b)","smsp__inst_executed.sum","inst","99"\n'
        '"1","1","c(d)","gpu__time_duration.sum","ns","5"\n'
    )
    first, second = first_gpu_run.counted(output, 0)["launches"]
    assert first == {"kernel": "void a<float, 5>(b)", "ns": "1,234", "instructions": "99"}
    assert second == {"kernel": "c(d)", "ns": "5"}
    part = {"part": "counters", "status": "ok", "seconds": 1.0, "results": [first_gpu_run.counted(output, 0)]}
    page = first_gpu_run.page({"device": "", "date": "", "torch": "", "python": "", "parts": [part]})
    assert "| void a<float, 5>(b) | 1,234 | 99 | " in page


class Device:
    """A stand-in for torch.cuda whose clock only moves when work is done: 2 ms a call, 5 of sleep."""

    def __init__(self):
        self.now, self.captured, self.stream, self.log = 0.0, None, "default", []

    def work(self):
        if self.captured is None:
            self.now += 2
        else:
            self.captured.append(self.work)

    @contextlib.contextmanager
    def graph(self, graph, stream):
        assert stream == self.stream != "default" and self.captured is None
        self.captured = graph.calls
        yield
        self.captured = None

    def make_graph(self):
        calls = []
        return SimpleNamespace(calls=calls, replay=lambda: [call() for call in calls])

    def event(self, enable_timing):
        assert enable_timing
        event = SimpleNamespace()
        event.record = lambda: setattr(event, "time", self.now)
        event.elapsed_time = lambda end: end.time - event.time
        return event

    def sleep(self, cycles):
        self.now += 5


def test_calls_in_a_graph(monkeypatch):
    """Only the calls are timed, each function's calls in one graph, after a warm-up outside of it."""
    device = Device()
    fake = SimpleNamespace(
        Stream=lambda: "own",
        set_stream=lambda stream: setattr(device, "stream", stream),
        current_stream=lambda: device.stream,
        CUDAGraph=device.make_graph,
        graph=device.graph,
        Event=device.event,
        synchronize=lambda: None,
        _sleep=device.sleep,
    )
    monkeypatch.setattr(torch, "cuda", fake)
    made = []

    def twice():
        made.append(device.captured is not None)
        device.work()
        device.work()

    times = measure.interleaved({"once": device.work, "twice": twice}, measure.select("cuda"), 3, calls=20)
    assert times == {"once": 2.0, "twice": 4.0}
    assert made == [False] * 2 + [True] * 20


def test_inputs_of_many_images_are_several(monkeypatch):
    """As many as do not fit into twice the cache, but at least two; for one image one."""
    made = []
    monkeypatch.setattr(cases, "make", lambda case, *_: made.append(case) or (lambda: None))
    monkeypatch.setattr(measure, "interleaved", lambda *_: {"": 1.0})
    monkeypatch.setattr(gpu_measurements, "profile", lambda *_: {"kernels": []})
    properties = SimpleNamespace(L2_cache_size=3500)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    for B, cache, sets in ((1, 3500, 1), (2, 3500, 7), (2, 0, 2), (2, 10**9, measure.CALLS)):
        properties.L2_cache_size, made[:] = cache, []
        case = cases.Case("soft_attention", B, 1, "bfloat16", "tanh")  # of 2 images 1,076 bytes
        found = gpu_measurements.time_case(case, SMALL, torch.device("cuda"))
        assert len(made) == found["sets"] == sets and found["us"] == 1000


def test_a_kernel_has_a_short_name():
    signature = "void attncap::soft_attention_context_kernel<attncap::bfloat16, 5>(Forward<float>)"
    assert first_gpu_run.kernel_name(signature) == "soft_attention_context_kernel"
    assert first_gpu_run.kernel_name("nvjet_sm90_tst_64x8") == "nvjet_sm90_tst_64x8"


def test_predictions_of_this_device(tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "cuda_model.json").write_text(
        json.dumps({"cases": [{"case": "a", "predicted us": {"H100": 1.5, "T4": 9.0}}]})
    )
    monkeypatch.setattr(first_gpu_run, "__file__", str(tmp_path / "first_gpu_run.py"))
    assert first_gpu_run.predictions("NVIDIA H100 80GB HBM3") == {"a": 1.5}
    assert first_gpu_run.predictions("Tesla T4") == {"a": 9.0}
    assert first_gpu_run.predictions("NVIDIA L40") == {}
