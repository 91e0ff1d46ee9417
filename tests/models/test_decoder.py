import numpy as np
import pytest
import torch

from attncap.config import ModelConfig
from attncap.data.vocabulary import Vocabulary
from attncap.models import Decoder

B, K, P, D, A, E, H, V = 2, 3, 5, 7, 6, 4, 8, 11


def make_decoder(**settings) -> Decoder:
    torch.manual_seed(1)
    config = ModelConfig(attention_size=A, embedding_size=E, hidden_size=H, dropout=0.0, **settings)
    return Decoder(config, D, V, "torch").double()


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


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("output_layer", ["plain", "deep"])
def test_teacher_forcing_follows_the_paper(activation, output_layer):
    decoder = make_decoder(activation=activation, output_layer=output_layer)
    features = torch.randn(B, P, D, dtype=torch.double)
    tokens = torch.randint(0, V, (B * K, 6))
    logits, weights = decoder(features, tokens)
    for n in range(B * K):
        expected = by_the_equations(decoder, features[n // K].numpy(), tokens[n].tolist())
        np.testing.assert_allclose(logits[n].detach().numpy(), expected[0], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(weights[n].detach().numpy(), expected[1], rtol=1e-12, atol=1e-12)


def test_native_and_torch_agree():
    """Same logits and same gradients, within float64's rounding."""
    features = torch.randn(B, P, D, dtype=torch.double)
    tokens = torch.randint(Vocabulary.END, V, (B * K, 6))
    results = []
    for implementation in ("torch", "native"):
        torch.manual_seed(1)
        config = ModelConfig(attention_size=A, embedding_size=E, hidden_size=H, dropout=0.0)
        decoder = Decoder(config, D, V, implementation).double()
        features_copy = features.clone().requires_grad_()
        logits, weights = decoder(features_copy, tokens)
        (logits.square().mean() + (1 - weights.sum(1)).square().mean()).backward()
        gradients = {name: p.grad for name, p in decoder.named_parameters()}
        results.append((logits, weights, features_copy.grad, gradients))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)
