"""Writing files atomically, locking folders, and reading text and JSON; every error names the file."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from attncap.errors import UserError

MAX_TABLE = 2 * 2**30  # bytes of a file of captions that is read at once; those of COCO have 0.1 GiB

log = logging.getLogger("attncap")


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Yield a new file, open for writing, which replaces `path` when the block ends without an error.

    Missing folders are created. Of a symbolic link, the target is replaced. If anything goes wrong, an older file at
    `path` stays unchanged and the new one is removed. The content is flushed to disk before the file gets its name, so
    that a power failure leaves either the old file or the new one. Raises UserError when the file cannot be written.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        if target.exists() and not target.is_file() and not target.is_dir():
            raise OSError(errno.EINVAL, "not a regular file")  # otherwise one would replace /dev/null
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write bytes, or text in UTF-8. Raises UserError, see `atomic_file`."""
    with atomic_file(path) as file:
        file.write(content if isinstance(content, bytes) else content.encode("utf-8"))


def _cannot_write(path: str | Path, error: OSError) -> UserError:
    if isinstance(error, FileExistsError):  # from mkdir
        return UserError(f"cannot write {path}: {error.filename} is not a folder")
    return UserError(f"cannot write {path}: {error.strerror or error}")


def remove_temporary(folder: Path) -> None:
    """Remove the temporary files that a killed process has left in the folder."""
    for path in folder.glob(".*.tmp"):
        if re.fullmatch(r"\..+\.\d+\.tmp", path.name):
            path.unlink(missing_ok=True)


class FolderLock:
    """A context manager that creates a folder and locks it: no other process can lock it at the same time. The lock is
    on the file .lock and is released when the process ends, however it ends. Folders that it has created are removed
    if they are still empty at the end.

    Entering raises UserError when another process has the lock, or the folder cannot be written.
    """

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / ".lock"

    def __enter__(self) -> FolderLock:
        try:
            self._made = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+", encoding="utf-8", errors="replace")
            self._lock()
            self._file.truncate(0)
            self._file.write(f"{os.getpid()}\n")
            self._file.flush()
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError, UserError):
            self.check()
            self.path.unlink()
            for folder in self._made:
                folder.rmdir()
        self._file.close()

    def _lock(self) -> None:
        try:
            # A record lock, which forked processes do not inherit: with flock, a worker that outlives its parent for a
            # moment would still hold it.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.check()  # the process that had the lock may have removed the file
        except (BlockingIOError, PermissionError) as error:
            self._file.seek(0)
            process = self._file.read(20).strip()
            raise UserError(f"{self.folder}: another run is writing to it (process {process})") from error
        except OSError as error:  # some network file systems have no locks
            log.warning("%s: cannot be locked (%s); start no other run there", self.folder, error.strerror)

    def check(self) -> None:
        """Raises UserError if the folder is no longer the one that was locked."""
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(self.path), os.fstat(self._file.fileno())):
                return
        raise UserError(f"{self.folder}: the folder was removed or replaced while this run was writing to it")


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file to read its bytes. Raises OSError for anything that is not a regular file: a pipe may never end, and
    merely opening one may block forever."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


def read_beginning(path: Path) -> bytes:
    """The first 64 KiB of a file, without a byte order mark; b"" if it cannot be read."""
    try:
        with open_regular(path) as file:
            return file.read(2**16).removeprefix(b"\xef\xbb\xbf")
    except OSError:
        return b""


def read_bytes(path: str | Path, max_bytes: int = MAX_TABLE) -> bytes:
    """All bytes of a regular file. Raises UserError when it cannot be read, or has more than `max_bytes` bytes."""
    try:
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size > max_bytes:
                raise UserError(f"{path}: cannot be read: larger than {max_bytes / 2**20:,.0f} MiB")
            return file.read()
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL character
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def read_text(path: str | Path, max_bytes: int = MAX_TABLE) -> str:
    """The UTF-8 text of a file, without a byte order mark. Raises UserError when it cannot be read, is larger than
    `max_bytes`, or is not UTF-8."""
    try:
        return read_bytes(path, max_bytes).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def read_json(path: str | Path, max_bytes: int = MAX_TABLE) -> object:
    """The value in a JSON file. Raises UserError when it cannot be read, is larger than `max_bytes`, or is not JSON."""
    text = read_text(path, max_bytes)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a whole JSON file: {error}") from error
