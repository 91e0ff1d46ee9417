"""Everything that writes captions needs a decoder's start, step and select, and nothing else: shown with a decoder that
has no attention, no LSTM and no parameters."""

import itertools
import math
from collections import Counter
from typing import NamedTuple

import pytest
import torch
from test_graphs import StandIn
from torch import Tensor

from attncap.search import beam_search as beam_search_module
from attncap.search import graphs
from attncap.search.beam_search import _trace_back, beam_search
from attncap.search.config import SearchConfig
from attncap.search.graphs import GraphCache
from attncap.search.sampling import sample_captions
from attncap.training.scheduled_sampling import sample_inputs
from attncap.training.self_critical import SelfCritical

PAD, START, END, UNK = range(4)
V = 8


class BigramState(NamedTuple):
    bias: Tensor  # [B,V], which an image adds to every word
    written: Tensor  # float32 [R], words so far


class Bigrams:
    """A word depends on the word before it and on the image, as a table says."""

    vocabulary_size = V

    def __init__(self, seed: int = 0, end_bias: float = 0.0):
        self.table = 2 * torch.randn(V, V, generator=torch.Generator().manual_seed(seed))
        self.table[:, END] += end_bias

    def start(self, features: Tensor) -> BigramState:
        return BigramState(features.mean(dim=1), torch.zeros(len(features)))

    def step(self, state: BigramState, parents: Tensor, tokens: Tensor) -> tuple[BigramState, Tensor, Tensor]:
        logits = self.table[tokens] + state.bias.repeat_interleave(len(tokens) // len(state.bias), dim=0)
        written = state.written[parents] + 1
        return state._replace(written=written), logits, torch.ones(len(tokens), 1) * written.unsqueeze(1)

    def select(self, state: BigramState, images: Tensor) -> BigramState:
        written = state.written.view(len(state.bias), -1)[images].flatten()
        return BigramState(state.bias[images], written)


def make_features(B: int) -> Tensor:
    return torch.randn(B, 3, V, generator=torch.Generator().manual_seed(1))


def log_probability(decoder: Bigrams, feature: Tensor, caption: tuple[int, ...]) -> float:
    log_probs = (decoder.table + feature.mean(dim=0)).log_softmax(dim=1)
    return sum(log_probs[a, b].item() for a, b in itertools.pairwise((START, *caption)))


def all_captions(max_length: int) -> list[tuple[int, ...]]:
    """That a search can find: ended, or of max_length words."""
    words = range(UNK + 1, V)
    ended = [(*c, END) for n in range(max_length) for c in itertools.product(words, repeat=n)]
    return ended + list(itertools.product(words, repeat=max_length))


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("method", ["shrink", "fixed"])
def test_beam_search(backend, method):
    """With more beams than captions of two words it finds all of them."""
    decoder, features = Bigrams(), make_features(3)
    config = SearchConfig(beam_size=32, method=method, max_length=2, n_best=32)
    for feature, found in zip(features, beam_search(decoder, features, config, backend=backend), strict=True):
        expected = {caption: log_probability(decoder, feature, caption) for caption in all_captions(2)}
        scores = {(*h.tokens, END)[:2]: h.score for h in found}
        assert scores == pytest.approx(expected, abs=1e-5) and len(found) == len(expected)
        for hypothesis in found:
            assert hypothesis.attention.flatten().tolist() == [1, 2][: len(hypothesis.tokens)]


def test_images_that_finish_leave_the_search():
    decoder, features = Bigrams(end_bias=-4), make_features(16)
    config = SearchConfig(beam_size=3, max_length=40, no_repeat_ngram=2)
    together = beam_search(decoder, features, config)
    assert len({len(best.tokens) for [best] in together}) > 3
    for b in range(16):
        [[alone]] = beam_search(decoder, features[b : b + 1], config)
        assert alone.tokens == together[b][0].tokens and alone.attention.equal(together[b][0].attention)


def test_graphs(monkeypatch):
    """The stand-in for CUDA graphs runs on it, and keeps what its steps do not change once."""
    monkeypatch.setattr(graphs, "CudaGraph", StandIn)
    decoder, features = Bigrams(end_bias=-2), make_features(64)
    config = SearchConfig(beam_size=3, max_length=64, no_repeat_ngram=3)
    expected = beam_search(decoder, features, config, ())
    with torch.inference_mode():
        searches = GraphCache().of(decoder, config, (), features)
        for _ in range(2):
            found = _trace_back(*searches.run(features), config, len(features))
            assert [h.tokens for [h] in found] == [h.tokens for [h] in expected]
    assert list(searches.kept) == [64, 32, 8]  # finished images left
    for (size, _), beams in searches.beams.items():
        assert beams.states[0].bias is searches.kept[size][0]


def test_ensemble():
    decoders, features = [Bigrams(0), Bigrams(1)], make_features(1)
    [[found]] = beam_search(decoders, [features, features], SearchConfig(beam_size=1, max_length=1))
    probabilities = sum((d.table[START] + features[0].mean(dim=0)).softmax(0) for d in decoders) / 2
    probabilities[[PAD, START, UNK]] = 0
    best = int(probabilities.argmax())
    assert (*found.tokens, END)[0] == best and found.score == pytest.approx(math.log(probabilities[best]), abs=1e-5)


def check_frequencies(counts: Counter, probabilities: dict) -> None:
    total = sum(counts.values())
    assert set(counts) <= set(probabilities)
    for caption, p in probabilities.items():
        assert abs(counts[caption] - total * p) <= 4.5 * math.sqrt(total * p * (1 - p)) + 1, caption


def test_sampling_in_the_search():
    decoder, features = Bigrams(), make_features(1)
    config = SearchConfig(beam_size=32, method="sample", max_length=2, n_best=32)
    found = beam_search(decoder, features.expand(200, -1, -1), config, ())
    counts = Counter((*h.tokens, END)[:2] for of_image in found for h in of_image)
    log_probs = (decoder.table + features[0].mean(dim=0))[:, END:].log_softmax(dim=1)
    probabilities = {}
    for first in range(END, V):
        for second in range(END, V) if first != END else ():
            p = log_probs[START, first - END] + log_probs[first, second - END]
            probabilities[first, second] = p.exp().item()
    probabilities[(END,)] = log_probs[START, 0].exp().item()
    check_frequencies(counts, probabilities)


def test_sampling_in_training():
    """Self-critical and scheduled sampling draw from it too."""
    decoder, features = Bigrams(), make_features(2)
    seeds = [(0, image) for image in range(2)]
    tokens = sample_captions(decoder, features, seeds, 3000, 3)
    log_probs = (decoder.table[START] + features.mean(dim=1))[:, END:].softmax(dim=1)
    for image, rows in enumerate(tokens.view(2, 3000, -1)):
        check_frequencies(Counter(rows[:, 1].tolist()), dict(enumerate(log_probs[image].tolist(), END)))
    mixed = sample_inputs(decoder, features, tokens[:, :-1], 0.5, seeds)
    assert mixed.shape == tokens[:, :-1].shape and not mixed.equal(tokens[:, :-1])


def test_self_critical_training():
    from attncap.data.vocabulary import Vocabulary

    vocabulary = Vocabulary([*Vocabulary.SPECIALS, *"abcd"])
    scst = SelfCritical(vocabulary, [["a b"], ["c d a"]], samples=4, max_length=5)
    tokens, weights, metrics = scst(Bigrams(), make_features(2), [0, 1], seed=0)
    assert len(tokens) == len(weights) == 8 and metrics["reward"] >= 0
    assert weights.view(2, 4).sum(dim=1).abs().max() < 1e-9


def test_nothing_asks_for_more():
    """The search's modules name no attribute of the LSTM decoder."""
    for module in (beam_search_module, graphs):
        source = open(module.__file__).read()
        assert "LSTM" not in source and ".attention.key" not in source
