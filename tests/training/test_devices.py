"""A run on each device, in each precision, is the one in float32 on the CPU, apart from rounding."""

import pytest
from conftest import TINY, make_flickr8k
from running import metrics

pytestmark = pytest.mark.slow
SETTINGS = [
    *TINY,
    *"--encoder squeezenet1_1 --encoder-layer features.7 --image-size 64 --grid 3 --captions-per-image 2".split(),
    *"--epochs 2 --batch-size 10 --fine-tune-after 1 --beam-size 1 --max-length 8".split(),
    *"--learning-rate 1e-3 --encoder-learning-rate 1e-4".split(),
]
ROUNDING = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 3e-2}  # share of the loss


@pytest.fixture(scope="module")
def start(server, tmp_path_factory):
    """Starts a run on the data of this module, and returns its folder when it has succeeded."""
    data = make_flickr8k(tmp_path_factory.mktemp("devices") / "data")

    def run(*arguments, processes: int = 0):
        folder = tmp_path_factory.mktemp("run")
        arguments = ["--data", data, *SETTINGS, *arguments, "--output", folder / "run"]
        if processes:
            started = server.start_processes(processes, folder / "log", arguments)
        else:
            started = [server.start(folder / "log", arguments, XDG_CACHE_HOME=folder / "cache")]
        assert [process.status() for process in started] == [0] * len(started), started[0].text()
        return folder / "run"

    return run


@pytest.fixture(scope="module")
def expected(start):
    return start("--device", "cpu")


def assert_same_losses(found, expected, share):
    for line, true in zip(metrics(found), metrics(expected), strict=True):
        for name in ("loss_words", "loss_attention"):
            assert line[name] == pytest.approx(true[name], rel=share), name


@pytest.mark.parametrize("precision", ROUNDING)
def test_precisions(start, expected, device, precision):
    run = start("--device", device, "--precision", precision)
    assert_same_losses(run, expected, ROUNDING[precision])


def test_one_of_several_processes(start, expected, device):
    """On a GPU by NCCL."""
    assert_same_losses(start("--device", device, processes=1), expected, ROUNDING["float32"])


@pytest.mark.parametrize(
    "arguments",
    [
        "--scheduled-sampling 0.5 --precision bfloat16",
        "--objective scst --samples 3",
        "--cache-features --fine-tune-from none --workers 2",
    ],
)
def test_other_ways_to_train(start, expected, device, arguments):
    """They run to the end, and the losses are finite."""
    start_from = ["--start-from", expected] if "scst" in arguments else []
    lines = metrics(start("--device", device, *arguments.split(), *start_from))[-2:]
    assert all(abs(line["loss_words"]) < 10 for line in lines)
