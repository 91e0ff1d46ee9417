"""Samples, rewards and the gradient of self-critical training, against formulas worked out caption by caption."""

import itertools
from collections import Counter

import pytest
import torch
from pycocoevalcap.cider.cider import Cider
from torch.utils.flop_counter import FlopCounterMode

from attncap.config import ModelConfig
from attncap.data.tokenizer import tokenize
from attncap.data.vocabulary import Vocabulary
from attncap.models.decoder import LSTMDecoder
from attncap.models.losses import caption_losses
from attncap.search.sampling import sample_captions
from attncap.training.self_critical import SelfCritical, advantages

PAD, START, END, UNK = range(4)
D, P = 5, 3


def make_decoder(V: int = 6, backend: str = "native") -> LSTMDecoder:
    """In float64, with dropout, random weights large enough that words depend on the picture, and no probability of
    <pad> and <start>."""
    torch.manual_seed(0)
    config = ModelConfig(attention_size=4, embedding_size=4, hidden_size=6, dropout=0.5)
    decoder = LSTMDecoder(config, D, V, backend).double()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(2)
        decoder.word_output.bias[: START + 1] -= 100
    return decoder


def make_features(B: int) -> torch.Tensor:
    return torch.randn(B, P, D, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def log_probability(decoder, feature, tokens):
    """Of the words of one caption, by teacher forcing: tokens [T] without padding."""
    logits, _ = decoder(feature.unsqueeze(0), tokens[None, :-1])
    return logits[0].log_softmax(dim=1).gather(1, tokens[1:, None]).sum()


def sample(decoder, features, K, max_length, seed=0, table=False):
    """As training does: without the table over the vocabulary."""
    with torch.no_grad():
        seeds = [(seed, image) for image in range(len(features))]
        return sample_captions(decoder.for_inference(table), features, seeds, K, max_length)


def losses_of(decoder, features, tokens, row_weights=None):
    return caption_losses(decoder, features, tokens[:, :-1], tokens[:, 1:], row_weights=row_weights).words


def all_captions(V: int, max_length: int):
    """Every caption that sampling can give, as tokens with <start>."""
    for length in range(max_length + 1):
        for words in itertools.product(range(UNK, V), repeat=length):
            yield [START, *words] if length == max_length else [START, *words, END]


def padded(captions, T):
    return torch.tensor([[*caption, *[PAD] * (T - len(caption))] for caption in captions])


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_captions_are_drawn_as_often_as_teacher_forcing_says(backend):
    decoder, features, K = make_decoder(backend=backend).eval(), make_features(2), 20000
    tokens = sample(decoder, features, K, 2)
    assert tokens.shape == (2 * K, 3) and tokens.dtype == torch.int64
    for feature, of_image in zip(features, tokens.view(2, K, 3).tolist(), strict=True):
        counts, total = Counter(tuple(w for w in row if w != PAD) for row in of_image), 0.0
        for caption in all_captions(6, 2):
            p = log_probability(decoder, feature, torch.tensor(caption)).exp().item()
            total += p
            assert abs(counts[tuple(caption)] - K * p) <= 5 * (K * p * (1 - p)) ** 0.5 + 1e-3, caption
        assert total == pytest.approx(1)


def test_sampling_multiplies_the_words_that_it_writes_not_all():
    decoder, V, (E, H) = make_decoder(1000), 1000, (4, 6)
    with FlopCounterMode(display=False) as counter:
        sample(decoder, make_features(1), 2, 3)
    logits = 2 * 3 * 2 * V * E  # of 2 rows in 3 steps
    assert logits < counter.get_total_flops() < logits + 2 * V * E * 4 * H


def test_samples_end_and_are_padded():
    tokens = sample(make_decoder(9).eval(), make_features(4), 3, 7, seed=2)
    assert (tokens[:, 0] == START).all() and (tokens[:, 1:] != START).all()
    assert (tokens[:, -1] != PAD).any()  # as long as the longest
    ends = 0
    for row in tokens[:, 1:].tolist():
        words = [word for word in row if word != PAD]
        assert row == words + [PAD] * (len(row) - len(words)) and END not in words[:-1]
        assert words[-1] == END or len(words) == 7
        ends += words[-1] == END
    assert 0 < ends < 12


def test_samples_come_from_the_seed_alone():
    decoder, features = make_decoder(9).eval(), make_features(4)

    def draw(seed):
        return sample(decoder, features, 3, 7, seed).tolist()

    first = draw(0)
    torch.rand(5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert draw(0) == first != draw(1)


def test_advantages_worked_by_hand():
    # Of 1, 2 and 6: the others' means are 4, 3.5 and 1.5.
    found = advantages(torch.tensor([[1.0, 2, 6], [5, 5, 5]]))
    assert found.tolist() == [[-3, -1.5, 4.5], [0, 0, 0]]


CAPTIONS = [
    ["A red dog runs .", "a dog runs on sand", "the unheard-of dog"],
    ["two cats", "<end> cats", "Two <unk> cats sleep"],
    ["a man in a hat", "a man"],
]


def test_rewards_are_pycocoevalcaps_with_the_end_as_a_word():
    vocabulary = Vocabulary.build(sum(CAPTIONS, []), min_count=2)
    assert vocabulary.words[4:] == ["a", "cats", "dog", "man", "runs", "two"]
    decoder, features = make_decoder(len(vocabulary)), make_features(2)
    scst = SelfCritical(vocabulary, CAPTIONS, samples=40, max_length=5)
    tokens, row_weights, figures = scst(decoder, features, [2, 1], seed=0)
    # Its words: <unk> is written so that no reference has it.
    written = [
        [{END: "END", UNK: "UNK"}.get(w, vocabulary.words[w]) for w in row if w > START] for row in tokens.tolist()
    ]
    images = [2] * 40 + [1] * 40
    references = {i: [" ".join([*tokenize(caption), "END"]) for caption in CAPTIONS[i]] for i in range(3)}
    truth = []
    for image, caption in zip(images, written, strict=True):
        answers = {i: [" ".join(caption) if i == image else "x"] for i in references}
        truth.append(Cider().compute_score(references, answers)[1][image])
    truth = torch.tensor(truth).view(2, 40)
    assert truth.std() > 0.1
    assert figures == {"reward": pytest.approx(truth.mean().item(), abs=1e-9)}
    others = (truth.sum(dim=1, keepdim=True) - truth) / 39
    torch.testing.assert_close(row_weights, (truth - others).flatten(), rtol=0, atol=1e-9)
    assert row_weights.dtype == torch.float64
    row_weights = scst(decoder, features.bfloat16(), [2, 1], seed=0)[1]
    assert row_weights.dtype == torch.float64  # rewards are not rounded to the features' half precision


def test_subwords_count_as_the_words_they_spell():
    captions = [["a dog", "a dog runs"], ["two cats"], ["the man"]]
    whole = Vocabulary([*Vocabulary.SPECIALS, "a", "dog", "the"])
    pieces = Vocabulary([*Vocabulary.SPECIALS, "▁a", "▁d", "og", "▁the"], merges=["▁ a"])
    expected = SelfCritical(whole, captions, 2, 5).rewards(torch.tensor([[START, 4, 5, END, PAD]]), [0])
    found = SelfCritical(pieces, captions, 2, 5).rewards(torch.tensor([[START, 4, 5, 6, END]]), [0])
    assert found.item() == pytest.approx(expected.item()) and found.item() > 2


def test_captions_without_spaces_count_as_characters():
    vocabulary = Vocabulary([*Vocabulary.SPECIALS, "▁", "黑", "狗跑", "。"], merges=["狗 跑"])
    scst = SelfCritical(vocabulary, [["黑狗在草地上跑。"], ["一只猫，白猫"]], 2, 6)
    spaced = SelfCritical(
        Vocabulary([*Vocabulary.SPECIALS, *"黑狗跑。"]), [["黑 狗 在 草 地 上 跑 。"], ["一 只 猫 ， 白 猫"]], 2, 6
    )
    found = scst.rewards(torch.tensor([[START, 4, 5, 6, 4, 7, END]]), [0])
    expected = spaced.rewards(torch.tensor([[START, 4, 5, 6, 7, END, PAD]]), [0])
    assert found.item() == pytest.approx(expected.item()) and found.item() > 1


def test_gradient_is_the_policy_gradient():
    """The mean over words of (reward - the other samples' mean reward) times the gradient of -log p, of samples."""
    vocabulary = Vocabulary([*Vocabulary.SPECIALS, "a", "dog"])
    decoder, features = make_decoder().eval(), make_features(2).requires_grad_()
    with torch.no_grad():
        decoder.word_output.bias[END] -= 2  # longer captions, with other rewards
    captions = [["a dog", "dog dog a"], ["a a"], ["a cat sleeps"]]
    scst = SelfCritical(vocabulary, captions, samples=4, max_length=4)
    tokens, row_weights, _ = scst(decoder, features, [0, 1], seed=8)
    words = (tokens[:, 1:] != PAD).sum()
    loss = losses_of(decoder, features, tokens, row_weights) / words
    leaves = [features, *decoder.parameters()]
    found = torch.autograd.grad(loss, leaves, materialize_grads=True)

    expected = [torch.zeros_like(leaf) for leaf in leaves]
    for image, rows in enumerate(tokens.view(2, 4, -1)):
        samples = [row[row != PAD] for row in rows]
        rewards = [scst.rewards(row.unsqueeze(0), [image]).item() for row in samples]
        assert len(set(rewards)) > 1
        for k, row in enumerate(samples):
            baseline = sum(rewards[:k] + rewards[k + 1 :]) / 3
            gradients = torch.autograd.grad(
                log_probability(decoder, features[image], row), leaves, materialize_grads=True
            )
            for total, gradient in zip(expected, gradients, strict=True):
                total -= (rewards[k] - baseline) * gradient / words
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


def test_gradient_has_the_mean_of_the_expected_rewards():
    """Over every pair of captions that can be drawn, each as often as it is."""
    decoder, features, V = make_decoder(V=5).eval(), make_features(1), 5
    captions = list(all_captions(V, 2))
    tokens = padded(captions, 3)
    rewards = torch.rand(len(captions), dtype=torch.double, generator=torch.Generator().manual_seed(0))
    log_p = torch.stack([log_probability(decoder, features[0], torch.tensor(caption)) for caption in captions])
    leaves = list(decoder.parameters())
    expected = torch.autograd.grad(-2 * (log_p.exp() * rewards).sum(), leaves, materialize_grads=True)

    p = log_p.exp().detach()
    mean = 0
    for i, j in itertools.product(range(len(captions)), repeat=2):
        row_weights = advantages(rewards[[i, j]].unsqueeze(0)).flatten()
        mean += p[i] * p[j] * losses_of(decoder, features, tokens[[i, j]], row_weights)
    found = torch.autograd.grad(mean, leaves, materialize_grads=True)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


def test_what_is_sampled_from_is_what_is_trained():
    decoder, features = make_decoder(9).eval(), make_features(2)
    scst = SelfCritical(Vocabulary([*Vocabulary.SPECIALS, *"abcde"]), [["a b"], ["c"]], samples=3, max_length=6)
    tokens, _, _ = scst(decoder, features, [0, 1], seed=8)
    found = losses_of(decoder, features, tokens)
    rows = zip(features.repeat_interleave(3, dim=0), tokens, strict=True)
    expected = -sum(log_probability(decoder.eval(), feature, row[row != PAD]) for feature, row in rows)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
