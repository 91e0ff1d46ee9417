"""The model of the CUDA kernels' times: its arithmetic by hand, and what it says of the kernels as they are."""

import json
import os
import sys
from pathlib import Path

import pytest
from filelock import FileLock

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import cases
import cuda_model
from cases import Case, Sizes
from cuda_model import GPUS, Counter, Gpu, Launch, Model

SMALL = Gpu(
    capability=90, processors=10, gigahertz=1.0, bandwidth=1000, l2_bandwidth=4000, tensor=100,
    float32=10, fma=128, warps=64, blocks=32, shared=100_000,
)  # fmt: skip


def make_launch(blocks=40, threads=256, shared=0, registers=32, **counts) -> Launch:
    empty = {"instructions": {}, "global_load": {"requests": 0}}
    return Launch("kernel", blocks, threads, shared, empty | counts, 2.0, registers, 0)


@pytest.mark.parametrize(
    "launch, resident",
    [
        (make_launch(), 8),  # 64 warps
        (make_launch(threads=32), 32),  # blocks
        (make_launch(registers=128), 2),  # 65,536 / (256 x 128)
        (make_launch(registers=121), 2),  # in steps of 8 registers
        (make_launch(registers=65), 3),
        (make_launch(shared=30_000), 3),  # and 1 KiB of each block for the system
        (make_launch(shared=49_500), 1),
    ],
)
def test_resident_blocks(launch, resident):
    assert launch.resident(SMALL) == resident


def test_a_kernel_by_hand():
    """Counted for half the images. 40 blocks for all of them, so 4 of 8 warps each on each multiprocessor, at once."""
    load = {"requests": 1000, "sectors": 9000, "bytes": 200_000, "distinct": 500_000}
    shared = {"requests": 100, "wavefronts": 4000, "conflicts": 1000, "bytes": 12_800}
    instructions = {"fma": 640_000, "mufu": 32_000, "shuffle": 3200, "expanded": 320, "move": 10**9, "alu": 0}
    launch = make_launch(instructions=instructions, global_load=load, shared_load=shared)
    assert launch.instructions() == {"fma": 1_280_000, "mufu": 64_000, "shuffle": 6400, "expanded": 640}
    assert launch.accessed("sectors") == 18_000
    assert launch.touched() == 32_000_000 and launch.wavefronts("conflicts") == 2000
    issued = (1_280_000 + 64_000 + 6400 + 640) / 32
    cycles = cuda_model.INSTRUCTION * issued + cuda_model.LOAD * 2000
    cycles += cuda_model.SHUFFLE * 200 + cuda_model.EXPANDED * 20
    expected = {
        "memory": 32 * 1_000_000 / 1e6,
        "warps": cycles / 10 / 32 / 1e3,
        "issue": issued / 10 / 4 / 1e3,
        "FMA": 1_280_000 / 128 / 10 / 1e3,
        "MUFU": 64_000 / 16 / 10 / 1e3,
        "shared": 8000 / 10 / 1e3,
    }
    assert launch.limits(SMALL, cached=False) == pytest.approx(expected)
    assert launch.limits(SMALL, cached=True)["memory"] == pytest.approx(8.0)
    assert launch.limits(SMALL, cached=True)["warps"] < expected["warps"]
    slowest = max(us for limit, us in expected.items() if limit != "memory")
    whole = cuda_model.LAUNCH + (32.0**2 + slowest**2) ** 0.5
    assert launch.microseconds(SMALL, cached=False) == pytest.approx(whole)


def test_the_busiest_multiprocessor_decides():
    """Of 12 blocks on 10 multiprocessors, one has two: twice the time of 10 blocks, with the same work in each; unless
    the two are resident at once and hide each other's waiting."""
    few = make_launch(blocks=10, instructions={"fma": 10_000}).limits(SMALL, cached=False)
    more = make_launch(blocks=12, instructions={"fma": 12_000}).limits(SMALL, cached=False)
    assert more["FMA"] == pytest.approx(2 * few["FMA"])
    assert more["warps"] == pytest.approx(few["warps"])
    large = make_launch(blocks=12, shared=90_000, instructions={"fma": 12_000}).limits(SMALL, cached=False)
    assert large["warps"] == pytest.approx(2 * few["warps"])


class FakeCounter:
    """Every kernel touches as many sectors as its call needs, and no more."""

    def launches(self, case: Case, sizes: Sizes) -> list[Launch]:
        load = {"requests": 1, "sectors": 1000, "bytes": 32_000, "distinct": 500}
        return [make_launch(instructions={"fma": 10}, global_load=load)]


@pytest.fixture
def models():
    return {name: Model(gpu, FakeCounter(), Sizes()) for name, gpu in GPUS.items()}


def test_products():
    model = Model(SMALL, FakeCounter(), Sizes())
    assert model.product(100e6, 8e3) == pytest.approx(cuda_model.PRODUCT + 1)  # 100 TFLOP/s
    assert model.product(100e6, 8e3, "float32") == pytest.approx(cuda_model.PRODUCT + 10)
    assert model.product(1, 8e6) == pytest.approx(cuda_model.PRODUCT + 8)  # 1,000 GB/s


def test_a_record_and_its_table(models):
    case = Case("soft_attention", 256, 5, "bfloat16", "tanh")
    described = cuda_model.describe(case, models, Sizes())
    assert described["bytes touched / necessary"] == round(32_000 / cases.work(case, Sizes()).bytes, 3)
    assert described["launches"][0]["sectors asked / used"] == 1.0
    assert described["predicted us"].keys() == GPUS.keys()
    steps = {"case": "decode step", "predicted us": {name: 1.0 for name in GPUS}}
    page = cuda_model.table(json.loads(json.dumps({"cases": [described, steps]})))
    assert "| soft_attention B=256 K=5 bfloat16 tanh | " in page and "| decode step |  | 1.0 |" in page


def test_a_step_is_the_sum_of_its_parts(models):
    model = models["H100"]
    parts = cases.decode_parts(256, 5)
    assert model.decode_step(256, 5) == pytest.approx(sum(map(model.call, parts)))
    assert model.decode_step(256, 5) > 4 * cuda_model.PRODUCT + 3 * cuda_model.LAUNCH
    assert model.training_step(64, 20) > 20 * (4 * cuda_model.PRODUCT + 4 * cuda_model.LAUNCH)
    assert models["T4"].training_step(64, 20) > model.training_step(64, 20)


def test_the_cases_have_arguments_for_the_counter():
    for case in cases.kernels((1, 256)):
        op, dtype, *sizes = cuda_model.arguments(case, Sizes())
        assert op == case.op and dtype == case.dtype and sizes
    case = Case("soft_attention", 2, 5, "float32", "relu")
    assert cuda_model.arguments(case, Sizes()) == "soft_attention float32 2 5 196 2048 512 relu gate".split()


@pytest.fixture(scope="module")
def counter(tmp_path_factory) -> Counter:
    """Of the kernels as they are, for compute capability 9.0; built by one of the test processes."""
    if not cuda_model.load_ptx().find_nvcc():
        pytest.skip("no nvcc")
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all test processes
    with FileLock(folder / "ptx-sm_90.lock"):
        return Counter(folder / "ptx-sm_90", "sm_90")


ALIGNED = Sizes(vocabulary=9536)  # as the search pads the logits


# Lanes that read 32 bytes of float32 gradients in two halves, of which the L1 cache has the second; and kernels whose
# warps read rows, or parts of rows, that need not begin with a sector.
MORE_SECTORS = {"weights_grad_kernel": 1.75, "softmax_grad_kernel": 1.3, "beam_search_step_kernel": 1.45}


def check_sectors(launches: list[Launch]) -> None:
    """Of what the threads of a warp read or write together they use every byte, but for the ends of rows."""
    for launch in launches:
        allowed = next((limit for part, limit in MORE_SECTORS.items() if part in launch.kernel), 1.05)
        assert 32 * launch.accessed("sectors") <= allowed * launch.accessed("bytes"), launch.kernel


# Both activations touch the same memory; tanh takes longer to run on the CPU.
OF_MEMORY = [
    case
    for case in cases.kernels((256,))
    if case.activation != "tanh" and (case.K == 1 or case.op != "soft_attention_backward")
]


@pytest.mark.slow
@pytest.mark.parametrize("case", OF_MEMORY, ids=lambda case: case.name)
def test_no_sector_is_used_in_part(counter, case):
    """And no call touches more memory than it needs, except for a backward, which also writes intermediate results."""
    launches = counter.launches(case, ALIGNED)
    check_sectors(launches)
    allowed = 1.1 if case.op == "soft_attention_backward" else 1.05
    assert sum(launch.touched() for launch in launches) <= allowed * cases.work(case, ALIGNED).bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    "call",
    [
        "soft_attention_backward bfloat16 2 1 196 2048 512 relu gate features",
        "soft_attention_keys_backward bfloat16 2 20 196 512 relu",
        "lstm_step bfloat16 64 512 0",
        "lstm_step_backward bfloat16 64 512",
    ],
)
def test_no_sector_is_used_in_part_in_training(counter, call):
    check_sectors(counter.launches_of(call.split()))


@pytest.mark.slow
def test_no_kernel_spills(counter):
    spills = {name: code for name, code in counter.resources.items() if code["spill_stores"] + code["spill_loads"]}
    assert not spills
