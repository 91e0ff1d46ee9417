"""The search on CUDA, as CUDA graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from attncap.search.beams import Beams, Search, Step
from attncap.search.config import SearchConfig
from attncap.search.decoder_step import DecoderStep

SEGMENT = 8  # steps that CUDA takes before it is asked how many images are live
FEWEST = 8  # images; with fewer a step takes as long, for launches and for reading the weights
MOST_GRAPHS = 8  # searches kept for a decoder: numbers of images, and settings


class SearchGraphs:
    """A search on CUDA, a CUDA graph for every SEGMENT steps. The device goes on by itself: how many images were live
    after a segment the host reads while the device works on the next. When all are done it stops; when at most half
    would do, the live ones go on in graphs of fewer images, a power of two, filled up with some that are done.

    A graph is captured when it is first needed, for a number of images and a segment. Whatever was before it, it begins
    from the same tensors, and all it wrote stays until the next search: one search at a time. Of memory, the smaller
    sizes together need no more than the first; graphs of one segment share what they need on the way, since a search
    runs one of them."""

    def __init__(self, step: DecoderStep, config: SearchConfig, suppressed: Sequence[int], features: Tensor):
        self.search = Search([step], config, suppressed)  # what it holds is read by the graphs
        self.features = features.clone()
        segments = -(-config.max_length // SEGMENT)
        self.live = torch.zeros(segments, dtype=torch.int64, pin_memory=features.is_cuda)  # images, after each segment
        self.memories = {}  # by number of images
        self.beams: dict[tuple[int, int], Beams] = {}  # by number of images, and the segment that begins from them
        self.graphs: dict[tuple[int, int], CudaGraph] = {}
        self.pools = [None] * segments

    @classmethod
    def of(cls, step: DecoderStep, config: SearchConfig, suppressed: Sequence[int], features: Tensor) -> SearchGraphs:
        """Those for features of this shape, made once for a decoder's weights."""
        key = (config, tuple(suppressed), features.shape, features.dtype)
        if key not in step.graphs:
            if len(step.graphs) == MOST_GRAPHS:
                step.graphs.clear()
            step.graphs[key] = cls(step, config, suppressed, features)
        return step.graphs[key]

    def run(self, features: Tensor) -> tuple[list[Step], Beams]:
        """What the search comes to; it stands in the graphs' own memory, which the next run writes anew."""
        self.features.copy_(features)
        size, trail, done = len(features), [], []
        for segment in range(len(self.live)):
            graph = self.graph(size, segment)
            done.append(graph.replay())
            trail += graph.result
            if segment == 0:
                continue
            done[-2].synchronize()
            live = int(self.live[segment - 1])
            if live == 0:
                break
            fewer = max(1 << (live - 1).bit_length(), FEWEST)
            if 2 * fewer <= size and segment + 1 < len(self.live):
                beams = self.beams[size, segment + 1]
                live_first = self.search.is_live(beams).int().argsort(descending=True, stable=True)
                self.put(fewer, segment + 1, self.search.keep(beams, live_first[:fewer]))
                size = fewer
        return trail, self.beams[size, segment + 1]

    def graph(self, size: int, segment: int) -> CudaGraph:
        """That of a segment for so many images; its result is the trail."""
        if (size, segment) not in self.graphs:
            search, first = self.search, segment * SEGMENT
            count = min(SEGMENT, search.config.max_length - first)

            def advance(count: int) -> tuple[Beams, list[Step]]:
                beams = self.beams[size, segment] if segment > 0 else search.start([self.features], ())
                trail = []
                for t in range(first, first + count):
                    beams, step = search.advance(beams, t)
                    trail.append(step)
                return beams, trail

            def work() -> list[Step]:
                beams, trail = advance(count)
                self.put(size, segment + 1, beams)
                self.live[segment].copy_(search.is_live(beams).sum(), non_blocking=True)
                return trail

            graph = CudaGraph(work, lambda: advance(min(2, count)), self.pools[segment])
            self.graphs[size, segment], self.pools[segment] = graph, graph.pool
        return self.graphs[size, segment]

    def put(self, size: int, segment: int, beams: Beams) -> None:
        """Make a segment begin from these beams: the tensors of the first call, and copies into them from then on."""
        memories = self.memories.setdefault(size, beams.memories)
        known = self.beams.setdefault((size, segment), beams._replace(memories=memories))
        for to, x in zip(tensors(known), tensors(beams), strict=True):
            if to is not x:
                to.copy_(x)


class CudaGraph:
    """Work on CUDA, captured as a graph; `result` is what it returned, whose tensors every `replay` writes anew. Graphs
    of one pool write over each other's."""

    def __init__(self, work: Callable[[], Any], warm_up: Callable[[], Any], pool: tuple[int, int] | None):
        stream = capture_stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # a first call may set things up that cannot be captured
            warm_up()
        torch.cuda.current_stream().wait_stream(stream)
        self.captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.captured, pool, stream):
            self.result = work()
        self.pool = self.captured.pool()

    def replay(self) -> torch.cuda.Event:
        """Returns what happens when the device is done."""
        self.captured.replay()
        return torch.cuda.current_stream().record_event()


@functools.cache
def capture_stream(device: int) -> torch.cuda.Stream:
    """One for all captures: a pool's memory is used again by the same stream only, and cuBLAS keeps a workspace for
    each stream that it has worked on."""
    return torch.cuda.Stream(device)


def tensors(nested: Tensor | Iterable) -> list[Tensor]:
    """All tensors of tuples of tuples of tensors."""
    return [nested] if isinstance(nested, Tensor) else [x for part in nested for x in tensors(part)]
