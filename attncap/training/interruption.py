"""Ctrl-C and SIGTERM, as wishes that training fulfils when its state is whole."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator


class Stopped(SystemExit):
    """The run was asked to stop; the status is the shell's for the signal: 130 for Ctrl-C, 143 for SIGTERM."""

    def __init__(self, number: int):
        super().__init__(128 + number)


class Interruption:
    """While entered, a first SIGINT or SIGTERM is only noted, as `number`; a second one ends the process at once."""

    def __init__(self) -> None:
        self.number = 0
        self.time = 0.0
        self.raising = False

    def __enter__(self) -> "Interruption":
        self.before = {
            number: signal.signal(number, self.note)
            for number in (signal.SIGINT, signal.SIGTERM)
            if signal.getsignal(number) != signal.SIG_IGN  # as a shell starts what runs in the background
        }
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def raised(self) -> Iterator[None]:
        """In this block, which can be broken off anywhere, the first signal raises Stopped."""
        self.raising = True
        try:
            if self.number:
                raise Stopped(self.number)
            yield
        finally:
            self.raising = False

    def note(self, number: int, frame: object) -> None:
        if not self.number:
            self.number, self.time = number, time.monotonic()
            if self.raising:
                raise Stopped(number)
        elif time.monotonic() - self.time > 1:  # launchers send on what their processes got as well
            os._exit(128 + number)
