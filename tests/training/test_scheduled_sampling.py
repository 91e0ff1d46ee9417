import itertools

import pytest
import torch

from attncap.config import ModelConfig
from attncap.data.vocabulary import Vocabulary
from attncap.models.decoder import LSTMDecoder
from attncap.models.losses import caption_losses
from attncap.search.sampling import draw, uniform_numbers
from attncap.training.scheduled_sampling import sample_inputs

V, P, D = 13, 6, 7


def make(output_layer="deep", backend="native", dtype=torch.float64, images=3, rows=2):
    torch.manual_seed(0)
    config = ModelConfig(attention_size=5, embedding_size=6, hidden_size=8, output_layer=output_layer, dropout=0.5)
    decoder = LSTMDecoder(config, D, V, backend).to(dtype)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    features = torch.randn(images, P, D, dtype=dtype)
    tokens = torch.full((images * rows, 9), Vocabulary.PAD)
    for i, row in enumerate(tokens):
        length = 2 + i % 6  # words
        row[: length + 2] = torch.tensor([Vocabulary.START, *torch.randint(3, V, (length,)).tolist(), Vocabulary.END])
    return decoder, features, tokens


def sampled(decoder, features, tokens, probability, seed=1):
    """Captions [N,T] of which the words that are fed, all but the last, went through `sample_inputs`."""
    inputs = sample_inputs(decoder.for_inference(), features, tokens[:, :-1], probability, seeds(features, seed))
    return torch.cat([inputs, tokens[:, -1:]], dim=1)


def seeds(features, seed=1):
    return [(seed, image) for image in range(len(features))]


@torch.no_grad()
def write(decoder, image, fed):
    """image [P,D], words fed so far -> the logits [V] of the next one, from the first word on, by the paper's formulas;
    without dropout."""
    mean = image.mean(dim=0)
    h, c = decoder.initial_h(mean), decoder.initial_c(mean)
    for word in fed:
        embedded = decoder.embedding.weight[word]
        weights = (
            (decoder.attention.key(image) + decoder.attention.query(h)).relu() @ decoder.attention.score_weight
        ).softmax(dim=0)
        context = decoder.attention.gate(h).sigmoid() * (weights @ image)
        h, c = decoder.lstm(torch.cat([embedded, context]), (h, c))
    if decoder.deep:
        return decoder.word_output(embedded + decoder.hidden_output(h) + decoder.context_output(context))
    return decoder.word_output(h)


def one_by_one(decoder, features, tokens, probability, seed):
    """`sample_inputs` for one caption and one word at a time."""
    rows, T = len(tokens) // len(features), tokens.shape[1] - 1
    numbers = uniform_numbers(seeds(features, seed), 2, rows, T).tolist()
    coins, draws = ([row for of_image in numbers for row in of_image[which]] for which in (0, 1))
    mixed = []
    for n, caption in enumerate(tokens.tolist()):
        fed = [caption[0]]
        for t in range(1, T):
            word = caption[t]
            if word not in (Vocabulary.PAD, Vocabulary.END) and coins[n][t] < probability:
                weights = write(decoder, features[n // rows], fed).exp().tolist()
                weights[Vocabulary.PAD] = weights[Vocabulary.START] = weights[Vocabulary.END] = 0.0
                sums = itertools.accumulate(weights)
                word = next(i for i, total in enumerate(sums) if total > draws[n][t] * sum(weights))
            fed.append(word)
        mixed.append([*fed, caption[-1]])
    return torch.tensor(mixed)


@pytest.mark.parametrize("output_layer", ["deep", "plain"])
@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("probability", [1.0, 0.4])
def test_as_one_caption_at_a_time(output_layer, backend, probability):
    """With probability 1 it is sampling freely, but for the lengths."""
    decoder, features, tokens = make(output_layer, backend)
    for seed in range(5):
        mixed = sampled(decoder, features, tokens, probability, seed)
        assert mixed.equal(one_by_one(decoder, features, tokens, probability, seed))
        assert not mixed.equal(tokens)


def test_with_probability_0_nothing_changes():
    decoder, features, tokens = make()
    before = tokens.clone()
    assert sampled(decoder, features, tokens, 0.0).equal(tokens)
    sampled(decoder, features, tokens, 1.0)
    assert tokens.equal(before)


def test_lengths_stay():
    decoder, features, tokens = make(images=20, rows=5)
    mixed = sampled(decoder, features, tokens, 1.0)
    for special in (Vocabulary.PAD, Vocabulary.START, Vocabulary.END):
        assert (mixed == special).equal(tokens == special)


def test_words_come_as_often_as_the_model_has_them():
    """The first word of 20,000 captions of one image, then the share of replaced words."""
    decoder, features, _ = make(images=1)
    tokens = torch.tensor([[Vocabulary.START, 4, 5, Vocabulary.END]]).repeat(20_000, 1)
    mixed = sampled(decoder, features, tokens, 1.0)
    logits = write(decoder, features[0], [Vocabulary.START])
    logits[: Vocabulary.END + 1] = -torch.inf
    expected = logits.softmax(dim=0)
    found = torch.bincount(mixed[:, 1], minlength=V) / 20_000
    assert expected.max() < 0.9
    assert ((found - expected).abs() < 4 * (expected * (1 - expected) / 20_000).sqrt() + 1e-9).all()
    rare = 3 + int(expected[3:].argmin())  # so that a replaced word is seldom the same
    tokens[:, 1] = rare
    share = (sampled(decoder, features, tokens, 0.25)[:, 1] != rare).double().mean()
    assert share.item() == pytest.approx(0.25 * (1 - expected[rare].item()), abs=0.015)


def test_the_same_seeds_give_the_same_captions():
    decoder, features, tokens = make(dtype=torch.float32)
    torch.manual_seed(5)
    first = torch.rand(1)
    torch.manual_seed(5)
    one, other, third = (sampled(decoder, features, tokens, 1.0, seed) for seed in (1, 1, 2))
    assert one.equal(other) and not one.equal(third)
    assert torch.rand(1).equal(first)  # torch's own generator was not asked
    # An image's words depend on its own seed alone, not on the batch.
    alone = sample_inputs(decoder.for_inference(), features[1:2], tokens[2:4, :-1], 1.0, seeds(features)[1:2])
    assert alone.equal(one[2:4, :-1])


def test_the_ends_of_the_draw():
    """The largest and the smallest draw still give words that have a probability."""
    for size in (6, 9490):
        logits = torch.randn(64, size, generator=torch.Generator().manual_seed(1))
        zeros = torch.zeros(64, dtype=torch.float64)
        ones = zeros + 1 - 2**-53
        assert draw(logits, ones).max() < size and draw(logits, zeros).eq(0).all()
        logits[:, 0] = logits[:, -1] = -torch.inf
        assert draw(logits, ones).max() < size - 1 and draw(logits, zeros).eq(1).all()
        assert draw(logits * torch.nan, zeros).max() < size


def test_fed_to_the_loss():
    """What is fed changes the loss; the targets stay; no gradient flows through the drawing."""
    decoder, features, tokens = make()
    decoder.eval()
    fed, targets = sampled(decoder, features, tokens, 1.0)[:, :-1], tokens[:, 1:]
    losses = caption_losses(decoder, features, fed, targets)
    expected = 0.0
    for n, (caption, words) in enumerate(zip(tokens.tolist(), fed.tolist(), strict=True)):
        for t in range(1, 1 + caption.index(Vocabulary.END)):
            expected -= write(decoder, features[n // 2], words[:t]).log_softmax(dim=0)[caption[t]].item()
    assert losses.words.item() == pytest.approx(expected, rel=1e-6)
    true_words = caption_losses(decoder, features, tokens[:, :-1], targets).words.item()
    assert losses.words.item() != pytest.approx(true_words, rel=1e-3)
    losses.words.backward()
    assert decoder.embedding.weight.grad.abs().sum() > 0


def test_under_autocast():
    """Words are drawn in the precision of the weights, from features that came out of an encoder in half of it."""
    decoder, features, tokens = make(dtype=torch.float32)
    expected = sampled(decoder, features.bfloat16().float(), tokens, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert sampled(decoder, features.bfloat16(), tokens, 1.0).equal(expected)
