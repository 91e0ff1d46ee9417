"""Results files scored without images, and the metrics that need Java, which may fail."""

import json

import numpy as np
from PIL import Image
from test_commands import one_line

from attncap.errors import UserError
from attncap.metrics import java


def test_evaluate_a_results_file_without_images(attncap, tmp_path):
    """With Karpathy's file alone, as most people have it, the metrics are the same as with its references in a file."""
    sentences = {7: ["a dog runs over the grass", "the dog runs"], 8: ["two men play chess", "men in a park"]}
    images = [
        {"filepath": "val2014", "filename": f"{key}.jpg", "cocoid": key, "split": "test",
         "sentences": [{"raw": text} for text in texts]}
        for key, texts in {**sentences, 9: ["a bird"]}.items()
    ]  # fmt: skip
    images[2]["split"] = "train"
    annotations = [{"image_id": key, "caption": text} for key, texts in sentences.items() for text in texts]
    results = [{"image_id": 7, "caption": "a dog runs"}, {"image_id": 8, "caption": "two men in a park"}]
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images}))
    (tmp_path / "references.json").write_text(
        json.dumps({"annotations": [{"id": i, **annotation} for i, annotation in enumerate(annotations)]})
    )
    (tmp_path / "results.json").write_text(json.dumps(results))
    predictions, metrics = ["--predictions", tmp_path / "results.json"], []
    for source in (["--data", tmp_path / "dataset_coco.json"], ["--references", tmp_path / "references.json"]):
        status, _, err = attncap("evaluate", *predictions, *source, "--output", tmp_path / "o.json")
        assert status == 0 and "images" not in err
        metrics.append(json.loads((tmp_path / "o.json").read_text()))
        assert (tmp_path / "o.html").read_text().count("<article>") == 2
    assert metrics[0] == metrics[1]
    status, _, err = attncap("evaluate", *predictions, "--data", tmp_path / "dataset_coco.json", "--split", "train")
    assert status == 1 and "results.json: 2 of 2 image ids have no references in" in one_line(err)


def test_results_for_a_whole_coco_file(attncap, tmp_path):
    """COCO's captions have no splits of their own: without --split, the file is one."""
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(10)]
    annotations = [{"id": i, "image_id": i, "caption": f"a dog number {i}"} for i in range(10)]
    (tmp_path / "captions_val2017.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    results = [{"image_id": i, "caption": f"a cat number {i}"} for i in range(10)]
    Image.new("RGB", (2, 2)).save(tmp_path / "3.jpg")  # the other images need not exist
    (tmp_path / "results.json").write_text(json.dumps(results))
    predictions, scores = ["--predictions", tmp_path / "results.json"], []
    for source in ("--data", "--references"):
        arguments = [source, tmp_path / "captions_val2017.json", "--output", tmp_path / "o.json"]
        status, _, err = attncap("evaluate", *predictions, *arguments)
        assert status == 0 and "scoring" not in err
        scores.append((tmp_path / "o.report.json").read_text())
    assert scores[0] == scores[1]
    (tmp_path / "3.jpg").unlink()
    status, _, err = attncap("evaluate", *predictions, "--data", arguments[1], "--split", "test")
    assert status == 1 and "9 of 10 image ids have no references" in one_line(err)
    for name, ids in (("train", range(8)), ("val", [8]), ("test", [9])):  # lists give it splits
        (tmp_path / f"{name}Images.txt").write_text("".join(f"{i}.jpg\n" for i in ids))
    status, _, err = attncap("evaluate", *predictions, "--data", arguments[1])
    assert status == 1 and "9 of 10 image ids have no references" in one_line(err)


def test_meteor_has_an_interval_and_a_difference_and_may_fail(attncap, tmp_path, monkeypatch):
    """Java itself runs in tests/metrics; here METEOR's counts are those of captions that match in every word."""
    references = {"annotations": [{"id": i, "image_id": i, "caption": f"a dog number {i}"} for i in range(1, 4)]}
    (tmp_path / "references.json").write_text(json.dumps(references))
    for name in ("ours", "theirs"):
        results = [{"image_id": i, "caption": f"a dog number {i}"} for i in range(1, 4)]
        (tmp_path / f"{name}.json").write_text(json.dumps(results))
    exact = np.array([4.0, 4, 1, 1, 3, 3, 1, 1, *[0] * 12, 0, 4, 4])
    half = np.array([4.0, 4, 1, 1, 1, 1, 1, 1, *[0] * 12, 1, 2, 2])
    counts = iter([np.array([exact, half, half]), np.array([half, half, half])])

    def meteor_statistics(*_):
        try:
            return next(counts)
        except StopIteration:
            raise UserError("its Java program failed: out of memory") from None

    monkeypatch.setattr(java, "unavailable", lambda: {"SPICE": "no Stanford models"})
    monkeypatch.setattr(java, "meteor_statistics", meteor_statistics)
    arguments = ["--predictions", tmp_path / "ours.json", "--references", tmp_path / "references.json"]
    arguments += ["--compare", tmp_path / "theirs.json", "--output", tmp_path / "o.json"]
    assert attncap("evaluate", *arguments)[0] == 0
    report = json.loads((tmp_path / "o.report.json").read_text())
    figure, difference = report["figures"]["METEOR"], report["difference"]["figures"]["METEOR"]
    assert 0 < figure["low"] < figure["value"] < figure["high"] <= 1 and report["left out"].keys() == {"SPICE"}
    assert difference["value"] > 0 and abs(difference["above"] - 19 / 27) < 0.05  # of the draws hold image 1
    [row, *_] = map(json.loads, (tmp_path / "o.images.jsonl").read_text().splitlines())
    assert row["METEOR"] == 1

    counts = iter([np.array([exact, half, half])])  # and it fails for the other system
    status, out, _ = attncap("evaluate", *arguments)
    assert status == 0 and "difference in METEOR skipped: its Java program failed: out of memory." in out
    report = json.loads((tmp_path / "o.report.json").read_text())
    assert "METEOR" in report["figures"] and "METEOR" not in report["difference"]["figures"]

    status, out, err = attncap("evaluate", *arguments)
    report = json.loads((tmp_path / "o.report.json").read_text())
    assert status == 0 and "METEOR skipped: its Java program failed: out of memory" in err
    assert report["left out"] == {
        "SPICE": "no Stanford models",
        "METEOR": "its Java program failed: out of memory",
    }
    assert "METEOR" not in report["figures"] and "CIDEr" in report["figures"]
    assert "METEOR skipped: its Java program failed: out of memory." in (tmp_path / "o.report.md").read_text()
