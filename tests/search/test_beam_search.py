import itertools

import pytest
import torch

from attncap.config import ModelConfig
from attncap.data.vocabulary import Vocabulary
from attncap.models import Decoder
from attncap.search import beam_search

SUPPRESSED = [0, 1, 3]

P, D = 5, 7


def make_decoder(V: int, seed: int = 0, end_bias: float = 0.0) -> Decoder:
    """A decoder with random weights, large enough that words depend on the picture."""
    torch.manual_seed(seed)
    decoder = Decoder(ModelConfig(attention_size=6, embedding_size=4, hidden_size=8), D, V).double().eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(3)
        decoder.word_output.bias[Vocabulary.END] += end_bias
    return decoder


@torch.no_grad()
def next_log_probs(decoder: Decoder, features: torch.Tensor, words: list[int]) -> torch.Tensor:
    """Log-probabilities [V] after the words, by running the whole caption again under teacher forcing."""
    tokens = torch.tensor([[Vocabulary.START, *words, Vocabulary.PAD]])
    log_probs = decoder(features.unsqueeze(0), tokens)[0][0, -1].log_softmax(0)
    log_probs[SUPPRESSED] = -torch.inf
    return log_probs


def obvious_search(decoder: Decoder, features: torch.Tensor, K: int, max_length: int) -> tuple[list[int], float]:
    """The same search for one image, one beam at a time, without any state kept from word to word."""
    live, ended = [([], 0.0)], []
    for _ in range(max_length):
        candidates = []
        for words, score in live:
            for word, log_prob in enumerate(next_log_probs(decoder, features, words).tolist()):
                if log_prob > -float("inf"):
                    candidates.append((words + [word], score + log_prob))
        candidates.sort(key=lambda candidate: -candidate[1])
        chosen = candidates[: K - len(ended)]
        ended += [(words[:-1], score) for words, score in chosen if words[-1] == Vocabulary.END]
        live = [(words, score) for words, score in chosen if words[-1] != Vocabulary.END]
        if not live:
            break
    return max(ended or live, key=lambda hypothesis: hypothesis[1])


@pytest.mark.parametrize("K", [1, 2, 3, 5, 10])
@pytest.mark.parametrize("end_bias", [0.0, 3.0, -1e4])
def test_equals_the_obvious_search(K, end_bias):
    decoder = make_decoder(V=9, end_bias=end_bias)
    features = torch.randn(6, P, D, dtype=torch.double)
    found = beam_search(decoder, features, K, max_length=7)
    assert len(found) == 6
    for hypothesis, picture in zip(found, features, strict=True):
        words, score = obvious_search(decoder, picture, K, max_length=7)
        assert hypothesis.tokens == words
        assert hypothesis.score == pytest.approx(score, rel=1e-6, abs=1e-5)  # the search adds up in float32
        assert hypothesis.attention.shape == (len(words), P)
        tokens = torch.tensor([[Vocabulary.START, *words, Vocabulary.END]])
        with torch.no_grad():
            weights = decoder(picture.unsqueeze(0), tokens)[1][0, : len(words)]
        torch.testing.assert_close(hypothesis.attention, weights.float())


def test_wide_beam_finds_the_best_of_all_captions():
    """With more beams than captions the search is exhaustive."""
    V, max_length = 7, 4  # three words beside the special ones
    decoder = make_decoder(V)
    features = torch.randn(2, P, D, dtype=torch.double)
    for picture, hypothesis in zip(features, beam_search(decoder, features, 150, max_length), strict=True):
        scores = {}
        for length in range(max_length):
            for words in itertools.product(range(4, V), repeat=length):
                caption = [*words, Vocabulary.END]
                scores[words] = sum(
                    next_log_probs(decoder, picture, caption[:t])[caption[t]].item() for t in range(length + 1)
                )
        assert tuple(hypothesis.tokens) == max(scores, key=scores.get)


def test_best_live_beam_where_nothing_ends():
    decoder = make_decoder(V=9, end_bias=-1e4)
    for hypothesis in beam_search(decoder, torch.randn(3, P, D, dtype=torch.double), 3, max_length=5):
        assert len(hypothesis.tokens) == 5 and not set(hypothesis.tokens) & set(range(4))


def test_empty_caption():
    decoder = make_decoder(V=9, end_bias=1e4)
    [hypothesis] = beam_search(decoder, torch.randn(1, P, D, dtype=torch.double), 3, max_length=5)
    assert hypothesis.tokens == [] and hypothesis.attention.shape == (0, P)


def test_results_do_not_depend_on_the_batch():
    decoder = make_decoder(V=30)
    features = torch.randn(8, P, D, dtype=torch.double)
    together = beam_search(decoder, features, 4, max_length=12)
    alone = [beam_search(decoder, features[i : i + 1], 4, max_length=12)[0] for i in range(8)]
    assert [hypothesis.tokens for hypothesis in together] == [hypothesis.tokens for hypothesis in alone]
