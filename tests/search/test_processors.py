"""Rules for words, each as a function and in the search, by the fused op and by calls."""

import math

import pytest
import torch
from test_beam_search import END, START, UNK, Truth, make_decoder, make_features
from torch import Tensor

from attncap.search.beam_search import beam_search
from attncap.search.config import SearchConfig
from attncap.search.processors import ForcedPrefix, MinLength, NoRepeatNgram, SuppressTokens

V = 9
RULES = [SuppressTokens((UNK, 5, 6)), MinLength(3), NoRepeatNgram(1), NoRepeatNgram(2), ForcedPrefix((5, 6))]
methods = pytest.mark.parametrize("method", ["shrink", "fixed", "sample"])
both_backends = pytest.mark.parametrize("backend", ["native", "torch"])


class Called:
    """A processor that the search does not know: it can only be called."""

    def __init__(self, rule):
        self.rule, self.histories = rule, []

    def __call__(self, log_probs: Tensor, history: Tensor) -> Tensor:
        self.histories.append(history.clone())
        return self.rule(log_probs, history)


def search(config, rules, backend="native", B=4):
    decoder = make_decoder(end_bias=1.0, backend=backend).for_inference()
    return beam_search(decoder, make_features(B), config, rules, backend=backend)


def test_rules_by_hand():
    log_probs, history = torch.zeros(2, V), torch.tensor([[5, 6, 5], [4, 4, 4]])
    no_repeat = NoRepeatNgram(2)(log_probs.clone(), history)
    assert (no_repeat == -math.inf).nonzero().tolist() == [[0, 6], [1, 4]]
    assert NoRepeatNgram(4)(log_probs.clone(), history).equal(log_probs)
    suppressed = SuppressTokens((3, END, 8))(log_probs.clone(), history)
    assert (suppressed[0] == -math.inf).nonzero().flatten().tolist() == [3, 8]
    assert MinLength(3)(log_probs.clone(), history).equal(log_probs)
    assert (MinLength(4)(log_probs.clone(), history) == -math.inf).nonzero().tolist() == [[0, END], [1, END]]
    forced = ForcedPrefix((7, 7, 7, 5))(log_probs.clone(), history)
    assert (forced > -math.inf).nonzero().tolist() == [[0, 5], [1, 5]]
    assert ForcedPrefix((7,))(log_probs.clone(), history).equal(log_probs)


@methods
@both_backends
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_called_or_known_a_rule_is_the_same(method, backend, rule):
    """In the fused op, and called with log-probabilities: the same captions and scores."""
    config = SearchConfig(beam_size=4, method=method, max_length=7, n_best=4)
    known, called = search(config, [rule], backend), search(config, [Called(rule)], backend)
    for of_image, of_other in zip(known, called, strict=True):
        assert [h.tokens for h in of_image] == [h.tokens for h in of_other]
        assert [h.score for h in of_image] == pytest.approx([h.score for h in of_other], rel=1e-5, abs=1e-5)


@methods
@both_backends
def test_forced_words_come_first_and_count(method, backend):
    """Also words that are suppressed otherwise; their log-probabilities are in the score."""
    config = SearchConfig(beam_size=3, method=method, max_length=6, n_best=3)
    decoder, features = make_decoder(end_bias=1.0, backend="torch"), make_features(4)
    rules = [SuppressTokens((UNK, 7)), ForcedPrefix((7, 4))]
    for image, found in zip(features, search(config, rules, backend), strict=True):
        truth = Truth([decoder], [image])
        for hypothesis in found:
            assert hypothesis.tokens[:2] == [7, 4] and 7 not in hypothesis.tokens[2:]
            caption = [*hypothesis.tokens, END][:6]
            score = sum(truth.run(tuple(caption[:t]))[0][word].item() for t, word in enumerate(caption))
            assert hypothesis.score == pytest.approx(score, rel=1e-5)


@methods
def test_a_rule_of_ones_own(method):
    """It sees all words so far, without <start>, and forbids what it likes; other words keep their probabilities."""

    def alternate(log_probs: Tensor, history: Tensor) -> Tensor:
        """Even words at even positions, odd words at odd ones."""
        words = torch.arange(log_probs.shape[1])
        wrong = (words % 2 != history.shape[1] % 2) & (words != END)
        return log_probs.masked_fill(wrong, -math.inf)

    rule = Called(alternate)
    config = SearchConfig(beam_size=3, method=method, max_length=6, n_best=3, min_length=2)
    decoder = make_decoder(end_bias=1.0, backend="torch")
    for image, found in zip(make_features(4), search(config, [rule]), strict=True):
        truth = Truth([decoder], [image])
        for hypothesis in found:
            assert all(word % 2 == t % 2 for t, word in enumerate(hypothesis.tokens))
            caption = [*hypothesis.tokens, END][:6]
            score = sum(truth.run(tuple(caption[:t]))[0][word].item() for t, word in enumerate(caption))
            assert hypothesis.score == pytest.approx(score, rel=1e-5)
    assert [history.shape[1] for history in rule.histories] == list(range(len(rule.histories)))
    assert all((history != START).all() for history in rule.histories)


def test_a_token_that_is_not_there():
    for rule in (SuppressTokens((V,)), ForcedPrefix((-1,))):
        with pytest.raises(ValueError, match="not among the 9 words"):
            search(SearchConfig(), [rule])
