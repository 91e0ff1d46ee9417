"""The search in graphs, on CUDA and, with a stand-in for CUDA graphs, on the CPU."""

import contextlib
import gc
import itertools
from unittest.mock import MagicMock

import pytest
import torch
from conftest import NO_CUDA
from test_beam_search import UNK, make_decoder, make_features, the_same
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attncap.errors import UserError
from attncap.models.decoder import Decoder
from attncap.search import graphs
from attncap.search.beam_search import Hypothesis, _trace_back, beam_search
from attncap.search.beams import Search
from attncap.search.config import SearchConfig
from attncap.search.graphs import MIN_IMAGES, SEGMENT, GraphCache, SearchGraphs, tensors
from attncap.search.processors import SuppressTokens

RULES = [SuppressTokens((UNK,))]

LOOKS = {f"aten::{name}" for name in ("item", "_local_scalar_dense", "is_nonzero", "nonzero", "masked_select")}


class Recording(TorchDispatchMode):
    """As in a capture no value can be looked at; `allocated` is all memory that was asked for."""

    def __init__(self):
        super().__init__()
        self.allocated = set()

    def __torch_dispatch__(self, op, types, arguments=(), options=None):
        assert op.name() not in LOOKS, f"{op.name()} waits for the device"
        results = op(*arguments, **(options or {}))
        self.allocated |= storages(results) - storages((arguments, options))
        return results


def storages(nested) -> set[int]:
    tensors = [x for x in tree_leaves(nested) if isinstance(x, torch.Tensor) and x.layout == torch.strided]
    return {x.untyped_storage()._cdata for x in tensors}


class StandIn:
    """For CudaGraph on the CPU: a replay is the work once more, and what it returns is copied to where the capture's
    results are. As the graphs of one pool use the same memory, a replay spoils what the others of its pool wrote."""

    def __init__(self, work, warm_up, pool, stream):
        self.work, self.pool = work, [] if pool is None else pool
        warm_up()
        with Recording() as recording:
            self.result = work()
        self.written = [x for x in tensors(self.result) if storages(x) <= recording.allocated]
        self.pool.append(self)

    def replay(self):
        for other in self.pool:
            for x in other.written:
                x.fill_(torch.nan if x.is_floating_point() else 0)
        with Recording():
            result = self.work()
        for to, x in zip(tensors(self.result), tensors(result), strict=True):
            to.copy_(x)
        return self

    def synchronize(self):
        pass


@pytest.fixture
def capture(device, monkeypatch) -> str:
    """The device, on which searches can be captured."""
    if device == "cpu":
        monkeypatch.setattr(graphs, "CudaGraph", StandIn)
    return device


def test_the_graphs_of_a_search_share_a_stream_and_own_their_workspaces(monkeypatch):
    """torch gives a pool's memory to the stream again that had it before, and to no other. cuBLAS's workspace is
    dropped between the warm-up and the capture, so that the capture allocates its own, and after it, so that no other
    work uses that."""
    events, cuda = [], MagicMock()
    cuda.graph = lambda captured, pool, stream, **_: events.append((pool, stream)) or contextlib.nullcontext()
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(graphs, "_drop_workspaces", lambda: events.append("drop"))
    stream = MagicMock()
    graph = graphs.CudaGraph(lambda: events.append("work"), lambda: events.append("warm up"), "pool", stream)
    assert events == ["warm up", "drop", ("pool", stream), "work", "drop"]
    assert graph.pool is cuda.CUDAGraph().pool()


@pytest.mark.skipif(torch.version.cuda is None, reason="torch without CUDA")
def test_torch_can_drop_workspaces():
    assert graphs._drop_workspaces is torch._C._cuda_clearCublasWorkspaces


def prepared(device: str, end_bias: float, dtype: torch.dtype = torch.float32) -> Decoder:
    return make_decoder(V=60, end_bias=end_bias).to(device, dtype).for_inference()


@torch.inference_mode()
def plainly(decoder: Decoder, config: SearchConfig, features: Tensor) -> tuple[list[list[Hypothesis]], Tensor]:
    """Step after step for all images: what is found, and how many images are live after each step [T,B]."""
    search, steps, live = Search([decoder], config, RULES, features.device), [], []
    beams = search.start([features])
    for t in range(config.max_length):
        beams, step = search.advance(beams, t)
        steps.append(step)
        live.append(search.is_live(beams))
    return _trace_back(steps, beams, config, len(features)), torch.stack(live).cpu()


@torch.inference_mode()
def check(searches: SearchGraphs, features: Tensor, expected: list[list[Hypothesis]], live: Tensor) -> list[int]:
    """What is found in graphs is what is expected; returns the number of images in every segment."""
    steps, beams = searches.run(features)
    found = _trace_back(steps, beams, searches.search.config, len(features))
    for of_image, of_other in zip(found, expected, strict=True):
        the_same(of_image, of_other)
    sizes = [len(step.images) for step in steps[::SEGMENT]]
    for segment, size in enumerate(sizes[2:], 2):  # the host knows what was live before the segment before it
        alive = int(live[(segment - 1) * SEGMENT - 1].sum())
        assert 0 < alive <= size and size in (sizes[segment - 1], 8, 16, 32)
        assert size <= MIN_IMAGES or size < 4 * alive
    return sizes


@pytest.mark.parametrize(
    "fields",
    [
        dict(method="shrink", no_repeat_ngram=1),
        dict(method="shrink", length_penalty="average", no_repeat_ngram=1),
        dict(method="fixed", length_penalty=0.7, no_repeat_ngram=1),
        dict(method="fixed", groups=2, no_repeat_ngram=1),
    ],
    ids=str,
)
def test_images_that_are_done_leave(capture, fields):
    """In batches that take every way through the graphs, and come to what they already are captured from elsewhere. In
    float64: of 600 images, some have beams whose scores differ by less than the rounding of a product in float32, and
    that depends on the number of images."""
    config = SearchConfig(4, max_length=6 * SEGMENT - 3, n_best=3, **fields)
    decoder = prepared(capture, end_bias=3.0, dtype=torch.float64)
    features = make_features(600).to(capture)
    expected, live = plainly(decoder, config, features)
    order = live.sum(dim=0).argsort(stable=True)
    shorter, longer = order[:300], order[300:]
    random = torch.Generator().manual_seed(0)
    batches = [order[torch.randperm(600, generator=random)[:64]] for _ in range(2)]
    for count in (3, 11, 27, 0, 64):  # of 64 those that take longest
        batch = torch.cat([longer[len(longer) - count :], shorter[: 64 - count]])
        batches.append(batch[torch.randperm(64, generator=random)])
    with torch.inference_mode():
        searches = SearchGraphs(decoder, config, RULES, features[:64])
    ways = set()
    for batch in [*batches, *batches[::-1]]:
        sizes = check(searches, features[batch], [expected[b] for b in batch], live[:, batch])
        ways |= set(itertools.pairwise(sizes))
    for (size, _), beams in searches.beams.items():  # features and keys are kept once for a size
        [state], [kept_features, kept_keys, *_] = beams.states, searches.kept[size]
        assert state.features is kept_features and state.keys is kept_keys
    assert {(64, 64), (64, 32), (64, 16), (64, 8)} <= ways and any(fewer < size < 64 for size, fewer in ways)


@pytest.mark.parametrize("end_bias, segments", [(-1e4, 4), (1e4, 2)], ids=["nothing ends", "all ends at once"])
@pytest.mark.parametrize("B", [1, 5, 64])
def test_what_is_not_needed_is_not_captured(capture, B, end_bias, segments):
    """All that is captured is used; that all is done is known a segment late."""
    config = SearchConfig(4, max_length=4 * SEGMENT)
    decoder, features = prepared(capture, end_bias), make_features(B).float().to(capture)
    with torch.inference_mode():
        searches = SearchGraphs(decoder, config, RULES, features)
    expected = plainly(decoder, config, features)
    for _ in range(2):
        assert check(searches, features, *expected) == [B] * segments
    assert list(searches.graphs) == [(B, segment) for segment in range(segments)]


def test_a_search_shorter_than_a_segment(capture):
    decoder, features = prepared(capture, 0.0), make_features(9).float().to(capture)
    for max_length in (1, 2, 5):
        config = SearchConfig(4, max_length=max_length, n_best=4)
        with torch.inference_mode():
            searches = SearchGraphs(decoder, config, RULES, features)
        assert check(searches, features, *plainly(decoder, config, features)) == [9]


@pytest.mark.parametrize("place", [0, 40, 63])
def test_an_image_that_is_no_number_stays_to_the_end(capture, place):
    decoder, features = prepared(capture, end_bias=3.0), make_features(64).float().to(capture)
    config = SearchConfig(4, max_length=5 * SEGMENT, no_repeat_ngram=1)
    with torch.inference_mode():
        searches = SearchGraphs(decoder, config, RULES, features)
        features[place, 2, 1] = torch.nan
        steps, beams = searches.run(features)
    assert len(steps) == config.max_length and len(beams.images) == 8 and place in beams.images
    with pytest.raises(UserError, match=f"1 of 64 images is NaN, first at index {place} of the batch"):
        _trace_back(steps, beams, config, 64)


def test_graphs_are_kept_for_shapes_and_settings(capture, monkeypatch):
    monkeypatch.setattr(graphs, "MAX_SEARCHES", 2)
    decoder, cache = prepared(capture, end_bias=5.0), GraphCache()

    def of(B: int, **settings) -> SearchGraphs:
        with torch.inference_mode():
            features = make_features(B).float().to(capture)
            return cache.of(decoder, SearchConfig(4, max_length=9, **settings), RULES, features)

    first, second = of(3), of(4)
    assert first is not second and of(3) is first
    assert of(3, n_best=2) is not first  # that for 4 images, which was used before, is dropped
    assert len(cache.searches) == 2 and of(3) is first and of(4) is not second


def test_graphs_are_kept_for_the_flags_of_their_capture(capture):
    decoder, cache, config = prepared(capture, end_bias=5.0), GraphCache(), SearchConfig(4, max_length=9)
    with torch.inference_mode():
        features, found = make_features(3).float().to(capture), []
        for precision in ("highest", "high", "highest"):
            torch.set_float32_matmul_precision(precision)
            found.append(cache.of(decoder, config, RULES, features))
    assert found[0] is found[2] is not found[1]


@pytest.mark.parametrize("failures", [1, 2])
def test_graphs_are_given_back_where_memory_is_short(capture, monkeypatch, failures):
    """Once; what is half captured is never kept."""
    decoder, cache, config = prepared(capture, end_bias=5.0), GraphCache(), SearchConfig(4, max_length=9)
    run, kept = SearchGraphs.run, []

    def fails(self, features):
        kept.append(len(cache.searches))
        if len(kept) <= 1 + failures and len(kept) > 1:
            raise torch.OutOfMemoryError
        return run(self, features)

    monkeypatch.setattr(SearchGraphs, "run", fails)
    with torch.inference_mode():
        cache.run(decoder, config, RULES, make_features(3).float().to(capture))
        with pytest.raises(torch.OutOfMemoryError) if failures == 2 else contextlib.nullcontext():
            cache.run(decoder, config, RULES, make_features(4).float().to(capture))
    assert kept == [1, 2, 1] and len(cache.searches) == 2 - failures


@pytest.mark.gpu
@NO_CUDA
def test_graphs_outlive_those_of_others():
    """Whatever else drops cuBLAS's workspaces and gives memory back: other searches' graphs, and inductor."""
    decoder, config = prepared("cuda", end_bias=0.0), SearchConfig(4, max_length=2 * SEGMENT)
    features = make_features(5).float().cuda()

    def found(searches: SearchGraphs) -> list[list[list[int]]]:
        with torch.inference_mode():
            hypotheses = _trace_back(*searches.run(features), config, 5)
        return [[h.tokens for h in of_image] for of_image in hypotheses]

    with torch.inference_mode():
        searches, other = (SearchGraphs(decoder, config, RULES, features) for _ in range(2))
    expected = found(other)
    assert found(searches) == expected
    del other
    gc.collect()
    torch.cuda.empty_cache()
    torch.full((2**28,), 255, dtype=torch.uint8, device="cuda")  # what memory was given back holds no floats any more
    assert found(searches) == expected
    compiled = torch.compile(lambda x: (x @ x).relu(), mode="reduce-overhead")
    for _ in range(3):
        compiled(torch.randn(64, 64, device="cuda"))
    torch.cuda.empty_cache()
    assert found(searches) == expected


@pytest.mark.gpu
@NO_CUDA
def test_what_is_found_comes_through_pinned_memory():
    """Captions and attention."""
    decoder, config, cache = prepared("cuda", end_bias=0.0), SearchConfig(4, max_length=2 * SEGMENT), GraphCache()
    features = make_features(64).float().cuda()
    beam_search(decoder, features, config, RULES, graphs=cache)  # captures
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        beam_search(decoder, features, config, RULES, graphs=cache)
    copies = [event.name for event in profile.events() if "DtoH" in event.name]
    assert copies and all("Pinned" in name for name in copies)
