"""From images of a data set to batches of tensors."""

import atexit
import contextlib
import multiprocessing
import pickle
import queue
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from attncap.data.dataset import CaptionedImage, Skipped, one_line
from attncap.data.images import ImageError
from attncap.data.vocabulary import Vocabulary
from attncap.errors import UserError

# Signals that workers ignore: launchers and Ctrl-C send them to all processes at once; only the parent acts on them.
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def to_tensor(image: Image.Image, size: int) -> Tensor:
    """An RGB image -> uint8 [3,size,size]. Proportions are not kept, so that every part of the image is seen."""
    image = image.resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class Pictures(Dataset):
    """Images by index, each as (index, uint8 [3,S,S]), or (index, Skipped) where the image cannot be read."""

    def __init__(self, examples: Sequence[CaptionedImage], size: int):
        self.examples, self.size = examples, size

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[int, Tensor | Skipped]:
        try:
            return index, self.prepare(self.examples[index].image())
        except ImageError as error:
            return index, Skipped(index, error.name, error.reason)

    def prepare(self, image: Image.Image) -> Tensor:
        return to_tensor(image, self.size)


class AugmentedPictures(Pictures):
    """For training: a random part of each image (60 to 100% of its area), mirrored half of the time. The draw depends
    only on the seed, the epoch and the image's index, not on the process that reads it or on what was read before."""

    def __init__(self, examples: Sequence[CaptionedImage], size: int, seed: int, epoch: int):
        from torchvision.transforms import InterpolationMode, v2  # slow to import, and only needed here

        super().__init__(examples, size)
        self.seed, self.epoch = seed, epoch
        self.augment = v2.Compose(
            [
                v2.RandomResizedCrop(size, scale=(0.6, 1), interpolation=InterpolationMode.BILINEAR),
                v2.RandomHorizontalFlip(),
            ]
        )

    def __getitem__(self, index: int) -> tuple[int, Tensor | Skipped]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of("augmentation", self.seed, self.epoch, index))
            return super().__getitem__(index)

    def prepare(self, image: Image.Image) -> Tensor:
        return to_tensor(self.augment(image), self.size)


def seed_of(purpose: str, *numbers: int) -> int:
    """A seed below 2**63, different for each purpose and each tuple of numbers."""
    return int(np.random.SeedSequence((*purpose.encode(), *numbers)).generate_state(1, np.uint64)[0]) >> 1


def draw_batches(count: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The indices of all `count` examples in the order of an epoch, cut into batches; the last one may be smaller."""
    order = np.random.default_rng(seed_of("order", seed, epoch)).permutation(count).tolist()
    return [order[i : i + batch_size] for i in range(0, count, batch_size)]


def batches(
    pictures: Dataset, batch_size: int, workers: int, chosen: Sequence[Sequence[int]] | None = None, pin: bool = False
) -> Iterator[tuple[list[int], Tensor | None, list[Skipped]]]:
    """Batches (indices, images uint8 [B,3,S,S], skipped): the images that could be read, None where there are none, and
    a list of Skipped with the others. From a FeatureCache, features [B,P,D] instead of images.

    `chosen` has the indices of each batch; by default all images come in order. Each of n `workers`, which are
    processes, reads every n-th batch, up to two ahead; if `workers` is 0, this process reads them. With `pin`, batches
    are in page-locked memory, from which copies to a GPU are asynchronous. Raises UserError when a worker cannot start,
    fails or dies.
    """
    if chosen is None:
        chosen = [range(i, min(i + batch_size, len(pictures))) for i in range(0, len(pictures), batch_size)]
    count = min(workers, len(chosen))
    if count == 0:
        for indices in chosen:
            yield _to_tensors(*_read_batch(pictures, indices), pin)
        return
    with contextlib.ExitStack() as stack:
        # At exit, Python waits for its child processes. An iterator that is still open must end them before that.
        stack.callback(atexit.unregister, atexit.register(stack.close))
        try:
            started = [stack.enter_context(_Worker(pictures, chosen[i::count], pin)) for i in range(count)]
            for worker in started:
                worker.thread.start()
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"cannot start {count} workers: {one_line(error)}; use fewer --workers, or --workers 0"
            ) from error
        for i in range(len(chosen)):
            yield started[i % count].next_batch()


class _Worker:
    """A process that reads batches and writes them, pickled, into a pipe, and a thread that takes them from it. Each
    holds one batch, and goes on to the next when that one is taken.

    torch's DataLoader passes batches through /dev/shm, which is small or missing in many containers, and through a
    queue that all workers share: one that dies can leave the others and the reader waiting forever. Here, only the
    worker holds the write end of its pipe, and only this process the read end, so each notices when the other dies,
    whatever the cause.
    """

    starting = threading.Lock()

    def __init__(self, pictures: Dataset, chosen: Sequence[Sequence[int]], pin: bool):
        with self.starting:  # a worker started meanwhile by another thread would inherit `writer`
            self.reader, writer = multiprocessing.Pipe(duplex=False)
            arguments = (pictures, chosen, self.reader, writer)
            self.process = multiprocessing.Process(target=_work, args=arguments, daemon=True)
            # The mask is inherited, so a signal that arrives before the worker has started does not kill it.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)
            try:
                self.process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
                writer.close()
        self.wanted, self.received = threading.Semaphore(1), queue.SimpleQueue()
        self.thread = threading.Thread(target=self._receive, args=(pin,), daemon=True)

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join()
        self.wanted.release()  # the thread finds the pipe closed, and ends

    def _receive(self, pin: bool) -> None:
        """Put batches into `received`, and finally the error that ended them."""
        with self.reader, open(self.reader.fileno(), "rb", closefd=False) as stream:
            batch = None
            while not isinstance(batch, Exception):
                self.wanted.acquire()
                try:
                    batch = pickle.load(stream)
                    if not isinstance(batch, Exception):
                        batch = _to_tensors(*batch, pin)
                except Exception as error:
                    batch = error
                self.received.put(batch)

    def next_batch(self) -> tuple[list[int], Tensor | None, list[Skipped]]:
        """Wait for the next batch. Raises UserError when the worker has failed or died."""
        batch = self.received.get()
        self.wanted.release()
        if isinstance(batch, EOFError | pickle.UnpicklingError):
            self.process.join(1)
            status = self.process.exitcode
            reason = signal.strsignal(-status) if status is not None and status < 0 else f"exit status {status}"
            raise UserError(
                f"a worker, a process that reads images, has ended ({reason}); use fewer --workers if memory ran out, "
                "or --workers 0 to read images in the main process"
            ) from batch
        if isinstance(batch, Exception):
            raise batch
        return batch


def _work(pictures: Dataset, chosen: Sequence[Sequence[int]], reader: Connection, writer: Connection) -> None:
    """The worker's process: read the batches and write each, or an error in its place, to the pipe."""
    reader.close()  # only the parent keeps it open: when that dies, writing fails
    warnings.filterwarnings("ignore", module="PIL")  # about odd metadata: every worker would print them
    for signum in IGNORED:
        signal.signal(signum, signal.SIG_IGN)
    torch.set_num_threads(1)
    with contextlib.suppress(BrokenPipeError), open(writer.fileno(), "wb", closefd=False) as stream:
        for indices in chosen:
            try:
                batch = _read_batch(pictures, indices)
            except Exception as error:
                batch = UserError(
                    f"a worker, a process that reads images, failed: {type(error).__name__}: {one_line(error)} "
                    "(--workers 0 --debug shows where)"
                )
            pickle.dump(batch, stream, protocol=5)  # arrays are copied neither here nor where they are read
            stream.flush()


def _read_batch(pictures: Dataset, indices: Sequence[int]) -> tuple[list[int], np.ndarray | None, list[Skipped]]:
    items = [pictures[index] for index in indices]
    read = [index for index, item in items if isinstance(item, Tensor)]
    images = [item for _, item in items if isinstance(item, Tensor)]
    skipped = [item for _, item in items if isinstance(item, Skipped)]
    return read, torch.stack(images).numpy() if images else None, skipped


def _to_tensors(
    indices: list[int], images: np.ndarray | None, skipped: list[Skipped], pin: bool
) -> tuple[list[int], Tensor | None, list[Skipped]]:
    if images is None:
        return indices, None, skipped
    tensor = torch.from_numpy(images)
    return indices, tensor.pin_memory() if pin else tensor, skipped


def draw_rows(captions: Sequence[list[int]], rows: int, seed: int) -> list[list[int]]:
    """`rows` of an image's captions, drawn without replacement; where there are fewer, they repeat."""
    drawn = [captions[i] for i in np.random.default_rng(seed).permutation(len(captions))]
    return [drawn[i % len(drawn)] for i in range(rows)]


def pad(rows: list[list[int]]) -> Tensor:
    """Token ids of different lengths -> int64 [N,T], filled with <pad>."""
    longest = max(map(len, rows))
    return torch.tensor([row + [Vocabulary.PAD] * (longest - len(row)) for row in rows])
