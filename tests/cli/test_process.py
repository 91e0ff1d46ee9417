"""Commands whose standard streams are closed, full, not UTF-8 or without a reader, each in a process of its own."""

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest
from conftest import TINY, make_flickr8k
from PIL import Image

from attncap.cli.process import escape, escape_line

NASTY = ["a\nb", "tab\t", "\x1b[2Jred", "c1\x9bH", "\x7f", "line\u2028", "\u202egnp", "é犬🐶", "\udcff"]  # file names
SHOWN = [r"a\nb", r"tab\t", r"\x1b[2Jred", r"c1\x9bH", r"\x7f", r"line\u2028", r"\u202egnp", "é犬🐶", r"\udcff"]

ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("PYTHONUNBUFFERED", "COLUMNS")}


PROCESS = """
from attncap.cli import process
from attncap.errors import CallError
def work():
    {}
process.run(work)
"""


def command(work: str) -> list[str]:
    """A process that does `work`, a few lines of Python, as commands do."""
    return [sys.executable, "-c", PROCESS.format(work.replace("\n", "\n    "))]


def run(arguments: list, closed: tuple[int, ...] = (), **options) -> tuple[int, str, str]:
    """Exit status, standard output and standard error, without progress bars. The streams numbered in `closed` are
    closed."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": ENVIRONMENT, "timeout": 120, **options}
    done = subprocess.run(list(map(str, arguments)), preexec_fn=lambda: [os.close(n) for n in closed], **options)
    err = [line for line in (done.stderr or b"").decode().splitlines() if "%|" not in line and line.strip()]
    return done.returncode, (done.stdout or b"").decode(), "\n".join(err)


@pytest.fixture
def unread():
    """A pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.fixture
def full():
    with open("/dev/full", "w") as stream:
        yield stream


FOR_EVER = "while True: print('a caption')"
WITH_FILES = "process.make_output_optional(); print('a'); print('b'); open({path!r}, 'w').write('done')"
NO_SPACE = "cannot write standard output: No space left on device"


def test_a_reader_that_has_gone_ends_a_command_unless_it_writes_files(unread, tmp_path):
    assert run(command(FOR_EVER), stdout=unread) == (0, "", "")
    assert run(command("print('short', end='')"), stdout=unread) == (0, "", "")  # written only when the process ends
    status, _, err = run(command(WITH_FILES.format(path=str(tmp_path / "file"))), stdout=unread)
    assert status == 0 and (tmp_path / "file").read_text() == "done"
    assert err == ("attncap: cannot write standard output: Broken pipe; the command continues, since it writes files")


def test_a_full_disk_below_standard_output_is_an_error(full, tmp_path):
    for work in (FOR_EVER, "print('short', end='')"):
        assert run(command(work), stdout=full) == (1, "", f"attncap: error: {NO_SPACE}")
    status, _, err = run(command(WITH_FILES.format(path=str(tmp_path / "file"))), stdout=full)
    assert status == 1 and (tmp_path / "file").read_text() == "done"
    assert err == f"attncap: error: {NO_SPACE}; the command continues, since it writes files"


def test_an_error_of_the_work_comes_first(full, unread):
    status, _, err = run(command("print('a', end=''); raise CallError('the cause')"), stdout=full)
    assert status == 2 and err == f"attncap: error: the cause\nattncap: error: {NO_SPACE}"
    for code in (0, 2, 143):
        assert run(command(f"raise SystemExit({code})"), stdout=unread)[0] == code


def test_a_broken_pipe_that_is_not_standard_output_is_an_error():
    status, _, err = run(command("raise BrokenPipeError(32, 'Broken pipe')"))
    assert status == 1 and "BrokenPipeError" in err


def test_no_work_ends_because_messages_cannot_be_shown(unread, full):
    work = (
        "import logging, sys, tqdm\nfor _ in tqdm.tqdm(range(3), mininterval=0): logging.warning('a'); print('out')\n"
        "print('b', file=sys.stderr)"
    )
    for stderr in (unread, full):
        assert run(command(work), stderr=stderr)[:2] == (0, "out\n" * 3)
    assert run(command(work), stdout=unread, stderr=unread)[0] == 0
    assert run(command("raise ValueError"), stderr=unread)[0] == 1


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_closed_streams_count_as_devnull(tmp_path, closed):
    """A file that is opened later does not get one of their descriptors, to which C libraries write."""
    path = tmp_path / "file"
    work = (
        f"import os, sys; file = open({str(path)!r}, 'w'); file.write(str(file.fileno()))\n"
        "print('out'); print('err', file=sys.stderr); os.write(2, b'from C')"
    )
    status, out, err = run(command(work), closed)
    assert status == 0 and int(path.read_text()) > 2
    assert out == ("" if 1 in closed else "out\n") and err == ("" if 2 in closed else "err\nfrom C")


def test_lines_appear_at_once():
    process = subprocess.Popen(command("print('first'); input()"), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"first\n"
    process.communicate(b"\n", timeout=60)


def test_control_characters_are_shown_as_escapes():
    for text, shown in zip(NASTY, SHOWN, strict=True):
        assert escape_line(text).encode(errors="backslashreplace").decode() == shown
    assert escape("a\n\tb\n") == "a\n\\tb\n"
    work = (
        "import logging, sys; sys.stdout.escaped = True; print('a\\x1b[2J\\nb')\n"
        "logging.warning('%s', 'c\\x1b[2J\\nd'); raise ValueError('e\\x1b[2J\\nf')"
    )
    assert run(command(work)) == (
        1,
        "a\\x1b[2J\nb\n",
        "attncap: c\\x1b[2J\\nd\nattncap: error: ValueError: e\\x1b[2J\\nf (--debug shows where)",
    )


def test_names_with_control_characters(attncap, trained, tmp_path):
    """A line for each image in text; in JSON Lines, the names themselves, in ASCII."""
    for index, name in enumerate(NASTY):
        Image.new("RGB", (40, 40), (40, 60, 200 + index)).save(tmp_path / f"{name}.png")
    options = ["--model", trained, "--workers", 0]
    status, out, _ = attncap("caption", tmp_path, *options)
    assert status == 0 and sorted(line.split(": ")[0] for line in out.split("\n")[:-1]) == sorted(
        f"{tmp_path}/{name}.png" for name in SHOWN
    )
    status, out, _ = attncap("caption", tmp_path, *options, "--format", "jsonl")
    assert status == 0 and out.isascii()
    assert {json.loads(line)["image"] for line in out.split("\n")[:-1]} == {f"{tmp_path}/{name}.png" for name in NASTY}


@pytest.mark.slow
def test_output_that_is_not_utf8(trained, tmp_path):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "é犬🐶.png")
    (tmp_path / "\x1b[2J.png").write_bytes(b"")
    arguments = [sys.executable, "-m", "attncap.caption", tmp_path, "--model", trained, "--workers", 0]
    status, out, err = run([*arguments, "--format", "jsonl"], env={**ENVIRONMENT, "PYTHONIOENCODING": "latin-1"})
    assert status == 3 and json.loads(out)["image"] == f"{tmp_path}/é犬🐶.png"
    assert r"\x1b[2J.png: the file is empty" in err


@pytest.mark.slow
def test_captioning_without_a_reader_draws_its_pictures(trained, flickr8k, tmp_path, unread):
    arguments = [sys.executable, "-m", "attncap.caption", "--model", trained, "--workers", 0]
    arguments += [flickr8k / "Images" / "000.png", flickr8k / "Images" / "001.png"]
    assert run([*arguments, "--attention-dir", tmp_path], stdout=unread)[0] == 0 and len(list(tmp_path.iterdir())) == 2
    assert run(arguments, (0, 1, 2))[0] == 0


EVALUATE = """
import sys
from attncap.cli import evaluate
from attncap.metrics import java
java.find_java = lambda: None  # METEOR takes seconds
evaluate.run("attncap evaluate", sys.argv[1:])
"""


@pytest.mark.slow
def test_data_and_evaluate_without_a_reader_write_their_files(tmp_path, unread, full):
    data = make_flickr8k(tmp_path / "data", count=6)
    (tmp_path / "references.json").write_text('{"annotations": [{"id": 1, "image_id": 1, "caption": "a dog"}]}')
    (tmp_path / "results.json").write_text('[{"image_id": 1, "caption": "a dog"}]')
    convert = [sys.executable, "-m", "attncap.data", data, "--convert"]
    evaluate = [sys.executable, "-c", EVALUATE, "--predictions", tmp_path / "results.json"]
    evaluate += ["--references", tmp_path / "references.json", "--output"]
    for name, stdout, status in (("unread", unread, 0), ("full", full, 1)):
        assert run([*convert, tmp_path / f"{name}.jsonl"], stdout=stdout)[0] == status
        assert len((tmp_path / f"{name}.jsonl").read_text().splitlines()) == 12
        assert run([*evaluate, tmp_path / f"{name}.json"], stdout=stdout)[0] == status
        assert json.loads((tmp_path / f"{name}.json").read_text())["BLEU-1"] == pytest.approx(1)
        assert (tmp_path / f"{name}.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unread", "full"])
def test_training_goes_on_without_its_output(request, flickr8k, tmp_path, kind):
    """As after `train 2>&1 | head`: quitting a pager must not cost hours of training."""
    arguments = [sys.executable, "-m", "attncap.train", "--data", flickr8k, *TINY, "--epochs", 2, "--output", tmp_path]
    stream = request.getfixturevalue(kind)
    status, _, err = run(arguments, stdout=stream, **({"stderr": stream} if kind == "unread" else {}))
    assert status == (1 if kind == "full" else 0)
    assert kind != "full" or err.count(f"attncap: error: {NO_SPACE}; the command continues") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "test.json").exists() and (tmp_path / "attention.png").exists()


@pytest.mark.parametrize("columns", [1, 3, 40, 1000])
def test_help_in_a_terminal_of_any_width(columns):
    terminal, stream = pty.openpty()
    fcntl.ioctl(stream, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen([sys.executable, "-m", "attncap.info", "--help"], stdout=stream, env=ENVIRONMENT)
    os.close(stream)
    out = b""
    try:
        while part := os.read(terminal, 4096):
            out += part
    except OSError:  # the end, on Linux
        os.close(terminal)
    assert process.wait(timeout=60) == 0 and b"--debug" in out


def test_the_help_of_all_commands_without_a_reader_or_space(unread, full):
    help_of_all = [sys.executable, "-m", "attncap.cli.main"]
    assert run(help_of_all, stdout=unread) == (0, "", "")
    assert run(help_of_all, stdout=full) == (1, "", f"attncap: error: {NO_SPACE}")
    assert run(help_of_all, (0, 1, 2)) == (0, "", "")
