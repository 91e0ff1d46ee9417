"""The search on CUDA, as CUDA graphs."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attncap.models.decoder import Decoder
from attncap.search.beams import Beams, Search, Step, pack, unpack
from attncap.search.config import SearchConfig
from attncap.search.processors import LogitsProcessor

SEGMENT = 8  # steps that CUDA takes before it is asked how many images are live
MIN_IMAGES = 8  # with fewer images a step takes just as long, for launches and for reading the weights
MAX_SEARCHES = 8  # that are kept: numbers of images, and settings


class Segment(NamedTuple):
    """What a graph writes; all on the host, apart from the attention and the beams' states."""

    steps: list[Step]
    beams: Beams  # after the last step
    live: Tensor  # int64, the number of images that have beams left


class SearchGraphs:
    """A search on CUDA, a CUDA graph for every SEGMENT steps. The device does not wait for the host, which reads how
    many images were live after a segment while the device works on the next. When no image is live the search stops.
    When at most half of the images would do, the live ones continue in graphs of fewer images, a power of two, filled
    up with finished ones.

    A graph is captured when it is first needed, for a number of images and a segment. Whatever ran before it, it starts
    from the same tensors, and all it wrote stays until the next search: one search at a time. What the decoder's steps
    do not change (the features) is kept once for each number of images. Graphs of one segment share the memory of
    their intermediate results, since a search runs one of them."""

    def __init__(
        self,
        decoder: Decoder,
        config: SearchConfig,
        processors: Sequence[LogitsProcessor],
        features: Tensor,
        backend: str = "native",
    ):
        self.search = Search([decoder], config, processors, features.device, backend)  # the graphs read its tensors
        self.features = features.clone()
        segments = -(-config.max_length // SEGMENT)
        self.unchanged: list[bool] = []  # for each tensor of a state, whether steps pass it on as it is
        self.kept: dict[int, list[Tensor]] = {}  # by number of images: the tensors of a state, of which those are used
        self.beams: dict[tuple[int, int], Beams] = {}  # by number of images, and the segment that starts from them
        self.graphs: dict[tuple[int, int], CudaGraph] = {}
        self.pools = [None] * segments
        # For all captures of this search, since a pool's memory is only used again by the stream that had it before.
        self.stream = torch.cuda.Stream(features.device) if features.is_cuda else None

    def run(self, features: Tensor) -> tuple[list[Step], Beams]:
        """All steps, and the beams after the last one, in memory that the next run writes to. What is needed to trace
        captions back is on the host, apart from the attention."""
        self.features.copy_(features)
        size, steps, done = len(features), [], []
        for segment in range(len(self.pools)):
            graph = self.graph(size, segment)
            done.append((graph.replay(), graph.result))
            steps += graph.result.steps
            if segment == 0:
                continue
            event, before = done[-2]
            event.synchronize()
            live = int(before.live)
            if live == 0:
                break
            fewer = max(1 << (live - 1).bit_length(), MIN_IMAGES)
            if 2 * fewer <= size and segment + 1 < len(self.pools):
                beams = self.beams[size, segment + 1]
                live_first = self.search.is_live(beams).int().argsort(descending=True, stable=True)
                self.put(fewer, segment + 1, self.search.select(beams, live_first[:fewer]))
                size = fewer
        event, last = done[-1]
        event.synchronize()
        return steps, last.beams

    def graph(self, size: int, segment: int) -> CudaGraph:
        """The graph of a segment for `size` images; its result is a `Segment`."""
        if (size, segment) not in self.graphs:
            search, first = self.search, segment * SEGMENT
            count = min(SEGMENT, search.config.max_length - first)

            def advance(count: int) -> tuple[Beams, list[Step]]:
                start = beams = self.beams[size, segment] if segment > 0 else search.start([self.features])
                steps = []
                for t in range(first, first + count):
                    beams, step = search.advance(beams, t)
                    steps.append(step)
                self.unchanged = [a is b for a, b in zip(tensors(start.states), tensors(beams.states), strict=True)]
                return beams, steps

            # Pinned memory for the graph to write to, which cannot be allocated in a capture.
            N, on_host = size * search.config.beam_size, dict(device="cpu", pin_memory=self.features.is_cuda)
            integers = torch.empty(count * (size + 2 * N) + size, dtype=torch.int64, **on_host)
            scores = torch.empty((count + 1) * N, dtype=torch.float32, **on_host)
            live = torch.empty((), dtype=torch.int64, **on_host)

            def work() -> Segment:
                beams, steps = advance(count)
                self.put(size, segment + 1, beams)
                found_integers, found_scores = pack(steps, beams)
                host_scores = scores[: len(found_scores)]  # the first step may have fewer beams
                integers.copy_(found_integers, non_blocking=True)
                host_scores.copy_(found_scores, non_blocking=True)
                live.copy_(search.is_live(beams).sum(), non_blocking=True)
                return Segment(*unpack(integers, host_scores, steps, beams), live)

            def warm_up() -> None:  # every kernel of `work` once
                beams, steps = advance(min(2, count))
                pack(steps, beams)
                search.is_live(beams).sum()
                for x in tensors(beams):
                    x.clone()

            graph = CudaGraph(work, warm_up, self.pools[segment], self.stream)
            self.graphs[size, segment], self.pools[segment] = graph, graph.pool
        return self.graphs[size, segment]

    def put(self, size: int, segment: int, beams: Beams) -> None:
        """Make a segment start from these beams: from their tensors at the first call, from copies of them later."""
        kept = self.kept.setdefault(size, tensors(beams.states))
        if (size, segment) not in self.beams:
            found = zip(kept, tensors(beams.states), self.unchanged, strict=True)
            chosen = iter([old if unchanged else new for old, new, unchanged in found])
            self.beams[size, segment] = beams._replace(states=replace_tensors(beams.states, chosen))
        for to, x in zip(tensors(self.beams[size, segment]), tensors(beams), strict=True):
            if to is not x:
                to.copy_(x)


class GraphCache:
    """The graphs of a decoder's searches, by shape of the features and settings; those that were used last are kept.
    One search at a time, whichever thread it comes from."""

    def __init__(self) -> None:
        self.searches: dict[Any, SearchGraphs] = {}  # that of the last search last
        self.lock = threading.Lock()

    def run(
        self,
        decoder: Decoder,
        config: SearchConfig,
        processors: Sequence[LogitsProcessor],
        features: Tensor,
        backend: str = "native",
    ) -> tuple[list[Step], Beams]:
        """The search for these features, in graphs captured at the first call for their shape. Hold `lock` until its
        results are read."""
        search = (decoder, config, processors, features, backend)
        try:
            return self._run(*search)
        except torch.OutOfMemoryError:
            pass  # all graphs have been dropped, and their memory may be enough
        gc.collect()
        torch.cuda.empty_cache()
        return self._run(*search)

    def _run(self, decoder, config, processors, features, backend) -> tuple[list[Step], Beams]:
        try:
            return self.of(decoder, config, processors, features, backend).run(features)
        except BaseException:
            self.searches.clear()  # what is half captured is of no use
            raise

    def of(
        self,
        decoder: Decoder,
        config: SearchConfig,
        processors: Sequence[LogitsProcessor],
        features: Tensor,
        backend: str = "native",
    ) -> SearchGraphs:
        """Those for features of this shape, made at the first call."""
        matmul = torch.backends.cuda.matmul
        flags = (  # that decide which kernels are captured
            matmul.fp32_precision,
            matmul.allow_fp16_reduced_precision_reduction,
            matmul.allow_bf16_reduced_precision_reduction,
            torch.are_deterministic_algorithms_enabled(),
        )
        key = (config, tuple(processors), features.shape, features.dtype, features.device, backend, flags)
        search = self.searches.pop(key, None)
        if search is None:
            while len(self.searches) >= MAX_SEARCHES:
                self.searches.pop(next(iter(self.searches)))
            search = SearchGraphs(decoder, config, processors, features, backend)
        self.searches[key] = search
        return search


_one_capture = threading.Lock()  # dropping workspaces drops those of all streams

# cuBLAS keeps a workspace for each stream that it has worked on. One that is allocated in a capture belongs to the
# graph's pool; any other could be freed while the graph still writes to it.
_drop_workspaces = getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)  # torch without CUDA has none


class CudaGraph:
    """Work on CUDA, captured on this stream as a graph; `result` is what it returned, whose tensors every `replay`
    writes again. Graphs of one pool overwrite each other's."""

    def __init__(
        self,
        work: Callable[[], Any],
        warm_up: Callable[[], None],
        pool: tuple[int, int] | None,
        stream: torch.cuda.Stream,
    ):
        with _one_capture:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # a first call may set things up that cannot be captured
                warm_up()
            torch.cuda.current_stream().wait_stream(stream)
            self.captured = torch.cuda.CUDAGraph()
            _drop_workspaces()
            try:
                # "thread_local": meanwhile other threads may load models, allocate and synchronize.
                with torch.cuda.graph(self.captured, pool, stream, capture_error_mode="thread_local"):
                    self.result = work()
            finally:
                _drop_workspaces()
        self.pool = self.captured.pool()

    def replay(self) -> torch.cuda.Event:
        """Returns an event that happens when the device is done."""
        self.captured.replay()
        return torch.cuda.current_stream().record_event()


def tensors(nested: Any) -> list[Tensor]:
    """All tensors of nested tuples and lists."""
    if isinstance(nested, tuple | list):
        return [x for part in nested for x in tensors(part)]
    return [nested] if isinstance(nested, Tensor) else []


def replace_tensors(nested: Any, replacements: Iterator[Tensor]) -> Any:
    """The same nested tuples, with each tensor replaced by the next one."""
    if isinstance(nested, tuple):
        parts = [replace_tensors(part, replacements) for part in nested]
        return type(nested)(*parts) if hasattr(nested, "_fields") else tuple(parts)
    return next(replacements) if isinstance(nested, Tensor) else nested
