import pytest
import torch

from attncap.config import ModelConfig
from attncap.data.vocabulary import Vocabulary
from attncap.models.decoder import Decoder
from attncap.models.losses import caption_losses
from attncap.training.scheduled_sampling import _draw, mix_tokens

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
def one_by_one(decoder, features, tokens, probability, generator):
    """The same for one caption at a time, with all logits and sums of its own."""
    decoder.eval()
    coins, draws = torch.rand(2, *tokens.shape, generator=generator).tolist()
    rows = len(tokens) // len(features)
    mixed = []
    for n, caption in enumerate(tokens.tolist()):
        memory, state = decoder.start(features[n // rows : n // rows + 1], rows=1)
        fed = [caption[0]]
        for t in range(1, len(caption)):
            embedded = decoder.embedding(torch.tensor([fed[-1]]))
            state, context, _ = decoder.step(embedded, state, memory)
            word = caption[t]
            if word not in (Vocabulary.PAD, Vocabulary.END) and coins[n][t] < probability:
                weights = decoder.logits(embedded, state.h, context)[0].exp().tolist()
                weights[Vocabulary.PAD] = weights[Vocabulary.START] = weights[Vocabulary.END] = 0.0
                left = draws[n][t] * sum(weights)
                for word, weight in enumerate(weights):  # noqa: B007
                    left -= weight
                    if left < 0:
                        break
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
    with torch.no_grad():
        logits = decoder.eval()(features, tokens[:1])[0][0, 0]
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
    decoder.train()
    one, other, third = (mix_tokens(decoder, features, tokens, 1.0, generator(seed)) for seed in (1, 1, 2))
    assert one.equal(other) and not one.equal(third)
    assert torch.rand(1).equal(first)  # torch's own generator was not asked
    assert decoder.training and decoder.dropout.training
    # How much of the generator a call takes does not depend on the probability.
    a, b = generator(), generator()
    mix_tokens(decoder, features, tokens, 0.0, a)
    mix_tokens(decoder, features, tokens, 1.0, b)
    assert a.get_state().equal(b.get_state())


def test_a_draw_that_is_rounded_up():
    """The largest number below 1 still draws a word of the vocabulary."""
    for size in (5, 9490):
        logits = torch.randn(64, size, generator=generator())
        assert _draw(logits, torch.full((64,), 1 - 2**-24)).max() < size
        assert _draw(logits, torch.zeros(64)).eq(Vocabulary.UNK).all()


def test_fed_to_the_loss():
    """What is fed changes the loss; what is to be predicted stays; no gradient goes through the drawing."""
    decoder, features, tokens = make()
    decoder.eval()
    mixed = mix_tokens(decoder, features, tokens, 1.0, generator())
    assert not mixed.is_floating_point() and not decoder.training
    losses = caption_losses(decoder, features, tokens, inputs=mixed[:, :-1])
    logits, _ = decoder(features, mixed)
    written = tokens[:, 1:] != Vocabulary.PAD
    expected = -logits.log_softmax(dim=2).gather(2, tokens[:, 1:].unsqueeze(2)).squeeze(2)[written].sum()
    assert losses["words"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert losses["words"].item() != pytest.approx(caption_losses(decoder, features, tokens)["words"].item(), rel=1e-3)
    losses["words"].backward()
    assert decoder.embedding.weight.grad.abs().sum() > 0


def test_under_autocast():
    decoder, features, tokens = make(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = mix_tokens(decoder, features, tokens, 1.0, generator())
    assert ((mixed >= 0) & (mixed < V)).all() and mixed.shape == tokens.shape
