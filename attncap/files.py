"""Files written atomically, and text and JSON read with errors that name the file."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from attncap.errors import UserError

MAX_TABLE = 2 * 2**30  # bytes of a file of captions that is read at once; those of COCO have 0.1 GiB


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which replaces `path` when the block ends without an error.

    Missing folders are made. If anything goes wrong in the block, an older file at `path` stays unchanged and the
    temporary file is removed. The content is flushed to disk before the file is renamed, so that a power failure leaves
    either the old file or the new one. Raises UserError when the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()  # a folder that cannot be written is found before the block does its work
        yield temporary
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except FileExistsError as error:
        raise UserError(f"cannot write {path}: {error.filename} is not a folder") from error
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_temporary(folder: Path) -> None:
    """Remove the temporary files that a killed process has left in the folder."""
    for path in folder.glob(".*.tmp"):
        if re.fullmatch(r"\..+\.\d+\.tmp", path.name):
            path.unlink(missing_ok=True)


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write bytes, or text in UTF-8. Raises UserError, see `atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file to read its bytes. Raises OSError for anything that is not a regular file: a pipe may never end, and
    merely opening one may block for ever."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    file = os.fdopen(descriptor, "rb")  # raises IsADirectoryError
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


def read_bytes(path: str | Path, most: int = MAX_TABLE) -> bytes:
    """All bytes of a regular file. Raises UserError when it cannot be read, or has more than `most` bytes."""
    try:
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size > most:
                raise UserError(f"{path}: cannot be read: larger than {most / 2**20:,.0f} MiB")
            return file.read()
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL character
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def read_text(path: str | Path, most: int = MAX_TABLE) -> str:
    """The UTF-8 text of a file, without a byte order mark. Raises UserError when it cannot be read, is larger than
    `most` bytes, or is not UTF-8."""
    try:
        return read_bytes(path, most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def read_json(path: str | Path, most: int = MAX_TABLE) -> object:
    """The value in a JSON file. Raises UserError when it cannot be read, is larger than `most` bytes, or is not
    JSON."""
    text = read_text(path, most)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a whole JSON file: {error}") from error
