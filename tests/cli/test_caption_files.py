"""Captions of folders in files: records and text files, runs that go on, images that cannot be read."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from conftest import largest_file, make_flickr8k

from attncap.cli.caption_files import Records, Sidecars
from attncap.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """Six images, two of them in a subfolder."""
    images = make_flickr8k(tmp_path / "made", count=6) / "Images"
    (images / "more").mkdir()
    for name in ("004.png", "005.png"):
        (images / name).rename(images / "more" / name)
    return images


@pytest.fixture
def caption(attncap, trained):
    def run(*arguments):
        return attncap("caption", "--model", trained, "--workers", 0, *arguments)

    return run


def records_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def texts_in(folder, extension=".txt"):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob(f"*{extension}")}


def test_one_record_an_image(caption, folder, tmp_path):
    output = tmp_path / "new" / "captions.jsonl"
    printed = dict(line.split(": ", 1) for line in caption(folder)[1].splitlines())
    status, out, err = caption(folder, "--output", output, "--prepend-text", "Here: ", "--append-text", ".")
    records = records_of(output)
    assert status == 0 and out == "" and "6 images captioned, 0 had captions, 0 failed" in err
    assert {r["image"]: r["caption"] for r in records} == {name: f"Here: {text}." for name, text in printed.items()}
    assert len(records) == 6 and all(r["status"] == "captioned" and r["score"] < 0 for r in records)
    assert len({r["model"] for r in records}) == 1 and len(records[0]["model"]) == 16


def test_several_captions_in_one_record(caption, folder, tmp_path):
    output = tmp_path / "captions.jsonl"
    assert caption(folder / "000.png", "--n-best", 3, "--method", "fixed", "--output", output, "--sidecars")[0] == 0
    [record] = records_of(output)
    texts = [one["caption"] for one in record["captions"]]
    assert len(set(texts)) == 3 and record["caption"] == texts[0]
    assert (folder / "000.txt").read_text().splitlines() == texts


def test_a_run_goes_on(caption, folder, tmp_path):
    """Images that have captions are not read again, and when all have, not even a model is needed."""
    output = tmp_path / "captions.jsonl"
    caption(folder / "more", folder / "001.png", "--output", output)
    before = output.read_bytes()
    status, _, err = caption(folder, folder, "--output", output)
    assert status == 0 and "3 images captioned, 3 had captions" in err and output.read_bytes().startswith(before)
    assert len({r["image"] for r in records_of(output)}) == len(records_of(output)) == 6
    whole = output.read_bytes()
    (folder / "000.png").write_bytes(b"")
    assert caption(folder, "--output", output, "--model", "none")[0] == 0 and output.read_bytes() == whole
    output.write_bytes(whole[:-20])  # killed while it wrote
    (folder / "000.png").unlink()
    status, _, err = caption(folder, "--output", output)
    assert "1 images captioned" in err and output.read_bytes().startswith(whole[: whole.rindex(b"{")])
    assert len({r["image"] for r in records_of(output)}) == len(records_of(output)) == 6


def test_images_that_cannot_be_read(caption, folder, tmp_path):
    output = tmp_path / "captions.jsonl"
    good = (folder / "001.png").read_bytes()
    (folder / "001.png").write_bytes(good[:50])
    status, _, err = caption(folder, "--output", output, "--sidecars")
    [failed] = [r for r in records_of(output) if r["status"] == "failed"]
    assert status == 3 and "5 images captioned, 0 had captions, 1 failed" in err
    assert failed["image"] == str(folder / "001.png") and "cannot be read" in failed["error"]
    assert len(texts_in(folder)) == 5
    (folder / "001.png").write_bytes(good)
    assert "0 images captioned" in caption(folder, "--output", output, "--sidecars")[2]
    status, _, err = caption(folder, "--output", output, "--sidecars", "--retry-failed")
    assert status == 0 and "1 images captioned, 5 had captions, 0 failed" in err
    assert sorted(r["status"] for r in records_of(output)) == ["captioned"] * 6 and len(texts_in(folder)) == 6
    assert caption(folder, "--output", output, "--sidecars", "--verify")[0] == 0


def test_all_images_fail(caption, folder, tmp_path):
    (folder / "000.png").write_bytes(b"")
    status, _, err = caption(folder / "000.png", "--output", tmp_path / "captions.jsonl")
    assert status == 3 and [r["status"] for r in records_of(tmp_path / "captions.jsonl")] == ["failed"]
    assert caption(folder / "000.png", "--sidecars")[0] == 1


def test_text_files(caption, folder, tmp_path):
    printed = dict(line.split(": ", 1) for line in caption(folder)[1].splitlines())
    expected = {
        os.path.relpath(name, folder).replace(".png", ".caption"): f"{text}\n" for name, text in printed.items()
    }
    assert caption(folder, "--sidecars", "--extension", ".caption")[0] == 0
    assert texts_in(folder, ".caption") == expected and "more/004.caption" in expected
    assert caption(folder, "--sidecar-folder", tmp_path / "out", "--extension", ".caption")[0] == 0
    assert texts_in(tmp_path / "out", ".caption") == expected


def test_text_files_that_exist(caption, folder):
    edited, empty = folder / "000.txt", folder / "001.txt"
    edited.write_text("my own words\nin two lines")
    empty.write_text("")
    status, _, err = caption(folder, "--sidecars", "--existing", "error")
    assert status == 2 and "000.png has captions" in err and len(texts_in(folder)) == 2
    status, _, err = caption(folder, "--sidecars")
    assert status == 0 and "5 images captioned, 1 had captions" in err
    assert edited.read_text() == "my own words\nin two lines" and "green" in empty.read_text()
    edited.with_name("002.txt").unlink()
    for _ in range(2):  # the second time, the caption is there already
        assert caption(folder, "--sidecars", "--existing", "append")[0] == 0
        first, second, third = edited.read_text().splitlines()
        assert (first, second) == ("my own words", "in two lines") and "red" in third
        assert len((folder / "002.txt").read_text().splitlines()) == 1
    edited.write_text("my own words\n")
    for _ in range(2):
        assert caption(folder, "--sidecars", "--existing", "prepend")[0] == 0
        assert edited.read_text() == f"{third}\nmy own words\n"
    assert caption(folder, "--sidecars", "--existing", "overwrite")[0] == 0 and edited.read_text() == f"{third}\n"


def test_records_that_exist(caption, folder, tmp_path):
    output = tmp_path / "captions.jsonl"
    caption(folder, "--output", output)
    before = records_of(output)
    assert caption(folder, "--output", output, "--existing", "error")[0] == 2 and records_of(output) == before
    assert caption(folder, "--output", output, "--existing", "overwrite", "--append-text", "!")[0] == 0
    assert [r["caption"] for r in records_of(output)] == [r["caption"] + "!" for r in before]


def test_lists_of_paths(caption, folder, tmp_path, monkeypatch):
    paths = [str(folder / "000.png"), str(folder / "more"), str(tmp_path / "gone.jpg")]
    lines, nul = tmp_path / "lines", tmp_path / "nul"
    lines.write_text("\n".join(paths) + "\n\n")
    nul.write_bytes(b"\0".join(map(os.fsencode, paths)) + b"\0")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(lines.read_bytes())))
    for number, file in enumerate((lines, nul, "-")):
        output = tmp_path / f"{number}.jsonl"
        assert caption("--from-file", file, "--output", output)[0] == 3
        assert {r["image"]: r["status"] for r in records_of(output)} == {
            **{str(folder / name): "captioned" for name in ("000.png", "more/004.png", "more/005.png")},
            paths[2]: "failed",
        }
    assert "no such file" in caption("--from-file", tmp_path / "none", "--output", output)[2].lower()


def test_what_verify_finds(caption, folder, tmp_path):
    output = tmp_path / "captions.jsonl"
    caption(folder, "--output", output, "--sidecars")
    lines = output.read_text().splitlines(keepends=True)
    check = (folder, "--output", output, "--sidecars", "--verify")
    status, out, err = caption(*check)
    assert (status, out) == (0, "6 images: 6 captioned, 0 failed\n")
    output.write_text("".join(lines[1:]))
    status, _, err = caption(*check)
    assert status == 1 and f"1 of the images have no captions: {folder / '000.png'}" in err
    output.write_text("".join([*lines, lines[2]]))
    status, _, err = caption(*check)
    assert status == 1 and f"1 of the images have several records: {folder / '002.png'}" in err
    output.write_text("".join(lines))
    (folder / "003.txt").unlink()
    assert caption(*check)[0] == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--extension", ".JPG", "--sidecars"], "extension='.JPG'"),
        (["--extension", "txt", "--sidecars"], "extension='txt'"),
        (["--existing", "append"], "give --sidecars too"),
        (["--retry-failed"], "give --output"),
        (["--verify"], "give what to check"),
    ],
    ids=str,
)
def test_calls_that_make_no_sense(caption, folder, arguments, message):
    status, out, err = caption(folder, *arguments)
    assert (status, out) == (2, "") and message in err


def test_two_images_with_the_same_text_file(caption, folder):
    (folder / "000.png").rename(folder / "001.jpg")
    status, _, err = caption(folder, "--sidecars")
    assert status == 2 and "would both have the captions" in err and "001.txt" in err


def test_a_file_of_other_content_is_kept(caption, folder, tmp_path):
    output = tmp_path / "captions.jsonl"
    for content in ('{"image": 1}\n', "notes\n", '{"image": "a", "status": "done"}\n', "\xff\n"):
        output.write_text(content, encoding="latin-1")
        status, _, err = caption(folder, "--output", output)
        assert status == 1 and f"{output}: line 1: not a record" in err
        assert output.read_text(encoding="latin-1") == content


def test_another_run_writes_to_the_file(folder, tmp_path, trained):
    output = tmp_path / "captions.jsonl"
    with Records(output):
        command = [sys.executable, "-m", "attncap.caption", folder, "--model", trained, "--output", output]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and f"{output}: another run is writing to it" in done.stderr


def test_a_full_disk(tmp_path):
    with largest_file(200), Records(tmp_path / "captions.jsonl") as records:
        records.write({"image": "a", "status": "captioned"})
        with pytest.raises(UserError, match="captions.jsonl"):
            records.write({"image": "b" * 300, "status": "captioned"})
    with Records(tmp_path / "captions.jsonl") as records:
        assert list(records.known) == ["a"]


def test_a_caption_is_one_line(tmp_path):
    sidecars = Sidecars(None, ".txt", "append")
    sidecars.write(tmp_path / "a.txt", ["two\nlines", "one"])
    assert (tmp_path / "a.txt").read_text() == "two lines\none\n"


@pytest.mark.slow
def test_killed_at_random_moments(trained, tmp_path):
    images, output = make_flickr8k(tmp_path / "made", count=150) / "Images", tmp_path / "captions.jsonl"
    command = [
        sys.executable, "-m", "attncap.caption", images, "--model", trained, "--output", output, "--sidecars",
        "--batch-size", "1",
    ]  # fmt: skip
    for lines in (5, 30, 60):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while process.poll() is None and (not output.exists() or output.read_bytes().count(b"\n") < lines):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert subprocess.run([*command, "--verify"], capture_output=True).returncode == 1
    assert subprocess.run(command, capture_output=True).returncode == 0
    done = subprocess.run([*command, "--verify"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "150 images: 150 captioned, 0 failed\n")
    assert len(texts_in(images)) == 150
