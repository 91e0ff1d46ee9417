"""The benchmarks run, check what they time, and write their results."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def run(name, device, flags, folder):
    """The record that a benchmark writes."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    command = [sys.executable, BENCHMARKS / f"{name}.py", "--device", device, "--output", folder]
    done = subprocess.run([*map(str, command), *flags.split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads((folder / f"{name}-{device}.json").read_text())
    assert {"device", "date", "torch"} <= record.keys()
    assert (folder / f"{name}-{device}.png").stat().st_size > 1000
    return record


@DEVICES
def test_soft_attention(device, tmp_path):
    small = "--images 2 --beams 3 --cells 9 --channels 16 --attention 8"
    flags = f"{small} --activations tanh --dtypes float32 --rounds 1"
    record = run("soft_attention", device, flags, tmp_path)
    assert len(record["results"]) == 3 * 4  # passes, providers
    for result in record["results"]:
        assert result["ms"] > 0 and result["GB/s"] > 0


@DEVICES
def test_lstm_step(device, tmp_path):
    small = "--rows 3 --hidden 8 --embedding 4 --vocabulary 50"
    record = run("lstm_step", device, f"{small} --calls 2 --rounds 1", tmp_path)
    assert len(record["results"]) == 2 * 3  # with and without E; providers
    assert all(result["ms"] > 0 for result in record["results"])


@DEVICES
def test_beam_search(device, tmp_path):
    small = "--images 2 --beams 3 --cells 9 --channels 16 --size 8 --vocabulary 50 --steps 4"
    record = run("beam_search", device, f"{small} --dtypes float32 --rounds 1", tmp_path)
    assert len(record["search"]) == 4  # providers
    assert len(record["selection"]) == 2
    for result in record["search"]:
        assert result["captions/s"] > 0 and result["share of floor"] > 0
        assert result["other captions"] == 0


@DEVICES
def test_training_step(device, tmp_path):
    small = "--captions 6 --rows 3 --words 7 --cells 9 --channels 16 --size 8 --vocabulary 50"
    record = run("training_step", device, f"{small} --encoders fine-tuned --dtypes float32 --rounds 1", tmp_path)
    assert len(record["results"]) == 4  # providers
    for result in record["results"]:
        assert result["ms"] > 0 and result["words"] == 42


def test_cider(tmp_path):
    flags = "--captions 20 --references 2 --vocabulary 50 --threads 1 3 --rounds 1 --output"
    command = [sys.executable, BENCHMARKS / "cider.py", *flags.split(), tmp_path]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "cider.json").read_text())
    assert {"device", "date", "torch"} <= record.keys()
    assert len(record["results"]) == 2 + 2 * 2 and all(result["ms"] > 0 for result in record["results"])
