"""The search on CUDA, as CUDA graphs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attncap.search.beams import Beams, Search, Step
from attncap.search.decoder_step import DecoderStep
from attncap.search.search_config import SearchConfig

SEGMENT = 8  # steps that CUDA takes before it is asked whether all is done
MOST_GRAPHS = 8  # kept for a decoder: numbers of images, and settings


class SearchGraphs:
    """A search on CUDA, captured once for each number of images and each setting: SEGMENT steps a CUDA graph. The
    device goes on by itself, and is asked whether all is done only between graphs, while it works on the next. Images
    that are done stay in. One search at a time: all of a decoder's write into the same memory."""

    def __init__(self, step: DecoderStep, config: SearchConfig, suppressed: Sequence[int], features: Tensor):
        search = self.search = Search([step], config, suppressed)  # what it holds is read by the graphs
        self.features = features.clone()
        self.is_live = torch.ones(-(-config.max_length // SEGMENT), dtype=torch.bool).pin_memory()  # after each graph
        self.segments = []
        stream = torch.cuda.Stream()  # a first call may set things up that cannot be captured
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            beams = search.start([self.features], ())
            for t in range(min(2, config.max_length)):
                beams, _ = search.advance(beams, t)
        torch.cuda.current_stream().wait_stream(stream)
        pool = torch.cuda.graph_pool_handle()
        for segment in range(len(self.is_live)):
            graph, trail = torch.cuda.CUDAGraph(), []
            with torch.cuda.graph(graph, pool=pool):
                if segment == 0:
                    beams = search.start([self.features], ())
                for t in range(segment * SEGMENT, min((segment + 1) * SEGMENT, config.max_length)):
                    beams, step = search.advance(beams, t)
                    trail.append(step)
                self.is_live[segment].copy_(search.is_live(beams).any(), non_blocking=True)
            self.segments.append((graph, trail, beams))

    @classmethod
    def of(cls, step: DecoderStep, config: SearchConfig, suppressed: Sequence[int], features: Tensor) -> SearchGraphs:
        """The graphs for features of this shape, made once for a decoder's weights."""
        key = (config, tuple(suppressed), features.shape, features.dtype)
        if key not in step.graphs:
            if len(step.graphs) == MOST_GRAPHS:
                step.graphs.clear()
            with torch.cuda.device(features.device):
                step.graphs[key] = cls(step, config, suppressed, features)
        return step.graphs[key]

    def run(self, features: Tensor) -> tuple[list[Step], Beams]:
        """What the search comes to; it stands in the graphs' own memory, which the next run writes anew."""
        self.features.copy_(features)
        done, whole_trail = [], []
        for segment, (graph, trail, last) in enumerate(self.segments):
            graph.replay()
            done.append(torch.cuda.current_stream(features.device).record_event())
            whole_trail, beams = whole_trail + trail, last
            if segment > 0:
                done[segment - 1].synchronize()
                if not self.is_live[segment - 1]:
                    break
        return whole_trail, beams
