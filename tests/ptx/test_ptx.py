"""The CUDA kernels on nvcc's PTX, without a GPU; README.md says how.

ATTNCAP_PTX=all runs everything: for compute capability 7.5 too, approximate instructions with their largest error up,
down, and with none, guard pages before the arrays as well as after them, the launchers in all tests of tests/csrc, and
all of tests/ops. By default it is what takes less than four minutes of one core.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
spec = importlib.util.spec_from_file_location("ptx", HERE / "ptx.py")
ptx = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ptx)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not ptx.find_nvcc(), reason="needs nvcc")]
everything = os.environ.get("ATTNCAP_PTX") == "all"


def execute(*command, **environment) -> subprocess.CompletedProcess:
    environment = {**os.environ, **environment}
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module", params=["sm_90", "sm_75"] if everything else ["sm_90"])
def folder(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all test processes; tests/benchmarks/test_cuda_model.py uses the same build
    folder /= f"ptx-{request.param}"
    with FileLock(folder.with_suffix(".lock")):
        ptx.build(folder, request.param)
        ptx.build_tests(folder, with_launchers=everything)
    return folder


@pytest.mark.parametrize("guard", ["after", "before"] if everything else ["after"])
@pytest.mark.parametrize("approx", ["hash", "up", "down", "exact"] if everything else ["hash"])
@pytest.mark.parametrize("how", ["kernels", "launchers"] if everything else ["kernels"])
@pytest.mark.parametrize("op", ptx.OPS)
def test_csrc(folder, op, how, approx, guard):
    done = execute(folder / f"test_{op}_{how}", PTX_APPROX=approx, PTX_GUARD=guard, PTX_CHECK="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"PTX: (\d+) launches", done.stdout)[1]) > 100


# Of tests/ops, the error rule in every dtype and for all sizes, tails and rows, and the gradients.
OPS_TESTS = (
    "test_error_rule_dtypes or test_error_rule_rows or test_error_rule_images or test_error_rule_sizes "
    "or test_error_rule_little_shared_memory or test_few_images_with_many_tokens or test_ties "
    "or test_keys_backward or test_hand_worked_case or test_no_rows or test_fully_masked_rows"
)
OPS_FILES = [f"tests/ops/test_{op}.py" for op in ptx.OPS]


@pytest.fixture(scope="module")
def package(folder) -> Path:
    return ptx.build_package(folder)


@pytest.mark.parametrize("approx", ["hash", "up", "down", "exact"] if everything else ["down"])
def test_ops(package, approx):
    """The ops of the CUDA library, launchers and all, registered for the CPU."""
    selected = [*OPS_FILES, "tests/ops/test_attention_lstm.py"] if everything else [*OPS_FILES, "-k", OPS_TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", "not gpu", *selected]
    environment = {"PYTHONPATH": str(package), "PTX_APPROX": approx, "PTX_CHECK": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment})
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 50


# Faults that the checks have to find, each in a kernel of faults.cu that is right without it.
FAULTS = {
    "missing_barrier": "nobody has written",
    "written_too_early": "a race in shared memory",
    "missing_warp_barrier": "nobody has written",
    "diverged_barrier": "wait for others that never come",
    "wrong_shuffle": "wrong result",
    "wrong_mask": "outside of its mask",
    "beyond_shared": "of shared memory, beyond its 256",
    "too_much_shared": "more than allowed",
    "beyond_global": "memory fault",
    "misaligned": "a misaligned access of global memory",
    "launch_bounds": "more threads than its launch bounds",
    "unwritten": "nobody has written",
    "rounded_twice": "wrong result",
    "missing_wait": "an asynchronous copy is under way",
    "missing_bulk_wait": "an asynchronous copy is under way",
    "overwritten_by_copy": "a race in shared memory",
    "missing_cluster_barrier": "nobody has written",
    "ended_block": "a block that has ended",
}


@pytest.fixture(scope="module")
def faults(folder, tmp_path_factory) -> Path:
    return ptx.build_faults(folder, tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(faults, fault):
    assert execute(faults, fault, PTX_CHECK="1").stdout == "ok\n"
    assert FAULTS[fault] in execute(faults, fault, "planted", PTX_CHECK="1").stdout


@pytest.mark.parametrize("fault", ["missing_barrier", "missing_wait", "missing_cluster_barrier"])
def test_a_fault_is_found_without_checks(faults, fault):
    """The data that threads see is wrong, too."""
    assert execute(faults, fault, "planted").stdout == "wrong result\n"


@pytest.mark.parametrize("approx, error", [("exact", 0), ("up", 2**-11), ("down", -(2**-11))])
def test_approximate_instructions_have_the_largest_error_of_the_manual(faults, approx, error):
    tanh = 0.46211715726000976  # of 1/2
    assert abs(float(execute(faults, "tanh", PTX_APPROX=approx).stdout) / tanh - 1 - error) < 1e-7


@pytest.mark.parametrize(
    "op, pattern, replacement, found",
    [
        ("beam_search_step", r"bar\.sync\s+0;", "", "race in shared memory|nobody has written"),
        ("beam_search_step", r"shfl\.sync\.bfly", "shfl.sync.down", "FAILED|wait for others that never come"),
        ("lstm_step", r"(setp\.ge\.s64\s+(%p\d+),[^;]*;\s*)@\2 bra\s+\$\w+;", r"\1", "memory fault"),
    ],
    ids=["barrier", "shuffle", "bound"],
)
def test_a_fault_planted_in_a_kernel_is_found(folder, tmp_path, op, pattern, replacement, found):
    """In the op's PTX, barriers or bounds are missing, or shuffles take another lane's value."""
    planted = tmp_path / f"{op}.ptx"
    text = (folder / f"nvcc/{op}.ptx").read_text()
    changed, count = re.subn(pattern, replacement, text)
    assert count > 0
    planted.write_text(changed)
    objects = ptx.build_kernels([planted], tmp_path)
    program = ptx.link_test(folder, op, tmp_path / "test", replaced=objects)
    done = execute(program, PTX_CHECK="1")
    assert done.returncode != 0 and re.search(found, done.stdout + done.stderr), done.stdout + done.stderr


def test_counts_by_hand(folder):
    """lstm_step at N = 4, H = 64, E = 32 in float32: each array is read or written once."""
    (counts,) = ptx.count(folder, "lstm_step float32 4 64 32".split())
    gates, outputs = 4 * 4 * 64, 4 * 32
    read = 4 * (2 * (gates + outputs) + gates + 4 * 64) + 2 * 4 * 8  # word table, context part; recurrent; c; indices
    assert counts["global_load"]["distinct"] * 32 == read
    written = 4 * (2 * 4 * 64 + outputs)
    assert counts["global_store"]["sectors"] * 32 == counts["global_store"]["bytes"] == written
    assert counts["kernel"].startswith("lstm_step_kernel<float")


def test_bank_conflicts_by_hand(faults):
    """Two warps write 32 floats each: adjacent ones in one pass; a column of a matrix of 32 columns in 32 passes."""
    adjacent, column = (ptx.run_counted(faults, "bank_conflicts", *planted)[0] for planted in ([], ["planted"]))
    assert adjacent["shared_store"] == {"requests": 2, "wavefronts": 2, "conflicts": 0, "bytes": 256}
    assert column["shared_store"] == {"requests": 2, "wavefronts": 64, "conflicts": 62, "bytes": 256}


def test_an_unknown_instruction_is_refused(folder, tmp_path):
    text = (folder / "nvcc/lstm_step.ptx").read_text().replace("ret;", "frobnicate.f32 %f1, %f1;\nret;", 1)
    (tmp_path / "unknown.ptx").write_text(text)
    done = execute(sys.executable, HERE / "translate.py", tmp_path, tmp_path / "unknown.ptx")
    assert done.returncode != 0 and "frobnicate" in done.stderr
