from types import SimpleNamespace

import numpy as np
import pytest
import torch

from attncap.config import ModelConfig
from attncap.data.vocabulary import Vocabulary
from attncap.models import Decoder
from attncap.models.losses import caption_losses

B, K, P, D, A, E, H, V = 2, 3, 5, 7, 6, 4, 8, 11


def make_decoder(implementation: str, **settings) -> Decoder:
    torch.manual_seed(1)
    config = ModelConfig(attention_size=A, embedding_size=E, hidden_size=H, dropout=0.0, **settings)
    return Decoder(config, D, V, implementation).double()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def by_the_equations(decoder: Decoder, features: np.ndarray, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """One caption of one image, from the paper's equations with nothing but NumPy: logits [T-1,V], weights [T-1,P]."""
    w = {name: value.detach().numpy() for name, value in decoder.named_parameters()}

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return w[f"{name}.weight"] @ x + w.get(f"{name}.bias", 0)

    h, c = linear("initial_h", features.mean(0)), linear("initial_c", features.mean(0))
    all_logits, all_weights = [], []
    for token in tokens[:-1]:
        word = w["embedding.weight"][token]
        scores = []
        for cell in features:  # equation 4
            x = linear("key", cell) + linear("query", h)
            scores.append(w["score_weight"] @ (np.tanh(x) if decoder.activation == "tanh" else np.maximum(x, 0)))
        weights = np.exp(scores) / np.exp(scores).sum()  # equation 5
        context = sigmoid(linear("gate", h)) * (weights @ features)  # equation 13 and section 4.2.1
        x = np.concatenate([word, context])
        gates = w["lstm.weight_ih"] @ x + w["lstm.bias_ih"] + w["lstm.weight_hh"] @ h + w["lstm.bias_hh"]
        i, f, g, o = np.split(gates, 4)  # equations 1 to 3
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        out = h
        if decoder.deep:  # equation 7
            out = word + linear("hidden_output", h) + linear("context_output", context)
        all_logits.append(linear("word_output", out))
        all_weights.append(weights)
    return np.array(all_logits), np.array(all_weights)


def make_tokens(lengths: list[int]) -> torch.Tensor:
    """Captions of so many words, <end> counted, after <start>."""
    random = torch.Generator().manual_seed(4)
    tokens = torch.full((len(lengths), max(lengths) + 1), Vocabulary.PAD)
    for row, length in zip(tokens, lengths, strict=True):
        row[: length + 1] = torch.randint(Vocabulary.START, V, (length + 1,), generator=random)
    return tokens


@pytest.mark.parametrize("implementation", ["torch", "native"])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("output_layer", ["plain", "deep"])
@pytest.mark.parametrize("K, lengths", [(3, [3, 1, 2, 5, 4, 5]), (1, [2, 6]), (1, [4, 3])])
def test_teacher_forcing_follows_the_paper(implementation, activation, output_layer, K, lengths):
    decoder = make_decoder(implementation, activation=activation, output_layer=output_layer)
    features, tokens = torch.randn(B, P, D, dtype=torch.double), make_tokens(lengths)
    written = decoder(features, tokens)
    words = list(zip(written.rows.tolist(), written.places.tolist(), strict=True))
    assert sorted(words) == [(n, t) for n, length in enumerate(lengths) for t in range(1, length + 1)]
    expected = [
        by_the_equations(decoder, features[n // K].numpy(), tokens[n, : length + 1].tolist())
        for n, length in enumerate(lengths)
    ]
    logits = decoder.word_output(written.outputs).detach().numpy()
    for m, (n, t) in enumerate(words):
        np.testing.assert_allclose(logits[m], expected[n][0][t - 1], rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(written.weights[m].detach().numpy(), expected[n][1][t - 1], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("implementation", ["torch", "native"])
def test_losses_follow_the_paper(implementation):
    """Equation 14, from the equations' logits and weights; smoothed, weighted by row, and fed other words."""
    decoder = make_decoder(implementation)
    lengths = [3, 1, 2, 5, 4, 5]
    features, tokens = torch.randn(B, P, D, dtype=torch.double), make_tokens(lengths)
    inputs = torch.where(torch.rand(len(tokens), tokens.shape[1] - 1) < 0.5, tokens[:, :-1], 7)
    row_weights = torch.randn(len(tokens), dtype=torch.double)
    smoothing, words, attention = 0.2, 0.0, 0.0
    for n, length in enumerate(lengths):
        fed = [*inputs[n, :length].tolist(), 0]  # the last one is not looked at
        logits, weights = by_the_equations(decoder, features[n // K].numpy(), fed)
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        of_targets = log_p[np.arange(length), tokens[n, 1 : length + 1].numpy()]
        words -= row_weights[n].item() * ((1 - smoothing) * of_targets + smoothing * log_p.mean(axis=1)).sum()
        attention += ((1 - weights.sum(axis=0)) ** 2).mean()
    losses = caption_losses(decoder, features, tokens, smoothing, row_weights, inputs)
    np.testing.assert_allclose([losses[x].item() for x in ("words", "attention")], [words, attention], rtol=1e-11)


@pytest.mark.parametrize("output_layer", ["plain", "deep"])
def test_native_and_torch_agree(output_layer):
    """Same losses and same gradients, within float64's rounding."""
    features, tokens = torch.randn(B, P, D, dtype=torch.double), make_tokens([3, 1, 2, 5, 4, 5])
    results = []
    for implementation in ("torch", "native"):
        decoder = make_decoder(implementation, output_layer=output_layer)
        features_copy = features.clone().requires_grad_()
        losses = caption_losses(decoder, features_copy, tokens, label_smoothing=0.1)
        (losses["words"] + losses["attention"]).backward()
        gradients = {name: p.grad for name, p in decoder.named_parameters()}
        results.append((losses, features_copy.grad, gradients))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_captions_without_words():
    """They count for nothing beside others, and cannot be all."""
    decoder, features = make_decoder("native"), torch.randn(B, P, D, dtype=torch.double)
    losses = caption_losses(decoder, features, make_tokens([0, 3]))
    alone = caption_losses(decoder, features[1:], make_tokens([0, 3])[1:])
    torch.testing.assert_close(losses["words"], alone["words"])
    torch.testing.assert_close(losses["attention"], alone["attention"] + 1)
    for wrong in (make_tokens([0, 0]), make_tokens([3, 2, 1]), make_tokens([3])[:0]):
        with pytest.raises(ValueError, match="rows of tokens for 2 images"):
            decoder(features, wrong)


def test_an_image_costs_its_own_longest_caption():
    """Not that of the batch; and features that come sorted are not copied."""
    decoder, asked = make_decoder("torch"), []
    attention_lstm = decoder.ops.attention_lstm
    decoder.ops = SimpleNamespace(
        **{
            **vars(decoder.ops),
            "attention_lstm": lambda *inputs, **options: (
                asked.append((inputs[0], options["batch_sizes"])) or attention_lstm(*inputs, **options)
            ),
        }
    )
    features = torch.randn(B, P, D, dtype=torch.double)
    decoder(features, make_tokens([1, 2, 2, 5, 4, 1]))
    decoder(features, make_tokens([5, 4, 1, 1, 2, 2]))
    assert [images for _, images in asked] == [[2, 2, 1, 1, 1]] * 2
    assert torch.equal(asked[0][0], features.flip(0)) and asked[1][0] is features
