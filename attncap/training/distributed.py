"""One run in several processes, each with a GPU, or a part of the CPUs, and a share of every batch.

    torchrun --nproc-per-node 8 -m attncap.train ...

Each process computes the gradients of its share, DistributedDataParallel brings them together, and all processes take
the same step. The first process (rank 0) validates, shows, and writes. Without torchrun there is one process, and
everything here does nothing.

Rounding apart, a run is the same with any number of processes, but for what is drawn (dropout, words that are sampled)
and for batch norms that are trained: they normalise by their process's share of a batch, as DistributedDataParallel
leaves them, and rank 0's statistics are kept. Frozen ones use the statistics they came with.
"""

import contextlib
import datetime
import logging
import os
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from attncap import command
from attncap.errors import CallError

Value = TypeVar("Value")


@contextlib.contextmanager
def processes(device: str) -> Iterator[torch.device]:
    """Join the other processes that torchrun has started, and yield this one's device: for "auto" and "cuda" a GPU of
    its own. When something fails, the first process to fail tells of it, and the others, which fail since it is gone,
    end with status 1. Raises CallError when there are fewer GPUs than processes."""
    if "RANK" not in os.environ:
        yield command.find_device(device)
        return
    store, rank, size = next(dist.rendezvous("env://"))
    try:
        found = _own_device(device)
        # What the processes agree on goes over the CPU, and waits as long as it takes: one of them may be validating.
        backend = "cpu:gloo,cuda:nccl" if found.type == "cuda" else "gloo"
        waiting = datetime.timedelta(days=7)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=waiting)
        try:
            yield found
        except SystemExit:
            _leave()
            raise
        _leave()
    except Exception as error:
        if not _is_first_to_fail(store):
            raise SystemExit(1) from error
        raise


def _leave() -> None:
    """End together: torchrun ends all processes when the first one goes with an error, and a run that was asked to stop
    goes with one."""
    dist.barrier()
    dist.destroy_process_group()


def _is_first_to_fail(store: dist.Store) -> bool:
    try:
        return store.add("attncap/failed", 1) == 1
    except dist.DistError:  # the process that keeps it is gone
        return False


def _own_device(name: str) -> torch.device:
    device = command.find_device(name)
    if device.type != "cuda" or device.index not in (None, torch.cuda.current_device()):
        return device
    local = int(os.environ.get("LOCAL_RANK", 0))
    if local >= torch.cuda.device_count():
        raise CallError(f"--nproc-per-node: there are {torch.cuda.device_count()} GPUs; start no more processes")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def rank() -> int:
    """The number of this process, from 0 on."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def total(values: Sequence[float]) -> list[float]:
    """Each of the numbers, summed over the processes."""
    if size() == 1:
        return list(values)
    summed = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(summed)
    return summed.tolist()


def gathered(value: list[Value]) -> list[Value]:
    """The lists of all processes, one after the other."""
    if size() == 1:
        return value
    found: list = [None] * size()
    dist.all_gather_object(found, value)
    return [entry for part in found for entry in part]


def from_main(value: Value | None) -> Value:
    """What rank 0 calls this with, in every process; the others wait for it."""
    if size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def wrapped(module: nn.Module) -> nn.Module:
    """The module whose backward passes sum gradients over the processes. It takes rank 0's weights everywhere."""
    return module if size() == 1 else DistributedDataParallel(module)


def gradients_stay(module: nn.Module, yes: bool) -> contextlib.AbstractContextManager:
    """Where `yes`, a wrapped module's gradients stay in this process, to be summed with those of a later pass."""
    return module.no_sync() if yes and isinstance(module, DistributedDataParallel) else contextlib.nullcontext()


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """What all processes would warn of alike, rank 0 alone does."""
    log = logging.getLogger("attncap")
    log.disabled = not is_main()
    yield
    log.disabled = False


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """The other processes enter when rank 0 is through, and find the files that it has written."""
    if not is_main():
        dist.barrier()
    yield
    if is_main() and size() > 1:
        dist.barrier()
