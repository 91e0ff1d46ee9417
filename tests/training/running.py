"""Training commands in processes of their own that start quickly: a server that has imported everything forks them."""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from conftest import TINY

QUICK = [*TINY, *"--beam-size 1 --dropout 0.3 --augment --epochs 3 --captions-per-image 1 --max-length 8".split()]

SERVER = """
import json, os, signal, sys
from attncap.cli import train
from attncap.metrics import java
from attncap.training import run, run_logger, trainer
java.find_java = lambda: None
run.save_attention = lambda *_: None  # drawing takes longer than these runs
run_logger.draw_curves = lambda *_: b""
run_logger._open_board = lambda *_: None
for line in sys.stdin:
    order = json.loads(line)
    if "wait" in order:
        print(os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1]), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        os.environ.update(order["environment"])
        sys.argv = ["train", *order["arguments"]]
        exec(order["before"])
        train.run("python -m attncap.train", sys.argv[1:])
    print(pid, flush=True)
"""


@dataclass
class Running:
    server: subprocess.Popen
    pid: int
    log: Path

    def status(self) -> int:
        """Wait for the process to end. Its exit status, negative for a signal."""
        return self.server.ask({"wait": self.pid})

    def text(self) -> str:
        return self.log.read_text()


class Server:
    """Starts training commands. `close` ends it."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # several run at once, on small models
        )

    def ask(self, order: dict) -> int:
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, log: Path, arguments: list, before: str = "", **environment: object) -> Running:
        """`before` is Python code that the new process runs before the command."""
        order = {
            "log": str(log),
            "arguments": [str(argument) for argument in arguments],
            "before": before,
            "environment": {name: str(value) for name, value in environment.items()},
        }
        return Running(self, self.ask(order), log)

    def start_processes(self, count: int, log: Path, arguments: list, before: str = "") -> list[Running]:
        """Like torchrun on one machine; each process logs to a file of its own."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return [
            self.start(log.with_suffix(f".{rank}"), arguments, before, RANK=rank, LOCAL_RANK=rank, **shared)
            for rank in range(count)
        ]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)


def children(pid: int) -> list[int]:
    """The processes that the process `pid` has started and that are still running."""
    found = (int(path.name) for path in Path("/proc").glob("[0-9]*"))
    return [other for other in found if is_running(other) and _stat(other)[1] == str(pid)]


def is_running(pid: int) -> bool:
    return _stat(pid)[0] not in "ZX"


def _stat(pid: int) -> list[str]:
    """Its state and its parent, from /proc; the state is X for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return ["X", ""]


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def flatten(state: object, name: str = "") -> dict[str, object]:
    """Nested dicts and lists -> their leaves, by path."""
    if isinstance(state, dict | list | tuple):
        entries = state.items() if isinstance(state, dict) else enumerate(state)
        return {key: leaf for part, value in entries for key, leaf in flatten(value, f"{name}/{part}").items()}
    return {name: state}


def assert_same_state(one: dict, other: dict) -> None:
    """Bit for bit, apart from the seconds that an epoch took."""
    one, other = flatten(one), flatten(other)
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert value.equal(other[name]), name
        elif name != "/seconds":
            assert value == other[name], name


def metrics(folder: Path) -> list[dict]:
    """The lines of the log without the seconds."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def wait_for_checkpoints(run: Path, count: int) -> None:
    """Wait until `count` more checkpoints are written than there are now, and at least the first one."""
    path = run / "checkpoint.pt"
    count, last = count + (not path.exists()), path.exists() and path.stat().st_ino
    end = time.monotonic() + 120
    while count and time.monotonic() < end:
        time.sleep(0.002)
        if path.exists() and path.stat().st_ino != last:
            count, last = count - 1, path.stat().st_ino


def assert_gone(pids: list[int]) -> None:
    """Wait until these processes have ended."""
    for _ in range(6000):
        pids = [pid for pid in pids if is_running(pid)]
        if not pids:
            return
        time.sleep(0.01)
    raise AssertionError(f"still running: {pids}")
