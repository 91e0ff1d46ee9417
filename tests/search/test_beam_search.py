"""The search against an obvious one: plain lists, one beam at a time, whole captions run again for every word."""

import copy
import dataclasses
import functools
import itertools
import math
from collections import Counter

import pytest
import torch
from conftest import NO_CUDA
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attncap.config import ModelConfig
from attncap.errors import CallError, UserError
from attncap.models.decoder import LSTMDecoder
from attncap.search.beam_search import Hypothesis
from attncap.search.beam_search import beam_search as search_with_processors
from attncap.search.beams import Search
from attncap.search.config import SearchConfig
from attncap.search.graphs import GraphCache
from attncap.search.processors import SuppressTokens

PAD, START, END, UNK = range(4)
P = 5
# A, E, H and D of an ensemble's decoders.
SIZES = [(6, 4, 8, 7), (5, 3, 9, 4)]
BIASES = {"ends seldom": -2.0, "ends sometimes": 1.0, "ends soon": 4.0}  # added to <end>'s logit

both_backends = pytest.mark.parametrize("backend", ["native", "torch"])


def make_decoder(
    which: int = 0, V: int = 9, end_bias: float = 0.0, output_layer: str = "deep", backend: str = "native"
) -> LSTMDecoder:
    """A decoder in float64 with random weights, large enough that words depend on the picture."""
    torch.manual_seed(which)
    A, E, H, D = SIZES[which]
    config = ModelConfig(attention_size=A, embedding_size=E, hidden_size=H, output_layer=output_layer)
    decoder = LSTMDecoder(config, D, V, backend).double().eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(3)
        decoder.word_output.bias[END] += end_bias
    return decoder


def beam_search(
    decoders: LSTMDecoder | list[LSTMDecoder], features, config: SearchConfig, suppressed=(UNK,), seeds=None
) -> list[list[Hypothesis]]:
    """A search of decoders prepared for inference (with backend "torch" they are the models themselves)."""
    decoders = decoders if isinstance(decoders, list) else [decoders]
    prepared = [decoder.for_inference() for decoder in decoders]
    rules = [SuppressTokens(tuple(suppressed))]
    options = dict(backend=decoders[0].backend, graphs=GraphCache())  # graphs are used on CUDA
    return search_with_processors(prepared, features, config, rules, seeds=seeds, **options)


def make_features(B: int, which: int = 0, seed: int = 7) -> Tensor:
    return torch.randn(B, P, SIZES[which][3], dtype=torch.double, generator=torch.Generator().manual_seed(seed + which))


class Truth:
    """What decoders write for one image, by running whole captions again under teacher forcing in float64."""

    def __init__(self, decoders: list[LSTMDecoder], features: list[Tensor]):
        self.decoders, self.features = decoders, features
        self.run = functools.cache(self.run)  # of the words alone

    @torch.no_grad()
    def run(self, words: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """The next word's log-probabilities [V], and the attention [len(words),P] with which the words were written."""
        tokens = torch.tensor([[START, *words]])
        predicted = [d(f.unsqueeze(0), tokens) for d, f in zip(self.decoders, self.features, strict=True)]
        probabilities = torch.stack([logits[0, -1].softmax(0) for logits, _ in predicted]).mean(0)
        return probabilities.log(), torch.stack([attention[0, :-1] for _, attention in predicted]).mean(0)

    def next_words(self, words: list[int], config: SearchConfig, suppressed: tuple[int, ...]) -> dict[int, float]:
        """The log-probability of every word that may come next."""
        log_probs = (self.run(tuple(words))[0] / config.temperature).log_softmax(0)
        return {w: log_probs[w].item() for w in range(len(log_probs)) if is_allowed(words, w, config, suppressed)}


def is_allowed(words: list[int], word: int, config: SearchConfig, suppressed: tuple[int, ...]) -> bool:
    if word == END:
        return len(words) >= config.min_length
    caption, n = [*words, word], config.no_repeat_ngram
    ngrams = [tuple(caption[i : i + n]) for i in range(len(caption) - n + 1)] if n else []
    return word not in (PAD, START, *suppressed) and len(ngrams) == len(set(ngrams))


def rank(score: float, length: int, config: SearchConfig) -> float:
    """What captions are compared by; `length` counts the end."""
    if config.length_penalty == "none":
        return score
    return score / (length if config.length_penalty == "average" else ((5 + length) / 6) ** config.length_penalty)


def obvious_search(
    truth: Truth, config: SearchConfig, suppressed: tuple[int, ...] = (UNK,), stops_early: bool = True
) -> list[tuple[list[int], float]]:
    """The search for one image, after the docstrings of SearchConfig and beam_search: (words, score), best first."""
    k = config.beam_size // config.groups
    live = [[([], 0.0)] for _ in range(config.groups)]  # of every group
    ended = [[] for _ in range(config.groups)]
    for _ in range(config.max_length):
        chosen = []  # words of the groups before
        for g in range(config.groups):
            candidates = [
                ([*words, word], score + log_prob - config.diversity * chosen.count(word))
                for words, score in live[g]
                for word, log_prob in truth.next_words(words, config, suppressed).items()
            ]
            candidates.sort(key=lambda candidate: -candidate[1])
            width = k - len(ended[g]) if config.method == "shrink" else k
            ended[g] += [(words[:-1], score) for words, score in candidates[:width] if words[-1] == END]
            going = candidates[:width] if config.method == "shrink" else candidates
            live[g] = [(words, score) for words, score in going if words[-1] != END][:k]
            if config.method == "fixed" and stops_early and len(ended[g]) >= k and live[g]:
                worst = sorted(rank(score, len(words) + 1, config) for words, score in ended[g])[-k]
                if rank(live[g][0][1], config.max_length, config) <= worst:  # longer captions are divided by more
                    live[g] = []
            chosen += [words[-1] for words, _ in live[g]]
    ended, live = sum(ended, []), sum(live, [])
    ended.sort(key=lambda found: -rank(found[1], len(found[0]) + 1, config))
    live.sort(key=lambda found: -found[1])
    return (ended + live)[: config.n_best] or [([], -math.inf)]


@functools.cache
def truths(V: int, end_bias: float, output_layer: str, ensemble: int, B: int) -> list[Truth]:
    """Of B images; kept, since a caption's truth is the same for every search."""
    decoders = [make_decoder(i, V, end_bias, output_layer, "torch") for i in range(ensemble)]
    features = [make_features(B, i) for i in range(ensemble)]
    return [Truth(decoders, [f[b] for f in features]) for b in range(B)]


def check_hypothesis(found: Hypothesis, truth: Truth, words: list[int], score: float):
    assert found.tokens == words
    assert found.score == pytest.approx(score, rel=1e-6, abs=1e-5)  # the search adds up in float32
    assert found.attention.dtype == torch.float32 and found.attention.device.type == "cpu"
    torch.testing.assert_close(found.attention, truth.run(tuple(words))[1].float())


def check_search(
    config: SearchConfig,
    suppressed=(UNK,),
    *,
    V=9,
    end_bias=1.0,
    output_layer="deep",
    ensemble=1,
    backend="native",
    device="cpu",
    B=3,
    **options,
):
    """beam_search finds what obvious_search finds."""
    decoders = [make_decoder(i, V, end_bias, output_layer, backend).to(device) for i in range(ensemble)]
    features = [make_features(B, i).to(device) for i in range(ensemble)]
    found = beam_search(decoders, features, config, suppressed)
    assert len(found) == B
    for of_image, truth in zip(found, truths(V, end_bias, output_layer, ensemble, B), strict=True):
        expected = obvious_search(truth, config, suppressed, **options)
        assert len(of_image) == len(expected)
        for hypothesis, (words, score) in zip(of_image, expected, strict=True):
            check_hypothesis(hypothesis, truth, words, score)


# Each with what differs from the defaults; ensembles and suppressed words are no fields of SearchConfig.
TABLE = [
    *(dict(beam_size=K, n_best=n) for K, n in [(1, 1), (2, 2), (3, 1), (5, 5), (10, 10), (32, 32)]),
    dict(length_penalty="average", n_best=5),
    dict(length_penalty=0.7, n_best=5),
    dict(length_penalty=2, n_best=5),
    dict(min_length=3),
    dict(min_length=6),
    dict(max_length=1, n_best=5),
    dict(max_length=2, n_best=5),
    dict(no_repeat_ngram=1, n_best=5),
    dict(no_repeat_ngram=2, n_best=5),
    dict(no_repeat_ngram=3, n_best=5),
    dict(no_repeat_ngram=1, min_length=6, n_best=5),  # more words than there are: beams run dry
    dict(suppressed=(), n_best=5),
    dict(suppressed=(UNK, 5, 6, 8), n_best=5),
    dict(temperature=0.5, n_best=5),
    dict(temperature=2.0, n_best=5),
    dict(beam_size=6, groups=6, n_best=6),
    dict(beam_size=6, groups=2, n_best=6, diversity=0.3),
    dict(beam_size=6, groups=3, n_best=6, diversity=2.0),
    dict(beam_size=6, groups=3, n_best=6, no_repeat_ngram=2),
    dict(beam_size=6, groups=2, n_best=6, length_penalty="average", min_length=2),
    dict(ensemble=2, n_best=5),
    dict(ensemble=2, beam_size=4, groups=2, n_best=4, no_repeat_ngram=1, length_penalty=1),
]


methods_with_beams = pytest.mark.parametrize("method", ["shrink", "fixed"])
changes_in_table = pytest.mark.parametrize(
    "changes", TABLE, ids=lambda changes: ",".join(f"{k}={v}" for k, v in changes.items())
)


@both_backends
@pytest.mark.parametrize("output_layer", ["plain", "deep"])
@pytest.mark.parametrize("end_bias", BIASES.values(), ids=BIASES)
@methods_with_beams
@changes_in_table
def test_equals_the_obvious_search(backend, output_layer, end_bias, method, changes, device="cpu"):
    fields = dict(method=method, max_length=7) | changes
    options = dict(ensemble=fields.pop("ensemble", 1), suppressed=fields.pop("suppressed", (UNK,)))
    models = dict(end_bias=end_bias, output_layer=output_layer, backend=backend, device=device)
    check_search(SearchConfig(**fields), **models, **options)


@pytest.mark.gpu
@NO_CUDA
@methods_with_beams
@changes_in_table
def test_equals_the_obvious_search_on_a_gpu(method, changes):
    """Each setting once, since each is captured anew."""
    test_equals_the_obvious_search("native", "deep", 1.0, method, changes, "cuda")


@pytest.mark.gpu
@NO_CUDA
@both_backends
@pytest.mark.parametrize("output_layer", ["plain", "deep"])
@pytest.mark.parametrize("end_bias", BIASES.values(), ids=BIASES)
def test_equals_the_obvious_search_on_a_gpu_with_other_models(backend, output_layer, end_bias):
    test_equals_the_obvious_search(backend, output_layer, end_bias, "shrink", dict(n_best=5), "cuda")


@pytest.mark.slow
@both_backends
@settings(derandomize=True, deadline=None, max_examples=100)
@given(data=st.data())
def test_options_together(backend, data):
    groups = data.draw(st.integers(1, 4))
    K = groups * data.draw(st.integers(1, 4))
    max_length = data.draw(st.integers(1, 7))
    config = SearchConfig(
        beam_size=K,
        groups=groups,
        max_length=max_length,
        method=data.draw(st.sampled_from(["shrink", "fixed"])),
        min_length=data.draw(st.integers(0, max_length - 1)),
        length_penalty=data.draw(st.sampled_from(["none", "average", 0, 0.6, 1.5])),
        no_repeat_ngram=data.draw(st.integers(0, 3)),
        temperature=data.draw(st.sampled_from([0.6, 1.0, 1.7])),
        n_best=data.draw(st.integers(1, K)),
        diversity=data.draw(st.sampled_from([0.1, 0.4, 3.0])),
    )
    check_search(
        config,
        tuple(data.draw(st.sets(st.integers(3, 8)))),
        end_bias=data.draw(st.sampled_from(list(BIASES.values()))),
        ensemble=data.draw(st.integers(1, 2)),
        backend=backend,
        B=2,
    )


@both_backends
@pytest.mark.parametrize("length_penalty", ["none", "average", 0.7, 2])
@pytest.mark.parametrize("end_bias", BIASES.values(), ids=BIASES)
def test_a_fixed_search_stops_without_loss(backend, length_penalty, end_bias):
    """What it finds is what it would find if it never stopped before max_length."""
    config = SearchConfig(beam_size=4, method="fixed", max_length=9, length_penalty=length_penalty, n_best=4)
    check_search(config, end_bias=end_bias, backend=backend, stops_early=False)


def captions_up_to(length: int, V: int) -> list[tuple[int, ...]]:
    """All captions of at most `length` words, without <unk>."""
    return [words for n in range(length + 1) for words in itertools.product(range(UNK + 1, V), repeat=n)]


def score_of(truth: Truth, words: tuple[int, ...]) -> float:
    """The sum of log-probabilities; words[:-1] alone came before the last."""
    return sum(truth.run(words[:t])[0][word].item() for t, word in enumerate(words))


@both_backends
@pytest.mark.parametrize("length_penalty", ["none", "average", 0.7])
@pytest.mark.parametrize("output_layer", ["plain", "deep"])
def test_a_wide_beam_finds_all_captions(backend, length_penalty, output_layer):
    """With more beams than captions the search is exhaustive; captions that did not end follow those that did."""
    V, max_length, K = 6, 4, 32
    config = SearchConfig(K, "fixed", max_length, length_penalty=length_penalty, n_best=K)
    found = beam_search(make_decoder(0, V, 0.0, output_layer, backend), make_features(2), config)
    for of_image, truth in zip(found, truths(V, 0.0, output_layer, 1, 2), strict=True):
        ended = [(words, score_of(truth, (*words, END))) for words in captions_up_to(max_length - 1, V)]
        ended.sort(key=lambda caption: -rank(caption[1], len(caption[0]) + 1, config))
        live = [(words, score_of(truth, words)) for words in captions_up_to(max_length, V) if len(words) == max_length]
        live.sort(key=lambda caption: -caption[1])
        assert len(ended) == 1 + 2 + 4 + 8 and len(live) == 16
        for hypothesis, (words, score) in zip(of_image, ended + live, strict=True):
            check_hypothesis(hypothesis, truth, list(words), score)


@both_backends
def test_greedy_takes_the_likeliest_word(backend):
    [truth] = truths(9, 1.0, "deep", 1, 1)
    words = []
    while len(words) < 7:
        log_probs = truth.run(tuple(words))[0]
        log_probs = log_probs.index_fill(0, torch.tensor([PAD, START, UNK]), -math.inf)
        if log_probs.argmax() == END:
            break
        words.append(log_probs.argmax().item())
    assert words
    for method in ("shrink", "fixed"):
        config = SearchConfig(beam_size=1, max_length=7, method=method)
        [[found]] = beam_search(make_decoder(end_bias=1.0, backend=backend), make_features(1), config)
        assert found.tokens == words


methods = pytest.mark.parametrize("method", ["shrink", "fixed", "sample"])


@both_backends
@methods
def test_where_nothing_ends_live_beams_are_returned(backend, method):
    decoder = make_decoder(end_bias=-1e4, backend=backend)
    config = SearchConfig(beam_size=3, method=method, max_length=5, n_best=3)
    for found, truth in zip(beam_search(decoder, make_features(3), config), truths(9, -1e4, "deep", 1, 3), strict=True):
        assert [len(hypothesis.tokens) for hypothesis in found] == [5, 5, 5]
        assert [hypothesis.score for hypothesis in found] == sorted((h.score for h in found), reverse=True)
        for hypothesis in found:
            check_hypothesis(hypothesis, truth, hypothesis.tokens, score_of(truth, tuple(hypothesis.tokens)))


@both_backends
def test_live_beams_only_fill_up(backend):
    """Captions that ended come first, though the live ones' scores are better."""
    filled = 0
    for method in ("shrink", "fixed"):
        config = SearchConfig(beam_size=6, method=method, max_length=2, n_best=6, min_length=1)
        decoder = make_decoder(end_bias=1.0, backend=backend)
        for found in beam_search(decoder, make_features(3), config):
            has_ended = [len(hypothesis.tokens) < 2 for hypothesis in found]
            assert has_ended == sorted(has_ended, reverse=True) and any(has_ended)
            ended, live = (([h.score for h in found if (len(h.tokens) < 2) == which]) for which in (True, False))
            filled += bool(live) and max(live) > min(ended)
    assert filled > 0


@both_backends
@methods
def test_empty_caption(backend, method):
    decoder = make_decoder(end_bias=1e4, backend=backend)
    config = SearchConfig(beam_size=3, method=method, max_length=5)
    [[found]] = beam_search(decoder, make_features(1), config)
    assert found.tokens == [] and found.attention.shape == (0, P)
    assert found.score == pytest.approx(0, abs=1e-5)


@both_backends
@methods
def test_no_images(backend, method):
    decoder = make_decoder(backend=backend)
    assert beam_search(decoder, make_features(0), SearchConfig(method=method, max_length=5)) == []


@both_backends
@methods
@pytest.mark.parametrize("no_repeat_ngram", [0, 1])
def test_where_no_word_is_allowed_the_caption_is_empty(backend, method, no_repeat_ngram):
    """From the start, or when all words are used up before the caption may end."""
    suppressed = range(UNK, 9) if no_repeat_ngram == 0 else range(UNK, 7)
    decoder = make_decoder(end_bias=1.0, backend=backend)
    config = SearchConfig(4, method, max_length=7, min_length=4, no_repeat_ngram=no_repeat_ngram, n_best=4)
    for of_image in beam_search(decoder, make_features(3), config, suppressed):
        [found] = of_image
        assert found.tokens == [] and found.score == -math.inf and found.attention.shape == (0, P)


@both_backends
@methods
def test_more_beams_than_words(backend, method):
    decoder = make_decoder(V=6, backend=backend)
    config = SearchConfig(beam_size=32, method=method, max_length=4, n_best=32)
    for of_image in beam_search(decoder, make_features(2), config):
        assert all(set(hypothesis.tokens) <= {4, 5} for hypothesis in of_image)
    if method != "sample":
        check_search(config, V=6, backend=backend)


def the_same(found: list[Hypothesis], expected: list[Hypothesis]):
    assert [hypothesis.tokens for hypothesis in found] == [hypothesis.tokens for hypothesis in expected]
    for hypothesis, other in zip(found, expected, strict=True):
        assert hypothesis.score == pytest.approx(other.score, rel=1e-5, abs=1e-5)
        torch.testing.assert_close(hypothesis.attention, other.attention, rtol=1e-4, atol=1e-5)


@both_backends
@pytest.mark.parametrize(
    "fields",
    [
        dict(method="shrink"),
        dict(method="fixed", length_penalty="average"),
        dict(method="fixed", groups=2),
        dict(method="sample"),
    ],
    ids=str,
)
def test_results_depend_neither_on_the_batch_nor_on_the_place_in_it(device, backend, fields, monkeypatch):
    """In float32, with captions of very different lengths: finished images are taken out on the way, several times."""
    kept = []
    select = Search.select
    monkeypatch.setattr(Search, "select", lambda s, beams, images: kept.append(len(images)) or select(s, beams, images))
    B = 16
    decoder = make_decoder(V=60, end_bias=3.0, backend=backend).float().to(device)
    features = make_features(B).float().to(device)
    config = SearchConfig(beam_size=4, max_length=30, n_best=2, no_repeat_ngram=1, **fields)
    together = beam_search(decoder, features, config, seeds=range(B))
    if device == "cpu":  # CUDA looks seldom at what has finished
        assert len(kept) >= 3 and kept == sorted(kept, reverse=True)  # several times, and to fewer and fewer
    order = torch.randperm(B, generator=torch.Generator().manual_seed(0)).tolist()
    for b, found in zip(order, beam_search(decoder, features[order], config, seeds=order), strict=True):
        the_same(found, together[b])
    for b in range(B):
        [alone] = beam_search(decoder, features[b : b + 1], config, seeds=[b])
        the_same(alone, together[b])


@both_backends
@methods
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_named(backend, method, value):
    decoder = make_decoder(backend=backend)
    with torch.no_grad():
        decoder.word_output.bias[5] = value
    with pytest.raises(UserError, match="3 of 3 images is NaN, first at index 0 of the batch"):
        beam_search(decoder, make_features(3), SearchConfig(method=method, max_length=5))


@both_backends
@methods
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("end_bias", BIASES.values(), ids=BIASES)
def test_an_image_that_is_no_number_is_named(device, backend, method, value, end_bias):
    """At its place in the batch, though others were taken out of it before."""
    decoder = make_decoder(backend=backend, end_bias=end_bias).float().to(device)
    features = make_features(6).float().to(device)
    features[4, 2, 1] = value
    with pytest.raises(UserError, match="1 of 6 images is NaN, first at index 4 of the batch"):
        beam_search(decoder, features, SearchConfig(method=method, max_length=5))


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(method="shrnk"), "method='shrnk': choose shrink, fixed or sample"),
        (dict(length_penalty="avg"), "length_penalty='avg': choose none, average or a number"),
        (dict(beam_size=0), "beam_size=0: must be from 1 to 32"),
        (dict(beam_size=33), "beam_size=33: must be from 1 to 32"),
        (dict(max_length=0), "max_length=0: must be at least 1"),
        (dict(min_length=-1), "min_length=-1: must be below max_length=50, and at least 0"),
        (dict(min_length=7, max_length=7), "min_length=7: must be below max_length=7, and at least 0"),
        (dict(n_best=0), "n_best=0: must be from 1 to beam_size=5"),
        (dict(n_best=6), "n_best=6: must be from 1 to beam_size=5"),
        (dict(groups=0), "groups=0: must divide beam_size=5"),
        (dict(groups=2), "groups=2: must divide beam_size=5"),
        (dict(groups=5, method="sample"), "groups=5: method='sample' has no groups"),
        (dict(length_penalty=-0.1), "length_penalty=-0.1: must be a number from 0 to 10"),
        (dict(length_penalty=math.nan), "length_penalty=nan: must be a number from 0 to 10"),
        (dict(temperature=0.0), "temperature=0.0: must be from 0.001 to 1000"),
        (dict(temperature=math.nan), "temperature=nan: must be from 0.001 to 1000"),
        (dict(top_p=0.0), "top_p=0.0: must be above 0 and at most 1"),
        (dict(top_p=1.1), "top_p=1.1: must be above 0 and at most 1"),
        (dict(beam_size=6, groups=3, diversity=0), "diversity=0: all 3 groups would find the same captions"),
        (dict(diversity=-0.5), "diversity=-0.5: must be at least 0"),
        (dict(diversity=math.nan), "diversity=nan: must be at least 0"),
        (dict(no_repeat_ngram=-1), "no_repeat_ngram=-1: must be at least 0"),
        (dict(top_k=-1), "top_k=-1: must be at least 0"),
        (dict(sample_seed=-1), "sample_seed=-1: must be at least 0"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together(fields, message):
    with pytest.raises(CallError) as error:
        SearchConfig(**fields)
    assert message in str(error.value)


def filtered(log_probs: dict[int, float], config: SearchConfig) -> dict[int, float]:
    """The probabilities of what can be drawn, top_k's words first, of these as many as have top_p together."""
    ranked = sorted(log_probs, key=lambda word: -log_probs[word])[: config.top_k or None]
    total = sum(math.exp(log_probs[word]) for word in ranked)
    left = {}
    for word in ranked:
        if sum(left.values()) < config.top_p:
            left[word] = math.exp(log_probs[word]) / total
    total = sum(left.values())
    return {word: probability / total for word, probability in left.items()}


def check_frequencies(counts: Counter, probabilities: dict, total: int):
    """Each within 4.5 standard deviations; what has probability 0 never comes."""
    assert sum(probabilities.values()) == pytest.approx(1) and sum(counts.values()) == total
    assert set(counts) <= set(probabilities)
    for what, p in probabilities.items():
        assert abs(counts[what] - total * p) <= 4.5 * math.sqrt(total * p * (1 - p)) + 1, what


def draw(config: SearchConfig, images: int = 128, **options) -> tuple[list[list[Hypothesis]], Truth]:
    """Samples of one picture as that many images, each with its own seed."""
    found = beam_search(make_decoder(end_bias=1.0, **options), make_features(1).expand(images, -1, -1), config)
    assert all(len(of_image) == config.beam_size for of_image in found)
    return found, truths(9, 1.0, "deep", 1, 1)[0]


FILTERS = [
    dict(),
    dict(temperature=0.5),
    dict(temperature=3.0),
    dict(top_k=1),
    dict(top_k=3),
    dict(top_p=0.01),
    dict(top_p=0.6),
    dict(top_p=0.9, temperature=2.0),
    dict(top_k=4, top_p=0.8, temperature=2.0),
    dict(min_length=1, top_k=3),
]


@both_backends
@pytest.mark.parametrize("fields", FILTERS, ids=str)
def test_first_words_are_drawn_from_the_distribution(backend, fields):
    config = SearchConfig(32, "sample", max_length=2, n_best=32, **fields)
    found, truth = draw(config, backend=backend)
    first = Counter((*hypothesis.tokens, END)[0] for of_image in found for hypothesis in of_image)
    check_frequencies(first, filtered(truth.next_words([], config, (UNK,)), config), 32 * 128)


@pytest.mark.parametrize("fields", [dict(), dict(no_repeat_ngram=1, top_k=4, top_p=0.9, temperature=3.0)], ids=str)
def test_whole_captions_are_drawn_from_the_distribution(fields):
    """A word depends on those before it, and on nothing else."""
    config = SearchConfig(32, "sample", max_length=2, n_best=32, **fields)
    found, truth = draw(config, images=256)
    probabilities = {}
    for first, p in filtered(truth.next_words([], config, (UNK,)), config).items():
        if first == END:
            probabilities[()] = p
        else:
            for second, q in filtered(truth.next_words([first], config, (UNK,)), config).items():
                probabilities[(first,) if second == END else (first, second)] = p * q
    assert len(probabilities) > 10
    counts = Counter(tuple(hypothesis.tokens) for of_image in found for hypothesis in of_image)
    check_frequencies(counts, probabilities, 32 * 256)


def test_beams_of_a_sample_are_independent():
    config = SearchConfig(2, "sample", max_length=1, n_best=2)
    found, truth = draw(config, images=4000)
    p = filtered(truth.next_words([], config, (UNK,)), config)
    pairs = {(a, b): (1 + (a != b)) * p[a] * p[b] for a, b in itertools.combinations_with_replacement(sorted(p), 2)}
    firsts = [[(*hypothesis.tokens, END)[0] for hypothesis in of_image] for of_image in found]
    check_frequencies(Counter(tuple(sorted(pair)) for pair in firsts), pairs, 4000)


@both_backends
@pytest.mark.parametrize("fields", [dict(), dict(temperature=1.5, top_k=3, top_p=0.7, no_repeat_ngram=2)], ids=str)
def test_samples_have_the_scores_of_their_words(backend, fields):
    """Before top_k and top_p."""
    config = SearchConfig(4, "sample", max_length=6, n_best=4, length_penalty="average", **fields)
    found, truth = draw(config, images=8, backend=backend)
    plain = dataclasses.replace(config, no_repeat_ngram=0)
    for of_image in found:
        ranks = []
        for hypothesis in of_image:
            caption = [*hypothesis.tokens, END][: config.max_length]
            assert all(is_allowed(caption[:t], w, config, (UNK,)) for t, w in enumerate(caption))
            score = sum(truth.next_words(caption[:t], plain, (UNK,))[w] for t, w in enumerate(caption))
            check_hypothesis(hypothesis, truth, hypothesis.tokens, score)
            ranks.append((len(hypothesis.tokens) == config.max_length, -rank(score, len(caption), config)))
        assert ranks == sorted(ranks)  # live ones last


def test_ensemble_of_other_vocabularies_or_images():
    decoder, features = make_decoder(), make_features(3)
    for decoders, values in (
        ([decoder, make_decoder(V=20)], [features, features]),
        ([decoder, decoder], [features, features[:2]]),
        ([decoder, decoder], [features, features[:, :2]]),
    ):
        with pytest.raises(ValueError, match="same images and grid, and decoders of the same vocabulary"):
            beam_search(decoders, values, SearchConfig())


@pytest.mark.parametrize("output_layer", ["plain", "deep"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype, output_layer):
    """Also where a decoder's first search is under autocast: what is kept for the next one is as without."""

    def search(decoder: LSTMDecoder) -> list[list[tuple[list[int], float]]]:
        found = beam_search(decoder, make_features(3), SearchConfig())
        return [[(hypothesis.tokens, hypothesis.score) for hypothesis in of_image] for of_image in found]

    fresh = make_decoder(end_bias=-2.0, output_layer=output_layer).to(dtype)
    expected = search(copy.deepcopy(fresh))
    with torch.autocast("cpu", torch.bfloat16):
        assert search(fresh) == expected
    assert search(fresh) == expected


def test_whole_numbers_and_another_default_dtype():
    decoder, features = make_decoder().float(), make_features(2)
    whole = SearchConfig(4, groups=2, diversity=1, temperature=1, length_penalty=1, top_p=1)
    expected = beam_search(decoder, features, dataclasses.replace(whole, diversity=1.0, temperature=1.0))
    torch.set_default_dtype(torch.float64)
    try:
        found = beam_search(decoder, features, whole)
    finally:
        torch.set_default_dtype(torch.float32)
    assert [of_image[0].tokens for of_image in found] == [of_image[0].tokens for of_image in expected]


@both_backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_types(dtype, backend):
    """Scores are those of the found words under teacher forcing, but for rounding."""
    decoder = make_decoder(V=30, end_bias=-1.0, backend=backend).to(dtype)
    decoders, features = [copy.deepcopy(decoder).double()], make_features(4)
    for picture, [found] in zip(features, beam_search(decoder, features, SearchConfig(max_length=8)), strict=True):
        truth = Truth(decoders, [picture.to(dtype).double()])
        caption = [*found.tokens, END][:8]
        score = sum(truth.next_words(caption[:t], SearchConfig(), (UNK,))[w] for t, w in enumerate(caption))
        assert found.score == pytest.approx(score, abs=0.25)


@pytest.mark.parametrize(
    "shape, suppressed, message",
    [
        ((2, P, 3), [], r"takes features \[B, P, \d+\] of at least one cell, not \[2, 5, 3\]"),
        ((2, 0, SIZES[0][3]), [], "at least one cell"),
        ((2, P, SIZES[0][3]), [-1], "token -1 of a processor is not among the 9 words"),
        ((2, P, SIZES[0][3]), [9], "token 9 of a processor is not among the 9 words"),
    ],
    ids=str,
)
def test_features_and_words_that_do_not_fit(shape, suppressed, message):
    with pytest.raises(ValueError, match=message):
        beam_search(make_decoder(), torch.zeros(shape), SearchConfig(), suppressed)


def test_the_end_cannot_be_suppressed():
    for method in ("shrink", "fixed", "sample"):
        config = SearchConfig(3, method, max_length=30)
        [[found, *_]] = beam_search(make_decoder(end_bias=3.0), make_features(1), config, suppressed=[END])
        assert len(found.tokens) < 30


def test_every_image_has_its_seed():
    with pytest.raises(ValueError, match="2 seeds for 3 images"):
        beam_search(make_decoder(), make_features(3), SearchConfig(method="sample", max_length=5), seeds=[0, 1])


def test_a_seed_decides_what_is_drawn():
    config = SearchConfig(3, "sample", max_length=6, n_best=3)
    decoder, features = make_decoder(), make_features(8)

    def tokens(**changes) -> list[list[list[int]]]:
        found = beam_search(decoder, features, dataclasses.replace(config, **changes))
        return [[hypothesis.tokens for hypothesis in of_image] for of_image in found]

    assert tokens() == tokens(sample_seed=0) != tokens(sample_seed=1)
    assert tokens(sample_seed=1)[:-1] != tokens()[1:]  # the next seed is not the next image
    one_picture = beam_search(decoder, features[:1].expand(8, -1, -1), config)  # the images' seeds differ
    assert len({str([hypothesis.tokens for hypothesis in of_image]) for of_image in one_picture}) > 4
