import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import COLORS, TINY, make_flickr8k
from safetensors.torch import load_file

from attncap import Captioner
from attncap.cli.train import given_settings, resume_command
from attncap.config import ModelConfig
from attncap.data import Example, ImageError
from attncap.data.vocabulary import Vocabulary
from attncap.training.config import RunConfig, TrainConfig
from attncap.training.run import evaluate_test_split


def test_training_learns_what_is_in_the_pictures(trained, flickr8k):
    log = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in log] == list(range(1, 16))
    assert log[-1]["loss_words"] < 0.5 * log[0]["loss_words"]
    assert {"seconds", "loss_attention", "BLEU-4", "ROUGE-L", "CIDEr"} <= log[0].keys()
    metrics = json.loads((trained / "test.json").read_text())
    assert metrics["BLEU-1"] > 0.9
    assert (trained / "attention.png").stat().st_size > 1000
    settings = json.loads((trained / "settings.json").read_text())
    assert settings["settings"]["run"]["epochs"] == 15 and settings["versions"]["torch"] == torch.__version__
    # Right colours in pictures it never saw, and the native and the plain path say the same.
    results = json.loads((trained / "results.json").read_text())
    paths = [flickr8k / "Images" / result["image_id"] for result in results]
    native = Captioner.from_pretrained(trained).caption(paths)
    plain = Captioner.from_pretrained(trained, backend="torch").caption(paths)
    for path, one, other in zip(paths, native, plain, strict=True):
        assert list(COLORS)[int(path.stem) % 3] in one.words
        assert one.text == other.text
        assert one.attention.shape == (len(one.words), 4, 4)
        torch.testing.assert_close(one.attention, other.attention, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(one.attention.sum(dim=(1, 2)), torch.ones(len(one.words)))


@pytest.mark.slow
def test_resume_gives_the_same_weights(attncap, flickr8k, tmp_path):
    """Stopped after two of four epochs and resumed, a run ends in the weights of an uninterrupted one, bit for bit."""
    arguments = ["--data", flickr8k, *TINY, "--augment", "--dropout", "0.3", "--epochs"]
    assert attncap("train", *arguments, 4, "--output", tmp_path / "whole")[0] == 0
    script = (
        "import os, runpy, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
        "import attncap.evaluation\n"
        "evaluate, calls = attncap.evaluation.evaluate, []\n"
        "def interrupted(*arguments, **options):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 3: os.kill(os.getpid(), signal.SIGINT)\n"
        "    return evaluate(*arguments, **options)\n"
        "attncap.evaluation.evaluate = interrupted\n"
        "sys.argv = ['train', *sys.argv[1:]]\n"
        "runpy.run_module('attncap.train', run_name='__main__')\n"
    )
    command = [sys.executable, "-c", script, *arguments, 4, "--output", tmp_path / "parts"]
    stopped = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert stopped.returncode == 130 and "Traceback" not in stopped.stderr
    assert "stopped; continue with: python -m attncap.train" in stopped.stderr
    assert len((tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()) == 2
    Captioner.from_pretrained(tmp_path / "parts")  # usable as it is
    assert attncap("train", *arguments, 4, "--output", tmp_path / "parts", "--resume")[0] == 0
    whole, parts = (torch.load(tmp_path / run / "checkpoint.pt", weights_only=True) for run in ("whole", "parts"))
    assert whole["epoch"] == parts["epoch"] == 4 and whole["schedule"] == parts["schedule"]
    for name, value in whole["model"].items():
        assert value.equal(parts["model"][name]), name
    best = [load_file(tmp_path / run / "model.safetensors") for run in ("whole", "parts")]
    assert all(value.equal(best[1][name]) for name, value in best[0].items())


def test_ctrl_c_in_the_first_epoch_leaves_a_model(attncap, flickr8k, tmp_path, monkeypatch):
    def interrupt(*_):
        os.kill(os.getpid(), signal.SIGINT)
        return torch.zeros(())

    arguments = ["--data", flickr8k, "--output", tmp_path / "run", *TINY, "--epochs", 2]
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", interrupt)
        assert attncap("train", *arguments)[0] == 130
    Captioner.from_pretrained(tmp_path / "run")
    # And --resume continues, after the step; settings other than the number of epochs must be the same.
    status, _, err = attncap("train", *arguments, "--resume", "--hidden-size", 48, "--seed", 3)
    assert status == 2 and "model.hidden_size=48 (was 32)" in err and "run.seed=3 (was 0)" in err
    assert attncap("train", *arguments, "--resume")[0] == 0
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_ctrl_c_at_any_moment(attncap, flickr8k, tmp_path):
    run = tmp_path / "run"
    arguments = ["--data", flickr8k, "--output", run, *TINY]
    command = [sys.executable, "-m", "attncap.train", *arguments, "--epochs", 5000]
    process = subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts background jobs with SIGINT ignored, which is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for _ in range(1200):
        if (run / "checkpoint.pt").exists():
            break
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, err
    Captioner.from_pretrained(run)
    assert not list(run.glob(".*.tmp"))
    done = torch.load(run / "checkpoint.pt", weights_only=True)["epoch"]
    assert attncap("train", *arguments, "--resume", "--epochs", done + 1)[0] == 0
    assert len((run / "metrics.jsonl").read_text().splitlines()) == done + 1


def test_resume_of_a_run_that_older_settings_describe(attncap, flickr8k, tmp_path):
    arguments = ["--data", flickr8k, *TINY, "--output", tmp_path]
    assert attncap("train", *arguments, "--epochs", 1)[0] == 0
    path = tmp_path / "settings.json"
    content = json.loads(path.read_text())
    del content["settings"]["search"]["temperature"]
    content["settings"]["search"].pop("prefix")
    path.write_text(json.dumps(content))
    assert attncap("train", *arguments, "--epochs", 2, "--resume")[0] == 0
    status, _, err = attncap("train", *arguments, "--epochs", 3, "--resume", "--temperature", 2.0)
    assert status == 2 and "search.temperature=2.0 (was 1.0)" in err
    status, _, err = attncap("train", *arguments, "--epochs", 1, "--resume")
    assert status == 2 and f"epochs=1: the run in {tmp_path} has already done 2" in err


def test_broken_images_are_reported_once_and_left_out(attncap, tmp_path):
    data = make_flickr8k(tmp_path / "data", count=30)
    for index in range(0, 30, 5):
        (data / "Images" / f"{index:03d}.png").write_bytes(b"not a picture")
    status, _, err = attncap("train", "--data", data, "--output", tmp_path / "run", *TINY, "--epochs", 2)
    assert status == 0
    for index in range(0, 30, 5):
        assert err.count(f"{index:03d}.png: not an image") == 1
    assert err.count("skipped: ") == 6


def test_a_run_is_not_overwritten(attncap, trained, flickr8k):
    before = (trained / "model.safetensors").read_bytes()
    status, _, err = attncap("train", "--data", flickr8k, "--output", trained, *TINY)
    assert status == 2 and "already contains a run; resume it, or choose another output folder" in err
    assert (trained / "model.safetensors").read_bytes() == before


def test_a_model_without_a_run_is_not_overwritten(attncap, flickr8k, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"somebody's work")
    assert attncap("train", "--data", flickr8k, "--output", tmp_path, *TINY)[0] == 2
    assert (tmp_path / "model.safetensors").read_bytes() == b"somebody's work"


@pytest.mark.slow
def test_workers_and_few_images(attncap, tmp_path):
    """Reading in other processes; and one validation image, where CIDEr is always 0 and the best model is kept all the
    same."""
    data = make_flickr8k(tmp_path / "data", count=12)
    (data / "Images" / "000.png").write_bytes(b"")
    output = tmp_path / "run"
    status, out, err = attncap("train", "--data", data, "--output", output, *TINY, "--workers", 2, "--augment")
    assert status == 0 and "10 train, 1 val, 1 test" in out
    log = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    ratings = [(line["CIDEr"], line["BLEU-4"], line["ROUGE-L"]) for line in log]
    assert max(ratings) > ratings[0] and not any(line["CIDEr"] for line in log)
    checkpoint = torch.load(output / "checkpoint.pt", weights_only=True)
    assert tuple(checkpoint["schedule"]["best"]) == max(ratings)

    status, _, err = attncap("train", "--data", make_flickr8k(tmp_path / "two", 2), "--output", tmp_path / "no", *TINY)
    assert status == 1 and "no images for the val split" in err and not (tmp_path / "no").exists()


def test_a_damaged_checkpoint(attncap, flickr8k, tmp_path):
    arguments = ["--data", flickr8k, "--output", tmp_path, *TINY, "--epochs", 1]
    assert attncap("train", *arguments)[0] == 0
    content = (tmp_path / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(content[: len(content) // 2])
    status, _, err = attncap("train", *arguments, "--resume")
    assert status == 1 and "checkpoint.pt: cannot continue from it" in err and "Traceback" not in err


def test_a_loss_that_is_not_finite_stops_the_run(attncap, flickr8k, tmp_path):
    arguments = ["--data", flickr8k, "--output", tmp_path / "run", *TINY, "--learning-rate", 1e30, "--clip-norm", 1e30]
    status, _, err = attncap("train", *arguments)
    assert status == 1 and "try a new run with a lower learning rate" in err and "Traceback" not in err


def test_test_images_that_go_after_they_were_scored(trained, flickr8k, tmp_path, capsys):
    """They have no pictures; the run ends normally, even if there is nothing to draw."""

    class ReadOnce(Example):
        def image(self):
            if self.name in read:
                raise ImageError(self.name, "gone")
            read.add(self.name)
            return super().image()

    paths = sorted((flickr8k / "Images").iterdir())[:6]
    config = TrainConfig(run=RunConfig(workers=0))
    for kinds, shown in (([ReadOnce, Example] * 3, 3), ([ReadOnce] * 6, 0)):
        read, output = set(), tmp_path / str(shown)
        shutil.copytree(trained, output)
        (output / "attention.png").unlink()
        test = [kind(path.name, ("a picture",), path) for kind, path in zip(kinds, paths, strict=True)]
        evaluate_test_split(config, {"test": test}, ["a picture"], output, torch.device("cpu"))
        lines = capsys.readouterr().out.splitlines()
        assert [path.name for path in paths if any(line.startswith(f"{path.name}: ") for line in lines)] == [
            example.name for example in test if type(example) is Example
        ]
        assert (output / "attention.png").exists() == bool(shown)
        assert len(json.loads((output / "results.json").read_text())) == 6


@pytest.mark.slow
def test_subwords_and_another_runs_vocabulary(attncap, flickr8k, trained, tmp_path):
    """Pieces learnt from the captions give plain text with an attention map a piece; and the words of another run, or
    of the tutorial's WORDMAP, take the place of the captions' own."""
    status, _, _ = attncap("train", "--data", flickr8k, *TINY, "--subwords", 25, "--output", tmp_path / "pieces")
    assert status == 0
    model = Captioner.from_pretrained(tmp_path / "pieces")
    assert model.vocabulary.merges and len(model.vocabulary) <= 29
    [caption] = model.caption([flickr8k / "Images" / "001.png"])
    assert "green" in caption.text.split() and "▁" not in caption.text
    assert len(caption.words) == len(caption.attention) > len(caption.text.split())
    assert caption.words[0].startswith("▁") and "".join(caption.words).replace("▁", " ").strip() == caption.text
    evaluate = ["evaluate", "--model", tmp_path / "pieces", "--data", flickr8k, "--workers", 0]
    status, out, _ = attncap(*evaluate, "--suppressed", "<unk> ▁a", "--output", tmp_path / "pieces.json")
    assert status == 0 and "vocabulary" not in out and json.loads((tmp_path / "pieces.json").read_text())["BLEU-1"] > 0

    short = ["train", "--data", flickr8k, *TINY, "--epochs", 1]
    status, out, _ = attncap(
        *short, "--vocabulary", tmp_path / "pieces/vocabulary.json", "--output", tmp_path / "again"
    )
    assert status == 0 and "pieces/vocabulary.json: covers 100.00% of the words" in out
    again = (tmp_path / "again/vocabulary.json").read_text()
    assert again == (tmp_path / "pieces/vocabulary.json").read_text()
    wordmap = tmp_path / "WORDMAP.json"
    wordmap.write_text('{"picture": 1, "zebra": 2, "a": 3, "<unk>": 4, "<start>": 5, "<end>": 6, "<pad>": 0}')
    status, out, _ = attncap(*short, "--vocabulary", wordmap, "--output", tmp_path / "mapped")
    assert status == 0 and "WORDMAP.json: covers 57.14% of the words" in out  # all but a colour and `all`
    assert Vocabulary.load(tmp_path / "mapped/vocabulary.json").words[4:] == ["picture", "zebra", "a"]


def test_invalid_vocabularies(attncap, flickr8k, trained, tmp_path):
    (tmp_path / "foreign.json").write_text('{"犬": 1, "<start>": 2}')
    for arguments, status, message in (
        (["--vocabulary", tmp_path / "no.json"], 2, "no.json: no such vocabulary file"),
        (["--vocabulary", trained / "config.json"], 1, 'field "words" should be a list of words'),
        (
            ["--vocabulary", tmp_path / "foreign.json"],
            1,
            "foreign.json: contains none of the words of the training captions",
        ),
        (["--min-count", 1000], 1, "no word occurs 1000 times in the training captions; lower --min-count"),
        (["--vocabulary", trained / "vocabulary.json", "--subwords", 9], 2, "give only one of the two"),
        (["--subwords", -1], 2, "subwords=-1: must be at least 0"),
        (["--suppressed", "<unk> zebra"], 2, "'zebra' cannot be suppressed"),
        (["--prefix", "a zebra"], 2, "'zebra' is not in the vocabulary"),
    ):
        found, _, err = attncap("train", "--data", flickr8k, *TINY, *arguments, "--output", tmp_path / "run")
        assert found == status and message in err.splitlines()[-1], err
        assert not (tmp_path / "run").exists()


def test_flags_that_contradict_the_model_to_start_from(attncap, flickr8k, trained, tmp_path):
    """Only flags that are given can, even if they only repeat the recipe; one error names them all."""
    start = ["train", "--data", flickr8k, "--device", "cpu", "--start-from", trained, "--output", tmp_path / "run"]
    flags = "--encoder=vgg16 --encoder_layer layer2 --hidden-size 512 --dropout 0.25 --encoder-weights default "
    flags += "--min-count 3 --subwords 25 --attention-size 16"  # 512 is the recipe's; 16 is the model's
    status, _, err = attncap(*start, *flags.split())
    differences = ", ".join(
        [
            "encoder=vgg16 (it has resnet18)",
            "encoder_layer=layer2 (it has layer1)",
            "hidden_size=512 (it has 32)",
            "dropout=0.25 (it has 0.0)",
            "encoder.weights=default (it has its own)",
            "min_count=3, subwords=25 (gives 29 words; it has its own 10)",
        ]
    )
    expected = f"{trained}: the model to start from differs from the settings: {differences}; leave these settings out"
    assert status == 2 and err.splitlines()[-1] == f"attncap: error: {expected}"
    (tmp_path / "words.json").write_text(json.dumps({"words": [*Vocabulary.SPECIALS, *"abcdef", "picture"]}))
    status, _, err = attncap(*start, "--vocabulary", tmp_path / "words.json")
    assert status == 2 and f"vocabulary={tmp_path / 'words.json'} (gives 11 words; it has its own 10)" in err
    assert not (tmp_path / "run").exists()


def test_words_that_the_model_to_start_from_lacks(attncap, trained, tmp_path):
    """With none of them it would be trained on <unk> alone."""
    data = make_flickr8k(tmp_path / "data", 12)
    start = ["train", "--data", data, "--device", "cpu", "--start-from", trained, "--output", tmp_path / "run"]
    start += ["--epochs", 1, "--fine-tune-from", "none"]
    for caption in ("Chat noir .", "Picture : chat noir ."):
        table = ["image,caption", *(f"{index:03d}.png,{caption}" for index in range(12))]
        (data / "captions.txt").write_text("\n".join(table))
        status, out, err = attncap(*start)
        source = trained / "vocabulary.json"
        if caption.startswith("Chat"):
            assert status == 1 and f"{source}: contains none of the words of the training captions" in err, err
            assert not (tmp_path / "run").exists()
        else:
            message = f"{source}: covers 33.33% of the words in the training captions; 66.67% are unknown"
            assert status == 0 and message in out, err


@pytest.mark.slow
def test_flags_that_agree_with_the_model_to_start_from(attncap, flickr8k, trained, tmp_path):
    """The recipe has other values, 512 units and ResNet-50, which the user did not ask for."""
    arguments = ["train", "--data", flickr8k, "--start-from", trained, "--output", tmp_path / "run"]
    arguments += "--device cpu --fine-tune-from none --epochs 1 --encoder resnet18 --hidden-size=32".split()
    arguments += ["--encoder-weights", "none", "--min-count", 1, "--vocabulary", trained / "vocabulary.json"]
    assert attncap(*arguments)[0] == 0
    settings = json.loads((tmp_path / "run/settings.json").read_text())["settings"]["model"]
    assert ModelConfig(**settings) == ModelConfig.load(trained / "config.json")
    # The model is not compared with the flags again when the run is resumed.
    assert attncap(*arguments, "--resume", "--epochs", 2, "--attention-size", 48)[0] == 0


def test_a_start_model_is_kept_if_no_epoch_is_better(attncap, flickr8k, trained, tmp_path):
    arguments = ["train", "--data", flickr8k, "--start-from", trained, "--output", tmp_path / "run", "--device", "cpu"]
    assert attncap(*arguments, *"--fine-tune-from none --epochs 1 --learning-rate 10 --batch-size 8".split())[0] == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    before, after = (json.loads(line) for line in lines)
    assert (before["epoch"], after["epoch"]) == (0, 1) and after["CIDEr"] < before["CIDEr"]
    start, kept = (load_file(folder / "model.safetensors") for folder in (trained, tmp_path / "run"))
    assert all(value.equal(kept[name]) for name, value in start.items())


def test_settings_that_flags_name():
    arguments = "--data encoder --encoder=vgg16 --encoder_weights none --learning-rate 1 --objective scst --resume -h"
    assert given_settings(arguments.split()) == {
        "data.path",
        "model.encoder",
        "encoder.weights",
        "optimizer.learning_rate",
        "objective.name",
        "run.resume",
    }


def test_the_command_that_resumes_a_run():
    arguments = ["--data", "my photos", "--epochs", "3"]
    expected = "--data 'my photos' --epochs 3 --resume"
    assert resume_command("attncap train", arguments, {}) == f"attncap train {expected}"
    assert resume_command("attncap train", [*arguments, "--resume"], {}) == f"attncap train {expected}"
    processes = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}
    launched = f"-m attncap.train {expected}"
    assert resume_command("attncap train", arguments, processes) == f"torchrun --nproc-per-node 4 {launched}"
    processes["WORLD_SIZE"] = "8"
    command = resume_command("attncap train", arguments, processes)
    assert command == f"torchrun --nnodes 2 --nproc-per-node 4 ... {launched}"
