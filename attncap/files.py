"""Files that are either whole or not there, and text and JSON read with errors that name the file."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from attncap.errors import UserError


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that takes its name when the block ends without an error.

    Missing folders are made. Whatever goes wrong in the block, an older file at `path` stays as it
    was and the temporary one is removed. What is renamed is on the disk, so that a power failure
    leaves one whole file or the other. Raises UserError when the system refuses to write.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()  # a folder that refuses files is found before the block's work is done
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
    """Remove what a process that was killed while it wrote into the folder has left there."""
    for path in folder.glob(".*.tmp"):
        if re.fullmatch(r"\..+\.\d+\.tmp", path.name):
            path.unlink(missing_ok=True)


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write the bytes, or the text in UTF-8, to `path`. Raises UserError, see `atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))


def read_text(path: Path) -> str:
    """The UTF-8 text of a file, without a byte order mark. Raises UserError when there is no such text to be read."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def read_json(path: Path) -> object:
    """The value in a JSON file. Raises UserError when it cannot be read or is cut short."""
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a whole JSON file: {error}") from error
