"""The process of a command: its standard streams, its error line, and its exit status."""

import contextlib
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn, TextIO

from attncap.errors import UserError

# Characters that control a terminal, or that split or reverse a line; not line feeds, which `escape` keeps.
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def escape(text: str) -> str:
    r"""The text with its control characters, apart from line feeds, as escapes: \t, \x1b. Names of files and the words
    of a vocabulary come from strangers."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def escape_line(text: object) -> str:
    """`escape`, with line feeds as escapes too."""
    return escape(str(text)).replace("\n", r"\n")


class StandardError:
    """sys.stderr, whose write errors are ignored: no command ends because a message cannot be shown. After an error,
    here and in StandardOutput, the stream is redirected to os.devnull, so that later writes and flushes do not fail."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        with contextlib.suppress(AttributeError):  # not a TextIOWrapper, such as Jupyter's stream
            # The name of a file may not be valid text. Lines appear at once, also in a pipe.
            stream.reconfigure(errors="backslashreplace", line_buffering=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._try(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, operation: Callable, *arguments: object) -> None:
        try:
            operation(*arguments)
        except OSError as error:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())
            self.failed(error)

    def failed(self, error: OSError) -> None:
        pass


class StandardOutput(StandardError):
    """sys.stdout. A command whose only result is its output ends when that cannot be written: with status 0 if the
    reader has exited, as in `... | head`, and with an error otherwise.

    escaped: whether control characters are shown as escapes.
    optional: whether the command continues without its output, because its results are files.
    lost: whether output was lost for any other reason than that the reader has exited.
    """

    escaped = optional = lost = False

    def write(self, text: str) -> int:
        return super().write(escape(text) if self.escaped else text)

    def failed(self, error: OSError) -> None:
        gone = isinstance(error, BrokenPipeError)
        message = f"cannot write standard output: {error.strerror}"
        if not self.optional:
            raise SystemExit(0) if gone else UserError(message)
        self.lost = self.lost or not gone
        kind = "" if gone else "error: "
        print(f"attncap: {kind}{message}; the command continues, since it writes files", file=sys.stderr)


def make_output_optional() -> None:
    """Let the command continue if its output cannot be written, because it also writes files."""
    sys.stdout.optional = True


class OneLineFormatter(logging.Formatter):
    """Messages on one line; a traceback after them keeps its lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return escape_line(super().formatMessage(record))


def run(work: Callable[[], object], debug: bool = False) -> NoReturn:
    """Call `work` with the standard streams above, and end the process with status 0 (success), 1 (the work failed), 2
    (the call was wrong), 130 (interrupted), or that of a SystemExit. An error is one line on standard error; `debug`
    adds the traceback. A stream that is closed counts as os.devnull."""
    open_closed_streams()
    stdout, stderr = StandardOutput(sys.stdout), StandardError(sys.stderr)
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        handler = logging.StreamHandler()
        handler.setFormatter(OneLineFormatter("attncap: %(message)s"))
        logging.basicConfig(handlers=[handler])
        worked, flushed = attempt(work, debug), attempt(stdout.flush, debug)
    sys.exit(worked or flushed or int(stdout.lost))


def attempt(work: Callable[[], object], debug: bool) -> int:
    """Call `work` and report its error. Returns the exit status."""
    try:
        work()
        return 0
    except SystemExit as ended:
        return int(ended.code or 0)
    except KeyboardInterrupt:
        print("attncap: interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # whatever it is, the user gets one line
        if debug:
            print(escape(traceback.format_exc()), file=sys.stderr)
        known = isinstance(error, UserError)
        message = error if known else f"{type(error).__name__}: {error} (--debug shows where)"
        print(f"attncap: error: {escape_line(message)}", file=sys.stderr)
        return error.status if known else 1


def open_closed_streams() -> None:
    """Open closed standard streams as os.devnull. Otherwise the next file to be opened, perhaps a checkpoint, would get
    the descriptor of a standard stream, and C libraries would write their messages into it."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free descriptor, this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))
