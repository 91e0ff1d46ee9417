import itertools

import pytest
import torch

from attncap.config import ModelConfig
from attncap.data.vocabulary import Vocabulary
from attncap.models.decoder import Decoder
from attncap.models.losses import caption_losses
from attncap.training.scheduled_sampling import draw_words, mix_tokens

V, P, D = 13, 6, 7


def make(output_layer="deep", implementation="native", dtype=torch.float64, images=3, rows=2):
    torch.manual_seed(0)
    config = ModelConfig(attention_size=5, embedding_size=6, hidden_size=8, output_layer=output_layer, dropout=0.5)
    decoder = Decoder(config, D, V, implementation).to(dtype)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    features = torch.randn(images, P, D, dtype=dtype)
    tokens = torch.full((images * rows, 9), Vocabulary.PAD)
    for i, row in enumerate(tokens):
        length = 2 + i % 6  # words
        row[: length + 2] = torch.tensor([Vocabulary.START, *torch.randint(3, V, (length,)).tolist(), Vocabulary.END])
    return decoder, features, tokens


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def write(decoder, image, fed):
    """image [P,D], words fed so far -> the logits [V] of the next one, from the first word on, by the paper's formulas;
    without dropout."""
    mean = image.mean(dim=0)
    h, c = decoder.initial_h(mean), decoder.initial_c(mean)
    for word in fed:
        embedded = decoder.embedding.weight[word]
        weights = ((decoder.key(image) + decoder.query(h)).relu() @ decoder.score_weight).softmax(dim=0)
        context = decoder.gate(h).sigmoid() * (weights @ image)
        h, c = decoder.lstm(torch.cat([embedded, context]), (h, c))
    if decoder.deep:
        return decoder.word_output(embedded + decoder.hidden_output(h) + decoder.context_output(context))
    return decoder.word_output(h)


def one_by_one(decoder, features, tokens, probability, generator):
    """`mix_tokens` for one caption and one word at a time."""
    coins, draws = torch.rand(2, *tokens.shape, generator=generator).tolist()
    rows = len(tokens) // len(features)
    mixed = []
    for n, caption in enumerate(tokens.tolist()):
        fed = [caption[0]]
        for t in range(1, len(caption)):
            word = caption[t]
            if word not in (Vocabulary.PAD, Vocabulary.END) and coins[n][t] < probability:
                weights = write(decoder, features[n // rows], fed).exp().tolist()
                weights[Vocabulary.PAD] = weights[Vocabulary.START] = weights[Vocabulary.END] = 0.0
                sums = itertools.accumulate(weights)
                word = next(i for i, total in enumerate(sums) if total > draws[n][t] * sum(weights))
            fed.append(word)
        mixed.append(fed)
    return torch.tensor(mixed)


@pytest.mark.parametrize("output_layer", ["deep", "plain"])
@pytest.mark.parametrize("implementation", ["native", "torch"])
@pytest.mark.parametrize("probability", [1.0, 0.4])
def test_as_one_caption_at_a_time(output_layer, implementation, probability):
    """With probability 1 it is sampling freely, but for the lengths."""
    decoder, features, tokens = make(output_layer, implementation)
    for seed in range(5):
        mixed = mix_tokens(decoder, features, tokens, probability, generator(seed))
        assert mixed.equal(one_by_one(decoder, features, tokens, probability, generator(seed)))
        assert not mixed.equal(tokens)


def test_with_probability_0_nothing_changes():
    decoder, features, tokens = make()
    before = tokens.clone()
    assert mix_tokens(decoder, features, tokens, 0.0, generator()).equal(tokens)
    mix_tokens(decoder, features, tokens, 1.0, generator())
    assert tokens.equal(before)


def test_lengths_stay():
    decoder, features, tokens = make(images=20, rows=5)
    mixed = mix_tokens(decoder, features, tokens, 1.0, generator())
    for special in (Vocabulary.PAD, Vocabulary.START, Vocabulary.END):
        assert (mixed == special).equal(tokens == special)


def test_words_come_as_often_as_the_model_has_them():
    """The first word of 20,000 captions of one image, then the share of replaced words."""
    decoder, features, _ = make(images=1)
    tokens = torch.tensor([[Vocabulary.START, 4, 5, Vocabulary.END]]).repeat(20_000, 1)
    mixed = mix_tokens(decoder, features, tokens, 1.0, generator())
    logits = write(decoder, features[0], [Vocabulary.START])
    logits[: Vocabulary.END + 1] = -torch.inf
    expected = logits.softmax(dim=0)
    found = torch.bincount(mixed[:, 1], minlength=V) / 20_000
    assert expected.max() < 0.9
    assert ((found - expected).abs() < 4 * (expected * (1 - expected) / 20_000).sqrt() + 1e-9).all()
    rare = 3 + int(expected[3:].argmin())  # so that a replaced word is seldom the same
    tokens[:, 1] = rare
    share = (mix_tokens(decoder, features, tokens, 0.25, generator())[:, 1] != rare).double().mean()
    assert share.item() == pytest.approx(0.25 * (1 - expected[rare].item()), abs=0.015)


def test_the_same_generator_gives_the_same_captions():
    decoder, features, tokens = make(dtype=torch.float32)
    torch.manual_seed(5)
    first = torch.rand(1)
    torch.manual_seed(5)
    one, other, third = (mix_tokens(decoder, features, tokens, 1.0, generator(seed)) for seed in (1, 1, 2))
    assert one.equal(other) and not one.equal(third)
    assert torch.rand(1).equal(first)  # torch's own generator was not asked
    # How much of the generator a call takes does not depend on the probability.
    a, b = generator(), generator()
    mix_tokens(decoder, features, tokens, 0.0, a)
    mix_tokens(decoder, features, tokens, 1.0, b)
    assert a.get_state().equal(b.get_state())


def test_the_ends_of_the_draw():
    """The largest and the smallest draw still give words that have a probability."""
    for size in (6, 9490):
        logits = torch.randn(64, size, generator=generator())
        assert draw_words(logits, torch.full((64,), 1 - 2**-24), Vocabulary.UNK).max() < size
        assert draw_words(logits, torch.zeros(64), Vocabulary.UNK).eq(Vocabulary.UNK).all()
        logits[:, Vocabulary.UNK] = logits[:, -1] = -torch.inf
        assert draw_words(logits, torch.full((64,), 1 - 2**-24), Vocabulary.UNK).max() < size - 1
        assert draw_words(logits, torch.zeros(64), Vocabulary.UNK).eq(Vocabulary.UNK + 1).all()
        assert draw_words(logits * torch.nan, torch.zeros(64), Vocabulary.UNK).max() < size


def test_fed_to_the_loss():
    """What is fed changes the loss; what is to be predicted stays; no gradient goes through the drawing."""
    decoder, features, tokens = make()
    decoder.eval()
    mixed = mix_tokens(decoder, features, tokens, 1.0, generator())
    losses = caption_losses(decoder, features, tokens, inputs=mixed[:, :-1])
    expected = 0.0
    for n, (caption, fed) in enumerate(zip(tokens.tolist(), mixed.tolist(), strict=True)):
        for t in range(1, 1 + caption.index(Vocabulary.END)):
            expected -= write(decoder, features[n // 2], fed[:t]).log_softmax(dim=0)[caption[t]].item()
    assert losses["words"].item() == pytest.approx(expected, rel=1e-6)
    assert losses["words"].item() != pytest.approx(caption_losses(decoder, features, tokens)["words"].item(), rel=1e-3)
    losses["words"].backward()
    assert decoder.embedding.weight.grad.abs().sum() > 0


def test_under_autocast():
    """Drawn in the weights' own precision, from features that came out of an encoder in half of it."""
    decoder, features, tokens = make(dtype=torch.float32)
    expected = mix_tokens(decoder, features.bfloat16().float(), tokens, 1.0, generator())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mix_tokens(decoder, features.bfloat16(), tokens, 1.0, generator()).equal(expected)
