"""The benchmarks run, check what they time, and write their results."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = "--images 2 --beams 1 3 --cells 9 --channels 16 --attention 8 --activations tanh --dtypes float32 --rounds 1"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_soft_attention(device, tmp_path):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    command = [sys.executable, BENCHMARKS / "soft_attention.py", "--device", device, "--output", tmp_path]
    done = subprocess.run([*map(str, command), *SMALL.split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / f"soft_attention-{device}.json").read_text())
    assert {"device", "date", "torch", "bandwidth GB/s"} <= record.keys()
    assert len(record["results"]) == 3 * 2 * 4  # passes, beams, providers
    for result in record["results"]:
        assert result["ms"] > 0 and result["GB/s"] > 0
    assert (tmp_path / f"soft_attention-{device}.png").stat().st_size > 1000
