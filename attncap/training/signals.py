"""Ctrl-C, SIGTERM and SIGHUP as requests to stop, which training follows as soon as its state is complete."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator

REPEAT_AFTER = 1.0  # seconds; a signal sooner after the first one is the same one, sent on by a launcher


class Stopped(SystemExit):
    """The run was asked to stop. Its exit status is the shell's for the signal: 130 for Ctrl-C, 143 for SIGTERM, and
    129 for SIGHUP, when its terminal was closed."""

    def __init__(self, signum: int):
        super().__init__(128 + signum)


class SignalHandler:
    """A context manager that handles SIGINT, SIGTERM and SIGHUP: the first one is only noted, as `signum` (0 before),
    and a second one ends the process at once."""

    def __init__(self) -> None:
        self.signum = 0
        self._time = 0.0
        self._raising = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "SignalHandler":
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(signum) != signal.SIG_IGN:  # as nohup does, and shells for background jobs
                self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """For a block that can be interrupted anywhere: in it, the first signal raises Stopped."""
        self._raising = True
        try:
            if self.signum:
                raise Stopped(self.signum)
            yield
        finally:
            self._raising = False

    def _handle(self, signum: int, frame: object) -> None:
        if not self.signum:
            self.signum, self._time = signum, time.monotonic()
            if self._raising:
                raise Stopped(signum)
        elif time.monotonic() - self._time > REPEAT_AFTER:
            os._exit(128 + signum)
