"""One run in several processes, each with a GPU or a part of the CPUs, and a share of every batch.

    torchrun --nproc-per-node 8 -m attncap.train ...

Each process computes the gradients of its share, DistributedDataParallel averages them, and all processes take the same
step. The first process (rank 0) validates, prints, and writes. Without torchrun there is one process, and everything
here does nothing.

A run is the same with any number of processes, apart from rounding, from what is drawn at random (dropout, sampled
words), and from batch norms that are trained: these normalise by their process's share of a batch, as with any
DistributedDataParallel, and rank 0's statistics are kept. Frozen ones use the statistics they came with.
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

from attncap.devices import find_device
from attncap.errors import CallError

Value = TypeVar("Value")


@contextlib.contextmanager
def process_group(device: str) -> Iterator[torch.device]:
    """Join the other processes that torchrun has started, and yield this one's device: for "auto" and "cuda", a GPU of
    its own. When something fails, the first process to fail raises its error; the others, which fail because it is
    gone, exit with status 1. Raises CallError when there are fewer GPUs than processes."""
    if "RANK" not in os.environ:
        yield find_device(device)
        return
    store, rank, size = next(dist.rendezvous("env://"))
    try:
        found = _own_device(device)
        # Python objects are exchanged over the CPU, with a timeout that nothing reaches: rank 0 may be validating.
        backend = "cpu:gloo,cuda:nccl" if found.type == "cuda" else "gloo"
        timeout = datetime.timedelta(days=7)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
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
    """End together: torchrun ends all processes as soon as one exits with an error, as a run does that was asked to
    stop."""
    dist.barrier()
    dist.destroy_process_group()


def _is_first_to_fail(store: dist.Store) -> bool:
    try:
        return store.add("attncap/failed", 1) == 1
    except dist.DistError:  # the process that holds the store is gone
        return False


def _own_device(name: str) -> torch.device:
    if name not in ("auto", "cuda", "cuda:0") or not torch.cuda.is_available():
        return find_device(name)
    local = int(os.environ.get("LOCAL_RANK", 0))
    if local >= torch.cuda.device_count():
        raise CallError(f"--nproc-per-node: there are {torch.cuda.device_count()} GPUs; start no more processes")
    torch.cuda.set_device(local)  # before anything is made on the first GPU, which would take memory there
    return torch.device("cuda", local)


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is rank 0."""
    return rank() == 0


def all_reduce_sum(values: Sequence[float]) -> list[float]:
    """Each of the numbers, summed over the processes."""
    if size() == 1:
        return list(values)
    summed = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(summed)
    return summed.tolist()


def all_gather(values: list[Value]) -> list[Value]:
    """The lists of all processes, concatenated."""
    if size() == 1:
        return values
    found: list = [None] * size()
    dist.all_gather_object(found, values)
    return [value for part in found for value in part]


def broadcast(value: Value | None) -> Value:
    """Rank 0's value, in every process; the others wait for it."""
    if size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def data_parallel(module: nn.Module) -> nn.Module:
    """The module, with rank 0's weights in every process, whose backward passes average gradients over the
    processes."""
    return module if size() == 1 else DistributedDataParallel(module)


def no_sync(module: nn.Module) -> contextlib.AbstractContextManager:
    """A context in which gradients of a `data_parallel` module are summed in this process only. The first backward pass
    after it averages the sum over the processes."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else contextlib.nullcontext()


@contextlib.contextmanager
def log_on_main_only() -> Iterator[None]:
    """For a block in which every process would log the same: rank 0 alone does."""
    log = logging.getLogger("attncap")
    log.disabled = not is_main()
    try:
        yield
    finally:
        log.disabled = False


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """The other processes enter the block when rank 0 has left it, and find the files that it has written."""
    if not is_main():
        dist.barrier()
    yield
    if is_main() and size() > 1:
        dist.barrier()
