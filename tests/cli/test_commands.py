"""The commands as a user calls them, correctly and incorrectly."""

import json
import re

import pytest
import torch
from conftest import TINY, make_flickr8k
from PIL import Image
from pycocotools.coco import COCO

from attncap import Captioner
from attncap.data.vocabulary import Vocabulary


def one_line(err: str) -> str:
    """The error: one line on standard error, after progress bars and warnings, without a traceback."""
    assert "Traceback" not in err
    errors = [line for line in err.splitlines() if line.startswith("attncap: error: ")]
    assert len(errors) == 1, err
    return errors[0]


@pytest.fixture
def broken_images(tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("this is no picture")
    Image.new("RGB", (64, 64), "red").save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:60])
    return folder


def test_caption_text_and_jsonl(attncap, trained, flickr8k, tmp_path):
    status, out, _ = attncap("caption", flickr8k / "Images", "--model", trained, "--workers", 0)
    lines = out.splitlines()
    assert status == 0 and len(lines) == 60
    assert lines[0].startswith(f"{flickr8k / 'Images' / '000.png'}: a ") and "red" in lines[0]
    status, out, _ = attncap(
        "caption", flickr8k / "Images" / "001.png", "--model", trained, "--format", "jsonl", "--beam_size", 1,
        "--workers", 0, "--attention-dir", tmp_path / "attention",
    )  # fmt: skip
    [line] = map(json.loads, out.splitlines())
    assert status == 0 and "green" in line["caption"] and line["score"] < 0
    [picture] = (tmp_path / "attention").iterdir()
    assert Image.open(picture).width > 500


def test_caption_several_captions_and_models(attncap, trained, flickr8k):
    picture = flickr8k / "Images" / "001.png"
    options = ["--workers", 0, "--n-best", 3, "--method", "fixed", "--length-penalty", 0.7, "--no-repeat-ngram", 2]
    status, out, _ = attncap("caption", picture, "--model", trained, *options)
    assert status == 0 and len(set(out.splitlines())) == 3
    assert attncap("caption", "--model", trained, "--model", trained, *options, picture)[1] == out
    for suppressed in (["<unk> green"], ["<unk>", "green"]):
        status, out, _ = attncap("caption", picture, "--suppressed", *suppressed, "--model", trained, "--workers", 0)
        assert status == 0 and "green" not in out.split(": ")[1]
    status, out, _ = attncap("caption", "--suppressed", "", "--model", trained, "--workers", 0, picture)
    assert status == 0 and "green" in out.split(": ")[1]


def test_a_caption_when_no_word_is_allowed(attncap, trained, flickr8k):
    picture, words = flickr8k / "Images" / "001.png", len(Vocabulary.load(trained / "vocabulary.json"))
    options = ["--min-length", words, "--max-length", words + 1, "--no-repeat-ngram", 1, "--workers", 0]
    status, out, _ = attncap("caption", picture, "--model", trained, "--format", "jsonl", *options)
    assert status == 0 and '"caption": "", "score": null' in out


def test_both_backends_give_the_same_captions(attncap, trained, flickr8k):
    outputs = [
        attncap("caption", flickr8k, "--model", trained, "--workers", 0, "--backend", name)[1]
        for name in ("native", "torch")
    ]
    assert outputs[0] == outputs[1] and outputs[0].count("\n") == 60


def test_broken_images_are_skipped(attncap, trained, broken_images):
    Image.new("RGB", (1, 1), "blue").save(broken_images / "tiny.png")  # a single pixel is a valid image
    status, out, err = attncap("caption", broken_images, "--model", trained, "--workers", 0)
    assert status == 3 and [line.split(": ")[0] for line in out.splitlines()] == [str(broken_images / "tiny.png")]
    for name, reason in (("empty", "empty"), ("text", "not an image"), ("cut", "cannot be read")):
        [line] = [line for line in err.splitlines() if f"{name}." in line]
        assert "skipped" in line and reason in line

    (broken_images / "tiny.png").unlink()
    status, out, err = attncap("caption", broken_images, "--model", trained, "--workers", 0)
    assert status == 1 and out == "" and "none of the images could be read" in one_line(err)


def test_pictures_of_attention_do_not_end_captioning(attncap, trained, flickr8k, tmp_path, monkeypatch):
    """An image that goes while it is captioned has no picture; a name as long as file systems allow is cut."""
    images = [tmp_path / "gone.png", tmp_path / f"{'é' * 125}.png"]
    for image in images:
        Image.open(flickr8k / "Images" / "001.png").save(image)
    caption_batch = Captioner.caption_batch

    def remove(*arguments):
        images[0].unlink()
        return caption_batch(*arguments)

    monkeypatch.setattr(Captioner, "caption_batch", remove)
    arguments = [*images, "--model", trained, "--workers", 0, "--attention-dir", tmp_path / "attention"]
    status, out, err = attncap("caption", *arguments)
    assert status == 0 and len(out.splitlines()) == 2
    assert err.count("skipped: ") == 1 and f"skipped: {images[0]}: " in err
    [picture] = (tmp_path / "attention").iterdir()
    assert picture.name == f"000001-{'é' * 50}.png" and Image.open(picture).width > 500


def test_evaluate_a_model(attncap, trained, flickr8k, tmp_path):
    output = tmp_path / "results" / "metrics.json"
    arguments = ["--model", trained, "--data", flickr8k, "--output", output, "--workers", 0]
    status, out, _ = attncap("evaluate", *arguments)
    metrics = json.loads(output.read_text())
    assert status == 0 and metrics == json.loads((trained / "test.json").read_text())
    for name, value in metrics.items():
        assert f"{name:7}  {value:.4f}" in out
    results = json.loads((tmp_path / "results" / "metrics.results.json").read_text())
    assert len(results) == 6
    lines = list(map(json.loads, (tmp_path / "results" / "metrics.images.jsonl").read_text().splitlines()))
    assert [{name: line[name] for name in ("image_id", "caption")} for line in lines] == results
    assert sum(line["CIDEr"] for line in lines) / 6 == pytest.approx(metrics["CIDEr"])
    report = json.loads((tmp_path / "results" / "metrics.report.json").read_text())
    assert report["images"] == 6 and {name: f["value"] for name, f in report["figures"].items()} == metrics
    assert all(f["low"] <= f["value"] <= f["high"] for name, f in report["figures"].items() if "BLEU" not in name)
    assert 0 < report["captions"]["vocabulary"] <= 1 and 0 <= report["captions"]["new"] <= 1
    markdown = (tmp_path / "results" / "metrics.report.md").read_text()
    assert f"| CIDEr | {metrics['CIDEr']:.4f} |" in markdown
    page = (tmp_path / "results" / "metrics.html").read_text()
    assert page.count("<img") == page.count("<article>") == 6
    cider = {str(line["image_id"]): line["CIDEr"] for line in lines}
    shown = [cider[name] for name in re.findall(r"<small>(.*?):", page)]
    assert shown == sorted(cider.values())

    # The captions just written, scored as a file against the same split, give the same.
    again = ["--predictions", tmp_path / "results" / "metrics.results.json", "--data", flickr8k]
    status, out, err = attncap("evaluate", *again, "--compare", again[1], "--output", tmp_path / "again.json")
    assert status == 0 and json.loads((tmp_path / "again.json").read_text()) == metrics
    assert "METEOR skipped: no Java" in err and "SPICE skipped: no Java" in err
    assert re.search(r"CIDEr +\+0.0000  0.0000 to 0.0000  0.0% of resamples", out)
    assert not (tmp_path / "again.results.json").exists()


def test_results_on_coco_are_in_cocos_format(attncap, trained, tmp_path):
    """pycocotools takes them."""
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    (tmp_path / "coco" / "train2017").mkdir()
    content = {"images": [], "annotations": []}
    for index in range(1, 11):
        name = f"{index:012d}.jpg"
        Image.new("RGB", (50, 40), "red").save(tmp_path / "coco" / "train2017" / name)
        content["images"].append({"id": index, "file_name": name})
        content["annotations"].append({"id": index, "image_id": index, "caption": "a red picture"})
    annotations = tmp_path / "coco" / "annotations" / "captions_train2017.json"
    annotations.write_text(json.dumps(content))
    arguments = ["--model", trained, "--data", tmp_path / "coco", "--output", tmp_path / "val.json", "--workers", 2]
    assert attncap("evaluate", *arguments)[0] == 0
    assert COCO(annotations).loadRes(str(tmp_path / "val.results.json")).getAnnIds()


def test_evaluate_a_results_file(attncap, tmp_path):
    references = {
        "images": [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}],
        "annotations": [
            {"id": 1, "image_id": 1, "caption": "A dog runs over the green grass."},
            {"id": 2, "image_id": 2, "caption": "Two men play chess in a park."},
        ],
    }
    (tmp_path / "references.json").write_text(json.dumps(references))
    results = [
        {"image_id": 1, "caption": "a dog runs over the green grass"},
        {"image_id": 2, "caption": "two men play chess in a park"},
    ]
    (tmp_path / "results.json").write_text(json.dumps(results))
    files = ["--predictions", tmp_path / "results.json", "--references", tmp_path / "references.json"]
    status, out, _ = attncap("evaluate", *files)
    assert status == 0
    for name, value in (("BLEU-4", 1), ("ROUGE-L", 1), ("CIDEr", 10)):  # what equal captions get
        assert f"{name:7}  {value:.4f}" in out

    empty = [{"image_id": 1, "caption": "."}, {"image_id": 2, "caption": "two men play chess in a park"}]
    (tmp_path / "others.json").write_text(json.dumps(empty))
    status, out, err = attncap("evaluate", *files, "--compare", tmp_path / "others.json")
    assert status == 0 and "CIDEr               +5.0000" in out and "words" not in err
    status, _, err = attncap("evaluate", "--predictions", tmp_path / "others.json", *files[2:])
    assert status == 0 and "1 of 2 captions have no words, e.g. that of image 1" in err
    (tmp_path / "others.json").write_text(json.dumps(results[:1]))
    status, _, err = attncap("evaluate", *files, "--compare", tmp_path / "others.json")
    assert status == 1 and "others.json: no caption for 1 of the images, e.g. image 2" in one_line(err)

    (tmp_path / "results.json").write_text(json.dumps(results[:1]))
    status, out, err = attncap("evaluate", *files)
    assert status == 0 and "1 of the 2 images" in err and "no caption for image 2" in err

    (tmp_path / "results.json").write_text(json.dumps([{"image_id": 3, "caption": "a cat"}]))
    status, _, err = attncap("evaluate", *files)
    assert status == 1 and "1 of 1 image ids have no references" in one_line(err) and "e.g. 3" in one_line(err)


def test_info(attncap):
    status, out, _ = attncap("info")
    assert status == 0
    for word in ("attncap ", "torch ", "cpu                in use", "cuda", "compiler "):
        assert word in out
    assert torch.cuda.is_available() or "cuda               in use" not in out


def test_info_says_why_there_is_no_gpu(attncap, monkeypatch):
    """Where the driver is too old for torch, and the library could be loaded nevertheless."""
    reason = "The NVIDIA driver on your system is too old (found version 12040)."

    def init():
        raise RuntimeError(f"{reason}\nPlease update it.")

    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.cuda.init", init)
    monkeypatch.setattr("attncap.ops.library._missing", {"cpu": None, "cuda": None})
    out = attncap("info")[1]
    assert f"cuda               {reason}\n" in out and "cuda               built, but there is no CUDA device" in out
    from attncap.devices import find_device

    with monkeypatch.context() as patched:
        warnings = []
        patched.setattr("attncap.devices.log.warning", lambda message, *values: warnings.append(message % values))
        assert find_device().type == "cpu" and warnings == [f"using the CPU: {reason}"]


@pytest.mark.parametrize("name", ["train", "caption", "evaluate", "data.__main__", "info"])
def test_help_lists_the_flags(attncap, name):
    status, out, _ = attncap(name, "--help")
    assert status == 0 and "--debug" in out and "traceback" in out
    if name == "train":
        assert "resnet18" in out
        assert "resnet50" in attncap("train", "--data", "photographs", "--help")[1]


def test_incorrect_calls_of_train(attncap, flickr8k, tmp_path):
    output = tmp_path / "run"
    tiny = [*TINY, "--output", output]
    photographs = ["--data", flickr8k, *tiny]
    (tmp_path / "nothing").mkdir()
    (tmp_path / "missing").mkdir()
    (tmp_path / "missing" / "Images").mkdir()
    (tmp_path / "missing" / "captions.txt").write_text("image,caption\nabsent.jpg,a dog\ngone.jpg,a cat\n")
    (tmp_path / "weights.pth").write_text("no weights")
    (tmp_path / "a file").write_text("")
    for arguments, status, message in (
        (["--data", tmp_path / "nowhere", *tiny], 2, "nowhere"),
        (["--data", tmp_path / "nothing", *tiny], 1, "captions.txt"),
        (["--data", tmp_path / "missing", *tiny], 1, "absent.jpg"),
        ([*photographs, "--encoder", "resnet19"], 2, "no such backbone"),
        ([*photographs, "--encoder-weights", tmp_path / "no.pth"], 2, "no such file"),
        ([*photographs, "--encoder-weights", tmp_path / "weights.pth"], 1, "cannot read the weights"),
        ([*photographs, "--encoder-layer", "layer9"], 2, 'encoder_layer="layer9": resnet18 has no such layer'),
        ([*photographs, "--fine-tune-from", "layer9"], 2, "layer9"),
        ([*photographs, "--device", "tpu9"], 2, "device='tpu9'"),
        ([*photographs, "--resume"], 2, "cannot resume: no run to continue in"),
        ([*photographs, "--dropout", "1.5"], 2, "dropout=1.5: must be below 1"),
        ([*photographs, "--encoder-layer", "flatten"], 2, 'encoder_layer="flatten": resnet18 has no such layer'),
        (["--data", flickr8k, *TINY, "--output", tmp_path / "a file" / "run"], 1, "cannot write"),
    ):
        found, _, err = attncap("train", *arguments)
        assert found == status and message in one_line(err), (arguments, found, err)
        assert not output.exists()
    status, _, err = attncap("train", "--epochs", "many")
    assert status == 2 and "epochs" in err


def test_missing_images_are_reported_and_left_out(attncap, tmp_path):
    data = make_flickr8k(tmp_path / "data", count=12)
    with open(data / "captions.txt", "a") as captions:
        captions.write("absent.jpg,a green picture\n")
    status, _, err = attncap("train", "--data", data, "--output", tmp_path / "run", *TINY, "--epochs", 1)
    assert status == 0 and "absent.jpg" in err


def test_incorrect_calls_of_caption_and_evaluate(attncap, trained, flickr8k, tmp_path):
    picture = flickr8k / "Images" / "000.png"
    (tmp_path / "empty").mkdir()
    (tmp_path / "a file").write_text("")
    (tmp_path / "two.csv").write_text(f"image,caption\n{picture},a dog\n{flickr8k}/Images/001.png,a cat\n")
    for name, arguments, status, message in (
        ("caption", [picture, "--model", tmp_path / "nowhere"], 2, "no such model folder"),
        ("caption", [tmp_path / "no.jpg", "--model", trained], 2, "no.jpg"),
        ("caption", [tmp_path / "empty", "--model", trained], 2, "no images in"),
        ("caption", [tmp_path / "no.json", "--model", trained], 2, "no.json: no such file"),
        ("caption", [picture, "--model", trained, "--attention-dir", tmp_path / "a file" / "x"], 1, "cannot write"),
        ("caption", [picture, "--model", trained, "--beam-size", 0], 2, "beam_size=0: must be from 1 to 32"),
        ("caption", [picture, "--model", trained, "--suppressed", "zebra"], 2, "'zebra' cannot be suppressed"),
        ("evaluate", ["--model", trained], 2, "--data"),
        (
            "evaluate",
            ["--model", trained, "--data", flickr8k, "--output", tmp_path / "o.html"],
            2,
            "should be NAME.json",
        ),
        ("evaluate", ["--predictions", "p.json", "--data", flickr8k, "--output", "p.json"], 2, "p.json: is an input"),
        (
            "evaluate",
            ["--model", trained, "--data", flickr8k, "--split", "dev"],
            2,
            "has no split dev; choose from train (48 images), val (6 images), test (6 images)",
        ),
        (
            "evaluate",
            ["--model", trained, "--data", tmp_path / "two.csv"],
            2,
            "has no images in test; choose from train (2 images)",
        ),
        ("evaluate", ["--predictions", "", "--data", flickr8k], 2, "--predictions is empty"),
        ("evaluate", ["--model", trained, "--data", ""], 2, "--data is empty"),
        ("evaluate", ["--predictions", tmp_path / "no.json", "--references", tmp_path / "no.json"], 2, "no.json"),
    ):
        found, _, err = attncap(name, *arguments, *(["--workers", 0] if name == "caption" else []))
        assert found == status and message in one_line(err), (name, arguments, found, err)
    assert attncap("caption", picture)[0] == 2


@pytest.mark.parametrize("file", ["config.json", "vocabulary.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "other"])
def test_damaged_model_folders(attncap, trained, flickr8k, tmp_path, file, damage):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "vocabulary.json", "model.safetensors"):
        (folder / name).write_bytes((trained / name).read_bytes())
    content = (folder / file).read_bytes()
    if damage == "missing":
        (folder / file).unlink()
    elif damage == "other":  # complete, but of another model
        change = {"config.json": (b'"hidden_size": 32', b'"hidden_size": 48'), "vocabulary.json": (b'"a",\n', b"")}
        old, new = change.get(file, (b"decoder.attention.gate.bias", b"decoder.attention.gone.bias"))
        assert old in content
        (folder / file).write_bytes(content.replace(old, new))
    else:
        (folder / file).write_bytes(content[: len(content) // 2 if damage == "cut" else 0])
    status, out, err = attncap("caption", flickr8k / "Images" / "000.png", "--model", folder, "--workers", 0)
    assert status == 1 and out == "" and str(folder) in one_line(err)
