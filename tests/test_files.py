import errno
import fcntl
import os
import shutil
import subprocess
import sys

import pytest
from conftest import largest_file

from attncap.errors import UserError
from attncap.files import FolderLock, atomic_file, open_regular, write_atomically


def test_text_and_bytes(tmp_path):
    write_atomically(tmp_path / "a" / "b.txt", "Bär\n")
    assert (tmp_path / "a" / "b.txt").read_bytes() == b"B\xc3\xa4r\n"
    write_atomically(str(tmp_path / "c.bin"), b"\x00\xff")
    assert (tmp_path / "c.bin").read_bytes() == b"\x00\xff"


def test_what_is_refused_leaves_no_descriptor_open(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    before = os.listdir("/proc/self/fd")
    for path, reason in ((tmp_path, "Is a directory"), (tmp_path / "pipe", "not a regular file"), ("a\0b", "null")):
        with pytest.raises((OSError, ValueError), match=reason):
            open_regular(path)
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error), atomic_file(path) as file:
        file.write(b"half of the n")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_unwritable_places_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as caught:
        write_atomically(tmp_path / "file" / "x.json", "")
    assert str(caught.value) == f"cannot write {tmp_path / 'file' / 'x.json'}: {tmp_path / 'file'} is not a folder"
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot write .*folder: Is a directory"):
        write_atomically(tmp_path / "folder", "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("size", [10, 100_000])  # below and above what Python buffers
def test_a_full_disk_is_reported_as_such(tmp_path, monkeypatch, size):
    path = tmp_path / "file"
    path.write_text("old")
    with largest_file(size - 1), pytest.raises(UserError) as caught:
        write_atomically(path, "x" * size)
    assert str(caught.value) == f"cannot write {path}: File too large"

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)  # some file systems report it only here
    with pytest.raises(UserError, match="file: No space left on device"):
        write_atomically(path, "x" * size)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_symbolic_link_stays_one(tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "disk" / "file")
    for text in ("one", "two"):
        write_atomically(link, text)
        assert link.is_symlink() and (tmp_path / "disk" / "file").read_text() == text


def test_only_regular_files_are_replaced(tmp_path):
    """Root could replace a device."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="cannot write .*pipe: not a regular file"):
        write_atomically(tmp_path / "pipe", "text")
    assert (tmp_path / "pipe").is_fifo() and len(list(tmp_path.iterdir())) == 1


TRY_TO_LOCK = """
import sys
from pathlib import Path
from attncap.errors import UserError
from attncap.files import FolderLock
try:
    with FolderLock(Path(sys.argv[1])):
        print("locked")
except UserError as error:
    print(error)
"""


def lock_elsewhere(folder) -> str:
    command = [sys.executable, "-c", TRY_TO_LOCK, folder]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_a_folder_is_locked_by_one_process(tmp_path):
    folder = tmp_path / "made" / "run"
    with FolderLock(folder) as lock:
        assert lock_elsewhere(folder) == f"{folder}: another run is writing to it (process {os.getpid()})"
        lock.check()
        (folder / "file").touch()
    assert [path.name for path in folder.iterdir()] == ["file"]
    assert lock_elsewhere(folder) == "locked"
    assert [path.name for path in folder.iterdir()] == ["file"]


def test_a_killed_process_leaves_no_lock(tmp_path):
    """Even while a process that it forked, such as a worker that reads images, is still running."""
    script = (
        "import os, signal, sys, time; from pathlib import Path; from attncap.files import FolderLock\n"
        "with FolderLock(Path(sys.argv[1])):\n"
        "    child = os.fork()\n"
        "    if child == 0: time.sleep(60)\n"
        "    print(child, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.Popen([sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE)
    child = int(killed.stdout.readline())
    killed.wait()
    os.kill(child, 0)  # it is there
    assert lock_elsewhere(tmp_path) == "locked"
    os.kill(child, 9)
    killed.stdout.close()


def test_a_locked_folder_that_is_removed_or_replaced(tmp_path):
    folder = tmp_path / "run"
    for replaced in (False, True):
        with FolderLock(folder) as lock:
            shutil.rmtree(folder)
            if replaced:
                folder.mkdir()
                (folder / ".lock").touch()
            with pytest.raises(UserError, match="run: the folder was removed or replaced while this run was writing"):
                lock.check()
        assert (folder / ".lock").exists() == replaced


def test_folders_that_cannot_be_locked(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=f"cannot write .*: {tmp_path / 'file'} is not a folder"),
        FolderLock(tmp_path / "file"),
    ):
        pass

    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    with FolderLock(tmp_path / "made" / "run") as lock:
        lock.check()
    assert "run: cannot be locked (No locks available)" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
